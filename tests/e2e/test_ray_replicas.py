"""Many replicas by Ray Serve, on a cluster of two nodes on this machine."""

from __future__ import annotations

import concurrent.futures
import contextlib
import json
import os
import signal
import threading
import time
import uuid
from pathlib import Path

import openai
import pytest

# Before ray is imported. Without a token of its own Ray would put one into the user's home.
os.environ.update(
    RAY_AUTH_MODE="token", RAY_AUTH_TOKEN=uuid.uuid4().hex * 2, RAY_USAGE_STATS_ENABLED="0"
)
ray = pytest.importorskip("ray")

from ray import serve  # noqa: E402
from ray.cluster_utils import Cluster  # noqa: E402

from helpers.served import Served  # noqa: E402
from inferlab import SpeculativePipeline  # noqa: E402
from inferlab.server.ray_app import build  # noqa: E402

pytestmark = pytest.mark.network

APP = "inferlab"
LIMIT_S = 300
KEY = "secret"


def eventually(condition, limit_s=LIMIT_S):
    """What a condition gives once it is true; what is not there yet may raise."""
    end = time.monotonic() + limit_s
    while True:
        try:
            if found := condition():
                return found
        except Exception:
            if time.monotonic() > end:
                raise
        assert time.monotonic() < end, "not in time"
        time.sleep(0.5)


def replicas():
    """Facts of all replicas that run, by name."""
    handle = serve.get_deployment_handle("Replica", APP)
    told = handle.broadcast("facts").results(timeout_s=30, return_exceptions=True)
    return {one["name"]: one for one in told if isinstance(one, dict)}


@pytest.fixture(scope="module")
def cluster():
    """Two Ray nodes with a core each, and this process joined to them."""
    one_core = {"num_cpus": 1, "num_gpus": 0}
    head = {**one_core, "include_dashboard": False}
    made = Cluster(initialize_head=True, head_node_args=head)
    try:
        made.second = made.add_node(**one_core)
        ray.init(address=made.address, log_to_driver=False)
        yield made
    finally:
        ray.shutdown()
        made.shutdown()


@pytest.fixture(scope="module")
def server(cluster, tmp_path_factory):
    """`inferlab serve`, joined to the cluster, with a replica on each node."""
    keys = tmp_path_factory.mktemp("keys") / "keys"
    keys.write_text(KEY)
    flags = ("--replicas", "2", "--ray-address", cluster.address, "--api-key-file", str(keys))
    with Served(*flags, "--max-body-mb", "0.1", start_limit_s=LIMIT_S) as served:
        served.http.headers["Authorization"] = f"Bearer {KEY}"
        served.http.timeout = LIMIT_S
        yield served


@pytest.fixture(scope="module")
def plain():
    return SpeculativePipeline(draft_mode="none")


def bodies(count, max_tokens=24):
    return [
        {"prompt": f"def f{i}(", "max_tokens": max_tokens + i, "temperature": 0.7, "seed": i}
        for i in range(count)
    ]


def expected(plain, body):
    sampling = {name: body[name] for name in ("max_tokens", "temperature", "seed")}
    return plain.generate(body["prompt"], **sampling)["text"]


def descendants(pid):
    """Processes that a process has started, and those that these have."""
    parents = {}
    for folder in Path("/proc").iterdir():
        with contextlib.suppress(OSError, ValueError):
            stat = (folder / "stat").read_text()
            parents[int(folder.name)] = int(stat.rpartition(")")[2].split()[1])
    found, newest = set(), {pid}
    while newest:
        newest = {child for child, parent in parents.items() if parent in newest} - found
        found |= newest
    return found


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="needs Linux")
def test_on_a_ray_of_its_own_it_ends_once_what_runs_has_ended():
    flags = ("--replicas", "2", "--cpus-per-replica", "0.5")
    with Served(*flags, start_limit_s=LIMIT_S) as served:
        served.http.timeout = LIMIT_S
        begun = descendants(served.process.pid)
        assert len(begun) > 4
        with concurrent.futures.ThreadPoolExecutor(1) as pool:
            answer = pool.submit(served.complete, max_tokens=900, n=24, ignore_eos=True)
            eventually(lambda: served.metric("vllm:num_requests_running"))
            status = served.terminate(LIMIT_S)
            choices = answer.result(LIMIT_S).json()["choices"]
        assert [choice["finish_reason"] for choice in choices] == ["length"] * 24
        assert status == 0, served.log.read_text()
        assert "Traceback" not in served.log.read_text()
        eventually(lambda: not any(Path(f"/proc/{pid}").exists() for pid in begun))


