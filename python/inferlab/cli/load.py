"""`inferlab bench --mode http` with a flag of a load: many requests at a time on a server."""

from __future__ import annotations

import argparse
import logging
import os
from collections.abc import Sequence
from typing import Any

import httpx

from inferlab.benchmarks.names import HTTP_SEED
from inferlab.cli import ping
from inferlab.cli.bench_output import BenchOutput
from inferlab.cli.flags import given_values
from inferlab.cli.load_flags import (
    arrivals_of,
    budget_of,
    check_combinations,
    check_numbers,
    extra_body_of,
    slos_of,
    value_of,
)
from inferlab.cli.parser import EXIT_FAILURE, EXIT_INTERRUPTED, EXIT_OK
from inferlab.cli.prompts import gather_workload
from inferlab.cli.terminal import progress, setup_logging
from inferlab.client.connection import split_base_url
from inferlab.client.ping import VLLMPingClient, load_server_config
from inferlab.client.proxies import proxy_for, proxy_variable
from inferlab.config import VllmConfig
from inferlab.errors import UsageError
from inferlab.lengths import Lengths
from inferlab.load.arrivals import Arrivals
from inferlab.load.conversations import Conversation, Turn
from inferlab.load.measure import Measured, measure_load
from inferlab.load.outputs import LoadStats, SweepLevel
from inferlab.load.plan import Asking, LoadPlan, TimeLimits
from inferlab.load.prompt_sets import read_conversations
from inferlab.load.rows import load_csv
from inferlab.load.sweep import sweep
from inferlab.load.synthetic import Synthetic, Writer, make_conversations
from inferlab.records import RequestRecord

logger = logging.getLogger(__name__)

FLAGS = {
    **ping.FLAGS,
    "--max-tokens": "max_tokens",
    "--temperature": "temperature",
    "--seed": "seed",
    "--warmup": "warmup_iterations",
}
"""Flag -> key of the configuration."""

USUAL_SYNTHETIC = 64
"""Synthetic conversations that are made where no number of them is given."""


def refuse_misplaced(args: argparse.Namespace, flag: str) -> None:
    """Refuses a load outside ``--mode http``, and what has no meaning in one."""
    if args.mode != "http":
        mode = args.mode or "local"
        raise UsageError(f"{flag}: has no meaning in --mode {mode}, only in http")
    for other, remedy in (
        ("--iterations", "--requests says how many conversations are begun"),
        ("--batch", "--concurrency says how many run at a time"),
        ("--modes", "it compares local decoding"),
        ("--quantization-matrix", "it compares local decoding"),
        ("--peers", "they decode here, and no server is asked"),
    ):
        if value_of(args, other):
            raise UsageError(f"{other}: has no meaning with {flag}; {remedy}")


def run(args: argparse.Namespace) -> int:
    """Runs a load or a sweep. 1: more failed than the error budget allows; 130: interrupted."""
    check_numbers(args)
    check_combinations(args)
    overrides, names = given_values(args, FLAGS)
    config = load_server_config(args.config, overrides, names)
    how_slos, budget = slos_of(args), budget_of(args)
    output = BenchOutput(args, load_csv)
    setup_logging(config.log_level, args.verbose)
    tokenizer = None if args.tokenizer is None else (_tokenizer(args.tokenizer), args.tokenizer)
    conversations = _conversations(args, tokenizer)
    asking, proxy = _asking(args, config)
    plan = _plan(args, asking, config, conversations)
    how = Measured(
        processes=args.processes or 1, slos=how_slos, budget=budget, tokenizer=tokenizer,
        proxy=proxy,
    )  # fmt: skip
    with output:
        stats = _measure(args, plan, how, output.keep)
        output.done(stats)
    if stats["interrupted"]:
        return EXIT_INTERRUPTED
    loads: Sequence[LoadStats] = stats["loads"] if args.sweep is not None else [stats]
    return EXIT_OK if all(load["within_budget"] for load in loads) else EXIT_FAILURE


def _tokenizer(name: str) -> Any:
    from inferlab.models.loading import load_tokenizer  # takes seconds, and few loads need one

    return load_tokenizer(name)


def _measure(args: argparse.Namespace, plan: LoadPlan, how: Measured, keep: Any) -> Any:
    """A load's or a sweep's results; ``keep`` gets each record as JSON types."""
    if args.sweep is not None:
        return sweep(
            plan,
            how,
            stop_below_gain=args.sweep / 100,
            keep=lambda record: keep(record.as_json()),
            on_level=_log_level,
        )
    show_bar = plan.count is not None and not (args.no_progress or args.json)
    turns = [len(conversation.turns) for conversation in plan.conversations]
    rounds, rest = divmod(plan.count or 0, len(turns))
    total = rounds * sum(turns) + sum(turns[:rest])
    with progress(total, "requests", show_bar) as advance:

        def take(record: RequestRecord) -> None:
            keep(record.as_json())
            advance(1)

        return measure_load(plan, how, take)


