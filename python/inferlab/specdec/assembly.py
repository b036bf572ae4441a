"""From a configuration to a drafter: its models, its tree, its share of the K/V memory."""

from __future__ import annotations

from inferlab.config import SpecdecConfig
from inferlab.draft_modes import DRAFT_MODES
from inferlab.models import TargetModel
from inferlab.specdec.drafters.plan import DrafterPlan, DraftRequest, make_plan
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import TreeShape


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
        max_levels, draft, shape: see `DraftRequest`.

    Raises:
        ValueError: models that cannot be loaded or do not fit the target, a policy that needs more
            than the drafter has.
    """
    mode = DRAFT_MODES[config.draft_mode]
    if not mode.plan:
        return None
    if policy.needs_draft_logits and not mode.has_probabilities:
        have = " or ".join(repr(n) for n, m in DRAFT_MODES.items() if m.has_probabilities)
        raise ValueError(
            f"policy is {policy.name!r}, which needs the draft's probabilities; draft_mode "
            f"{config.draft_mode!r} has none to give: use draft_mode {have}, or policy "
            f"'longest_prefix'"
        )
    return make_plan(DraftRequest(config, target, policy, max_levels, draft, shape))
