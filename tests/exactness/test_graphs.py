"""Forwards replayed from graphs: the tokens of ordinary forwards, and results that stay.

Where there is no GPU, a stand-in for a graph repeats the captured call on the captured inputs and
writes where its first result lies, as a graph does.
"""

from __future__ import annotations

import gc

import pytest
import torch

from helpers.compare import assert_same_tokens
from helpers.decoding import (
    GREEDY,
    PAGES,
    PENALISED,
    PROMPTS,
    SAMPLED,
    Sleepy,
    draft_of,
    engine,
    needs_gpu,
    plain_tokens,
    target_of,
    trees_of,
)
from helpers.pairwise import pairwise
from helpers.repeat_graphs import Repeat, graphs_of
from inferlab.models import ForwardBatch, ForwardOutput
from inferlab.models import graphs as graphs_module
from inferlab.models.early_exit import EarlyExit
from inferlab.models.graphs import (
    MAX_GRAPHS,
    USES_BEFORE_CAPTURE,
    USES_BEFORE_OWN,
    ForwardGraphs,
    captured_soon,
)
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import ModelDrafter
from inferlab.specdec.drafters.captured import DraftGraphs
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import make_policy
from inferlab.specdec.tree import TreeShape


@pairwise(
    family=["llama", "qwen3", "gpt2"],
    drafter=["none", "vanilla", "ngram"],
    tree={"chain": False, "tree": True},
    params={"greedy": GREEDY, "sampled": SAMPLED},
)
def test_replayed_forwards_decode_the_same_tokens(monkeypatch, family, drafter, tree, params):
    target, expected = target_of(family, "cpu"), plain_tokens(family, params)
    seen = []
    for model in (target, draft_of(family, "cpu")):
        graphs, repeat = graphs_of(model)
        monkeypatch.setattr(model, "_graphs", graphs)
        seen.append(repeat)
    for batch in (1, 5):
        results = engine(family, drafter, tree, batch).generate([(p, params) for p in PROMPTS])
        for prompt, tokens, result in zip(PROMPTS, expected, results, strict=True):
            what = f"{family}, {drafter}, batch {batch}"
            assert_same_tokens(target, prompt, tokens, result.token_ids, params, what)
    assert seen[0].replays >= seen[0].captures > 0
    assert (seen[1].replays > 0) == (drafter == "vanilla")


def drafts_of(capture, family, widths, params, batch, policy, controller):
    """Every tree that a draft model writes in a run, as lists, and the tokens that come of it."""
    target, draft = target_of(family), draft_of(family)
    rejects = policy == "rejection"
    drafter = ModelDrafter(
        draft,
        draft.new_cache(PAGES),
        TreeShape.regular(widths),
        coupled=not rejects,
        keep_logits=rejects,
    )
    drafter._graphs = DraftGraphs(draft.device, capture)
    seen = trees_of(drafter)
    cache = target.new_cache(PAGES)
    decoding = Engine(target, cache, make_policy(policy), controller, drafter, batch)
    results = decoding.generate([(p, params) for p in PROMPTS])
    return seen, [result.token_ids for result in results]


@pairwise(
    family=["llama", "qwen3"],
    widths={"chain": (1, 1, 1), "tree": (3, 2, 1)},
    params={"greedy": GREEDY, "sampled": SAMPLED, "penalised": PENALISED},
    batch=[1, 3],
    policy=["longest_prefix", "rejection"],
    sleeps=[False, True],
)
def test_replayed_drafts_of_a_model_are_those_of_ordinary_calls(
    monkeypatch, family, widths, params, batch, policy, sleeps
):
    kind = Sleepy if sleeps else FixedController
    how = family, widths, params, batch, policy
    expected, tokens = drafts_of(None, *how, kind(3))
    monkeypatch.setattr(draft_of(family), "_graphs", graphs_of(draft_of(family))[0])
    repeat = Repeat()
    with captured_soon():
        drafts, replayed = drafts_of(repeat, *how, kind(3))
    assert (drafts, replayed) == (expected, tokens)
    assert len(drafts) > repeat.replays > len(drafts) // 4


