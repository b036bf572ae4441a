"""What --output and stdout hold, in the end and meanwhile: files, links, FIFOs, closed streams."""

import json
import os
import shlex
import stat
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from helpers.collecting import arguments, collect, fake_result, shout
from inferlab import output
from inferlab.cli import results
from inferlab.errors import UsageError
from inferlab.prompts import Prompt


def test_a_link_stays_and_the_file_behind_it_is_replaced(tmp_path):
    there = tmp_path / "there"
    there.mkdir()
    (there / "real.json").write_text("old")
    (there / "real.json").chmod(0o640)
    hard = tmp_path / "old.json"
    hard.hardlink_to(there / "real.json")
    link, second, dangling = (tmp_path / name for name in ("link", "second", "dangling"))
    link.symlink_to(Path("there") / "real.json")
    second.symlink_to(link)
    dangling.symlink_to(there / "new.json")
    for path in (second, dangling):
        output.check_output(path)
        output.write_json(path, 3)
        assert path.is_symlink()
        assert path.read_text() == "3\n"
    assert (there / "real.json").stat().st_mode & 0o777 == 0o640
    assert hard.read_text() == "old", "replaced, not written over"
    assert sorted(file.name for file in there.iterdir()) == ["new.json", "real.json"]
    (tmp_path / "nowhere").symlink_to(tmp_path / "no" / "x")
    with pytest.raises(UsageError, match="its directory does not exist"):
        output.check_output(tmp_path / "nowhere")


def read_in_background(path: Path) -> tuple[threading.Thread, list[bytes]]:
    read: list[bytes] = []
    thread = threading.Thread(target=lambda: read.append(path.read_bytes()))
    thread.start()
    return thread, read


@pytest.mark.parametrize("linked", [False, True])
def test_a_fifo_is_written_to(capsys, tmp_path, linked):
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    path = tmp_path / "link" if linked else fifo
    if linked:
        path.symlink_to(fifo)
    output.check_output(path)
    thread, read = read_in_background(fifo)
    _, code = collect([Prompt("a")], shout, arguments(prompt="a", output=str(path)))
    thread.join()
    assert code == 0
    assert json.loads(read[0]) == json.loads(capsys.readouterr().out)
    assert fifo.is_fifo()
    assert path.is_symlink() == linked
    assert len(list(tmp_path.iterdir())) == 1 + linked, "and has no journal"


def test_a_device_is_written_to(monkeypatch, tmp_path):
    """A file stands for the device, as os.stat tells it: it must stay the same file."""
    path = tmp_path / "device"
    path.write_text("")
    inode = path.stat().st_ino
    real = os.stat

    def device(at, **more):
        found = list(real(at, **more))
        if str(at) == str(path):
            found[0] = stat.S_IFCHR | 0o666
        return os.stat_result(found)

    monkeypatch.setattr(os, "stat", device)
    output.check_output(path)
    assert output.Journal(path).path is None
    output.write_text(path, "x")
    monkeypatch.undo()
    assert path.read_text() == "x"
    assert path.stat().st_ino == inode


def test_stdout_by_its_name_as_a_file_keeps_its_place(tmp_path):
    """As `--output /dev/stdout > FILE`: nothing is lost of what else goes there."""
    file = tmp_path / "out"
    code = (
        "import sys; from inferlab.output import write_json\n"
        f"print('before'); write_json({str(file)!r}, 3); print('after')"
    )
    with file.open("wb") as out:
        subprocess.run([sys.executable, "-c", code], stdout=out, check=True)
    assert file.read_text() == "before\n3\nafter\n"


def test_what_is_finished_is_in_the_journal(tmp_path, caplog):
    path = tmp_path / "r.json"
    lines = []

    def generate(texts, on_result):
        for place in (1, 0):  # as requests of a batch finish: in any order
            on_result(place, fake_result(texts[place]))
            lines.append(journal.read_text().count("\n"))
        return shout(texts)

    journal = tmp_path / "r.json.part"
    journal.write_text("of a run that was killed\n")
    prompts = [Prompt(text, id=n) for n, text in enumerate(["a", "b", "", "bad", "c", "d"])]
    args = arguments(prompts="p", output=str(path), json=False)
    with caplog.at_level("INFO", "inferlab"):
        collected = results.run_prompts(prompts, generate, args, batch_size=2)
    assert f"results are in {journal} while it runs" in caplog.text
    assert lines == [1, 2, 5, 6]
    kept = [json.loads(line) for line in journal.read_text().splitlines()]
    assert [entry["id"] for entry in kept] == [1, 0, 2, 3, 5, 4]
    assert [entry["id"] for entry in kept if "error" in entry] == [2, 3]
    assert sorted(kept, key=lambda entry: entry["id"]) == collected.results
    assert results.report(collected, args, sys.stdout, lambda result: None) == 1
    assert json.loads(path.read_text())["results"] == collected.results
    assert list(tmp_path.iterdir()) == [path]


def test_a_journal_in_which_nothing_is_goes(tmp_path):
    args = arguments(prompt="bad", output=str(tmp_path / "r.json"))
    with pytest.raises(ValueError, match="too long"):
        collect([Prompt("bad")], shout, args)
    assert list(tmp_path.iterdir()) == []


