"""Draft models by name: `vanilla`, a model of its own, and `self`, the target's first layers."""

from __future__ import annotations

from typing import Any

from inferlab.models import (
    EarlyExit,
    FakeLM,
    ShardedModel,
    TargetModel,
    VocabularyMap,
    tokenizer_difference,
)
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.cross import CrossVocabularyDrafter
from inferlab.specdec.drafters.model import ModelDrafter
from inferlab.specdec.drafters.plan import DrafterPlan, DraftRequest, load_model


def plan(request: DraftRequest) -> DrafterPlan:
    """A draft model; with another tokenizer than the target's it drafts across vocabularies."""
    config = request.config
    draft = request.draft
    if draft is None and config.implementation == "fake":
        draft = FakeLM(seed=config.seed, agreement=config.fake.agreement)
    elif draft is None:
        draft = load_model(config, config.draft_model, config.draft_quantization)
    return _plan(request, draft)


def plan_self(request: DraftRequest) -> DrafterPlan:
    """The target's first layers."""
    target, layers = request.target, request.config.early_exit.layers
    if isinstance(target, ShardedModel):
        return _plan(request, target.first_layers(layers))
    return _plan(request, EarlyExit(target, layers))


def _plan(request: DraftRequest, draft: TargetModel) -> DrafterPlan:
    config = request.config
    vocabulary = None
    if tokenizer_difference(request.target, draft) is not None:
        vocabulary = VocabularyMap.of(request.target, draft)
    shape = request.shape("chain", request.max_levels, draft.name)
    known = request.known(shape, draft.name)

    def build(pages: int) -> Drafter:
        cache = draft.new_cache(pages, config.page_size)
        keep_logits = request.policy.needs_draft_logits
        noise: dict[str, Any] = {
            "coupled": config.coupled_noise and not keep_logits,
            "keep_logits": keep_logits,
        }
        if vocabulary is not None:
            return CrossVocabularyDrafter(draft, cache, shape, vocabulary, **noise)
        return ModelDrafter(draft, cache, shape, known=known, **noise)

    weight = draft.new_cache(1, config.page_size).bytes_per_token
    return DrafterPlan(build, weight, draft.name)
