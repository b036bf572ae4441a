"""Hugging Face transformers' continuous batching (`generate_batch`), its manager kept running.

Needs torch and transformers (5.17 or newer).
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

from transformers import GenerationConfig
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from . import hf

PAGE = 32
"""Tokens. The default, 256, fits prompts of thousands."""

READ_TOGETHER = 512
"""Tokens that a step reads at most, as many as in this package's scheduler."""


class Peer(hf.Peer):
    """A manager is made for the sampling that it is first asked for, and again when that changes:
    a manager keeps the one that it was made with."""

    def __init__(self, way: str) -> None:
        super().__init__(way)
        self._room = (0, 0)
        self._manager: Any = None
        self._made_for: Any = None

    def load(self, **given: Any) -> dict[str, Any]:  # type: ignore[override]
        self._room = (given["context"], given["batch"])
        return super().load(**given)

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: Mapping[str, Any]
    ) -> dict[str, Any]:
        if self._made_for != (max_new_tokens, dict(sampling)):
            self._start(max_new_tokens, sampling)
        begin = time.perf_counter()
        wanted = self._manager.add_requests(
            inputs=prompts, max_new_tokens=max_new_tokens, record_timestamps=True
        )
        outputs: dict[str, Any] = {}
        while len(outputs) < len(wanted):
            output = self._manager.get_result(timeout=1)
            if output is not None and output.is_finished():
                if output.error is not None:
                    raise RuntimeError(output.error)
                outputs[output.request_id] = output
            elif output is None and not self._manager.is_running():
                raise RuntimeError("the thread of generate_batch ended")
        ms = (time.perf_counter() - begin) * 1e3
        times = [outputs[name].timestamps for name in wanted]
        first = min((of[0] for of in times if of), default=None)
        return {
            "ids": [list(outputs[name].generated_tokens) for name in wanted],
            "ms": ms,
            "first_ms": None if first is None else (first - begin) * 1e3,
        }

    def _start(self, max_new_tokens: int, sampling: Mapping[str, Any]) -> None:
        if self._manager is not None:
            self._manager.stop(block=True)
        options = hf.sampling_options(
            sampling["temperature"], sampling["top_k"], sampling["top_p"], sampling["min_p"]
        )
        ends = sampling["stop_ids"]
        config = GenerationConfig(
            max_new_tokens=max_new_tokens,
            eos_token_id=ends or None,
            pad_token_id=next(iter(ends), 0),
            **options,
        )
        context, batch = self._room
        # By default it takes nine tenths of all free memory for its cache.
        room = ContinuousBatchingConfig(
            page_size=PAGE,
            num_blocks=(-(-context // PAGE) + 1) * batch,
            max_batch_tokens=max(READ_TOGETHER, batch),
            max_requests_per_batch=batch,
            allow_block_sharing=False,  # prompts come again, and are to be read again
            seed=sampling["seed"],
        )
        self._manager = self.model.init_continuous_batching(
            generation_config=config, continuous_batching_config=room
        )
        self._manager.start()
        self._made_for = (max_new_tokens, dict(sampling))
