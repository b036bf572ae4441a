"""`inferlab schema`: the JSON schema of a command's `--json` and `--output`."""

from __future__ import annotations

import argparse
import importlib
import sys
from typing import Any

from pydantic import TypeAdapter
from pydantic.json_schema import GenerateJsonSchema

from inferlab.cli.flags import add_log_arguments
from inferlab.cli.parser import EXIT_OK
from inferlab.output import print_json
from inferlab.records import RequestRecord

RECORD = "record"
COMMANDS = (
    *("specdec", "baseline", "advise", "bench", "bench compare", "certify", "ping", "replay"),
    *("simulate", "calibrate", "doctor"),
)
"""Commands that print JSON: their modules have a type ``Output``."""


class _EveryField(GenerateJsonSchema):
    """Fields of dataclasses are always written, those with a default, too."""

    def field_is_required(self, field: Any, total: bool) -> bool:
        return field["type"] == "dataclass-field" or super().field_is_required(field, total)


def schema_of(kind: Any, title: str) -> dict[str, Any]:
    """The JSON schema (draft 2020-12) of a type; its objects have the keys named and no others."""
    schema = TypeAdapter(kind).json_schema(mode="serialization", schema_generator=_EveryField)
    for part in (schema, *schema.get("$defs", {}).values()):
        if "properties" in part:
            part["additionalProperties"] = False
    dialect = "https://json-schema.org/draft/2020-12/schema"
    return {"$schema": dialect, "title": title, **{k: v for k, v in schema.items() if k != "title"}}


def schema(name: str) -> dict[str, Any]:
    """The schema of a command's JSON, or of the record that all of them hold."""
    if name == RECORD:
        return schema_of(RequestRecord, "record")
    module = importlib.import_module(f"inferlab.cli.{name.replace(' ', '_')}")
    return schema_of(module.Output, f"inferlab {name} --json")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The flags of ``inferlab schema``."""
    parser.add_argument(
        "of",
        nargs="?",
        metavar="COMMAND",
        choices=(RECORD, *COMMANDS),
        default=RECORD,
        help=f"{', '.join(COMMANDS)}, or record: of a request, which all results hold (record)",
    )
    add_log_arguments(parser)


def run(args: argparse.Namespace) -> int:
    """Prints a schema."""
    print_json(schema(args.of), sys.stdout, indent=2)
    return EXIT_OK
