"""Sampling parameters and statistics."""

import pytest

from inferlab.types import SamplingParams, SpeculationStats


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("max_tokens", 0),
        ("min_tokens", -1),
        ("min_tokens", 65),
        ("temperature", -0.1),
        ("temperature", float("nan")),
        ("temperature", float("inf")),
        ("top_k", -1),
        ("top_p", 0.0),
        ("top_p", 1.1),
        ("min_p", -0.1),
        ("min_p", 1.5),
        ("repetition_penalty", 0.0),
        ("presence_penalty", float("inf")),
        ("seed", -1),
        ("seed", 2**64),
        ("stop", ("",)),
        ("stop", (3,)),
        ("stop_token_ids", "abc"),
        ("max_tokens", 3.5),
        ("max_tokens", True),
        ("max_tokens", "3"),
        ("top_k", 2.5),
        ("top_k", 2**40),
        ("seed", 1.5),
        ("temperature", "1"),
        ("logit_bias", [1]),
        ("logit_bias", {10: "x"}),
        ("logit_bias", {10: float("nan")}),
        ("logit_bias", {10: float("inf")}),
    ],
)
def test_values_out_of_range_name_the_parameter(name, value):
    with pytest.raises(ValueError, match=f"^{name} is "):
        SamplingParams(**{name: value})


def test_a_stop_text_that_cannot_be_encoded():
    with pytest.raises(ValueError, match=r"^stop holds .* half of a surrogate pair"):
        SamplingParams(stop=("end", "\ud83d"))


def test_statistics_count_what_their_names_say():
    stats = SpeculationStats()
    stats.record(depth=4, nodes=4, accepted=4, emitted=5)
    stats.record(depth=4, nodes=4, accepted=1, emitted=2)
    stats.record(depth=0, nodes=0, accepted=0, emitted=1)
    assert stats.acceptance_rate == 5 / 8
    assert stats.mean_accepted_length == 8 / 3
    assert stats.acceptance_by_position == [1.0, 0.5, 0.5, 0.5]
    assert stats.target_forwards == 3
    total = SpeculationStats()
    total.add(stats)
    total.add(stats)
    assert (total.steps, total.emitted, total.offered_at) == (6, 16, [4, 4, 4, 4])


def test_statistics_of_nothing_are_zero():
    stats = SpeculationStats()
    assert stats.acceptance_rate == 0.0
    assert stats.mean_accepted_length == 0.0
    assert stats.acceptance_by_position == []


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("temperature", 1e300),
        ("top_p", 1e-300),
        ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1e39),
        ("presence_penalty", 1e300),
        ("frequency_penalty", -1e300),
        ("logit_bias", {3: 1e300}),
        ("logit_bias", {3: float("nan")}),
    ],
)
def test_numbers_that_32_bits_cannot_hold_are_refused(name, value):
    """A step with one of them would fail, and so all that take part in it."""
    with pytest.raises(ValueError, match=f"{name} is"):
        SamplingParams(**{name: value})
