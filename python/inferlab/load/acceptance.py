"""How drafts fared, as servers tell it: one form for all of them, and what their answers tell.

Answers tell of their own request:

- vLLM's, under ``--per-request-spec-decode-metrics``, and this package's server's:
  ``metrics.speculative_decoding`` (vllm-project/vllm, pull request 48915);
- SGLang's: ``meta_info.spec_*`` (python/sglang/srt/managers/tokenizer_manager.py, older names among
  them), and for requests with ``return_spec_tokens_details`` the same as
  ``sglext.spec_tokens_details`` (python/sglang/srt/entrypoints/openai/utils.py);
- llama.cpp's: ``timings.draft_n`` and ``timings.draft_n_accepted`` (tools/server/server-task.cpp).

What ``/metrics`` tells of all requests is read by :mod:`inferlab.load.server_stats`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Acceptance:
    """How drafts fared, as a server tells it. None: it does not tell, or it cannot be told apart.

    Attributes:
        source: "vllm", "sglang", "llama.cpp" or "inferlab".
        drafts: verification steps in which something was drafted (SGLang: all of them).
        drafted_tokens: of these drafts; SGLang's, the steps times the widest draft.
        accepted_tokens: of the drafted ones; bonus tokens are none.
        accepted_at: accepted tokens by position in the draft; they add up to ``accepted_tokens``.
        rate: accepted tokens over drafted ones.
        length: accepted tokens per draft, without the bonus token.
        length_with_bonus: the same with it: one more.
        note: what could not be told, and why.
    """

    source: str
    drafts: int | None = None
    drafted_tokens: int | None = None
    accepted_tokens: int | None = None
    accepted_at: tuple[int, ...] | None = None
    rate: float | None = None
    length: float | None = None
    length_with_bonus: float | None = None
    note: str | None = None

    @classmethod
    def of_counts(
        cls,
        source: str,
        drafts: int | None,
        drafted: int | None,
        accepted: int | None,
        accepted_at: Sequence[int] | None,
    ) -> Acceptance:
        """From counts: rates follow from them, and counts that contradict one another are dropped,
        with a note."""
        at = None if accepted_at is None else tuple(accepted_at)
        note = None
        if accepted is not None and drafted is not None and accepted > drafted:
            return cls(
                source=source,
                note=f"{accepted} tokens are said to be accepted, but only {drafted} to be drafted",
            )
        if at is not None and accepted is not None and sum(at) != accepted:
            note = f"positions add up to {sum(at)} accepted tokens, but {accepted} are told"
            at = None
        kept = None if accepted is None or drafts is None else accepted + drafts
        return cls(
            source=source,
            drafts=drafts,
            drafted_tokens=drafted,
            accepted_tokens=accepted,
            accepted_at=at,
            rate=_ratio(accepted, drafted),
            length=_ratio(accepted, drafts),
            length_with_bonus=_ratio(kept, drafts),
            note=note,
        )


def total_acceptance(parts: Iterable[Acceptance]) -> Acceptance | None:
    """That of many requests: counts added up, and rates of these. None: there are no parts.

    A count that one part does not know is not known of all.
    """
    listed = list(parts)
    if not listed:
        return None

    def added(counts: Iterable[int | None]) -> int | None:
        known = list(counts)
        return None if None in known else sum(c for c in known if c is not None)

    positions = [part.accepted_at for part in listed]
    at = None
    if None not in positions:
        known = [p for p in positions if p is not None]
        width = max(map(len, known))
        at = [sum(p[i] for p in known if i < len(p)) for i in range(width)]
    made = Acceptance.of_counts(
        " and ".join(sorted({part.source for part in listed})),
        added(part.drafts for part in listed),
        added(part.drafted_tokens for part in listed),
        added(part.accepted_tokens for part in listed),
        at,
    )
    notes = list(dict.fromkeys(part.note for part in listed if part.note))
    return replace(made, note=made.note or "; ".join(notes[:3]) or None)


def acceptance_of_answer(answer: Mapping[str, Any]) -> Acceptance | None:
    """What an answer, or a chunk of a stream, tells of its own drafts; None: nothing.

    The later of two chunks that tell counts for both.
    """
    metrics = _mapping(answer.get("metrics"))
    if told := _mapping(metrics.get("speculative_decoding")):
        return Acceptance.of_counts(
            "inferlab" if "num_draft_nodes" in told else "vllm",
            whole_number(told.get("num_spec_steps")),
            whole_number(told.get("num_draft_tokens")),
            whole_number(told.get("num_accepted_draft_tokens")),
            _positions(told.get("acceptance_histogram")),
        )
    timings = _mapping(answer.get("timings"))
    if "draft_n" in timings:
        drafted, accepted = timings.get("draft_n"), timings.get("draft_n_accepted")
        return Acceptance.of_counts(
            "llama.cpp", None, whole_number(drafted), whole_number(accepted), None
        )
    return total_acceptance(
        found for told in _sglang_details(answer) if (found := _of_sglang(told)) is not None
    )


def _sglang_details(answer: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """What SGLang tells of the choices of an answer, wherever it does."""
    extended = _mapping(answer.get("sglext")).get("spec_tokens_details")
    if extended:
        return [_mapping(e) for e in (extended if isinstance(extended, list) else [extended])]
    choices = answer.get("choices")
    holders = [answer, *(map(_mapping, choices) if isinstance(choices, list) else ())]
    return [_mapping(holder.get("meta_info")) for holder in holders]


def _of_sglang(told: Mapping[str, Any]) -> Acceptance | None:
    def first(*names: str) -> Any:
        return next((told[name] for name in names if told.get(name) is not None), None)

    steps = whole_number(told.get("spec_verify_ct"))
    if steps is None:
        return None
    return Acceptance.of_counts(
        "sglang",
        steps,
        whole_number(
            first("spec_num_proposed_drafts", "spec_proposed_drafts", "spec_draft_token_num")
        ),
        whole_number(
            first("spec_num_correct_drafts", "spec_accepted_drafts", "spec_accept_token_num")
        ),
        _positions(first("spec_correct_drafts_histogram", "spec_accept_histogram") or None),
    )


def _positions(histogram: Any) -> tuple[int, ...] | None:
    """How many drafts were accepted to each position and beyond, from how many ended where."""
    if not isinstance(histogram, list) or not histogram:
        return None
    counts = [whole_number(count) for count in histogram]
    if None in counts:
        return None
    known = [count for count in counts if count is not None]
    return tuple(sum(known[i:]) for i in range(1, len(known)))


def _ratio(part: int | None, whole: int | None) -> float | None:
    return part / whole if part is not None and whole else None


def whole_number(value: Any) -> int | None:
    """A count, where it is one."""
    good = isinstance(value, int | float) and not isinstance(value, bool)
    if not good or not math.isfinite(value) or value < 0 or value != int(value):
        return None
    return int(value)


def _mapping(value: Any) -> Mapping[str, Any]:
    return value if isinstance(value, Mapping) else {}
