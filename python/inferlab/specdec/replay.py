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

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple, Protocol

import numpy as np

from inferlab.config import MAX_TREE_NODES
from inferlab.specdec.costs import CostModel
from inferlab.specdec.cuts import REPLAYABLE, Cut, Rule, Trees
from inferlab.specdec.recorded import Recording
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


class Step(NamedTuple):
    """What a step on the virtual clock tells of itself.

    Attributes:
        levels, nodes: of the budget, as the engine limits it near the ends of texts.
        depths: levels offered to each sequence.
        ranks: of the accepted nodes of each, see `StepObservation`.
    """

    levels: int
    nodes: int
    ms: float
    depths: list[int]
    ranks: list[list[int]]


class Going(NamedTuple):
    """A text of the step to come: its number, growing in the order in which they begin, its tokens
    so far, and how many it may still get."""

    number: int
    tokens: int
    remaining: int


class Asker(Protocol):
    """Who says how much to draft."""

    def ask(self, texts: Sequence[Going], waiting: bool) -> tuple[int, int]:
        """Levels and nodes. ``waiting``: others will take the places of these."""
        ...

    def hear(self, batch: int, told: Step) -> None:
        """Hears how the step went that was asked for last."""
        ...


class Always:
    """The same budget for each step; MAX_TREE_NODES: all nodes that the drafter has for so many
    levels."""

    def __init__(self, levels: int, nodes: int = MAX_TREE_NODES) -> None:
        self.budget = (levels, nodes)

    def ask(self, texts: Sequence[Going], waiting: bool) -> tuple[int, int]:
        return self.budget

    def hear(self, batch: int, told: Step) -> None:
        return


class Controlled:
    """A controller of the engine's.

    This is the one place that knows how controllers are asked and told. One that plans knows nodes
    by their ranks alone here: what drafters know of them beyond is not recorded.

    Args:
        controller: whose state goes on from where it is.
        about: of the recording, whose drafter it asks.
        first: number of the first text, above those that the controller has heard of.
    """

    def __init__(self, controller: Any, about: Mapping[str, Any], first: int = 0) -> None:
        from inferlab.specdec.acceptance import Known
        from inferlab.specdec.control import Outlook, StepObservation
        from inferlab.specdec.tree import Budget

        self._controller = controller
        self._outlook, self._observation, self._budget = Outlook, StepObservation, Budget
        self._ladder = tuple(Budget(*rung) for rung in about["ladder"])
        self._known = Known(**(about.get("known") or {}))
        self._tree = about["tree"]
        self._nodes = 0
        self._first = first

    def ask(self, texts: Sequence[Going], waiting: bool) -> tuple[int, int]:
        outlook = self._outlook(
            self._ladder,
            [self._first + text.number for text in texts],
            sum(text.tokens for text in texts) / len(texts),
            [text.remaining for text in texts],
            waiting=waiting,
            known=self._known,
        )
        levels, nodes = self._controller.choose(outlook).budget
        self._nodes = nodes
        if self._tree["form"] != "chain":  # chains are as long as the controller may ask
            levels = min(levels, self._tree["levels"])
            nodes = MAX_TREE_NODES if nodes >= self._tree["nodes"] else nodes
        return levels, nodes

    def hear(self, batch: int, told: Step) -> None:
        levels, nodes, ms, depths, ranks = told
        budget = self._budget(levels, self._nodes if nodes > 0 else 0)
        self._controller.observe(self._observation(batch, budget, ms, depths, ranks))


class Replay:
    """A recording, to be decoded again.

    Args:
        recording: of `inferlab.specdec.recorded.read_recording`.
        costs: of the machine; None: those in the recording, else fitted to it.
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
                    ms = self.times.predicted(batch, k, offered, context)
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
            mean,
            _typical(cut, decoding),
        )


@dataclass
class _Text:
    """A request on its way through its recorded text.

    Attributes:
        number: counts texts as they begin.
        at: position of its root; between two where it goes on by means.
        end: position of its last token.
        most: position that ``max_tokens`` would end at.
        astray: a token was accepted that the recorded text does not have.
    """

    request: int
    number: int
    at: float
    end: int
    most: int
    astray: bool = False


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
        replay, result = self.replay, self.result
        going = [Going(t.number, int(t.at) + 1, t.most - int(t.at)) for t in texts]
        levels, nodes = self.asker.ask(going, waiting)
        useful = max(text.remaining for text in going) - 1
        levels = min(levels, useful)
        if min(levels, nodes) < 1:
            levels = nodes = 0
        rows = replay._rows(levels, nodes, self.rule)
        depths: list[int] = []
        ranks: list[list[int]] = []
        steps: set[int] = set()
        widths: list[int] = []
        usual = rows.usual_nodes if nodes > 0 else 0
        changed = self._changed
        for text in texts:
            row = None if text.astray else replay._row_at[text.request].get(int(text.at))
            if row is None or self._first[row]:
                widths.append(usual)
                steps.add(-1)
                self._changed = True
                text.astray = text.astray or self.rule.policy != "longest_prefix"
                depths.append(levels)
                ranks.append(list(range(1, round(rows.mean))))
                self._count(text, rows.mean - 1, rows.mean, False)
                continue
            steps.add(self._step_of[row])
            whole = replay.trees.chain or self._step_of[row] >= 0
            widths.append(rows.nodes[row] if whole else usual)
            exact = rows.exact[row] and not (self._remembers and changed and nodes > 0)
            self._changed = self._changed or not rows.same[row]
            emitted = rows.emitted[row] if exact else rows.expected[row]
            accepted = rows.accepted[row]
            depths.append(rows.depths[row])
            ranks.append(rows.ranks[row][:accepted])
            self._count(text, min(accepted, emitted) if exact else emitted - 1, emitted, exact)
            # What a lossy policy lets pass is unknown where its tree is.
            sure = exact or self.rule.policy == "longest_prefix"
            text.astray = text.astray or not sure or not rows.told[row]
        step = steps.pop() if len(steps) == 1 else -1
        width = replay.times.width(widths)
        known = self._as_recorded and step >= 0
        if known and int(self.columns["step.rows"][step]) == len(texts):
            ms = replay.times.changed(step, levels, width)
        else:
            context = sum(text.at for text in texts) / len(texts)
            ms = replay.times.predicted(len(texts), levels, width, context)
        result.ms += ms
        result.steps += 1
        self.asker.hear(len(texts), Step(levels, nodes, ms, depths, ranks))

    def _count(self, text: _Text, accepted: float, emitted: float, exact: bool) -> None:
        self.result.add(self._ids[text.request], Walked(int(text.at), accepted, exact))
        text.at += emitted
