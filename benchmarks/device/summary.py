"""The short table of a run of on_device.sh: stages, tests, kernels against their floors, decoding.

python benchmarks/device/summary.py DIR      what on_device.sh left there
"""

from __future__ import annotations

import json
import sys
import xml.etree.ElementTree
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

import report
import table
from must_hold import REQUIREMENTS


def tests(path: Path) -> list[str]:
    """How many passed, and each that did not, with the first line of why."""
    suites = xml.etree.ElementTree.parse(path).getroot().iter("testsuite")
    total = failed = skipped = 0
    lines = []
    for suite in suites:
        total += int(suite.get("tests", 0))
        skipped += int(suite.get("skipped", 0))
        for case in suite.iter("testcase"):
            for kind in ("failure", "error"):
                for node in case.findall(kind):
                    failed += 1
                    why = (node.get("message") or "").splitlines() or [""]
                    lines.append(f"  {kind}: {case.get('name')}: {why[0][:150]}")
    return [f"tests: {total - failed - skipped} passed, {failed} failed, {skipped} skipped", *lines]


def kernels(path: Path) -> list[str]:
    runs = report.load(path)
    rows = report.kernel_rows(runs)
    lines = table.text(rows)
    device = "cuda" if any(row["device"] == "cuda" for row in rows) else "cpu"
    lines += ["", "what must hold"]
    for requirement in REQUIREMENTS:
        if requirement.device == device:
            lines.append("  " + " | ".join(requirement.cells(rows)))
    return lines


def decoding(path: Path) -> list[str]:
    lines = []
    for line in path.read_text(encoding="utf-8").splitlines():
        row: dict[str, Any] = json.loads(line)
        what, value, unit = row.pop("what"), row.pop("value"), row.pop("unit")
        more = ", ".join(f"{k} {v}" for k, v in row.items())
        lines.append(f"{what:58} {value:10.3f} {unit:8} {more}")
    return lines


def main(folder: Path) -> None:
    for name, lines_of in (
        ("kernels.jsonl", kernels),
        ("decode.jsonl", decoding),
        ("tests.xml", tests),
    ):
        path = folder / name
        if not path.exists():
            continue
        try:
            lines = lines_of(path)
        except (ValueError, xml.etree.ElementTree.ParseError) as error:
            lines = [f"{name} cannot be read: {error}"]
        print("\n".join([*lines, ""]))
    print((folder / "status.txt").read_text(encoding="utf-8"))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
