"""Many replicas on two nodes, each in a network namespace of its own: a link that is cut is worse
than a process that dies, since nobody is told."""

from __future__ import annotations

import concurrent.futures
import contextlib
import os
import shutil
import subprocess
import sys
import time
import uuid
from pathlib import Path

import httpx
import pytest

from helpers.served import Served
from inferlab import SpeculativePipeline

pytest.importorskip("ray")
pytestmark = pytest.mark.network

BRIDGE, NODES = "inferlab-br", ("inferlab-a", "inferlab-b")
NET = "10.177.31"
PORT = 6399
LIMIT_S = 300
ENVIRONMENT = {
    "RAY_AUTH_MODE": "token",
    "RAY_AUTH_TOKEN": uuid.uuid4().hex * 2,
    "RAY_USAGE_STATS_ENABLED": "0",
    # How soon a node that no longer answers counts as lost.
    "RAY_health_check_period_ms": "1000",
    "RAY_health_check_timeout_ms": "2000",
    "RAY_health_check_failure_threshold": "3",
}


def ip(*words):
    subprocess.run(["ip", *words], check=True, capture_output=True)


def can_make_namespaces():
    if shutil.which("ip") is None or os.geteuid() != 0:
        return False
    try:
        ip("netns", "add", "inferlab-try")
        ip("netns", "delete", "inferlab-try")
    except (OSError, subprocess.CalledProcessError):
        return False
    return True


needs_namespaces = pytest.mark.skipif(
    not can_make_namespaces(), reason="needs root, and iproute2, for network namespaces"
)


class Network:
    """Two nodes and this machine at one bridge."""

    def __enter__(self):
        self._remove()
        ip("link", "add", BRIDGE, "type", "bridge")
        ip("addr", "add", f"{NET}.254/24", "dev", BRIDGE)
        ip("link", "set", BRIDGE, "up")
        for i, node in enumerate(NODES, 1):
            ip("netns", "add", node)
            ip("link", "add", f"{node}-0", "type", "veth", "peer", "name", "eth0", "netns", node)
            ip("link", "set", f"{node}-0", "master", BRIDGE, "up")
            ip("-n", node, "addr", "add", f"{NET}.{i}/24", "dev", "eth0")
            for device in ("lo", "eth0"):
                ip("-n", node, "link", "set", device, "up")
        return self

    def __exit__(self, *_):
        for node in NODES:
            found = subprocess.run(["ip", "netns", "pids", node], capture_output=True, text=True)
            for pid in found.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
        self._remove()

    def _remove(self):
        for words in (*(("netns", "delete", node) for node in NODES), ("link", "delete", BRIDGE)):
            with contextlib.suppress(subprocess.CalledProcessError):
                ip(*words)

    def link(self, node, state):
        """Cuts a node off ("down"), or joins it again ("up")."""
        ip("link", "set", f"{node}-0", state)


def start_ray(node, address, *flags):
    words = ["ip", "netns", "exec", node, str(Path(sys.executable).with_name("ray")), "start"]
    subprocess.run(
        [*words, "--node-ip-address", address, "--num-cpus", "1", "--num-gpus", "0", *flags],
        check=True,
        capture_output=True,
        timeout=LIMIT_S,
        env={**os.environ, **ENVIRONMENT},
    )


@pytest.fixture
def nodes(tmp_path, monkeypatch):
    """The network with a Ray cluster on it, and `inferlab serve` with a replica on each node."""
    for name, value in ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    with Network() as network:
        head = f"{NET}.1"
        start_ray(NODES[0], head, "--head", f"--port={PORT}", "--include-dashboard=false")
        start_ray(NODES[1], f"{NET}.2", f"--address={head}:{PORT}")
        flags = ("--replicas", "2", "--ray-address", f"{head}:{PORT}", "--host", "0.0.0.0")
        within = ("ip", "netns", "exec", NODES[0])
        with Served(*flags, within=within, start_limit_s=LIMIT_S) as served:
            network.port = served.url.rsplit(":", 1)[1]
            yield network


def ask(network, host, body):
    with httpx.Client(base_url=f"http://{NET}.{host}:{network.port}", trust_env=False) as http:
        return http.post("/v1/completions", json=body, timeout=LIMIT_S)


def running(network):
    """Replicas that have requests in their batch."""
    text = httpx.get(f"http://{NET}.1:{network.port}/metrics", trust_env=False, timeout=60).text
    rows = [row for row in text.splitlines() if row.startswith("vllm:num_requests_running{")]
    return [row for row in rows if float(row.rsplit(" ", 1)[1]) > 0]


def bodies(count, max_tokens):
    return [
        {"prompt": f"def f{i}(", "max_tokens": max_tokens, "temperature": 0.7, "seed": i}
        for i in range(count)
    ]


def until_answered(network, host, body):
    end = time.monotonic() + LIMIT_S
    while True:
        with contextlib.suppress(httpx.HTTPError):
            if (answer := ask(network, host, body)).status_code == 200:
                return answer
        assert time.monotonic() < end, "no answer in time"
        time.sleep(1)


@needs_namespaces
def test_a_node_that_is_cut_off_loses_no_answer(nodes):
    plain = SpeculativePipeline(draft_mode="none")
    few, many = bodies(4, 24), bodies(24, 400)

    def is_right(body, answer):
        assert answer.status_code == 200, answer.text
        sampling = {name: body[name] for name in ("max_tokens", "temperature", "seed")}
        expected = plain.generate(body["prompt"], **sampling)["text"]
        assert answer.json()["choices"][0]["text"] == expected

    for host in (1, 2):  # either node takes requests
        is_right(few[0], until_answered(nodes, host, few[0]))
    with concurrent.futures.ThreadPoolExecutor(len(many)) as pool:
        answers = [pool.submit(ask, nodes, 1, body) for body in many]
        while len(running(nodes)) < 2:
            assert not all(answer.done() for answer in answers), "one node did it all"
            time.sleep(0.05)
        nodes.link(NODES[1], "down")
        found = [answer.result(LIMIT_S) for answer in answers]
    for body, answer in zip(many, found, strict=True):
        is_right(body, answer)
    for body in few:
        is_right(body, ask(nodes, 1, body))
