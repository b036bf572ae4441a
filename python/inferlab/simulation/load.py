"""Who asks for what, and when."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import numpy as np

from inferlab.errors import UsageError
from inferlab.lengths import Lengths

USUAL_PROMPTS, USUAL_OUTPUTS = Lengths("fixed", 128, 128), Lengths("fixed", 64, 64)
ARRIVALS = ("poisson", "gamma", "constant")


@dataclass(frozen=True)
class Arrivals:
    """When requests come.

    Attributes:
        rate: of all replicas together, requests per second; None: a closed loop.
        kind: of the gaps between them; "gamma": with ``cv``, standard deviation over mean.
        clients: of a closed loop: each asks anew ``think_ms`` after its answer has ended.
    """

    rate: float | None = None
    kind: str = "poisson"
    cv: float = 1.0
    clients: int = 1
    think_ms: float = 0.0

    def __post_init__(self) -> None:
        if self.kind not in ARRIVALS:
            raise UsageError(f"arrivals: {self.kind!r} is unknown; known are {', '.join(ARRIVALS)}")
        for name, good in (
            ("rate", self.rate is None or self.rate > 0),
            ("cv", self.cv > 0),
            ("clients", self.clients >= 1),
            ("think", self.think_ms >= 0),
        ):
            if not good:
                raise UsageError(f"{name}: must be above 0")

    def draw(self, count: int, random: np.random.Generator) -> np.ndarray:
        """Seconds at which they come; of a closed loop none is known."""
        if self.rate is None:
            return np.zeros(0)
        mean = 1 / self.rate
        if self.kind == "constant":
            gaps = np.full(count, mean)
        elif self.kind == "gamma":
            shape = 1 / self.cv**2
            gaps = random.gamma(shape, mean / shape, count)
        else:
            gaps = random.exponential(mean, count)
        return np.cumsum(gaps)


class Text(NamedTuple):
    """A text that is asked for: tokens of its prompt, new ones, and the trace of its steps."""

    prompt: int
    output: int
    trace: int


@dataclass(frozen=True)
class Load:
    """What is asked for.

    Attributes:
        requests: how many.
        arrivals: when.
        prompts, outputs: tokens of each; not used where there are ``texts``.
        texts: one of them is drawn for each request; texts that are the same share their beginning.
        groups: of requests whose prompts begin alike; 0: none does.
        shared: tokens that the prompts of a group begin with.
        zipf: groups are asked for by 1 / rank ** zipf; 0: all as often.
        in_order: ``texts`` are taken one after the other, not drawn.
    """

    requests: int
    arrivals: Arrivals
    prompts: Lengths = USUAL_PROMPTS
    outputs: Lengths = USUAL_OUTPUTS
    texts: tuple[Text, ...] = ()
    groups: int = 0
    shared: int = 0
    zipf: float = 0.0
    in_order: bool = False


@dataclass(frozen=True)
class Requests:
    """Requests as columns.

    Attributes:
        arrives: seconds; empty in a closed loop.
        prompt, output: tokens.
        trace: a number that picks one of the traces of acceptance.
        group: of those that begin alike; -1: of none.
        shared: tokens that it begins with as its group does.
    """

    arrives: np.ndarray
    prompt: np.ndarray
    output: np.ndarray
    trace: np.ndarray
    group: np.ndarray
    shared: np.ndarray

    def __len__(self) -> int:
        return len(self.prompt)

    @classmethod
    def of(cls, load: Load, seed: int = 0) -> Requests:
        """The same for the same seed."""
        if load.requests < 1:
            raise UsageError(f"requests: {load.requests} is not allowed; must be at least 1")
        count = load.requests
        streams = np.random.SeedSequence(seed).spawn(3)
        when, lengths, who = (np.random.default_rng(stream) for stream in streams)
        arrives = load.arrivals.draw(count, when)
        if load.texts:
            if load.in_order:
                drawn = np.arange(count) % len(load.texts)
            else:
                drawn = lengths.integers(0, len(load.texts), count)
            prompt, output, trace = np.array(load.texts, np.int64)[drawn].T
        else:
            drawn = np.full(count, -1)
            prompt, output = load.prompts.draw(count, lengths), load.outputs.draw(count, lengths)
            trace = lengths.integers(0, 1 << 30, count)
        group, shared = drawn, np.where(drawn >= 0, prompt, 0)
        if load.groups > 0:
            weights = 1 / np.arange(1, load.groups + 1) ** load.zipf
            group = who.choice(load.groups, count, p=weights / weights.sum())
            shared = np.full(count, load.shared)
            prompt = prompt + load.shared
        return cls(arrives, prompt, output, trace, group, shared)