def tokens_of(server):
    """New tokens by replica, as the metrics tell them."""
    counts = {}
    for line in server.http.get("/metrics").text.splitlines():
        if line.startswith("vllm:generation_tokens_total{"):
            name = line.split('replica="')[1].split('"')[0]
            counts[name] = float(line.rsplit(" ", 1)[1])
    return counts


def test_each_node_has_a_replica_with_its_own_threads(server):
    facts = replicas()
    assert len({one["node"] for one in facts.values()}) == 2
    assert {one["threads"] for one in facts.values()} == {1}
    assert {one["kernel_threads"] for one in facts.values()} == {1}


def test_answers_are_those_of_plain_decoding_wherever_they_come_from(server, plain):
    asked = bodies(24)
    before = tokens_of(server)
    with concurrent.futures.ThreadPoolExecutor(12) as pool:
        answers = list(pool.map(lambda body: server.complete(**body).json(), asked))
    for body, answer in zip(asked, answers, strict=True):
        assert answer["choices"][0]["text"] == expected(plain, body)
    after = tokens_of(server)
    assert len(after) == 2
    assert all(after[name] > before[name] for name in after), "both had some"


def test_streams_go_through_as_they_come(server, plain):
    with openai.OpenAI(base_url=f"{server.url}/v1", api_key=KEY, max_retries=0) as client:
        for body in bodies(4):
            chunks = list(client.completions.create(model="inferlab/tiny", stream=True, **body))
            assert len(chunks) > 5
            text = "".join(chunk.choices[0].text for chunk in chunks)
            assert text == expected(plain, body)
            assert chunks[-1].choices[0].finish_reason in ("length", "stop")


def test_what_begins_alike_goes_to_one_replica(server):
    beginning = "import os\nimport sys\n\n\ndef read_all(path):\n    " * 8
    before = tokens_of(server)
    for i in range(6):
        answer = server.complete(prompt=f"{beginning}# {i}", max_tokens=4).json()
        cached = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert (cached > 0) == (i > 0)
    after = tokens_of(server)
    assert sorted(after[name] - before[name] for name in after) == [0, 24]


def test_keys_limits_and_errors_are_those_of_one_server(server):
    wrong = {"headers": {"Authorization": "Bearer wrong"}}
    assert server.http.post("/v1/completions", json={"prompt": "a"}, **wrong).status_code == 401
    assert server.http.get("/health", **wrong).status_code == 200
    assert server.complete(prompt="a" * 200_000).json()["error"]["code"] == "body_too_large"
    assert server.complete(prompt=5).json()["error"]["param"] == "prompt"
    assert server.complete(model="other").status_code == 404
    assert server.complete(max_tokens=9999).json()["error"]["code"] == "context_length_exceeded"
    assert server.http.get("/v1/models").json()["data"][0]["id"] == "inferlab/tiny"
    assert "<title>" in server.http.get("/").text


def test_a_client_that_leaves_ends_its_requests(server):
    with server.http.stream(
        "POST",
        "/v1/completions",
        json={"prompt": "class", "max_tokens": 900, "n": 16, "ignore_eos": True, "stream": True},
    ) as answer:
        lines = answer.iter_lines()  # its end would be the connection's
        next(lines)
        assert server.metric("vllm:num_requests_running") > 0
    server.wait_until_idle(LIMIT_S)


