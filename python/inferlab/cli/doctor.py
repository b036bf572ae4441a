"""`inferlab doctor`: what is built in, what this machine offers, and what is missing."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Any

from inferlab.cli.flags import add_log_arguments
from inferlab.cli.parser import EXIT_FAILURE, EXIT_OK
from inferlab.cli.terminal import clean_stdout
from inferlab.doctor import Report, examine
from inferlab.output import print_json

Output = Report


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab doctor``."""
    parser.add_argument("--json", action="store_true", help="print it as JSON on stdout")
    add_log_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints the report; 1 when something essential is missing."""
    with clean_stdout(args.json) as out:
        report = examine()
        if args.json:
            print_json(report, out, indent=2)
        else:
            _show(report)
    return EXIT_FAILURE if any(entry["essential"] for entry in report["missing"]) else EXIT_OK


def _show(report: Mapping[str, Any]) -> None:
    from rich.console import Console
    from rich.table import Table

    table = Table.grid(padding=(0, 2))
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, text in _lines(report):
        table.add_row(name, text)
    console = Console()
    console.print(table, markup=False, highlight=False)
    if not report["missing"]:
        console.print("Nothing is missing.")
    for entry in report["missing"]:
        mark = "MISSING" if entry["essential"] else "optional"
        console.print(
            f"{mark}: {entry['what']}\n  -> {entry['how']}", markup=False, highlight=False
        )


def _lines(report: Mapping[str, Any]) -> list[tuple[str, str]]:
    build, machine, devices = report["build"], report["machine"], report["devices"]
    lines = [("inferlab", report["version"])]
    if "error" in build:
        lines.append(("build", build["error"]))
    else:
        cuda = (
            f"CUDA {build['cuda']} for {build['cuda_architectures']}"
            if build["cuda"]
            else "no CUDA"
        )
        lines.append(("build", f"{build['compiler']}, SIMD {', '.join(build['isas'])}, {cuda}"))
    flags = machine["flags"]
    lines.append(("processor", f"{machine['processor']}, {machine['architecture']}"))
    lines.append(("features", " ".join(n for n, has in (flags or {}).items() if has) or "unknown"))
    cores = f"{machine['cores_usable']} usable of {machine['cores']}"
    lines.append(("cores, memory", f"{cores}, {machine['memory_gb']} GB"))
    if "simd" in machine:
        lines.append(
            ("in use", f"{machine['simd']}, {machine['threads']} threads ({build['threading']})")
        )
        lines.append(("read bandwidth", f"{machine['read_bandwidth_gb_s']:.1f} GB/s measured"))
    gpus = [
        f"{gpu['name']} ({gpu['architecture']}, {gpu['memory_gb']} GB)" for gpu in devices["cuda"]
    ]
    lines.append(("CUDA devices", ", ".join(gpus) or "none"))
    lines.append(("MPS", "yes" if devices["mps"] else "no"))
    versions = report["versions"].items()
    lines.append(
        ("versions", ", ".join(f"{name} {version or 'missing'}" for name, version in versions))
    )
    installed = [name for name, unmet in report["extras"].items() if not unmet]
    lines.append(("extras installed", ", ".join(installed) or "none"))
    models = report["models"].items()
    present = [f"{name} ({model['size_mb']} MB)" for name, model in models if model["present"]]
    lines.append(("bundled models", ", ".join(present) or "none"))
    return lines
