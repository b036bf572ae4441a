"""Token recycling: what the table learns and what is drafted from it."""

from __future__ import annotations

import pytest
import torch

from helpers.walks import walk_of
from inferlab.kernels import build_tree
from inferlab.models import FakeLM, ForwardOutput
from inferlab.scheduler import Request
from inferlab.specdec.batch import Batch
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import RecyclingDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import Budget, DraftTree, TreeShape
from inferlab.types import SamplingParams

CPU = torch.device("cpu")
VOCAB = 11
SHAPE = TreeShape.regular((3, 2, 1))


def batch_of(*prompts):
    params = SamplingParams(max_tokens=8)
    requests = [Request(p, params, request_id=i, pages=[0]) for i, p in enumerate(prompts)]
    return Batch(requests, CPU, ())


def commit(drafter, batch, tree, logits):
    nodes = torch.zeros((len(batch), 1), dtype=torch.int32)
    kept = torch.ones(len(batch), dtype=torch.int32)
    drafter.commit(batch, walk_of(batch, tree, nodes, kept, ForwardOutput(logits)))


def best_of(row, count):
    """Largest first, the lower id on ties."""
    return sorted(range(len(row)), key=lambda t: (-row[t], t))[:count]


def test_every_node_teaches_its_tokens_successors_and_the_last_one_counts():
    torch.manual_seed(0)
    drafter = RecyclingDrafter(VOCAB, CPU, SHAPE, successors=4)
    table = [[0] * 4 for _ in range(VOCAB)]
    batch = batch_of([3], [5])
    for _ in range(20):
        tokens = torch.randint(VOCAB, (2, SHAPE.num_nodes), dtype=torch.int32)
        logits = torch.randint(4, (2, SHAPE.num_nodes, VOCAB)).float()  # with ties
        commit(drafter, batch, DraftTree.of_shape(SHAPE, tokens), logits)
        for token, row in zip(
            tokens.flatten().tolist(), logits.flatten(0, 1).tolist(), strict=True
        ):
            table[token] = best_of(row, 4)
        assert drafter.table[:VOCAB].tolist() == table


def test_padding_teaches_nothing():
    drafter = RecyclingDrafter(VOCAB, CPU, SHAPE, successors=3)
    tokens = torch.tensor([[4, 6, 0]], dtype=torch.int32)
    links = build_tree(torch.tensor([[-1, 0, -2]], dtype=torch.int32))
    tree = DraftTree(tokens, links, False, [1], [3])
    logits = torch.zeros(1, 3, VOCAB)
    logits[0, :, 9] = 1
    commit(drafter, batch_of([4]), tree, logits)
    assert drafter.table[:VOCAB, 0].tolist() == [0, 0, 0, 0, 9, 0, 9, 0, 0, 0, 0]


def test_logits_that_are_not_numbers_leave_valid_tokens():
    drafter = RecyclingDrafter(VOCAB, CPU, SHAPE, successors=3)
    tree = DraftTree.root_only(torch.tensor([4], dtype=torch.int32))
    commit(drafter, batch_of([4]), tree, torch.full((1, 1, VOCAB), float("nan")))
    assert drafter.table.min() == 0


@pytest.mark.parametrize("shape", [SHAPE, TreeShape.chain(4), TreeShape.best([[0.5, 0.3]], 9)])
def test_drafts_are_successors_of_successors(shape):
    generator = torch.Generator().manual_seed(1)
    drafter = RecyclingDrafter(VOCAB, CPU, shape, successors=3)
    drafter.table.random_(VOCAB, generator=generator)
    batch = batch_of([3], [5], [9])
    for nodes in range(1, shape.num_nodes):
        cut = shape.within(Budget(3, nodes))
        tokens = drafter.propose(batch, Budget(3, nodes)).tokens
        assert tokens.dtype == torch.int32
        for row, root in zip(tokens.tolist(), (3, 5, 9), strict=True):
            expected = [root]
            for n in range(1, cut.num_nodes):
                rank = cut.sibling_ranks[n]
                expected.append(int(drafter.table[expected[cut.parents[n]], rank]))
            assert row == expected


def test_a_prompts_last_token_teaches_too():
    target = FakeLM(vocab_size=64, seed=1)
    drafter = RecyclingDrafter(64, CPU)
    engine = Engine(target, target.new_cache(16), Policy(), FixedController(4), drafter)
    result = engine.generate([([5, 6, 7], SamplingParams(max_tokens=1))])[0]
    assert drafter.table[7, 0] == result.token_ids[0]
    assert not drafter.table[:7].any()


def test_the_default_tree_has_the_papers_size():
    drafter = RecyclingDrafter(VOCAB, CPU)
    assert drafter.max_nodes == 81
    assert max(drafter.shape.widths) <= 8
    assert drafter.ladder()[-1].nodes == 80
    assert drafter.describe()["tree"]["nodes"] == 80


def test_a_tree_wider_than_the_table_is_refused():
    with pytest.raises(ValueError, match=r"recycling tree is \[3, 2, 1\]; it must be at most 2"):
        RecyclingDrafter(VOCAB, CPU, SHAPE, successors=2)
    with pytest.raises(ValueError, match="recycling successors is 0"):
        RecyclingDrafter(VOCAB, CPU, successors=0)
