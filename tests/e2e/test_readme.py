"""The README's commands and examples, run as they are written."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest

import inferlab

DRIVER = Path(__file__).with_name("run_commands.py")
README = Path(__file__).parents[2] / "README.md"
TEXT = README.read_text()


def blocks(language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, flags=re.DOTALL | re.MULTILINE)


COMMANDS = [line for block in blocks("bash") for line in block.splitlines() if line.strip()]


ENVIRONMENT = {**os.environ, "HF_HUB_OFFLINE": "1", "COLUMNS": "120"}


def arguments(command: str) -> list[str]:
    program, *words = shlex.split(command)
    assert program == "inferlab"
    return words


@pytest.fixture(scope="module")
def outcomes(tmp_path_factory):
    """Command or example -> what it did, all of them in one interpreter."""
    written = [*COMMANDS, *blocks("python")]
    lines = [shlex.join(["python", "-m", "inferlab", *arguments(c)]) for c in COMMANDS]
    done = subprocess.run(
        [sys.executable, str(DRIVER)],
        input=json.dumps([*lines, *blocks("python")]),
        cwd=tmp_path_factory.mktemp("elsewhere"),
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=600,
    )
    assert done.returncode == 0, done.stderr
    return dict(zip(written, json.loads(done.stdout), strict=True))


@pytest.mark.parametrize("command", COMMANDS)
def test_commands(command, outcomes):
    assert outcomes[command]["code"] == 0, outcomes[command]["stderr"]
    assert outcomes[command]["stdout"].strip()


@pytest.mark.parametrize("example", blocks("python"))
def test_examples(example, outcomes):
    assert outcomes[example]["code"] == 0, outcomes[example]["stderr"]


def test_a_command_in_a_process_of_its_own(tmp_path):
    done = subprocess.run(
        [sys.executable, "-m", "inferlab", *arguments(COMMANDS[0])],
        cwd=tmp_path,
        env=ENVIRONMENT,
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip()


def test_the_first_commands_are_the_install_and_the_tests():
    first, second = blocks("")[:2]
    assert first.strip().startswith("pip install . && inferlab specdec")
    assert second.strip() == "pip install '.[test]' && pytest -n auto"


def test_every_public_name_is_listed():
    section = TEXT.split("## Public names")[1].split("\n## ")[0]
    listed = set(re.findall(r"`(\w+)`", section)) - {"inferlab"}
    assert listed == set(inferlab.__all__)
