"""Sampling parameters of a batch as tensors, one entry per sequence, as the kernels read them."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeVar

import torch

from inferlab import _C

GREEDY_TEMPERATURE: float = _C.GREEDY_TEMPERATURE  # below it a temperature is read as 0

T = TypeVar("T", int, float)


@dataclass(frozen=True, eq=False)
class SamplingTensors:
    """How the next token of each of B sequences is chosen. All tensors on the logits' device.

    Applied in this order: repetition penalty (the formula of Hugging Face and CTRL, over prompt
    and output), frequency and presence penalty (OpenAI's, over the output), logit bias,
    temperature, top-k, top-p, min-p. Tokens rank by logit, ties by lower id: top-k keeps the first
    k exactly, top-p the shortest prefix whose renormalised mass reaches top_p (at least one token),
    min-p the tokens with p >= min_p * p_max. At temperature 0 (below 1e-5) the token is the argmax
    of the penalised logits and the three filters do not matter.

    Attributes:
        temperature: f32[B], >= 0.
        top_k: i32[B], >= 0; 0 is off.
        top_p: f32[B] in (0, 1]; 1 is off.
        min_p: f32[B] in [0, 1]; 0 is off.
        seed: i64[B], all 64 bits count.
        repetition_penalty: f32[B] > 0 or None; 1 is off.
        presence_penalty, frequency_penalty: f32[B] or None; 0 is off.
        context_tokens: i32[B, M] or None: prompt, then output, up to and with the tree's root (the
            newest committed token). Needed by the penalties.
        context_lens, prompt_lens: i32[B]: how much of a row of context_tokens counts, and how much
            of that is the prompt.
        bias_tokens: i32[B, J] or None (-1 pads); bias_values: f32[B, J], added to those logits.
    """

    temperature: torch.Tensor
    top_k: torch.Tensor
    top_p: torch.Tensor
    min_p: torch.Tensor
    seed: torch.Tensor
    repetition_penalty: torch.Tensor | None = None
    presence_penalty: torch.Tensor | None = None
    frequency_penalty: torch.Tensor | None = None
    context_tokens: torch.Tensor | None = None
    context_lens: torch.Tensor | None = None
    prompt_lens: torch.Tensor | None = None
    bias_tokens: torch.Tensor | None = None
    bias_values: torch.Tensor | None = None

    flat: tuple[Any, ...] = field(init=False, repr=False)  # all of them in order, for the ops

    def __post_init__(self) -> None:
        flat = (
            self.temperature,
            self.top_k,
            self.top_p,
            self.min_p,
            self.seed,
            self.repetition_penalty,
            self.presence_penalty,
            self.frequency_penalty,
            self.context_tokens,
            self.context_lens,
            self.prompt_lens,
            self.bias_tokens,
            self.bias_values,
        )
        object.__setattr__(self, "flat", flat)

    @property
    def uses_context(self) -> bool:
        return (
            self.repetition_penalty is not None
            or self.presence_penalty is not None
            or self.frequency_penalty is not None
        )

    @property
    def changes_logits(self) -> bool:
        """Whether there are penalties or a bias: a row is then copied before it is chosen from."""
        return self.uses_context or self.bias_tokens is not None

    def without_penalties(self) -> SamplingTensors:
        """Temperature, filters and seed alone: no penalties, no bias."""
        return SamplingTensors(self.temperature, self.top_k, self.top_p, self.min_p, self.seed)

    def to(self, device: torch.device | str) -> SamplingTensors:
        """The same parameters on another device."""
        moved: list[Any] = [None if t is None else t.to(device) for t in self.flat]
        return SamplingTensors(*moved)

    @classmethod
    def of(
        cls,
        batch: int,
        *,
        temperature: float | Sequence[float] = 0.0,
        top_k: int | Sequence[int] = 0,
        top_p: float | Sequence[float] = 1.0,
        min_p: float | Sequence[float] = 0.0,
        seed: int | Sequence[int] = 0,
        repetition_penalty: float | Sequence[float] = 1.0,
        presence_penalty: float | Sequence[float] = 0.0,
        frequency_penalty: float | Sequence[float] = 0.0,
        prompt_tokens: Sequence[Sequence[int]] | None = None,
        output_tokens: Sequence[Sequence[int]] | None = None,
        logit_bias: Mapping[int, float] | Sequence[Mapping[int, float] | None] | None = None,
        device: torch.device | str = "cpu",
    ) -> SamplingTensors:
        """Builds the tensors from Python values: one for all sequences, or one per sequence.

        Args:
            batch: B, the number of sequences.
            prompt_tokens, output_tokens: per sequence, read only if a penalty is on.
            logit_bias: token id -> value added to its logit.

        Raises:
            ValueError: a value out of range, a list of the wrong length, or a penalty without its
                tokens; the message names the argument.
        """
        if batch < 1:
            raise ValueError(f"batch is {batch}; it must be >= 1")

        def column(
            name: str, value: T | Sequence[T], low: float, high: float, open_low: bool
        ) -> list[T]:
            values = list(value) if isinstance(value, Sequence) else [value] * batch
            if len(values) != batch:
                raise ValueError(f"{name} has {len(values)} values; it must have {batch}, one each")
            for v in values:
                if not (low < v if open_low else low <= v) or not v <= high:
                    left = "(" if open_low else "["
                    raise ValueError(f"{name} is {v}; it must be in {left}{low}, {high}]")
            return values

        def f32(values: list[float]) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.float32, device=device)

        def i32(values: Any) -> torch.Tensor:
            return torch.tensor(values, dtype=torch.int32, device=device)

        finite = 3.4e38
        seeds = list(seed) if isinstance(seed, Sequence) else [seed] * batch
        if len(seeds) != batch:
            raise ValueError(f"seed has {len(seeds)} values; it must have {batch}, one each")
        signed = [(s & (2**64 - 1)) - (2**64 if s & 2**63 else 0) for s in seeds]
        repetition = column("repetition_penalty", repetition_penalty, 0.0, finite, True)
        presence = column("presence_penalty", presence_penalty, -finite, finite, False)
        frequency = column("frequency_penalty", frequency_penalty, -finite, finite, False)
        optional: dict[str, torch.Tensor] = {}
        if any(r != 1.0 for r in repetition):
            optional["repetition_penalty"] = f32(repetition)
        if any(v != 0.0 for v in presence):
            optional["presence_penalty"] = f32(presence)
        if any(v != 0.0 for v in frequency):
            optional["frequency_penalty"] = f32(frequency)
        if optional:
            if prompt_tokens is None and output_tokens is None:
                raise ValueError(f"{', '.join(optional)} needs prompt_tokens, output_tokens")
            prompts = (
                [list(r) for r in prompt_tokens] if prompt_tokens is not None else [[]] * batch
            )
            outputs = (
                [list(r) for r in output_tokens] if output_tokens is not None else [[]] * batch
            )
            if len(prompts) != batch or len(outputs) != batch:
                raise ValueError(
                    f"prompt_tokens and output_tokens have {len(prompts)} and {len(outputs)} rows; "
                    f"they must have {batch}, one for each sequence"
                )
            rows = [p + o for p, o in zip(prompts, outputs, strict=True)]
            width = max(1, *(len(r) for r in rows)) if rows else 1
            optional["context_tokens"] = i32([r + [0] * (width - len(r)) for r in rows])
            optional["context_lens"] = i32([len(r) for r in rows])
            optional["prompt_lens"] = i32([len(p) for p in prompts])
        if logit_bias is not None:
            maps = [logit_bias] * batch if isinstance(logit_bias, Mapping) else list(logit_bias)
            if len(maps) != batch:
                raise ValueError(f"logit_bias has {len(maps)} entries; it must have {batch}")
            items = [sorted((m or {}).items()) for m in maps]
            for token, value in (pair for row in items for pair in row):
                if token < 0 or math.isnan(value) or value == math.inf:
                    raise ValueError(
                        f"logit_bias has {token}: {value}; tokens must be >= 0, values < inf"
                    )
            width = max(len(row) for row in items)
            if width > 0:
                optional["bias_tokens"] = i32(
                    [[t for t, _ in row] + [-1] * (width - len(row)) for row in items]
                )
                optional["bias_values"] = f32(
                    [[v for _, v in row] + [0.0] * (width - len(row)) for row in items]  # type: ignore[arg-type, misc]
                )
        return cls(
            temperature=f32(column("temperature", temperature, 0.0, finite, False)),
            top_k=i32(column("top_k", top_k, 0, 2**31 - 1, False)),
            top_p=f32(column("top_p", top_p, 0.0, 1.0, True)),
            min_p=f32(column("min_p", min_p, 0.0, 1.0, False)),
            seed=torch.tensor(signed, dtype=torch.int64, device=device),
            **optional,
        )
