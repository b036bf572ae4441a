"""The HTTP client and benchmark against `transformers serve` with the bundled model, offline."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.import_utils import is_serve_available

from inferlab.benchmarks import run_bench
from inferlab.models.assets import BUNDLED
from inferlab.server import ping_vllm
from inferlab.server.ping_vllm import VLLMPingClient

pytestmark = [
    pytest.mark.network,
    pytest.mark.skipif(not is_serve_available(), reason="needs llm-inference-lab[serve]"),
]

TINY = BUNDLED["inferlab/tiny"]
PROMPT = "def read_lines(path):\n    "
TEMPLATE = "{% for message in messages %}{{ message['content'] }}{% endfor %}"
START_LIMIT_S = 120


@dataclass
class Served:
    port: int
    log: Path
    clients: ExitStack

    def client(self, **arguments: object) -> VLLMPingClient:
        defaults = {"retry_delay": 0.0, "timeout": 60.0}
        made = VLLMPingClient("127.0.0.1", self.port, **{**defaults, **arguments})
        return self.clients.enter_context(made)


def _put_into_hub_cache(hub: Path, name: str, *, template: bool) -> None:
    """A copy of the bundled model, laid out as if it had been downloaded as ``name``."""
    revision = "0" * 40
    repository = hub / f"models--{name.replace('/', '--')}"
    snapshot = repository / "snapshots" / revision
    shutil.copytree(TINY, snapshot)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(revision)
    # The server samples where a model's own settings do, and is greedy at temperature 0.
    settings_file = snapshot / "generation_config.json"
    settings = {**json.loads(settings_file.read_text()), "do_sample": True}
    settings_file.write_text(json.dumps(settings))
    template_file = snapshot / "chat_template.jinja"
    if template:
        if not template_file.exists():
            template_file.write_text(TEMPLATE)
        return
    template_file.unlink(missing_ok=True)
    settings = json.loads((snapshot / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (snapshot / "tokenizer_config.json").write_text(json.dumps(settings))


@pytest.fixture(scope="module")
def served(tmp_path_factory):
    folder = tmp_path_factory.mktemp("serve")
    hub = folder / "hub"
    _put_into_hub_cache(hub, "inferlab/tiny", template=True)
    _put_into_hub_cache(hub, "inferlab/untemplated", template=False)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "transformers.cli.transformers", "serve"]
    command += ["--host", "127.0.0.1", "--port", str(port), "--device", "cpu", "--dtype", "float32"]
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "HF_HUB_CACHE": str(hub)}
    # Threads that wait for each other crawl where tests share the cores.
    environment["OMP_NUM_THREADS"] = "1"
    clients = ExitStack()
    server = Served(port, folder / "serve.log", clients)
    with server.log.open("w") as log:
        process = subprocess.Popen(command, env=environment, stdout=log, stderr=log)
    try:
        deadline = time.monotonic() + START_LIMIT_S
        probe_client = server.client()
        while not probe_client.ping(timeout=1):
            said = server.log.read_text()[-2000:]
            assert process.poll() is None, f"transformers serve ended: {said}"
            assert time.monotonic() < deadline, f"transformers serve did not come up: {said}"
            time.sleep(0.2)
        yield server
    finally:
        clients.close()
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


@pytest.fixture(scope="module")
def generated():
    """(text, prompt tokens, new tokens) of the greedy continuation, by Hugging Face itself."""
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    inputs = tokenizer(PROMPT, return_tensors="pt")
    count = inputs["input_ids"].shape[1]
    output = model.generate(**inputs, max_new_tokens=12, do_sample=False)[0, count:]
    return tokenizer.decode(output, skip_special_tokens=True), count, len(output)


def test_models_are_listed(served):
    listed = served.client().get_models()
    assert listed["success"] is True
    assert sorted(listed["model_ids"]) == ["inferlab/tiny", "inferlab/untemplated"]


@pytest.mark.parametrize("stream", [False, True])
@pytest.mark.parametrize("endpoint", ["completions", "chat"])
def test_greedy_text_is_that_of_generate(served, generated, endpoint, stream):
    """The template passes the prompt through, so that chat and completions see the same tokens."""
    text, prompt_tokens, new_tokens = generated
    result = served.client(endpoint=endpoint, model="inferlab/tiny").generate(
        PROMPT, max_tokens=12, temperature=0, stream=stream
    )
    assert result["success"] is True, result
    assert result["generated_text"] == text
    assert result["prompt_tokens"] == prompt_tokens
    assert result["tokens_generated"] == new_tokens
    assert result["tokens_counted_by"] == "usage"
    assert result["finish_reason"] == ("length" if new_tokens == 12 else "stop")
    if stream:
        assert 0 < result["ttft_ms"] < result["latency_ms"]
        assert 1 <= len(result["itl_ms"]) < new_tokens
        assert result["ttft_ms"] + sum(result["itl_ms"]) <= result["latency_ms"] + 1e-6


def test_the_seed_of_a_request_reaches_the_server(served):
    client = served.client(endpoint="completions", model="inferlab/tiny")
    texts = [
        client.generate(PROMPT, max_tokens=12, temperature=1.0, seed=seed)["generated_text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1]
    assert texts[0] != texts[2]


def test_chat_without_a_template_is_a_failure_with_its_reason(served):
    client = served.client(model="inferlab/untemplated", endpoint="chat", retry_attempts=2)
    result = client.generate(PROMPT, max_tokens=4)
    assert result["success"] is False
    assert result["error"].startswith("HTTP 500")
    assert result["attempts"] == 2
    assert client.generate(PROMPT, max_tokens=4, endpoint="completions")["success"] is True


def test_unknown_model_is_a_failure_with_its_reason(served):
    result = served.client(retry_attempts=1).generate(PROMPT, model="inferlab/nobody")
    assert result["success"] is False
    assert result["status_code"] >= 400


def test_ping_command(served, capsys, generated):
    arguments = ["--host", "127.0.0.1", "--port", str(served.port), "--model", "inferlab/tiny"]
    arguments += ["--endpoint", "completions", "--max-tokens", "12", "--temperature", "0"]
    assert ping_vllm.main([*arguments, "--prompt", PROMPT, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["generated_text"] == generated[0]


@pytest.mark.parametrize("stream", [[], ["--stream"]])
def test_bench_command(served, capsys, stream):
    arguments = ["--prompt", "Compare performance", "--mode", "http", "--host", "127.0.0.1"]
    arguments += ["--port", str(served.port), "--iterations", "3", "--endpoint", "completions"]
    assert run_bench.main([*arguments, "--max-tokens", "6", "--json", *stream]) == 0
    stats = json.loads(capsys.readouterr().out)
    assert stats["mode"] == "http"
    assert stats["server"] == f"http://127.0.0.1:{served.port}"
    assert stats["model"] in ("inferlab/tiny", "inferlab/untemplated")
    assert len(stats["latency_ms"]["raw"]) == 3
    # The seed is pinned: every iteration gets the same text.
    assert len({result["generated_text"] for result in stats["raw_results"]}) == 1
    if stream:
        assert all(ttft > 0 for ttft in stats["ttft_ms"]["raw"])
        assert stats["ttft_ms"]["max"] < stats["latency_ms"]["max"]


def test_a_load(served, capsys, generated):
    arguments = ["--prompt", PROMPT, "--mode", "http", "--host", "127.0.0.1", "--no-progress"]
    arguments += ["--port", str(served.port), "--endpoint", "completions", "--temperature", "0"]
    arguments += ["--model", "inferlab/tiny", "--concurrency", "2", "--requests", "4"]
    assert run_bench.main([*arguments, "--max-tokens", "12", "--json"]) == 0
    stats = json.loads(capsys.readouterr().out)
    text, prompt_tokens, new_tokens = generated
    assert {record["text"] for record in stats["records"]} == {text}
    assert stats["requests"]["succeeded"] == 4
    assert stats["throughput"]["output_tokens"] == 4 * new_tokens
    assert stats["throughput"]["input_tokens"] == 4 * prompt_tokens
    assert stats["distributions"]["ttft_ms"]["count"] == 4
    assert stats["acceptance"]["of_server"] is None
