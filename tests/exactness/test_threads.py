"""Threads that share a pipeline or a model get the tokens that they would get alone."""

from concurrent.futures import ThreadPoolExecutor
from functools import cache, partial

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_models import tiny_model, tiny_tokenizer
from inferlab import HFModel, SpeculativePipeline

PROMPTS = ["the draft", "def forward(", "pages, and", "a small model "] * 3


def run_in_threads(jobs):
    with ThreadPoolExecutor(4) as pool:
        return [future.result() for future in [pool.submit(job) for job in jobs]]


@pytest.mark.parametrize("mode", ["vanilla", "ngram", "recycling"])
def test_one_pipeline_in_many_threads(mode):
    options = {"draft_mode": mode, "kv_memory_mb": 32, "max_new_tokens": 24, "temperature": 0.8}
    pipeline = SpeculativePipeline(
        target=HFModel(tiny_model("llama"), tiny_tokenizer()),
        draft=HFModel(tiny_model("llama", seed=1), tiny_tokenizer()),
        **options,
    )
    want = [pipeline.generate(p, ignore_eos=True)["token_ids"] for p in PROMPTS]

    def job(prompt):
        return lambda: pipeline.generate(prompt, ignore_eos=True)["token_ids"]

    assert run_in_threads(job(p) for p in PROMPTS) == want
    assert not pipeline.engine.scheduler.has_work


@cache
def shared_pipeline(mode, max_batch) -> SpeculativePipeline:
    return SpeculativePipeline(
        target=HFModel(tiny_model("llama"), tiny_tokenizer()),
        draft=HFModel(tiny_model("llama", seed=1), tiny_tokenizer()),
        draft_mode=mode,
        kv_memory_mb=32,
        max_batch=max_batch,
    )


@settings(max_examples=25, deadline=None)
@given(
    mode=st.sampled_from(("none", "vanilla", "ngram", "recycling", "self", "eagle-lite")),
    max_batch=st.sampled_from((1, 3, 8)),
    requests=st.lists(
        st.tuples(
            st.sampled_from(PROMPTS[:4]),
            st.integers(1, 30),
            st.sampled_from((0.0, 0.8, 1.5)),
            st.integers(0, 9),
            st.booleans(),
        ),
        min_size=2,
        max_size=12,
    ),
)
def test_any_requests_of_any_number_of_threads(mode, max_batch, requests):
    pipeline = shared_pipeline(mode, max_batch)

    def job(prompt, count, temperature, seed, streamed):
        options = {"temperature": temperature, "seed": seed, "ignore_eos": True}
        if streamed:
            pieces = pipeline.stream(prompt, count, **options)
            return [token for piece in pieces for token in piece.token_ids]
        return pipeline.generate(prompt, count, **options)["token_ids"]

    alone = shared_pipeline("none", 1)
    want = [
        alone.generate(prompt, count, temperature=t, seed=seed, ignore_eos=True)["token_ids"]
        for prompt, count, t, seed, _ in requests
    ]
    assert run_in_threads([partial(job, *request) for request in requests]) == want
    assert not pipeline.engine.scheduler.has_work


@pytest.mark.parametrize("family", ["llama", "gemma2", "gpt2"])
@pytest.mark.parametrize("mode", ["self", "medusa-lite"])
def test_pipelines_in_threads_share_a_target(mode, family):
    target = HFModel(tiny_model(family), tiny_tokenizer())
    options = {"kv_memory_mb": 32, "max_new_tokens": 24, "max_draft": 2}
    pipelines = [
        SpeculativePipeline(target=target, draft_mode=m, **options)
        for m in (mode, "none", mode, mode)
    ]
    want = [pipelines[1].generate(p, ignore_eos=True)["token_ids"] for p in PROMPTS]

    def job(pipeline, prompt):
        return lambda: pipeline.generate(prompt, ignore_eos=True)["token_ids"]

    jobs = [job(pipelines[i % 4], prompt) for i, prompt in enumerate(PROMPTS)]
    assert run_in_threads(jobs) == want


def test_generate_from_its_own_callback_joins_the_batch():
    pipeline = SpeculativePipeline(implementation="fake", max_new_tokens=4)
    inner = []
    outer = pipeline.generate("a", on_result=lambda *_: inner.append(pipeline.generate("b")))
    assert outer["token_ids"] == pipeline.generate("a")["token_ids"]
    assert inner[0]["token_ids"] == pipeline.generate("b")["token_ids"]
