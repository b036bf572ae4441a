"""Draft heads that read the target's hidden states: Medusa and EAGLE, and their files."""

from inferlab.models.draft_heads.eagle import EagleHead, eagle_config, published_feature_layers
from inferlab.models.draft_heads.files import load_eagle, load_medusa, save_eagle, save_medusa
from inferlab.models.draft_heads.medusa import MedusaHeads
from inferlab.models.draft_heads.paged import PagedEagle

__all__ = [
    "EagleHead",
    "MedusaHeads",
    "PagedEagle",
    "eagle_config",
    "load_eagle",
    "load_medusa",
    "published_feature_layers",
    "save_eagle",
    "save_medusa",
]
