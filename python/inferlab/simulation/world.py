"""What replicas share: the requests, what became of them, and how steps go."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

from inferlab.errors import UsageError
from inferlab.simulation.acceptance import Acceptance
from inferlab.simulation.drafting import Drafting
from inferlab.simulation.load import Requests
from inferlab.simulation.prices import Prices
from inferlab.simulation.setting import Setting

NEVER = math.inf


@dataclass
class Tally:
    """What a replica, or several together, did.

    Attributes:
        busy_s: seconds in which there was a step.
        steps: of the engine.
        walks: of single sequences: each decoding step counts once for each of its batch.
        tokens: new ones of texts that have ended.
        ended: texts.
        read: tokens of texts that were read.
        shared: tokens of prompts that lay in shared pages.
        waited_s: of all requests together, from their arrival until they were given pages.
        longest_queue: requests that waited.
        page_s: pages in use, times seconds.
        most_pages: that were in use.
        preempted: requests that lost their pages.
    """

    busy_s: float = 0.0
    steps: int = 0
    walks: int = 0
    tokens: int = 0
    ended: int = 0
    read: int = 0
    shared: int = 0
    waited_s: float = 0.0
    longest_queue: int = 0
    page_s: float = 0.0
    most_pages: float = 0.0
    preempted: int = 0

    def add(self, other: Tally) -> None:
        """Sums; of what is a largest the larger."""
        for name, value in vars(other).items():
            mine = getattr(self, name)
            largest = name in ("longest_queue", "most_pages")
            setattr(self, name, max(mine, value) if largest else mine + value)


class World:
    """One run.

    Attributes:
        pages, read_beside: of each replica.
        prompt, output, trace, group, shared: of each request, see `Requests`.
        queued: when each began to wait, in seconds.
        first, ended: when each had its first and its last token; `NEVER`: not yet.
    """

    def __init__(
        self, requests: Requests, setting: Setting, acceptance: Acceptance, prices: Prices
    ) -> None:
        self.setting, self.acceptance, self.prices = setting, acceptance, prices
        self.drafting = Drafting(setting, acceptance, prices)
        self.read_beside = setting.read_beside or prices.costs.read_at_once()
        self.prompt: list[int] = requests.prompt.tolist()
        self.output: list[int] = requests.output.tolist()
        self.trace: list[int] = (requests.trace % acceptance.traces).tolist()
        self.group: list[int] = requests.group.tolist()
        self.shared: list[int] = requests.shared.tolist()
        count = len(requests)
        self.queued = [0.0] * count
        self.first = [NEVER] * count
        self.ended = [NEVER] * count
        longest = int((requests.prompt + requests.output).max()) + setting.slots
        needed = -(-longest // setting.page_size)
        self.pages = setting.pages or 2 * setting.max_batch * needed
        if needed > self.pages:
            raise UsageError(
                f"pages: a request needs {needed} of {setting.page_size} tokens, a replica has "
                f"{self.pages}; give more, or shorter texts"
            )


class Replica(ABC):
    """Decodes what it is given, a step (or several alike) at a time.

    Attributes:
        at: when what it does now ends; `NEVER`: it has nothing to do.
    """

    def __init__(self) -> None:
        self.at = NEVER
        self.tally = Tally()

    @abstractmethod
    def add(self, request: int, now: float) -> None:
        """Gives it a request; ``at`` may change."""

    @abstractmethod
    def fire(self) -> list[int]:
        """Ends what it does now and begins what comes next; the requests that have ended."""
