"""`inferlab serve --replicas`: the application on a Ray of its own, or on one that is there."""

from __future__ import annotations

import logging
import signal
import socket
import threading
from collections.abc import Callable, Generator
from contextlib import contextmanager, suppress
from typing import Any

import ray
from ray import serve

from inferlab.config import SpecdecConfig
from inferlab.machine import usable_cores
from inferlab.server.replicas.deployments import application
from inferlab.server.replicas.options import Scale
from inferlab.server.settings import ServerSettings

log = logging.getLogger(__name__)

NAME = "inferlab"


class _Ended(BaseException):
    """The process was told to end."""


def serve_replicas(
    config: SpecdecConfig,
    settings: ServerSettings,
    scale: Scale,
    host: str,
    port: int,
    *,
    ray_address: str | None = None,
    ready: Callable[[str, int], None] = lambda host, port: None,
) -> None:
    """Serves until SIGTERM or SIGINT; a second one does not wait for what runs.

    Args:
        port: 0 takes a free one. A Serve that runs on the cluster already keeps its own.
        ray_address: of a Ray cluster; None: one is started on this machine, and ended.
        ready: called with the address once all replicas are there.

    Raises:
        OSError: the address cannot be had.
        ConnectionError: there is no cluster at ``ray_address``.
    """
    port = _free_port(host, port)
    options: dict[str, Any] = {"address": ray_address}
    if ray_address is None:
        options = {"address": "local", "num_cpus": usable_cores(), "include_dashboard": False}
    ray.init(**options, logging_level=logging.WARNING)
    try:
        with _told_to_end():
            try:
                serve.start(proxy_location="EveryNode", http_options={"host": host, "port": port})
                serve.run(application(config, settings, scale), name=NAME, route_prefix="/")
                ready(host, port)
                threading.Event().wait()
            except _Ended:
                log.info("ending: what runs may go on for %g s", settings.drain_seconds)
            finally:
                serve.delete(NAME)
                if ray_address is None:
                    serve.shutdown()
    except _Ended:
        log.warning("ended at once")
    finally:
        ray.shutdown()


@contextmanager
def _told_to_end() -> Generator[None]:
    """Raises `_Ended` at SIGTERM and SIGINT."""

    def end(*_: object) -> None:
        raise _Ended

    numbers = (signal.SIGTERM, signal.SIGINT)
    before = [signal.signal(number, end) for number in numbers]
    try:
        yield
    finally:
        for number, handler in zip(numbers, before, strict=True):
            with suppress(ValueError):
                signal.signal(number, handler)


def _free_port(host: str, port: int) -> int:
    """The port, or a free one for 0. Raises OSError where it cannot be had."""
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    try:
        with socket.create_server((host, port), family=family) as held:
            free: int = held.getsockname()[1]
            return free
    except OSError as error:
        raise OSError(f"cannot listen on {host}:{port}: {error.strerror or error}") from error
