"""`inferlab replay`: evaluates other settings on recorded steps, without models."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from typing_extensions import TypedDict

from inferlab.cli.flags import add_log_arguments
from inferlab.cli.parser import EXIT_OK
from inferlab.cli.terminal import clean_stdout, show_line
from inferlab.config import MAX_DRAFT, MAX_TREE_NODES, SpecdecConfig, choices
from inferlab.errors import UsageError
from inferlab.output import print_json
from inferlab.specdec.cuts import REPLAYABLE, Rule
from inferlab.specdec.recorded import read_recording
from inferlab.specdec.replay import Cell, Replay, Replayed
from inferlab.specdec.replay_askers import Always, Asker, Controlled

GRID_LEVELS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
GRID_NODES = (1, 2, 4, 8, 16, 32, 64, 128, 255)
GRID_BATCHES = (1, 4, 16)


class Run(TypedDict):
    """The recorded run."""

    folder: str
    about: dict[str, Any]
    steps: int
    nodes: int
    bytes_per_node: float
    costs: str  # "measured" on the machine, or "fitted" to the recorded steps
    costs_off: float
    disagree: int  # walks that come out otherwise than recorded


class Line(TypedDict):
    """A run under one setting; ``exact`` is the share of its walks that are known exactly."""

    setting: str
    accepted_length: float
    tokens: int
    steps: int
    walks: int
    ms: float
    tokens_per_second: float
    exact: float


class Point(TypedDict):
    """A point of ``--grid``."""

    K: int
    nodes: int
    batch: int
    accepted_length: float
    tokens_per_second: float
    exact: float


class Output(TypedDict):
    """The JSON of a replay."""

    run: Run
    policy: str
    settings: list[Line]
    grid: list[Point]


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab replay``."""
    parser.add_argument(
        "dir", metavar="DIR", help="of --record: its newest run that has steps, or DIR/run-NNN"
    )
    parser.add_argument("--K", type=_numbers, metavar="N,...", help="levels drafted per step")
    parser.add_argument("--nodes", type=_numbers, metavar="N,...", help="draft nodes per step")
    parser.add_argument(
        "--policy",
        choices=choices(SpecdecConfig, "policy"),
        help="(the recorded one); rejection and typical cannot be replayed",
    )
    parser.add_argument("--tau", type=float, help="threshold of conf_threshold (0.5)")
    parser.add_argument("--k", type=int, help="of topk_agree (5)")
    parser.add_argument(
        "--controller",
        type=_names,
        metavar="NAME,...",
        help="adaptive and cost, on a virtual clock; fixed is --K",
    )
    parser.add_argument("--min-k", type=int, metavar="N", help="of the adaptive controller (1)")
    parser.add_argument(
        "--max-k",
        type=int,
        metavar="N",
        help="of the adaptive and cost controllers (as many levels as were recorded)",
    )
    parser.add_argument(
        "--target-acceptance", type=float, metavar="RATE", help="of the adaptive controller (0.7)"
    )
    parser.add_argument(
        "--grid",
        action="store_true",
        help="a table of steps in mid-decoding over --K, --nodes and --batch",
    )
    parser.add_argument(
        "--batch", type=_numbers, metavar="N,...", help="of --grid: texts decoded together (1,4,16)"
    )
    parser.add_argument("--json", action="store_true", help="print it as JSON on stdout")
    add_log_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab replay``; returns the exit code."""
    _check(args)
    replay = Replay(read_recording(Path(args.dir)))
    with clean_stdout(args.json) as out:
        rule = _rule(args, replay)
        as_it_was = replay.recorded()
        lines = [_line("recorded", as_it_was)]
        cells: list[Cell] = []
        if args.grid:
            cells = _grid(args, replay, rule)
        else:
            for name, asker in _askers(args, replay):
                lines.append(_line(name, replay.run(asker, rule)))
        recording, times = replay.recording, replay.times
        output: Output = {
            "run": {
                "folder": str(recording.folder),
                "about": recording.about,
                "steps": recording.num_steps,
                "nodes": recording.num_nodes,
                "bytes_per_node": recording.num_bytes / max(recording.num_nodes, 1),
                "costs": "measured" if times.measured else "fitted",
                "costs_off": times.off,
                "disagree": as_it_was.disagree,
            },
            "policy": _describe_rule(rule),
            "settings": lines,
            "grid": [
                {
                    "K": cell.levels,
                    "nodes": cell.nodes,
                    "batch": cell.batch,
                    "accepted_length": cell.accepted_length,
                    "tokens_per_second": cell.tokens_per_second,
                    "exact": cell.covered,
                }
                for cell in cells
            ],
        }
        if args.json:
            print_json(output, out)
        else:
            _show(output, replay)
    return EXIT_OK


def _check(args: argparse.Namespace) -> None:
    """Raises UsageError for flags that mean nothing together, or numbers that are not allowed."""
    for flag, values, lowest, highest in (
        ("--K", args.K, 0, MAX_DRAFT),
        ("--nodes", args.nodes, 1, MAX_TREE_NODES - 1),
        ("--batch", args.batch, 1, 4096),
    ):
        for value in values or ():
            if not lowest <= value <= highest:
                raise UsageError(
                    f"{flag}: {value} is not allowed; must be from {lowest} to {highest}"
                )
    if args.batch is not None and not args.grid:
        raise UsageError("--batch: is of --grid; a run is replayed in the batches it had")
    if args.grid and args.controller is not None:
        raise UsageError("--controller: has no meaning with --grid, which asks for each budget")
    for flag, value, policy in (
        ("--tau", args.tau, "conf_threshold"),
        ("--k", args.k, "topk_agree"),
    ):
        if value is not None and args.policy != policy:
            hint = "; the levels drafted are --K" if flag == "--k" else ""
            raise UsageError(f"{flag}: is of --policy {policy}; give that too{hint}")
    if args.tau is not None and not 0 <= args.tau <= 1:
        raise UsageError(f"--tau: {args.tau} is not allowed; must be from 0 to 1")
    if args.k is not None and args.k < 1:
        raise UsageError(f"--k: {args.k} is not allowed; must be at least 1")
    names = args.controller or []
    for name in names:
        if name == "fixed":
            raise UsageError("--controller: fixed is what --K asks for; give --K N")
        if name not in ("adaptive", "cost"):
            raise UsageError(f"--controller: {name!r} is unknown; known are adaptive and cost")
    for flag, value, of in (
        ("--min-k", args.min_k, ["adaptive"]),
        ("--max-k", args.max_k, ["adaptive", "cost"]),
        ("--target-acceptance", args.target_acceptance, ["adaptive"]),
    ):
        if value is not None and not set(of) & set(names):
            raise UsageError(f"{flag}: is of --controller {' or '.join(of)}; give that too")


def _rule(args: argparse.Namespace, replay: Replay) -> Rule:
    """Who accepts. A recorded policy that cannot be replayed is refused where it would have to."""
    if args.policy == "conf_threshold":
        return Rule("conf_threshold", 0.5 if args.tau is None else args.tau)
    if args.policy == "topk_agree":
        return Rule("topk_agree", 5 if args.k is None else args.k)
    if args.policy is not None:
        return Rule(args.policy).check()
    asked = args.grid or args.K or args.nodes or args.controller
    if asked and replay.rule.policy not in REPLAYABLE:
        raise UsageError(
            f"--policy: the run was recorded under {replay.rule.policy}, which can only be "
            f"replayed as it was; give --policy {' or '.join(REPLAYABLE)}"
        )
    return replay.rule


def _askers(args: argparse.Namespace, replay: Replay) -> list[tuple[str, Asker]]:
    """Each setting that was asked for, and its name."""
    askers: list[tuple[str, Asker]] = []
    if args.K or args.nodes or (args.policy and not args.controller):
        for levels in args.K or [replay.levels]:
            for nodes in args.nodes or [None]:
                name = f"K {levels}" + (f", {nodes} nodes" if nodes is not None else "")
                askers.append((name, Always(levels, nodes or MAX_TREE_NODES)))
    if args.controller:
        from inferlab.specdec.controllers import make_controller

        given: dict[str, Any] = {"max_k": args.max_k if args.max_k is not None else replay.levels}
        given["min_k"] = args.min_k if args.min_k is not None else min(1, given["max_k"])
        if args.target_acceptance is not None:
            given["target_acceptance"] = args.target_acceptance
        for name in args.controller:
            try:
                controller = make_controller(name, **given)
            except ValueError as error:
                raise UsageError(f"--{str(error).replace('_', '-', 1)}") from None
            askers.append((name, Controlled(controller, replay.about)))
    return askers


def _grid(args: argparse.Namespace, replay: Replay, rule: Rule) -> list[Cell]:
    tree = replay.about["tree"]
    chain = tree["form"] == "chain"
    most = max(replay.levels, 1)
    levels = args.K or [*(k for k in GRID_LEVELS if k < most), most]
    if chain and args.nodes:
        raise UsageError("--nodes: the recorded drafts are chains, as long as --K says")
    if chain:
        batches = args.batch or GRID_BATCHES
        return [cell for k in levels for cell in replay.grid([k], [k], batches, rule)]
    whole = max(tree["nodes"], 1)
    nodes = args.nodes or [*(n for n in GRID_NODES if n < whole), whole]
    return replay.grid(levels, nodes, args.batch or GRID_BATCHES, rule)


def _line(setting: str, result: Replayed) -> Line:
    return {
        "setting": setting,
        "accepted_length": result.accepted_length,
        "tokens": result.tokens,
        "steps": result.steps,
        "walks": result.walks,
        "ms": result.ms,
        "tokens_per_second": result.tokens_per_second,
        "exact": result.covered,
    }


def _describe_rule(rule: Rule) -> str:
    name = {"conf_threshold": "tau", "topk_agree": "k"}.get(rule.policy)
    return f"{rule.policy}, {name} {rule.threshold:g}" if name else rule.policy


def _show(output: Output, replay: Replay) -> None:
    run_, about = output["run"], output["run"]["about"]
    drafts = f" + {about['draft_model']}" if about["draft_model"] else ""
    show_line(
        [
            run_["folder"],
            f"{about['model']}{drafts}",
            f"{about['draft_mode']} drafts, K {about['K']}",
            about["policy"]["policy"],
            f"{about['controller']['controller']} controller",
            f"temperature {about['temperature']:g}",
        ]
    )
    off = f"off by {run_['costs_off']:.0%} in the median step"
    costs = f"{run_['costs']} costs, {off}"
    if run_["costs"] == "fitted":
        costs += ", which know the recorded sizes only"
    size = f"{run_['bytes_per_node']:.0f} bytes each"
    show_line([f"{run_['steps']} steps", f"{run_['nodes']} nodes", size, costs])
    if output["policy"] != _describe_rule(replay.rule):
        show_line([f"below: policy {output['policy']}"])
    if not output["grid"]:
        width = max(len("setting"), *(len(line["setting"]) for line in output["settings"]))
        print(f"{'setting':{width}}  accepted length  steps  ms/step  tokens/s  exact")
        for line in output["settings"]:
            print(
                f"{line['setting']:{width}}  {line['accepted_length']:15.3f}  {line['steps']:5}"
                f"  {line['ms'] / max(line['steps'], 1):7.3f}  {line['tokens_per_second']:8.1f}"
                f"  {line['exact']:5.0%}"
            )
    else:
        _show_grid(output["grid"])
    if run_["disagree"]:
        print(
            f"{run_['disagree']} recorded walks come out otherwise when they are walked again: the "
            "record is not what was decoded."
        )
    shares = [line["exact"] for line in output["settings"]] + [p["exact"] for p in output["grid"]]
    if min(shares) < 1:
        print(_WHERE_NOT)
    if about["tree"]["remembers"] and min(shares) < 1:
        print(
            f"{about['draft_mode']} drafts by what was verified before: other trees would have "
            "taught it otherwise."
        )


_WHERE_NOT = (
    "exact: share of steps that the record covers. The others begin where no recorded step began,\n"
    "or ask for more than was drafted there: they are estimated from what is recorded."
)


def _show_grid(points: Sequence[Point]) -> None:
    batches = list(dict.fromkeys(point["batch"] for point in points))
    heads = "".join(f"  {f'batch {batch}':>9}" for batch in batches)
    print(f"{'':33}tokens/s at")
    print(f" K  nodes  accepted length  exact{heads}")
    rows: dict[tuple[int, int], list[Point]] = {}
    for point in points:
        rows.setdefault((point["K"], point["nodes"]), []).append(point)
    for (k, nodes), row in rows.items():
        speeds = "".join(f"  {point['tokens_per_second']:9.1f}" for point in row)
        first = row[0]
        print(f"{k:2}  {nodes:5}  {first['accepted_length']:15.3f}  {first['exact']:5.0%}{speeds}")


def _numbers(text: str) -> list[int]:
    try:
        return list(dict.fromkeys(int(part) for part in text.split(",")))
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers: 1,4,16") from None


def _names(text: str) -> list[str]:
    return [name.strip() for name in text.split(",")]
