"""What a target is: a model over a paged cache, real (HFModel) or without weights (FakeLM)."""

from inferlab.models.assets import BUNDLED, resolve_model_path
from inferlab.models.attention_hook import UnsupportedArchitectureError
from inferlab.models.base import TargetModel, allowed_vocab, format_of, plain_model, unknown_ids
from inferlab.models.early_exit import EarlyExit
from inferlab.models.fake import FakeLM
from inferlab.models.forked import use_threads_that_exist
from inferlab.models.forward import FINAL_HIDDEN, ForwardBatch, ForwardOutput, last_rows
from inferlab.models.hf import HFModel
from inferlab.models.kv_cache import KVCache
from inferlab.models.loading import ModelLoadError, ModelTooLargeError
from inferlab.models.parallel.model import ShardedModel
from inferlab.models.tokenizer_check import tokenizer_difference
from inferlab.models.vocabulary import VocabularyMap

__all__ = [
    "BUNDLED",
    "FINAL_HIDDEN",
    "EarlyExit",
    "FakeLM",
    "ForwardBatch",
    "ForwardOutput",
    "HFModel",
    "KVCache",
    "ModelLoadError",
    "ModelTooLargeError",
    "ShardedModel",
    "TargetModel",
    "UnsupportedArchitectureError",
    "VocabularyMap",
    "allowed_vocab",
    "format_of",
    "last_rows",
    "plain_model",
    "resolve_model_path",
    "tokenizer_difference",
    "unknown_ids",
    "use_threads_that_exist",
]