def batch_of(tokens, length, pages=2, **more):
    size, nodes = len(tokens), len(tokens[0])
    return ForwardBatch(
        tokens=torch.tensor(tokens),
        positions=length + torch.arange(nodes).expand(size, -1),
        seq_lens=torch.full((size,), length, dtype=torch.int32),
        block_table=torch.arange(size * pages, dtype=torch.int32).view(size, pages),
        **more,
    )


def run_until_captured(graphs, batch, cache, layers=()):
    with torch.inference_mode():
        for _ in range(USES_BEFORE_CAPTURE + 1):
            output = graphs.forward(batch, cache, layers)
    return output


def test_what_a_replay_returns_is_not_written_to_by_the_next():
    target = target_of("llama")
    graphs, repeat = graphs_of(target)
    cache = target.new_cache(8)
    first = run_until_captured(graphs, batch_of([[5, 6]], 3), cache, (0,))
    kept = ForwardOutput(*(t.clone() for t in first))
    with torch.inference_mode():
        second = graphs.forward(batch_of([[9, 12]], 5), cache, (0,))
    assert repeat.captures == 1
    assert not torch.equal(second.logits, kept.logits)
    for ours, before in zip(first, kept, strict=True):
        assert torch.equal(ours, before)


def test_a_table_that_grows_keeps_its_graph_up_to_a_power_of_two():
    target = target_of("llama")
    graphs, repeat = graphs_of(target)
    cache = target.new_cache(8)
    run_until_captured(graphs, batch_of([[5]], 3, pages=4), cache)
    run_until_captured(graphs, batch_of([[5]], 3, pages=3), cache)
    assert repeat.captures == 1
    run_until_captured(graphs, batch_of([[5]], 3, pages=5), cache)
    assert repeat.captures == 2
    with torch.inference_mode():
        for pages in (4, 3):
            batch = batch_of([[7]], 9, pages=pages)
            expected = target._run(batch, cache, ()).logits
            assert torch.equal(graphs.forward(batch, cache, ()).logits, expected)


def test_shapes_do_not_share_a_graph():
    target = target_of("llama")
    graphs, repeat = graphs_of(target)
    cache = target.new_cache(8)
    batches = [
        batch_of([[5, 6]], 3),
        batch_of([[5, 6]], 3, scored=torch.tensor([1])),
        batch_of([[5, 6]], 3, node_offset=1),
        batch_of([[5, 6]], 3, ancestors=torch.tensor([[[1], [3]]])),
        batch_of([[5]], 3),
        batch_of([[5], [6]], 3),
    ]
    for i, batch in enumerate(batches):
        output = run_until_captured(graphs, batch, cache)
        assert repeat.captures == i + 1
        with torch.inference_mode():
            assert torch.equal(output.logits, target._run(batch, cache, ()).logits)
    other = target.new_cache(8)
    run_until_captured(graphs, batches[0], other)
    assert repeat.captures == len(batches) + 1


def test_trees_of_many_sizes_share_graphs_until_one_comes_up_often():
    target = target_of("llama")
    graphs, repeat = graphs_of(target)
    cache = target.new_cache(8)

    def check(nodes, counts=None):
        chain = [[5 + i for i in range(nodes)], [90 - i for i in range(nodes)]]
        batch = batch_of(chain, 3, num_nodes=counts)
        with torch.inference_mode():
            output = graphs.forward(batch, cache, (0,))
            expected = target._run(batch, cache, (0,))
        real = [nodes, nodes] if counts is None else counts.tolist()
        for ours, theirs in zip(output, expected, strict=True):
            assert ours.shape == theirs.shape
            assert ours.is_contiguous()
            for row, count in enumerate(real):
                assert torch.equal(ours[row, :count], theirs[row, :count])

    for _ in range(3):
        for nodes in (8, 7, 9, 10, 11, 12):
            check(nodes)
            check(nodes, torch.tensor([nodes, 2], dtype=torch.int32))
    assert repeat.captures == 2
    for _ in range(USES_BEFORE_OWN + USES_BEFORE_CAPTURE + 1):
        check(10)
    assert repeat.captures == 3


