"""The flags of speculative decoding, which `specdec`, `bench`, `calibrate` and `advise`
share."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from inferlab.cli.flags import (
    add_generation_config_argument,
    add_safety_arguments,
    given_values,
)
from inferlab.config import TREES, SpecdecConfig, choices
from inferlab.draft_modes import DRAFT_MODES, DraftMode
from inferlab.errors import UsageError

FLAGS = {
    "--max-tokens": "max_new_tokens",
    "--min-tokens": "min_new_tokens",
    "--impl": "implementation",
    "--base-model": "base_model",
    "--draft-model": "draft_model",
    "--draft-mode": "draft_mode",
    "--max-draft": "max_draft",
    "--K": "K",
    "--tree": "tree",
    "--tree-nodes": "tree_nodes",
    "--tree-width": "tree_width",
    "--policy": "policy",
    "--tau": "tau",
    "--k": "agree_k",
    "--p": "p",
    "--controller": "controller",
    "--min-k": "min_k",
    "--max-k": "max_k",
    "--target-acceptance": "target_acceptance",
    "--temperature": "temperature",
    "--top-k": "top_k",
    "--top-p": "top_p",
    "--min-p": "min_p",
    "--repetition-penalty": "repetition_penalty",
    "--presence-penalty": "presence_penalty",
    "--frequency-penalty": "frequency_penalty",
    "--stop": "stop",
    "--seed": "seed",
    "--device": "device",
    "--force-device": "force_device",
    "--dtype": "dtype",
    "--engine": "engine",
    "--quantization": "quantization",
    "--draft-quantization": "draft_quantization",
    "--kv-cache-dtype": "kv_cache_dtype",
    "--tensor-parallel": "tensor_parallel",
    "--device-map": "device_map",
    "--max-memory-mb": "max_memory_mb",
    "--batch-size": "max_batch",
    "--record": "record",
    "--ignore-generation-config": "ignore_generation_config",
    "--trust-remote-code": "trust_remote_code",
    "--allow-pickle": "allow_pickle",
    "--log-level": "log_level",
}


def add_model_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for the models and where they run."""
    group = parser.add_argument_group("models")

    def one_of(key: str) -> tuple[str, ...]:
        return choices(SpecdecConfig, key)

    group.add_argument(
        "--impl", choices=one_of("implementation"), help="real models, or fake ones: instant (hf)"
    )
    group.add_argument("--base-model", metavar="NAME", help="the target (inferlab/tiny)")
    group.add_argument("--draft-model", metavar="NAME", help="who proposes (inferlab/tiny-draft)")
    group.add_argument("--device", help="auto, cpu, mps, cuda or cuda:N (auto)")
    group.add_argument("--force-device", choices=one_of("force_device"), help="beats --device")
    group.add_argument("--dtype", choices=one_of("dtype"), help="(auto)")
    group.add_argument(
        "--engine",
        choices=one_of("engine"),
        help="what runs forwards: compiled calls, or the models' own modules (auto: the first "
        "that can)",
    )
    group.add_argument(
        "--quantization",
        choices=one_of("quantization"),
        help="the target's weights, packed when it is loaded: int8 and int4 on a CPU, bnb and "
        "torchao by these packages; dense: those that come rounded (GPTQ, AWQ, ...) are not packed "
        "as they are (none)",
    )
    group.add_argument(
        "--draft-quantization",
        choices=one_of("draft_quantization"),
        help="the draft model's (none)",
    )
    group.add_argument(
        "--kv-cache-dtype",
        choices=one_of("kv_cache_dtype"),
        help="the target's keys and values, on a CPU: as they are, or in 8 bits, which takes half "
        "the memory (auto)",
    )
    group.add_argument(
        "--tensor-parallel",
        type=int,
        metavar="N",
        help="share the target out over N processes, a device each (as many as torchrun started, "
        "else 1)",
    )
    group.add_argument(
        "--device-map",
        type=_device_map,
        metavar="MAP",
        help="put the target's layers on several devices in turn, as accelerate does it: auto, "
        "balanced, balanced_low_0, sequential, or a JSON object of modules and devices",
    )
    add_safety_arguments(group)


def add_speculation_arguments(
    parser: argparse.ArgumentParser, *, several_modes: bool = False
) -> None:
    """Flags for drafter, acceptance policy and controller.

    Args:
        several_modes: ``--draft-mode`` takes a list of them.
    """
    group = parser.add_argument_group("speculation")

    def one_of(key: str) -> tuple[str, ...]:
        return choices(SpecdecConfig, key)

    if several_modes:
        group.add_argument(
            "--draft-mode", type=_names, metavar="MODE,...", help="(all that there are weights for)"
        )
    else:
        group.add_argument(
            "--draft-mode",
            choices=one_of("draft_mode"),
            help="who drafts; none: plain decoding (vanilla: a draft model)",
        )
    group.add_argument(
        "--heads", metavar="MODEL", help="trained heads for --draft-mode medusa or eagle"
    )
    group.add_argument(
        "--K",
        type=int,
        metavar="N",
        help=f"levels drafted per step ({_by_mode('levels')})",
    )
    group.add_argument("--max-draft", type=int, metavar="N", help="another name of --K")
    group.add_argument(
        "--tree",
        type=_tree,
        metavar="SHAPE",
        help="chain, optimal, grown (eagle, medusa), or children per node by depth: 4,2,1",
    )
    group.add_argument(
        "--tree-nodes",
        type=int,
        metavar="N",
        help=f"draft nodes of optimal, grown and merged trees ({_by_mode('nodes')})",
    )
    group.add_argument(
        "--tree-width",
        type=int,
        metavar="N",
        help="nodes that eagle expands per level of grown trees (4)",
    )
    group.add_argument("--policy", choices=one_of("policy"), help="(longest_prefix)")
    group.add_argument("--tau", type=float, help="threshold of conf_threshold (0.5)")
    group.add_argument("--k", type=int, help="of topk_agree (5)")
    group.add_argument("--p", type=float, help="mass of typical (0.9)")
    group.add_argument(
        "--controller",
        choices=one_of("controller"),
        help="how much is drafted: cost: what pays; fixed: always K levels; adaptive (fixed where "
        "--K is given, else cost)",
    )
    group.add_argument(
        "--no-cost-cache",
        action="store_true",
        help="measure what steps cost anew, and keep it nowhere",
    )
    group.add_argument("--adaptive-K", action="store_true", help="same as --controller adaptive")
    group.add_argument("--min-k", type=int, metavar="N", help="of the adaptive controller (1)")
    group.add_argument(
        "--max-k", type=int, metavar="N", help="of the adaptive and cost controllers (8)"
    )
    group.add_argument(
        "--target-acceptance", type=float, metavar="RATE", help="of the adaptive controller (0.7)"
    )


