"""What recorded draft trees say of other budgets and policies. No torch.

A budget (levels, nodes) cuts a tree: of its first levels the nodes that are worth most. A policy
walks from the root into the first child that it accepts. Siblings stand in the order of their
worth, so a walk through the cut tree is the walk through the whole one, up to the first node that
was cut off.

Whether that is what the drafter would have drafted, had it been asked for that budget, hangs on how
its trees are made (``form``, see `inferlab.specdec.recording.describe_tree`):

* chain: always, up to the chain's end; a walk that ended before is the same in a longer one;
* static, grown: if no more levels are asked for than were, and no more nodes than there are in
  them (or there were no more to be had); a walk to the last level is the same in a larger tree.
  Grown trees are weighed otherwise with fewer nodes than a level is wide;
* merged: only the budget that was recorded, as it is shared out among drafters.

A drafter that remembers what was verified would have had another memory: see `Cut.same`.

Behind each token that was accepted there is a root, too, which no step had but which one of
another setting may have. Of a drafter that goes by the text alone (``by_text``) the rest of the
chain is what it would draft from there, so it is known; of others, where the walk went on to is a
guess, and a much better one than a mean: long walks have most such roots.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np

from inferlab.config_types import MAX_TREE_NODES
from inferlab.errors import UsageError
from inferlab.specdec.acceptance import SURE, kinds_of_logs
from inferlab.specdec.recorded import FIRST, NO_KIND, NO_LIMIT, Recording

REPLAYABLE = ("longest_prefix", "conf_threshold", "topk_agree")


class Rule(NamedTuple):
    """A policy, and the tau of ``conf_threshold`` or the k of ``topk_agree``."""

    policy: str = "longest_prefix"
    threshold: float = 0.0

    def check(self) -> Rule:
        """Raises UsageError where a record does not hold what the policy needs."""
        missing = {
            "rejection": "its draws of acceptance and from residuals",
            "typical": "the target's whole distribution at each node",
        }
        if self.policy in missing:
            raise UsageError(
                f"--policy: {self.policy} cannot be replayed: a record does not hold "
                f"{missing[self.policy]}; take one of {', '.join(REPLAYABLE)}"
            )
        return self


@dataclass(frozen=True)
class Cut:
    """All rows of a recording, their trees cut to one budget.

    Attributes:
        accepted: draft nodes on the walk.
        emitted: tokens that the text gets.
        exact: whether this is known to be what would have been; else it is what the recorded part
            of the tree accepts.
        expected: ``emitted``, and where the walk went through all that was recorded and there would
            be more levels, what walks that have got below the first level get on average.
        same: the tree is the recorded one, and nothing else would have been drafted.
        told: the emitted tokens are those of the recorded text.
        nodes: draft nodes offered.
        depths: levels offered.
        empty: nothing was recorded that the walk could go through, and not because nothing was
            to be had.
    """

    accepted: np.ndarray
    emitted: np.ndarray
    exact: np.ndarray
    expected: np.ndarray
    same: np.ndarray
    told: np.ndarray
    nodes: np.ndarray
    depths: np.ndarray
    empty: np.ndarray
    ranks: np.ndarray
    """[rows, S]: of the nodes of the whole walk, 1 the first node below the root; 0 behind it."""

    def mean_emitted(self, rows: np.ndarray) -> float:
        """Tokens to be expected of a step: the mean of those ``rows`` for which there is a tree.

        Of exact ones alone it would be far off: whether a row is exact hangs on how far it went.
        """
        known = self.expected[rows & ~self.empty]
        return float(known.mean()) if len(known) else 1.0


class Trees:
    """The trees of a recording.

    Attributes:
        columns: of the recording; behind the rows that were recorded those of roots within walks.
        real: rows that were recorded.
        step: of each row; -1: within a walk.
        first: rows of first tokens, in whose steps nothing is drafted.
        decoding: rows that were recorded and could draft.
        request: place of each row's request in the table of requests.
    """

    def __init__(self, recording: Recording, inner: bool = True) -> None:
        self.tree: dict[str, Any] = recording.about["tree"]
        self.chain = self.tree["form"] == "chain"
        self.real = len(recording.columns["row.nodes"])
        c, self._ahead = recording.columns, np.zeros(self.real, np.int64)
        origin = np.arange(self.real)
        if inner and recording.about["policy"]["policy"] == "longest_prefix":
            walks = None if self.chain else Trees(recording, inner=False).path(Rule())
            c, origin, self._ahead = _with_inner_rows(c, walks, self.tree["by_text"])
        self.columns = c
        sizes = c["row.nodes"].astype(np.int64)
        rows = len(sizes)
        self.starts = np.cumsum(sizes) - sizes
        step = np.repeat(np.arange(len(c["step.rows"])), c["step.rows"])[origin]
        recorded = np.arange(rows) < self.real
        self.step = np.where(recorded, step, -1)
        self.first = c["step.kind"][step] == FIRST
        self.decoding = recorded & ~self.first
        self.levels = c["step.levels"][step].astype(np.int64) - self._ahead
        self.budget = c["step.budget"][step].astype(np.int64) - self._ahead
        self.drafted = sizes - 1
        self._row = np.repeat(np.arange(rows), sizes)
        own = np.arange(len(self._row)) - self.starts[self._row]
        self._parent = self.starts[self._row] + c["node.parent"]
        self._drafts = own > 0
        self._depth = np.zeros(len(own), np.int64)
        for number in range(1, int(sizes.max(initial=1))):
            at = np.flatnonzero(own == number)
            self._depth[at] = self._depth[self._parent[at]] + 1
        self.deepest = np.zeros(rows, np.int64)
        np.maximum.at(self.deepest, self._row, self._depth)
        self._by_rank = np.lexsort((c["node.rank"], self._row))
        self._orderly = self._siblings_in_order()
        self._read_texts()
        self._paths: dict[Rule, np.ndarray] = {}
        self._ranks: dict[int, tuple[np.ndarray, np.ndarray]] = {}

    def _siblings_in_order(self) -> np.ndarray:
        """Of each row: whether siblings stand in the order of their worth."""
        c = self.columns
        order = np.lexsort((np.arange(len(self._row)), self._parent))
        order = order[self._drafts[order]]
        older, younger = order[:-1], order[1:]
        siblings = self._parent[older] == self._parent[younger]
        wrong = siblings & (c["node.rank"][older] > c["node.rank"][younger])
        orderly = np.ones(len(self.starts), bool)
        orderly[self._row[younger[wrong]]] = False
        return orderly

    def _read_texts(self) -> None:
        """Texts, one behind the other, and where in them each row's root is followed."""
        c = self.columns
        ids = c["request.id"]
        order = np.argsort(ids, kind="stable")
        at = np.searchsorted(ids[order], c["row.request"])
        at = np.minimum(at, max(len(ids) - 1, 0))
        self.request = order[at] if len(ids) else at
        if len(ids) == 0 or np.any(ids[self.request] != c["row.request"]):
            raise UsageError("DIR: the recording has rows of requests that it does not know")
        first = c["row.root"] + 1 - c["request.prompt"][self.request]  # of its new tokens
        emitted = c["row.emitted"].astype(np.int64)
        lengths = np.zeros(len(ids), np.int64)
        np.maximum.at(lengths, self.request, first + emitted)
        self.lengths = lengths
        text_starts = np.cumsum(lengths) - lengths
        self.texts = np.full(int(lengths.sum()), -1, np.int64)
        emitted = emitted[: self.real]
        where = np.repeat((text_starts[self.request] + first)[: self.real], emitted)
        within = np.arange(len(where)) - np.repeat(np.cumsum(emitted) - emitted, emitted)
        if np.any(first < 0):
            raise UsageError("DIR: the recording has roots before the ends of their prompts")
        self.texts[where + within] = c["emitted.token"]
        self.follows = text_starts[self.request] + first
        self.left = lengths[self.request] - first  # tokens of the text behind the root

    def accepts(self, rule: Rule) -> np.ndarray:
        """Of each node: whether a walk that is at its parent may enter it."""
        c = self.columns
        rule.check()
        if rule.policy == "longest_prefix":
            good = c["node.token"] == c["node.choice"][self._parent]
        elif rule.policy == "conf_threshold":
            p = np.nan_to_num(c["node.probability"], nan=0.0)
            good = (p >= rule.threshold) & (p > 0)
        else:
            p = np.nan_to_num(c["node.probability"], nan=0.0)
            good = (c["node.place"] < rule.threshold) & (p > 0)
        return good & self._drafts

    def path(self, rule: Rule) -> np.ndarray:
        """[rows, S]: the walks through the whole trees, below their roots; -1 behind them."""
        if rule not in self._paths:
            good = np.flatnonzero(self.accepts(rule))[::-1]
            entered = np.full(len(self._row), -1)
            entered[self._parent[good]] = good  # the first of several is written last
            steps = []
            at = self.starts
            while True:
                at = np.where(at >= 0, entered[at], -1)
                if not np.any(at >= 0):
                    break
                steps.append(at)
            empty = np.zeros((len(self.starts), 0), np.int64)
            self._paths[rule] = np.stack(steps, axis=1) if steps else empty
        return self._paths[rule]

    def kinds(self, levels: int) -> list[list[int]]:
        """Of each row the kinds of the draft nodes of its first levels, in the order of worth; none
        where a node has none, and within the walks of trees, whose other nodes are not known."""
        nodes = self._by_rank[(self._depth[self._by_rank] <= levels) & self._drafts[self._by_rank]]
        of_nodes = self.columns["node.kind"][nodes]
        counts = np.bincount(self._row[nodes], minlength=len(self.starts))
        known = np.ones(len(counts), bool)
        known[self._row[nodes[of_nodes == NO_KIND]]] = False
        if not self.chain:
            known &= self._ahead == 0
        kinds, ends = of_nodes.tolist(), np.cumsum(counts).tolist()
        return [
            kinds[end - count : end] if told else []
            for end, count, told in zip(ends, counts.tolist(), known.tolist(), strict=True)
        ]

    def _further(self, rule: Rule) -> float:
        """P(a walk goes on by a level) of recorded walks that have got below the first."""
        walked = (self.path(rule) >= 0).sum(axis=1)[self.decoding]
        deepest = self.deepest[self.decoding]
        tried = np.minimum(walked, deepest - 1)
        tries, done = np.maximum(tried, 0).sum(), np.maximum(walked - 1, 0).sum()
        return min(float(done / tries), 0.999) if tries else 0.0

    def _within(self, levels: int) -> tuple[np.ndarray, np.ndarray]:
        """Ranks of all nodes among those of the first ``levels`` levels, and how many of these
        each row has, its root not counted."""
        if levels not in self._ranks:
            allowed = self._depth[self._by_rank] <= levels
            counts = np.cumsum(allowed)
            before = np.concatenate(([0], counts))[self.starts]
            ranks = np.empty(len(self._row), np.int64)
            ranks[self._by_rank] = counts - 1 - before[self._row[self._by_rank]]
            have = np.bincount(self._row, self._depth <= levels, len(self.starts)).astype(int) - 1
            self._ranks[levels] = ranks, have
        return self._ranks[levels]

    def cut(self, levels: int, nodes: int, rule: Rule) -> Cut:
        """All trees cut to a budget and walked.

        Args:
            levels: 0: nothing is drafted.
            nodes: root not counted; MAX_TREE_NODES: as many as the recorded drafter has for so many
                levels, which is what a fixed controller asks for.
        """
        tree, chain, inner = self.tree, self.chain, self._ahead > 0
        if nodes >= MAX_TREE_NODES:
            nodes = levels if chain else tree["nodes"]
        if min(levels, nodes) < 1:
            levels = nodes = 0
        path = self.path(rule)
        ranks, have = self._within(levels)
        on_path = path >= 0
        path_ranks = np.where(on_path, ranks[path], 0)
        if not chain:  # of a row within a walk the other nodes are missing
            path_ranks[inner] = np.where(on_path, self.columns["node.rank"][path], 0)[inner]
        inside = on_path & (self._depth[path] <= levels) & (path_ranks <= nodes)
        accepted = np.cumprod(inside, axis=1).sum(axis=1)
        offered = np.minimum(have, nodes)
        if chain:  # longer than what was recorded, unless the drafter had no more to say
            ended = self.drafted < np.minimum(self.levels, self.budget)
            offered = np.where(ended | self.first, offered, min(levels, nodes))
        elif tree["form"] == "grown" and nodes > 0:
            width = tree["width"]  # of each node but the root as many are expanded
            offered = np.maximum(offered, min(nodes, width + (levels - 1) * width * width))
        same = self._same(levels, nodes)
        complete = same | self._complete(levels, nodes, have)
        if chain:
            exact = complete | (accepted < self.drafted)
        else:
            bottom = (accepted == levels) & (levels <= self.levels)
            exact = complete | (bottom & self._weighed_alike(nodes))
        exact &= self._orderly | same
        if nodes == 0:
            exact = np.ones_like(exact)
        else:
            exact &= same if tree["remembers"] else ~inner | tree["by_text"]
        exact |= self.first
        limits = self.columns["row.limit"].astype(np.int64)
        limits = np.where(limits == NO_LIMIT, np.iinfo(np.int64).max, limits)
        most = np.minimum(limits, self.left)
        emitted = np.minimum(accepted + 1, most)
        empty = ~exact & (self.drafted == 0)
        bottom = self.drafted if chain else self.levels
        rest = np.maximum((min(levels, nodes) if chain else levels) - accepted, 0)
        rest = np.where(~exact & ~empty & (accepted == bottom), rest, 0)
        further = self._further(rule)
        more = further * (1 - further**rest) / (1 - further)
        depths = offered if chain else np.minimum(self.columns["row.depth"], levels)
        if not chain and tree["form"] != "grown":
            depths = np.minimum(depths, self._deepest_within(ranks, levels, nodes))
        return Cut(
            accepted=accepted,
            emitted=emitted,
            exact=exact,
            expected=np.minimum(emitted + more, most),
            same=same,
            told=self._told(path, accepted, emitted),
            nodes=offered,
            depths=depths,
            empty=empty,
            ranks=np.where(self._depth[path] <= levels, path_ranks, 0),
        )

    def _same(self, levels: int, nodes: int) -> np.ndarray:
        """Whether the budget is the one that was recorded, as far as the drafter can tell."""
        if nodes == 0:
            return self.drafted == 0
        tree, recorded = self.tree, self._ahead == 0
        if self.chain:
            asked = np.minimum(self.levels, self.budget)
            return recorded & (asked == min(levels, nodes))
        most = np.minimum(self.budget, tree["nodes"])
        return recorded & (self.levels == levels) & (most == nodes)

    def _complete(self, levels: int, nodes: int, have: np.ndarray) -> np.ndarray:
        """Whether the recorded tree holds all that the drafter would have drafted."""
        tree = self.tree
        if self.chain:
            asked = np.minimum(self.levels, self.budget)
            return (min(levels, nodes) <= self.drafted) | (self.drafted < asked)
        if tree["form"] == "merged":
            return np.zeros(len(have), bool)
        most = np.minimum(self.budget, tree["nodes"]) if tree["form"] == "grown" else self.budget
        all_there = (nodes <= have) | (self.drafted < most)
        return (levels <= self.levels) & all_there & self._weighed_alike(nodes)

    def _weighed_alike(self, nodes: int) -> np.ndarray:
        """Whether a tree of so many nodes would have been grown by the same weights."""
        tree = self.tree
        if tree["form"] == "merged":
            return np.zeros(len(self.starts), bool)
        if tree["form"] != "grown":
            return np.ones(len(self.starts), bool)
        recorded = np.minimum(self.budget, tree["nodes"])
        width = tree["width"]
        return np.minimum(recorded, width) == min(nodes, width)

    def _deepest_within(self, ranks: np.ndarray, levels: int, nodes: int) -> np.ndarray:
        kept = (ranks <= nodes) & (self._depth <= levels)
        deepest = np.zeros(len(self.starts), np.int64)
        np.maximum.at(deepest, self._row, np.where(kept, self._depth, 0))
        return deepest

    def _told(self, path: np.ndarray, accepted: np.ndarray, emitted: np.ndarray) -> np.ndarray:
        """Whether the tokens of the walks are those of the texts."""
        c = self.columns
        told = np.ones(len(accepted), bool)
        for place in range(path.shape[1]):
            inside = (place < accepted) & (place < emitted)
            at = np.flatnonzero(inside)
            told[at] &= self.texts[self.follows[at] + place] == c["node.token"][path[at, place]]
        at = np.flatnonzero(accepted < emitted)  # the bonus token is kept
        last = self.starts[at]
        if path.shape[1]:
            behind = path[at, np.maximum(accepted[at] - 1, 0)]
            last = np.where(accepted[at] > 0, behind, last)
        bonus = c["node.choice"][last]
        # The last token of a text may be one that the checkpoint forces.
        end = accepted[at] + 1 == self.left[at]
        told[at] &= (self.texts[self.follows[at] + accepted[at]] == bonus) | end
        return told


