"""From a checkpoint of Llama's layers to a GGUF file, llama.cpp's format, without a tokenizer.

Needs numpy and gguf. GGUF's names of tensors and keys are those of llama.cpp's documentation.
"""

from __future__ import annotations

import json
import re
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np

ARCHITECTURES = {"llama": "llama", "mistral": "llama", "qwen2": "qwen2", "qwen3": "qwen3"}
"""``model_type`` of a checkpoint -> llama.cpp's architecture."""

TYPES = {
    "float32": gguf.GGMLQuantizationType.F32,
    "float16": gguf.GGMLQuantizationType.F16,
    "bfloat16": gguf.GGMLQuantizationType.BF16,
}

_LAYER = {
    "input_layernorm": "attn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "post_attention_layernorm": "ffn_norm",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
_OTHERS = {"embed_tokens": "token_embd", "norm": "output_norm", "lm_head": "output"}


def convert(model: Path, file: Path, dtype: str) -> None:
    """Writes a GGUF file of ``dtype``; vectors are fp32, as llama.cpp wants them.

    Raises:
        ValueError: a checkpoint whose layers are none of Llama's, or that has a tensor, a rotary
            scaling or a window for which there is no rule here.
    """
    config = json.loads((model / "config.json").read_text(encoding="utf-8"))
    arch = ARCHITECTURES.get(config["model_type"])
    if arch is None:
        raise ValueError(
            f"model_type {config['model_type']} cannot be converted to GGUF here; known are "
            f"{', '.join(ARCHITECTURES)}"
        )
    heads = config["num_attention_heads"]
    kv_heads = config.get("num_key_value_heads") or heads
    head_dim = config.get("head_dim") or config["hidden_size"] // heads
    writer = gguf.GGUFWriter(file, arch)
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(heads)
    writer.add_head_count_kv(kv_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_layer_norm_rms_eps(config["rms_norm_eps"])
    writer.add_rope_freq_base(_rope_base(config))
    writer.add_vocab_size(config["vocab_size"])
    writer.add_tokenizer_model("no_vocab")
    for name, values in _tensors(model):
        if name == "lm_head.weight" and config.get("tie_word_embeddings"):
            continue
        ours = _name(name)
        if arch == "llama" and ours.split(".")[-2] in ("attn_q", "attn_k"):
            values = _interleaved(values, heads if "attn_q" in ours else kv_heads)
        kind = TYPES[dtype] if values.ndim > 1 else TYPES["float32"]
        writer.add_tensor(ours, _encoded(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _rope_base(config: dict[str, Any]) -> float:
    rope = config.get("rope_parameters") or config.get("rope_scaling") or {}
    kind = rope.get("rope_type", rope.get("type", "default"))
    if kind != "default":
        raise ValueError(f"rope_type {kind} cannot be converted to GGUF here; only default can")
    if config.get("sliding_window") and config.get("use_sliding_window", True):
        raise ValueError("a sliding window cannot be converted to GGUF here")
    return float(rope.get("rope_theta") or config.get("rope_theta") or 10000.0)


def _name(name: str) -> str:
    """GGUF's name of a tensor."""
    stem, _, kind = name.removeprefix("model.").rpartition(".")
    if match := re.fullmatch(r"layers\.(\d+)\.(.+)", stem):
        found = _LAYER.get(match[2])
        found = None if found is None else f"blk.{match[1]}.{found}"
    else:
        found = _OTHERS.get(stem)
    if found is None or kind not in ("weight", "bias"):
        raise ValueError(f"tensor {name} cannot be converted to GGUF here")
    return f"{found}.{kind}"


def _interleaved(values: np.ndarray, heads: int) -> np.ndarray:
    """The rows of a projection in the order of llama.cpp's rotation of Llama, which turns
    neighbours where the checkpoint's turns a head's halves: [heads, 2, half] -> [heads, half, 2].
    """
    halves = values.reshape(heads, 2, values.shape[0] // heads // 2, *values.shape[1:])
    return halves.swapaxes(1, 2).reshape(values.shape)


def _encoded(values: np.ndarray, kind: Any) -> np.ndarray:
    """What gguf's writer takes: floats, or of bf16 the bytes."""
    if kind == TYPES["bfloat16"]:
        bits = np.ascontiguousarray(values).view(np.uint32)
        nearest = bits + 0x7FFF + ((bits >> 16) & 1)  # ties to even
        return (nearest >> 16).astype(np.uint16).view(np.uint8)
    return values.astype(np.float16 if kind == TYPES["float16"] else np.float32)


def _tensors(model: Path) -> Iterator[tuple[str, np.ndarray]]:
    """Names and values, in fp32, of a checkpoint's safetensors files."""
    files = sorted(model.glob("*.safetensors"))
    if not files:
        raise ValueError(f"no *.safetensors in {model}")
    for file in files:
        with file.open("rb") as opened:
            (length,) = struct.unpack("<Q", opened.read(8))
            header = json.loads(opened.read(length))
        data = np.memmap(file, np.uint8, "r", 8 + length)
        for name, about in header.items():
            if name != "__metadata__":
                begin, end = about["data_offsets"]
                yield name, _floats(data[begin:end], about["dtype"]).reshape(about["shape"])


def _floats(raw: np.ndarray, dtype: str) -> np.ndarray:
    if dtype == "BF16":
        return (raw.view("<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype in ("F16", "F32"):
        return raw.view("<f2" if dtype == "F16" else "<f4").astype(np.float32)
    raise ValueError(f"weights of {dtype} cannot be converted to GGUF here")
