"""What test modules share lies in tests/helpers; they read nothing outside the repository."""

import ast
from pathlib import Path

TESTS = Path(__file__).resolve().parents[1]
MODULES = sorted(path for path in TESTS.rglob("*.py") if TESTS / "helpers" not in path.parents)


def imported(path):
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom):
            yield node.module or ""
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        elif isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)


def test_no_test_module_imports_another():
    for path in TESTS.rglob("*.py"):
        for name in imported(path):
            assert not any(part.startswith("test_") for part in name.split(".")), (path, name)


def test_no_path_leads_out_of_the_repository():
    for path in MODULES:
        depth = len(path.relative_to(TESTS).parts)  # of its own folder below the repository
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Subscript) or not isinstance(node.value, ast.Attribute):
                continue
            if node.value.attr == "parents" and isinstance(node.slice, ast.Constant):
                assert node.slice.value <= depth, f"{path}:{node.lineno}"