def add_record_argument(parser: argparse.ArgumentParser) -> None:
    """``--record DIR``."""
    parser.add_argument(
        "--record",
        metavar="DIR",
        help="keep what each step drafted, chose and took, for inferlab replay; each run adds one",
    )


def check_record(config: SpecdecConfig) -> None:
    """Refuses a ``--record`` that cannot be written before models are loaded.

    Raises:
        UsageError: it holds other things, or cannot be written.
    """
    if config.record is not None:
        from inferlab.specdec.recorded import check_folder

        check_folder(Path(config.record), "--record")


def add_sampling_arguments(parser: argparse.ArgumentParser) -> None:
    """Flags for how tokens are chosen, and how many."""
    group = parser.add_argument_group("sampling")
    group.add_argument("--max-tokens", type=int, metavar="N", help="new tokens at most (64)")
    group.add_argument("--min-tokens", type=int, metavar="N", help="new tokens at least (0)")
    group.add_argument("--temperature", type=float, help="0 is greedy (0)")
    group.add_argument("--top-k", type=int, metavar="N", help="keep the N likeliest; 0 is off (0)")
    group.add_argument("--top-p", type=float, metavar="P", help="nucleus; 1 is off (1)")
    group.add_argument("--min-p", type=float, metavar="P", help="relative to the likeliest (0)")
    group.add_argument("--repetition-penalty", type=float, help="1 is off (1)")
    group.add_argument("--presence-penalty", type=float, help="0 is off (0)")
    group.add_argument("--frequency-penalty", type=float, help="0 is off (0)")
    group.add_argument(
        "--stop", action="append", metavar="TEXT", help="ends the text; may be given repeatedly"
    )
    add_generation_config_argument(group)
    group.add_argument("--seed", type=int, help="the same seed gives the same tokens (1234)")


def _names(text: str) -> list[str]:
    return list(dict.fromkeys(name.strip() for name in text.split(",")))


def _device_map(text: str) -> Any:
    if not text.lstrip().startswith("{"):
        return text
    try:
        return json.loads(text)
    except ValueError as error:
        raise argparse.ArgumentTypeError(f"{text!r} is not a JSON object: {error}") from None


def _tree(text: str) -> str | list[int]:
    if text in TREES:
        return text
    try:
        return [int(width) for width in text.split(",")]
    except ValueError:
        raise argparse.ArgumentTypeError(
            f"{text!r} is neither one of {', '.join(TREES)} nor a list of widths by depth, such as "
            f"4,2,1"
        ) from None


def given_overrides(
    args: argparse.Namespace, flags: Mapping[str, str] = FLAGS
) -> tuple[dict[str, Any], dict[str, str]]:
    """What the flags of the groups above override, and their names (see ``given_values``).

    Raises:
        UsageError: flags that contradict each other.
    """
    overrides, names = given_values(args, flags)
    if args.adaptive_K:
        for flag, value in (("--K", args.K), ("--controller", args.controller)):
            if value is not None and value != "adaptive":
                raise UsageError(f"--adaptive-K contradicts {flag} {value}; give one of them")
        overrides["controller"], names["controller"] = "adaptive", "--adaptive-K"
    if args.no_cost_cache:
        overrides["cost_cache"], names["cost_cache"] = False, "--no-cost-cache"
    if args.heads is not None:
        if args.draft_mode not in ("medusa", "eagle"):
            raise UsageError("--heads: names the heads of --draft-mode medusa or eagle; give both")
        overrides[args.draft_mode], names[args.draft_mode] = {"model": args.heads}, "--heads"
    for flag, value in (("--K", args.K), ("--max-draft", args.max_draft)):
        if value is not None and isinstance(args.tree, list):
            raise UsageError(f"{flag} {value} contradicts --tree, whose depth is the K; give one")
    return overrides, names


def _by_mode(fact: str) -> str:
    """What a number is by default: "4; ngram 8"."""
    usual = getattr(DraftMode, fact)
    others: dict[int, list[str]] = {}
    for name, mode in DRAFT_MODES.items():
        if getattr(mode, fact) != usual:
            others.setdefault(getattr(mode, fact), []).append(name)
    return "; ".join([str(usual), *(f"{', '.join(names)} {n}" for n, names in others.items())])
