"""What the kernel benchmarks compare with, count and time: clocks, bytes, torch ways, peers."""

from __future__ import annotations

import contextlib
import math
import sys
import types
from pathlib import Path

import pytest
import torch

from inferlab import kernels
from inferlab.kernels import SamplingTensors, reference

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


@pytest.fixture(autouse=True)
def _benchmark_modules(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))


# ---- clocks and rounds --------------------------------------------------------------------------


class FakeEvent:
    """A CUDA event on a device whose time is `now` in ms; knows whether it was waited for."""

    now = 0.0

    def __init__(self):
        self.at = self.synchronized = None

    def record(self):
        self.at = FakeEvent.now

    def synchronize(self):
        self.synchronized = True

    def elapsed_time(self, end):
        assert end.synchronized, "read before the device got there"
        return end.at - self.at


def test_cuda_clock_gives_seconds_per_call_of_each_pair():
    from measure import CudaClock

    clock = CudaClock(FakeEvent)
    clock.begin(4)
    for milliseconds in (2.0, 6.0):  # a second pair begins anew
        start = clock()
        FakeEvent.now += milliseconds
        assert clock() - start == pytest.approx(milliseconds / 1e3 / 4)
        FakeEvent.now += 100.0  # between pairs: nobody's time


def test_a_round_that_raised_leaves_no_start_behind():
    from measure import CudaClock

    clock = CudaClock(FakeEvent)
    clock.begin(1)
    clock()
    FakeEvent.now += 50.0  # here the timed call raised: no second reading
    clock.begin(2)
    start = clock()
    FakeEvent.now += 3.0
    assert clock() - start == pytest.approx(0.0015)


def test_host_clock_gives_seconds_per_call(monkeypatch):
    import measure

    ticks = iter([10.0, 10.8])
    monkeypatch.setattr(measure.time, "perf_counter", lambda: next(ticks))
    clock = measure.HostClock()
    clock.begin(8)
    start = clock()
    assert clock() - start == pytest.approx(0.1)


class FakeDevice:
    """A device whose clock advances by what the called functions say they take."""

    def __init__(self):
        self.now, self.log = 0.0, []
        self.clock = types.SimpleNamespace(begin=lambda calls: self.log.append(calls))

    def flush(self):
        self.log.append("flush")
        self.now += 5.0

    def work(self, seconds):
        def fn(case):
            self.log.append(case)
            self.now += seconds

        return fn

    def prepare(self, fn, cases):
        return (lambda: [fn(case) for case in cases]), "fake"

    def seconds(self, run, calls=1):
        start = self.now
        run()
        return (self.now - start) / calls


def test_a_cold_round_flushes_first_and_uses_each_case_once():
    from measure import Contestant

    device = FakeDevice()
    contestant = Contestant(device, device.work(0.001), list("abcd"), cold=True)
    device.log.clear()
    contestant.round()
    assert device.log == ["flush", 4, *"abcd"]
    assert contestant.samples == [pytest.approx(0.001)]  # the flush is not in it


def test_a_slow_op_gets_fewer_cases_and_a_warm_one_repeats_them():
    from measure import ROUND_S, WARM_ROUND_S, Contestant

    device = FakeDevice()
    assert Contestant(device, device.work(ROUND_S), list("abcd"), cold=True).calls == 1
    assert Contestant(device, device.work(ROUND_S / 2.5), list("abcd"), cold=True).calls == 2
    warm = Contestant(device, device.work(WARM_ROUND_S / 10.5), ["a"], cold=False)
    assert warm.calls == 10
    device.log.clear()
    warm.round()
    assert device.log == [*["a"] * 10, 10, *["a"] * 10]  # an untimed round first


def test_rounds_fill_the_budget_within_bounds():
    from measure import rounds_within

    fast = types.SimpleNamespace(calls=10, once_s=0.001, cold=True)
    assert rounds_within([fast, fast], flush_s=0.01, budget_s=0.8) == 20
    assert rounds_within([fast], flush_s=10.0, budget_s=0.8) == 7
    assert rounds_within([fast], flush_s=0.0, budget_s=1e6) == 100
    assert rounds_within([fast], flush_s=0.0, budget_s=0) == 1


class FakeGraph:
    """A CUDA graph that holds what was called while it was captured."""

    capturing = None

    def replay(self):
        for call in self.calls:
            call()


def launch(call):
    """A kernel launch: recorded under capture, else run."""
    if FakeGraph.capturing is None:
        call()
    else:
        FakeGraph.capturing.calls.append(call)


