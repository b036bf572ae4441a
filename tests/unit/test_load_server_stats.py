"""What servers tell of their drafts comes in one form, and what they do not tell is not guessed.

The samples have the names, types and labels of each server's own documentation.
"""

from __future__ import annotations

import itertools
import sys

import pytest
from prometheus_client import CollectorRegistry, Counter, Gauge, generate_latest

from inferlab.errors import UsageError
from inferlab.load.acceptance import Acceptance, acceptance_of_answer, total_acceptance
from inferlab.load.server_stats import (
    ServerLoad,
    acceptance_between,
    parse_metrics,
    server_load,
)

# --- /metrics -----------------------------------------------------------------------------------


def vllm(
    drafts: int,
    drafted: int,
    at: tuple[int, ...],
    engine: str = "0",
    model: str = "m",
    prefix: str = "vllm",
    accepted: int | None = None,
) -> str:
    """Counters as vLLM has them, or llama.cpp, which has no labels."""
    labels = f'{{engine="{engine}",model_name="{model}"}}' if prefix == "vllm" else ""
    lines = []
    for name, value in (
        ("drafts", drafts),
        ("draft_tokens", drafted),
        ("accepted_tokens", sum(at) if accepted is None else accepted),
    ):
        full = f"{prefix}:spec_decode_num_{name}_total"
        lines += [f"# HELP {full} Number.", f"# TYPE {full} counter", f"{full}{labels} {value}.0"]
    full = f"{prefix}:spec_decode_num_accepted_tokens_per_pos_total"
    for position, value in enumerate(at):
        inner = labels[1:-1] + "," if labels else ""
        lines.append(f'{full}{{{inner}position="{position}"}} {value:.6e}')
    return "\n".join(lines) + "\n"


def between(before: str, after: str, model: str | None = None) -> Acceptance | None:
    return acceptance_between(parse_metrics(before), parse_metrics(after), model)


GREW = Acceptance(
    source="vllm",
    drafts=40,
    drafted_tokens=120,
    accepted_tokens=60,
    accepted_at=(30, 20, 10),
    rate=0.5,
    length=1.5,
    length_with_bonus=2.5,
)


def test_vllm_by_the_growth_of_its_counters():
    assert between(vllm(2, 6, (2, 1, 0)), vllm(42, 126, (32, 21, 10))) == GREW


def test_what_was_not_there_before_began_at_nothing():
    assert between("", vllm(40, 120, (30, 20, 10))) == GREW


def test_engines_of_one_model_are_added_up():
    before = vllm(1, 3, (1, 0, 0)) + vllm(5, 15, (1, 1, 1), engine="1")
    after = vllm(11, 33, (9, 4, 2)) + vllm(35, 105, (23, 17, 9), engine="1")
    assert between(before, after) == GREW


def test_several_models_need_a_name():
    before = vllm(0, 0, (0, 0, 0)) + vllm(0, 0, (0, 0, 0), model="other")
    after = vllm(40, 120, (30, 20, 10)) + vllm(7, 21, (1, 1, 1), model="other")
    assert between(before, after, "m") == GREW
    for name in (None, "third"):
        told = between(before, after, name)
        assert told is not None
        assert told == Acceptance(source="vllm", note=told.note)
        assert told.note == "the server tells of several models, m, other; name one of them"
    assert between(vllm(0, 0, ()), vllm(40, 120, (30, 20, 10)), "an-adapter") == GREW


def test_llama_cpp_has_the_same_counters_without_labels():
    told = between(
        vllm(0, 0, (), prefix="llamacpp"), vllm(40, 120, (30, 20, 10), prefix="llamacpp")
    )
    assert told == Acceptance(**{**vars(GREW), "source": "llama.cpp"})


def test_a_server_that_drafted_nothing_has_no_rates():
    told = between(vllm(4, 9, (1,)), vllm(4, 9, (1,)))
    assert told == Acceptance(
        source="vllm", drafts=0, drafted_tokens=0, accepted_tokens=0, accepted_at=(0,)
    )


def test_a_server_without_drafts_tells_nothing():
    assert between("", "vllm:num_requests_running 3\n") is None
    assert between("", "") is None


@pytest.mark.parametrize(
    ("before", "after", "why"),
    [
        (vllm(50, 150, (9,)), vllm(40, 120, (30,)), "fell from 50 to 40"),
        (
            vllm(1, 3, (1,)) + vllm(1, 3, (1,), engine="1"),
            vllm(9, 27, (5,)),
            "lost its value of {'engine': '1', 'model_name': 'm'",
        ),
        (
            vllm(1, 3, (1,)) + "process_start_time_seconds 100.5\n",
            vllm(9, 27, (5,)) + "process_start_time_seconds 200.5\n",
            "process_start_time_seconds changed",
        ),
        (
            vllm(1, 3, (1,)) + 'vllm:spec_decode_num_drafts_created{engine="0"} 100.5\n',
            vllm(9, 27, (5,)) + 'vllm:spec_decode_num_drafts_created{engine="0"} 200.5\n',
            "vllm:spec_decode_num_drafts_created changed",
        ),
        (
            vllm(1, 3, (1,)),
            vllm(9, 27, (5,)).replace(" 27.0", " NaN"),
            "draft_tokens is nan, which is no count",
        ),
    ],
)
def test_a_restarted_server_is_not_known_of(before, after, why):
    told = between(before, after)
    assert told is not None
    assert told == Acceptance(source="vllm", note=told.note)
    assert why in (told.note or "")


