"""Reads and writes draft heads in the published layouts, and checks them against their target.

Medusa (github FasterDecoding/Medusa): `config.json` and `medusa_lm_head.safetensors` or `.pt`.
EAGLE (github SafeAILab/EAGLE): `config.json` and `model.safetensors` or `pytorch_model.bin`.

Published files differ in what lies around the weights, which changes nothing: shards, what a
wrapper put in front of the keys (`module.`, `model.`, torch.compile's `_orig_mod.`, ...), the
buffers of a rotary embedding, a copy of the target's LM head in EAGLE-1, `layers.0` for EAGLE-3's
`midlayer`. A weight that is neither these nor the head's own is an error.

A vocabulary may be padded to another width than the target's: what lies behind the ids that the
tokenizer knows is never drafted, so such tables are cut or filled up to the target's width.
"""

from __future__ import annotations

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import LlamaConfig

from inferlab.models.draft_heads.eagle import EagleHead
from inferlab.models.draft_heads.medusa import MedusaHeads
from inferlab.models.draft_heads.weight_files import INDEX, find, read
from inferlab.models.loading import ModelLoadError

MEDUSA_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
EAGLE_FILES = ("model.safetensors", f"model.safetensors{INDEX}", "pytorch_model.bin")

_COMPILED = "_orig_mod."  # torch.compile's, in front of any module
_ROTARY_BUFFER = re.compile(r"(?:.*\.)?rotary_emb\.(?:\w*inv_freq|\w+_cached)")
_MEDUSA_WRAPPERS = r"(?:(?:module|model|base_model|medusa_heads?)\.)*"
_MEDUSA_KEY = re.compile(_MEDUSA_WRAPPERS + r"(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")
_MEDUSA_ROOT = re.compile(_MEDUSA_WRAPPERS + "root_projection")
# What LlamaConfig would make up.
_NEEDED = ("hidden_size", "intermediate_size", "num_attention_heads", "vocab_size")


def load_medusa(
    name_or_path: str | PathLike[str],
    target: Any,
    *,
    allow_pickle: bool = False,
    known_ids: int | None = None,
) -> MedusaHeads:
    """Loads Medusa heads for a target, in its dtype and on its device.

    How many heads and layers there are is read from the weights: the published configurations
    do not always say it right.

    Args:
        name_or_path: directory, bundled name or hub id, in this order.
        target: the Hugging Face causal LM that the heads were trained on.
        allow_pickle: read `.pt` files, whose unpickling can run code.
        known_ids: how many ids the tokenizer knows, where heads and target may be padded to
            different widths; None: the widths must be the same.

    Raises:
        FileNotFoundError: a directory that does not exist.
        ModelLoadError: no weights, damaged or incomplete ones, or those of another target.
    """
    source, weights = read(name_or_path, MEDUSA_FILES, allow_pickle)
    hidden_size, vocab_size = _target_shape(target)
    renamed: dict[str, Tensor] = {}
    indices = []
    for key, tensor in weights.items():
        bare = key.replace(_COMPILED, "")
        if _MEDUSA_ROOT.fullmatch(bare):
            renamed["root_projection"] = tensor
            continue
        match = _MEDUSA_KEY.fullmatch(bare)
        if match is None:
            raise ModelLoadError(
                f"{source}: {key!r} is no weight of Medusa heads, which are named "
                "'{head}.{layer}.linear.weight', '.bias' and '{head}.{layers}.weight'"
            )
        indices.append((int(match[1]), int(match[2]), match[3]))
        if match[3] == "weight":
            tensor = _as_wide(tensor, vocab_size, known_ids)
        renamed[f"{match[1]}.{match[2]}.{match[3]}"] = tensor
    blocks = [(head, layer) for head, layer, what in indices if what == "linear.weight"]
    if not blocks:
        raise ModelLoadError(f"{source}: no residual block, e.g. '0.0.linear.weight', in it")
    heads = MedusaHeads(
        1 + max(head for head, _ in blocks),
        1 + max(layer for _, layer in blocks),
        hidden_size,
        vocab_size,
        target_head=target.get_output_embeddings(),
        tied=not any(what == "weight" for _, _, what in indices),
        embedding=target.get_input_embeddings() if "root_projection" in renamed else None,
    )
    _fill(heads, renamed, source, hidden_size, vocab_size)
    return _like_target(heads, target)


