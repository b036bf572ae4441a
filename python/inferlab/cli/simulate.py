"""`inferlab simulate`: replicas, routing and speculation on a virtual clock."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from inferlab.cli import specdec_flags
from inferlab.cli.flags import add_config_argument, add_log_arguments, given_values
from inferlab.cli.parser import EXIT_OK
from inferlab.cli.terminal import clean_stdout, progress, show_line
from inferlab.config import MAX_DRAFT, SpecdecConfig, choices, load_config
from inferlab.errors import UsageError
from inferlab.lengths import FORMS, Lengths
from inferlab.output import print_json
from inferlab.prompts import read_prompts
from inferlab.simulation.acceptance import Acceptance, Chances
from inferlab.simulation.clock import MODELS, simulate
from inferlab.simulation.load import ARRIVALS, USUAL_OUTPUTS, USUAL_PROMPTS, Arrivals, Load, Text
from inferlab.simulation.planning import Enough, Row, cases, enough, row_of
from inferlab.simulation.prices import Overhead, Prices
from inferlab.simulation.setting import PAYS, ROUTINGS, Setting
from inferlab.simulation.sources import found, of_recording
from inferlab.simulation.summary import Objectives, summarize
from inferlab.specdec.costs import CostModel
from inferlab.specdec.recorded import read_recording

REQUESTS, ATTAIN = 1000, 0.99
PROMPT_TOKENS = str(int(USUAL_PROMPTS.first))
OUTPUT_TOKENS = str(int(USUAL_OUTPUTS.first))


class Output(TypedDict):
    """The JSON of a simulation."""

    costs: str  # where they are from
    acceptance: str
    load: dict[str, Any]
    overhead: dict[str, float]
    objectives: dict[str, float | None]
    attain: float
    seed: int
    rows: list[Row]
    enough: list[Enough]  # where there are objectives


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab simulate``."""
    parser.add_argument(
        "dir",
        metavar="DIR",
        nargs="?",
        help="of --record: what steps cost and accept, and what was asked for (else the models are "
        "measured, or their costs taken from the cache)",
    )
    parser.add_argument("--costs", metavar="FILE", help="a cost model, as the cache keeps it")
    parser.add_argument(
        "--acceptance",
        type=_chances,
        metavar="P,...",
        help="chance that a level is accepted behind the one before; the last one counts for all "
        "further ones",
    )
    _add_load(parser.add_argument_group("load"))
    _add_policies(parser.add_argument_group("policies: every combination is simulated"))
    group = parser.add_argument_group("what a server adds")
    group.add_argument("--scale", type=float, default=1.0, help="of the cost model's times (1)")
    for flag, what in (
        ("--step-ms", "to each step"),
        ("--row-ms", "to each step for each sequence"),
        ("--request-ms", "to each request"),
        ("--latency-ms", "between client and replica, both ways"),
    ):
        group.add_argument(flag, type=float, default=0.0, metavar="MS", help=f"{what} (0)")
    group = parser.add_argument_group("objectives")
    group.add_argument("--ttft", type=float, metavar="MS", help="to the first token, at most")
    group.add_argument("--tpot", type=float, metavar="MS", help="per token behind it, at most")
    group.add_argument("--e2e", type=float, metavar="MS", help="to the last token, at most")
    group.add_argument(
        "--attain",
        type=float,
        metavar="SHARE",
        help=f"of the requests that are to be within them ({ATTAIN})",
    )
    parser.add_argument("--seed", type=int, default=0, help="of all that is drawn (0)")
    parser.add_argument(
        "--scheduler",
        choices=MODELS,
        default="auto",
        help="real: the engine's own plans each step; light: steps are counted, 50 times as fast "
        "(auto: real for up to 2000 requests)",
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON on stdout")
    parser.add_argument("--no-progress", action="store_true", help="no progress bar")
    add_log_arguments(parser)
    add_config_argument(parser, "configs/specdec.yaml")
    specdec_flags.add_model_arguments(parser)
    parser.add_argument("--draft-mode", choices=choices(SpecdecConfig, "draft_mode"))


def _add_load(group: argparse._ArgumentGroup) -> None:
    group.add_argument(
        "--rate", type=_rates, metavar="R,...", help="requests per second, of all replicas together"
    )
    group.add_argument(
        "--clients",
        type=_numbers,
        metavar="N,...",
        help="instead of a rate: so many ask, each anew when its answer has ended",
    )
    group.add_argument("--think", type=float, metavar="MS", help="of --clients, in between (0)")
    group.add_argument("--arrivals", choices=ARRIVALS, help="of --rate (poisson)")
    group.add_argument("--cv", type=float, help="of --arrivals gamma (2)")
    group.add_argument("--requests", type=int, default=REQUESTS, metavar="N", help=f"({REQUESTS})")
    group.add_argument(
        "--warm-up",
        type=float,
        default=0.0,
        metavar="SHARE",
        help="of the requests, the first, that times leave out (0)",
    )
    group.add_argument(
        "--prompt-tokens", metavar="N", help=f"{FORMS} ({PROMPT_TOKENS}, or as recorded)"
    )
    group.add_argument("--output-tokens", metavar="N", help=f"({OUTPUT_TOKENS}, or as recorded)")
    group.add_argument(
        "--prompts", metavar="FILE.jsonl", help="whose lengths are drawn from, as --base-model's"
    )
    group.add_argument("--groups", type=int, metavar="N", help="of prompts that begin alike")
    group.add_argument(
        "--prefix-tokens", type=int, metavar="N", help="which prompts of --groups begin with"
    )
    group.add_argument(
        "--zipf", type=float, metavar="S", help="groups are asked for by 1 / rank^S (0)"
    )


def _add_policies(group: argparse._ArgumentGroup) -> None:
    group.add_argument("--replicas", type=_numbers, default=[1], metavar="N,...", help="(1)")
    group.add_argument(
        "--routing",
        type=_names,
        default=["least-loaded"],
        metavar="NAME,...",
        help=f"{', '.join(ROUTINGS)} (least-loaded)",
    )
    group.add_argument(
        "--K",
        type=_levels,
        metavar="N,...",
        help=f"levels drafted per step, 0: none, {PAYS}: what pays by the cost model at the batch "
        f"there is (0,{PAYS} where acceptance is known)",
    )
    group.add_argument("--max-k", type=int, default=8, metavar="N", help=f"of --K {PAYS} (8)")
    group.add_argument("--max-batch", type=_numbers, default=[32], metavar="N,...", help="(32)")
    group.add_argument(
        "--read-tokens",
        type=_numbers,
        default=[512],
        metavar="N,...",
        help="of texts that a step reads (512)",
    )
    group.add_argument(
        "--pages", type=int, metavar="N", help="of a replica (twice what a full batch needs)"
    )
    group.add_argument("--page-size", type=int, default=16, metavar="N", help="in tokens (16)")
    group.add_argument("--no-prefix-sharing", action="store_true", help="read each text anew")
    group.add_argument(
        "--bound",
        type=float,
        default=1.25,
        metavar="F",
        help="of --routing prefix: a replica takes its groups' requests up to so many times the "
        "mean load (1.25)",
    )


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab simulate``; returns the exit code."""
    _check(args)
    overhead = Overhead(args.scale, args.step_ms, args.row_ms, args.request_ms, args.latency_ms)
    with clean_stdout(args.json) as out:
        prices, acceptance, texts, origin = _source(args, overhead)
        load = _load(args, texts)
        setting = Setting(
            max_k=args.max_k,
            pages=args.pages,
            page_size=args.page_size,
            shares=not args.no_prefix_sharing,
            bound=args.bound,
        )
        levels = args.K or ([0] if acceptance is None else [0, PAYS])
        acceptance = acceptance or Chances([0.0])
        compared = list(
            cases(
                load,
                setting,
                **({"rate": args.rate} if args.rate else {"clients": args.clients}),
                replicas=args.replicas,
                routing=args.routing,
                levels=levels,
                max_batch=args.max_batch,
                read_tokens=args.read_tokens,
            )
        )
        objectives = Objectives(args.ttft, args.tpot, args.e2e)
        rows: list[Row] = []
        total = len(compared) * args.requests
        with progress(total, "requests", not (args.json or args.no_progress)) as advance:
            for asked, chosen in compared:
                outcome = simulate(
                    asked,
                    chosen,
                    acceptance,
                    prices,
                    seed=args.seed,
                    model=args.scheduler,
                    advance=advance,
                )
                rows.append(row_of(asked, chosen, summarize(outcome, objectives, args.warm_up)))
        promised = any(most is not None for most in vars(objectives).values())
        attain = args.attain if args.attain is not None else ATTAIN
        output: Output = {
            "costs": origin,
            "acceptance": _describe(args, acceptance),
            "load": _describe_load(args, load),
            "overhead": vars(overhead),
            "objectives": vars(objectives),
            "attain": attain,
            "seed": args.seed,
            "rows": rows,
            "enough": enough(rows, attain) if promised else [],
        }
        if args.json:
            print_json(output, out)
        else:
            _show(output)
    return EXIT_OK


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that mean nothing together, or numbers that are not allowed."""
    if (args.rate is None) == (args.clients is None):
        raise UsageError("one of --rate and --clients is required")
    for flag, value, needs, given in (
        ("--think", args.think, "--clients", args.clients),
        ("--arrivals", args.arrivals, "--rate", args.rate),
        ("--cv", args.cv, "--arrivals gamma", args.arrivals == "gamma" or None),
        ("--prefix-tokens", args.prefix_tokens, "--groups", args.groups),
        ("--groups", args.groups, "--prefix-tokens", args.prefix_tokens),
        ("--zipf", args.zipf, "--groups", args.groups),
        ("--attain", args.attain, "--ttft, --tpot or --e2e", args.ttft or args.tpot or args.e2e),
    ):
        if value is not None and given is None:
            raise UsageError(f"{flag}: is of {needs}; give that too")
    if args.acceptance is None and args.dir is None and any(args.K or ()):
        raise UsageError(
            f"--K: {next(filter(None, args.K))} needs to know what is accepted; give "
            "--acceptance, or a recording"
        )
    if args.costs is not None and args.dir is not None and args.acceptance is not None:
        raise UsageError("--costs: beside it and --acceptance nothing of DIR is left; leave it out")
    if args.prompts is not None and args.prompt_tokens is not None:
        raise UsageError("--prompts: says how long prompts are; leave --prompt-tokens out")
    for flag, values, lowest, highest in (
        ("--replicas", args.replicas, 1, 100_000),
        ("--clients", args.clients, 1, 10_000_000),
        ("--max-batch", args.max_batch, 1, 4096),
        ("--read-tokens", args.read_tokens, 1, 1 << 20),
        ("--K", [k for k in args.K or () if k != PAYS], 0, MAX_DRAFT),
        ("--max-k", [args.max_k], 0, MAX_DRAFT),
        ("--requests", [args.requests], 1, 100_000_000),
        ("--seed", [args.seed], 0, 2**63),
        ("--groups", [] if args.groups is None else [args.groups], 1, 1 << 24),
        ("--prefix-tokens", [] if args.prefix_tokens is None else [args.prefix_tokens], 1, 1 << 20),
    ):
        for value in values or ():
            if not lowest <= value <= highest:
                raise UsageError(
                    f"{flag}: {value} is not allowed; must be from {lowest} to {highest}"
                )
    for flag, share in (("--attain", args.attain), ("--warm-up", args.warm_up)):
        if share is not None and not 0 <= share < 1:
            raise UsageError(f"{flag}: {share} is not allowed; must be from 0 to below 1")


def _source(
    args: argparse.Namespace, overhead: Overhead
) -> tuple[Prices, Acceptance | None, tuple[Text, ...], str]:
    """Prices, acceptance, recorded texts, and where the prices are from."""
    chances = None if args.acceptance is None else Chances(args.acceptance, args.seed)
    costs = None if args.costs is None else _read_costs(args.costs)
    if args.dir is not None:
        recording = read_recording(Path(args.dir))
        source = of_recording(recording, costs, overhead, args.seed)
        kept = "measured" if source.measured else "fitted to the recorded steps"
        origin = args.costs or f"{recording.folder}, {kept}"
        acceptance = source.acceptance if chances is None else chances
        return source.prices, acceptance, source.texts, origin
    if costs is None:
        costs, origin = _measured(args)
    else:
        origin = args.costs
    return Prices(costs, overhead=overhead), chances, (), origin


def _read_costs(path: str) -> CostModel:
    try:
        return CostModel.from_json(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"--costs: {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise UsageError(f"--costs: {path}: {error}") from None


def _measured(args: argparse.Namespace) -> tuple[CostModel, str]:
    """Those of the models, from the cache where they are in it."""
    from inferlab.specdec.pipeline import SpeculativePipeline

    overrides, names = given_values(args, specdec_flags.FLAGS)
    for key in ("K", "max_k", "seed"):
        overrides.pop(key, None)
    config = load_config(SpecdecConfig, args.config, overrides, names=names)
    pipeline = SpeculativePipeline(config=config)
    costs = pipeline.costs()
    if costs is None:
        raise UsageError(
            f"the context of {pipeline.target.name} or its K/V cache has no room for the texts "
            "that costs are measured on; give --costs or a recording"
        )
    drafts = f" + {pipeline.draft_name}" if pipeline.draft_name else ""
    return costs, f"{pipeline.target.name}{drafts}, {config.draft_mode} drafts"


def _load(args: argparse.Namespace, texts: tuple[Text, ...]) -> Load:
    arrivals = Arrivals(
        kind=args.arrivals or "poisson",
        cv=args.cv if args.cv is not None else 2.0,
        think_ms=args.think or 0.0,
    )
    prompts = outputs = None
    if args.prompts is not None:
        prompts = found(_token_counts(args))
    elif args.prompt_tokens is not None:
        prompts = Lengths.parse(args.prompt_tokens, "--prompt-tokens")
    if args.output_tokens is not None:
        outputs = Lengths.parse(args.output_tokens, "--output-tokens")
    if texts and (prompts or outputs or args.groups):
        prompts = prompts or found([text.prompt for text in texts])
        outputs = outputs or found([text.output for text in texts])
        texts = ()
    return Load(
        requests=args.requests,
        arrivals=arrivals,
        prompts=prompts or USUAL_PROMPTS,
        outputs=outputs or USUAL_OUTPUTS,
        texts=texts,
        groups=args.groups or 0,
        shared=args.prefix_tokens or 0,
        zipf=args.zipf or 0.0,
    )


def _token_counts(args: argparse.Namespace) -> list[int]:
    from inferlab.models.loading import load_tokenizer

    tokenizer = load_tokenizer(args.base_model or "inferlab/tiny")
    return [len(tokenizer.encode(prompt.text)) for prompt in read_prompts(args.prompts)]


def _describe(args: argparse.Namespace, acceptance: Acceptance) -> str:
    if args.acceptance is not None:
        return ", ".join(f"{chance:g}" for chance in args.acceptance)
    return "none" if isinstance(acceptance, Chances) else f"{acceptance.traces} recorded requests"


def _describe_load(args: argparse.Namespace, load: Load) -> dict[str, Any]:
    usual = ("recorded", "recorded") if args.dir else (PROMPT_TOKENS, OUTPUT_TOKENS)
    return {
        "requests": load.requests,
        "arrivals": load.arrivals.kind if args.rate else "closed",
        "cv": load.arrivals.cv if load.arrivals.kind == "gamma" else None,
        "think_ms": load.arrivals.think_ms,
        "warm_up": args.warm_up,
        "texts": len(load.texts),
        "prompt_tokens": args.prompts or args.prompt_tokens or usual[0],
        "output_tokens": args.output_tokens or usual[1],
        "groups": load.groups,
        "prefix_tokens": load.shared,
        "zipf": load.zipf,
    }


COLUMNS: tuple[tuple[str, Any], ...] = (
    ("tokens/s", lambda r: f"{r['tokens_per_second']:.0f}"),
    ("requests/s", lambda r: f"{r['requests_per_second']:.2f}"),
    ("goodput", lambda r: f"{r['goodput']:.2f}"),
    ("TTFT p50", lambda r: f"{r['ttft_ms']['p50']:.1f}"),
    ("p99", lambda r: f"{r['ttft_ms']['p99']:.1f}"),
    ("TPOT p50", lambda r: f"{r['tpot_ms']['p50']:.2f}" if r["tpot_ms"] else ""),
    ("p99", lambda r: f"{r['tpot_ms']['p99']:.2f}" if r["tpot_ms"] else ""),
    ("E2E p50", lambda r: f"{r['e2e_ms']['p50']:.0f}"),
    ("p99", lambda r: f"{r['e2e_ms']['p99']:.0f}"),
    ("busy", lambda r: f"{r['utilisation']:.0%}"),
    ("queue", lambda r: f"{r['queue']:.1f}"),
    ("batch", lambda r: f"{r['batch']:.1f}"),
    ("length", lambda r: f"{r['tokens_per_step']:.2f}"),
    ("pages", lambda r: f"{r['pages']:.0f}"),
    ("shared", lambda r: f"{r['shared']:.0%}"),
)
NAMES = {"max_batch": "max batch", "read_tokens": "read"}
POLICY = ("rate", "clients", "replicas", "routing", "K", "max_batch", "read_tokens")


def _show(output: Output) -> None:
    load = output["load"]
    show_line([f"costs: {output['costs']}", f"acceptance: {output['acceptance']}"])
    lengths = f"{load['texts']} recorded texts"
    if not load["texts"]:
        lengths = f"prompts {load['prompt_tokens']}, outputs {load['output_tokens']} tokens"
    parts = [f"{load['requests']} requests, {load['arrivals']}", lengths]
    if load["groups"]:
        parts.append(f"{load['groups']} groups that share {load['prefix_tokens']}")
    show_line([*parts, f"{output['rows'][0]['result']['model']} scheduler", "times in ms"])
    rows: list[Any] = list(output["rows"])
    varied = [n for n in POLICY if len({row[n] for row in rows}) > 1]
    named = [n for n in POLICY if n in varied or (n in ("rate", "clients", "replicas", "K"))]
    named = [n for n in named if any(row[n] is not None for row in rows)]
    columns = [c for c in COLUMNS if c[0] != "goodput" or output["enough"]]
    columns = [c for c in columns if c[0] != "shared" or any(r["result"]["shared"] for r in rows)]
    table = [[*(NAMES.get(n, n) for n in named), *(name for name, _ in columns)]]
    for row in rows:
        policy = [f"{row[n]:g}" if n == "rate" else str(row[n]) for n in named]
        table.append([*policy, *(cell(row["result"]) for _, cell in columns)])
    widths = [max(map(len, column)) for column in zip(*table, strict=True)]
    for line in table:
        print("  ".join(f"{cell:>{width}}" for cell, width in zip(line, widths, strict=True)))
    for answer in output["enough"]:
        print(_sentence(answer, varied, output["attain"]))


def _sentence(answer: Enough, varied: Sequence[str], attain: float) -> str:
    of: Any = answer
    what = f"rate {of['rate']:g}" if of["rate"] is not None else f"{of['clients']} clients"
    told = [n for n in varied if n not in ("rate", "clients", "replicas")]
    policy = "".join(f", {NAMES.get(n, n)} {of[n]}" for n in told)
    if answer["replicas"] is None:
        return f"{what}{policy}: none of these is enough for {attain:.0%} of the requests"
    noun = "replica is" if answer["replicas"] == 1 else "replicas are"
    return f"{what}{policy}: {answer['replicas']} {noun} enough for {attain:.0%} of the requests"


def _numbers(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers: 1,4,16") from None


def _rates(text: str) -> list[float]:
    try:
        rates = list(dict.fromkeys(float(part) for part in text.split(",")))
    except ValueError:
        rates = []
    if not rates or not all(0 < rate < 1e9 for rate in rates):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of rates: 10,20.5")
    return rates


def _chances(text: str) -> list[float]:
    try:
        chances = [float(part) for part in text.split(",")]
    except ValueError:
        chances = [-1.0]
    if not all(0 <= chance <= 1 for chance in chances):
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of chances: 0.8,0.7")
    return chances


def _levels(text: str) -> list[int | str]:
    try:
        return [part if part == PAYS else int(part) for part in _names(text)]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is not a list of numbers, or {PAYS}: 0,4,{PAYS}"
        ) from None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
