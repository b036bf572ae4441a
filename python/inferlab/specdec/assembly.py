"""From a configuration to a drafter: its models, its tree, its share of the K/V memory."""

from __future__ import annotations

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

from inferlab.config import SpecdecConfig
from inferlab.models import (
    EarlyExit,
    FakeLM,
    HFModel,
    TargetModel,
    VocabularyMap,
    plain_model,
    tokenizer_difference,
)
from inferlab.models.draft_heads import PagedEagle, load_eagle, load_medusa
from inferlab.specdec.calibration import measured_acceptance
from inferlab.specdec.drafters import (
    CrossVocabularyDrafter,
    Drafter,
    EagleDrafter,
    EagleLiteDrafter,
    EnsembleDrafter,
    MedusaDrafter,
    MedusaLiteDrafter,
    ModelDrafter,
    NgramDrafter,
    RecyclingDrafter,
    load_corpus,
)
from inferlab.specdec.drafters.recycling import ACCEPTANCE, TREE_DEPTH
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import ASSUMED_ACCEPTANCE, TreeShape


@dataclass(frozen=True)
class DrafterPlan:
    """A drafter but for its K/V pages, whose number follows from what they weigh.

    Attributes:
        build: from the number of pages to the drafter.
        bytes_per_token: K/V of the draft, per token.
        model: what drafts, for results; None without weights of its own.
    """

    build: Callable[[int], Drafter]
    bytes_per_token: int = 0
    model: str | None = None


def plan_drafter(
    config: SpecdecConfig,
    target: TargetModel,
    policy: Policy,
    max_levels: int,
    draft: TargetModel | None = None,
    shape: TreeShape | None = None,
) -> DrafterPlan | None:
    """The drafter that ``config`` asks for; None for plain decoding.

    Args:
        max_levels: of a chain: the most that the controller may ask for.
        draft: a loaded draft model in place of ``config.draft_model``.
        shape: a static tree in place of ``config.tree``.

    Raises:
        ValueError: models that cannot be loaded or do not fit the target, a policy that needs more
            than the drafter has.
    """
    mode = config.draft_mode
    if mode == "none":
        return None
    if policy.needs_draft_logits and mode != "vanilla":
        raise ValueError(
            f"policy is {policy.name!r}, which needs the draft's probabilities; draft_mode "
            f"{mode!r} has none to give: use draft_mode 'vanilla', or policy 'longest_prefix'"
        )
    return _PLANNERS[mode](_Request(config, target, policy, max_levels, draft, shape))


@dataclass(frozen=True)
class _Request:
    config: SpecdecConfig
    target: TargetModel
    policy: Policy
    max_levels: int
    draft: TargetModel | None
    given_shape: TreeShape | None = None

    def shape(self, default: str, depth: int, drafts: str) -> TreeShape:
        """The static tree asked for, at most ``depth`` levels. ``drafts``: what is accepted."""
        config = self.config
        if self.given_shape is not None:
            return self.given_shape
        tree = config.tree if config.tree is not None else default
        if isinstance(tree, tuple):
            return TreeShape.regular(tree)
        if tree == "chain":
            return TreeShape.chain(depth)
        acceptance = measured_acceptance(drafts) or [list(ASSUMED_ACCEPTANCE)]
        return TreeShape.best(acceptance, config.nodes, depth)

    @property
    def grows(self) -> bool:
        """Whether trees are grown, by a drafter that can, and does unless told otherwise."""
        return self.config.tree in (None, "grown") and self.given_shape is None

    def plain_target(self) -> AbstractContextManager[Any]:
        """The Hugging Face model of the target, which must have hidden states."""
        return plain_model(self.target, f"draft_mode {self.config.draft_mode!r}")


def _vanilla(request: _Request) -> DrafterPlan:
    config = request.config
    draft = request.draft
    if draft is None and config.implementation == "fake":
        draft = FakeLM(seed=config.seed, agreement=config.fake.agreement)
    elif draft is None:
        draft = load_model(config, config.draft_model)
    return _model_plan(request, draft)


def _self(request: _Request) -> DrafterPlan:
    return _model_plan(request, EarlyExit(request.target, request.config.early_exit.layers))


def _model_plan(request: _Request, draft: TargetModel) -> DrafterPlan:
    config = request.config
    vocabulary = None
    if tokenizer_difference(request.target, draft) is not None:
        vocabulary = VocabularyMap.of(request.target, draft)
    shape = request.shape("chain", request.max_levels, draft.name)

    def build(pages: int) -> Drafter:
        cache = draft.new_cache(pages, config.page_size)
        keep_logits = request.policy.needs_draft_logits
        noise: dict[str, Any] = {
            "coupled": config.coupled_noise and not keep_logits,
            "keep_logits": keep_logits,
        }
        if vocabulary is not None:
            return CrossVocabularyDrafter(draft, cache, shape, vocabulary, **noise)
        return ModelDrafter(draft, cache, shape, **noise)

    weight = draft.new_cache(1, config.page_size).bytes_per_token
    return DrafterPlan(build, weight, draft.name)


