"""Whether a model can be shared out over ranks, and how: transformers' plan, with ordered sums."""

from __future__ import annotations

import logging
import re

from transformers import PreTrainedModel
from transformers.distributed import DistributedConfig
from transformers.distributed.tensor_parallel import get_kv_heads_per_rank
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from inferlab.models.architecture import TESTED
from inferlab.models.attention_hook import UnsupportedArchitectureError
from inferlab.models.parallel.sums import ORDERED, PREFIX

logger = logging.getLogger(__name__)

_ATTENTION = re.compile(r"attn|attention")


def shared_out(model: PreTrainedModel, size: int, name: str) -> DistributedConfig:
    """What makes ``from_pretrained`` load a rank's part of a model. Attention whose heads do not
    divide is not shared out: every rank has all of it.

    Args:
        model: without weights (on "meta").
        size: ranks.

    Raises:
        UnsupportedArchitectureError: the family has no plan.
    """
    plan = dict(model.tp_plan or {})
    kind = model.config.model_type
    if not any(style != "replicate" for rule, style in plan.items() if "layers" in rule):
        known = plans_at_hand()
        tested = [each for each in known if each in TESTED]
        others = sorted(set(known) - set(tested))
        raise UnsupportedArchitectureError(
            f"{name}: transformers has no tensor-parallel plan for {kind!r}, and has one for "
            f"{', '.join(tested)}, which are tested, and {', '.join(others)}. Without a plan, "
            "device_map puts layers on several devices"
        )
    changes = {rule: PREFIX + style for rule, style in plan.items() if style in ORDERED}
    undivided = _undivided_heads(model, plan, size)
    if undivided:
        logger.warning(
            "%s: its %s do not divide by %d ranks: attention runs whole on each of them", name,
            undivided, size,
        )  # fmt: skip
        changes |= dict.fromkeys(filter(_ATTENTION.search, plan), "replicate")
    return DistributedConfig(tp_size=size, tp_plan=changes)


def plans_at_hand() -> list[str]:
    """Types of causal language models for which transformers has a plan."""
    return [
        config.model_type
        for config in MODEL_FOR_CAUSAL_LM_MAPPING.keys()  # noqa: SIM118 (a mapping made lazily)
        if getattr(config, "base_model_tp_plan", None)
    ]


def _undivided_heads(model: PreTrainedModel, plan: dict[str, str], size: int) -> str | None:
    """Heads of which ranks cannot have equally many, in words."""
    config = model.config.get_text_config(decoder=True)
    heads = config.num_attention_heads
    kv_heads = getattr(config, "num_key_value_heads", None) or heads
    if get_kv_heads_per_rank(plan, heads, size) is None:
        return f"{heads} attention heads"
    if get_kv_heads_per_rank(plan, kv_heads, size) is None:
        return f"{kv_heads} key/value heads"
    return None
