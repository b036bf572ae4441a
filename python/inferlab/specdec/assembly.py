"""From a configuration to a drafter: its models, its tree, its share of the K/V memory."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from inferlab.config import SpecdecConfig
from inferlab.models import FakeLM, HFModel, TargetModel, check_same_tokenizer
from inferlab.models.draft_heads import PagedEagle, load_eagle, load_medusa
from inferlab.specdec.calibration import measured_acceptance
from inferlab.specdec.drafters import (
    Drafter,
    EagleDrafter,
    MedusaDrafter,
    ModelDrafter,
    NgramDrafter,
)
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
) -> DrafterPlan | None:
    """The drafter that ``config`` asks for; None for plain decoding.

    Args:
        max_levels: of a chain: the most that the controller may ask for.
        draft: a loaded draft model in place of ``config.draft_model``.

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
    planners = {"vanilla": _vanilla, "ngram": _ngram, "medusa": _medusa, "eagle": _eagle}
    return planners[mode](_Request(config, target, policy, max_levels, draft))


@dataclass(frozen=True)
class _Request:
    config: SpecdecConfig
    target: TargetModel
    policy: Policy
    max_levels: int
    draft: TargetModel | None

    def shape(self, default: str, depth: int, drafts: str) -> TreeShape:
        """The static tree asked for, at most ``depth`` levels. ``drafts``: what is accepted."""
        config = self.config
        tree = config.tree if config.tree is not None else default
        if isinstance(tree, tuple):
            return TreeShape.regular(tree)
        if tree == "chain":
            return TreeShape.chain(depth)
        acceptance = measured_acceptance(drafts) or [list(ASSUMED_ACCEPTANCE)]
        return TreeShape.best(acceptance, config.tree_nodes, depth)

    def real_target(self) -> HFModel:
        """The target, which must have hidden states."""
        if not isinstance(self.target, HFModel):
            raise ValueError(
                f"draft_mode is {self.config.draft_mode!r}, which reads the target's hidden "
                f"states; {self.target.name} has none: use implementation 'hf'"
            )
        return self.target


def _vanilla(request: _Request) -> DrafterPlan:
    config = request.config
    draft = request.draft
    if draft is None and config.implementation == "fake":
        draft = FakeLM(seed=config.seed, agreement=config.fake.agreement)
    elif draft is None:
        draft = load_model(config, config.draft_model)
        check_same_tokenizer(request.target, draft)
    shape = request.shape("chain", request.max_levels, config.draft_model)

    def build(pages: int) -> Drafter:
        cache = draft.new_cache(pages, config.page_size)
        return ModelDrafter(
            draft,
            cache,
            shape,
            coupled=config.coupled_noise and not request.policy.needs_draft_logits,
            keep_logits=request.policy.needs_draft_logits,
        )

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
    )
    return DrafterPlan(lambda _: drafter)


def _medusa(request: _Request) -> DrafterPlan:
    config = request.config
    name = config.medusa.model
    heads = load_medusa(name, request.real_target().model, allow_pickle=config.allow_pickle)
    shape = request.shape("optimal", min(request.max_levels, heads.num_heads), name)
    drafter = MedusaDrafter(heads, shape, coupled=config.coupled_noise)
    return DrafterPlan(lambda _: drafter, model=name)


def _eagle(request: _Request) -> DrafterPlan:
    config = request.config
    name = config.eagle.model
    head = load_eagle(name, request.real_target().model, allow_pickle=config.allow_pickle)
    paged = PagedEagle(head)
    tree = config.tree if config.tree is not None else "grown"
    shape = None if tree == "grown" else request.shape("grown", request.max_levels, name)

    def build(pages: int) -> Drafter:
        return EagleDrafter(
            paged,
            paged.new_cache(pages, config.page_size),
            shape,
            depth=request.max_levels,
            width=config.tree_width,
            nodes=config.tree_nodes,
            coupled=config.coupled_noise,
        )

    return DrafterPlan(build, paged.new_cache(1, config.page_size).bytes_per_token, name)


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
