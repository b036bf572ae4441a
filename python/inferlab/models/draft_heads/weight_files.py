"""Finds and reads the weight files of draft heads: a directory's, the hub cache's or the hub's."""

from __future__ import annotations

import json
from os import PathLike
from pathlib import Path

import torch
from huggingface_hub import hf_hub_download
from huggingface_hub.errors import EntryNotFoundError, HfHubHTTPError, LocalEntryNotFoundError
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor

from inferlab.models.assets import resolve_model_path
from inferlab.models.loading import ModelLoadError

INDEX = ".index.json"  # the end of the name of a file that says which shard holds which weight


def find(name_or_path: str | PathLike[str], names: tuple[str, ...]) -> Path:
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


def read(
    name_or_path: str | PathLike[str], names: tuple[str, ...], allow_pickle: bool
) -> tuple[Path, dict[str, Tensor]]:
    """The weight file and its tensors; the names are in the order of preference.

    A name that ends in ``.index.json`` stands for the safetensors files that it lists.

    Raises:
        ModelLoadError: no such file, a damaged one, or a pickle without permission.
    """
    try:
        file = find(name_or_path, names[:1])
    except ModelLoadError:
        file = find(name_or_path, names)
    if file.name.endswith(INDEX):
        return file, _read_shards(name_or_path, file)
    if file.suffix == ".safetensors":
        return file, _read_safetensors(file)
    if not allow_pickle:
        raise ModelLoadError(
            f"{file}: a pickle, whose loading can run code. Convert it to {names[0]}, or pass "
            "allow_pickle=True if you trust it"
        )
    try:
        weights = torch.load(file, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ModelLoadError(f"{file}: damaged or no weight file ({error})") from error
    if isinstance(weights, dict) and isinstance(weights.get("state_dict"), dict):
        weights = weights["state_dict"]
    if not isinstance(weights, dict) or not all(isinstance(v, Tensor) for v in weights.values()):
        raise ModelLoadError(f"{file}: it holds no dictionary of tensors")
    return file, weights


def _read_safetensors(file: Path) -> dict[str, Tensor]:
    try:
        return load_file(file)
    except (SafetensorError, OSError) as error:
        raise ModelLoadError(
            f"{file}: damaged or no safetensors file ({error}); get it again"
        ) from error


def _read_shards(name_or_path: str | PathLike[str], index: Path) -> dict[str, Tensor]:
    try:
        listed = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        shards = sorted(set(listed.values()))
        if not all(Path(shard).name == shard for shard in shards):
            raise ValueError("it lists files of other folders")
    except (ValueError, KeyError, AttributeError, TypeError) as error:
        raise ModelLoadError(f"{index}: not a valid shard index: {error}") from error
    weights: dict[str, Tensor] = {}
    for shard in shards:
        try:
            file = find(name_or_path, (shard,))
        except ModelLoadError as error:
            raise ModelLoadError(f"{index} lists {shard}, which is not there: {error}") from error
        weights |= _read_safetensors(file)
    missing = sorted(listed.keys() - weights.keys())
    if missing:
        raise ModelLoadError(f"{index} lists {missing[0]!r}, which no shard holds; get it again")
    return weights
