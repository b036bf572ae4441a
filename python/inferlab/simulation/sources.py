"""What a recording tells a simulation: prices, acceptance and texts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from inferlab.lengths import Lengths
from inferlab.simulation.acceptance import Recorded
from inferlab.simulation.load import Text
from inferlab.simulation.prices import NO_OVERHEAD, Overhead, Prices
from inferlab.specdec.costs import CostModel
from inferlab.specdec.cuts import Trees
from inferlab.specdec.recorded import Recording
from inferlab.specdec.replay_times import Times


class Source(NamedTuple):
    """What a recording tells.

    Attributes:
        prices: of its steps; where it keeps no costs, they are fitted to the recorded ones.
        measured: it keeps costs.
    """

    prices: Prices
    acceptance: Recorded
    measured: bool

    @property
    def texts(self) -> tuple[Text, ...]:
        """Its requests, each with the trace of its own steps."""
        prompts, outputs = self.acceptance.prompts, self.acceptance.outputs
        return tuple(
            Text(int(prompt), max(int(output), 1), trace)
            for trace, (prompt, output) in enumerate(zip(prompts, outputs, strict=True))
        )


def of_recording(
    recording: Recording,
    costs: CostModel | None = None,
    overhead: Overhead = NO_OVERHEAD,
    seed: int = 0,
) -> Source:
    """Reads a recording.

    Args:
        costs: instead of its own; they are taken as they are, not scaled to the recorded steps.
        overhead: of a server.

    Raises:
        UsageError: of a policy that cannot be replayed, or without decoding steps.
    """
    acceptance = Recorded(recording, seed)
    kept = recording.about.get("costs")
    if costs is not None:
        return Source(Prices(costs, acceptance.nodes, overhead), acceptance, True)
    own = CostModel.from_json(kept) if kept is not None else None
    times = Times(recording, Trees(recording, inner=False), own)
    prices = Prices(
        times.costs,
        acceptance.nodes,
        overhead,
        times.step_scale,
        times.draft_scale,
        times.reading_scale,
    )
    return Source(prices, acceptance, times.measured)


def found(lengths: Sequence[int]) -> Lengths:
    """To be drawn from, each as likely as the others."""
    return Lengths("found", found=tuple(int(n) for n in np.asarray(lengths)))
