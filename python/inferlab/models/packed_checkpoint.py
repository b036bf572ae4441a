"""Packed models on disk, in the layout of Hugging Face, so that `from_pretrained` reads them.

``config.json`` has a ``quantization_config``: ``quant_method`` "inferlab", ``format`` (see
`inferlab.models.quantized`), ``version`` of this layout, ``tied``: the head's weight was the
embedding's, and ``sha256`` of each file of weights, which are safetensors; without sums nothing is
compared. Where weights were rounded by others, ``format`` is their name, and ``modules`` says which
are packed and how: [bits, group, zeros, ordered] of each (`inferlab.kernels.PackedWeight`). There
packed weights are ``NAME.data``, uint8, laid out as ``inferlab/packed_weight.h`` says, beside
``NAME.order``, int32, where they are ordered; all else is as it was.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.quantizers import HfQuantizer, register_quantization_config, register_quantizer
from transformers.utils.quantization_config import QuantizationConfigMixin

from inferlab.kernels.packed_weight import BITS, GROUPS
from inferlab.models.quantized import (
    FORMATS,
    Packing,
    QuantizedLinear,
    place_packed,
    replace_linears,
)

METHOD = "inferlab"
VERSION = 3
"""1: without ``modules``; 2: none of them ordered."""


@register_quantization_config(METHOD)
class PackedConfig(QuantizationConfigMixin):  # type: ignore[misc]
    """What ``config.json`` says of packed weights.

    Raises:
        ValueError: a version or a format that is not known here.
    """

    def __init__(
        self,
        format: str,
        version: int = VERSION,
        tied: bool = False,
        sha256: dict[str, str] | None = None,
        modules: Mapping[str, Packing] | None = None,
        **others: Any,
    ) -> None:
        if version not in range(1, VERSION + 1):
            raise ValueError(
                f"the weights are packed in version {version} of the layout, and this inferlab "
                f"reads version {VERSION} and before: load them with the inferlab that wrote them, "
                "or run inferlab quantize again"
            )
        if format not in FORMATS and not modules:
            raise ValueError(f"format is {format!r}; known are {', '.join(map(repr, FORMATS))}")
        if not isinstance(sha256 or {}, dict):
            raise ValueError(f"sha256 is {sha256!r}; it must be a mapping from files to sums")
        self.quant_method = METHOD
        self.format, self.version, self.tied = format, version, tied
        self.sha256 = sha256 or {}
        self.modules = {name: _packing(name, of, version) for name, of in (modules or {}).items()}

    @classmethod
    def of(cls, config: Any) -> PackedConfig | None:
        """That of a model's config; None where nothing is packed so."""
        packed = getattr(config, "quantization_config", None)
        packed = packed.to_dict() if isinstance(packed, PackedConfig) else packed
        if not isinstance(packed, dict) or packed.get("quant_method") != METHOD:
            return None
        try:
            return cls(**packed)
        except TypeError as error:
            raise ValueError(f"its quantization_config cannot be read: {error}") from None


def _packing(name: str, of: Any, version: int) -> Packing:
    known = isinstance(of, Sequence) and len(of) == (3 if version < 3 else 4)
    if known and of[0] in BITS and of[1] in GROUPS:
        return of[0], of[1], bool(of[2]), bool(*of[3:])
    raise ValueError(f"{name} is packed as {of!r}; it must be [bits, group, zeros, ordered]")


def check_orders(model: PreTrainedModel) -> None:
    """Raises ValueError where inputs of a packed weight stand in no order, and names the tensor."""
    for name, module in model.named_modules():
        order = module.order if isinstance(module, QuantizedLinear) else None
        if order is None:
            continue
        there = torch.arange(module.in_features)
        if order.dtype != torch.int32 or not torch.equal(order.sort().values.long(), there):
            raise ValueError(
                f"{name}.order is no order of {module.in_features} inputs: it must be int32, each "
                "number once"
            )


@register_quantizer(METHOD)
class PackedQuantizer(HfQuantizer):  # type: ignore[misc]
    """Reads weights that are packed already."""

    def _process_model_before_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        packed = self.quantization_config
        if packed.modules:
            place_packed(model, packed.modules)
            model.inferlab_quantization = packed.format  # type: ignore[assignment]
            return
        replace_linears(model, packed.format)
        head = model.get_output_embeddings()
        if packed.tied and isinstance(head, QuantizedLinear):
            head.num_parameters = 0

    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> None:
        check_orders(model)
        self.quantization_config.sha256 = {}  # of these files, not of those it may be saved to

    def is_serializable(self, *args: Any, **kwargs: Any) -> bool:
        """They are written as they were read."""
        return True

    @property
    def is_trainable(self) -> bool:
        """Not through `from_pretrained`'s own ways."""
        return False


def save_packed(model: PreTrainedModel, tokenizer: Any, folder: Path, *, tied: bool) -> None:
    """Writes a packed model, whole or not at all.

    Args:
        folder: that does not exist, or is empty.
        tied: the head's weight was the embedding's before it was packed.

    Raises:
        OSError: it cannot be written.
    """
    format_: str = model.inferlab_quantization  # type: ignore[assignment]
    folder.parent.mkdir(parents=True, exist_ok=True)
    draft = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        model.save_pretrained(draft)
        if tokenizer is not None:
            tokenizer.save_pretrained(draft)
        sums = {file.name: checksum(file) for file in sorted(draft.glob("*.safetensors"))}
        config = json.loads((draft / "config.json").read_text())
        config["quantization_config"] = PackedConfig(format_, tied=tied, sha256=sums).to_dict()
        (draft / "config.json").write_text(json.dumps(config, indent=2, sort_keys=True) + "\n")
        mask = os.umask(0)
        os.umask(mask)
        for entry in (draft, *draft.iterdir()):  # made for nobody else to read
            entry.chmod((0o777 if entry.is_dir() else 0o666) & ~mask)
        if folder.is_dir():
            folder.rmdir()
        draft.rename(folder)
    except BaseException:
        shutil.rmtree(draft, ignore_errors=True)
        raise


def checksum(file: Path) -> str:
    """SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with file.open("rb") as stream:
        while block := stream.read(2**20):
            digest.update(block)
    return digest.hexdigest()
