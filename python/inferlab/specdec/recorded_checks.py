"""What of a recording contradicts itself: nothing that is read is to be believed. No torch."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from inferlab.specdec.acceptance import SURE

Columns = Mapping[str, np.ndarray]


class _Facts(BaseModel):
    model_config = ConfigDict(extra="allow", strict=True)


class _Tree(_Facts):
    form: Literal["chain", "static", "grown", "merged"]
    levels: int = Field(ge=0)
    nodes: int = Field(ge=0)
    width: int = Field(ge=0)
    remembers: bool
    by_text: bool


class _Policy(_Facts):
    policy: str


class _Controller(_Facts):
    controller: str


class _Known(_Facts):
    model_config = ConfigDict(extra="forbid", strict=True)

    by_rank: list[float] = []
    by_kind: list[float] = []
    evidence: float = 0.0
    asks: bool = False
    looks_up: bool = False
    examines: bool = False


class _About(_Facts):
    """What is read of a recording's ``about``."""

    model: str
    draft_mode: str
    draft_model: str | None
    tree: _Tree
    ladder: list[Annotated[list[int], Field(min_length=2, max_length=2)]]
    known: _Known | None
    policy: _Policy
    controller: _Controller
    K: int = Field(ge=0)
    temperature: float
    machine: list[Any] = Field(min_length=4)


def problem_of_about(about: Any) -> str | None:
    """What is wrong with the facts of a run."""
    try:
        _About.model_validate(about)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(map(str, ("about", *first["loc"])))
        return f"{where}: {first['msg']}"
    return None


def problem_of_part(columns: Columns, kinds: Mapping[str, type], phases: int) -> str | None:
    """What is wrong with the tables of a part.

    Args:
        kinds: the type of each column, those of a table behind each other.
        phases: width of ``step.ms``.
    """
    for name, kind in kinds.items():
        column = columns[name]
        if column.dtype != kind:
            return f"{name} is {column.dtype}, not {np.dtype(kind)}"
        if column.shape[1:] != ((phases,) if name == "step.ms" else ()):
            return f"{name} has the shape {column.shape}"
        table = name.partition(".")[0]
        first = next(n for n in kinds if n.startswith(f"{table}."))
        if len(column) != len(columns[first]):
            return f"{name} has {len(column)} entries, {first} has {len(columns[first])}"
    for count, counted in (
        ("step.rows", "row.request"),
        ("row.nodes", "node.token"),
        ("row.emitted", "emitted.token"),
    ):
        total = int(columns[count].sum(dtype=np.int64))
        if total != len(columns[counted]):
            return f"{count} counts {total}, there are {len(columns[counted])}"
    return _problem_of_trees(columns) or _problem_of_values(columns)


def _problem_of_trees(columns: Columns) -> str | None:
    nodes = columns["row.nodes"].astype(np.int64)
    if len(nodes) and nodes.min() < 1:
        return "row.nodes has a tree without a root"
    starts = np.repeat(np.cumsum(nodes) - nodes, nodes)
    own = np.arange(len(starts)) - starts
    if np.any(columns["node.parent"] > np.maximum(own - 1, 0)):
        return "node.parent has a parent behind its child"
    ranks = np.sort(starts + columns["node.rank"])
    if np.any(ranks != np.arange(len(starts))):
        return "node.rank has a tree whose nodes are not in one order"
    if np.any(columns["row.accepted"] >= nodes):
        return "row.accepted has more tokens than the tree has nodes"
    return None


def _problem_of_values(columns: Columns) -> str | None:
    for name, good, meaning in (
        ("step.kind", columns["step.kind"] <= 2, "0, 1 or 2"),
        ("step.ms", _finite(columns["step.ms"].sum(axis=1)), "times, not below 0 together"),
        ("step.at_s", np.isfinite(columns["step.at_s"]), "times"),
        ("row.limit", columns["row.limit"] >= 1, "at least 1"),
        ("node.probability", _share(columns["node.probability"]), "from 0 to 1"),
        ("node.drafted", _share(columns["node.drafted"]), "from 0 to 1"),
        ("request.prompt", columns["request.prompt"] >= 1, "at least 1"),
        ("request.most", columns["request.most"] >= 1, "at least 1"),
    ):
        if not np.all(good):
            return f"{name} has entries that are not {meaning}"
    return None


def _finite(ms: np.ndarray) -> np.ndarray:
    good: np.ndarray = np.isfinite(ms) & (ms >= 0)
    return good


def _share(probabilities: np.ndarray) -> np.ndarray:
    good: np.ndarray = np.isnan(probabilities) | ((probabilities >= 0) & (probabilities <= 1.001))
    return good


def problem_of_run(columns: Columns, about: Mapping[str, Any]) -> str | None:
    """What is wrong with all parts together: whether each step begins where the one before it of
    that text ended."""
    ids = columns["request.id"]
    if len(np.unique(ids)) < len(ids):
        return "request.id has a request twice"
    order = np.argsort(ids, kind="stable")
    places = np.searchsorted(ids[order], columns["row.request"])
    if np.any(places >= len(ids)) or np.any(ids[order][places] != columns["row.request"]):
        return "row.request has requests that are not in request.id"
    by_text = np.argsort(places, kind="stable")
    text, root = places[by_text], columns["row.root"][by_text].astype(np.int64)
    ends = root + columns["row.emitted"][by_text]
    begins = np.append(True, text[1:] != text[:-1]) if len(text) else np.zeros(0, bool)
    prompts = columns["request.prompt"][order][text].astype(np.int64)
    expected = np.where(begins, prompts - 1, np.append(0, ends[:-1])) if len(text) else root
    if np.any(root != expected):
        return "row.root has steps that do not begin where the text had come to"
    known = about.get("known") or {}
    most = max(len(SURE), len(known.get("by_kind") or ()))
    kinds = columns["node.kind"]
    if np.any((kinds >= most) & (kinds != 255)):
        return f"node.kind has kinds above {most - 1}"
    return None
