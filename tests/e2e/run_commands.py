"""Runs many `python -m ...` command lines in one interpreter, since importing torch takes seconds.

Reads a JSON list of command lines from stdin and prints a JSON list of
``{"code", "stdout", "stderr"}``. Each command runs as ``__main__`` with its own arguments. An entry
that does not start with ``python -m`` is Python code to execute.
"""

import contextlib
import io
import json
import runpy
import shlex
import sys
import traceback


def run(command: str) -> dict[str, object]:
    stdout, stderr = io.StringIO(), io.StringIO()
    code: object = 0
    with contextlib.redirect_stdout(stdout), contextlib.redirect_stderr(stderr):
        try:
            words = shlex.split(command) if command.startswith("python -m ") else []
            if words:
                sys.argv = words[2:]
                if not hasattr(sys.modules.get(words[2]), "__path__"):  # a package's parts stay
                    sys.modules.pop(words[2], None)
                runpy.run_module(words[2], run_name="__main__", alter_sys=True)
            else:
                exec(compile(command, "<example>", "exec"), {"__name__": "__main__"})
        except SystemExit as exit_:
            code = exit_.code or 0
        except Exception:
            traceback.print_exc()
            code = "exception"
    return {"code": code, "stdout": stdout.getvalue(), "stderr": stderr.getvalue()}


if __name__ == "__main__":
    commands = json.load(sys.stdin)
    results = [run(command) for command in commands]
    json.dump(results, sys.__stdout__)
