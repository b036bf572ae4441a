"""From a configuration to a drafter: which tree, of which rates, of which size."""

from __future__ import annotations

import pytest

from inferlab import SpeculativePipeline
from inferlab.models import FakeLM
from inferlab.specdec.calibration import write_acceptance
from inferlab.specdec.drafters.recycling import ACCEPTANCE
from inferlab.specdec.tree import TreeShape


def drafter_of(**options):
    return SpeculativePipeline(implementation="fake", **options).engine.drafter


def test_an_optimal_tree_is_made_from_the_rates_of_the_model_that_drafts(tmp_path):
    write_acceptance(tmp_path, [[0.9, 0.01]], {})
    draft = FakeLM(seed=3)
    draft.name = str(tmp_path)
    options = {"tree": "optimal", "tree_nodes": 5, "k": 5}
    assert drafter_of(draft=draft, **options).shape == TreeShape.chain(5)
    assert not drafter_of(**options).shape.is_chain


@pytest.mark.parametrize("tree", [None, "optimal"])
def test_recycling_takes_the_best_nodes_by_its_own_rates(tree):
    for nodes in (80, 12):
        options = {} if nodes == 80 else {"tree_nodes": nodes}
        drafter = drafter_of(draft_mode="recycling", tree=tree, **options)
        assert drafter.shape == TreeShape.best([ACCEPTANCE], nodes, 8)
    shallow = drafter_of(draft_mode="recycling", tree=tree, k=2)
    assert shallow.shape == TreeShape.best([ACCEPTANCE], 80, 2)
    assert drafter_of(draft_mode="recycling", tree=[3, 1]).shape == TreeShape.regular([3, 1])


@pytest.mark.parametrize("mode", ["eagle", "medusa"])
@pytest.mark.parametrize("tree", [None, [2, 1]])
def test_what_was_measured_of_bundled_heads_is_known_of_their_trees(mode, tree):
    """So that the controller need not find out whether they pay."""
    drafter = SpeculativePipeline(
        draft_mode=mode, tree=tree, controller="fixed", cost_cache=False
    ).engine.drafter
    known = drafter.known
    assert known.evidence > 0
    assert len(known.by_rank) == (drafter.nodes if tree is None else 4)
    assert all(0 < chance < 1 for chance in known.by_rank)
    assert tree is not None or list(known.by_rank) == sorted(known.by_rank, reverse=True)


def test_an_ensembles_members_keep_to_k():
    options = {"draft_mode": "ensemble", "ensemble": {"drafters": ["vanilla", "ngram"]}}
    assert [d.max_depth for d in drafter_of(**options).drafters] == [4, 8]
    assert [d.max_depth for d in drafter_of(**options, k=2).drafters] == [2, 2]