def save_medusa(folder: Path, heads: MedusaHeads, *, base_model: str) -> None:
    """Writes the heads in bf16 in the published layout; `folder` exists.

    Args:
        base_model: name of the target, for the configuration.
    """
    config = {
        "medusa_num_heads": heads.num_heads,
        "medusa_num_layers": heads.num_layers,
        "base_model_name_or_path": base_model,
        "hidden_size": heads.hidden_size,
        "vocab_size": heads.vocab_size,
    }
    _write(folder, MEDUSA_FILES[0], heads.state_dict(), config)


def load_eagle(
    name_or_path: str | PathLike[str],
    target: Any,
    *,
    allow_pickle: bool = False,
    known_ids: int | None = None,
) -> EagleHead:
    """Loads an EAGLE-1, -2 or -3 head for a target, in its dtype and on its device.

    Arguments and errors are those of `load_medusa`. A head without an embedding uses the target's,
    an EAGLE-3 head without an LM head the target's: of all tokens, or of those that `d2t` lists.
    """
    hidden_size, vocab_size = _target_shape(target)
    source, weights = read(name_or_path, EAGLE_FILES, allow_pickle)
    weights = _bare(weights, source)
    weights = {k: v for k, v in weights.items() if not _ROTARY_BUFFER.fullmatch(k)}
    if "layers.0.hidden_norm.weight" in weights:  # EAGLE-1 has no such norm
        weights = {re.sub(r"^layers\.0\.", "midlayer.", k): v for k, v in weights.items()}
    config_file = find(name_or_path, ("config.json",))
    config, layers = _eagle_config(config_file, target)
    if config.vocab_size != vocab_size:
        if known_ids is None or min(config.vocab_size, vocab_size) < known_ids:
            raise ModelLoadError(
                f"{config_file}: the head's vocab_size is {config.vocab_size}, its target has "
                f"{vocab_size} tokens; name the head that was trained on this target"
            )
        for key in ("embed_tokens.weight", "lm_head.weight"):
            if key in weights and (key == "embed_tokens.weight" or "d2t" not in weights):
                weights[key] = _as_wide(weights[key], vocab_size, known_ids)
        config.vocab_size = vocab_size
    version = 3 if any(key.startswith("midlayer.") for key in weights) else 1
    own_embedding = "embed_tokens.weight" in weights
    config.bias = "fc.bias" in weights
    config.qkv_bias = f"{_layer_prefix(version)}.self_attn.q_proj.bias" in weights
    offsets, _ = weights.pop("d2t", None), weights.pop("t2d", None)
    own_lm_head = version == 3 and "lm_head.weight" in weights
    if version == 1:
        weights.pop("lm_head.weight", None)
    for key, own in (("embed_tokens.weight", own_embedding), ("lm_head.weight", own_lm_head)):
        if not own and config.hidden_size != hidden_size:
            raise ModelLoadError(
                f"{config_file}: the head's hidden_size is {config.hidden_size} and it has no "
                f"{key!r} of its own, its target's is {hidden_size}; name the head that was "
                "trained on this target"
            )
    ids = None if offsets is None else _draft_ids(offsets, vocab_size, source)
    if own_lm_head:
        config.draft_vocab_size = weights["lm_head.weight"].shape[0]
    elif version == 3 and ids is not None and len(ids) < vocab_size:
        target_head = target.get_output_embeddings().weight.detach()
        weights["lm_head.weight"] = target_head[ids.to(target_head.device)].cpu()
        config.draft_vocab_size, own_lm_head = len(ids), True
    elif version == 3:
        config.draft_vocab_size = vocab_size
    try:
        head = EagleHead(
            config,
            version,
            target,
            feature_layers=layers,
            own_embedding=own_embedding,
            own_lm_head=own_lm_head,
        )
    except ValueError as error:
        raise ModelLoadError(f"{config_file}: {error}") from error
    _fill(head, weights, source, hidden_size, vocab_size)
    if own_lm_head and (head.draft_to_target is not None or ids is not None):
        size = head.output_head.weight.shape[0]
        if ids is None or len(ids) != size:
            raise ModelLoadError(
                f"{source}: the draft vocabulary has {size} of the target's {vocab_size} tokens, "
                "but 'd2t', which says which, is missing or of another length; get the file again "
                "or export it with 'd2t'"
            )
        is_whole = torch.equal(ids, torch.arange(vocab_size))
        head.draft_to_target = None if is_whole else ids
    return _like_target(head, target)