def test_a_full_disk_ends_the_journal_and_not_the_run(capsys, caplog, tmp_path, monkeypatch):
    journal = output.Journal(tmp_path / "r.json")
    journal._file.close()
    read_only = open(os.devnull, "rb", buffering=0)  # noqa: SIM115
    monkeypatch.setattr(journal, "_file", read_only)
    journal.add({"a": 1})
    journal.add({"a": 2})
    assert caplog.text.count("r.json.part ends here: ") == 1
    journal.close(written=True)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("kind", ["link", "folder", "fifo"])
def test_what_is_in_the_journals_way_is_left_alone(tmp_path, kind):
    part = tmp_path / "r.json.part"
    if kind == "link":
        part.symlink_to(tmp_path / "precious")
    elif kind == "folder":
        part.mkdir()
    else:
        os.mkfifo(part)
    with pytest.raises(UsageError, match=r"r\.json\.part is in the way"):
        output.Journal(tmp_path / "r.json")
    assert list(tmp_path.iterdir()) == [part]


def test_a_killed_process_leaves_what_it_had_finished(tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text(
        "".join(json.dumps({"prompt": f"p {n}", "id": n}) + "\n" for n in range(9999))
    )
    part = tmp_path / "r.json.part"
    words = ["specdec", "--impl", "fake", "--max-tokens", "4", "--prompts", str(prompts)]
    command = [sys.executable, "-m", "inferlab", *words, "--output", str(tmp_path / "r.json")]
    with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL) as process:
        deadline = time.monotonic() + 120
        while not part.is_file() or part.read_text().count("\n") < 3:
            assert process.poll() is None
            assert time.monotonic() < deadline
            time.sleep(0.02)
        process.kill()
    found = [json.loads(line) for line in part.read_text().splitlines()]
    assert [entry["id"] for entry in found] == list(range(len(found)))
    assert all(entry["num_tokens"] == 4 and entry["record"] for entry in found)
    assert sorted(file.name for file in tmp_path.iterdir()) == ["p.jsonl", "r.json.part"]


def test_a_file_that_cannot_be_written_leaves_the_journal_and_the_result_on_stdout(
    capsys, caplog, tmp_path
):
    (tmp_path / "r.json").mkdir()
    with pytest.raises(UsageError, match="cannot be written"):
        collect([Prompt("a")], shout, arguments(prompt="a", output=str(tmp_path / "r.json")))
    assert json.loads(capsys.readouterr().out)["text"] == "A"
    assert sorted(file.name for file in tmp_path.iterdir()) == ["r.json", "r.json.part"]
    assert json.loads((tmp_path / "r.json.part").read_text())["text"] == "A"
    assert f"what was finished is in {tmp_path / 'r.json.part'}" in caplog.text


def test_output_that_cannot_be_written_is_refused_before_the_work(tmp_path):
    with pytest.raises(UsageError, match="its directory does not exist"):
        output.check_output(str(tmp_path / "no" / "x.json"))
    with pytest.raises(UsageError, match="is a directory"):
        output.check_output(str(tmp_path))
    output.check_output(None)


# --- closed streams -----------------------------------------------------------------------------


@pytest.mark.parametrize("json_too", [["--json"], []])
def test_a_closed_stdout_is_a_failure_and_loses_no_file(tmp_path, json_too):
    path = tmp_path / "r.json"
    words = ["specdec", "--impl", "fake", "--max-tokens", "4", "--prompt", "x"]
    script = f"exec {shlex.join([sys.executable, '-m', 'inferlab', *words, *json_too])}"
    run = subprocess.run(
        ["sh", "-c", f"{script} --output {shlex.quote(str(path))} >&-"],
        stderr=subprocess.PIPE, text=True, check=False,
    )  # fmt: skip
    assert run.returncode == 1
    assert run.stderr == "error: stdout is closed; what was to be printed is lost\n"
    assert json.loads(path.read_text())["num_tokens"] == 4


def test_a_closed_stderr_spoils_nothing(tmp_path):
    prompts = tmp_path / "p.jsonl"
    prompts.write_text('{"prompt": "a"}\n{"prompt": ""}\n')
    words = ["specdec", "--impl", "fake", "--max-tokens", "4", "--prompts", str(prompts), "--json"]
    script = f"exec {shlex.join([sys.executable, '-m', 'inferlab', *words])} 2>&-"
    run = subprocess.run(["sh", "-c", script], stdout=subprocess.PIPE, text=True, check=False)
    assert run.returncode == 1
    assert ["error" in result for result in json.loads(run.stdout)["results"]] == [False, True]


def test_the_descriptor_of_a_closed_stdout_is_not_given_to_a_file(tmp_path):
    code = (
        "import argparse, os, sys\nfrom inferlab.cli.parser import call\n"
        "def run(args):\n"
        "    with open('log', 'w') as file: os.write(1, b'a library that prints')\n"
        "    return 0\n"
        "sys.exit(call(run, argparse.Namespace()))"
    )
    script = f"exec {shlex.join([sys.executable, '-c', code])} >&-"
    assert subprocess.run(["sh", "-c", script], cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "log").read_text() == ""


def test_a_request_that_fails_alone_is_not_counted(capsys):
    def generate(texts):
        error = RuntimeError("prompt 0: NaN")
        error.results = [fake_result("a", error="NaN")]
        raise error

    with pytest.raises(RuntimeError, match=r"^NaN$"):
        collect([Prompt("a")], generate, arguments(prompt="a"))
