"""Drafters: who proposes the tokens that the target verifies."""

from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.corpus import load_corpus
from inferlab.specdec.drafters.cross import CrossVocabularyDrafter
from inferlab.specdec.drafters.eagle import EagleDrafter
from inferlab.specdec.drafters.ensemble import EnsembleDrafter
from inferlab.specdec.drafters.lite import EagleLiteDrafter, MedusaLiteDrafter
from inferlab.specdec.drafters.medusa import MedusaDrafter
from inferlab.specdec.drafters.model import ModelDrafter
from inferlab.specdec.drafters.ngram import NgramDrafter
from inferlab.specdec.drafters.recycling import RecyclingDrafter

__all__ = [
    "CrossVocabularyDrafter",
    "Drafter",
    "EagleDrafter",
    "EagleLiteDrafter",
    "EnsembleDrafter",
    "MedusaDrafter",
    "MedusaLiteDrafter",
    "ModelDrafter",
    "NgramDrafter",
    "RecyclingDrafter",
    "load_corpus",
]
