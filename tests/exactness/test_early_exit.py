"""The target's first layers as its draft: shared weights, and the tokens of plain decoding."""

from __future__ import annotations

import copy

import pytest
import torch

from helpers.compare import assert_same_tokens
from helpers.decoding import GREEDY, PAGES, PROMPTS, SAMPLED, plain_tokens, target_of
from helpers.paged import PagedRunner
from helpers.pairwise import pairwise
from helpers.tiny_models import FAMILIES, tiny_model
from inferlab.models import EarlyExit, FakeLM, HFModel
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import ModelDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import TreeShape


def assert_close(actual: torch.Tensor, expected: torch.Tensor) -> None:
    torch.testing.assert_close(actual, expected, rtol=1e-4, atol=1e-4)


def cut_model(family: str, layers: int) -> HFModel:
    """The same model with fewer layers, made the long way: a config and a state dict."""
    full = tiny_model(family)
    config = copy.deepcopy(full.config)
    config.num_hidden_layers = layers
    if getattr(config, "layer_types", None):
        config.layer_types = config.layer_types[:layers]
    made = type(full)._from_config(config, attn_implementation="eager").eval()
    missing = made.load_state_dict(full.state_dict(), strict=False).missing_keys
    assert not missing
    return HFModel(made)


@pytest.mark.parametrize("layers", [1, 2])
@pytest.mark.parametrize("family", FAMILIES)
def test_it_is_the_model_with_fewer_layers(family, layers):
    target = target_of(family)
    early = EarlyExit(target, layers)
    ids = [[5, 9, 33, 12, 71, 2, 8, 150, 44]]
    expected = PagedRunner(cut_model(family, layers)).chain(ids)
    assert_close(PagedRunner(early).chain(ids), expected)
    with early.plain() as model, torch.inference_mode():
        assert_close(model(torch.tensor(ids), use_cache=False).logits, expected)
    # And the target is what it was.
    assert len(target.layers) == 3
    with target.plain() as model, torch.inference_mode():
        plain = model(torch.tensor(ids), use_cache=False).logits
    assert_close(PagedRunner(target).chain(ids), plain)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "gemma2"])
def test_the_weights_are_the_targets(family):
    target = target_of(family)
    early = EarlyExit(target, 2)
    theirs = {p.data_ptr() for p in target.model.parameters()}
    assert {p.data_ptr() for p in early.model.parameters()} < theirs
    assert 0 < early.num_parameters < target.num_parameters
    assert early.new_cache(4).num_layers == 2
    assert early.engine == target.engine == "native"
    layer = early._decoder_layers()[0]
    assert layer is target._decoder_layers()[0]


@pairwise(
    family=FAMILIES,
    tree={"chain": False, "tree": True},
    params={"greedy": GREEDY, "sampled": SAMPLED},
)
def test_drafting_with_it_changes_no_token(family, tree, params):
    target = target_of(family)
    shape = TreeShape.regular((3, 2, 1)) if tree else TreeShape.chain(3)
    accepted = 0
    for batch in (1, 5):
        early = EarlyExit(target, 2)
        drafter = ModelDrafter(early, early.new_cache(PAGES), shape)
        decoding = Engine(
            target, target.new_cache(PAGES), Policy(), FixedController(4), drafter, batch
        )
        results = decoding.generate([(p, params) for p in PROMPTS])
        for prompt, tokens, result in zip(
            PROMPTS, plain_tokens(family, params), results, strict=True
        ):
            what = f"{family}, {'tree' if tree else 'chain'}, batch {batch}"
            assert_same_tokens(target, prompt, tokens, result.token_ids, params, what)
            accepted += result.stats.accepted
    assert accepted > 0, "the draft never agreed: nothing was tested"


@pytest.mark.parametrize("layers", [-1, 0, 3, 4])
def test_it_has_some_of_the_layers(layers):
    with pytest.raises(ValueError, match=rf"layers is {layers}; .* it must be from 1 to 2"):
        EarlyExit(target_of("llama"), layers)


def test_it_needs_a_model_with_layers():
    with pytest.raises(ValueError, match="fake has no layers to leave early"):
        EarlyExit(FakeLM(), 1)
