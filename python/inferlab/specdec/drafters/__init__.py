"""Drafters: who proposes the tokens that the target verifies."""

from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.model import ModelDrafter
from inferlab.specdec.drafters.ngram import NgramDrafter, NgramIndex

__all__ = ["Drafter", "ModelDrafter", "NgramDrafter", "NgramIndex"]