def _ngram(request: _Request) -> DrafterPlan:
    config = request.config
    widths = config.tree if isinstance(config.tree, tuple) else None
    drafter = NgramDrafter(
        max_depth=len(widths) if widths is not None else request.max_levels,
        branches=max(widths) if widths is not None else 1,
        min_match=config.ngram.min_match,
        max_match=config.ngram.max_match,
        corpus=_corpus(request),
    )
    return DrafterPlan(lambda _: drafter)


def _corpus(request: _Request) -> Any:
    path, target = request.config.ngram.corpus, request.target
    return None if path is None else load_corpus(path, target.tokenizer, target.vocab_size)


def _recycling(request: _Request) -> DrafterPlan:
    config, target = request.config, request.target
    if request.given_shape is None and config.tree in (None, "optimal"):
        # The table's own rates, not those of a draft: there is one tree that is best.
        depth = TREE_DEPTH if config.max_draft is None else request.max_levels
        shape = TreeShape.best([ACCEPTANCE], config.nodes, depth)
    else:
        shape = request.shape("optimal", request.max_levels, "")
    return DrafterPlan(lambda _: RecyclingDrafter(target.vocab_size, target.device, shape))


def _ensemble(request: _Request) -> DrafterPlan:
    config = request.config
    plans = []
    for mode in config.ensemble.drafters:
        own = config.model_copy(update={"draft_mode": mode})
        member = _Request(own, request.target, request.policy, own.levels, request.draft)
        plans.append(_PLANNERS[mode](member))

    def build(pages: int) -> Drafter:
        return EnsembleDrafter([plan.build(pages) for plan in plans], 1 + config.nodes)

    models = [plan.model for plan in plans if plan.model is not None]
    return DrafterPlan(build, sum(p.bytes_per_token for p in plans), ", ".join(models) or None)


def _medusa_lite(request: _Request) -> DrafterPlan:
    lite = request.config.medusa
    drafter = MedusaLiteDrafter(
        request.target,
        lite.num_heads,
        lite.head_init,
        lite.temperature,
        lite.top_p,
        seed=request.config.seed,
    )
    return DrafterPlan(lambda _: drafter)


def _eagle_lite(request: _Request) -> DrafterPlan:
    lite = request.config.eagle
    drafter = EagleLiteDrafter(request.target, lite.alpha, max(lite.max_draft, 1))
    return DrafterPlan(lambda _: drafter)


def _medusa(request: _Request) -> DrafterPlan:
    config = request.config
    name = config.medusa.model
    with request.plain_target() as model:
        heads = load_medusa(name, model, allow_pickle=config.allow_pickle)
    depth = min(request.max_levels, heads.num_heads)
    shape = None if request.grows else request.shape("grown", depth, name)
    drafter = MedusaDrafter(
        heads, shape, nodes=config.nodes, depth=depth, coupled=config.coupled_noise
    )
    return DrafterPlan(lambda _: drafter, model=name)


def _eagle(request: _Request) -> DrafterPlan:
    config = request.config
    name = config.eagle.model
    with request.plain_target() as model:
        head = load_eagle(name, model, allow_pickle=config.allow_pickle)
    paged = PagedEagle(head)
    shape = None if request.grows else request.shape("grown", request.max_levels, name)

    def build(pages: int) -> Drafter:
        return EagleDrafter(
            paged,
            paged.new_cache(pages, config.page_size),
            shape,
            depth=request.max_levels,
            width=config.tree_width,
            nodes=config.nodes,
            coupled=config.coupled_noise,
        )

    return DrafterPlan(build, paged.new_cache(1, config.page_size).bytes_per_token, name)


_PLANNERS: dict[str, Callable[[_Request], DrafterPlan]] = {
    "vanilla": _vanilla,
    "ngram": _ngram,
    "recycling": _recycling,
    "self": _self,
    "medusa": _medusa,
    "eagle": _eagle,
    "ensemble": _ensemble,
    "medusa-lite": _medusa_lite,
    "eagle-lite": _eagle_lite,
}


def load_model(config: SpecdecConfig, name: str) -> HFModel:
    """A model on the device, in the dtype and under the conditions of the configuration."""
    return HFModel.load(
        name,
        device=config.requested_device,
        dtype=config.dtype,
        device_priority=config.device_priority,
        max_memory_mb=config.max_memory_mb,
        trust_remote_code=config.trust_remote_code,
        allow_pickle=config.allow_pickle,
    )
