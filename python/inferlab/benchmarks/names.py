"""What measuring, reporting and the command line call things, and a mode's configuration."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from inferlab.client.ping import load_server_config
from inferlab.config import BaselineConfig, SpecdecConfig, VllmConfig, choices, load_config

MODES = ("local", "http", "specdec")
"""Of `BenchmarkRunner`."""
DRAFT_MODES = tuple(mode for mode in choices(SpecdecConfig, "draft_mode") if mode != "none")
"""What ``--modes all`` measures."""
PLAIN, GENERATE, SPECULATIVE = "plain", "hf", "speculative"
"""Of ways to decode: plain decoding by the engine, Hugging Face `generate`, and with drafts."""
FORWARD_ROWS = (1, 8, 32, 64)
"""Of forwards that are timed."""
PEER_TIMEOUT_S = 600.0
"""How long a peer may take for an answer."""

HTTP_SEED = 1234
"""Seed of the requests where neither flag nor file gives one: a benchmark pins its seed."""

Config = BaselineConfig | VllmConfig | SpecdecConfig


def load_mode_config(
    mode: str,
    path: str | None,
    overrides: Mapping[str, Any],
    names: Mapping[str, str] | None = None,
) -> Config:
    """The configuration of a mode; see :func:`inferlab.config.load_config`."""
    if mode == "http":
        return load_server_config(path, overrides, names)
    if mode == "local":
        return load_config(BaselineConfig, path, overrides, names=names)
    return load_config(SpecdecConfig, path, overrides, names=names)
