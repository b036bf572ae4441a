"""Costs that were measured, kept on disk by what they hang on."""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Mapping
from typing import Any

import torch
from platformdirs import user_cache_path

from inferlab import _C, __version__
from inferlab.machine import processor_name, usable_cores
from inferlab.models import TargetModel, format_of
from inferlab.output import replace_file
from inferlab.specdec.costs import CostModel

logger = logging.getLogger(__name__)


def describe_costs(
    target: TargetModel, draft: Any, max_k: int, settings: Mapping[str, Any]
) -> dict[str, Any]:
    """What costs hang on: machine, versions, threads, models, formats, and how drafts are made."""
    device = target.device
    gpu = torch.cuda.get_device_name(device) if device.type == "cuda" else None
    return {
        "machine": [processor_name(), usable_cores(), gpu, str(device)],
        "versions": [__version__, torch.__version__],
        "threads": [torch.get_num_threads(), _C.num_threads(), _C.active_isa()],
        "target": model_facts(target),
        "draft": draft,
        "max_k": max_k,
        "settings": dict(settings),
    }


def model_facts(model: TargetModel | None) -> list[Any]:
    """What a model's times hang on."""
    config = getattr(model, "config", None)
    facts: list[Any] = []
    if model is not None:
        facts = [model.name, format_of(model), getattr(model, "engine", None)]
    return [*facts, config.to_dict() if config is not None else None]


def kept_costs(
    facts: Mapping[str, Any],
    measure: Callable[[], CostModel | None],
    *,
    anew: bool = False,
    keep: bool = True,
) -> CostModel | None:
    """What is kept under these facts, or what is measured now, which is then kept.

    A file that cannot be read or written is no error: costs are measured again.

    Args:
        facts: as JSON types, or such as have a text.
        anew: measure, whatever is kept.
        keep: False: the files are neither read nor written.
    """
    text = json.dumps(facts, sort_keys=True, default=str)
    name = hashlib.sha256(text.encode()).hexdigest()[:32]
    file = user_cache_path("inferlab") / "costs" / f"{name}.json"
    if keep and not anew and file.is_file():
        try:
            return CostModel.from_json(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            logger.debug("costs are measured: %s", error)
    costs = measure()
    if keep and costs is not None:
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            replace_file(file, costs.to_json().encode())
        except OSError as error:
            logger.debug("costs are not kept: %s", error)
    return costs
