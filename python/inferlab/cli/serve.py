"""`inferlab serve`: an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import logging
import math
from functools import partial

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
from inferlab.machine import usable_cores

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
    _add_replica_arguments(parser)
    add_config_argument(parser, "configs/specdec.yaml")
    add_model_arguments(parser)
    add_speculation_arguments(parser)
    add_sampling_arguments(parser)
    add_log_arguments(parser)


def _add_replica_arguments(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("replicas, by Ray Serve")
    group.add_argument(
        "--replicas", type=int, metavar="N", help="how many; with --max-replicas: at least"
    )
    group.add_argument(
        "--max-replicas", type=int, metavar="N", help="as many as load asks for, up to N"
    )
    group.add_argument(
        "--target-ongoing-requests",
        type=float,
        metavar="N",
        help="at each replica, from which on there should be more of them (a batch)",
    )
    group.add_argument(
        "--cpus-per-replica",
        type=float,
        metavar="N",
        help="cores and threads of each (this machine's cores / replicas; 1 with --ray-address)",
    )
    group.add_argument(
        "--gpus-per-replica", type=float, metavar="N", help="(1 where there are GPUs, else 0)"
    )
    group.add_argument(
        "--ray-address", metavar="ADDRESS", help="a cluster to run on (one of its own, here)"
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab serve`` until SIGTERM or Ctrl-C."""
    overrides, names = given_overrides(args)
    config = load_config(SpecdecConfig, args.config, overrides, names=names)
    if args.no_prefix_sharing or "share_prefixes" not in config.model_fields_set:
        config = config.model_copy(update={"share_prefixes": not args.no_prefix_sharing})
    setup_logging(config.log_level, args.verbose or config.verbose)
    if not 0 <= args.port < 2**16:
        raise UsageError(f"--port: {args.port} is not allowed; must be from 0 to 65535")
    many = _wants_replicas(args)
    try:
        from inferlab.server.settings import ServerSettings, read_keys

        if many:
            from inferlab.server.replicas.options import Scale
            from inferlab.server.replicas.process import serve_replicas
        else:
            from inferlab.server.app import create_app
            from inferlab.server.serving import serve
    except ImportError as error:
        extra = "ray" if many else "serve"
        raise UsageError(
            f"serving needs {error.name}; install the extra: "
            f"pip install 'llm-inference-lab[{extra}]'"
        ) from error
    settings = ServerSettings(
        model_name=args.served_model_name,
        api_keys=() if args.api_key_file is None else read_keys(args.api_key_file),
        max_body_bytes=int(args.max_body_mb * 2**20),
        max_waiting=args.max_waiting,
        max_choices=args.max_choices,
        request_seconds=args.request_seconds,
        drain_seconds=args.drain_seconds,
    )

    def ready(model: str, host: str, port: int) -> None:
        where = f"[{host}]" if ":" in host else host
        log.info("serving %s on http://%s:%d", model, where, port)

    if many:
        scale = Scale(
            replicas=args.replicas,
            max_replicas=args.max_replicas,
            target_ongoing_requests=args.target_ongoing_requests,
            num_cpus=_cpus(args),
            num_gpus=_gpus(args, config),
        )
        named = partial(ready, settings.model_name or config.base_model)
        address = args.ray_address
        serve_replicas(
            config, settings, scale, args.host, args.port, ray_address=address, ready=named
        )
        return EXIT_OK

    from inferlab.specdec.pipeline import SpeculativePipeline

    app = create_app(SpeculativePipeline(config=config), settings)
    named = partial(ready, app.state.service.model)
    serve(app, args.host, args.port, drain_seconds=settings.drain_seconds, ready=named)
    return EXIT_OK


def _wants_replicas(args: argparse.Namespace) -> bool:
    """Whether Ray serves. Raises UsageError for values that are not allowed."""
    if args.replicas is None:
        for name in ("max_replicas", "target_ongoing_requests", "cpus_per_replica"):
            _refuse_without_replicas(args, name)
        for name in ("gpus_per_replica", "ray_address"):
            _refuse_without_replicas(args, name)
        return False
    for name, least in (("replicas", 1), ("max_replicas", args.replicas)):
        value = getattr(args, name)
        if value is not None and value < least:
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag}: {value} is not allowed; must be at least {least}")
    for name, may_be_zero in (
        ("target_ongoing_requests", False),
        ("cpus_per_replica", False),
        ("gpus_per_replica", True),
    ):
        value = getattr(args, name)
        if value is not None and not (value > 0 or (may_be_zero and value == 0)):
            flag = "--" + name.replace("_", "-")
            raise UsageError(f"{flag}: {value} is not allowed; must be positive")
    return True


def _refuse_without_replicas(args: argparse.Namespace, name: str) -> None:
    if getattr(args, name) is not None:
        raise UsageError(f"--{name.replace('_', '-')} goes with --replicas; give that, too")


def _cpus(args: argparse.Namespace) -> float:
    """Cores of a replica. Ray takes whole numbers, or parts of one."""
    if args.cpus_per_replica is not None:
        return float(args.cpus_per_replica)
    if args.ray_address is not None:
        return 1.0
    cores = usable_cores() or 1
    most = args.max_replicas or args.replicas
    return float(cores // most) if cores >= most else math.floor(1000 * cores / most) / 1000


def _gpus(args: argparse.Namespace, config: SpecdecConfig) -> float:
    if args.gpus_per_replica is not None:
        return float(args.gpus_per_replica)
    import torch

    on_gpus = config.device.startswith(("auto", "cuda")) and torch.cuda.is_available()
    return float(config.tensor_parallel or 1) if on_gpus else 0.0
