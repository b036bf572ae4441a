"""For whom of a batch is drafted: their own batch, its trees as those of all, their walks."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from inferlab.models import ForwardOutput
from inferlab.models.transfer import upload
from inferlab.specdec.batch import Batch
from inferlab.specdec.tree import DraftTree
from inferlab.specdec.walk import Walk


class Members:
    """Some sequences of a batch, in its order; moves on with it.

    Attributes:
        batch: of these alone.

    Args:
        whole: the batch.
        places: which of it they are, growing.
        batch: of these, as they are now.
    """

    def __init__(self, whole: Batch, places: Sequence[int], batch: Batch) -> None:
        self.whole = whole
        self.places = list(places)
        self.batch = batch
        self._index = upload(self.places, np.int64, whole.device)
        self._walk: Walk | None = None

    def is_of(self, whole: Batch, places: Sequence[int]) -> bool:
        """Whether these are the members still."""
        return self.whole is whole and self.places == list(places)

    def spread(self, tree: DraftTree) -> DraftTree:
        """The members' trees in a tree for all: the others have their roots."""
        size = len(self.whole)
        tokens = self.whole.roots[:, None].repeat(1, tree.num_nodes)
        tokens[self._index] = tree.tokens
        counts, depths = [1] * size, [0] * size
        for place, count, depth in zip(self.places, tree.node_counts, tree.depths, strict=True):
            counts[place], depths[place] = count, depth
        left_out = [(-1, 0)] * size if tree.left_out else []
        for place, node in zip(self.places, tree.left_out, strict=False):
            left_out[place] = node
        logits = None
        if tree.draft_logits is not None:
            logits = tree.draft_logits.new_zeros((size, *tree.draft_logits.shape[1:]))
            logits[self._index] = tree.draft_logits
        links = []
        for own, alone in zip(tree.links, DraftTree.root_only(self.whole.roots).links, strict=True):
            # Padding is visible to nothing and has no depth: as the root's links, with -1 behind.
            padding = 0 if own is tree.links.ancestors else -1
            wide = own.new_full((size, *own.shape[1:]), padding)
            if alone.dim() == 3:
                wide[:, :1, : alone.shape[2]] = alone
            else:
                wide[:, :1] = alone
            wide[self._index] = own
            links.append(wide)
        return replace(
            tree,
            tokens=tokens,
            links=type(tree.links)(*links),
            depths=depths,
            node_counts=counts,
            draft_logits=logits,
            left_out=left_out,
        )

    def walks(self, walk: Walk, tree: DraftTree) -> Walk:
        """The members' part of a step's walk through their own trees."""
        index = self._index
        output = walk.output
        features = output.features
        part = Walk(
            tree=tree,
            output=ForwardOutput(
                output.logits[index], None if features is None else features[index]
            ),
            starts=[walk.starts[place] for place in self.places],
            seq_lens=walk.seq_lens[index],
            nodes=walk.nodes[index],
            tokens=walk.tokens[index],
            entries=walk.entries[index],
            kept=walk.kept[index],
        )
        self._walk = part
        return part

    def heard(self, walk: Walk) -> None:
        """The host has read the step."""
        if self._walk is not None:
            kept = walk.kept_on_host
            self._walk.on_host = [kept[place] for place in self.places]
            self._walk = None
