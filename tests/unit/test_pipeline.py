"""What the pipeline takes and refuses, on FakeLM."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from inferlab import SpeculativePipeline
from inferlab.config import SpecdecConfig


@pytest.fixture(scope="module")
def pipeline() -> SpeculativePipeline:
    return SpeculativePipeline(implementation="fake", max_new_tokens=12)


def test_prompts_come_as_text_lists_arrays_and_tensors(pipeline):
    ids = [300, 301, 302]
    expected = pipeline.generate(ids)["token_ids"]
    for prompt in (tuple(ids), np.array(ids), torch.tensor(ids), [np.int64(i) for i in ids]):
        assert pipeline.generate(prompt)["token_ids"] == expected
    batch = pipeline.generate([ids, np.array(ids), "some text"])
    assert [r["token_ids"] for r in batch[:2]] == [expected, expected]
    assert pipeline.generate(torch.tensor([ids, ids]))[1]["token_ids"] == expected
    assert pipeline.generate([]) == []


@pytest.mark.parametrize("prompt", [None, 3, b"abc", {"prompt": "a"}, [None], [[5.7]], ["a", 3]])
def test_other_prompts_are_refused(pipeline, prompt):
    with pytest.raises(TypeError, match=r"^prompt is .* must be a text"):
        pipeline.generate(prompt)


@pytest.mark.parametrize("prompt", ["", [[]]])
def test_an_empty_prompt_is_refused(pipeline, prompt):
    with pytest.raises(ValueError, match="prompt is empty"):
        pipeline.generate(prompt)


def test_a_seed_for_all_or_one_each(pipeline):
    prompts = ["a b", "a b", "a b"]
    sampled = {"temperature": 1.0, "max_tokens": 12}
    same = pipeline.generate(prompts, seed=np.int64(3), **sampled)
    assert len({tuple(r["token_ids"]) for r in same}) == 1
    different = pipeline.generate(prompts, seed=[3, 4, 5], **sampled)
    assert different[0]["token_ids"] == same[0]["token_ids"]
    assert len({tuple(r["token_ids"]) for r in different}) == 3
    assert [r["seed"] for r in different] == [3, 4, 5]
    with pytest.raises(ValueError, match="seed has 2 entries for 3 prompts"):
        pipeline.generate(prompts, seed=[1, 2])
    with pytest.raises(ValueError, match=r"seed is 1.5; it must be an integer"):
        pipeline.generate(prompts, seed=1.5)


def test_unknown_parameters_are_named_with_the_known_ones(pipeline):
    with pytest.raises(TypeError, match=r"knows no foo; .*logit_bias.*repetition_penalty"):
        pipeline.generate("a", foo=1)


def test_results_hold_what_they_promise(pipeline):
    result = pipeline.generate("a b c", max_tokens=9)
    assert result["num_tokens"] == len(result["token_ids"]) == 9
    assert result["token_ids"] == result["generated_tokens"]
    assert result["tokens_per_second"] == result["tokens_per_sec"] > 0
    assert result["acceptance_rate"] == 1.0
    assert result["mean_accepted_length"] * result["steps"] == 8
    assert set(result["timings_ms"]) == {"prefill", "draft", "verify", "accept", "commit", "rest"}
    assert result["lossless"]
    assert result["policy"] == {"policy": "longest_prefix", "lossless": True}


@pytest.mark.parametrize("argument", [{"policy": 3}, {"controller": 3}])
def test_policies_and_controllers_of_the_wrong_type_are_refused(argument):
    with pytest.raises(TypeError, match="must be a name or a"):
        SpeculativePipeline(implementation="fake", **argument)


def test_a_config_object_stands_alone():
    config = SpecdecConfig(implementation="fake", max_draft=2)
    assert SpeculativePipeline(config=config).config.max_draft == 2
    with pytest.raises(ValueError, match="config is given, and so is max_draft"):
        SpeculativePipeline(config=config, k=8)


def test_a_path_is_a_model_name():
    with pytest.raises(FileNotFoundError, match="/no/such/model"):
        SpeculativePipeline(base_model=Path("/no/such/model"))
