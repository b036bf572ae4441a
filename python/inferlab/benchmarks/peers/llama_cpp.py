"""llama.cpp through the C functions that llama-cpp-python binds: no Python between its steps but a
loop. Needs llama-cpp-python; gguf and numpy to convert.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import llama_cpp as llama

KV_TYPES = {"float32": llama.GGML_TYPE_F32}
"""Of the cache; for half types llama.cpp's default, F16."""


class Peer:
    def __init__(self, way: str) -> None:
        self.context: Any = None

    def versions(self) -> dict[str, str]:
        return {"llama-cpp-python": llama.__version__}

    def convert(self, model: str, folder: str, dtype: str) -> str:
        from . import gguf_file

        file = Path(folder) / "model.gguf"
        gguf_file.convert(Path(model), file, dtype)
        return str(file)

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
        llama.llama_backend_init()
        on_gpu = device != "cpu"
        if on_gpu and not llama.llama_supports_gpu_offload():
            raise RuntimeError(f"this build of llama-cpp-python has no kernels for {device}")
        of_model = llama.llama_model_default_params()
        of_model.n_gpu_layers = -1 if on_gpu else 0
        loaded = llama.llama_model_load_from_file(model.encode(), of_model)
        if not loaded:
            raise RuntimeError(f"llama.cpp cannot load {model}; its reason is on stderr")
        of_context = llama.llama_context_default_params()
        per_text = -(-context // 256) * 256
        of_context.n_ctx = per_text * batch
        of_context.n_batch = per_text * batch
        of_context.n_seq_max = batch
        of_context.n_threads = of_context.n_threads_batch = threads
        if dtype in KV_TYPES:
            of_context.type_k = of_context.type_v = KV_TYPES[dtype]
        self.context = llama.llama_init_from_model(loaded, of_context)
        if not self.context:
            raise RuntimeError("llama.cpp cannot make a context; its reason is on stderr")

        self.batch = llama.llama_batch_init(per_text * batch, 0, 1)
        return {"format": f"GGUF {dtype}", "weights_mb": llama.llama_model_size(loaded) / 2**20}

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: Mapping[str, Any]
    ) -> dict[str, Any]:
        begin = time.perf_counter()
        llama.llama_memory_clear(llama.llama_get_memory(self.context), True)
        samplers = [_sampler(sampling) for _ in prompts]
        ends = set(sampling["stop_ids"])
        ids: list[list[int]] = [[] for _ in prompts]
        new = dict(enumerate(prompts))  # what each text has that was not read
        first = None
        while new:
            rows = self._forward(new, prompts, ids)
            for index, row in rows.items():
                token = llama.llama_sampler_sample(samplers[index], self.context, row)
                ids[index].append(token)
                new[index] = [token]
                if token in ends or len(ids[index]) == max_new_tokens:
                    del new[index]
            first = first or time.perf_counter()
        ms = (time.perf_counter() - begin) * 1e3
        for sampler in samplers:
            llama.llama_sampler_free(sampler)
        return {"ids": ids, "ms": ms, "first_ms": (first - begin) * 1e3 if first else None}

    def _forward(
        self, new: Mapping[int, list[int]], prompts: list[list[int]], ids: list[list[int]]
    ) -> dict[int, int]:
        """Reads the new tokens of all texts; text -> the row of its last logits."""
        batch, count, rows = self.batch, 0, {}
        for index, tokens in new.items():
            place = len(prompts[index]) + len(ids[index]) - len(tokens)
            for offset, token in enumerate(tokens):
                batch.token[count] = token
                batch.pos[count] = place + offset
                batch.n_seq_id[count] = 1
                batch.seq_id[count][0] = index
                batch.logits[count] = offset == len(tokens) - 1
                count += 1
            rows[index] = count - 1
        batch.n_tokens = count
        code = llama.llama_decode(self.context, batch)
        if code != 0:
            raise RuntimeError(f"llama_decode returned {code}")
        return rows


def _sampler(sampling: Mapping[str, Any]) -> Any:
    """A chain with the order of Hugging Face's: temperature, top-k, top-p, min-p."""
    chain = llama.llama_sampler_chain_init(llama.llama_sampler_chain_default_params())
    if sampling["temperature"] == 0:
        steps = [llama.llama_sampler_init_greedy()]
    else:
        steps = [llama.llama_sampler_init_temp(sampling["temperature"])]
        if sampling["top_k"] > 0:
            steps.append(llama.llama_sampler_init_top_k(sampling["top_k"]))
        if sampling["top_p"] < 1:
            steps.append(llama.llama_sampler_init_top_p(sampling["top_p"], 1))
        if sampling["min_p"] > 0:
            steps.append(llama.llama_sampler_init_min_p(sampling["min_p"], 1))
        steps.append(llama.llama_sampler_init_dist(sampling["seed"] % 2**32))
    for step in steps:
        llama.llama_sampler_chain_add(chain, step)
    return chain
