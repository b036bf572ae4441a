"""What a finished student is told about: training.json, the model card, and which of its drafts are
accepted."""

from __future__ import annotations

import json
import platform
import shlex
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch

from inferlab.models import HFModel
from inferlab.specdec.calibration import write_acceptance
from inferlab.training.heads.students import Student
from inferlab.training.heads.teach import RunConfig, Taught, cut_heldout
from inferlab.training.material.sources import Source
from inferlab.training.measure.acceptance import Trial

TEMPERATURES = (0.0, 0.8)
GROWN_LEVELS = 6  # of the dynamic trees that the card tells about


def student_report(
    kind: str,
    command: list[str],
    config: RunConfig,
    student: Student,
    target: HFModel,
    source: Source,
    taught: Taught,
) -> dict[str, Any]:
    """Measures the finished student in ``config.output`` and says how it was made. What it measured
    at the first temperature goes beside the weights, as `inferlab calibrate` writes it: who drafts
    with them knows what to expect.

    Target and student are loaded anew, in the dtype that they are served in.
    """
    served = HFModel.load(target.name, device=target.device, dtype="auto")
    acceptance = []
    for temperature in TEMPERATURES:
        trial = Trial(
            served,
            student.mode,
            config.output,
            cut_heldout(config, source),
            new_tokens=config.new_tokens,
            temperature=temperature,
        )
        levels = min(config.depth, student.max_positions)
        chains = trial.chains(levels)
        rates = trial.rates(levels, config.nodes)
        entry = {
            "temperature": temperature,
            "prompts": len(source.heldout),
            "new_tokens": config.new_tokens,
            "by_position": chains.by_position,
            "chain": chains.length,
            "tree": trial.static(rates, levels, config.nodes),
            "nodes": config.nodes,
        }
        if student.mode != "vanilla":
            deeper = min(GROWN_LEVELS, student.max_positions)
            entry["dynamic_tree"] = trial.grown(deeper, config.nodes)
        acceptance.append(entry)
        if rates and temperature == TEMPERATURES[0]:
            about = {key: entry[key] for key in ("temperature", "prompts", "new_tokens")}
            about |= {"base_model": target.name, "draft_mode": student.mode}
            write_acceptance(config.output, rates, about)
    losses = [entry["loss"] for entry in taught.history if "loss" in entry]
    recent = losses[-5:]
    return {
        "kind": kind,
        "student": student.description,
        "base_model": target.name,
        "command": shlex.join(command),
        "parameters": sum(p.numel() for p in student.module.parameters()),
        "steps": taught.steps,
        "tokens": taught.steps * config.tokens_per_batch * config.accumulate,
        "minutes": round(taught.minutes, 1),
        "learning_rate": config.lr,
        "final_training_loss": sum(recent) / max(1, len(recent)),
        "material": asdict(config.material),
        "data": source.title,
        "acceptance": acceptance,
        "seed": config.seed,
        "python": platform.python_version(),
        "torch": torch.__version__.split("+")[0],
        "threads": torch.get_num_threads(),
    }


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Writes training.json and README.md."""
    (folder / "training.json").write_text(json.dumps(report, indent=2) + "\n", encoding="utf-8")
    (folder / "README.md").write_text(student_card(report), encoding="utf-8")


def student_card(report: dict[str, Any]) -> str:
    """README.md of a student, in Markdown."""
    lines = [
        "---",
        f"base_model: {report['base_model']}",
        "license: mit",
        "tags: [speculative-decoding]",
        "---",
        "",
        f"# {report['student']} for {report['base_model']}",
        "",
        _WHAT[report["kind"]].format(base_model=report["base_model"]),
        "",
        "| | |",
        "|---|---|",
        f"| parameters | {report['parameters']:,} (bf16) |",
        f"| training | {report['steps']:,} updates, {report['tokens'] / 1e6:.1f} M tokens, "
        f"{report['minutes']:.0f} minutes on {report['threads']} CPU threads |",
    ]
    for entry in report["acceptance"]:
        shares = ", ".join(f"{share:.1%}" for share in entry["by_position"])
        lines += [
            f"| acceptance by position, temperature {entry['temperature']:g} | {shares} |",
            f"| tokens per target forward, temperature {entry['temperature']:g} | "
            f"{entry['chain']:.2f} in chains of {len(entry['by_position'])}, {entry['tree']:.2f} "
            f"in a static tree of {entry['nodes']} nodes"
            + (f", {entry['dynamic_tree']:.2f} in a dynamic one" if "dynamic_tree" in entry else "")
            + " |",
        ]
    first = report["acceptance"][0]
    lines += [
        "",
        f"Measured by decoding {first['prompts']} held-out prompts, {first['new_tokens']} new "
        "tokens each; the bonus token counts. The acceptance of a position is that of a chain's "
        "token where those before it were right. Above temperature 0 draft and target share their "
        "noise.",
        "",
        "## How it was made",
        "",
        "```",
        report["command"],
        "```",
        "",
        f"{report['material']['generated_windows']:,} texts were written by the target, half of "
        "them greedily, "
        f"{report['material']['corpus_windows'] + report['material']['long_windows']:,} are "
        f"windows of the training data ({report['data']}). What acceptance is measured on is held "
        "out by a hash: for the default corpus by file, "
        "`inferlab.training.material.corpus.heldout_files()`.",
        "",
    ]
    return "\n".join(lines)


_WHAT = {
    "draft": "A small draft model: it guesses the next tokens of `{base_model}`, which checks "
    "them.",
    "medusa": "Medusa heads: from the last hidden state of `{base_model}` each guesses one of the "
    "tokens behind the next one, all at once. In the layout of FasterDecoding/Medusa.",
    "eagle": "An EAGLE head: one decoder layer that reads hidden states of `{base_model}` and "
    "guesses its next tokens, one level after the other. In the layout of SafeAILab/EAGLE.",
}