class Streams:
    """Streams that run in a thread each, and how they ended."""

    def __init__(self, server, count):
        self.ends = []
        self.begun = threading.Semaphore(0)
        self._threads = [threading.Thread(target=self._run, args=(server, i)) for i in range(count)]
        for thread in self._threads:
            thread.start()
        for _ in self._threads:
            assert self.begun.acquire(timeout=LIMIT_S)

    def _run(self, server, i):
        given = {"prompt": f"def g{i}(", "max_tokens": 1000, "n": 24, "ignore_eos": True}
        last = ""
        with server.http.stream("POST", "/v1/completions", json={**given, "stream": True}) as got:
            for line in got.iter_lines():
                if not last:
                    self.begun.release()
                last = line or last
        self.ends.append(last)

    def join(self):
        for thread in self._threads:
            thread.join(LIMIT_S)
            assert not thread.is_alive(), "a stream hangs"
        return self.ends


def test_a_replica_that_is_killed_loses_no_answer(server, plain):
    asked = [{**body, "priority": -1} for body in bodies(48, 200)]
    with concurrent.futures.ThreadPoolExecutor(24) as pool:
        streams = Streams(server, 4)
        answers = [pool.submit(server.complete, **body) for body in asked]
        eventually(lambda: any(answer.done() for answer in answers))
        victim = max(replicas().values(), key=lambda one: one["running"])
        assert victim["running"]
        os.kill(victim["pid"], signal.SIGKILL)
        found = [answer.result(LIMIT_S) for answer in answers]
        ends = streams.join()
    for body, answer in zip(asked, found, strict=True):
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == expected(plain, body)
    broken = [end for end in ends if end != "data: [DONE]"]
    for end in broken:
        assert "lost" in json.loads(end.removeprefix("data: "))["error"]["message"]
    assert broken
    alive = eventually(lambda: len(found := replicas()) == 2 and found)
    assert victim["name"] not in alive
    assert server.http.get("/health").status_code == 200
    body = asked[0]
    assert server.complete(**body).json()["choices"][0]["text"] == expected(plain, body)


def test_a_node_that_is_lost_is_replaced_by_one_that_comes(server, cluster, plain):
    (body,) = bodies(1)
    cluster.remove_node(cluster.second, allow_graceful=False)
    eventually(lambda: len(replicas()) == 1)
    answer = eventually(lambda: (got := server.complete(**body)).status_code == 200 and got)
    assert answer.json()["choices"][0]["text"] == expected(plain, body)
    cluster.second = cluster.add_node(num_cpus=1, num_gpus=0)
    eventually(lambda: len(replicas()) == 2)
    assert server.complete(**body).json()["choices"][0]["text"] == expected(plain, body)


def test_replicas_that_are_replaced_or_taken_away_finish_what_runs(server, plain):
    """Served anew by a builder's arguments alone, as `serve run` gives them; then load brings a
    replica, and its end takes one away."""
    asked = bodies(32, 200)
    texts = [expected(plain, body) for body in asked]

    def complete(i):
        answer = server.complete(**asked[i % 32])
        assert answer.status_code == 200, answer.text
        assert answer.json()["choices"][0]["text"] == texts[i % 32]

    def complete_until(condition, clients):
        stop = threading.Event()

        def load(i):
            while not stop.is_set():
                complete(i)

        with concurrent.futures.ThreadPoolExecutor(clients) as pool:
            loads = [pool.submit(load, i) for i in range(clients)]
            try:
                eventually(condition)
            finally:
                stop.set()
            for one in loads:
                one.result(LIMIT_S)

    delays = {"upscale_delay_s": "0", "downscale_delay_s": "0"}
    scale = {"replicas": "1", "max_replicas": "2", "target_ongoing_requests": "2"}
    app = build({**delays, **scale})
    before = replicas()
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        answers = [pool.submit(complete, i) for i in range(32)]
        eventually(lambda: all(one["running"] for one in replicas().values()))
        serve.run(app, name=APP)
        for answer in answers:
            answer.result(LIMIT_S)
    assert not replicas().keys() & before.keys()
    complete_until(lambda: len(replicas()) == 2, 8)
    both = replicas()
    complete_until(lambda: len(replicas()) == 1, 1)
    assert replicas().keys() < both.keys()
    assert server.http.get("/health").status_code == 200
