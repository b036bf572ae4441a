"""Every draft mode on the bundled models, chosen by configuration: the tokens of plain decoding."""

from __future__ import annotations

import pytest

from helpers.bundled import GREEDY, NEW_TOKENS, PROMPTS, SAMPLED, plain, plain_tokens
from helpers.compare import assert_same_tokens
from helpers.pairwise import pairwise
from inferlab import SpeculativePipeline
from inferlab.benchmarks.modes import DRAFT_MODES
from inferlab.types import SamplingParams

# Accepted length that a mode reaches on these prompts at least, at temperature 0: far below what
# it does, far above what a drafter does that is wired up wrongly.
AT_LEAST = {"vanilla": 2.0, "eagle": 3.0, "medusa": 1.7, "ensemble": 3.0}


def decode(mode: str, sampled: bool, controller: str, prompts: list[str], **options):
    pipeline = SpeculativePipeline(
        draft_mode=mode, controller=controller, target=plain("float32").target, **options
    )
    sampling = SAMPLED if sampled else GREEDY
    return pipeline, pipeline.generate(prompts, max_tokens=NEW_TOKENS, **sampling)


def check(pipeline, sampled: bool, prompts, results, what: str) -> None:
    params = SamplingParams(max_tokens=NEW_TOKENS, **(SAMPLED if sampled else GREEDY))
    expected = dict(zip(PROMPTS, plain_tokens("float32", sampled), strict=True))
    for prompt, result in zip(prompts, results, strict=True):
        ids = pipeline.target.tokenizer.encode(prompt)
        assert_same_tokens(
            pipeline.target, ids, expected[prompt], result["token_ids"], params, what
        )


@pairwise(
    # What AT_LEAST asks for is seen there.
    always=lambda mode, controller, sampled: controller == "fixed" and not sampled,
    mode=DRAFT_MODES,
    controller=["fixed", "cost"],
    sampled={"greedy": False, "sampled": True},
)
def test_no_mode_changes_a_token(mode, controller, sampled):
    pipeline, results = decode(mode, sampled, controller, PROMPTS)
    check(pipeline, sampled, PROMPTS, results, f"{mode}, {controller}")
    if controller == "fixed" and not sampled and mode in AT_LEAST:
        steps = sum(r["steps"] for r in results)
        kept = sum(r["mean_accepted_length"] * r["steps"] for r in results)
        assert kept / steps > AT_LEAST[mode]


@pytest.mark.parametrize(
    ("mode", "options"),
    [
        ("eagle", {"tree": "chain", "max_draft": 5}),
        ("eagle", {"tree": "optimal", "tree_nodes": 12}),
        ("eagle", {"tree": [3, 2, 1]}),
        ("eagle", {"tree_nodes": 3, "tree_width": 2, "max_draft": 8}),
        ("medusa", {"tree": [4, 2]}),
        ("medusa", {"tree": "optimal", "tree_nodes": 12}),
        ("medusa", {"tree_nodes": 40, "max_draft": 2}),
        ("medusa", {"tree_nodes": 3, "max_draft": 1}),
        ("vanilla", {"tree": "optimal", "tree_nodes": 20, "max_draft": 5}),
        ("self", {"early_exit": {"layers": 8}, "tree": [2, 1]}),
        ("ngram", {"ngram": {"min_match": 2, "max_match": None}, "tree": [3, 1, 1, 1]}),
        ("ensemble", {"ensemble": {"drafters": ["vanilla", "recycling", "medusa"]}}),
        ("eagle", {"coupled_noise": False}),
    ],
)
def test_no_tree_changes_a_token(mode, options):
    for sampled in (False, True):
        pipeline, results = decode(mode, sampled, "fixed", PROMPTS[:3], **options)
        check(pipeline, sampled, PROMPTS[:3], results, f"{mode}, {options}")


def test_the_rejection_policy_names_the_modes_it_lacks():
    with pytest.raises(ValueError, match="draft_mode 'eagle' has none to give"):
        SpeculativePipeline(draft_mode="eagle", policy="rejection", target=plain("float32").target)


def test_fake_models_have_no_hidden_states():
    with pytest.raises(ValueError, match="needs a model with weights and hidden states"):
        SpeculativePipeline(draft_mode="eagle", implementation="fake")
