"""What works without any of the extras: all commands but those that say what they need."""

from __future__ import annotations

import subprocess
import sys

import pytest

EXTRAS = (
    *("aiohttp", "orjson", "prometheus_client", "fastapi", "uvicorn", "starlette", "matplotlib"),
    *("llguidance", "bitsandbytes", "torchao", "socksio", "shtab", "ray", "openai"),
)
WITHOUT = f"""
import sys
for name in {EXTRAS!r}:
    sys.modules[name] = None
from inferlab.cli import COMMANDS, main
"""
FAKE = ["--impl", "fake", "--prompt", "a", "--max-tokens", "4"]


def run(program: str) -> subprocess.CompletedProcess[str]:
    code = WITHOUT + program
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=300)


def test_every_command_tells_its_flags():
    result = run(
        "for name in COMMANDS:\n"
        "    try:\n"
        "        status = main([*name.split(), '--help'])\n"
        "    except SystemExit as end:\n"
        "        status = end.code\n"
        "    assert not status, name\n"
    )
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    "words",
    [
        ["specdec", *FAKE],
        ["bench", "--mode", "specdec", *FAKE, "--iterations", "1"],
        ["schema", "bench"],
    ],
    ids=lambda words: " ".join(words[:3]),
)
def test_what_needs_none_of_them_runs(words):
    result = run(f"raise SystemExit(main({words!r}))")
    assert result.returncode == 0, result.stderr


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (
            ["bench", "--mode", "http", "--concurrency", "2"],
            r"pip install 'llm-inference-lab[load]'",
        ),
        (["serve"], "pip install 'llm-inference-lab[serve]'"),
        (["calibrate", "--reliability", "--plot", "x.png"], "pip install matplotlib"),
    ],
    ids=lambda words: words[0],
)
def test_what_needs_one_says_so(words, message):
    result = run(f"raise SystemExit(main({words!r}))")
    assert result.returncode == 2
    assert message in result.stderr
    assert "Traceback" not in result.stderr
