"""This package's engine as a peer: plain, or with its drafts. Needs inferlab."""

from __future__ import annotations

from typing import Any

import torch

from inferlab import __version__
from inferlab.benchmarks.peers import hf
from inferlab.benchmarks.runners import BatchRunner, plain_config
from inferlab.config import SpecdecConfig
from inferlab.errors import describe_error
from inferlab.models import HFModel
from inferlab.records import record_of, total_stats
from inferlab.specdec.drafters import CrossVocabularyDrafter
from inferlab.specdec.pipeline import SpeculativePipeline


class Peer:
    """``way``: plain or speculative."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.pipeline: SpeculativePipeline

    def versions(self) -> dict[str, str]:
        return {"inferlab": __version__, "torch": torch.__version__}

    def load(self, config: dict[str, Any], threads: int) -> dict[str, Any]:
        """As the others', by the keys of a configuration; also what they have to know of the
        target: ``device`` (of a GPU also ``gpu``, its UUID), ``dtype``, ``stop_ids``, and
        ``draft_fits``, whether a draft model shares its vocabulary."""
        torch.set_num_threads(threads)
        asked = SpecdecConfig(**config)
        speculative = self.way == "speculative"
        self.pipeline = SpeculativePipeline(config=asked if speculative else plain_config(asked))
        self.runner = BatchRunner(self.pipeline)
        target, draft = self.pipeline.target, self.pipeline.draft_model
        shares = not isinstance(self.pipeline.engine.drafter, CrossVocabularyDrafter)
        models = [one.model for one in (target, draft) if isinstance(one, HFModel)]
        dtype = str(target.dtype).removeprefix("torch.")
        return {
            "format": dtype,
            "weights_mb": sum(hf.weights_mb(model) for model in models),
            "dtype": dtype,
            "device": str(target.device),
            "gpu": _uuid(target.device) if target.device.type == "cuda" else None,
            "stop_ids": list(target.eos_token_ids),
            "draft_fits": draft is not None and shares,
            "drafter": self.pipeline.describe_drafter(),
        }

    def encode(self, texts: list[str]) -> list[dict[str, Any]]:
        """Of each text its ``ids``, or the ``error`` with which it is refused."""
        return [self._encode(text) for text in texts]

    def _encode(self, text: str) -> dict[str, Any]:
        try:
            self.pipeline.check(text)
        except ValueError as error:
            return {"error": describe_error(error)}
        return {"ids": self.pipeline.target.tokenizer.encode(text)}

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: dict[str, Any]
    ) -> dict[str, Any]:
        """As the others'. The configuration has what is asked for, too. Times include making texts
        of tokens, which the others do not do."""
        result = self.runner.run(prompts)
        if result["errors"]:
            raise RuntimeError("; ".join(result["errors"].values()))
        good = result["results"]
        stats = total_stats(record_of(one) for one in good)
        return {
            "ids": [one["token_ids"] for one in good],
            "ms": result["latency_ms"],
            "first_ms": min(one["first_token_ms"] for one in good),
            "accepted_length": stats.mean_accepted_length if stats.steps else None,
        }


def _uuid(device: torch.device) -> str:
    return str(torch.cuda.get_device_properties(device).uuid)
