"""The target's hidden states over the teaching material: read once, kept on disk in shards.

A shard is a safetensors file with `tokens` int32 `[N, T + 1]` and `features` bf16 `[N, T, F]`; F
is one hidden size per layer, concatenated. `index.json` names the shards and what they were made
from, and is written last: a cache without it is not used. Shards are memory-mapped, so that a
cache may be larger than memory.
"""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor
from torch.utils.data import Dataset

from inferlab.models import ForwardBatch, TargetModel, last_rows

SHARD_TOKENS = 262_144
READ_TOKENS = 8192
PAGE_SIZE = 16


def read_features(target: TargetModel, tokens: Tensor, layers: tuple[int, ...]) -> Tensor:
    """Hidden states of all but the last token: `[N, T + 1]` -> bf16 `[N, T, layers * H]`.

    They are those that drafters get: of the forward that decoding uses.

    Args:
        layers: i is what leaves decoder layer i, -1 what the LM head sees.
    """
    rows, length = tokens.shape[0], tokens.shape[1] - 1
    cache = target.new_cache(rows * -(-length // PAGE_SIZE), PAGE_SIZE)
    ids, pages = torch.arange(cache.num_pages, dtype=torch.int32), cache.num_pages // rows
    ids_there = tokens[:, :-1].long().to(target.device)
    batch = ForwardBatch(
        tokens=ids_there,
        positions=torch.arange(length, device=target.device).expand(rows, -1),
        seq_lens=torch.zeros(rows, dtype=torch.int32, device=target.device),
        block_table=ids.view(rows, pages).to(target.device),
        scored=last_rows(ids_there),
        prompt_lens=torch.full((rows,), length, dtype=torch.int32, device=target.device),
    )
    features = target.forward(batch, cache, layers).features
    assert features is not None
    # A copy, as what was made in inference mode cannot be trained on.
    return features.to("cpu", torch.bfloat16, copy=True)


def write_cache(
    folder: Path,
    target: TargetModel,
    kinds: list[Tensor],
    layers: tuple[int, ...],
    made_from: dict[str, Any],
) -> None:
    """Reads all windows and writes the shards.

    Raises:
        OSError: the disk is full, say; what was written of the cache is removed.
    """
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    pieces = [
        piece
        for windows in kinds
        for piece in windows.split(max(1, SHARD_TOKENS // (windows.shape[1] - 1)))
    ]
    shards = []
    try:
        for number, piece in enumerate(track(pieces, description="target reads")):
            rows = piece.split(max(1, READ_TOKENS // (piece.shape[1] - 1)))
            features = torch.cat([read_features(target, part, layers) for part in rows])
            name = f"shard-{number:05d}.safetensors"
            save_file({"tokens": piece.contiguous(), "features": features}, folder / name)
            shards.append({"file": name, "rows": piece.shape[0], "length": piece.shape[1] - 1})
        index = {"made_from": made_from, "layers": layers, "shards": shards}
        (folder / "index.json").write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")
    except BaseException as error:
        shutil.rmtree(folder, ignore_errors=True)
        if isinstance(error, (KeyboardInterrupt, ValueError)):
            raise
        raise OSError(
            f"{folder}: the feature cache could not be written ({error}); free some space, name "
            "another disk with --output, or do without it: --no-cache"
        ) from error


def cache_matches(folder: Path, made_from: dict[str, Any]) -> bool:
    """Whether the folder holds a whole cache that was made from just this."""
    try:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return bool(index["made_from"] == json.loads(json.dumps(made_from)))


Place = tuple[int, int]  # shard or kind, and row


class _Batched(Dataset[dict[str, Tensor]]):
    """Batches of windows of one length, as items, put together once by the seed."""

    def __init__(self, shapes: list[tuple[int, int]], *, tokens_per_batch: int, seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        by_length: dict[int, list[Place]] = {}
        for number, (rows, length) in enumerate(shapes):
            by_length.setdefault(length, []).extend((number, row) for row in range(rows))
        self.batches: list[list[Place]] = []
        for length, places in by_length.items():
            order = torch.randperm(len(places), generator=generator).tolist()
            count = max(1, tokens_per_batch // length)
            # A last batch that is not full is left out: one shape is one compilation.
            self.batches += [
                [places[i] for i in order[first : first + count]]
                for first in range(0, len(places) - count + 1, count)
            ]

    def __len__(self) -> int:
        return len(self.batches)


class Batches(_Batched):
    """Batches out of a feature cache."""

    def __init__(self, folder: Path, *, tokens_per_batch: int, seed: int) -> None:
        index = json.loads((folder / "index.json").read_text(encoding="utf-8"))
        self._files = [
            safe_open(folder / shard["file"], framework="pt") for shard in index["shards"]
        ]
        shapes = [(shard["rows"], shard["length"]) for shard in index["shards"]]
        super().__init__(shapes, tokens_per_batch=tokens_per_batch, seed=seed)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`tokens` int64 `[B, T + 1]` and `features` bf16 `[B, T, F]`."""
        rows = {
            name: [
                self._files[number].get_slice(name)[row : row + 1]
                for number, row in self.batches[index]
            ]
            for name in ("tokens", "features")
        }
        return {"tokens": torch.cat(rows["tokens"]).long(), "features": torch.cat(rows["features"])}


class TokenBatches(_Batched):
    """Batches without features, which the trainer then reads of the target every time."""

    def __init__(self, kinds: list[Tensor], *, tokens_per_batch: int, seed: int) -> None:
        self._kinds = kinds
        shapes = [(kind.shape[0], kind.shape[1] - 1) for kind in kinds]
        super().__init__(shapes, tokens_per_batch=tokens_per_batch, seed=seed)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """`tokens` int64 `[B, T + 1]`."""
        rows = [self._kinds[number][row] for number, row in self.batches[index]]
        return {"tokens": torch.stack(rows).long()}
