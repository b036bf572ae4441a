"""Saved benchmark runs as one Markdown report, and plots.

    pytest benchmarks/bench_*.py --benchmark-json=run.json
    python benchmarks/report.py run.json [more.json ...] --output report.md --plots plots/

Files are those of --benchmark-json, --benchmark-save or --rows (FILE.jsonl). Where two hold the
same row of the same device, the later file's counts.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import table
from must_hold import REQUIREMENTS
from table import Row, label


def load(path: Path) -> list[dict[str, Any]]:
    """The runs saved in a file: one in pytest-benchmark's JSON, any number in a file of rows.

    Raises:
        ValueError: the file is neither.
    """
    text = path.read_text(encoding="utf-8")
    if path.suffix == ".jsonl":
        return _runs_of_rows(path, text.splitlines())
    try:
        run = json.loads(text)
    except ValueError as error:
        raise ValueError(f"{path} is not JSON: {error}") from error
    if not isinstance(run, dict) or "benchmarks" not in run or "machine_info" not in run:
        raise ValueError(f"{path} is not a run saved by pytest-benchmark (--benchmark-json=FILE)")
    return [run]


def _runs_of_rows(path: Path, lines: Sequence[str]) -> list[dict[str, Any]]:
    """Runs as --rows writes them; the last line of one that was killed may be half a line."""
    runs: list[dict[str, Any]] = []
    for number, line in enumerate(lines, start=1):
        try:
            record = json.loads(line)
        except ValueError as error:
            if number == len(lines):
                break
            raise ValueError(f"{path}, line {number} is not JSON: {error}") from error
        if "machine_info" in record:
            runs.append({**record, "benchmarks": []})
        elif runs and "extra_info" in record:
            runs[-1]["benchmarks"].append(record)
            if measured := record["extra_info"].get("bandwidth_gb_per_s"):
                devices = runs[-1]["machine_info"]["inferlab"]["devices"]
                devices[record["extra_info"]["device"]] = {"bandwidth_gb_per_s": measured}
        else:
            raise ValueError(f"{path}, line {number} is not of a file written by --rows")
    return runs


def kernel_rows(runs: Iterable[dict[str, Any]]) -> list[Row]:
    """The kernels' rows of all runs; those of each device on each machine together."""
    rows: dict[tuple[str, ...], Row] = {}
    for run in runs:
        for bench in run["benchmarks"]:
            row = bench["extra_info"]
            if "op" not in row:
                continue
            row = {**row, "machine": machine(run, row["device"])}
            rows[(row["machine"], row["op"], row["variant"], label(row["shape"]))] = row
    return list(rows.values())


def machine(run: dict[str, Any], device: str) -> str:
    """The processor or the GPU that a run's rows of a device are from."""
    info = run["machine_info"].get("inferlab", {})
    if device == "cuda":
        return ", ".join(info.get("gpus", ())) or "CUDA device"
    threads = info.get("kernel_threads", "?")
    return f"{info.get('processor', 'CPU')}, {threads} threads"


def run_lines(run: dict[str, Any]) -> list[str]:
    """Where a run's numbers come from."""
    info = run["machine_info"].get("inferlab", {})
    versions = ", ".join(f"{k} {info[k]}" for k in ("inferlab", "torch", "python") if k in info)
    for name, version in info.get("peers", {}).items():
        versions += f", {name} {version}"
    cuda = info.get("build", {}).get("cuda")
    built = f"{info.get('build', {}).get('compiler', '?')}, " + (
        f"CUDA {cuda} for {info['build']['cuda_architectures']}" if cuda else "without CUDA"
    )
    lines = [
        f"- Run of {run.get('datetime', '?')[:19]}: `{info.get('command', 'pytest')}`",
        f"  - {info.get('system', '?')}; {info.get('simd', '?')}; {versions}; built by {built}",
    ]
    for device, measured in info.get("devices", {}).items():
        facts = [machine(run, device)]
        facts += [f"{k} {v:.1f} GB/s" for k, v in measured["bandwidth_gb_per_s"].items()]
        if "flush_bytes" in measured:
            facts += [f"{table.amount(measured['flush_bytes'])} read to flush the cache"]
        lines.append(f"  - {device}: {'; '.join(facts)}")
    return lines


