"""Draws how loss and held-out acceptance went, beside the checkpoint."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from inferlab.plots import new_figure


def draw_curve(file: Path, history: list[dict[str, Any]], *, title: str) -> None:
    """Writes a PNG: loss by update, acceptance by position and accepted length by update.

    Args:
        history: entries with `step` and either `loss` or `heldout_by_position` and
            `heldout_length`, that of chains.

    Raises:
        ValueError: matplotlib is missing.
    """
    losses = [(entry["step"], entry["loss"]) for entry in history if "loss" in entry]
    measured = [entry for entry in history if "heldout_length" in entry]
    steps = [entry["step"] for entry in measured]
    figure = new_figure(12, 3.6)
    loss, shares, lengths = figure.subplots(1, 3)
    loss.plot(*zip(*losses, strict=True) if losses else ((), ()))
    loss.set(title="training loss", xlabel="update", ylabel="nats")
    for position in range(len(measured[0]["heldout_by_position"]) if measured else 0):
        points = [entry["heldout_by_position"][position] for entry in measured]
        shares.plot(steps, points, marker=".", label=f"position {position + 1}")
    shares.set(title="held-out acceptance", xlabel="update", ylim=(0, 1))
    lengths.plot(steps, [entry["heldout_length"] for entry in measured], marker=".")
    lengths.set(title="tokens per target forward in chains, bonus included", xlabel="update")
    if measured:
        shares.legend()
    figure.suptitle(title)
    figure.savefig(file, dpi=100)
