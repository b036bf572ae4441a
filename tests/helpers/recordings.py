"""Recorded runs on the bundled models."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from helpers.bundled import PROMPTS
from inferlab import SpeculativePipeline
from inferlab.models import TargetModel
from inferlab.specdec.recorded import Recording, read_recording


def record(
    folder: Path,
    draft_mode: str,
    target: TargetModel | None = None,
    *,
    batch: int = 1,
    temperature: float = 0.0,
    max_tokens: int = 40,
    prompts: list[str] = PROMPTS[:4],
    **settings: Any,
) -> tuple[list[dict[str, Any]], Recording]:
    """The prompts decoded, ``batch`` at a time, each with a seed of its own; results and record."""
    settings.setdefault("controller", "fixed")
    pipeline = SpeculativePipeline(draft_mode=draft_mode, target=target, record=folder, **settings)
    results: list[dict[str, Any]] = []
    for first in range(0, len(prompts), batch):
        chunk = prompts[first : first + batch]
        seeds = list(range(first, first + len(chunk)))
        results += pipeline.generate(
            chunk, max_tokens=max_tokens, temperature=temperature, seed=seeds
        )
    return results, read_recording(folder)
