"""Recorded runs decoded again without their models: other budgets, policies, controllers. No torch.

The output of a lossless run is seed-exact: whatever is drafted, the text is the recorded one. So a
setting is judged by walking that text again. A step that begins where a recorded step began has
its tree, cut to what the setting asks for (`inferlab.specdec.cuts` says when that is exactly what
would have been). Where the record holds only a part of that tree, that part's walk counts, and
where it went through all of it, what such walks get further on average. A step that begins behind a
token of a recorded walk goes as far as that walk did, which is exact of drafters that go by the
text alone; one that begins elsewhere goes on by the mean of the recorded trees. ``covered`` is the
share of steps that are exact.

Times are those of `inferlab.specdec.replay_times`.

Requests run as they were recorded: one begins when those have ended that had ended when it began.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import numpy as np

from inferlab.specdec.costs import CostModel
from inferlab.specdec.cuts import REPLAYABLE, Cut, Rule, Trees
from inferlab.specdec.recorded import CATCHING_UP, Recording
from inferlab.specdec.replay_askers import NOT_OFFERED, Asked, Asker, Going, Offered, Step
from inferlab.specdec.replay_times import Times


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


class Cell(NamedTuple):
    """A point of a grid: steps of ``batch`` texts in mid-decoding, all with this budget.

    Attributes:
        accepted_length: tokens per step, at the recorded roots.
        covered: share of these steps that are exact.
    """

    levels: int
    nodes: int
    batch: int
    accepted_length: float
    tokens_per_second: float
    covered: float


class Replay:
    """A recording, to be decoded again.

    Args:
        recording: of `inferlab.specdec.recorded.read_recording`.
        costs: of the machine; None: those in the recording, else fitted to it.

    Attributes:
        kinds: of the drafted nodes of each row, in the order of worth; empty where none were told.
        stand_ins: rows that have some.
    """

    def __init__(self, recording: Recording, costs: CostModel | None = None) -> None:
        self.recording = recording
        self.about = recording.about
        self.trees = Trees(recording)
        kept = self.about.get("costs")
        if costs is None and kept is not None:
            costs = CostModel.from_json(kept)
        self.times = Times(recording, self.trees, costs)
        self._cuts: dict[tuple[int, int, Rule], _Rows] = {}
        self.kinds = self.trees.kinds()
        self.stand_ins = [
            row for row in np.flatnonzero(self.trees.decoding).tolist() if self.kinds[row]
        ]
        c, trees = recording.columns, self.trees
        count = len(c["request.id"])
        self._row_at: list[dict[int, int]] = [{} for _ in range(count)]
        roots = trees.columns["row.root"].tolist()
        for row, (request, root) in enumerate(zip(trees.request.tolist(), roots, strict=True)):
            if row < trees.real or root not in self._row_at[request]:
                self._row_at[request][root] = row
        request_of, step_of = trees.request[: trees.real], trees.step[: trees.real]
        ends = np.zeros(count, np.int64)
        np.maximum.at(ends, request_of, step_of)
        starts = np.full(count, np.iinfo(np.int64).max)
        np.minimum.at(starts, request_of, step_of)
        # A request begins when as many have ended as had when it began.
        self._order = np.argsort(starts, kind="stable").tolist()
        self._waits = np.searchsorted(np.sort(ends), starts, side="left").tolist()
        self._by_end = np.argsort(ends, kind="stable").tolist()

    @property
    def rule(self) -> Rule:
        """The recorded policy. It may be one that cannot be replayed."""
        policy = self.about["policy"]
        return Rule(policy["policy"], float(policy.get("tau", policy.get("k", 0.0))))

    @property
    def levels(self) -> int:
        """Most levels that were asked for."""
        c = self.recording.columns
        return int(c["step.levels"].max(initial=0))

    def recorded(self) -> Replayed:
        """The run as it was: its walks are walked again, where the policy can be, in its times."""
        c, trees = self.recording.columns, self.trees
        accepted = c["row.accepted"].astype(np.int64)
        disagree = 0
        if self.rule.policy in REPLAYABLE:
            walked = (trees.path(self.rule) >= 0).sum(axis=1)[: trees.real]
            disagree = int((walked != accepted).sum())
            accepted = walked
        emitted = c["row.emitted"].astype(np.int64)
        result = Replayed(
            tokens=int(emitted.sum()),
            steps=self.recording.num_steps,
            ms=float(self.times.ms.sum()),
            disagree=disagree,
        )
        kept = np.minimum(accepted, emitted).tolist()
        for *where, number in zip(
            c["row.request"].tolist(), c["row.root"].tolist(), kept, strict=True
        ):
            result.add(where[0], Walked(where[1], number, True))
        return result

    def run(self, asker: Asker, rule: Rule | None = None, together: int | None = None) -> Replayed:
        """The run under another setting.

        Args:
            asker: how much is drafted.
            rule: who accepts; None: as recorded.
            together: texts decoded in one batch, one batch behind the other, the last filled up
                from the first texts; its steps then take what the cost model says, those that
                read a prompt, too. None: as recorded.

        Raises:
            UsageError: the policy cannot be replayed.
        """
        run = _Run(self, asker, (rule or self.rule).check())
        return run.decode() if together is None else run.decode_together(together)

    def grid(
        self,
        levels: Sequence[int],
        nodes: Sequence[int],
        batches: Sequence[int],
        rule: Rule | None = None,
    ) -> list[Cell]:
        """Steps of every size, as they would be in mid-decoding at the recorded roots."""
        rule = (rule or self.rule).check()
        decoding = self.trees.decoding
        cells = []
        context = float(self.recording.columns["row.root"].mean()) if len(decoding) else 0.0
        for k in levels:
            for n in nodes:
                cut = self.trees.cut(k, n, rule)
                length = cut.mean_emitted(decoding)
                covered = float(cut.exact[decoding].mean()) if decoding.any() else 1.0
                offered = _typical(cut, decoding)
                for batch in batches:
                    ms, _ = self.times.predicted(batch, k, offered, context)
                    cells.append(Cell(k, n, batch, length, batch * length / ms * 1e3, covered))
        return cells

    def _rows(self, levels: int, nodes: int, rule: Rule) -> _Rows:
        key = (levels, nodes, rule)
        if key not in self._cuts:
            self._cuts[key] = _Rows.of(self.trees.cut(levels, nodes, rule), self.trees.decoding)
        return self._cuts[key]


def _typical(cut: Cut, decoding: np.ndarray) -> int:
    """Draft nodes of a usual step; steps in which nothing was recorded say nothing."""
    offered = cut.nodes[decoding & ~cut.empty]
    return round(float(offered.mean())) if len(offered) else 0


class _Rows(NamedTuple):
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
    def of(cls, cut: Cut, decoding: np.ndarray) -> _Rows:
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
            _typical(cut, decoding),
        )


class _Part(NamedTuple):
    """What is drafted for a text in a step.

    Attributes:
        row: where its tree was recorded; None: nowhere.
        like: the row whose tree is as good as its own; None: the mean of all.
        cut: of all rows, what is verified.
        levels: that were asked for.
        came_true: whether the best node that is not verified would have been accepted.
    """

    row: int | None
    like: int | None
    cut: _Rows
    levels: int
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
        offered: what a judge was last told of.
    """

    request: int
    number: int
    at: float
    end: int
    most: int
    astray: bool = False
    offered: Offered = NOT_OFFERED


