"""Weights of 8 and 4 bits by bitsandbytes and torchao, through transformers.

Their modules run as they are: products are theirs, so a row's bits may depend on the rows beside
it, and speculation gives the tokens of plain decoding up to that rounding.
"""

from __future__ import annotations

import importlib.util
import logging
from typing import Any

import torch

PACKAGES = {
    "bnb-8bit": "bitsandbytes",
    "bnb-4bit": "bitsandbytes",
    "torchao-int8": "torchao",
    "torchao-int4": "torchao",
}
"""Format -> who makes it."""
TORCHAO_GROUP = 32


def check_other_format(quantization: str, device: torch.device) -> None:
    """Whether models on a device can have a format.

    Raises:
        ValueError: its package is missing, or has no products for the device.
    """
    if quantization == "torchao-int4" and device.type != "cuda":
        raise ValueError(
            f"quantization is 'torchao-int4', whose products are of CUDA, and the model is on "
            f"{device}; choose 'int4' or 'bnb-4bit'"
        )
    package = PACKAGES[quantization]
    if importlib.util.find_spec(package) is None:
        raise ValueError(
            f"quantization is {quantization!r}, which {package} makes, and it is not installed: "
            f"pip install {package} accelerate"
        )


def settings_of(quantization: str, dtype: torch.dtype, device: torch.device) -> Any:
    """What ``from_pretrained`` takes as ``quantization_config``: LLM.int8() and NF4 of bitsandbytes
    (Dettmers et al., 2022 and 2023), 8 bits for each output and 4 for 32 inputs of torchao.

    Args:
        dtype: of the model; NF4 weights are computed with in it, or in bf16 where it has 32 bits.
    """
    check_other_format(quantization, device)
    if PACKAGES[quantization] == "bitsandbytes":
        from transformers import BitsAndBytesConfig

        # It says at every product that it casts its input.
        logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
        if quantization == "bnb-8bit":
            return BitsAndBytesConfig(load_in_8bit=True)
        return BitsAndBytesConfig(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=torch.bfloat16 if dtype == torch.float32 else dtype,
        )
    from torchao.quantization import Int4WeightOnlyConfig, Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    if quantization == "torchao-int8":
        return TorchAoConfig(Int8WeightOnlyConfig())
    if dtype != torch.bfloat16:
        raise ValueError(
            f"quantization is 'torchao-int4', whose products are of bfloat16, and dtype is "
            f"{dtype}; set dtype to bfloat16"
        )
    four_bits = Int4WeightOnlyConfig(
        group_size=TORCHAO_GROUP, int4_packing_format="tile_packed_to_4d"
    )
    return TorchAoConfig(four_bits)
