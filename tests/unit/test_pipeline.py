"""What the pipeline takes and refuses, on FakeLM."""

from __future__ import annotations

import asyncio
import gc
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from inferlab import SpeculativePipeline
from inferlab.config import SpecdecConfig
from inferlab.errors import Interrupted


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
    assert result["mean_accepted_length"] * result["steps"] == 9
    assert set(result["timings_ms"]) == {"prefill", "draft", "verify", "accept", "commit", "rest"}
    assert result["lossless"]
    assert result["policy"] == {"policy": "longest_prefix", "lossless": True}


@pytest.mark.parametrize("argument", [{"policy": 3}, {"controller": 3}])
def test_policies_and_controllers_of_the_wrong_type_are_refused(argument):
    with pytest.raises(TypeError, match="must be a name or a"):
        SpeculativePipeline(implementation="fake", **argument)


@pytest.mark.parametrize(("argument", "name"), [("target", "base_model"), ("draft", "draft_model")])
def test_a_model_given_by_name_says_which_argument_takes_names(argument, name):
    with pytest.raises(TypeError, match=f"{argument} is 'x'; .* names and directories are {name}"):
        SpeculativePipeline(**{argument: "x"})


@pytest.mark.parametrize("mode", ["none", "vanilla", "ngram", "recycling", "eagle", "ensemble"])
def test_a_dropped_pipeline_is_freed_at_once(mode):
    """Its cache is large, and the garbage collector knows nothing of sizes."""
    pipeline = SpeculativePipeline(draft_mode=mode, controller="fixed")
    pipeline.generate("a", max_tokens=2)
    kept = [weakref.ref(pipeline.engine), weakref.ref(pipeline.engine.cache)]
    gc.collect()
    gc.disable()
    try:
        del pipeline
        assert [ref() for ref in kept] == [None, None]
    finally:
        gc.enable()


def test_a_stream_goes_on_without_its_pipeline():
    stream = SpeculativePipeline(implementation="fake").stream("a b", max_tokens=20)
    first = next(stream)
    gc.collect()
    assert first.text + "".join(piece.text for piece in stream)


def test_a_config_object_stands_alone():
    config = SpecdecConfig(implementation="fake", max_draft=2)
    assert SpeculativePipeline(config=config).config.max_draft == 2
    with pytest.raises(ValueError, match="config is given, and so is max_draft"):
        SpeculativePipeline(config=config, k=8)


def test_a_path_is_a_model_name():
    with pytest.raises(FileNotFoundError, match="/no/such/model"):
        SpeculativePipeline(base_model=Path("/no/such/model"))


def joined(pieces):
    pieces = list(pieces)
    assert [p.result is not None for p in pieces] == [False] * (len(pieces) - 1) + [True]
    return (
        "".join(p.text for p in pieces),
        [t for p in pieces for t in p.token_ids],
        sum(p.drafted for p in pieces),
        pieces[-1].result,
    )


@pytest.mark.parametrize("stop", [None, " w7", ("e", "nothing")])
def test_a_stream_gives_what_generate_gives(pipeline, stop):
    given = {"max_tokens": 40, "temperature": 0.9, "seed": 5, "stop": stop}
    expected = pipeline.generate("some text", **given)
    text, tokens, drafted, result = joined(pipeline.stream("some text", **given))
    assert text == expected["text"] == result["text"]
    assert tokens == expected["token_ids"] == result["token_ids"]
    assert drafted == expected["accepted"] > 0
    assert result["finish_reason"] == expected["finish_reason"]


def test_a_stream_of_several_prompts_numbers_its_pieces(pipeline):
    prompts = ["a b", "c", "a b c d"]
    expected = pipeline.generate(prompts, max_tokens=20)
    pieces = list(pipeline.stream(prompts, max_tokens=20))
    assert {p.index for p in pieces[:3]} == {0, 1, 2}
    for index, result in enumerate(expected):
        assert joined(p for p in pieces if p.index == index)[0] == result["text"]


def test_a_stream_is_refused_at_once_and_stops_when_it_is_left(pipeline):
    with pytest.raises(ValueError, match="max_tokens is 0"):
        pipeline.stream("a", max_tokens=0)
    with pytest.raises(TypeError, match="knows no foo"):
        pipeline.stream("a", foo=1)
    with pytest.raises(ValueError, match="exceed the context of fake"):
        pipeline.stream("a", max_tokens=5000)
    for piece in pipeline.stream("a b", max_tokens=200):
        assert piece.token_ids
        break
    assert not pipeline.engine.scheduler.has_work


def test_streams_of_asyncio_share_the_batch_and_can_be_cancelled(pipeline):
    expected = pipeline.generate(["a b", "c d e"], max_tokens=60)

    async def collect(prompt):
        return joined([piece async for piece in pipeline.astream(prompt, max_tokens=60)])

    async def main():
        endless = asyncio.create_task(collect_for_ever())
        both = await asyncio.gather(collect("a b"), collect("c d e"))
        endless.cancel()
        with pytest.raises(asyncio.CancelledError):
            await endless
        return both

    async def collect_for_ever():
        async for _ in pipeline.astream("x y", max_tokens=3000, ignore_eos=True):
            pass

    both = asyncio.run(main())
    assert [b[0] for b in both] == [r["text"] for r in expected]
    assert not pipeline.engine.scheduler.has_work


def test_a_tokenizer_without_a_chat_template_is_named(pipeline):
    with pytest.raises(ValueError, match=r"fake has no chat template; add chat_template\.jinja"):
        pipeline.generate(messages=[{"role": "user", "content": "hello"}])


def test_tokens_are_told_as_they_come(pipeline):
    pieces, finished = [], []
    results = pipeline.generate(
        ["a b", "c"],
        max_tokens=20,
        on_token=pieces.append,
        on_result=lambda index, result: finished.append((index, result)),
    )
    for index, result in enumerate(results):
        assert joined(p for p in pieces if p.index == index)[0] == result["text"]
        assert (index, result) in finished


@pytest.mark.parametrize("callback", ["on_token", "on_result"])
def test_an_interrupt_in_a_callback_keeps_what_there_was(pipeline, callback):
    def interrupt(*_):
        raise KeyboardInterrupt

    with pytest.raises(Interrupted) as caught:
        pipeline.generate(["a b", "c d"], max_tokens=30, **{callback: interrupt})
    results = caught.value.results
    assert len(results) == 2
    assert "interrupted" in {r["finish_reason"] for r in results} or callback == "on_result"
    assert all(r["token_ids"] for r in results)
    assert not pipeline.engine.scheduler.has_work
