"""The decoding requests as tensors on the device: what a step's kernels and forwards need."""

from __future__ import annotations

import numpy as np
import torch

from inferlab.config import MAX_TREE_NODES
from inferlab.kernels import SamplingTensors
from inferlab.models import TargetModel, allowed_vocab
from inferlab.models.transfer import upload, upload_pages
from inferlab.scheduler import Request
from inferlab.specdec.walk import Walk

NO_LIMIT = 2**31 - 1
ROOM = 2048  # tokens of history come in multiples of it: graphs that read them are kept by shape


class Batch:
    """A fixed set of requests between two changes of the batch.

    Its tensors stay on the device and are moved on there, in place, by what a step kept
    (``advance``): the host hears of the tokens later, in the step's one transfer.

    Attributes:
        seq_lens: [B] int32, committed tokens whose K/V is in the cache: the root's position.
        roots: [B] int32, the newest committed tokens.
        block_table: [B, max_pages] int32, -1 behind a sequence's pages.
        sampling: per-sequence sampling parameters.
        limits: [B] int32, the most tokens a step may keep of each sequence, or None. Only where
            end tokens are forbidden for some tokens more, since what follows those was chosen
            under the same ban; and up to the length at which the target reads a text anew, since
            what lies behind was scored on K/V of the old reading.
        vocab_size: columns of the target's logits; None: not known, all drafters have as many.
        allowed_vocab: ids from here on are padding, which neither target nor draft chooses; None:
            there is none.

    Args:
        reread_length: the target's.
    """

    def __init__(
        self,
        requests: list[Request],
        device: torch.device,
        end_token_ids: tuple[int, ...],
        *,
        vocab_size: int | None = None,
        allowed_vocab: int | None = None,
        reread_length: int | None = None,
    ) -> None:
        self.vocab_size = vocab_size
        self.allowed_vocab = allowed_vocab
        self.requests = requests
        self.device = device
        self._end_token_ids = end_token_ids
        self._reread_length = reread_length
        self.block_table = upload_pages([r.pages for r in requests], device)
        self.seq_lens = upload([r.num_cached for r in requests], np.int32, device)
        self.roots = upload([r.tokens[-1] for r in requests], np.int32, device)
        self._history: tuple[torch.Tensor, torch.Tensor] | None = None
        self._suppressed: list[bool] | None = None
        self.limits: torch.Tensor | None = None
        self.refresh()

    def __len__(self) -> int:
        return len(self.requests)

    @classmethod
    def of(cls, requests: list[Request], target: TargetModel) -> Batch:
        """A batch that ``target`` decodes."""
        return cls(
            requests,
            target.device,
            target.eos_token_ids,
            vocab_size=target.vocab_size,
            allowed_vocab=allowed_vocab(target),
            reread_length=target.reread_length,
        )

    @property
    def history(self) -> torch.Tensor:
        """[B, W] int32: prompt and output up to and with the root; ``lengths`` of a row count."""
        return self._tokens()[0]

    @property
    def lengths(self) -> torch.Tensor:
        """[B] int32: tokens of each sequence, the root included."""
        return self._tokens()[1]

    def _tokens(self) -> tuple[torch.Tensor, torch.Tensor]:
        """History and lengths, made when they are first asked for."""
        if self._history is None:
            # Whole walks are written behind the lengths, kept or not: room for the largest one.
            most = max(len(r.tokens) + r.remaining for r in self.requests) + MAX_TREE_NODES
            rows = np.zeros((len(self), -(-most // ROOM) * ROOM), np.int32)
            for row, request in zip(rows, self.requests, strict=True):
                row[: len(request.tokens)] = request.tokens
            lengths = [len(r.tokens) for r in self.requests]
            self._history = (
                upload(rows, np.int32, self.device),
                upload(lengths, np.int32, self.device),
            )
        return self._history

    def advance(self, walk: Walk) -> None:
        """Moves on by what a step kept, on the device."""
        last = (walk.kept - 1).to(torch.int64)[:, None]
        self.roots = walk.tokens.gather(1, last)[:, 0]
        self.seq_lens = self.seq_lens + walk.kept
        if self._history is not None:
            history, lengths = self._history
            ahead = torch.arange(walk.tokens.shape[1], device=self.device)
            history.scatter_(1, lengths.to(torch.int64)[:, None] + ahead, walk.tokens)
            lengths += walk.kept

    def refresh(self) -> None:
        """Takes over what the host alone decides: whether end tokens are still forbidden."""
        missing = [max(r.params.min_tokens - r.num_output, 0) for r in self.requests]
        suppressed = [m > 0 for m in missing]
        self.limits = None
        limits = [
            min(m or NO_LIMIT, self._room(r)) for m, r in zip(missing, self.requests, strict=True)
        ]
        if min(limits) < NO_LIMIT:
            self.limits = upload(limits, np.int32, self.device)
        if suppressed != self._suppressed:
            self._suppressed = suppressed
            self.sampling = self._sampling_tensors(suppressed)

    def refresh_pages(self) -> None:
        """Takes over that some of its sequences have more pages."""
        self.block_table = upload_pages([r.pages for r in self.requests], self.device)

    def _room(self, request: Request) -> int:
        """How many tokens can be kept before the target reads the text anew."""
        if self._reread_length is None or request.num_cached >= self._reread_length:
            return NO_LIMIT
        return self._reread_length - request.num_cached

    def _sampling_tensors(self, suppressed: list[bool]) -> SamplingTensors:
        params = [r.params for r in self.requests]

        def column(name: str, dtype: type) -> torch.Tensor:
            return upload([getattr(p, name) for p in params], dtype, self.device)

        extra: dict[str, torch.Tensor] = {}
        if any(p.has_penalties for p in params):
            for name in ("repetition_penalty", "presence_penalty", "frequency_penalty"):
                extra[name] = column(name, np.float32)
            extra["context_tokens"] = self.history
            extra["context_lens"] = self.lengths
            prompts = [len(r.prompt) for r in self.requests]
            extra["prompt_lens"] = upload(prompts, np.int32, self.device)
        biases = [self._bias(r, b) for r, b in zip(self.requests, suppressed, strict=True)]
        most = max(len(b) for b in biases)
        if most:
            tokens = np.full((len(params), most), -1, dtype=np.int32)
            values = np.zeros((len(params), most), dtype=np.float32)
            for i, bias in enumerate(biases):
                tokens[i, : len(bias)] = list(bias.keys())
                values[i, : len(bias)] = list(bias.values())
            extra["bias_tokens"] = upload(tokens, np.int32, self.device)
            extra["bias_values"] = upload(values, np.float32, self.device)
        seeds = np.array([p.seed for p in params], dtype=np.uint64).view(np.int64)
        return SamplingTensors(
            temperature=column("temperature", np.float32),
            top_k=column("top_k", np.int32),
            top_p=column("top_p", np.float32),
            min_p=column("min_p", np.float32),
            seed=upload(seeds, np.int64, self.device),
            **extra,
        )

    def _bias(self, request: Request, suppressed: bool) -> dict[int, float]:
        """Logit bias of a sequence; end tokens are forbidden before ``min_tokens``."""
        bias = dict(request.params.logit_bias or {})
        if suppressed:
            for token in (*self._end_token_ids, *request.params.stop_token_ids):
                bias[token] = float("-inf")
        return bias
