"""The exact part: laws of small cases read off the verifier, and inputs that broke others.

Every list of children that a case can have is enumerated with its probability. Given a list, the
verifier walks once for each seed, and its probabilities follow from the outcomes (`readoff`): those
of each acceptance, those of the draw where none was accepted. Mixed, they are the law of the
emitted token, in intervals; where p lies outside, the verifier is not lossless, with no chance of
error.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch

from inferlab.certify import readoff
from inferlab.certify.cases import CASES, Case, Floats, Siblings, logits_of
from inferlab.certify.outputs import Check, exact_distance, failed, passed
from inferlab.certify.readoff import Inconsistent, Law
from inferlab.certify.statistics import total_variation
from inferlab.certify.verifiers import Verifier, Walks
from inferlab.kernels import SamplingTensors, VerifyResult, build_tree
from inferlab.kernels.noise import PURPOSE_ACCEPT, PURPOSE_RECOVERY, PURPOSE_TOKEN
from inferlab.specdec.policies import Policy

SEEDS = 4096
"""Walks for each list of children; a law is known to a few times 1 / SEEDS."""
ROUNDING = 1e-5
"""How far float32 arithmetic may push a probability."""

_PREFIX = 7  # tokens before the root


def enumerated(
    policy: Policy, verifier: Verifier, seeds: int = SEEDS, cases: Sequence[Case] = CASES
) -> list[Check]:
    """A check for each case: is the law of the emitted token the target's?

    A policy that is not lossless has no law to keep to: its checks tell how far it is off.
    """
    return [_check(case, policy, verifier, seeds) for case in cases]


def _check(case: Case, policy: Policy, verifier: Verifier, seeds: int) -> Check:
    target = case.law()
    try:
        laws = [
            (chance, law_given(case, siblings, policy, verifier, seeds))
            for siblings, chance in case.draws()
        ]
    except Inconsistent as error:
        return failed("exact", case.name, str(error))
    if case.draft is None:  # each list for itself; the worst one counts
        law = max(
            (law for _, law in laws),
            key=lambda law: (law.excess(target), total_variation(law.middle, target)),
        )
    else:
        law = readoff.combine([((chance, chance), law) for chance, law in laws])
    distance = exact_distance(law, target)
    if policy.lossless and law.excess(target) > ROUNDING:
        digits = 3 if distance["tv"] > 0.005 else 5
        text = f"emits {shown(law.middle, digits)}, the target is {shown(target, digits)}"
        return failed("exact", case.name, text, distance)
    return passed("exact", case.name, f"{len(laws)} lists of children", distance)


def law_given(
    case: Case, siblings: Siblings, policy: Policy, verifier: Verifier, seeds: int
) -> Law:
    """The law of the token emitted at a node with these children.

    Raises:
        Inconsistent: outcomes that do not come from the noise that they are documented to come
            from, or that are no tokens of the vocabulary.
    """
    size, count = len(case.target), len(siblings)
    rows = logits_of(case.target).expand(seeds, count + 1, -1)
    draft = None
    if case.draft is not None:
        draft = logits_of(case.draft).expand(seeds, count + 1, -1)
    result = verifier(
        Walks(
            rows,
            draft,
            torch.tensor([[0, *siblings]] * seeds, dtype=torch.int32),
            build_tree(torch.tensor([[-1] + [0] * count] * seeds, dtype=torch.int32)),
            torch.full((seeds,), _PREFIX, dtype=torch.int32),
            case.sampling(range(seeds)),
            case.with_replacement,
        )
    )
    tokens = result.accepted_tokens[:, 0].numpy().astype(np.int64)
    entered = np.where(
        result.num_accepted.numpy() > 1, result.accepted_nodes.numpy()[:, 1], -1
    ).astype(np.int64)
    where = f"children {list(siblings)}: "
    impossible = case.law() == 0
    if (tokens < 0).any() or (tokens >= size).any():
        raise Inconsistent(f"{where}token {tokens.min()} was emitted, which is none")
    if impossible[tokens].any():
        token = tokens[impossible[tokens]][0]
        raise Inconsistent(f"{where}token {token} was emitted, whose probability is 0")
    for child, token in enumerate(siblings, start=1):
        if (tokens[entered == child] != token).any():
            raise Inconsistent(f"{where}child {child} was entered, but not emitted")
    at = _PREFIX + 1
    try:
        if policy.is_match:
            return readoff.read_argmax(readoff.gumbels(seeds, at, size, PURPOSE_TOKEN), tokens)
        if policy.needs_draft_logits:
            return _read_rejection(siblings, entered, tokens, size, at)
        return _read_lossy(siblings, entered, tokens, size, at)
    except Inconsistent as error:
        raise Inconsistent(where + str(error)) from None


def _read_rejection(siblings: Siblings, entered: Any, tokens: Any, size: int, at: int) -> Law:
    """Acceptance of each child that is come to, then the draw."""
    u = readoff.uniforms(len(tokens), at, len(siblings) + 1, PURPOSE_ACCEPT)
    parts: list[tuple[tuple[float, float], Law]] = []
    come, left = (1.0, 1.0), np.ones(len(tokens), dtype=bool)
    for child, token in enumerate(siblings, start=1):
        accepted = entered == child
        try:
            low, high = readoff.read_threshold(u[left, child], accepted[left])
        except Inconsistent as error:
            raise Inconsistent(f"child {child}: {error}") from None
        parts.append(((come[0] * low, come[1] * high), readoff.certain(token, size)))
        come = come[0] * (1 - high), come[1] * (1 - low)
        left &= ~accepted
    noise = readoff.gumbels(len(tokens), at, size, PURPOSE_RECOVERY)
    parts.append((come, readoff.read_argmax(noise[left], tokens[left])))
    return readoff.combine(parts)


def _read_lossy(siblings: Siblings, entered: Any, tokens: Any, size: int, at: int) -> Law:
    """The first child that is good enough, always the same one; else the target's choice."""
    if entered.min() != entered.max():
        raise Inconsistent("what is accepted depends on the noise")
    if entered[0] > 0:
        return readoff.certain(siblings[entered[0] - 1], size)
    return readoff.read_argmax(readoff.gumbels(len(tokens), at, size, PURPOSE_TOKEN), tokens)


