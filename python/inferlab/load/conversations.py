"""What a load sends: conversations, each of one turn or more."""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True)
class Turn:
    """What a user says; ``max_tokens`` bounds the answer to it (None: as the load has it)."""

    text: str
    max_tokens: int | None = None


@dataclass(frozen=True)
class Conversation:
    """Turns of a user, sent one after the other: each when the one before it was answered.

    ``id`` and ``category`` are the set's, where it has them; ``system`` goes in front of the
    first turn as a system message; ``where`` is its place, ``FILE:LINE``, for messages;
    ``at_s`` is the second after the start at which a trace sends it (None: no trace).
    """

    turns: tuple[Turn, ...]
    id: str | int | None = None
    category: str | None = None
    system: str | None = None
    where: str | None = field(default=None, compare=False)
    at_s: float | None = None