@pytest.fixture
def fake_cuda(monkeypatch):
    @contextlib.contextmanager
    def graph(g):
        FakeGraph.capturing, g.calls = g, []
        try:
            yield
        finally:
            FakeGraph.capturing = None

    stream = types.SimpleNamespace(wait_stream=lambda other: None)
    fakes = {
        "Stream": lambda: stream,
        "current_stream": lambda: stream,
        "stream": lambda s: contextlib.nullcontext(),
        "synchronize": lambda: None,
        "CUDAGraph": FakeGraph,
        "graph": graph,
    }
    for name, fake in fakes.items():
        monkeypatch.setattr(torch.cuda, name, fake)


def test_a_round_on_cuda_is_one_graph_of_all_its_calls(fake_cuda):
    from measure import Cuda

    done = []
    device = object.__new__(Cuda)
    run, how = device.prepare(lambda case: launch(lambda: done.append(case)), "abc")
    assert how == "graph"
    assert done == list("abc"), "once before the capture, which runs nothing"
    run()
    assert done == list("abcabc")


def test_what_no_graph_can_hold_is_called_between_events(fake_cuda):
    from measure import Cuda

    done = []

    def waits_for_the_device(case):
        if FakeGraph.capturing is not None:
            raise RuntimeError("operation not permitted when stream is capturing")
        done.append(case)

    run, how = object.__new__(Cuda).prepare(waits_for_the_device, "ab")
    assert how == "events"
    done.clear()
    run()
    assert done == list("ab")


# ---- bytes --------------------------------------------------------------------------------------


def total_bytes(*tensors):
    return sum(t.numel() * t.element_size() for t in tensors)


