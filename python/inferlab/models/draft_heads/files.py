"""Reads and writes draft heads in the published layouts, and checks them against their target.

Medusa (github FasterDecoding/Medusa): `config.json` and `medusa_lm_head.safetensors` or `.pt`.
EAGLE (github SafeAILab/EAGLE): `config.json` and `model.safetensors` or `pytorch_model.bin`.

Published files differ in what lies around the weights, which changes nothing: `module.` or `model.`
in front of every key, the buffers of a rotary embedding, a copy of the target's LM head in EAGLE-1,
`layers.0` for EAGLE-3's `midlayer`. A weight that is neither these nor the head's own is an error.
"""

from __future__ import annotations

import json
import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor
from transformers import LlamaConfig

from inferlab.models.assets import resolve_model_path
from inferlab.models.draft_heads.eagle import EagleHead
from inferlab.models.draft_heads.medusa import MedusaHeads
from inferlab.models.loading import ModelLoadError

MEDUSA_FILES = ("medusa_lm_head.safetensors", "medusa_lm_head.pt")
EAGLE_FILES = ("model.safetensors", "pytorch_model.bin")

_WRAPPERS = ("module.", "model.")
_ROTARY_BUFFER = re.compile(r"(?:.*\.)?rotary_emb\.(?:\w*inv_freq|\w+_cached)")
_MEDUSA_KEY = re.compile(r"(?:medusa_head\.)?(\d+)\.(\d+)\.(linear\.weight|linear\.bias|weight)")


def load_medusa(
    name_or_path: str | PathLike[str], target: Any, *, allow_pickle: bool = False
) -> MedusaHeads:
    """Loads Medusa heads for a target, in its dtype and on its device.

    How many heads and layers there are is read from the weights: the published configurations
    do not always say it right.

    Args:
        name_or_path: directory, bundled name or hub id, in this order.
        target: the Hugging Face causal LM that the heads were trained on.
        allow_pickle: read `.pt` files, whose unpickling can run code.

    Raises:
        FileNotFoundError: a directory that does not exist.
        ModelLoadError: no weights, damaged or incomplete ones, or those of another target.
    """
    source, weights = _read(name_or_path, MEDUSA_FILES, allow_pickle)
    renamed: dict[str, Tensor] = {}
    if "root_projection" in weights:
        renamed["root_projection"] = weights.pop("root_projection")
    indices = []
    for key, tensor in weights.items():
        match = _MEDUSA_KEY.fullmatch(key)
        if match is None:
            raise ModelLoadError(
                f"{source}: {key!r} is no weight of Medusa heads, which are named "
                "'{head}.{layer}.linear.weight', '.bias' and '{head}.{layers}.weight'"
            )
        indices.append((int(match[1]), int(match[2]), match[3]))
        renamed[f"{match[1]}.{match[2]}.{match[3]}"] = tensor
    blocks = [(head, layer) for head, layer, what in indices if what == "linear.weight"]
    if not blocks:
        raise ModelLoadError(f"{source}: no residual block, e.g. '0.0.linear.weight', in it")
    hidden_size, vocab_size = _target_shape(target)
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
    name_or_path: str | PathLike[str], target: Any, *, allow_pickle: bool = False
) -> EagleHead:
    """Loads an EAGLE-1, -2 or -3 head for a target, in its dtype and on its device.

    Arguments and errors are those of `load_medusa`. A head without an embedding uses the target's,
    an EAGLE-3 head without an LM head the target's: of all tokens, or of those that `d2t` lists.
    """
    source, weights = _read(name_or_path, EAGLE_FILES, allow_pickle)
    weights = {k: v for k, v in weights.items() if not _ROTARY_BUFFER.fullmatch(k)}
    if "layers.0.hidden_norm.weight" in weights:  # EAGLE-1 has no such norm
        weights = {re.sub(r"^layers\.0\.", "midlayer.", k): v for k, v in weights.items()}
    config_file = _find(name_or_path, ("config.json",))
    try:
        fields = json.loads(config_file.read_text(encoding="utf-8"))
        if not isinstance(fields, dict):
            raise ValueError(f"it holds a {type(fields).__name__}")
        config = LlamaConfig(**{k: v for k, v in fields.items() if k != "transformers_version"})
    except Exception as error:
        raise ModelLoadError(
            f"{config_file}: not the configuration of an EAGLE head: {error}"
        ) from error
    hidden_size, vocab_size = _target_shape(target)
    if config.vocab_size != vocab_size:
        raise ModelLoadError(
            f"{config_file}: the head's vocab_size is {config.vocab_size}, its target has "
            f"{vocab_size} tokens; name the head that was trained on this target"
        )
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
    layers = (fields.get("eagle_config") or {}).get("eagle_aux_hidden_state_layer_ids")
    try:
        head = EagleHead(
            config,
            version,
            target,
            feature_layers=None if layers is None else tuple(layers),
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


def _find(name_or_path: str | PathLike[str], names: tuple[str, ...]) -> Path:
    """The first of these files that the model has, in a directory, the hub's cache or the hub."""
    name = str(name_or_path)
    source = resolve_model_path(name_or_path)
    if isinstance(source, Path):
        for file in names:
            if (source / file).is_file():
                return source / file
        raise ModelLoadError(
            f"{name}: none of {', '.join(names)} is in {source}; is it a folder of draft heads?"
        )
    reason: Exception | None = None
    for file in names:
        try:
            return Path(hf_hub_download(source, file))
        except EntryNotFoundError as error:
            reason = reason or error
        except (OSError, ValueError, HfHubHTTPError) as error:
            reason = error
    if isinstance(reason, EntryNotFoundError) and not isinstance(reason, LocalEntryNotFoundError):
        raise ModelLoadError(
            f"{name}: the hub has none of {', '.join(names)} there; is it a repository of draft "
            "heads?"
        ) from reason
    what = str(reason).strip().splitlines()[0]
    raise ModelLoadError(
        f"{name}: there is no directory of this name, {names[0]} is not in the local hub cache, "
        f"and the hub did not serve it ({what}). With network access run 'hf download {source}', "
        "or use the bundled 'inferlab/tiny-medusa' or 'inferlab/tiny-eagle'"
    ) from reason


def _read(
    name_or_path: str | PathLike[str], names: tuple[str, ...], allow_pickle: bool
) -> tuple[Path, dict[str, Tensor]]:
    """The weight file and its tensors by their bare names; safetensors are preferred."""
    try:
        file = _find(name_or_path, names[:1])
    except ModelLoadError:
        file = _find(name_or_path, names)
    if file.suffix == ".safetensors":
        try:
            return file, _unwrapped(load_file(file))
        except (SafetensorError, OSError) as error:
            raise ModelLoadError(
                f"{file}: damaged or no safetensors file ({error}); get it again"
            ) from error
    if not allow_pickle:
        raise ModelLoadError(
            f"{file}: a pickle, whose loading can run code. Convert it to {names[0]}, or pass "
            "allow_pickle=True if you trust it"
        )
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelLoadError(f"{file}: damaged or no weight file ({error})") from error
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ModelLoadError(f"{file}: it holds no dictionary of tensors")
    return file, _unwrapped(weights)


def _unwrapped(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Without what training wrappers put in front of all keys."""
    for wrapper in _WRAPPERS:
        if weights and any(key.startswith(wrapper) for key in weights):
            weights = {key.removeprefix(wrapper): tensor for key, tensor in weights.items()}
    return weights


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
