"""How much is drafted in a step."""

from __future__ import annotations

from inferlab.simulation.acceptance import Acceptance
from inferlab.simulation.prices import Prices
from inferlab.simulation.setting import PAYS, Setting

CONTEXTS = 64
"""Contexts are told apart in steps of so many tokens, in octaves beyond."""


class Drafting:
    """Levels by batch and context: always as many, or those that give most tokens per ms."""

    def __init__(self, setting: Setting, acceptance: Acceptance, prices: Prices) -> None:
        self._acceptance, self._prices = acceptance, prices
        self.fixed: int | None = None if isinstance(setting.levels, str) else setting.levels
        most = min(setting.max_k, acceptance.most) if setting.levels == PAYS else 0
        self.choices = range(most + 1) if self.fixed is None else (self.fixed,)
        self._chosen: dict[tuple[int, int], int] = {}

    def levels(self, batch: int, context: float) -> int:
        """Of a step for so many sequences behind ``context`` tokens in the mean."""
        if self.fixed is not None:
            return self.fixed
        bucket = (int(context) // CONTEXTS + 1).bit_length()
        key = batch, bucket
        if key not in self._chosen:
            middle = CONTEXTS * 1.5 * 2.0 ** (bucket - 1) - CONTEXTS
            self._chosen[key] = max(
                self.choices,
                key=lambda k: self.mean(k) / self._prices.decode_ms(batch, k, middle),
            )
        return self._chosen[key]

    def mean(self, levels: int) -> float:
        """Tokens of such a step for a sequence."""
        return self._acceptance.mean(levels) if levels > 0 else 1.0
