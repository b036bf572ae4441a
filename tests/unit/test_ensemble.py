"""Ensembles: merged trees, walks in the members' numbers, shares and features."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.walks import walk_of
from inferlab.kernels import build_tree
from inferlab.models import FakeLM, ForwardOutput
from inferlab.scheduler import Request
from inferlab.specdec.batch import Batch
from inferlab.specdec.drafters import Drafter, EnsembleDrafter, ModelDrafter, NgramDrafter
from inferlab.specdec.drafters.ensemble import merge
from inferlab.specdec.reading import Reading
from inferlab.specdec.tree import Budget, DraftTree, TreeShape
from inferlab.specdec.walk import Walk
from inferlab.types import SamplingParams


def parents_of(tree: DraftTree, row: int) -> list[int]:
    parents = [-1] + [-2] * (tree.num_nodes - 1)
    for n in range(tree.num_nodes):
        child = int(tree.links.first_child[row, n])
        while child >= 0:
            parents[child] = n
            child = int(tree.links.next_sibling[row, child])
    return parents


def paths_of(tree: DraftTree, row: int) -> dict[int, tuple[int, ...]]:
    """Tokens from below the root to each node."""
    paths: dict[int, tuple[int, ...]] = {0: ()}
    tokens = tree.tokens[row].tolist()
    for n, parent in enumerate(parents_of(tree, row)):
        if parent >= 0:
            paths[n] = (*paths[parent], tokens[n])
    return paths


@st.composite
def ragged_trees(draw: Any, roots: list[int]) -> DraftTree:
    """Trees of different sizes in one batch; siblings may hold the same token."""
    size = draw(st.integers(1, 7))
    parents, tokens, counts, depths = [], [], [], []
    for root in roots:
        count = draw(st.integers(1, size))
        up = [-1, *(draw(st.integers(0, n - 1)) for n in range(1, count))]
        depth = [0]
        for parent in up[1:]:
            depth.append(depth[parent] + 1)
        parents.append(up + [-2] * (size - count))
        tokens.append([root, *(draw(st.integers(0, 2)) for _ in range(1, size))])
        counts.append(count)
        depths.append(max(depth))
    links = build_tree(torch.tensor(parents, dtype=torch.int32))
    shuffled = draw(st.booleans())
    ranks = [0, *(3 * n + 2 for n in range(1, size))] if shuffled else None
    return DraftTree(
        torch.tensor(tokens, dtype=torch.int32), links, False, depths, counts, ranks=ranks
    )


@settings(max_examples=150, deadline=None)
@given(st.data(), st.integers(1, 3), st.integers(1, 3), st.booleans())
def test_a_merged_tree_holds_each_path_once_the_best_first(data, members, size, on_host):
    roots = [5 + row for row in range(size)]
    trees = [data.draw(ragged_trees(roots)) for _ in range(members)]
    merged, maps = merge(trees, on_host)
    assert merged.depths == [max(t.depths[row] for t in trees) for row in range(size)]
    longest = 0
    for row in range(size):
        worth: dict[tuple[int, ...], int] = {}
        for i, tree in enumerate(trees):
            for node, path in paths_of(tree, row).items():
                rank = node if tree.ranks is None else tree.ranks[node]
                worth[path] = min(worth.get(path, 10**9), rank * members + i)
        expected = sorted(worth, key=worth.__getitem__)
        longest = max(longest, len(expected))
        paths = paths_of(merged, row)
        assert [paths[n] for n in range(len(expected))] == expected
        assert len(paths) == len(expected)
        assert int(merged.tokens[row, 0]) == roots[row]
        assert all(d == -1 for d in merged.links.depth[row, len(expected) :].tolist())
        if on_host:
            assert merged.node_counts[row] == len(expected)
        for tree, node_map in zip(trees, maps, strict=True):
            own = paths_of(tree, row)
            for n, mine in enumerate(node_map.own[row].tolist()):
                if mine < 0:
                    assert paths.get(n) not in own.values()
                else:
                    assert own[mine] == paths[n]
    assert merged.num_nodes == (longest if on_host else 1 + sum(t.num_nodes - 1 for t in trees))


@pytest.mark.parametrize("on_host", [False, True])
def test_a_walk_is_told_in_a_members_numbers_as_far_as_it_stays_in_its_tree(on_host):
    roots = torch.tensor([9], dtype=torch.int32)

    def chain(*tokens: int) -> DraftTree:
        row = torch.tensor([[9, *tokens]], dtype=torch.int32)
        return DraftTree.of_shape(TreeShape.chain(len(tokens)), row)

    trees = [chain(1, 2, 3), chain(4, 5), chain(1, 7), DraftTree.root_only(roots)]
    merged, maps = merge(trees, on_host)
    # By rank, then by member: 1, 4, then 2, 5, 7, then 3.
    assert merged.tokens[:, :7].tolist() == [[9, 1, 4, 2, 5, 7, 3]]
    assert merged.num_nodes == (7 if on_host else 8)
    walk = torch.tensor([[0, 1, 5, -1]], dtype=torch.int32)  # 1, 7
    for kept, expected in ((3, [2, 1, 3, 1]), (2, [2, 1, 2, 1]), (1, [1, 1, 1, 1])):
        told = [m.walk(walk, torch.tensor([kept], dtype=torch.int32)) for m in maps]
        assert [int(count) for _, count in told] == expected
    walks = [m.walk(walk, torch.tensor([3], dtype=torch.int32))[0].tolist()[0] for m in maps]
    assert walks == [[0, 1, -1, -1], [0, -1, -1, -1], [0, 1, 2, -1], [0, -1, -1, -1]]


class Recorder(Drafter):
    """A chain of one token, and a record of what it was told."""

    name = "recorder"

    def __init__(self, token: int, depth: int = 3, layers: tuple[int, ...] = (), keeps=False):
        self.token = token
        self.max_depth = depth
        self.max_nodes = 1 + depth
        self.feature_layers = layers
        self.keeps_nodes = keeps
        self.told: list[Any] = []

    def propose(self, batch: Batch, budget: Budget, judge=None) -> DraftTree:
        shape = TreeShape.chain(min(budget.levels, budget.nodes, self.max_depth))
        tokens = torch.full((len(batch), shape.num_nodes), self.token, dtype=torch.int32)
        tokens[:, 0] = batch.roots
        self.told.append(("propose", budget))
        return DraftTree.of_shape(shape, tokens)

    def prefill(self, reading: Reading, output: ForwardOutput) -> None:
        self.told.append(("prefill", output.features))

    def commit(self, batch: Batch, walk: Walk) -> None:
        self.told.append(("commit", walk))

    def unread(self, batch: Batch) -> list[int]:
        return [self.token] * len(batch)

    def release(self, request: Request) -> None:
        self.told.append(("release", request.request_id))

    def describe(self) -> dict[str, Any]:
        return {"drafter": self.name}


def batch_of(*prompts: list[int]) -> Batch:
    params = SamplingParams(max_tokens=8)
    requests = [Request(p, params, request_id=i, pages=[0]) for i, p in enumerate(prompts)]
    return Batch(requests, torch.device("cpu"), ())


def test_members_hear_of_the_walk_and_of_their_own_features():
    keeper, other = Recorder(1, layers=(4, 5), keeps=True), Recorder(2, layers=(6,))
    silent = Recorder(3)
    ensemble = EnsembleDrafter([keeper, other, silent])
    assert ensemble.feature_layers == (4, 5, 6)
    batch = batch_of([7], [8])
    tree = ensemble.propose(batch, Budget(3, 6))
    assert tree.tokens.tolist() == [[root, 1, 2, 3, 1, 2, 3] for root in (7, 8)]
    features = torch.arange(2 * 7 * 6).view(2, 7, 6)  # three layers of two channels
    output = ForwardOutput(torch.zeros(2, 7, 9), features)
    nodes = torch.tensor([[0, 1, 4, -1], [0, 2, 5, -1]], dtype=torch.int32)
    kept = torch.tensor([3, 3], dtype=torch.int32)
    walk = walk_of(batch, tree, nodes, kept, output)
    ensemble.commit(batch, walk)
    assert len(walk.read()) == 2
    own = keeper.told[1][1]
    assert own.tree.num_nodes == 3
    assert own.nodes.tolist() == [[0, 1, 2, -1], [0, -1, -1, -1]]
    assert own.kept.tolist() == own.kept_on_host == [3, 1]
    assert torch.equal(own.output.features, features[..., :4])
    whole = other.told[1][1]
    assert whole.tree is tree
    assert torch.equal(whole.nodes, nodes)
    assert whole.kept.tolist() == whole.kept_on_host == [3, 3]
    assert torch.equal(whole.output.features, features[..., 4:])
    assert silent.told[1][1].output.features is None
    assert ensemble.unread(batch) == [max(d.token for d in ensemble.drafters)] * len(batch)
    ensemble.release(batch.requests[1])
    assert keeper.told[-1] == silent.told[-1] == ("release", 1)


def test_a_step_without_drafts_is_told_as_it_was():
    keeper = Recorder(1, keeps=True)
    ensemble = EnsembleDrafter([keeper, Recorder(2)])
    batch = batch_of([7])
    ensemble.propose(batch, Budget(3, 6))
    root = DraftTree.root_only(batch.roots)
    one = torch.ones(1, dtype=torch.int32)
    walk = walk_of(batch, root, one[:, None] - 1, one, ForwardOutput(torch.zeros(1, 1, 9)))
    ensemble.commit(batch, walk)
    walk.read()
    told = keeper.told[1][1]
    assert told.tree is root
    assert told.kept_on_host == [1]


def test_budgets_are_shared_and_what_one_can_not_use_goes_to_the_others():
    small, large = Recorder(1, depth=2), Recorder(2, depth=9)
    ensemble = EnsembleDrafter([small, large])
    assert (ensemble.max_nodes, ensemble.max_depth) == (12, 9)
    shares = {nodes: ensemble._shares(nodes) for nodes in (1, 2, 3, 4, 6, 11, 99)}
    assert shares == {
        1: [1, 0], 2: [1, 1], 3: [2, 1], 4: [2, 2], 6: [2, 4], 11: [2, 9], 99: [2, 9]
    }  # fmt: skip
    tree = ensemble.propose(batch_of([7]), Budget(5, 1))
    assert tree.tokens.tolist() == [[7, 1]]
    assert large.told == []
    ensemble.propose(batch_of([7]), Budget(5, 6))
    assert small.told[-1] == ("propose", Budget(2, 2))
    assert large.told[-1] == ("propose", Budget(5, 4))
    rungs = [b.nodes for b in ensemble.ladder()]
    assert rungs[-1] == 11
    assert all(a < b for a, b in pairwise(rungs))


def test_slots_are_reserved_for_what_a_member_draws_and_does_not_keep():
    grows = Recorder(1, depth=4, keeps=True)
    grows.max_nodes = 21
    ensemble = EnsembleDrafter([grows, Recorder(2)], max_nodes=8)
    assert ensemble.max_nodes == 21
    assert EnsembleDrafter([Recorder(1), Recorder(2)], max_nodes=5).max_nodes == 5
    assert ensemble.ladder()[-1].nodes == 7
    assert sum(ensemble._shares(99)) == 7
    assert ensemble.describe()["max_nodes"] == 8


class Reads(torch.overrides.TorchFunctionMode):
    """Counts what would make the host wait for a device."""

    WAITS = tuple(
        getattr(torch.Tensor, name)
        for name in ("tolist", "item", "cpu", "numpy", "__bool__", "__int__", "__float__")
    )

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.count += func in self.WAITS
        return func(*args, **(kwargs or {}))


def test_nothing_is_read_back_from_a_device():
    target = FakeLM(seed=1)
    batch = batch_of([300, 301, 300], [305, 305, 305])
    shape = TreeShape.regular((2, 1))
    models = ModelDrafter(target, target.new_cache(16), shape)
    batch.requests[0].pages[:] = [1]
    batch = Batch(batch.requests, batch.device, ())
    trees = [models.propose(batch, Budget(2, 9)), NgramDrafter(3).propose(batch, Budget(3, 9))]
    walk = torch.tensor([[0, 1], [0, 1]], dtype=torch.int32)
    with Reads() as reads:
        merged, maps = merge(trees, on_host=False)
        maps[0].walk(walk, torch.tensor([2, 2], dtype=torch.int32))
    assert reads.count == 0
    assert merged.node_counts == [8, 8]


def test_bad_settings_are_refused():
    with pytest.raises(ValueError, match="ensemble drafters is"):
        EnsembleDrafter([])
    with pytest.raises(ValueError, match="ensemble max_nodes is 2; it must be an integer from 3"):
        EnsembleDrafter([Recorder(1), Recorder(2)], max_nodes=2)
