"""What a person sees at a terminal: text as it comes, and a conversation."""

from __future__ import annotations

import os
import pty
import select
import shutil
import subprocess
import sys
import time

import pytest

from inferlab import SpeculativePipeline
from inferlab.models import BUNDLED

TEMPLATE = (
    "{% for m in messages %}# {{ m.role }}: {{ m.content }}\n{% endfor %}"
    "{% if add_generation_prompt %}# assistant:{% endif %}"
)


def at_a_terminal(*words: str, typed: str = "") -> tuple[int, str, int]:
    """Exit status, what was shown, and in how many pieces it came."""
    ours, theirs = pty.openpty()
    process = subprocess.Popen(
        [sys.executable, "-m", "inferlab", *words],
        stdin=theirs if typed else subprocess.DEVNULL,
        stdout=theirs,
        stderr=subprocess.PIPE,
        env={**os.environ, "COLUMNS": "200", "TERM": "dumb", "OMP_NUM_THREADS": "1"},
    )
    os.close(theirs)
    if typed:
        os.write(ours, typed.encode())
    shown, pieces, end = b"", 0, time.monotonic() + 120
    while time.monotonic() < end:
        if not select.select([ours], [], [], 0.2)[0]:
            if process.poll() is not None:
                break
            continue
        try:
            data = os.read(ours, 4096)
        except OSError:  # the other side is closed
            break
        if not data:
            break
        shown += data
        pieces += 1
    os.close(ours)
    status = process.wait(timeout=30)
    assert status == 0, process.stderr.read().decode()
    return status, shown.decode().replace("\r\n", "\n"), pieces


@pytest.mark.parametrize("command", ["specdec", "baseline"])
def test_text_is_shown_as_it_comes_and_once(command):
    words = ("--prompt", "def main():", "--max-tokens", "40", "--temperature", "0")
    _, shown, pieces = at_a_terminal(command, *words)
    result = SpeculativePipeline().generate("def main():", max_tokens=40)
    text = result["text"] if command == "specdec" else "def main():" + result["text"]
    assert shown.startswith(text + "\n")
    assert shown.count(text) == 1
    assert pieces > 3
    assert "40 tokens (length)" in shown


@pytest.fixture(scope="module")
def talker(tmp_path_factory):
    path = tmp_path_factory.mktemp("model") / "talker"
    shutil.copytree(BUNDLED["inferlab/tiny"], path)
    (path / "chat_template.jinja").write_text(TEMPLATE)
    return str(path)


def test_a_conversation_remembers_what_was_said(talker):
    typed = "import os\n\nand then?\n\x04"
    words = ("--base-model", talker, "--max-tokens", "12", "--system", "be brief")
    _, shown, _ = at_a_terminal("chat", *words, typed=typed)
    pipeline = SpeculativePipeline(base_model=talker)
    talk = [{"role": "system", "content": "be brief"}]
    for message in ("import os", "and then?"):
        talk.append({"role": "user", "content": message})
        result = pipeline.generate(messages=talk, max_tokens=12)
        assert result["text"] + "\n" in shown
        talk.append({"role": "assistant", "content": result["text"]})
    assert shown.count("12 tokens (length)") == 2


def test_a_conversation_outlives_bad_messages_and_a_full_context(talker):
    """In a context of 1,024 tokens: a message that is too long, one that is no text, many short."""
    lines = [b"import os " * 600, b"h\xff", *[b"import sys " * 60] * 8]
    done = subprocess.run(
        [sys.executable, "-m", "inferlab", "chat", "--base-model", talker, "--max-tokens", "12",
         "--system", "be brief"],
        input=b"\n".join(lines), capture_output=True, timeout=100,
    )  # fmt: skip
    shown, errors = done.stdout.decode(), done.stderr.decode()
    assert done.returncode == 0, errors
    assert shown.count("12 tokens") == 8
    assert "exceed the context" in errors
    assert "half of a surrogate pair" in errors
    assert errors.count("error: ") == 2
    assert "the oldest 2 messages are gone" in shown


def test_prompts_as_messages(talker):
    done = subprocess.run(
        [sys.executable, "-m", "inferlab", "specdec", "--base-model", talker, "--chat", "--prompt",
         "import os", "--max-tokens", "12"],
        capture_output=True, text=True, timeout=100, check=True,
    )  # fmt: skip
    pipeline = SpeculativePipeline(base_model=talker)
    message = {"role": "user", "content": "import os"}
    expected = pipeline.generate(messages=[message], max_tokens=12)
    assert done.stdout.startswith(expected["text"])
    ids = pipeline.chat_prompt([message])
    assert pipeline.target.tokenizer.decode(ids) == "# user: import os\n# assistant:"
    with pytest.raises(ValueError, match="prompt and messages are both given"):
        pipeline.generate("a", messages=[message])


def test_a_model_without_a_chat_template_is_refused_before_the_first_message(tmp_path):
    plain = tmp_path / "plain"
    shutil.copytree(BUNDLED["inferlab/tiny"], plain)
    (plain / "chat_template.jinja").unlink()
    done = subprocess.run(
        [sys.executable, "-m", "inferlab", "chat", "--base-model", str(plain)],
        input="hello\n", capture_output=True, text=True, timeout=100,
    )  # fmt: skip
    assert done.returncode == 2
    assert f"{plain} has no chat template" in done.stderr
