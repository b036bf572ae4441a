"""What the next step is to do."""

from __future__ import annotations

from dataclasses import dataclass, field

from inferlab.scheduler.request import Request


@dataclass(frozen=True)
class Chunk:
    """Tokens [start, stop) of a request, to be read in one forward.

    Attributes:
        root: these are the last before the root, which rides along with its tree of one node.
    """

    request: Request
    start: int
    stop: int
    root: bool = False


@dataclass(frozen=True)
class Plan:
    """A step: some texts are read on, those that were read before decode.

    Attributes:
        preempted: requests that lost their pages since the plan before.
        grown: whether a request that was admitted before has got more pages.
        admitted: requests that were given pages, new ones and such as were preempted.
        chunks: what is to be read.
        decode: who drafts and verifies: all that were read up to their roots before. Those whose
            text the chunks complete get their token from the same forward.
    """

    preempted: list[Request] = field(default_factory=list)
    grown: bool = False
    admitted: list[Request] = field(default_factory=list)
    chunks: list[Chunk] = field(default_factory=list)
    decode: list[Request] = field(default_factory=list)

    @property
    def started(self) -> list[Request]:
        """Whose text the chunks complete."""
        return [chunk.request for chunk in self.chunks if chunk.root]