def test_floors_are_the_sizes_of_the_tensors_that_are_read_and_written():
    import floors

    batch, nodes, page_size, kv_heads, q_heads, dim, length = 3, 70, 16, 2, 6, 32, 90
    parents = torch.tensor([[-1, *range(nodes - 1)]] * batch, dtype=torch.int32)
    links = kernels.build_tree(parents)
    assert floors.build_tree(batch, nodes) == total_bytes(parents, *links)

    logits = torch.randn(batch, nodes, 50).half()
    lens = torch.zeros(batch, dtype=torch.int32)
    greedy = SamplingTensors.of(batch)
    positions = torch.zeros(batch, nodes, dtype=torch.int64)
    tokens = kernels.sample(logits, positions, greedy, num_samples=2)
    assert floors.sample(batch * nodes, 50, 2, 2) == total_bytes(logits, positions, tokens)
    drafted = torch.zeros(batch, nodes, dtype=torch.int32)
    walk = kernels.verify_tree_match(logits, drafted, links, lens, greedy)
    everything = floors.verify(batch * nodes, 50, 2, batch, nodes)
    assert everything == total_bytes(logits, *walk)

    q = torch.randn(batch, nodes, q_heads, dim)
    slots = math.ceil((length + nodes) / page_size)
    table = torch.arange(batch * slots, dtype=torch.int32).reshape(batch, slots)
    keys = torch.empty(batch, length + nodes, kv_heads, dim)
    sizes = (batch, nodes, q_heads, kv_heads, dim, length, 4, page_size)
    chain = total_bytes(q, q, table, keys, keys)
    assert floors.attention(*sizes, tree=False) == chain
    assert floors.attention(*sizes, tree=True) == chain + total_bytes(links.ancestors)

    cos = torch.empty(batch, nodes, dim)
    k = torch.empty(batch, nodes, kv_heads, dim)
    moved = total_bytes(q, q, k, k, k, k, cos, cos)
    assert floors.rope_append(batch, nodes, q_heads, kv_heads, dim, 4) == moved
    row = kv_heads * dim * 4
    assert floors.kv_append(batch * nodes, row) == total_bytes(k, k, k, k)
    assert floors.kv_gather(batch * nodes, row) == total_bytes(k, k)
    pages = torch.empty(5, 7, page_size, kv_heads, dim)  # 5 layers, 7 pages
    assert floors.kv_copy_pages(5, 7, page_size * row) == 4 * total_bytes(pages)
    assert floors.kv_compact(5, 7 * page_size, row) == 4 * total_bytes(pages)
    x, weight = torch.empty(4, dim), torch.empty(9, dim)
    assert floors.linear(4, dim, 9, 4) == total_bytes(x, weight, torch.empty(4, 9))
    assert floors.rms_norm(4, dim, 4) == total_bytes(x, x, weight[0])
    assert floors.silu_mul(4, dim // 2, 4) == total_bytes(x, x[:, : dim // 2])


# ---- the torch ways -----------------------------------------------------------------------------


@pytest.mark.parametrize("tree", ["binary", "chain"])
def test_torch_build_tree_is_right(tree):
    import torch_ways
    from inputs import parents_of

    parents = torch.tensor([parents_of(tree, 70)] * 2, dtype=torch.int32)
    *links, ancestors = torch_ways.build_tree(parents)
    want = reference.build_tree(parents)
    for got, expected in zip(links, want, strict=False):
        assert torch.equal(got.int(), expected)
    bits = torch.arange(70)
    assert torch.equal(ancestors, (want[3][:, :, bits // 64] >> (bits % 64) & 1).bool())


def drafted_case(batch, tree, nodes, vocab):
    """Logits, tokens that a greedy walk follows for a while, links, children, levels."""
    from inputs import children_of, levels_of, parents_of

    torch.manual_seed(0)
    parents = parents_of(tree, nodes)
    logits = torch.randn(batch, nodes, vocab)
    tokens = torch.randint(vocab, (batch, nodes), dtype=torch.int32)
    for child, parent in enumerate(parents[1:], 1):
        b = torch.arange(batch)  # sequences stop at different depths, and take different turns
        follow = (b % 3 != child % 3) & (b != parent)
        tokens[:, child] = torch.where(follow, logits[:, parent].argmax(-1), tokens[:, child])
    links = kernels.build_tree(torch.tensor([parents] * batch, dtype=torch.int32))
    return logits, tokens, links, children_of(parents), levels_of(parents)


def emitted(tensor):
    return [[t for t in row if t >= 0] for row in tensor.tolist()]


@pytest.mark.parametrize("tree", ["binary", "chain"])
def test_torch_walks_emit_what_the_kernels_emit_where_chance_has_no_say(tree):
    import torch_sampling

    logits, tokens, links, children, levels = drafted_case(6, tree, 15, 40)
    lens = torch.zeros(6, dtype=torch.int32)
    walk = (links, lens, SamplingTensors.of(6))
    match = kernels.verify_tree_match(logits, tokens, *walk)
    lengths = match.num_accepted.tolist()
    assert len(set(lengths)) > 1, "the walks must differ"
    assert max(lengths) > 2, "the walks must go on"
    got = torch_sampling.verify_match(logits, tokens, children, levels, 0.0)
    assert emitted(got) == emitted(match.accepted_tokens)
    # Near temperature 0 every way of drawing gives the arg-max; the draft here is uniform.
    cold = torch_sampling.verify_rejection(
        logits, torch.zeros_like(logits), tokens, children, levels, temperature=1e-5
    )
    assert emitted(cold) == emitted(match.accepted_tokens)
    for policy, threshold in (("conf_threshold", 0.5), ("topk_agree", 1), ("typical", 0.5)):
        lossy = torch_sampling.verify_lossy(
            logits, tokens, children, levels, policy, threshold, 1e-5
        )
        assert emitted(lossy) == emitted(match.accepted_tokens), policy


def test_torch_compaction_moves_what_the_kernel_moves():
    import torch_ways

    torch.manual_seed(0)
    caches = [torch.randn(2, 6, 16, 2, 8) for _ in range(2)]
    table = torch.tensor([[3, 0, 5], [1, 4, 2]], dtype=torch.int32)
    lens = torch.tensor([13, 15], dtype=torch.int32)
    accepted = torch.tensor([[0, 2, 5, 9]] * 2, dtype=torch.int32)
    native = [c.clone() for c in caches]
    kept = torch.full((2,), 4, dtype=torch.int32)
    kernels.kv_compact(*native, table, lens, accepted, kept)
    torch_ways.kv_compact(*caches, table, lens, accepted)
    for got, want in zip(caches, native, strict=True):
        assert torch.equal(got, want)


# ---- peers --------------------------------------------------------------------------------------


class FakeCuda:
    type = "cuda"


def test_absent_peers_say_nothing():
    import peers

    cpu = torch.device("cpu")
    assert peers.sample(cpu, {"temperature": 0.8}) == {}
    assert peers.attention(cpu, [], 1.0) == {}
    assert peers.versions() == {}, "written for environments without them"


@pytest.fixture
def fake_peer(monkeypatch):
    """Stands in for a peer's module, on CPU tensors."""
    import peers

    module = types.SimpleNamespace()
    monkeypatch.setattr(peers, "load", lambda name, device: module)
    return module


class FakeWrapper:
    """FlashInfer's batch wrappers, by their documentation: pages from indptr and indices."""

    def __init__(self, workspace, layout, use_tensor_cores=False):
        assert layout == "NHD"

    def run(self, q, pages):
        from torch_ways import attention

        out = []
        for b, last in enumerate(self.last.tolist()):
            ids = self.indices[self.indptr[b] : self.indptr[b + 1]].long()
            used = (len(ids) - 1) * self.page_size + last
            keys, values = (p[ids].flatten(0, 1)[:used].transpose(0, 1)[None] for p in pages)
            rows = q[self.starts[b] : self.starts[b + 1]]
            if self.mask is not None:
                size = len(rows) * used
                mask = self.mask[b * size : (b + 1) * size].reshape(len(rows), used)
            else:
                ones = torch.ones(len(rows), used, dtype=torch.bool)
                mask = ones.tril(used - len(rows)) if self.causal else ones
            out.append(attention(rows[None], keys, values, mask).transpose(1, 2)[0])
        return torch.cat(out)

    def keep(self, paging, page_size, starts, causal, mask):
        (self.indptr, self.indices, self.last), self.page_size = paging, page_size
        self.starts, self.causal, self.mask = starts, causal, mask


class FakeDecode(FakeWrapper):
    def plan(self, indptr, indices, last, q_heads, kv_heads, dim, page_size, **kinds):
        starts = torch.arange(len(indptr))
        self.keep((indptr, indices, last), page_size, starts, False, None)


class FakePrefill(FakeWrapper):
    def plan(self, starts, indptr, indices, last, q_heads, kv_heads, dim, page_size, **kinds):
        causal, mask = kinds.get("causal", False), kinds.get("custom_mask")
        self.keep((indptr, indices, last), page_size, starts, causal, mask)


@pytest.mark.parametrize(
    ("nodes", "tree"), [(1, "chain"), (5, "chain"), (5, "binary"), (12, "binary")]
)
def test_flashinfer_is_asked_for_the_same_attention(fake_peer, nodes, tree):
    import peers
    from inputs import attention_case, attention_shape
    from measure import Device

    fake_peer.BatchDecodeWithPagedKVCacheWrapper = FakeDecode
    fake_peer.BatchPrefillWithPagedKVCacheWrapper = FakePrefill
    device = object.__new__(Device)
    device.torch, device.generator = torch.device("cpu"), torch.Generator()
    case = attention_case(device, attention_shape(2, nodes, tree, 4, 2, 16, 37, "bf16"))
    run = peers.attention(device.torch, [case], 16**-0.5)["FlashInfer"]
    pages = (case.k_pages, case.v_pages, case.table, case.lens, case.ancestors)
    want = kernels.paged_tree_attention(case.q, *pages, scale=16**-0.5)
    got = run(case).reshape(want.shape)
    torch.testing.assert_close(got, want, atol=2e-2, rtol=2e-2)


def test_sgl_kernel_is_asked_for_the_same_walk(fake_peer):
    import peers

    logits, tokens, links, _, levels = drafted_case(6, "binary", 15, 40)
    seen = {}

    def verify_tree_greedy(
        predicts, accepted, counts, candidates, index, next_token, next_sibling, target
    ):
        for b in range(len(candidates)):
            node, path = 0, []
            while node >= 0:
                path.append(int(index[b, node]))
                predicts[path[-1]] = target[b, node]
                child = int(next_token[b, node])
                while child >= 0 and candidates[b, child] != target[b, node]:
                    child = int(next_sibling[b, child])
                node = child
            counts[b] = len(path) - 1
            accepted[b, : len(path)] = torch.tensor(path)
        seen["emitted"] = [
            predicts[accepted[b, : counts[b] + 1].long()].tolist() for b in range(len(counts))
        ]

    fake_peer.verify_tree_greedy = verify_tree_greedy
    fake_peer.tree_speculative_sampling_target_only = lambda *args: None
    cpu = torch.device("cpu")
    run = peers.verify(cpu, links.first_child, links.next_sibling, levels, {"temperature": 0.0})
    run["sgl-kernel"]((logits, tokens))
    lens = torch.zeros(6, dtype=torch.int32)
    want = kernels.verify_tree_match(logits, tokens, links, lens, SamplingTensors.of(6))
    assert seen["emitted"] == emitted(want.accepted_tokens)


@pytest.fixture(autouse=True, scope="module")
def _leave_no_modules():
    before = set(sys.modules)
    yield
    for name in set(sys.modules) - before:
        file = getattr(sys.modules[name], "__file__", None)
        if file and Path(file).parent == BENCHMARKS:
            del sys.modules[name]
