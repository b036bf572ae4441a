"""The running sequences as arrays: what a step's kernels and forwards need, kept up to date."""

from __future__ import annotations

import numpy as np
import torch

from inferlab.kernels import SamplingTensors
from inferlab.scheduler import Sequence


class Batch:
    """A fixed set of sequences between two changes of the batch.

    On the CPU the tensors share memory with NumPy arrays, so an update is a plain store; on other
    devices ``refresh`` copies what changes each step (lengths, roots), some bytes per sequence.

    Attributes:
        seq_lens: [B] int32, committed tokens whose K/V is in the cache.
        roots: [B] int32, the newest committed tokens.
        block_table: [B, max_pages] int32, -1 behind a sequence's pages.
        sampling: per-sequence sampling parameters.
    """

    def __init__(
        self,
        sequences: list[Sequence],
        device: torch.device,
        end_token_ids: tuple[int, ...],
    ) -> None:
        self.sequences = sequences
        self.device = device
        self._end_token_ids = end_token_ids
        size = len(sequences)
        table = np.full((size, max(len(s.pages) for s in sequences)), -1, dtype=np.int32)
        for row, sequence in zip(table, sequences, strict=True):
            row[: len(sequence.pages)] = sequence.pages
        self.block_table = torch.from_numpy(table).to(device)
        self._seq_lens = np.zeros(size, dtype=np.int32)
        self._roots = np.zeros(size, dtype=np.int32)
        self._context: np.ndarray | None = None
        self._context_lens = np.zeros(size, dtype=np.int32)
        if any(s.params.has_penalties for s in sequences):
            longest = max(len(s.prompt) + s.params.max_tokens for s in sequences)
            self._context = np.zeros((size, longest), dtype=np.int32)
        self._suppressed: list[bool] = []
        self.refresh()

    def __len__(self) -> int:
        return len(self.sequences)

    def refresh(self) -> None:
        """Takes over the sequences' new tokens after a step."""
        suppressed = []
        for i, sequence in enumerate(self.sequences):
            self._seq_lens[i] = sequence.num_cached
            self._roots[i] = sequence.tokens[-1]
            suppressed.append(sequence.num_output < sequence.params.min_tokens)
            if self._context is not None:
                done = self._context_lens[i]
                new = sequence.tokens[done:]
                self._context[i, done : done + len(new)] = new
                self._context_lens[i] += len(new)
        self.seq_lens = torch.from_numpy(self._seq_lens).to(self.device)
        self.roots = torch.from_numpy(self._roots).to(self.device)
        if suppressed != self._suppressed or self._context is not None:
            self._suppressed = suppressed
            self.sampling = self._sampling_tensors()

    def _sampling_tensors(self) -> SamplingTensors:
        params = [s.params for s in self.sequences]
        device = self.device
        extra: dict[str, torch.Tensor] = {}
        if self._context is not None:
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
                extra[name] = torch.tensor([getattr(p, name) for p in params], dtype=torch.float32)
            extra["context_tokens"] = torch.from_numpy(self._context)
            extra["context_lens"] = torch.from_numpy(self._context_lens)
            extra["prompt_lens"] = torch.tensor(
                [len(s.prompt) for s in self.sequences], dtype=torch.int32
            )
        biases = [self._bias(i) for i in range(len(params))]
        most = max(len(b) for b in biases)
        if most:
            tokens = np.full((len(params), most), -1, dtype=np.int32)
            values = np.zeros((len(params), most), dtype=np.float32)
            for i, bias in enumerate(biases):
                tokens[i, : len(bias)] = list(bias.keys())
                values[i, : len(bias)] = list(bias.values())
            extra["bias_tokens"] = torch.from_numpy(tokens)
            extra["bias_values"] = torch.from_numpy(values)
        seeds = np.array([p.seed for p in params], dtype=np.uint64).view(np.int64)
        return SamplingTensors(
            temperature=torch.tensor([p.temperature for p in params], dtype=torch.float32).to(
                device
            ),
            top_k=torch.tensor([p.top_k for p in params], dtype=torch.int32).to(device),
            top_p=torch.tensor([p.top_p for p in params], dtype=torch.float32).to(device),
            min_p=torch.tensor([p.min_p for p in params], dtype=torch.float32).to(device),
            seed=torch.from_numpy(seeds).to(device),
            **{name: value.to(device) for name, value in extra.items()},
        )

    def _bias(self, index: int) -> dict[int, float]:
        """Logit bias of a sequence; end tokens are forbidden before ``min_tokens``."""
        params = self.sequences[index].params
        bias = dict(params.logit_bias or {})
        if self._suppressed[index]:
            for token in (*self._end_token_ids, *params.stop_token_ids):
                bias[token] = float("-inf")
        return bias
