"""Hugging Face transformers: `generate`; with a draft model as its assistant; with prompt lookup.

Needs torch and transformers (5 or newer).
"""

from __future__ import annotations

import time
from collections.abc import Collection, Mapping, Sequence
from typing import Any

import torch
import transformers
from transformers import AutoModelForCausalLM, GenerationConfig

LOOKUP_TOKENS = 10
"""Drafted by prompt lookup: what its documentation shows."""


class Peer:
    """``way``: generate, assisted or lookup."""

    def __init__(self, way: str) -> None:
        self.way = way
        self.model: Any = None
        self.assistant: Any = None

    def versions(self) -> dict[str, str]:
        return {"transformers": transformers.__version__, "torch": torch.__version__}

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
        self.model = load_model(model, dtype, threads, device, trust_remote_code)
        models = [self.model]
        if self.way == "assisted":
            self.assistant = load_model(str(draft), dtype, threads, device, trust_remote_code)
            models.append(self.assistant)
        return {"format": dtype, "weights_mb": sum(weights_mb(one) for one in models)}

    def generate(
        self, prompts: list[list[int]], max_new_tokens: int, sampling: Mapping[str, Any]
    ) -> dict[str, Any]:
        options = sampling_options(
            sampling["temperature"], sampling["top_k"], sampling["top_p"], sampling["min_p"]
        )
        ends = sampling["stop_ids"]
        torch.manual_seed(sampling["seed"])
        first = FirstToken()
        ids, ms = decode(
            self.model,
            prompts,
            {
                **options,
                "max_new_tokens": max_new_tokens,
                "eos_token_id": ends or None,
                "pad_token_id": next(iter(ends), 0),
                "streamer": first,
            },
            ends=ends,
            assistant=self.assistant,
            lookup=LOOKUP_TOKENS if self.way == "lookup" else None,
        )
        return {"ids": ids, "ms": ms, "first_ms": first.ms}


def load_model(
    path: str, dtype: str, threads: int, device: str, trust_remote_code: bool = False
) -> Any:
    """A model that follows nothing of its generation config but what it is told."""
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(
        path, dtype=getattr(torch, dtype), trust_remote_code=trust_remote_code
    )
    model.generation_config = GenerationConfig()
    return model.eval().to(device)


def sampling_options(
    temperature: float, top_k: int | None, top_p: float | None, min_p: float = 0.0
) -> dict[str, Any]:
    """What `generate` is told of sampling; values that greedy decoding does not use are unset, and
    with them a checkpoint's."""
    if temperature == 0:
        return {"do_sample": False, "temperature": None, "top_k": None, "top_p": None}
    options = {"do_sample": True, "temperature": temperature, "top_k": top_k, "top_p": top_p}
    return {**options, "min_p": min_p} if min_p > 0 else options


@torch.inference_mode()
def decode(
    model: Any,
    prompts: Sequence[Sequence[int]],
    options: Mapping[str, Any],
    *,
    ends: Collection[int] = (),
    assistant: Any = None,
    lookup: int | None = None,
) -> tuple[list[list[int]], float]:
    """`generate` on token ids, several prompts as one batch with padding on their left.

    Args:
        options: of `generate`.
        ends: ids that end a text; what stands behind is cut off, as where the others of a batch
            went on.
        assistant: the draft model of assisted generation.
        lookup: tokens drafted by prompt lookup.

    Returns:
        The new ids of each prompt, and the ms that `generate` took.
    """
    width = max(map(len, prompts))
    pad = options["pad_token_id"]
    ids = torch.tensor([[pad] * (width - len(ids)) + list(ids) for ids in prompts])
    mask = torch.tensor([[0] * (width - len(ids)) + [1] * len(ids) for ids in prompts])
    drafting: dict[str, Any] = {}
    if assistant is not None:
        drafting["assistant_model"] = assistant
    if lookup is not None:
        drafting["prompt_lookup_num_tokens"] = lookup
    ids, mask = ids.to(model.device), mask.to(model.device)
    begin = time.perf_counter()
    output = model.generate(input_ids=ids, attention_mask=mask, **options, **drafting)
    rows: list[list[int]] = output[:, width:].tolist()
    ms = (time.perf_counter() - begin) * 1e3
    return [up_to_end(row, ends) for row in rows], ms


def up_to_end(ids: list[int], ends: Collection[int]) -> list[int]:
    """The ids up to the first that ends a text, which belongs to it."""
    place = next((place for place, token in enumerate(ids) if token in ends), len(ids))
    return ids[: place + 1]


class FirstToken:
    """A streamer that notes when the first new token came."""

    def __init__(self) -> None:
        self._begin = time.perf_counter()
        self._puts = 0
        self.ms: float | None = None

    def put(self, value: torch.Tensor) -> None:
        self._puts += 1
        if self._puts == 2:  # the first is the prompt
            self.ms = (time.perf_counter() - self._begin) * 1e3

    def end(self) -> None:
        """Part of the streamer's interface; there is nothing to flush."""


def weights_mb(model: torch.nn.Module) -> float:
    """MB (2^20 bytes) of a model's weights, shared ones once."""
    tensors = (*model.parameters(), *model.buffers())
    storages = {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}
    return sum(storages.values()) / 2**20