def _with_inner_rows(
    columns: dict[str, np.ndarray], walks: np.ndarray | None, by_text: bool
) -> tuple[dict[str, np.ndarray], np.ndarray, np.ndarray]:
    """The tables of rows and nodes, with a row more for each root within a walk behind whose token
    the text goes on. Its nodes are the rest of the chain, or of the walk.

    Args:
        walks: [rows, S], of trees; None: they are chains.
        by_text: of the drafter, see above.

    Returns:
        Columns; of each row the recorded one that it is or is in, and how far behind its root.
    """
    c = columns
    sizes = c["row.nodes"].astype(np.int64)
    rows = len(sizes)
    behind = np.minimum(c["row.accepted"].astype(np.int64), c["row.emitted"].astype(np.int64) - 1)
    behind = np.maximum(behind, 0)
    row = np.repeat(np.arange(rows), behind)
    ahead = np.arange(len(row)) - np.repeat(np.cumsum(behind) - behind, behind) + 1
    ends = sizes if walks is None else c["row.accepted"].astype(np.int64) + 1
    left = ends[row] - ahead
    own = np.arange(int(left.sum())) - np.repeat(np.cumsum(left) - left, left)
    place = np.repeat(ahead, left) + own
    if walks is None:
        node = np.repeat((np.cumsum(sizes) - sizes)[row], left) + place
    else:
        node = walks[np.repeat(row, left), place - 1]
    more = {name: c[name][row] for name in c if name.startswith("row.")}
    more |= {name: c[name][node] for name in c if name.startswith("node.")}
    for name, shift in (
        ("row.root", ahead),
        ("row.depth", -ahead),
        ("row.accepted", -ahead),
        ("row.emitted", -ahead),
        ("row.limit", np.where(more["row.limit"] == NO_LIMIT, 0, -ahead)),
    ):
        more[name] = more[name].astype(np.int64) + shift
    more["row.nodes"] = left
    more["node.parent"] = np.maximum(own - 1, 0)
    roots = np.repeat(more["node.rank"][own == 0].astype(np.int64), left)
    more["node.rank"] = more["node.rank"].astype(np.int64) - roots
    told = more["node.kind"] != NO_KIND
    if walks is None and np.any(told):
        sure = np.array([*SURE, *[1.0] * (1 + NO_KIND - len(SURE))])
        if by_text:  # as sure of a path's rest as of the whole, but for its beginning
            kinds = more["node.kind"]
            chances = sure[kinds] / np.repeat(sure[kinds[own == 0]], left)
        else:  # as long a match as made the first node so likely, which has grown since
            first = sure[c["node.kind"][(np.cumsum(sizes) - sizes)[row] + 1]]
            match = np.repeat(first / np.maximum(1 - first, 1e-3) + ahead, left)
            chances = match / (match + np.maximum(own, 1))
        more["node.kind"] = np.where(told, kinds_of_logs(np.log(chances)), NO_KIND)
    joined = {name: np.concatenate([c[name], values]) for name, values in more.items()}
    origin = np.concatenate([np.arange(rows), row])
    return {**c, **joined}, origin, np.concatenate([np.zeros(rows, np.int64), ahead])
