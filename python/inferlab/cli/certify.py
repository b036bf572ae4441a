"""`inferlab certify`: proves that decoding loses nothing, judges divergences, measures quality."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from inferlab.certify import greedy, lossless, quality
from inferlab.certify.facts import parse_sampler, sampler_text
from inferlab.certify.outputs import Certificate, Rechecked
from inferlab.certify.recheck import TRUST, read_certificate, recheck
from inferlab.certify.report import certificate_report
from inferlab.cli.flags import add_config_argument, add_output_arguments, given_values
from inferlab.cli.parser import EXIT_FAILURE, EXIT_OK
from inferlab.cli.prompts import add_workload_arguments, gather_workload
from inferlab.cli.specdec_flags import FLAGS, add_model_arguments
from inferlab.cli.terminal import clean_stdout, setup_logging
from inferlab.config import SpecdecConfig, choices, load_config
from inferlab.draft_modes import DRAFT_MODES, tree_misfit
from inferlab.errors import UsageError
from inferlab.output import Journal, check_output, print_json, write_json
from inferlab.reports.terminal import print_report
from inferlab.specdec.policies import POLICIES

Output = Certificate | Rechecked

HELDOUT = 4
TEXT_CHARACTERS = 6000


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab certify``."""
    kinds = parser.add_subparsers(
        dest="certify_kind", required=True, metavar="{lossless,greedy,quality}"
    )
    _add_lossless(kinds.add_parser("lossless", help="is what comes out the target's own?"))
    _add_greedy(kinds.add_parser("greedy", help="is each divergence a tie within rounding?"))
    _add_quality(kinds.add_parser("quality", help="what do policies, formats and dtypes cost?"))


def _add_common(parser: argparse.ArgumentParser) -> None:
    add_workload_arguments(parser)
    add_config_argument(parser, "configs/specdec.yaml")
    add_model_arguments(parser)
    parser.add_argument(
        "--check",
        metavar="FILE",
        help="make the certificate of FILE again, by its own settings, and compare",
    )
    add_output_arguments(parser)


def _add_drafting(group: argparse._ActionsContainer) -> None:
    group.add_argument("--K", type=int, metavar="N", help="levels drafted per step")
    group.add_argument("--tau", type=float, help="threshold of conf_threshold (0.5)")
    group.add_argument("--k", type=int, help="of topk_agree (5)")
    group.add_argument("--p", type=float, help="mass of typical (0.9)")
    group.add_argument("--max-tokens", type=int, metavar="N", help="new tokens of each prompt (48)")


