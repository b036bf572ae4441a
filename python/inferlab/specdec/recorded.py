"""The files of a recording: what every decoding step drafted, what the target chose, what it took.

A folder holds runs, ``DIR/run-001``, ``DIR/run-002``, ...; each process that records into it adds
one. A run is a series of parts, ``part-00001.safetensors``, ..., each written whole or not at all,
that any reader of safetensors can open: columns of one length per table, little-endian.

====================  =====  ======================================================================
column                type   what it is
====================  =====  ======================================================================
``step.kind``         u8     0: the first token of texts, in the forward that reads their end, with
                             nothing drafted; 1: decoding; 2: decoding, but the drafter had to catch
                             up with steps it took no part in, so its time says little
``step.rows``         u16    B, sequences; their rows follow in order
``step.levels``       u8     levels that were asked for
``step.budget``       u16    nodes that were asked for, root not counted
``step.at_s``         f64    seconds from the beginning of the run to the end of the step
``step.ms``           f32    [., 6] milliseconds of `PHASES`: the engine's clock, and in "rest" what
                             it does besides; writing the recording is not part of it
``row.request``       i32    number of the request
``row.root``          i32    position of the root, the newest token of the text
``row.nodes``         u16    n, nodes of its tree, root included; they follow in order
``row.depth``         u8     levels that the drafter says it offered
``row.accepted``      u16    draft tokens on the walk
``row.limit``         u16    tokens that could be kept at most; 65535: all
``row.emitted``       u16    tokens that the text got; they follow in order
``emitted.token``     i32    these tokens; a text's are all of its new ones
``node.token``        i32    drafted; of node 0, the root, the text's newest token
``node.parent``       u8     its number in the tree, always smaller; of a root 0
``node.rank``         u8     place in the order of worth: the first m by rank are a tree for each m
``node.choice``       i32    what the target chooses behind the node: with the request's seed, at
                             that position, as plain decoding would there; -1: it cannot
``node.probability``  f32    the target's p of the node's token at its parent, after filters (at
                             temperature 0: plain softmax), as ``conf_threshold`` reads it;
                             of a root NaN
``node.place``        u16    how many tokens the target ranks before it there; 65535: that or more
``node.drafted``      f32    the draft's own probability of the token; NaN where it has none to tell
``node.kind``         u8     how sure the drafter is of the path to it, as a judge is told (see
                             `inferlab.specdec.acceptance.kinds_of`); 255: nobody was
``request.id``        i32    in the part where its first row is
``request.prompt``    i32    tokens of the prompt
``request.most``      i32    new tokens that were asked for
``request.seed``      i64    all 64 bits count
``request.heat``      f32    temperature
====================  =====  ======================================================================

Metadata: ``inferlab_recording``, the version of this format, and ``about``, JSON: package and torch
versions, machine, models, dtype, draft mode, drafter, its tree and ladder, policy, controller,
settings, what the drafter says of its nodes, and what steps cost on this machine (see
`inferlab.specdec.costs`). No text and no prompt is in a recording, but its token ids are.
"""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save

from inferlab.errors import UsageError
from inferlab.output import replace_file
from inferlab.specdec.recorded_checks import problem_of_about, problem_of_part, problem_of_run

VERSION = 2
KEY = "inferlab_recording"
PHASES = ("prefill", "draft", "verify", "accept", "commit", "rest")
FIRST, DECODING, CATCHING_UP = 0, 1, 2
NO_LIMIT = 65535
MOST_PLACES = 65535
NO_KIND = 255

COLUMNS: dict[str, type] = {
    "step.kind": np.uint8,
    "step.rows": np.uint16,
    "step.levels": np.uint8,
    "step.budget": np.uint16,
    "step.at_s": np.float64,
    "step.ms": np.float32,
    "row.request": np.int32,
    "row.root": np.int32,
    "row.nodes": np.uint16,
    "row.depth": np.uint8,
    "row.accepted": np.uint16,
    "row.limit": np.uint16,
    "row.emitted": np.uint16,
    "emitted.token": np.int32,
    "node.token": np.int32,
    "node.parent": np.uint8,
    "node.rank": np.uint8,
    "node.choice": np.int32,
    "node.probability": np.float32,
    "node.place": np.uint16,
    "node.drafted": np.float32,
    "node.kind": np.uint8,
    "request.id": np.int32,
    "request.prompt": np.int32,
    "request.most": np.int32,
    "request.seed": np.int64,
    "request.heat": np.float32,
}

_RUN, _PART = re.compile(r"run-(\d{3,})"), re.compile(r"part-(\d{5,})\.safetensors")


@dataclass(frozen=True)
class Recording:
    """A run, read.

    Attributes:
        folder: of the run.
        about: see above.
        columns: all parts' together.
        num_bytes: of its files.
    """

    folder: Path
    about: dict[str, Any]
    columns: dict[str, np.ndarray]
    num_bytes: int

    @property
    def num_steps(self) -> int:
        return len(self.columns["step.kind"])

    @property
    def num_nodes(self) -> int:
        return len(self.columns["node.token"])