# --- inputs that broke others -----------------------------------------------------------------


def traps(policy: Policy, verifier: Verifier, seeds: int = 256) -> list[Check]:
    """Checks of inputs with but one right outcome, whatever the seed."""
    nan, inf = float("nan"), float("inf")
    greedy: Any = {"temperature": 0.0}

    def trap(
        name: str, row: Sequence[float], expected: int, allowed: int | None = None, **sampler: Any
    ) -> Check:
        return _trap(name, row, expected, verifier, seeds, sampler, allowed)

    found = [
        trap("top-k 1 takes the arg-max, of equal ones the first", [1, 3, 3, 3], 1, top_k=1),
        trap("temperature 0 takes the arg-max", [0, 2, 1, -1], 1, **greedy),
        trap("temperature 0: of equal logits the first", [1, 3, 3, 0], 1, **greedy),
        trap("temperature 0: logits of 0, which 0 divides to NaN", [-1, 0, 0, -2], 1, **greedy),
        trap("temperature 0: logits that overflow if divided", [1e30, 2e30, 3e30, 0], 2, **greedy),
        trap("temperature 0: forbidden tokens", [-inf, -inf, -5, -6], 2, **greedy),
        trap("padding of the vocabulary, greedily", [0, 1, 9, 9], 1, allowed=2, **greedy),
        trap("padding of the vocabulary, sampled", [0, 30, 90, 90], 1, allowed=2),
    ]
    nothing = [
        trap("a row with a NaN has no token", [0, nan, 1, 2], -1),
        trap("a row with a NaN has no token, greedily", [0, nan, 1, 2], -1, **greedy),
        trap("a row of nothing but -inf has no token", [-inf] * 4, -1),
        trap("a row of nothing but -inf has no token, greedily", [-inf] * 4, -1, **greedy),
    ]
    # A lossy policy takes the first child that is good enough: there is no one right token.
    return [*found, *nothing] if policy.lossless else nothing


def _trap(
    name: str,
    row: Sequence[float],
    expected: int,
    verifier: Verifier,
    seeds: int,
    sampler: dict[str, Any],
    allowed: int | None,
) -> Check:
    """The draft tree offers every token, the likeliest last, and is as sure of all of them."""
    size = len(row)
    order = sorted(range(size if allowed is None else allowed), key=lambda t: (row[t], -t))
    logits = torch.tensor(row, dtype=torch.float32).expand(seeds, len(order) + 1, -1)
    settings = {"temperature": 1.0, **sampler}
    result = verifier(
        Walks(
            logits,
            torch.zeros(seeds, len(order) + 1, size),
            torch.tensor([[0, *order]] * seeds, dtype=torch.int32),
            build_tree(torch.tensor([[-1] + [0] * len(order)] * seeds, dtype=torch.int32)),
            torch.full((seeds,), _PREFIX, dtype=torch.int32),
            SamplingTensors.of(seeds, seed=list(range(seeds)), **settings),
            allowed_vocab=allowed,
        )
    )
    wrong = _first_wrong(result, lambda tokens: tokens != expected)
    if wrong is None:
        return passed("trap", name, f"{seeds} seeds")
    seed, token = wrong
    said = "no token" if expected < 0 else f"token {expected}"
    got = "no token" if token < 0 else f"token {token}"
    shown_row = ", ".join(f"{value:g}" for value in row)
    return failed("trap", name, f"{got} for {said}: logits ({shown_row}), seed {seed}")


def _first_wrong(
    result: VerifyResult, is_wrong: Callable[[torch.Tensor], torch.Tensor]
) -> tuple[int, int] | None:
    """Seed and emitted token of the first walk that is wrong."""
    tokens = result.accepted_tokens[:, 0]
    places = is_wrong(tokens).nonzero()
    return None if not len(places) else (int(places[0]), int(tokens[places[0]]))


def shown(p: Floats, digits: int = 3) -> str:
    """Probabilities as text: (.350, .390, .260)."""
    return "(" + ", ".join(f"{value:.{digits}f}".removeprefix("0") for value in p) + ")"