def test_positions_that_do_not_add_up_are_left_out():
    told = between(vllm(0, 0, (0, 0)), vllm(10, 20, (8, 3), accepted=12))
    assert told is not None
    assert (told.accepted_tokens, told.rate, told.accepted_at) == (12, 0.6, None)
    assert told.note == "positions add up to 11 accepted tokens, but 12 are told"


def test_counts_that_cannot_be_are_refused():
    told = between("", vllm(10, 20, (30,)))
    assert told == Acceptance(
        source="vllm", note="30 tokens are said to be accepted, but only 20 to be drafted"
    )


def sglang(length: float, rate: float, calls: int | None = None, rank: str = "0") -> str:
    labels = f'{{engine_type="unified",model_name="m",dp_rank="{rank}"}}'
    text = f"sglang:spec_accept_length{labels} {length}\nsglang:spec_accept_rate{labels} {rate}\n"
    if calls is not None:
        text += f"sglang:spec_verify_calls_total{labels} {calls}\n"
    return text


def test_sglang_tells_of_its_latest_interval():
    told = between(sglang(2.0, 0.2, 10), sglang(3.5, 0.5, 60))
    assert told is not None
    assert (told.source, told.drafts, told.rate) == ("sglang", 50, 0.5)
    assert (told.length, told.length_with_bonus) == (2.5, 3.5)
    assert (told.drafted_tokens, told.accepted_tokens, told.accepted_at) == (None, None, None)
    assert "of its latest interval alone" in (told.note or "")


def test_sglang_without_speculation_tells_nothing():
    assert between(sglang(0.0, 0.0), sglang(0.0, 0.0)) is None


def test_rates_of_sglangs_engines_are_not_averaged():
    told = between("", sglang(2.0, 0.2, 10) + sglang(3.0, 0.4, 20, rank="1"))
    assert told is not None
    assert (told.drafts, told.rate, told.length) == (30, None, None)
    assert "cannot be averaged" in (told.note or "")


def test_what_the_library_writes_is_read():
    """By prometheus_client itself, with `_created` and escaped labels."""
    registry = CollectorRegistry()
    name = "vllm:spec_decode_num_"
    model = 'a "quoted" \\ model\nof two lines'
    made = {
        part: Counter(f"{name}{part}", "Text.", ("model_name",), registry=registry).labels(model)
        for part in ("drafts", "draft_tokens", "accepted_tokens")
    }
    before = generate_latest(registry).decode()
    for part, by in (("drafts", 40), ("draft_tokens", 120), ("accepted_tokens", 60)):
        made[part].inc(by)
    Gauge("vllm:kv_cache_usage_perc", "Text.", registry=registry).set(0.25)
    after = generate_latest(registry).decode()
    assert between(before, after) == Acceptance(**{**vars(GREW), "accepted_at": None})
    assert server_load(parse_metrics(after)).cache_usage == 0.25


def test_another_format_is_refused():
    for text in ("<html>404</html>", '{"error": "no"}', "vllm:x 1\nvllm:y one"):
        with pytest.raises(ValueError, match="is not Prometheus' text format"):
            parse_metrics(text)


def test_the_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(sys.modules, "prometheus_client.parser", None)
    with pytest.raises(UsageError, match=r"pip install 'llm-inference-lab\[load\]'"):
        parse_metrics("")


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (
            'vllm:num_requests_running{engine="0"} 3\nvllm:num_requests_running{engine="1"} 4\n'
            'vllm:num_requests_waiting{engine="0"} 2\nvllm:num_requests_waiting{engine="1"} 0\n'
            'vllm:kv_cache_usage_perc{engine="0"} 0.25\nvllm:kv_cache_usage_perc{engine="1"} 0.5\n',
            ServerLoad(7, 2, 0.5),
        ),
        (
            "sglang:num_running_reqs 3\nsglang:num_queue_reqs 1\nsglang:token_usage 0.125\n",
            ServerLoad(3, 1, 0.125),
        ),
        ("llamacpp:requests_processing 1\nllamacpp:requests_deferred 5\n", ServerLoad(1, 5, None)),
        ("other 1\n", ServerLoad(None, None, None)),
    ],
)
def test_what_a_server_is_doing(text, expected):
    assert server_load(parse_metrics(text)) == expected


# --- answers ------------------------------------------------------------------------------------

