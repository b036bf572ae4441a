"""The house stands: imports inside the package go down only, and the ground needs no torch."""

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import inferlab

PACKAGE = Path(inferlab.__file__).resolve().parent

# A room may use rooms of lower floors and itself; rooms of one floor do not know each other.
FLOORS = (
    {"types", "records", "config", "config_file", "config_types", "draft_modes"}
    | {"errors", "prompts", "lengths", "output", "plots", "machine"},
    {"_C"},
    {"kernels"},
    {"models", "scheduler"},
    {"specdec", "client"},
    {"baseline", "reports"},
    {"server", "training"},
    {"benchmarks", "simulation"},
    {"certify", "load"},
    {"doctor"},
    {"cli"},
    {"__main__"},
)
# Modules that are also commands (`python -m inferlab.specdec.run_specdec`): faces of inferlab.cli,
# which their `main`, and nothing else of them, imports when it is called.
FACES = (
    ("inferlab", "specdec", "run_specdec"),
    ("inferlab", "server", "local_baseline"),
    ("inferlab", "server", "ping_vllm"),
    ("inferlab", "benchmarks", "run_bench"),
)

FLOOR_OF = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}


def imported_rooms(source: str, package: tuple[str, ...]) -> list[tuple[int, str]]:
    """``(line, room)`` of every import of a part of inferlab, anywhere in a module's source.

    Args:
        package: the package that the module is in, such as ``("inferlab", "specdec")``.
    """
    found = []
    for node in ast.walk(ast.parse(source)):
        targets: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple(node.module.split(".")) if node.module else ()
            targets = [(*base, alias.name) for alias in node.names]
        for target in targets:
            if target[:1] == ("inferlab",) and target[1:2] != ("__version__",):
                found.append((node.lineno, target[1] if len(target) > 1 else ""))
    return found


def upward(source: str, module: tuple[str, ...]) -> list[str]:
    """What a module of that path imports against the order."""
    room = module[1]
    wrong = []
    if module in FACES:
        source = without_main(source)
    for line, other in imported_rooms(source, module[:-1]):
        same_ground = FLOOR_OF[room] == 0 == FLOOR_OF.get(other)
        if other == room or same_ground:
            continue
        if FLOOR_OF.get(other, len(FLOORS)) >= FLOOR_OF[room]:
            wrong.append(f"{'.'.join(module)}:{line} imports {other or 'the root'}")
    return wrong


def without_main(source: str) -> str:
    """A module's source without its function `main`."""
    tree = ast.parse(source)
    tree.body = [node for node in tree.body if getattr(node, "name", None) != "main"]
    return ast.unparse(tree)


def modules() -> list[tuple[tuple[str, ...], Path]]:
    files = sorted(PACKAGE.rglob("*.py"))
    paths = [("inferlab", *file.relative_to(PACKAGE).with_suffix("").parts) for file in files]
    return [(path, file) for path, file in zip(paths, files, strict=True) if len(path) > 1]


def test_every_room_has_a_floor():
    rooms = {path[1] for path, _ in modules()} - {"__init__"}
    assert rooms <= set(FLOOR_OF), "give the new room its place in FLOORS"


def test_imports_go_down_only():
    wrong = [
        line
        for path, file in modules()
        if path != ("inferlab", "__init__")  # the lazy list of public names
        for line in upward(file.read_text(encoding="utf-8"), path)
    ]
    assert not wrong, "\n".join(wrong)


def test_only_the_command_line_knows_flags():
    knowing = {
        path
        for path, file in modules()
        if path[1] != "cli" and re.search(r"\bimport argparse\b", file.read_text(encoding="utf-8"))
    }
    assert not knowing, "flags belong to inferlab.cli"


def test_the_faces_names_are_those_of_the_rooms_behind():
    from inferlab import BenchmarkRunner, LocalBaselineRunner, VLLMPingClient
    from inferlab.benchmarks import run_bench
    from inferlab.server import local_baseline, ping_vllm

    assert run_bench.BenchmarkRunner is BenchmarkRunner
    assert local_baseline.LocalBaselineRunner is LocalBaselineRunner
    assert ping_vllm.VLLMPingClient is VLLMPingClient


def test_faces_are_thin():
    files = dict(modules())
    for face in FACES:
        body = ast.parse(files[face].read_text(encoding="utf-8")).body
        defined = [node.name for node in body if isinstance(node, ast.FunctionDef | ast.ClassDef)]
        assert defined == ["main"], face


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from inferlab.specdec import engine", ("inferlab", "kernels", "sample")),
        ("from inferlab import cli", ("inferlab", "specdec", "engine")),
        ("import inferlab.server.ping_vllm", ("inferlab", "models", "hf")),
        ("from ..models import hf", ("inferlab", "scheduler", "pages")),
        ("from inferlab import SpeculativePipeline", ("inferlab", "server", "app")),
        ("def f():\n    from inferlab.training import train", ("inferlab", "server", "app")),
        ("import inferlab", ("inferlab", "types")),
        ("def main():\n    from inferlab.cli import call", ("inferlab", "specdec", "pipeline")),
        ("def run():\n    from inferlab.cli import call", FACES[0]),
        ("from inferlab.cli import call\ndef main():\n    call()", FACES[0]),
    ],
)
def test_an_upward_import_is_found(source, module):
    assert upward(source, module)


@pytest.mark.parametrize(
    ("source", "module"),
    [
        ("from inferlab import __version__", ("inferlab", "cli")),
        ("from inferlab.kernels import sample", ("inferlab", "specdec", "engine")),
        ("from . import step", ("inferlab", "specdec", "engine")),
        ("from .drafters import base", ("inferlab", "specdec", "engine")),
        ("import torch, inferlab.config", ("inferlab", "models", "hf")),
        ("from inferlab.config_file import build", ("inferlab", "config")),
        ("def main():\n    from inferlab.cli import run_command", FACES[0]),
    ],
)
def test_a_downward_import_is_not(source, module):
    assert not upward(source, module)


@pytest.mark.parametrize(
    "statement",
    [
        "import inferlab",
        "import inferlab.config, inferlab.types, inferlab.prompts, inferlab.output",
        "import inferlab.records, inferlab.client.ping",
        "import inferlab.scheduler",
        "import inferlab.load.processes",
        "import inferlab.cli.bench, inferlab.cli.load, inferlab.cli.bench_compare",
        "import inferlab.simulation.clock, inferlab.simulation.sources",
        "import inferlab.load.prompt_sets, inferlab.load.synthetic, inferlab.load.server_stats",
        "from inferlab.cli import main\ntry:\n    main(['--help'])\nexcept SystemExit: pass",
    ],
)
def test_these_need_no_torch(statement):
    code = (
        f"{statement}\nimport sys; sys.exit(bool({{'torch', 'transformers'}} & set(sys.modules)))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_the_oracle_serves_tests_benchmarks_and_certificates_only():
    """What production falls back on is kernels/fallback. A certificate is a test that users run:
    the target's distribution there must not come from the kernels that it is to judge."""
    wrong = [
        f"{'.'.join(path)} imports kernels.reference"
        for path, file in modules()
        if path[1:3] not in (("kernels", "reference"), ("certify", "cases"))
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8")))
        if isinstance(node, (ast.Import, ast.ImportFrom))
        and "reference"
        in f"{getattr(node, 'module', None)}.{'.'.join(a.name for a in node.names)}".split(".")
    ]
    assert not wrong, "\n".join(wrong)