def save_eagle(folder: Path, head: EagleHead) -> None:
    """Writes the head in bf16 in the published layout; `folder` exists."""
    config = head.config.to_diff_dict()
    config.update(
        architectures=["LlamaForCausalLM" if head.version == 1 else "LlamaForCausalLMEagle3"],
        bias=head.fc.bias is not None,
        # Read by other engines too; there and here, i is what leaves layer i.
        eagle_config={"eagle_aux_hidden_state_layer_ids": list(head.feature_layers)},
    )
    weights = head.state_dict()
    if head.version == 3:
        config["draft_vocab_size"] = head.output_head.weight.shape[0]
    if head.draft_to_target is not None:
        ids = head.draft_to_target.cpu()
        weights["d2t"] = ids - torch.arange(ids.numel())
        weights["t2d"] = torch.zeros(head.config.vocab_size, dtype=torch.bool).index_fill_(
            0, ids, True
        )
    _write(folder, EAGLE_FILES[0], weights, config)


def _bare(weights: dict[str, Tensor], source: Path) -> dict[str, Tensor]:
    """Keys without what wrappers put in front of them: that is what stands before `fc.weight`,
    which every EAGLE head has."""
    weights = {key.replace(_COMPILED, ""): tensor for key, tensor in weights.items()}
    prefixes = [
        key.removesuffix("fc.weight")
        for key in weights
        if key == "fc.weight" or key.endswith(".fc.weight")
    ]
    if not prefixes:
        raise ModelLoadError(
            f"{source}: no 'fc.weight' among its {len(weights)} weights ("
            f"{', '.join(map(repr, sorted(weights)[:2]))}, ...), which every EAGLE head has; is it "
            "a folder of an EAGLE head?"
        )
    prefix = min(prefixes, key=len)
    return {key.removeprefix(prefix): tensor for key, tensor in weights.items()}


def _eagle_config(file: Path, target: Any) -> tuple[LlamaConfig, tuple[int, ...] | None]:
    """The configuration of a head, and which hidden states of the target it reads, if it says."""
    wrong = f"{file}: not the configuration of an EAGLE head: "
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ModelLoadError(f"{wrong}{error}") from error
    if not isinstance(fields, dict):
        raise ModelLoadError(f"{wrong}it holds a {type(fields).__name__}")
    if "speculators_model_type" in fields or "transformer_layer_config" in fields:
        raise ModelLoadError(
            f"{file}: a configuration of the library speculators, whose layout is not read; "
            "convert the head to the layout of github SafeAILab/EAGLE"
        )
    missing = [key for key in _NEEDED if key not in fields]
    if missing:
        raise ModelLoadError(f"{wrong}it has no {missing[0]!r}")
    try:
        config = LlamaConfig(**{k: v for k, v in fields.items() if k != "transformers_version"})
    except Exception as error:
        raise ModelLoadError(f"{wrong}{error}") from error
    own = fields.get("eagle_config")
    if own is not None and not isinstance(own, dict):
        raise ModelLoadError(f"{file}: eagle_config is {own!r}; it must be an object")
    name = "eagle_aux_hidden_state_layer_ids"
    layers = (own or {}).get(name)
    if layers is None:
        return config, None
    count = target.config.get_text_config(decoder=True).num_hidden_layers
    valid = isinstance(layers, list) and all(
        isinstance(each, int) and not isinstance(each, bool) and -1 <= each < count
        for each in layers
    )
    if not valid or not layers:
        raise ModelLoadError(
            f"{file}: {name} is {layers!r}; it must be a list of layers of the target, which are "
            f"numbered from 0 to {count - 1}, and -1 for what its output head sees"
        )
    return config, tuple(layers)