def test_padding_writes_no_cache():
    target = target_of("llama")
    graphs, repeat = graphs_of(target)
    cache = target.new_cache(8)
    batch = batch_of([[5, 6, 7, 8, 9]], 3)
    run_until_captured(graphs, batch, cache)
    parts = [part for pool in cache.pools for part in (pool.k, pool.v)]
    for part in parts:
        part.zero_()
    with torch.inference_mode():
        graphs.forward(batch, cache, ())
    assert repeat.replays == 2
    for part in parts:  # [layers, pages, slots, heads, channels]
        assert (part.abs().sum((3, 4)) > 0).sum() == 5 * part.shape[0]


def test_shapes_that_came_up_once_take_no_graphs_place():
    """Prompts have many lengths; the steps behind them must still be captured."""
    target = target_of("llama")
    graphs, repeat = graphs_of(target)
    cache = target.new_cache(16)
    with torch.inference_mode():
        for length in range(1, MAX_GRAPHS + 2):
            last = torch.tensor([length - 1])
            graphs.forward(batch_of([[5] * length], 0, pages=8, scored=last), cache, ())
    assert repeat.captures == 0
    run_until_captured(graphs, batch_of([[5]], 3), cache)
    assert repeat.captures == 1


def test_of_many_graphs_the_last_ones_used_stay(monkeypatch):
    monkeypatch.setattr(graphs_module, "MAX_GRAPHS", 3)
    target = target_of("llama")
    graphs, repeat = graphs_of(target)
    cache = target.new_cache(16)
    batches = [batch_of([[5] * n], 0) for n in (1, 2, 3, 4)]
    for batch in batches:
        run_until_captured(graphs, batch, cache)
    assert repeat.captures == 4
    with torch.inference_mode():
        for batch in batches[1:]:
            graphs.forward(batch, cache, ())
    assert repeat.captures == 4
    run_until_captured(graphs, batches[0], cache)
    assert repeat.captures == 5
    (of_cache,) = graphs._of_cache.values()
    assert len(of_cache._graphs) == 3


def test_graphs_go_with_their_cache():
    target = target_of("llama")
    graphs = ForwardGraphs(target._run, lambda call: (call(), lambda: None))
    cache = target.new_cache(8)
    run_until_captured(graphs, batch_of([[5]], 3), cache)
    assert [len(of_cache._graphs) for of_cache in graphs._of_cache.values()] == [1]
    del cache
    assert len(graphs._of_cache) == 0


def test_a_forward_that_cannot_be_captured_runs_as_before():
    target = target_of("llama")

    def refuse(call):
        raise RuntimeError("operation not permitted when stream is capturing")

    graphs = ForwardGraphs(target._run, refuse)
    cache, batch = target.new_cache(8), batch_of([[5, 6]], 3)
    output = run_until_captured(graphs, batch, cache)
    with torch.inference_mode():
        assert torch.equal(output.logits, target._run(batch, cache, ()).logits)
    assert not graphs._can_capture


@pytest.mark.gpu
@needs_gpu
def test_cuda_captures_the_forwards_of_targets_and_early_exits():
    target = target_of("llama", "cuda")
    shallow = EarlyExit(target, 1)
    for model in (target, shallow):
        cache = model.new_cache(PAGES)
        batch = batch_of([[5, 6, 7]], 3)
        moved = {n: t.cuda() for n, t in vars_of(batch).items()}
        batch = ForwardBatch(**moved)
        output = run_until_captured(model._graphs, batch, cache)
        with torch.inference_mode():
            assert torch.equal(output.logits, model._run(batch, cache, ()).logits)
        assert [len(of_cache._graphs) for of_cache in model._graphs._of_cache.values()] == [1]


def vars_of(batch):
    names = ("tokens", "positions", "seq_lens", "block_table")
    return {name: getattr(batch, name) for name in names}


@pytest.mark.gpu
@needs_gpu
def test_cuda_captures_again_when_all_graphs_are_gone():
    target = target_of("llama", "cuda")
    graphs = ForwardGraphs(target._run)
    moved = {n: t.cuda() for n, t in vars_of(batch_of([[5, 6, 7]], 3)).items()}
    for _ in range(3):
        cache = target.new_cache(PAGES)
        run_until_captured(graphs, ForwardBatch(**moved), cache)
        assert [len(of_cache._graphs) for of_cache in graphs._of_cache.values()] == [1]
        del cache
        gc.collect()
        assert len(graphs._of_cache) == 0