def _add_lossless(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is certified: every combination")
    group.add_argument("--policy", choices=POLICIES, help="(longest_prefix)")
    group.add_argument("--draft-mode", type=_names, metavar="MODE,...", help="who drafts (vanilla)")
    group.add_argument(
        "--tree",
        action="append",
        metavar="SHAPE",
        help="chain, optimal, grown, or children per node by depth: 3,2,1; may be given repeatedly "
        "(the drafter's own, and 3,2,1)",
    )
    group.add_argument(
        "--sampler",
        action="append",
        metavar="SETTINGS",
        help="greedy, or temperature=0.8,top_p=0.9,top_k=50,min_p=0.1, also repetition_penalty, "
        "presence_penalty, frequency_penalty; may be given repeatedly "
        f"({' and '.join(lossless.SAMPLERS)})",
    )
    group.add_argument("--batch", type=_sizes, metavar="N,...", help="decoded together (1,4)")
    group.add_argument(
        "--quantizations", type=_names, metavar="FORMAT,...", help="of the target's weights (none)"
    )
    _add_drafting(group)
    group.add_argument(
        "--samples",
        type=int,
        metavar="N",
        help=f"seeds of each sampled distribution; 0: none ({lossless.SAMPLES})",
    )
    group.add_argument("--seed", type=int, help="of the replays, and the samples' first (1234)")
    _add_common(parser)


def _add_greedy(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is compared")
    group.add_argument("--draft-mode", choices=tuple(DRAFT_MODES), help="who drafts (vanilla)")
    group.add_argument("--tree", metavar="SHAPE", help="as for specdec")
    group.add_argument("--K", type=int, metavar="N", help="levels drafted per step")
    group.add_argument(
        "--ids",
        metavar="FILE",
        help="recorded by any engine in place of generate: JSON lines or a list, with prompt (or "
        "prompt_token_ids) and token_ids",
    )
    group.add_argument("--max-tokens", type=int, metavar="N", help="new tokens of each prompt (48)")
    group.add_argument(
        "--exact",
        choices=("float32", "float64"),
        help="what margins are recomputed in, on the CPU (float64)",
    )
    _add_common(parser)


def _add_quality(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("what is compared with plain decoding")
    group.add_argument("--policies", type=_names, metavar="POLICY,...", help="(none)")
    group.add_argument(
        "--quantizations", type=_names, metavar="FORMAT,...", help="int8, int4 (both, on a CPU)"
    )
    group.add_argument("--dtypes", type=_names, metavar="DTYPE,...", help="(none)")
    group.add_argument("--draft-mode", choices=tuple(DRAFT_MODES), help="for --policies (vanilla)")
    _add_drafting(group)
    group.add_argument("--temperature", type=float, help="of all outputs; 0 is greedy (0)")
    group.add_argument("--seed", type=int, help="of all outputs (1234)")
    group.add_argument(
        "--text", metavar="FILE", help="for perplexity, KL and agreement (a file held out)"
    )
    group.add_argument("--window", type=int, metavar="N", help=f"tokens ({quality.WINDOW})")
    group.add_argument("--stride", type=int, metavar="N", help="of the window (half of it)")
    group.add_argument(
        "--max-kl", type=float, metavar="NATS", help="not certified where KL may be larger"
    )
    _add_common(parser)


def run(args: argparse.Namespace) -> int:
    """Runs ``inferlab certify``; returns the exit code: 0 certified (and, with ``--check``,
    confirmed), 1 not."""
    kind = args.certify_kind
    check_output(args.output)
    stated = None if args.check is None else read_certificate(args.check, kind)
    if stated is not None:
        _refuse_beside_check(args)
    settings, log_level = ({}, "INFO") if stated is not None else _SETTINGS[kind](args)
    setup_logging(args.log_level or log_level, args.verbose)
    with clean_stdout(args.json) as out:
        journal = Journal(args.output)
        try:
            told = {_TOLD[kind]: journal.add}
            result: Certificate | Rechecked
            if stated is not None:
                trusted = [key for key in TRUST if getattr(args, key)]
                result = recheck(stated, trusted=trusted, **told)
            else:
                result = _MAKERS[kind](settings, **told)
            if args.output:
                write_json(args.output, result)
                journal.close(written=True)
        finally:
            journal.close(written=False)
        if args.json:
            print_json(result, out)
        else:
            _show(result)
    return EXIT_OK if _holds(result) else EXIT_FAILURE


def _holds(result: Certificate | Rechecked) -> bool:
    if result["kind"] == "check":
        return result["confirmed"] and result["certificate"]["certified"]
    return result["certified"]


def _show(result: Certificate | Rechecked) -> None:
    if result["kind"] != "check":
        print_report(certificate_report(result))
        return
    for difference in result["differences"]:
        print(difference)
    print(result["summary"])


def _refuse_beside_check(args: argparse.Namespace) -> None:
    """Everything else that is said beside ``--check`` is the file's to say, but for what a
    checkpoint may do here."""
    own = {"check", "output", "json", "no_progress", "log_level", "verbose", "certify_kind", *TRUST}
    usual = {"command", "run"}
    for name, value in vars(args).items():
        if name not in own | usual and value is not None and value is not False:
            raise UsageError(
                f"--{name.replace('_', '-')}: has no meaning with --check, which takes all "
                "settings from the file"
            )


# --- from flags to settings ---------------------------------------------------------------------


def _lossless_settings(args: argparse.Namespace) -> tuple[lossless.Settings, str]:
    modes = args.draft_mode or ["vanilla"]
    _one_of("--draft-mode", modes, DRAFT_MODES)
    trees = args.tree or [lossless.OWN_TREE, "3,2,1"]
    config = _config(args, ("policy", "tau", "k", "p", "K"))
    formats = args.quantizations or [config.quantization]
    _one_of("--quantizations", formats, choices(SpecdecConfig, "quantization"))
    for tree in args.tree or ():
        shape = _widths(tree)
        if all(tree_misfit(mode, shape) for mode in modes):
            raise UsageError(f"--tree: {tree}: {tree_misfit(modes[0], shape)}")
    samples = lossless.SAMPLES if args.samples is None else args.samples
    if samples < 0:
        raise UsageError(f"--samples: {samples} is not allowed; must be at least 0")
    samplers = [sampler_text(parse_sampler(text)) for text in args.sampler or lossless.SAMPLERS]
    settings: lossless.Settings = {
        "config": _dumped(config),
        "draft_modes": modes,
        "trees": trees,
        "samplers": samplers,
        "batches": args.batch or [1, 4],
        "quantizations": formats,
        "prompts": _prompts(args),
        "max_tokens": lossless.MAX_TOKENS if args.max_tokens is None else args.max_tokens,
        "samples": samples,
        "seed": config.seed,
    }
    return settings, config.log_level


def _greedy_settings(args: argparse.Namespace) -> tuple[greedy.Settings, str]:
    config = _config(args, ("draft_mode", "K", "tree"))
    prompts: Any
    recorded, against = None, "Hugging Face generate"
    if args.ids is not None:
        for flag in ("prompt", "prompts", "heldout", "max_tokens"):
            if getattr(args, flag) is not None:
                raise UsageError(f"--{flag.replace('_', '-')}: has no meaning with --ids")
        prompts, recorded = greedy.read_recorded(args.ids)
        against = str(args.ids)
    else:
        prompts = _prompts(args)
    settings: greedy.Settings = {
        "config": _dumped(config),
        "prompts": prompts,
        "recorded": recorded,
        "against": against,
        "max_tokens": lossless.MAX_TOKENS if args.max_tokens is None else args.max_tokens,
        "exact": args.exact or "float64",
    }
    return settings, config.log_level


def _quality_settings(args: argparse.Namespace) -> tuple[quality.Settings, str]:
    config = _config(args, ("draft_mode", "K", "tau", "k", "p", "temperature", "seed"))
    _one_of("--policies", args.policies or [], POLICIES)
    _one_of("--dtypes", args.dtypes or [], choices(SpecdecConfig, "dtype"))
    formats = args.quantizations
    if formats is None:
        asked = args.policies or args.dtypes
        formats = [] if asked else ["int8", "int4"]
    _one_of("--quantizations", formats, choices(SpecdecConfig, "quantization"))
    window = quality.WINDOW if args.window is None else args.window
    if window < 2:
        raise UsageError(f"--window: {window} is not allowed; must be at least 2")
    stride = window // 2 if args.stride is None else args.stride
    if not 1 <= stride < window:
        raise UsageError(
            f"--stride: {stride} is not allowed; must be from 1 to below --window {window}"
        )
    settings: quality.Settings = {
        "config": _dumped(config),
        "policies": args.policies or [],
        "quantizations": formats,
        "dtypes": args.dtypes or [],
        "prompts": _prompts(args),
        "max_tokens": lossless.MAX_TOKENS if args.max_tokens is None else args.max_tokens,
        "text": _text(args.text),
        "window": window,
        "stride": stride,
        "max_kl": args.max_kl,
    }
    return settings, config.log_level


_SETTINGS: dict[str, Callable[[argparse.Namespace], tuple[Any, str]]] = {
    "lossless": _lossless_settings,
    "greedy": _greedy_settings,
    "quality": _quality_settings,
}
_MAKERS: dict[str, Callable[..., Certificate]] = {
    "lossless": lossless.certify_lossless,
    "greedy": greedy.certify_greedy,
    "quality": quality.certify_quality,
}
_TOLD = {"lossless": "on_check", "greedy": "on_prompt", "quality": "on_row"}


def _config(args: argparse.Namespace, more: Sequence[str]) -> SpecdecConfig:
    """The configuration of file and flags; ``more``: flags besides those of the models."""
    several = args.certify_kind == "lossless"
    if not several and getattr(args, "tree", None) is not None:
        args.tree = _widths(args.tree)
    models = [
        *("impl", "base_model", "draft_model", "device", "force_device", "dtype", "engine"),
        *("quantization", "draft_quantization", "tensor_parallel", "device_map", "max_memory_mb"),
        *("trust_remote_code", "allow_pickle", "seed", "log_level"),
    ]
    wanted = {f"--{name.replace('_', '-')}" for name in (*models, *more)}
    overrides, names = given_values(args, {f: key for f, key in FLAGS.items() if f in wanted})
    return load_config(SpecdecConfig, args.config, overrides, names=names)


def _dumped(config: SpecdecConfig) -> dict[str, Any]:
    """What was set, as JSON types."""
    return config.model_dump(
        mode="json", exclude_unset=True, exclude={"record", "log_level", "verbose"}
    )


def _prompts(args: argparse.Namespace) -> list[str]:
    if (args.prompt, args.prompts, args.heldout) == (None, None, None):
        args.heldout = HELDOUT
    prompts = gather_workload(args)
    for prompt in prompts:
        prompt.check()
    return [prompt.text for prompt in prompts]


def _text(path: str | None) -> str:
    if path is None:
        from inferlab.training.material.corpus import heldout_files

        return heldout_files()[0].read_text(encoding="utf-8")[:TEXT_CHARACTERS]
    try:
        text = Path(path).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        why = error.strerror if isinstance(error, OSError) else "it is not UTF-8"
        raise UsageError(f"--text: {path} cannot be read: {why}") from None
    if not text.strip():
        raise UsageError(f"--text: {path} is empty")
    return text


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def _one_of(flag: str, names: Sequence[str], allowed: Any) -> None:
    for name in names:
        if name not in allowed:
            raise UsageError(f"{flag}: {name} is not allowed; must be of {', '.join(allowed)}")


def _sizes(text: str) -> list[int]:
    try:
        sizes = [int(size) for size in text.split(",")]
    except ValueError:
        sizes = [0]
    if min(sizes) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a list of numbers: 1,4,16")
    return sizes


def _widths(tree: str) -> Any:
    if not tree[:1].isdigit():
        return tree
    try:
        return tuple(map(int, tree.split(",")))
    except ValueError:
        raise UsageError(f"--tree: {tree} is no list of widths by depth, such as 3,2,1") from None
