"""Drafts of a model with another vocabulary than the target's.

Two ways (Timor et al., "Accelerating LLM inference with lossless speculative decoding algorithms
for heterogeneous vocabularies", 2025):

* by tokens: the draft's logits are put into the order of the target's ids, -inf for tokens that it
  lacks (token-level intersection). All else is as with one vocabulary: trees, and noise that
  belongs to the target's ids;
* by text: the draft writes a chain of its own tokens, and their text is encoded by the target's
  tokenizer (string-level exact match). The host must read the draft for that, but nothing that the
  draft wants to say is lost.

Which of them gets more tokens accepted is measured while they are used.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from inferlab.config import MAX_DRAFT
from inferlab.kernels import SamplingTensors, build_tree
from inferlab.models import ForwardBatch, KVCache, TargetModel, VocabularyMap, last_rows
from inferlab.models.transfer import upload, upload_pages
from inferlab.scheduler import PageAllocator, Request
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Judge
from inferlab.specdec.drafters.base import Drafter
from inferlab.specdec.drafters.draft_text import DraftText
from inferlab.specdec.drafters.static import describe_shape
from inferlab.specdec.drafters.writer import Ground, TreeWriter
from inferlab.specdec.tree import Budget, DraftTree, TreeShape
from inferlab.specdec.walk import Walk
from inferlab.types import check

WAYS = ("auto", "tokens", "text")

CATCH_UP_CHUNK = 256
"""Tokens of one text that are read in one forward."""


class CrossVocabularyDrafter(Drafter):
    """A draft model that shares only part of the target's vocabulary, or none of it.

    It reads the text in its own tokens (see `DraftText`), which may be more than the target's, so
    its cache has pages of its own; a sequence that finds none left is not drafted for.

    Args:
        model: the draft model.
        cache: its K/V pool. As many pages as the target's suffice where the tokens are about as
            long.
        shape: the largest tree; text is drafted in chains as deep.
        vocabulary: of target and draft.
        coupled, keep_logits: see `TreeWriter`; with ``keep_logits`` no text can be drafted.
        way: "tokens", "text", or "auto": whichever serves better.

    Raises:
        ValueError: only shared tokens may be drafted and there are none; an unknown way.
    """

    name = "vanilla"
    keeps_nodes = True

    def __init__(
        self,
        model: TargetModel,
        cache: KVCache,
        shape: TreeShape,
        vocabulary: VocabularyMap,
        *,
        coupled: bool = True,
        keep_logits: bool = False,
        way: str = "auto",
    ) -> None:
        self.model = model
        self.cache = cache
        self.shape = shape
        self.max_nodes = shape.num_nodes
        self.max_depth = shape.depth
        self._writer = TreeWriter(model, cache, coupled=coupled, keep_logits=keep_logits)
        check("way", way, way in WAYS, f"one of {', '.join(WAYS)}")
        if keep_logits and way == "text":
            raise ValueError(
                "way is 'text', but the rejection policy needs the probabilities of target tokens; "
                "use another policy, or way='tokens'"
            )
        self.vocabulary = vocabulary
        targets, drafts = vocabulary.shared()
        if not len(targets) and (keep_logits or way == "tokens"):
            raise ValueError(
                f"the target's tokenizer and that of {model.name} share no token, so no shared "
                "token can be drafted; use way='text' with another policy than rejection, or "
                "another draft model"
            )
        if keep_logits or (way == "auto" and vocabulary.is_whole):
            way = "tokens"
        elif not len(targets):
            way = "text"
        self.way = way
        self._choice = _Choice()
        self._shared = _Columns(vocabulary, targets, drafts, model.device)
        draft = vocabulary.draft
        spelt = {id_ for id_, piece in enumerate(draft.pieces) if piece or id_ in draft.special}
        alone = torch.tensor(sorted(spelt - set(drafts.tolist())), dtype=torch.int64)
        self._all = _Columns(vocabulary, targets, drafts, model.device, alone)
        self._pages = PageAllocator(cache.num_pages, cache.page_size)
        self._texts: dict[int, DraftText] = {}
        self._tree: tuple[Ground, torch.Tensor | None, TreeShape] | None = None
        self._walked: tuple[Batch, Walk] | None = None  # a step that the texts do not know of yet
        # In text a draft's tokens may be shorter than the target's: up to twice as many.
        self._longest = min(2 * shape.depth, MAX_DRAFT)

    def ladder(self) -> Sequence[Budget]:
        return self.shape.ladder(self.max_depth)

    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        self._take_walked()
        self._tree = None
        if any(r.request_id not in self._texts for r in batch.requests):
            self.model.notice_changes()
        way = self._choose_way(batch)
        texts = [self._text_of(request, way) for request in batch.requests]
        rows = [row for row, text in enumerate(texts) if self._has_room(text)]
        if not rows:
            return DraftTree.root_only(batch.roots)
        texts = [texts[row] for row in rows]
        index = None if len(rows) == len(batch) else upload(rows, np.int64, batch.device)
        ground = self._ground(batch, index, texts)
        logits = self._read(ground, texts)
        if way == "tokens":
            return self._draft_tokens(batch, budget, ground, index, rows, texts, logits)
        return self._draft_text(batch, budget, ground, rows, texts, logits)

    def _choose_way(self, batch: Batch) -> str:
        if self.way != "auto":
            return self.way
        if self._choice.way is None:
            tokens = [token for request in batch.requests for token in request.tokens]
            known = sum(self.vocabulary.to_draft[token] >= 0 for token in tokens)
            self._choice.way = "tokens" if 2 * known >= len(tokens) else "text"
        return self._choice.next()

    def _draft_tokens(
        self,
        batch: Batch,
        budget: Budget,
        ground: Ground,
        index: torch.Tensor | None,
        rows: list[int],
        texts: list[DraftText],
        logits: torch.Tensor,
    ) -> DraftTree:
        shape = self.shape.within(budget)
        tokens, draft_logits = self._writer.write(ground, shape, logits, self._shared)
        self._tree = ground, index, shape
        for text in texts:
            text.drafted = shape.depth
        if index is None:
            return DraftTree.of_shape(shape, tokens, draft_logits)
        size = len(batch)
        all_tokens = tokens.new_zeros((size, shape.num_nodes))
        all_tokens[:, 0] = batch.roots
        all_tokens[index] = tokens
        if draft_logits is not None:
            kept = draft_logits
            draft_logits = kept.new_zeros((size, *kept.shape[1:])).index_copy_(0, index, kept)
        parents = np.full((size, shape.num_nodes), -2, dtype=np.int32)
        parents[:, 0] = -1
        parents[rows] = shape.parents
        return DraftTree(
            all_tokens,
            build_tree(upload(parents, np.int32, batch.device)),
            shape.is_chain,
            [shape.depth if row in rows else 0 for row in range(size)],
            [shape.num_nodes if row in rows else 1 for row in range(size)],
            draft_logits,
            None if shape.is_chain else shape.ranks,
        )

    def _draft_text(
        self,
        batch: Batch,
        budget: Budget,
        ground: Ground,
        rows: list[int],
        texts: list[DraftText],
        logits: torch.Tensor,
    ) -> DraftTree:
        most = min(budget.levels, budget.nodes, self.max_depth)
        ratio = max(len(text.ids) / text.length for text in texts)
        levels = min(math.ceil(most * ratio), self._longest)
        tokens, _ = self._writer.write(ground, TreeShape.chain(levels), logits, self._all)
        drafted = self._all.inputs(tokens[:, 1:]).tolist()
        chains: list[list[int]] = [[] for _ in batch.requests]
        for row, text, ids in zip(rows, texts, drafted, strict=True):
            text.cached += ids[:-1]
            chains[row] = text.continued(ids, most)
        return _chains(batch, chains)

    def _ground(self, batch: Batch, index: torch.Tensor | None, texts: list[DraftText]) -> Ground:
        roots, positions, sampling = batch.roots, batch.seq_lens, batch.sampling
        if index is not None:
            roots, positions = roots[index], positions[index]
            chosen: list[Any] = [t if t is None else t[index] for t in sampling.flat]
            sampling = SamplingTensors(*chosen)
        return Ground(
            roots,
            positions,
            upload([len(t.ids) - 1 for t in texts], np.int32, batch.device),
            upload_pages([t.pages for t in texts], batch.device),
            sampling,
        )

    def _read(self, ground: Ground, texts: list[DraftText]) -> torch.Tensor:
        """Forwards the ids that the cache lacks: logits [R, 1, V] behind the last ones."""
        for row, text in enumerate(texts):
            while len(text.ids) - len(text.cached) > CATCH_UP_CHUNK:
                self._forward_ids(ground.block_table[row : row + 1], [text], CATCH_UP_CHUNK)
        return self._forward_ids(ground.block_table, texts, CATCH_UP_CHUNK)

    def _forward_ids(self, table: torch.Tensor, texts: list[DraftText], most: int) -> torch.Tensor:
        starts = [len(text.cached) for text in texts]
        counts = [min(len(t.ids) - start, most) for t, start in zip(texts, starts, strict=True)]
        tokens = np.zeros((len(texts), max(counts)), dtype=np.int64)
        for row, text, start, count in zip(tokens, texts, starts, counts, strict=True):
            row[:count] = text.ids[start : start + count]
            text.cached = text.ids[: start + count]
        device = table.device
        seq_lens = upload(starts, np.int32, device)
        positions = seq_lens.to(torch.int64)[:, None] + torch.arange(max(counts), device=device)
        if self.model.context_length is not None:
            positions = positions.clamp_max(self.model.context_length - 1)  # padding
        ids = upload(tokens, np.int64, device)
        even = min(counts) == max(counts)
        num_nodes = None if even else upload(counts, np.int32, device)
        return self.model.forward(
            ForwardBatch(
                tokens=ids,
                positions=positions,
                seq_lens=seq_lens,
                block_table=table,
                num_nodes=num_nodes,
                scored=last_rows(ids, num_nodes),
            ),
            self.cache,
        ).logits

    def _text_of(self, request: Request, way: str) -> DraftText:
        text = self._texts.get(request.request_id)
        if text is None:
            text = self._texts[request.request_id] = DraftText(self.vocabulary)
        text.update(request.tokens, spelt=way == "text")
        text.reuse()
        text.asleep = False
        text.drafted = 0
        return text

    def _has_room(self, text: DraftText) -> bool:
        """Whether there is something to draft from, and room in context and cache for it."""
        limit = self.model.context_length
        most = len(text.ids) + max(self.max_nodes, self._longest)
        if not text.ids or (limit is not None and most > limit):
            return False
        missing = self._pages.pages_for(most) - len(text.pages)
        if missing > self._pages.num_free:
            return False
        text.pages += self._pages.allocate(max(missing, 0))
        return True

    def commit(self, batch: Batch, walk: Walk) -> None:
        self._take_walked()
        self._walked = batch, walk
        if self._tree is None:
            return
        ground, index, shape = self._tree
        self._tree = None
        if not shape.is_chain:
            nodes, kept = walk.nodes, walk.kept
            if index is not None:
                nodes, kept = nodes[index], kept[index]
            # The deepest level was drafted but not forwarded, so its K/V is missing.
            count = kept.clamp_max(shape.depth)
            self.cache.compact(ground.block_table, ground.seq_lens, nodes, count)

    def _take_walked(self) -> None:
        """Tells the texts what the last step kept, which the host has read by now."""
        if self._walked is None:
            return
        batch, walk = self._walked
        self._walked = None
        drafted = walk.tree.num_nodes > 1
        for request, start, kept in zip(
            batch.requests, walk.starts, walk.kept_on_host, strict=True
        ):
            text = self._texts.get(request.request_id)
            if text is None:
                continue
            if drafted:
                self._choice.learn(kept)
            # The root is among the kept, the newest token is not: it is the next root. The kept may
            # be fewer than the new tokens, where others drafted too.
            new = start + 1
            count = min(kept, text.drafted) - 1
            text.accepted(request.tokens[new : new + count] if count > 0 else ())
            text.asleep = text.drafted == 0 and not drafted
            text.drafted = 0

    def unread(self, batch: Batch) -> list[int]:
        self._take_walked()
        texts = [self._texts.get(r.request_id) for r in batch.requests]
        lengths = [len(r.tokens) for r in batch.requests]
        return [
            length if text is None or text.asleep else 0
            for text, length in zip(texts, lengths, strict=True)
        ]

    def release(self, request: Request) -> None:
        self._tree = None  # of the batch that it leaves
        text = self._texts.pop(request.request_id, None)
        if text is not None:
            self._pages.release(text.pages)

    def describe(self) -> dict[str, Any]:
        return {
            "drafter": self.name,
            "model": self.model.name,
            "tree": describe_shape(self.shape),
            "coupled_noise": self._writer.coupled,
            "vocabulary_shared": round(self.vocabulary.coverage, 4),
            "way": self.way,
            "kept_per_step": {way: round(kept, 3) for way, kept in self._choice.kept.items()},
        }


class _Choice:
    """Which way of drafting gets more tokens accepted: the other one is tried now and then."""

    FORGET = 0.9  # weight of what was known, per sequence and step
    TRIAL = 3  # steps
    MAX_INTERVAL = 64  # steps between trials, doubled after each
    MARGIN = 1.1  # text takes more time

    def __init__(self) -> None:
        self.way: str | None = None
        self.kept: dict[str, float] = {}  # tokens per step
        self._used = ""
        self._interval = 4
        self._until_trial = 4

    def next(self) -> str:
        """The way of the next step."""
        better = self.kept.get("text", 0.0) > self.MARGIN * self.kept.get("tokens", 0.0)
        if len(self.kept) == 2:
            self.way = "text" if better else "tokens"
        self._used = str(self.way)
        self._until_trial -= 1
        if self._until_trial < 0:
            self._used = "tokens" if self.way == "text" else "text"
        if self._until_trial <= -self.TRIAL:
            self._interval = min(2 * self._interval, self.MAX_INTERVAL)
            self._until_trial = self._interval
        return self._used

    def learn(self, kept: int) -> None:
        """A sequence kept so many tokens of the last step."""
        before = self.kept.get(self._used, float(kept))
        self.kept[self._used] = before + (1 - self.FORGET) * (kept - before)


class _Columns:
    """The draft's logits in another order: the target's ids, then draft ids that it lacks.

    Args:
        targets, drafts: [M] int64, the shared tokens.
        alone: [U] int64, draft ids that follow behind the target's.
    """

    def __init__(
        self,
        vocabulary: VocabularyMap,
        targets: torch.Tensor,
        drafts: torch.Tensor,
        device: torch.device,
        alone: torch.Tensor | None = None,
    ) -> None:
        columns = torch.zeros(len(vocabulary.target_to_draft), dtype=torch.int64)
        columns[targets] = drafts
        missing = torch.ones(len(columns), dtype=torch.bool)
        missing[targets] = False
        if alone is not None:
            columns = torch.cat([columns, alone])
            missing = torch.cat([missing, torch.zeros(len(alone), dtype=torch.bool)])
        self._columns = columns.to(device)
        self._missing = missing.to(device)

    def scores(self, logits: torch.Tensor) -> torch.Tensor:
        """[R, M, draft's] to [R, M, target's (and the rest)]."""
        return logits.index_select(-1, self._columns).masked_fill_(self._missing, -torch.inf)

    def inputs(self, tokens: torch.Tensor) -> torch.Tensor:
        """Drawn columns as int64 draft ids."""
        return self._columns[tokens.to(torch.int64)]


def _chains(batch: Batch, chains: list[list[int]]) -> DraftTree:
    """Chains of different lengths behind the roots."""
    width = 1 + max(map(len, chains))
    if width == 1:
        return DraftTree.root_only(batch.roots)
    tokens = np.zeros((len(chains), width), dtype=np.int32)
    parents = np.full((len(chains), width), -2, dtype=np.int32)
    for row, (request, chain) in enumerate(zip(batch.requests, chains, strict=True)):
        tokens[row, : 1 + len(chain)] = [request.tokens[-1], *chain]
        parents[row, : 1 + len(chain)] = range(-1, len(chain))
    return DraftTree(
        upload(tokens, np.int32, batch.device),
        build_tree(upload(parents, np.int32, batch.device)),
        True,
        [len(chain) for chain in chains],
        [1 + len(chain) for chain in chains],
    )