def other_lines(runs: Iterable[dict[str, Any]]) -> list[str]:
    """Benchmarks that count no bytes: name, median, and what else they say of themselves."""
    lines = []
    for run in runs:
        for bench in run["benchmarks"]:
            if "op" not in bench["extra_info"]:
                more = ", ".join(
                    f"{k} {table.number(v) if isinstance(v, float) else v}"
                    for k, v in bench["extra_info"].items()
                    if isinstance(v, (str, int, float))
                )
                median = table.number(bench["stats"]["median"] * 1e6)
                lines.append(f"| {bench['name']} | {median} | {more} |")
    return (
        ["## Others", "", "| benchmark | time us | |", "| --- | ---: | --- |", *lines, ""]
        if (lines)
        else []
    )


def markdown(runs: Sequence[dict[str, Any]]) -> str:
    """The whole report."""
    rows = kernel_rows(runs)
    lines = ["# Kernel benchmarks", ""]
    for run in runs:
        lines += run_lines(run)
    meaning = (table.__doc__ or "").partition("\n\n")[2].rstrip()
    lines += ["", "```", meaning, "```", "", "## What must hold", ""]
    lines += ["| device | requirement | limit | worst measured | | where |"]
    lines += ["| --- | --- | ---: | ---: | --- | --- |"]
    lines += [f"| {r.device} | " + " | ".join(r.cells(rows)) + " |" for r in REQUIREMENTS]
    lines += [""]
    for op in dict.fromkeys(row["op"] for row in rows):
        lines += [f"## {op}", ""]
        of_op = [row for row in rows if row["op"] == op]
        for where in dict.fromkeys(row["machine"] for row in of_op):
            lines += [f"{where}:", ""]
            lines += [*table.markdown([row for row in of_op if row["machine"] == where]), ""]
    lines += other_lines(runs)
    return "\n".join(lines).rstrip() + "\n"


def plot(rows: Sequence[Row], directory: Path, suffix: str) -> list[Path]:
    """One figure per op: fraction of the bandwidth over the bytes that must be moved."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    directory.mkdir(parents=True, exist_ok=True)
    written = []
    bound = [row for row in rows if row["bound"]]
    for op in dict.fromkeys(row["op"] for row in bound):
        figure, axes = pyplot.subplots(figsize=(7, 4.5), layout="constrained")
        series: dict[str, list[Row]] = {}
        for row in bound:
            if row["op"] == op:
                name = f"{row['device']} {row['variant']} {row['shape'].get('dtype', '')}"
                series.setdefault(" ".join(name.split()), []).append(row)
        for name, points in series.items():
            points = sorted(points, key=lambda row: row["bytes"])
            sizes = [row["bytes"] / 1e6 for row in points]
            axes.plot(sizes, [row["fraction_of_bandwidth"] for row in points], "o-", label=name)
        axes.axhline(1, color="grey", linewidth=0.8)
        axes.set(
            title=op,
            xlabel="bytes that must be moved, MB",
            ylabel="fraction of the measured bandwidth",
            xscale="log",
            ylim=(0, None),
        )
        axes.legend(fontsize="small")
        file = directory / f"{op}.{suffix}"
        figure.savefig(file)
        pyplot.close(figure)
        written.append(file)
    return written


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description="Saved benchmark runs as Markdown and plots.")
    parser.add_argument(
        "files", nargs="+", type=Path, metavar="FILE", help="of --benchmark-json or --rows"
    )
    parser.add_argument("--output", type=Path, metavar="FILE", help="default: standard output")
    parser.add_argument("--plots", type=Path, metavar="DIR", help="a figure per op is written here")
    parser.add_argument("--format", choices=("svg", "png"), default="svg", help="of the plots")
    args = parser.parse_args(argv)
    try:
        runs = [run for path in args.files for run in load(path)]
    except (OSError, ValueError) as error:
        print(f"report.py: {error}", file=sys.stderr)
        return 2
    text = markdown(runs)
    if args.output:
        args.output.write_text(text, encoding="utf-8")
    else:
        print(text, end="")
    if args.plots:
        plot(kernel_rows(runs), args.plots, args.format)
    return 0


if __name__ == "__main__":
    sys.exit(main())