def _log_level(row: SweepLevel) -> None:
    tokens = row["output_tokens_per_s"]
    logger.info(
        "level %g: %.4g requests/s%s",
        row["level"],
        row["requests_per_s"],
        "" if tokens is None else f", {tokens:.4g} tokens/s",
    )


def _plan(
    args: argparse.Namespace,
    asking: Asking,
    config: VllmConfig,
    conversations: Sequence[Conversation],
) -> LoadPlan:
    arrivals = arrivals_of(args)
    count = args.requests
    if args.trace is not None:
        times = tuple(conversation.at_s for conversation in conversations)
        if None in times:
            raise UsageError(f"--trace: {args.trace} has no times; give --conversations")
        arrivals = Arrivals("trace", at_s=times)  # type: ignore[arg-type]
        count = min(count or len(times), len(times))
    elif count is None and args.duration is None:
        count = len(conversations)
    concurrency = args.concurrency
    if arrivals.kind == "closed":
        concurrency = concurrency or 1
    if concurrency is not None and (args.processes or 1) > concurrency:
        raise UsageError(
            f"--processes: {args.processes} is not allowed; at most one for each of the "
            f"{concurrency} of --concurrency"
        )
    return LoadPlan(
        asking=asking,
        arrivals=arrivals,
        conversations=tuple(conversations),
        count=count,
        duration_s=args.duration,
        concurrency=concurrency,
        warmup=config.warmup_iterations,
    )


def _conversations(
    args: argparse.Namespace, tokenizer: tuple[Any, str] | None
) -> list[Conversation]:
    seed = args.load_seed or 0
    writer = None
    if tokenizer is not None and (args.synthetic is not None or args.trace is not None):
        writer = Writer(tokenizer[0], tokenizer[1], seed)
    if args.synthetic is not None:
        assert writer is not None
        return make_conversations(_synthetic(args), writer)
    if (path := args.conversations or args.trace) is not None:
        return read_conversations(path, args.conversations_kind, writer=writer)
    if (args.prompt, args.prompts, args.heldout) == (None, None, None):
        raise UsageError(
            "what is sent is missing; give --conversations, --prompt, --prompts, --heldout, "
            "--synthetic or --trace"
        )
    prompts = gather_workload(args)
    return [
        Conversation((Turn(prompt.text),), prompt.id, prompt.category, where=prompt.where)
        for prompt in prompts
    ]


def _synthetic(args: argparse.Namespace) -> Synthetic:
    inputs, _, outputs = args.synthetic.partition(",")
    prefix, groups = 0, 0
    if args.shared_prefix is not None:
        tokens, _, number = args.shared_prefix.partition(":")
        try:
            prefix, groups = int(tokens), int(number or 1)
        except ValueError:
            prefix = 0
        if prefix < 1 or groups < 1:
            raise UsageError(
                f"--shared-prefix: {args.shared_prefix!r} is not allowed; must be TOKENS or "
                "TOKENS:GROUPS, 512:4"
            )
    return Synthetic(
        conversations=args.requests or USUAL_SYNTHETIC,
        inputs=Lengths.parse(inputs, "--synthetic"),
        outputs=Lengths.parse(outputs, "--synthetic"),
        turns=args.turns or 1,
        groups=groups,
        prefix=prefix,
    )


def _asking(args: argparse.Namespace, config: VllmConfig) -> tuple[Asking, str | None]:
    """(whom to ask and how, the variable that names the proxy on the way)."""
    root_url, api_url = split_base_url(config.url)
    url = httpx.URL(root_url)
    proxy = proxy_for(url)
    if proxy is not None and proxy.url.scheme not in ("http", "https"):
        raise UsageError(
            f"{proxy_variable(url)}: a load does not go through {proxy.url.scheme} proxies; give "
            "an http one, or except the server by NO_PROXY"
        )
    asking = Asking(
        url=root_url,
        api_url=api_url,
        endpoint=config.endpoint,
        model=_model(config),
        max_tokens=config.max_tokens,
        temperature=config.temperature,
        seed=config.seed if config.seed is not None else HTTP_SEED,
        extra=extra_body_of(args),
        api_key=config.api_key or os.environ.get("OPENAI_API_KEY") or None,
        limits=TimeLimits(
            connect_s=args.connect_timeout or TimeLimits.connect_s,
            first_token_s=args.first_token_timeout,
            stall_s=args.stall_timeout,
            total_s=config.timeout,
        ),
        retries=args.retries or 0,
        retry_delay_s=config.retry_delay,
        proxy=None if proxy is None else _with_password(proxy),
    )
    return asking, None if proxy is None else proxy_variable(url)


def _model(config: VllmConfig) -> str | None:
    """The one given; else the first that the server lists, where it lists one."""
    if "model" in config.model_fields_set:
        return config.model
    with VLLMPingClient(config=config.model_copy(update={"retry_attempts": 1})) as client:
        listed = client.get_models()
    return next(iter(listed.get("model_ids", ())), None)


def _with_password(proxy: httpx.Proxy) -> str:
    if proxy.auth is None:
        return str(proxy.url)
    name, password = proxy.auth
    return str(proxy.url.copy_with(username=name, password=password))
