"""Metrics of several replicas as one text for Prometheus."""

from __future__ import annotations

import re
from collections.abc import Mapping

_SAMPLE = re.compile(r"([a-zA-Z_:][a-zA-Z0-9_:]*)(?:\{(.*)\})? (\S+.*)")


def merged(texts: Mapping[str, str]) -> str:
    """All of them, each sample with the label ``replica``, each family told of once.

    Args:
        texts: of each replica, in Prometheus' text format.
    """
    families: dict[str, list[str]] = {}
    for name, text in texts.items():
        family: list[str] = []
        for line in text.splitlines():
            if line.startswith("# HELP "):
                family = families.setdefault(line, [])
            elif line.startswith("#"):
                if line not in family:
                    family.append(line)
            elif found := _SAMPLE.fullmatch(line):
                metric, labels, value = found.groups()
                inside = f'replica="{name}"' + (f",{labels}" if labels else "")
                family.append(f"{metric}{{{inside}}} {value}")
    return "".join(f"{line}\n" for head, family in families.items() for line in (head, *family))
