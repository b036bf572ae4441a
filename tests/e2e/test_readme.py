"""The README's commands and examples, run as they are written."""

from __future__ import annotations

import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import inferlab

README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


def run(arguments: list[str], cwd: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}
    return subprocess.run(
        arguments, cwd=cwd, env=environment, capture_output=True, text=True, timeout=300
    )


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, tmp_path):
    program, *arguments = shlex.split(command)
    assert program == "inferlab"
    done = run([sys.executable, "-m", "inferlab", *arguments], tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


@pytest.mark.parametrize("example", blocks("python"))
def test_examples(example, tmp_path):
    done = run([sys.executable, "-c", example], tmp_path)
    assert done.returncode == 0, done.stderr


def test_the_first_commands_are_the_install_and_the_tests():
    first, second = blocks("")[:2]
    assert first.strip().startswith("pip install . && inferlab specdec")
    assert second.strip() == "pip install '.[test]' && pytest"


def test_every_public_name_is_listed():
    section = TEXT.split("## Public names")[1].split("\n## ")[0]
    listed = set(re.findall(r"`(\w+)`", section)) - {"inferlab"}
    assert listed == set(inferlab.__all__)
