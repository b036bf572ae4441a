"""What a server allows."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from inferlab.errors import UsageError
from inferlab.types import check


@dataclass(frozen=True)
class ServerSettings:
    """Limits and names of a server.

    Args:
        model_name: under which the target is served; None: its own.
        api_keys: any of them opens everything; none: all is open.
        max_body_bytes: of a request's body; larger ones are refused before they are read.
        max_waiting: requests that may wait beside a full batch, choices of one counted apart.
        max_choices: the largest ``n``, prompts of one request multiplied.
        request_seconds: how long a request may take, waiting included; None: as long as it takes.
        drain_seconds: how long requests may go on once the server is told to end.
    """

    model_name: str | None = None
    api_keys: tuple[str, ...] = ()
    max_body_bytes: int = 4 * 2**20
    max_waiting: int = 1024
    max_choices: int = 128
    request_seconds: float | None = None
    drain_seconds: float = 30.0

    def __post_init__(self) -> None:
        for name in ("max_body_bytes", "max_waiting", "max_choices"):
            check(name, getattr(self, name), getattr(self, name) >= 1, "an integer >= 1")
        check("drain_seconds", self.drain_seconds, self.drain_seconds >= 0, "a number >= 0")
        seconds = self.request_seconds
        check("request_seconds", seconds, seconds is None or seconds > 0, "a number > 0, or None")
        check("api_keys", "", all(self.api_keys), "without empty ones")


def read_keys(path: str | Path) -> tuple[str, ...]:
    """The API keys of a file. Raises UsageError where there are none."""
    try:
        keys = tuple(Path(path).read_text().split())
    except OSError as error:
        raise UsageError(f"--api-key-file: {error}") from error
    if not keys:
        raise UsageError(f"--api-key-file: {path} is empty; give a key a line")
    return keys
