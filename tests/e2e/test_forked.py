"""Children of `fork` decode as their parent does, or say at once that they cannot."""

import os
import subprocess
import sys

import pytest

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="no fork on this system")

FORK = """
import os, sys, threading
import torch
from inferlab import LocalBaselineRunner, SpeculativePipeline, kernels

def in_child(work):
    sys.stdout.flush()
    child = os.fork()
    if child == 0:
        try:
            print(work(), flush=True)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", flush=True)
        finally:
            os._exit(0)
    assert os.waitpid(child, 0)[1] == 0
"""


def run(script):
    """What a script prints; two threads, whatever pytest itself has: with one nothing hangs."""
    return subprocess.run(
        [sys.executable, "-c", FORK + script],
        env={**os.environ, "OMP_NUM_THREADS": "2"},
        capture_output=True,
        text=True,
        timeout=100,
        check=True,
    )


def test_a_pipeline_goes_on_in_children_and_grandchildren():
    done = run("""
pipeline = SpeculativePipeline(base_model="inferlab/tiny", draft_model="inferlab/tiny-draft")
def text():
    return pipeline.generate("def main():", max_tokens=24)["text"]
right = text()
in_child(lambda: text() == right)
in_child(lambda: in_child(lambda: text() == right))
print(text() == right)
""")
    assert done.stdout.split() == ["True", "True", "None", "True"]
    assert done.stderr.count("this process was forked") == 2  # the grandchild knows already


def test_the_baseline_and_a_model_loaded_in_the_child():
    done = run("""
def text(runner):
    return runner.run("def main():", max_new_tokens=24)["text"]
runner = LocalBaselineRunner(model_name="inferlab/tiny")
right = text(runner)
in_child(lambda: text(runner) == right)
in_child(lambda: text(LocalBaselineRunner(model_name="inferlab/tiny")) == right)
""")
    assert done.stdout.split() == ["True", "True"]


def test_kernels_alone():
    done = run("""
from inferlab import _C
logits = torch.randn(64, 1, 32000)
position = torch.zeros(64, 1, dtype=torch.int64)
sampling = kernels.SamplingTensors.of(64, temperature=0.8, seed=3)
def draw():
    return kernels.sample(logits, position, sampling)[0]
right = draw()
in_child(lambda: (_C.threading_backend(), _C.num_threads(), torch.equal(draw(), right)))
""")
    assert done.stdout.strip() == "('pool', 2, True)"


def test_a_fork_in_the_middle_of_a_call_is_refused():
    done = run("""
pipeline = SpeculativePipeline(base_model="inferlab/tiny", draft_mode="ngram")
inside, forked = threading.Event(), threading.Event()
step = pipeline.engine.step
def slow_step():
    inside.set()
    forked.wait()
    return step()
pipeline.engine.step = slow_step
thread = threading.Thread(target=pipeline.generate, args=("def main():",), kwargs={"max_tokens": 8})
thread.start()
inside.wait()
in_child(lambda: pipeline.generate("def main():", max_tokens=8))
forked.set()
thread.join()
""")
    assert done.stdout.startswith("RuntimeError: this process was forked from one whose engine is")
