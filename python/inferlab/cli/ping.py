"""`inferlab ping`: try an OpenAI-compatible server."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Mapping
from typing import Any

from typing_extensions import TypedDict

from inferlab.cli.flags import add_config_argument, add_log_arguments, given_values
from inferlab.cli.parser import EXIT_FAILURE, EXIT_OK
from inferlab.cli.terminal import clean_stdout, setup_logging
from inferlab.client.ping import PATHS, VLLMPingClient, load_server_config
from inferlab.client.results import PingAnswer, PingFailure
from inferlab.errors import UsageError
from inferlab.output import print_json


class Up(TypedDict):
    """The JSON of ``--ping-only``."""

    success: bool
    server: str


class AnswerOutput(PingAnswer):
    """The JSON of an answer."""

    server: str


class FailureOutput(PingFailure):
    """The JSON of a failure."""

    server: str


Output = AnswerOutput | FailureOutput | Up

FLAGS = {
    "--host": "host", "--port": "port", "--base-url": "base_url", "--api-key": "api_key",
    "--model": "model", "--endpoint": "endpoint", "--timeout": "timeout",
    "--log-level": "log_level",
}  # fmt: skip


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab ping``."""
    parser.add_argument("--prompt", metavar="TEXT", help="the prompt to send")
    parser.add_argument("--ping-only", action="store_true", help="only ask whether it is up")
    add_server_arguments(parser)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="new tokens at most")
    parser.add_argument("--temperature", type=float, metavar="T", help="0 is greedy")
    parser.add_argument("--seed", type=int, metavar="N", help="sampling seed of the request")
    parser.add_argument("--stream", action="store_true", help="stream, and measure TTFT and TPOT")
    add_config_argument(parser, "configs/vllm.yaml")
    parser.add_argument(
        "--json", action="store_true", help="print the result as JSON, nothing else, on stdout"
    )
    add_log_arguments(parser)


def add_server_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags that name a server and how to ask it; ``inferlab bench`` has them, too."""
    group = parser.add_argument_group("server")
    group.add_argument("--host", help="host name or IP address (default 127.0.0.1)")
    group.add_argument("--port", type=int, help="port (default 8000)")
    group.add_argument("--base-url", metavar="URL", help="whole address, instead of host and port")
    group.add_argument("--api-key", metavar="KEY", help="bearer token (default: $OPENAI_API_KEY)")
    group.add_argument("--model", help="model to ask (default: the first that the server lists)")
    group.add_argument("--endpoint", choices=tuple(PATHS), help="API to use (default chat)")
    group.add_argument("--timeout", type=float, metavar="S", help="seconds per request")


def run(args: argparse.Namespace) -> int:
    """Pings the server and, unless ``--ping-only``, asks it once. Exit code 1: it failed."""
    if args.prompt is None and not args.ping_only:
        raise UsageError("--prompt is missing; give a text, or --ping-only")
    overrides, names = given_values(args, FLAGS)
    config = load_server_config(args.config, overrides, names)
    with VLLMPingClient(config=config) as client, clean_stdout(args.json) as out:
        setup_logging(client.config.log_level, args.verbose)
        if args.ping_only:
            result: dict[str, Any] = {"success": client.ping(), "server": client.base_url}
            text = f"{client.base_url} is up"
        else:
            result = client.generate(
                args.prompt,
                max_tokens=args.max_tokens,
                temperature=args.temperature,
                seed=args.seed,
                stream=args.stream,
            )
            result["server"] = client.base_url
            text = result.get("generated_text", "")
        if args.json:
            print_json(result, out)
        elif result["success"]:
            print(text, file=out)
            if not args.ping_only:
                print(_summary(result), file=sys.stderr)
        elif not args.ping_only:  # ping() has logged its reason
            print(f"error: {result['error']}", file=sys.stderr)
        return EXIT_OK if result["success"] else EXIT_FAILURE


def _summary(result: Mapping[str, Any]) -> str:
    parts = [
        f"{result['model']}: {result['tokens_generated']} tokens "
        f"(counted by {result['tokens_counted_by']})",
        f"{result['latency_ms']:.1f} ms",
        f"{result['tokens_per_second']:.1f} tok/s",
    ]
    if result.get("ttft_ms") is not None:
        parts.append(f"TTFT {result['ttft_ms']:.1f} ms")
    if result.get("tpot_ms") is not None:
        parts.append(f"TPOT {result['tpot_ms']:.2f} ms")
    return ", ".join(parts)
