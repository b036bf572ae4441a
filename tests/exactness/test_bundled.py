"""The bundled pair: speculation, plain decoding and ``generate`` give the same tokens."""

from __future__ import annotations

import pytest
import torch

from helpers.bundled import GREEDY, NEW_TOKENS, PROMPTS, SAMPLED, plain, plain_tokens
from helpers.compare import assert_same_tokens
from helpers.pairwise import pairwise
from inferlab import SpeculativePipeline
from inferlab.types import SamplingParams


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_plain_decoding_is_generate(dtype):
    target = plain(dtype).target
    for prompt, tokens in zip(PROMPTS, plain_tokens(dtype, False), strict=True):
        ids = target.tokenizer.encode(prompt)
        with target.plain() as model, torch.inference_mode():
            output = model.generate(
                torch.tensor([ids]),
                attention_mask=torch.ones(1, len(ids), dtype=torch.long),
                max_new_tokens=NEW_TOKENS,
                do_sample=False,
            )
        expected = output[0, len(ids) :].tolist()
        params = SamplingParams(max_tokens=NEW_TOKENS)
        assert_same_tokens(target, ids, expected, tokens, params, f"generate, {dtype}")


@pairwise(
    dtype=["float32", "bfloat16"],
    draft_mode=["vanilla", "ngram"],
    tree={"chain": None, "tree": [3, 2, 1]},
    sampled={"greedy": False, "sampled": True},
)
def test_speculation_changes_no_token(dtype, draft_mode, tree, sampled):
    sampling = SAMPLED if sampled else GREEDY
    pipeline = SpeculativePipeline(
        draft_mode=draft_mode,
        tree=tree,
        controller="fixed",
        dtype=dtype,
        target=plain(dtype).target,
    )
    results = [pipeline.generate(PROMPTS[0], max_tokens=NEW_TOKENS, **sampling)]
    results += pipeline.generate(PROMPTS, max_tokens=NEW_TOKENS, **sampling)
    expected = plain_tokens(dtype, sampled)
    for prompt, tokens, result in zip(
        PROMPTS[:1] + PROMPTS, expected[:1] + expected, results, strict=True
    ):
        ids = pipeline.target.tokenizer.encode(prompt)
        params = SamplingParams(max_tokens=NEW_TOKENS, **sampling)
        what = f"{dtype}, {draft_mode}, tree {tree}"
        assert_same_tokens(pipeline.target, ids, tokens, result["token_ids"], params, what)
    if draft_mode == "vanilla":
        assert sum(r["accepted"] for r in results) > 0


@pytest.mark.mps
@pytest.mark.skipif(not torch.backends.mps.is_available(), reason="no Apple GPU")
@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "sampled"])
@pytest.mark.parametrize("draft_mode", ["none", "vanilla", "ngram"])
def test_an_apple_gpu_decodes_the_cpus_tokens(draft_mode, sampled):
    sampling = SAMPLED if sampled else GREEDY
    pipeline = SpeculativePipeline(draft_mode=draft_mode, dtype="float32", device="mps")
    results = pipeline.generate(PROMPTS, max_tokens=NEW_TOKENS, **sampling)
    params = SamplingParams(max_tokens=NEW_TOKENS, **sampling)
    expected = plain_tokens("float32", sampled)
    for prompt, tokens, result in zip(PROMPTS, expected, results, strict=True):
        ids = pipeline.target.tokenizer.encode(prompt)
        what = f"mps, {draft_mode}"
        assert_same_tokens(pipeline.target, ids, tokens, result["token_ids"], params, what)


def test_on_the_cpu_the_steps_of_the_bundled_pair_are_exact_to_the_last_bit():
    """Products, norms and attention of a row do not depend on the rows beside it."""
    target = plain("float32").target
    ids = target.tokenizer.encode(PROMPTS[0])
    cache_of = target.new_cache(16)
    table = torch.arange(16, dtype=torch.int32)[None]

    def rows(tokens: list[int], at: int) -> torch.Tensor:
        from inferlab.models import ForwardBatch

        return target.forward(
            ForwardBatch(
                tokens=torch.tensor([tokens]),
                positions=torch.arange(at, at + len(tokens))[None],
                seq_lens=torch.tensor([at], dtype=torch.int32),
                block_table=table,
            ),
            cache_of,
        ).logits[0]

    rows(ids, 0)
    chain = [5, 90, 17, 300, 42]
    together = rows(chain, len(ids))
    alone = torch.cat([rows([t], len(ids) + i) for i, t in enumerate(chain)])
    assert torch.equal(together, alone)