def check_folder(folder: Path, name: str = "record") -> list[str]:
    """Makes a folder of recordings where there is none; returns the names of its runs.

    Raises:
        UsageError: there are other things in it, or it cannot be written; begins with ``name``.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        there = sorted(entry.name for entry in folder.iterdir())
    except (FileExistsError, NotADirectoryError):
        raise UsageError(f"{name}: {folder} is a file or below one; name a directory") from None
    except (OSError, ValueError) as error:  # which is what a NUL in a name raises
        why = getattr(error, "strerror", None) or error
        raise UsageError(
            f"{name}: {str(folder)!r} cannot be made: {why}; name a directory that can"
        ) from None
    others = [entry for entry in there if not _RUN.fullmatch(entry)]
    if others:
        raise UsageError(
            f"{name}: {folder} holds {others[0]}, which is no recording; name an empty or a new "
            f"directory"
        )
    if not os.access(folder, os.W_OK):
        raise UsageError(f"{name}: {folder} cannot be written: permission denied")
    return there


def begin_run(folder: Path) -> Path:
    """A run of one's own in a folder of recordings. Raises UsageError as `check_folder` does."""
    number = max((int(entry[4:]) for entry in check_folder(folder)), default=0) + 1
    while True:
        run = folder / f"run-{number:03d}"
        try:
            run.mkdir()
            return run
        except FileExistsError:  # another process was faster
            number += 1
        except OSError as error:
            raise UsageError(f"record: {run}: {error.strerror or error}") from None


def write_part(
    run: Path, number: int, columns: Mapping[str, np.ndarray], about: Mapping[str, Any]
) -> None:
    """Writes a part, whole or not at all. Raises OSError."""
    ready: dict[str, np.ndarray] = {
        name: np.ascontiguousarray(columns[name], kind) for name, kind in COLUMNS.items()
    }
    metadata = {KEY: str(VERSION), "about": json.dumps(about, default=str)}
    replace_file(run / f"part-{number:05d}.safetensors", save(ready, metadata))


def find_run(folder: Path) -> Path:
    """The run that a folder is, or the newest one in it that has parts.

    Raises:
        UsageError: there is none.
    """
    if not folder.is_dir():
        what = "is a file" if folder.exists() else "does not exist"
        raise UsageError(f"DIR: {folder} {what}; name the directory that was given to --record")
    if _parts(folder):
        return folder
    runs = sorted(
        (int(match[1]), entry)
        for entry in folder.iterdir()
        if (match := _RUN.fullmatch(entry.name)) and entry.is_dir()
    )
    for _, run in reversed(runs):
        if _parts(run):
            return run
    if runs or _RUN.fullmatch(folder.name):
        raise UsageError(
            f"DIR: {folder} holds no steps: nothing was decoded while it was recorded, or nothing "
            f"of it could be written"
        )
    raise UsageError(
        f"DIR: {folder} holds no recording; make one with: inferlab specdec --record {folder} ..."
    )


def read_recording(folder: Path) -> Recording:
    """Reads a run, or the newest one of a folder.

    Raises:
        UsageError: there is none, or it is damaged or of another version; names the file.
    """
    run = find_run(folder)
    parts = _parts(run)
    for expected, (number, path) in enumerate(parts, start=1):
        if number != expected:
            raise UsageError(f"DIR: {run}: part {expected} is missing, {path.name} is there")
    read = [_read_part(path) for _, path in parts]
    columns = {name: np.concatenate([part[name] for part, _ in read]) for name in COLUMNS}
    about = read[0][1]
    if problem := problem_of_run(columns, about):
        raise UsageError(f"DIR: {run} is damaged: {problem}; record anew")
    return Recording(run, about, columns, sum(path.stat().st_size for _, path in parts))


def _parts(run: Path) -> list[tuple[int, Path]]:
    return sorted(
        (int(match[1]), entry)
        for entry in run.iterdir()
        if (match := _PART.fullmatch(entry.name)) is not None
    )


def _read_part(path: Path) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    damaged = f"DIR: {path} is damaged"
    try:
        with safe_open(path, framework="np") as file:
            metadata = file.metadata() or {}
            version = metadata.get(KEY)
            if version is None:
                raise UsageError(f"DIR: {path} is no part of a recording")
            if version != str(VERSION):
                raise UsageError(
                    f"DIR: {path} is of version {version} of the format, and this inferlab reads "
                    f"version {VERSION}: replay it with the inferlab that wrote it, or record anew"
                )
            about = json.loads(metadata["about"])
            columns = {name: file.get_tensor(name) for name in COLUMNS}
    except (SafetensorError, KeyError, json.JSONDecodeError, OSError) as error:
        raise UsageError(f"{damaged}: {error}; record anew") from None
    problem = problem_of_about(about) or problem_of_part(columns, COLUMNS, len(PHASES))
    if problem:
        raise UsageError(f"{damaged}: {problem}; record anew")
    return columns, about
