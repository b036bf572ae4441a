"""Training windows: which tokens are seen at which step, as a function of the step alone."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerFast


def encode_documents(texts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    """Token ids of each document, each ended by `<|endoftext|>`; int32."""
    eos = tokenizer.eos_token_id
    encoded = tokenizer.backend_tokenizer.encode_batch(texts, add_special_tokens=False)
    return [np.array([*piece.ids, eos], dtype=np.int32) for piece in encoded]


class WindowSampler:
    """Cuts epochs of shuffled documents into windows.

    Nothing is remembered between calls but caches: windows depend on the seed and on the number
    of tokens consumed before, so training resumes exactly without a data-loader state.

    Args:
        epoch_documents: gives the token documents of epoch 0, 1, ...
        seed: shuffles documents and windows.
    """

    def __init__(self, epoch_documents: Callable[[int], list[np.ndarray]], *, seed: int) -> None:
        self._epoch_documents = epoch_documents
        self._seed = seed
        self._sizes: dict[int, int] = {}
        self._stream: tuple[int, np.ndarray] | None = None
        self._order: tuple[tuple[int, int], np.ndarray] | None = None

    def batch(self, tokens_before: int, *, num_windows: int, length: int) -> Tensor:
        """The windows after `tokens_before` tokens of training.

        Returns:
            int64 `[num_windows, length + 1]`: inputs are all but the last column, labels all but
            the first.
        """
        epoch, consumed = 0, tokens_before
        while consumed >= (size := self._size(epoch)):
            epoch, consumed = epoch + 1, consumed - size
        stream = self.epoch_stream(epoch)
        order = self._window_order(epoch, length)
        first = consumed // length
        rows = [order[(first + row) % order.size] for row in range(num_windows)]
        windows = np.stack([stream[start : start + length + 1] for start in rows])
        return torch.from_numpy(windows.astype(np.int64))

    def _size(self, epoch: int) -> int:
        if epoch not in self._sizes:
            self._sizes[epoch] = self.epoch_stream(epoch).size
        return self._sizes[epoch]

    def epoch_stream(self, epoch: int) -> np.ndarray:
        """All tokens of one epoch, documents shuffled; int32 `[tokens]`."""
        if self._stream is None or self._stream[0] != epoch:
            documents = self._epoch_documents(epoch)
            order = np.random.default_rng([self._seed, epoch]).permutation(len(documents))
            self._stream = epoch, np.concatenate([documents[index] for index in order])
        return self._stream[1]

    def _window_order(self, epoch: int, length: int) -> np.ndarray:
        """Shuffled start positions of the epoch's windows."""
        key = epoch, length
        if self._order is None or self._order[0] != key:
            stream = self.epoch_stream(epoch)
            rng = np.random.default_rng([self._seed, epoch, length])
            spare = (stream.size - 1) % length
            starts = np.arange((stream.size - 1) // length) * length + rng.integers(spare + 1)
            if not starts.size:
                raise ValueError(
                    f"--corpus: {stream.size} tokens are too few for one window of {length}; use a "
                    "larger corpus"
                )
            self._order = key, rng.permutation(starts)
        return self._order[1]
