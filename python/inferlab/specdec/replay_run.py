"""The virtual clock: a recorded run decoded again, step by step. No torch."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, NamedTuple

import numpy as np

from inferlab.specdec.acceptance import SURE, WINDOW
from inferlab.specdec.cuts import Cut, Rule
from inferlab.specdec.replay_askers import NOT_OFFERED, Asked, Asker, Going, Offered, Step

if TYPE_CHECKING:
    from inferlab.specdec.replay import Replay

READY = 16
"""Tokens that a draft model reads in a usual step."""


class Walked(NamedTuple):
    """A request's part of a step: from its root on so many draft tokens were accepted."""

    root: int
    accepted: float
    exact: bool


@dataclass
class Replayed:
    """What became of a run.

    Attributes:
        tokens: new ones, of all requests.
        steps: of the engine.
        ms: of all steps.
        walks: of single requests: each step that decodes one, first tokens included.
        exact, firsts: of these, so many are known exactly, and are of first tokens.
        by_request: the walks of each.
        disagree: recorded walks that come out otherwise when they are walked again.
    """

    tokens: int = 0
    steps: int = 0
    ms: float = 0.0
    walks: int = 0
    exact: int = 0
    firsts: int = 0
    by_request: dict[int, list[Walked]] = field(default_factory=dict)
    disagree: int = 0

    def add(self, request: int, walked: Walked) -> None:
        self.walks += 1
        self.exact += walked.exact
        self.by_request.setdefault(request, []).append(walked)

    @property
    def accepted_length(self) -> float:
        """Tokens per walk, the bonus token and first tokens included: 1.0 is plain decoding."""
        return self.tokens / self.walks if self.walks else 0.0

    @property
    def decoding_length(self) -> float:
        """The same of the walks behind first tokens alone, in which there can be drafts."""
        decoding = self.walks - self.firsts
        return (self.tokens - self.firsts) / decoding if decoding else 1.0

    @property
    def covered(self) -> float:
        return self.exact / self.walks if self.walks else 1.0

    @property
    def tokens_per_second(self) -> float:
        return self.tokens / self.ms * 1e3 if self.ms > 0 else 0.0


def typical(cut: Cut, decoding: np.ndarray) -> int:
    """Draft nodes of a usual step; steps in which nothing was recorded say nothing."""
    offered = cut.nodes[decoding & ~cut.empty]
    return round(float(offered.mean())) if len(offered) else 0


class Rows(NamedTuple):
    """A cut as lists, which are read one by one."""

    emitted: list[int]
    accepted: list[int]
    expected: list[float]
    exact: list[bool]
    same: list[bool]
    told: list[bool]
    nodes: list[int]
    depths: list[int]
    ranks: list[list[int]]
    empty: list[bool]
    mean: float
    usual_nodes: int

    @classmethod
    def of(cls, cut: Cut, decoding: np.ndarray) -> Rows:
        mean = cut.mean_emitted(decoding)
        return cls(
            cut.emitted.tolist(),
            cut.accepted.tolist(),
            np.where(cut.empty, mean, cut.expected).tolist(),
            cut.exact.tolist(),
            cut.same.tolist(),
            cut.told.tolist(),
            cut.nodes.tolist(),
            cut.depths.tolist(),
            cut.ranks.tolist(),
            cut.empty.tolist(),
            mean,
            typical(cut, decoding),
        )


class _Part(NamedTuple):
    """What is drafted for a text in a step.

    Attributes:
        row: where its tree was recorded; None: nowhere.
        like: the row whose tree is as good as its own; None: the mean of all.
        cut: of all rows, what is verified.
        levels: that were asked for.
        drafts: the drafter was asked.
        judged: a judge said how much of it is verified.
        came_true: whether the best node that is not verified would have been accepted.
    """

    row: int | None
    like: int | None
    cut: Rows
    levels: int
    drafts: bool = False
    judged: bool = False
    came_true: bool | None = None


class _Walk(NamedTuple):
    """Nodes and levels that were offered, and the ranks that were accepted."""

    nodes: int
    depth: int
    ranks: list[int]


@dataclass
class _Text:
    """A request on its way through its recorded text.

    Attributes:
        number: counts texts as they begin.
        at: position of its root; between two where it goes on by means.
        end: position of its last token.
        most: position that ``max_tokens`` would end at.
        astray: a token was accepted that the recorded text does not have.
        read: tokens that a draft model has read.
        offered: what a judge was last told of.
    """

    request: int
    number: int
    at: float
    end: int
    most: int
    astray: bool = False
    read: int = 0
    offered: Offered = NOT_OFFERED


