"""LLM Inference Lab: speculative decoding, faster than plain decoding and exactly as good.

Everything public is importable from here. Names are loaded when they are first used, so that
`import inferlab` takes milliseconds although torch takes seconds.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

__version__ = "0.1.0"

_EXPORTS = {
    "inferlab.benchmarks.advisor": ("Advisor",),
    "inferlab.benchmarks.benchmark": ("BenchmarkRunner",),
    "inferlab.config": (
        "BaselineConfig",
        "ConfigError",
        "SpecdecConfig",
        "VllmConfig",
        "load_config",
    ),
    "inferlab.models": (
        "FakeLM",
        "ForwardBatch",
        "HFModel",
        "KVCache",
        "ModelLoadError",
        "ModelTooLargeError",
        "TargetModel",
        "UnsupportedArchitectureError",
    ),
    "inferlab.baseline": ("LocalBaselineRunner",),
    "inferlab.client.ping": ("VLLMPingClient",),
    "inferlab.records": ("RequestRecord", "record_of"),
    "inferlab.specdec.control": ("Choice", "Controller", "Outlook", "StepObservation"),
    "inferlab.specdec.controllers": ("AdaptiveController", "FixedController"),
    "inferlab.specdec.planner": ("CostController",),
    "inferlab.specdec.drafters": (
        "Drafter",
        "EagleDrafter",
        "EnsembleDrafter",
        "MedusaDrafter",
        "ModelDrafter",
        "NgramDrafter",
        "RecyclingDrafter",
    ),
    "inferlab.errors": ("Interrupted",),
    "inferlab.specdec.engine": ("Engine",),
    "inferlab.specdec.grammar": ("Grammar", "GrammarError"),
    "inferlab.specdec.pipeline": ("GenerationError", "SpeculativePipeline"),
    "inferlab.specdec.policies": ("Policy",),
    "inferlab.specdec.tree": ("Budget", "DraftTree", "TreeShape"),
    "inferlab.types": ("GenerationResult", "SamplingParams", "SpeculationStats"),
}

_MODULE_OF = {name: module for module, names in _EXPORTS.items() for name in names}

__all__ = ["__version__", "kernels", *sorted(_MODULE_OF)]

if TYPE_CHECKING:
    from inferlab import kernels as kernels
    from inferlab.baseline import LocalBaselineRunner as LocalBaselineRunner
    from inferlab.benchmarks.advisor import Advisor as Advisor
    from inferlab.benchmarks.benchmark import BenchmarkRunner as BenchmarkRunner
    from inferlab.client.ping import VLLMPingClient as VLLMPingClient
    from inferlab.config import BaselineConfig as BaselineConfig
    from inferlab.config import ConfigError as ConfigError
    from inferlab.config import SpecdecConfig as SpecdecConfig
    from inferlab.config import VllmConfig as VllmConfig
    from inferlab.config import load_config as load_config
    from inferlab.errors import Interrupted as Interrupted
    from inferlab.models import FakeLM as FakeLM
    from inferlab.models import ForwardBatch as ForwardBatch
    from inferlab.models import HFModel as HFModel
    from inferlab.models import KVCache as KVCache
    from inferlab.models import ModelLoadError as ModelLoadError
    from inferlab.models import ModelTooLargeError as ModelTooLargeError
    from inferlab.models import TargetModel as TargetModel
    from inferlab.models import UnsupportedArchitectureError as UnsupportedArchitectureError
    from inferlab.records import RequestRecord as RequestRecord
    from inferlab.records import record_of as record_of
    from inferlab.specdec.control import Choice as Choice
    from inferlab.specdec.control import Controller as Controller
    from inferlab.specdec.control import Outlook as Outlook
    from inferlab.specdec.control import StepObservation as StepObservation
    from inferlab.specdec.controllers import AdaptiveController as AdaptiveController
    from inferlab.specdec.controllers import FixedController as FixedController
    from inferlab.specdec.drafters import Drafter as Drafter
    from inferlab.specdec.drafters import EagleDrafter as EagleDrafter
    from inferlab.specdec.drafters import EnsembleDrafter as EnsembleDrafter
    from inferlab.specdec.drafters import MedusaDrafter as MedusaDrafter
    from inferlab.specdec.drafters import ModelDrafter as ModelDrafter
    from inferlab.specdec.drafters import NgramDrafter as NgramDrafter
    from inferlab.specdec.drafters import RecyclingDrafter as RecyclingDrafter
    from inferlab.specdec.engine import Engine as Engine
    from inferlab.specdec.grammar import Grammar as Grammar
    from inferlab.specdec.grammar import GrammarError as GrammarError
    from inferlab.specdec.pipeline import GenerationError as GenerationError
    from inferlab.specdec.pipeline import SpeculativePipeline as SpeculativePipeline
    from inferlab.specdec.planner import CostController as CostController
    from inferlab.specdec.policies import Policy as Policy
    from inferlab.specdec.tree import Budget as Budget
    from inferlab.specdec.tree import DraftTree as DraftTree
    from inferlab.specdec.tree import TreeShape as TreeShape
    from inferlab.types import GenerationResult as GenerationResult
    from inferlab.types import SamplingParams as SamplingParams
    from inferlab.types import SpeculationStats as SpeculationStats


def __getattr__(name: str) -> Any:
    if name == "kernels":
        return importlib.import_module("inferlab.kernels")
    if name not in _MODULE_OF:
        raise AttributeError(f"module 'inferlab' has no attribute {name!r}")
    value = getattr(importlib.import_module(_MODULE_OF[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