def _as_wide(table: Tensor, width: int, known_ids: int | None) -> Tensor:
    """A table with a row for each token, cut or filled up with zeros to the target's width."""
    rows = table.shape[0]
    if rows == width or known_ids is None or min(rows, width) < known_ids:
        return table  # of this target, or of none like it
    wide = table.new_zeros((width, *table.shape[1:]))
    wide[: min(rows, width)] = table[:width]
    return wide


def _draft_ids(offsets: Tensor, vocab_size: int, source: Path) -> Tensor:
    """Target ids of a draft vocabulary, from how far each is behind its draft id."""
    ids = offsets.long().flatten() + torch.arange(offsets.numel())
    outside = ((ids < 0) | (ids >= vocab_size)).nonzero()
    if len(outside):
        at = int(outside[0])
        raise ModelLoadError(
            f"{source}: 'd2t' makes draft token {at} the target's token {int(ids[at])}; ids of the "
            f"target are in [0, {vocab_size}). 'd2t' holds target id minus draft id; name the head "
            "that was trained on this target, or get the file again"
        )
    if len(ids.unique()) < len(ids):
        raise ModelLoadError(
            f"{source}: 'd2t' makes two draft tokens the same token of the target; it holds target "
            "id minus draft id of distinct tokens, get the file again"
        )
    return ids


def _layer_prefix(version: int) -> str:
    return "layers.0" if version == 1 else "midlayer"


def _target_shape(target: Any) -> tuple[int, int]:
    """Hidden size and vocabulary size, the latter as the LM head has it.

    Raises:
        ModelLoadError: the LM head is not one linear layer, whose weight draft heads share.
    """
    head = target.get_output_embeddings()
    shape: tuple[int, ...] = getattr(getattr(head, "weight", None), "shape", ())
    if len(shape) != 2:
        raise ModelLoadError(
            f"the target's output head is a {type(head).__name__}; draft heads read what a linear "
            "layer makes logits of. Use another drafter, e.g. ngram, recycling or a draft model"
        )
    vocab_size, hidden_size = shape
    return hidden_size, vocab_size


def _like_target(module: Any, target: Any) -> Any:
    like = target.get_output_embeddings().weight
    return module.to(device=like.device, dtype=like.dtype).eval().requires_grad_(False)


def _fill(
    module: torch.nn.Module,
    weights: dict[str, Tensor],
    source: Path,
    hidden_size: int,
    vocab_size: int,
) -> None:
    """Copies the weights; every one must be there, in its shape, and none be left over."""
    own = module.state_dict()
    missing, unknown = sorted(own.keys() - weights.keys()), sorted(weights.keys() - own.keys())
    if missing:
        raise ModelLoadError(
            f"{source}: {missing[0]!r} is missing"
            + (f", and {len(missing) - 1} more" if missing[1:] else "")
            + "; the file is incomplete or of another kind, get it again"
        )
    if unknown:
        raise ModelLoadError(
            f"{source}: {unknown[0]!r} is no weight of {type(module).__name__} as config.json "
            "describes it; config.json and the weights do not belong together"
        )
    for key, tensor in own.items():
        if weights[key].shape != tensor.shape:
            raise ModelLoadError(
                f"{source}: {key!r} has the shape {list(weights[key].shape)}, expected "
                f"{list(tensor.shape)} for a target of hidden size {hidden_size} and {vocab_size} "
                "tokens; name the heads that were trained on this target"
            )
    module.load_state_dict(weights)


def _write(folder: Path, name: str, weights: dict[str, Tensor], config: dict[str, Any]) -> None:
    stored = {
        key: (tensor.bfloat16() if tensor.is_floating_point() else tensor).cpu().contiguous()
        for key, tensor in weights.items()
    }
    text = json.dumps(config, indent=2, sort_keys=True) + "\n"
    (folder / "config.json").write_text(text, encoding="utf-8")
    save_file(stored, folder / name, metadata={"format": "pt"})
