"""The values that cross every layer: what a request asks for and what a generation returns."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Integral, Real
from typing import NamedTuple

LARGEST = 1e30
"""Of the numbers that logits are changed by; their smallest is 1 / LARGEST. The arithmetic has 32
bits, in which products of larger ones are infinite, and quotients by smaller ones."""


@dataclass(frozen=True)
class SamplingParams:
    """How one request is decoded.

    Order of the filters: repetition, presence and frequency penalty, logit bias, temperature,
    top-k, top-p, min-p. ``temperature=0`` takes the arg-max (lowest id on ties).

    Args:
        max_tokens: new tokens at most, >= 1.
        min_tokens: end-of-text and stop tokens cannot be chosen before this many new tokens.
        temperature: >= 0; 0 is greedy.
        top_k: keep the k largest logits; 0 keeps all.
        top_p: keep the smallest set of that mass, in (0, 1].
        min_p: keep tokens with p >= min_p * max(p), in [0, 1].
        repetition_penalty: > 0, over prompt and output (Keskar et al., 2019); 1 is off.
        presence_penalty: subtracted once per distinct output token.
        frequency_penalty: subtracted per occurrence in the output.
        logit_bias: token id -> value added to its logit.
        seed: 64-bit key of the noise; the same seed gives the same tokens for any drafter or batch.
        stop: strings that end the generation, at the first token after which the new text contains
            one; the text is cut before it. Special tokens are no part of the text, but a stop
            string that is one's whole name ends the generation at that token.
        stop_token_ids: token ids that end it, beside the model's end-of-text ids.
        ignore_eos: go on past the model's end-of-text ids.
        logprobs: how many of the likeliest tokens are told with each new one, and how likely all
            these are by the model's own logits; 0: the new one alone; None: nothing of it.
    """

    max_tokens: int = 64
    min_tokens: int = 0
    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    presence_penalty: float = 0.0
    frequency_penalty: float = 0.0
    logit_bias: Mapping[int, float] | None = None
    seed: int = 0
    stop: tuple[str, ...] = ()
    stop_token_ids: tuple[int, ...] = ()
    ignore_eos: bool = False
    logprobs: int | None = None

    def __post_init__(self) -> None:
        if self.logprobs is not None:
            object.__setattr__(self, "logprobs", _integer("logprobs", self.logprobs))
            check("logprobs", self.logprobs, self.logprobs >= 0, "an integer >= 0, or None")
        for name in ("max_tokens", "min_tokens", "top_k", "seed"):
            object.__setattr__(self, name, _integer(name, getattr(self, name)))
        for name in (
            "temperature",
            "top_p",
            "min_p",
            "repetition_penalty",
            "presence_penalty",
            "frequency_penalty",
        ):
            value = getattr(self, name)
            check(name, value, isinstance(value, Real) and not isinstance(value, bool), "a number")
        for name, kind, allowed in (
            ("stop", str, "a tuple of strings"),
            ("stop_token_ids", Integral, "a tuple of token ids"),
        ):
            value = getattr(self, name)
            ok = isinstance(value, (tuple, list)) and all(isinstance(v, kind) for v in value)
            check(name, value, ok, allowed)
        check("logit_bias", self.logit_bias, _is_bias(self.logit_bias), _BIAS)
        check("max_tokens", self.max_tokens, 1 <= self.max_tokens < 2**31, "an integer >= 1")
        check(
            "min_tokens",
            self.min_tokens,
            0 <= self.min_tokens <= self.max_tokens,
            f"between 0 and max_tokens ({self.max_tokens})",
        )
        check(
            "temperature",
            self.temperature,
            0 <= self.temperature <= LARGEST,
            f"a number from 0 to {LARGEST}",
        )
        check(
            "top_k",
            self.top_k,
            0 <= self.top_k < 2**31,
            "an integer from 0 to 2**31 - 1 (0 keeps all tokens)",
        )
        check("top_p", self.top_p, 1 / LARGEST <= self.top_p <= 1, f"in [{1 / LARGEST}, 1]")
        check("min_p", self.min_p, 0 <= self.min_p <= 1, "in [0, 1]")
        check(
            "repetition_penalty",
            self.repetition_penalty,
            1 / LARGEST <= self.repetition_penalty <= LARGEST,
            f"a number from {1 / LARGEST} to {LARGEST} (1 is off)",
        )
        for name in ("presence_penalty", "frequency_penalty"):
            value = getattr(self, name)
            allowed = f"a number from {-LARGEST} to {LARGEST} (0 is off)"
            check(name, value, abs(value) <= LARGEST, allowed)
        check("seed", self.seed, 0 <= self.seed < 2**64, "an integer in [0, 2**64)")
        check("stop", self.stop, all(self.stop), "non-empty strings")
        for text in self.stop:
            check_text("stop", text)

    @property
    def has_penalties(self) -> bool:
        return (
            self.repetition_penalty != 1.0
            or self.presence_penalty != 0.0
            or self.frequency_penalty != 0.0
        )


_BIAS = (
    f"a mapping from token ids to numbers from {-LARGEST} to {LARGEST} (or -inf, which forbids the "
    f"token)"
)


def _integer(name: str, value: object) -> int:
    ok = isinstance(value, Integral) and not isinstance(value, bool)
    check(name, value, ok, "an integer")
    return int(value)  # type: ignore[call-overload,no-any-return]


def _is_bias(bias: object) -> bool:
    if bias is None:
        return True
    return isinstance(bias, Mapping) and all(
        isinstance(token, Integral)
        and isinstance(value, Real)
        and (abs(float(value)) <= LARGEST or value == -math.inf)
        for token, value in bias.items()
    )


def check(name: str, value: object, ok: bool, allowed: str) -> None:
    """Raises ValueError naming the argument, its value and what is allowed, unless ``ok``."""
    if not ok:
        raise ValueError(f"{name} is {value!r}; it must be {allowed}")


def check_text(name: str, text: str) -> None:
    """Raises ValueError where ``text`` holds half of a surrogate pair, as broken JSON escapes and
    undecodable arguments do: no encoding, and so no tokenizer and no server, can take it."""
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"{name} holds {text[error.start]!r} at character {error.start}, half of a surrogate "
            f"pair, which cannot be encoded; complete it or take it out"
        ) from None


def check_room(key: str, prompt: int, asked: int, limit: int | None, model: str) -> None:
    """Raises ValueError where a prompt and what is asked for behind it exceed a model's context.

    Args:
        key: how the caller names what is asked for, ``max_tokens``.
        prompt, asked, limit: in tokens; ``limit`` None: there is none.
    """
    if limit is not None and prompt + asked > limit:
        room = limit - prompt
        remedy = f" or ask for at most {room} new tokens" if room > 0 else ""
        raise ValueError(
            f"prompt ({prompt} tokens) and {key} ({asked}) exceed the context of {model} "
            f"({limit} tokens); shorten the prompt{remedy}"
        )


@dataclass
class SpeculationStats:
    """What speculation did for one request, or for several added up.

    A *step* is one target forward that verified a draft tree (a plain step has an empty one).
    ``proposed`` counts the depth of each tree offered, not its nodes: it is the number of draft
    tokens that could have been accepted, so ``accepted / proposed`` means the same on chains and
    trees. ``emitted`` counts the tokens kept from steps, the bonus token of each included.
    So ``emitted`` is ``accepted + steps``, or one less where the text ended at a draft token.
    ``prefill_forwards`` read the text before the first step, whose forward reads the last chunk.
    """

    steps: int = 0
    proposed: int = 0
    accepted: int = 0
    emitted: int = 0
    draft_nodes: int = 0
    prefill_forwards: int = 0
    offered_at: list[int] = field(default_factory=list)
    accepted_at: list[int] = field(default_factory=list)

    def record(self, depth: int, nodes: int, accepted: int, emitted: int) -> None:
        """Adds one step: a tree of ``depth`` levels and ``nodes`` nodes below the root."""
        self.steps += 1
        self.proposed += depth
        self.accepted += accepted
        self.emitted += emitted
        self.draft_nodes += nodes
        while len(self.offered_at) < depth:
            self.offered_at.append(0)
            self.accepted_at.append(0)
        for i in range(depth):
            self.offered_at[i] += 1
            self.accepted_at[i] += i < accepted

    def add(self, other: SpeculationStats) -> None:
        self.steps += other.steps
        self.proposed += other.proposed
        self.accepted += other.accepted
        self.emitted += other.emitted
        self.draft_nodes += other.draft_nodes
        self.prefill_forwards += other.prefill_forwards
        while len(self.offered_at) < len(other.offered_at):
            self.offered_at.append(0)
            self.accepted_at.append(0)
        for i, (offered, accepted) in enumerate(
            zip(other.offered_at, other.accepted_at, strict=True)
        ):
            self.offered_at[i] += offered
            self.accepted_at[i] += accepted

    @property
    def acceptance_rate(self) -> float:
        """Accepted draft tokens over proposed ones, in [0, 1]; 0 where nothing was proposed."""
        return self.accepted / self.proposed if self.proposed else 0.0

    @property
    def mean_accepted_length(self) -> float:
        """Tokens kept per step, the bonus token included: 1.0 is plain decoding."""
        return self.emitted / self.steps if self.steps else 0.0

    @property
    def acceptance_by_position(self) -> list[float]:
        """Entry i: in which share of the steps that offered it was draft position i accepted."""
        return [a / o for a, o in zip(self.accepted_at, self.offered_at, strict=True)]

    @property
    def target_forwards(self) -> int:
        """Forwards of the target: steps, and those before them that read a long prompt."""
        return self.steps + self.prefill_forwards


class TokenLogprobs(NamedTuple):
    """What the target thought of a token that was chosen.

    Attributes:
        logprob: of the token itself; 0 where it was given and not chosen.
        top: ids and log-probabilities of the likeliest, the best first.
    """

    logprob: float
    top: list[tuple[int, float]]


@dataclass
class GenerationResult:
    """One finished (or interrupted) request."""

    token_ids: list[int]
    finish_reason: str  # "length", "stop" (end token), "stop_string", "interrupted", "error"
    stats: SpeculationStats
    latency_ms: float
    first_token_ms: float
    timings_ms: dict[str, float]
    text: str = ""
    error: str | None = None
    logprobs: list[TokenLogprobs] | None = None