class _Run:
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
        waiting = list(reversed(replay._order))
        ended = [False] * len(waiting)
        done = 0  # of those that ended first, all
        running: list[_Text] = []
        while waiting or running:
            while done < len(ended) and ended[replay._by_end[done]]:
                done += 1
            while waiting and (replay._waits[waiting[-1]] <= done or not running):
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
            row = self.replay._row_at[text.request].get(int(text.at))
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
        going = [Going(t.number, int(t.at) + 1, t.most - int(t.at)) for t in texts]
        asked = self.asker.ask(going, waiting)
        useful = max(text.remaining for text in going) - 1
        levels, nodes = min(asked.levels, useful), asked.nodes
        if min(levels, nodes) < 1:
            levels = nodes = 0
        context = sum(text.at for text in texts) / len(texts)
        parts, drafted = self._parts(texts, asked, levels, nodes)
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
        lagging = step >= 0 and self.columns["step.kind"][step] == CATCHING_UP
        told = Step(
            levels=levels,
            nodes=nodes,
            ms=ms,
            draft_ms=draft_ms,
            rows=round(len(texts) * (1 + width)),
            depths=[walk.depth for walk in walks],
            ranks=[walk.ranks for walk in walks],
            caught_up=bool(lagging) and nodes > 0,
            came_true=[part.came_true for part in parts],
        )
        self.asker.hear(len(texts), told)

    def _parts(
        self, texts: list[_Text], asked: Asked, levels: int, nodes: int
    ) -> tuple[list[_Part], int | None]:
        """What is drafted for each text, and, where a judge saw it, for how many nodes drafting
        took its time."""
        replay = self.replay
        whole = replay._rows(levels, nodes, self.rule)
        rows: list[int | None] = []
        for text in texts:
            row = None if text.astray else replay._row_at[text.request].get(int(text.at))
            rows.append(None if row is None or self._first[row] else row)
        if asked.judge is None or nodes == 0 or not replay.stand_ins:
            return [_Part(row, row, whole, levels) for row in rows], None
        likes = []
        for row in rows:
            unknown = row is None or whole.empty[row] or (asked.writes and not replay.kinds[row])
            likes.append(self._stand_in() if row is None or unknown else row)
        kinds = [replay.kinds[like][: whole.nodes[like]] for like in likes]
        counts, drafted = asked.judged(kinds, [text.offered for text in texts])
        for text, like, of_text in zip(texts, likes, kinds, strict=True):
            text.offered = Offered(of_text, whole.ranks[like][: whole.accepted[like]])
        parts = []
        for row, like, count, of_text in zip(rows, likes, counts, kinds, strict=True):
            depth = min(count, levels) if replay.trees.chain else levels
            cut = replay._rows(depth, count, self.rule)
            came_true = None
            if count < len(of_text) and replay.trees.chain:
                # One node further is known if the walk came so far and was not cut by the end.
                further = replay._rows(count + 1, count + 1, self.rule)
                ends = cut.accepted[like] < count or further.exact[like]
                came_true = further.accepted[like] > count if ends else None
            parts.append(_Part(row if row == like else None, like, cut, levels, came_true))
        return parts, drafted

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