VLLM = {
    "mean_acceptance_length": 1.2325581395348837,
    "draft_acceptance_rate": 0.07751937984496124,
    "acceptance_histogram": [39, 1, 0, 3],
    "num_spec_steps": 43,
    "num_accepted_draft_tokens": 10,
    "num_draft_tokens": 129,
    "num_spec_tokens": 3,
}
SGLANG = {
    "spec_accept_rate": 0.25,
    "spec_accept_length": 1.8,
    "spec_num_correct_drafts": 15,
    "spec_num_proposed_drafts": 60,
    "spec_verify_ct": 20,
    "spec_correct_drafts_histogram": [10, 6, 3, 1],
}
SGLANG_BEFORE = {
    "spec_accept_rate": 0.25,
    "spec_accept_token_num": 15,
    "spec_draft_token_num": 60,
    "spec_verify_ct": 20,
    "spec_accept_histogram": [10, 6, 3, 1],
}
OF_SGLANG = Acceptance(
    source="sglang",
    drafts=20,
    drafted_tokens=60,
    accepted_tokens=15,
    accepted_at=(10, 4, 1),
    rate=0.25,
    length=0.75,
    length_with_bonus=1.75,
)


def test_answers_of_vllm():
    told = acceptance_of_answer({"choices": [], "metrics": {"speculative_decoding": VLLM}})
    assert told is not None
    assert (told.source, told.drafts, told.drafted_tokens) == ("vllm", 43, 129)
    assert (told.accepted_tokens, told.accepted_at) == (10, (4, 3, 3))
    assert told.rate == pytest.approx(VLLM["draft_acceptance_rate"])
    assert told.length_with_bonus == pytest.approx(VLLM["mean_acceptance_length"])
    assert told.length == pytest.approx(10 / 43)


@pytest.mark.parametrize("details", [SGLANG, SGLANG_BEFORE])
@pytest.mark.parametrize("place", ["generate", "choice", "sglext"])
def test_answers_of_sglang(details, place):
    answer = {
        "generate": {"text": "a", "meta_info": {"id": "x", **details}},
        "choice": {"choices": [{"index": 0, "meta_info": details}]},
        "sglext": {"choices": [{"index": 0}], "sglext": {"spec_tokens_details": details}},
    }[place]
    assert acceptance_of_answer(answer) == OF_SGLANG


def test_choices_are_added_up():
    choices = [{"index": i, "meta_info": SGLANG} for i in range(3)]
    told = acceptance_of_answer({"choices": choices})
    assert told is not None
    assert (told.drafts, told.accepted_at, told.rate) == (60, (30, 12, 3), 0.25)


def test_answers_of_llama_cpp():
    timings = {"prompt_n": 1, "predicted_n": 200, "draft_n": 347, "draft_n_accepted": 65}
    assert acceptance_of_answer({"timings": timings}) == Acceptance(
        source="llama.cpp", drafted_tokens=347, accepted_tokens=65, rate=65 / 347
    )


@pytest.mark.parametrize(
    "answer",
    [
        {},
        {"choices": None, "metrics": None},
        {"choices": ["a"], "metrics": {"speculative_decoding": None}},
        {"choices": [{"delta": {"content": "x"}}], "usage": {"completion_tokens": 3}},
        {"timings": {"predicted_n": 3}},
        {"choices": [{"meta_info": {"completion_tokens": 3}}]},
        {"meta_info": [], "sglext": 3},
    ],
)
def test_answers_that_tell_nothing(answer):
    assert acceptance_of_answer(answer) is None


@pytest.mark.parametrize(
    ("change", "lost"),
    [
        ({"num_draft_tokens": "129"}, {"drafted_tokens", "rate"}),
        ({"num_spec_steps": -1}, {"drafts", "length", "length_with_bonus"}),
        ({"num_spec_steps": 43.5}, {"drafts", "length", "length_with_bonus"}),
        ({"acceptance_histogram": [39, "1"]}, {"accepted_at"}),
        ({"acceptance_histogram": {"0": 39}}, {"accepted_at"}),
        ({"acceptance_histogram": [39, 1, 0, 2]}, {"accepted_at"}),
    ],
)
def test_what_is_told_wrongly_is_not_known(change, lost):
    told = acceptance_of_answer({"metrics": {"speculative_decoding": {**VLLM, **change}}})
    assert told is not None
    assert {key for key, value in vars(told).items() if value is None} - {"note"} == lost


# --- many requests ------------------------------------------------------------------------------


def test_requests_are_added_up():
    parts = [
        Acceptance.of_counts("vllm", 10, 30, 6, (4, 2, 0)),
        Acceptance.of_counts("vllm", 2, 4, 4, (2, 2)),
        Acceptance.of_counts("vllm", 0, 0, 0, ()),
    ]
    for order in itertools.permutations(parts):
        told = total_acceptance(order)
        assert told == Acceptance.of_counts("vllm", 12, 34, 10, (6, 4, 0))
        assert told is not None
        assert told.length_with_bonus == 22 / 12
    assert total_acceptance([]) is None


def test_what_one_request_does_not_tell_is_not_known_of_all():
    parts = [OF_SGLANG, Acceptance.of_counts("sglang", 5, None, 2, None)]
    assert total_acceptance(parts) == Acceptance(
        source="sglang", drafts=25, accepted_tokens=17, length=17 / 25, length_with_bonus=42 / 25
    )


def test_notes_are_kept():
    parts = [Acceptance(source="vllm", note="why"), Acceptance(source="vllm", note="why")]
    assert total_acceptance(parts) == Acceptance(source="vllm", note="why")