class Run:
    """The virtual clock."""

    def __init__(self, replay: Replay, asker: Asker, rule: Rule) -> None:
        self.replay, self.asker, self.rule = replay, asker, rule
        self.columns = replay.recording.columns
        self.result = Replayed()
        self._remembers = bool(replay.trees.tree["remembers"])
        self._changed = False  # other trees were verified than the recorded ones
        self._step_of: list[int] = replay.trees.step.tolist()
        self._first: list[bool] = replay.trees.first.tolist()
        self._ids: list[int] = self.columns["request.id"].tolist()
        self._as_recorded = True
        self._begun = 0
        self._stood_in = 0

    def decode_together(self, size: int) -> Replayed:
        """Batches of ``size`` texts, without a recorded time."""
        self._as_recorded = False
        count = len(self._ids)
        order = [place % count for place in range(-(-count // size) * size)]
        for first in range(0, len(order), size):
            running = [self._begin(request) for request in order[first : first + size]]
            while running:
                decoding = self._read(running)
                if decoding:
                    self._step(decoding, False)
                running = [text for text in running if text.at < text.end]
        self.result.tokens = int(self.replay.trees.lengths[order].sum())
        return self.result

    def decode(self) -> Replayed:
        replay = self.replay
        waiting = list(reversed(replay.order))
        ended = [False] * len(waiting)
        done = 0  # of those that ended first, all
        running: list[_Text] = []
        while waiting or running:
            while done < len(ended) and ended[replay.by_end[done]]:
                done += 1
            while waiting and (replay.waits[waiting[-1]] <= done or not running):
                running.append(self._begin(waiting.pop()))
            decoding = self._read(running)
            if decoding:
                self._step(decoding, bool(waiting))
            left = []
            for text in running:
                if text.at >= text.end:
                    ended[text.request] = True
                else:
                    left.append(text)
            running = left
        self.result.tokens = int(replay.trees.lengths.sum())
        return self.result

    def _begin(self, request: int) -> _Text:
        prompt = int(self.columns["request.prompt"][request])
        last = prompt + int(self.replay.trees.lengths[request]) - 1
        most = prompt + int(self.columns["request.most"][request]) - 1
        self._begun += 1
        return _Text(request, self._begun, prompt - 1, last, most)

    def _read(self, running: list[_Text]) -> list[_Text]:
        """Texts whose ends are read get a token; returns the others."""
        others: list[_Text] = []
        steps: set[int] = set()
        times, sizes = self.replay.times.ms, self.columns["step.rows"]
        read: list[float] = []  # tokens of each text
        for text in running:
            row = self.replay.row_at[text.request].get(int(text.at))
            if text.astray or row is None or not self._first[row]:
                others.append(text)
                continue
            step = self._step_of[row]
            steps.add(step)
            if self._as_recorded:
                self.result.ms += float(times[step]) / int(sizes[step])
            read.append(text.at + 1)
            emitted = int(self.columns["row.emitted"][row])
            self._count(text, 0, emitted, True)
            self.result.firsts += 1
            if emitted == 0:  # it ended in an error
                text.at = text.end
        self.result.steps += len(steps)
        if read and not self._as_recorded:
            self.result.ms += self.replay.times.reading(len(read), sum(read) / len(read))
        return others

    def _step(self, texts: list[_Text], waiting: bool) -> None:
        replay, times = self.replay, self.replay.times
        going = [self._going(text) for text in texts]
        asked = self.asker.ask(going, waiting)
        useful = max(text.remaining for text in going) - 1
        levels, nodes = min(asked.levels, useful), asked.nodes
        if min(levels, nodes) < 1:
            levels = nodes = 0
        context = sum(text.at for text in texts) / len(texts)
        parts, drafted = self._parts(texts, asked, levels, nodes)
        read = sum(
            of.unread
            for of, part in zip(going, parts, strict=True)
            if part.drafts and of.unread > READY
        )
        for text, part in zip(texts, parts, strict=True):
            if part.drafts:
                text.read = int(text.at) + 1
        remembered = self._remembers and self._changed and nodes > 0
        walks = [
            self._walk(text, part, remembered) for text, part in zip(texts, parts, strict=True)
        ]
        steps = {-1 if part.row is None else self._step_of[part.row] for part in parts}
        step = steps.pop() if len(steps) == 1 else -1
        width = times.width([walk.nodes for walk in walks])
        deep = levels if drafted is None or not replay.trees.chain else min(levels, drafted)
        if self._as_recorded and step >= 0 and times.batch[step] == len(texts):
            ms, draft_ms = times.changed(step, deep, width, drafted)
        else:
            ms, draft_ms = times.predicted(len(texts), deep, width, context, drafted)
        self.result.ms += ms
        self.result.steps += 1
        reading = times.drafter_reading(read) if read else 0.0
        told = Step(
            levels=levels,
            nodes=nodes,
            ms=ms + reading,
            draft_ms=draft_ms + reading,
            rows=round(len(texts) * (1 + width)),
            depths=[walk.depth for walk in walks],
            ranks=[walk.ranks for walk in walks],
            caught_up=read > 0,
            came_true=[part.came_true for part in parts],
        )
        self.asker.hear(len(texts), told)

    def _going(self, text: _Text) -> Going:
        tokens = int(text.at) + 1
        prompt = int(self.columns["request.prompt"][text.request])
        return Going(
            text.number, tokens, tokens - prompt, text.most - int(text.at), tokens - text.read
        )

    def _parts(
        self, texts: list[_Text], asked: Asked, levels: int, nodes: int
    ) -> tuple[list[_Part], int | None]:
        """What is drafted for each text, and, where a judge saw it, for how many nodes drafting
        took its time."""
        replay = self.replay
        members = range(len(texts)) if asked.members is None or nodes == 0 else asked.members
        rows: list[int | None] = []
        for text in texts:
            row = None if text.astray else replay.row_at[text.request].get(int(text.at))
            rows.append(None if row is None or self._first[row] else row)
        nothing = replay.rows(0, 0, self.rule)
        parts = [_Part(row, row, nothing, 0) for row in rows]
        judged = asked.judge is not None and nodes > 0 and bool(replay.stand_ins)
        if judged and asked.examines and not self._passes([texts[i] for i in members], asked):
            for place in members:
                parts[place] = parts[place]._replace(drafts=True)
            return parts, 0
        whole = replay.rows(levels, nodes, self.rule)
        if not judged:
            for place in members:
                parts[place] = _Part(rows[place], rows[place], whole, levels, nodes > 0)
            return parts, None
        known = replay.kinds(levels)
        likes = [self._like(rows[place], known, whole, asked.writes) for place in members]
        kinds = [known[like][: whole.nodes[like]] for like in likes]
        counts, drafted = asked.judged(kinds, [texts[place].offered for place in members])
        for place, like, count, of_text in zip(members, likes, counts, kinds, strict=True):
            ranks = whole.ranks[like][: whole.accepted[like]]
            texts[place].offered = Offered(of_text, ranks)
            depth = min(count, levels) if replay.trees.chain else levels
            cut = replay.rows(depth, count, self.rule)
            came_true = None
            if count < len(of_text) and replay.trees.chain:
                # One node further is known if the walk came so far and was not cut by the end.
                further = replay.rows(count + 1, count + 1, self.rule)
                ends = cut.accepted[like] < count or further.exact[like]
                came_true = further.accepted[like] > count if ends else None
            row = like if rows[place] == like else None
            parts[place] = _Part(row, like, cut, levels, True, True, came_true)
        return parts, drafted

    def _like(self, row: int | None, kinds: list[list[int]], whole: Rows, writes: bool) -> int:
        """The row whose drafts are judged in place of a text's own: that, where it is known."""
        if row is None or whole.empty[row]:
            return self._stand_in()
        untold = not kinds[row] and (writes or self.replay.trees.drafted[row] > 0)
        return self._stand_in() if untold else row

    def _passes(self, texts: list[_Text], asked: Asked) -> bool:
        """Whether a draft model that has read these texts is to draft; see `Judge.examined`."""
        assert asked.judge is not None
        replay, whole, kinds = self.replay, self.replay.rows(1, 1, self.rule), self.replay.kinds(1)
        sure: list[list[float]] = []
        right: list[list[bool]] = []
        for text in texts:
            sure.append([])
            right.append([])
            at, prompt = int(text.at), int(self.columns["request.prompt"][text.request])
            if at + 1 - text.read <= READY:
                continue
            for root in range(max(prompt - 1, at - WINDOW), at):
                row = replay.row_at[text.request].get(root)
                if row is not None and kinds[row]:
                    sure[-1].append(SURE[kinds[row][0]])
                    right[-1].append(whole.accepted[row] > 0)
        return not any(right) or asked.judge.examined(asked.requests, sure, right)

    def _stand_in(self) -> int:
        """A recorded row for a text of which none is known."""
        self._stood_in += 1
        return self.replay.stand_ins[self._stood_in % len(self.replay.stand_ins)]

    def _walk(self, text: _Text, part: _Part, remembered: bool) -> _Walk:
        """Takes a text a step on. ``remembered``: the drafter would have had another memory."""
        row, cut, like = part.row, part.cut, part.like
        if row is None:
            self._changed = True
            text.astray = text.astray or self.rule.policy != "longest_prefix"
            if like is None:
                walk = _Walk(cut.usual_nodes, part.levels, list(range(1, round(cut.mean))))
                self._count(text, cut.mean - 1, cut.mean, False)
            else:
                walk = _Walk(
                    cut.nodes[like], cut.depths[like], cut.ranks[like][: cut.accepted[like]]
                )
                self._count(text, cut.expected[like] - 1, cut.expected[like], False)
            return walk
        whole = self.replay.trees.chain or self._step_of[row] >= 0
        exact = cut.exact[row] and not remembered
        if part.judged and self._step_of[row] < 0:
            exact = False  # how sure the drafter would be there is estimated
        self._changed = self._changed or not cut.same[row]
        emitted = cut.emitted[row] if exact else cut.expected[row]
        accepted = cut.accepted[row]
        self._count(text, min(accepted, emitted) if exact else emitted - 1, emitted, exact)
        # What a lossy policy lets pass is unknown where its tree is.
        sure = exact or self.rule.policy == "longest_prefix"
        text.astray = text.astray or not sure or not cut.told[row]
        nodes = cut.nodes[row] if whole else cut.usual_nodes
        return _Walk(nodes, cut.depths[row], cut.ranks[row][:accepted])

    def _count(self, text: _Text, accepted: float, emitted: float, exact: bool) -> None:
        self.result.add(self._ids[text.request], Walked(int(text.at), accepted, exact))
        text.at += emitted
