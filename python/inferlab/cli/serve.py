"""`inferlab serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path

from inferlab.cli.flags import add_config_argument, add_log_arguments
from inferlab.cli.parser import EXIT_OK
from inferlab.cli.specdec_flags import (
    add_model_arguments,
    add_sampling_arguments,
    add_speculation_arguments,
    given_overrides,
)
from inferlab.cli.terminal import setup_logging
from inferlab.config import SpecdecConfig, load_config
from inferlab.errors import UsageError

log = logging.getLogger(__name__)


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab serve``."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="(127.0.0.1: this machine alone)")
    group.add_argument("--port", type=int, default=8000, help="0 takes a free one (8000)")
    group.add_argument("--served-model-name", metavar="NAME", help="(that of the target)")
    group.add_argument(
        "--api-key-file", metavar="FILE", help="keys, a line each, one of which clients must send"
    )
    group.add_argument(
        "--max-waiting", type=int, default=1024, metavar="N", help="requests that may queue (1024)"
    )
    group.add_argument(
        "--max-body-mb", type=float, default=4.0, metavar="MB", help="of a request's body (4)"
    )
    group.add_argument(
        "--max-choices", type=int, default=128, metavar="N", help="prompts x n of a request (128)"
    )
    group.add_argument(
        "--request-seconds", type=float, metavar="S", help="how long a request may take (no limit)"
    )
    group.add_argument(
        "--drain-seconds",
        type=float,
        default=30.0,
        metavar="S",
        help="how long requests may go on after SIGTERM (30)",
    )
    group.add_argument(
        "--no-prefix-sharing",
        action="store_true",
        help="read each text anew, however it begins (texts share what they begin with)",
    )
    add_config_argument(parser, "configs/specdec.yaml")
    add_model_arguments(parser)
    add_speculation_arguments(parser)
    add_sampling_arguments(parser)
    add_log_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab serve`` until SIGTERM or Ctrl-C."""
    overrides, names = given_overrides(args)
    config = load_config(SpecdecConfig, args.config, overrides, names=names)
    if args.no_prefix_sharing or "share_prefixes" not in config.model_fields_set:
        config = config.model_copy(update={"share_prefixes": not args.no_prefix_sharing})
    setup_logging(config.log_level, args.verbose or config.verbose)
    if not 0 <= args.port < 2**16:
        raise UsageError(f"--port: {args.port} is not allowed; must be from 0 to 65535")
    keys = _keys(args.api_key_file)
    try:
        from inferlab.server.app import create_app
        from inferlab.server.serving import serve
        from inferlab.server.settings import ServerSettings
    except ImportError as error:
        raise UsageError(
            f"serving needs {error.name}; install the extra: pip install 'llm-inference-lab[serve]'"
        ) from error
    from inferlab.specdec.pipeline import SpeculativePipeline

    settings = ServerSettings(
        model_name=args.served_model_name,
        api_keys=keys,
        max_body_bytes=int(args.max_body_mb * 2**20),
        max_waiting=args.max_waiting,
        max_choices=args.max_choices,
        request_seconds=args.request_seconds,
        drain_seconds=args.drain_seconds,
    )
    pipeline = SpeculativePipeline(config=config)
    app = create_app(pipeline, settings)

    def ready(host: str, port: int) -> None:
        where = f"[{host}]" if ":" in host else host
        log.info("serving %s on http://%s:%d", app.state.service.model, where, port)

    serve(app, args.host, args.port, drain_seconds=settings.drain_seconds, ready=ready)
    return EXIT_OK


def _keys(path: str | None) -> tuple[str, ...]:
    if path is None:
        return ()
    try:
        keys = tuple(Path(path).read_text().split())
    except OSError as error:
        raise UsageError(f"--api-key-file: {error}") from error
    if not keys:
        raise UsageError(f"--api-key-file: {path} is empty; give a key a line")
    return keys
