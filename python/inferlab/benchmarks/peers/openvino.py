"""OpenVINO GenAI's LLMPipeline on a model that optimum-intel converted.

Needs openvino-genai and numpy; optimum-intel (with torch) to convert.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import openvino
import openvino_genai as genai

PRECISION = {"bfloat16": "bf16", "float16": "f16", "float32": "f32"}


class Peer:
    def __init__(self, way: str) -> None:
        self.pipeline: Any = None

    def versions(self) -> dict[str, str]:
        return {"openvino-genai": genai.__version__.partition("-")[0]}

    def convert(self, model: str, folder: str, dtype: str) -> str:
        import torch
        from optimum.intel import OVModelForCausalLM

        converted = OVModelForCausalLM.from_pretrained(
            model, export=True, compile=False, load_in_8bit=False, dtype=getattr(torch, dtype)
        )
        converted.save_pretrained(folder)
        return folder

    def load(
        self,
        model: str,
        dtype: str,
        threads: int,
        device: str,
        context: int,
        batch: int,
        draft: str | None,
        trust_remote_code: bool,
    ) -> dict[str, Any]:
        self.pipeline = genai.LLMPipeline(
            model,
            "CPU",
            INFERENCE_NUM_THREADS=threads,
            INFERENCE_PRECISION_HINT=PRECISION[dtype],
            KV_CACHE_PRECISION=PRECISION[dtype],  # by default 8 bits
        )
        size = (Path(model) / "openvino_model.bin").stat().st_size
        return {"format": f"OpenVINO {dtype}", "weights_mb": size / 2**20}

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: Mapping[str, Any]
    ) -> dict[str, Any]:
        config = genai.GenerationConfig()
        config.max_new_tokens = max_new_tokens
        ends = set(sampling["stop_ids"])
        config.stop_token_ids = ends
        config.include_stop_str_in_output = True
        if ends:
            config.eos_token_id = min(ends)
        config.do_sample = sampling["temperature"] > 0
        if config.do_sample:
            config.temperature = sampling["temperature"]
            config.top_p = sampling["top_p"]
            config.rng_seed = sampling["seed"] % 2**32
            if sampling["top_k"] > 0:
                config.top_k = sampling["top_k"]
            if sampling["min_p"] > 0:
                config.min_p = sampling["min_p"]
        width = max(map(len, prompts))
        ids = np.array([[0] * (width - len(ids)) + ids for ids in prompts], np.int64)
        mask = np.array([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts], np.int64)
        begin = time.perf_counter()
        inputs = genai.TokenizedInputs(openvino.Tensor(ids), openvino.Tensor(mask))
        results = self.pipeline.generate(inputs, config)
        rows = [list(tokens) for tokens in results.tokens]
        ms = (time.perf_counter() - begin) * 1e3
        return {"ids": rows, "ms": ms, "first_ms": results.perf_metrics.get_ttft().mean}
