"""What the server says of its drafts, in answers and in /metrics, is one and the same."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.served import Served
from inferlab.load.acceptance import Acceptance, acceptance_of_answer, total_acceptance
from inferlab.load.server_stats import acceptance_between, parse_metrics, server_load

pytestmark = pytest.mark.network

PROMPTS = ["class Stack:", "import os\n", 'raise ValueError("']


def answered(server: Served, **body: Any) -> Acceptance:
    """What a request's answer tells, whole or as a stream."""
    response = server.complete(max_tokens=32, speculation={"stats": True}, **body)
    assert response.status_code == 200, response.text
    chunks = [response.text]
    if body.get("stream"):
        lines = response.text.splitlines()
        chunks = [line.removeprefix("data: ") for line in lines if line.startswith("data: {")]
    (answer,) = [read for read in map(json.loads, chunks) if acceptance_of_answer(read)]
    told = acceptance_of_answer(answer)
    assert told is not None
    its_own = answer["metrics"]["speculative_decoding"]
    assert its_own["mean_acceptance_length"] == pytest.approx(told.length_with_bonus or 1.0)
    assert its_own["draft_acceptance_rate"] == (told.rate or 0.0)
    return told


@pytest.mark.parametrize(
    "flags",
    [
        ("--K", "4"),
        ("--draft-mode", "medusa", "--tree", "3,2,1"),
        ("--controller", "adaptive"),
        ("--draft-mode", "none"),
    ],
    ids=" ".join,
)
def test_answers_and_metrics_agree(flags):
    with Served(*flags) as server:
        server.complete()  # counted before the first scrape
        server.wait_until_idle()
        before = parse_metrics(server.http.get("/metrics").text)
        told = [
            answered(server, prompt=prompt, temperature=temperature, stream=stream, seed=3)
            for prompt in PROMPTS
            for temperature, stream in ((0, False), (0.8, True))
        ]
        told.append(answered(server, prompt=PROMPTS, n=2, temperature=1))
        server.wait_until_idle()
        after = parse_metrics(server.http.get("/metrics").text)
    between = acceptance_between(before, after, "inferlab/tiny")
    assert between == total_acceptance(told)
    assert between is not None
    assert between.note is None
    assert between.source == "inferlab"
    if "none" in flags:
        assert (between.drafts, between.drafted_tokens, between.rate) == (0, 0, None)
    else:
        assert between.accepted_tokens == sum(between.accepted_at or ())
        assert 0 < between.accepted_tokens < between.drafted_tokens
        assert between.length == between.accepted_tokens / between.drafts
    load = server_load(after)
    assert (load.running, load.waiting, load.cache_usage) == (0, 0, 0.0)
