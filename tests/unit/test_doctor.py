"""`inferlab doctor`: everything is reported, and what is missing comes with how to get it."""

import importlib.metadata
import json
import os

import pytest

from inferlab import __version__, cli, doctor, machine


@pytest.fixture(autouse=True)
def small_buffer(monkeypatch):
    """The tests need no true bandwidth; 256 MB a time would take seconds."""
    monkeypatch.setattr(doctor.measure_bandwidth, "__defaults__", (2**20, 2))


@pytest.fixture
def report():
    return doctor.examine()


def with_fake_requirements(monkeypatch, requirements, installed):
    def version(name):
        if name not in installed:
            raise importlib.metadata.PackageNotFoundError(name)
        return installed[name]

    monkeypatch.setattr(importlib.metadata, "requires", lambda name: requirements.get(name))
    monkeypatch.setattr(importlib.metadata, "version", version)


def test_what_it_says_of_the_build_and_the_machine(report):
    assert report["version"] == report["build"]["version"] == __version__
    assert report["build"]["compiler"]
    assert report["machine"]["simd"] in (*report["build"]["isas"], "generic")
    assert 1 <= report["machine"]["threads"] <= os.cpu_count()
    assert report["machine"]["read_bandwidth_gb_s"] > 0.05
    assert report["versions"]["torch"] == importlib.metadata.version("torch")
    assert set(report["extras"]) == {
        "test",
        "bench",
        "train",
        "serve",
        "ray",
        "socks",
        "load",
        "quant",
        "dev",
        "completion",
    }
    assert set(report["models"]) == {
        f"inferlab/{name}" for name in ("tiny", "tiny-draft", "tiny-medusa", "tiny-eagle")
    }
    assert isinstance(report["devices"]["mps"], bool)


def test_bundled_names_are_those_of_the_models():
    from inferlab.models.assets import BUNDLED

    models = doctor._bundled_models()
    assert {name: model["path"] for name, model in models.items()} == {
        name: str(path) for name, path in BUNDLED.items()
    }


def test_json_is_alone_on_stdout(capsys):
    cli.main(["doctor", "--json"])
    captured = capsys.readouterr()
    assert json.loads(captured.out)["build"]["compiler"]
    assert captured.err == ""


def test_the_text_names_each_thing(capsys):
    cli.main(["doctor"])
    text = capsys.readouterr().out
    for word in (
        "build",
        "processor",
        "read bandwidth",
        "CUDA devices",
        "MPS",
        "versions",
        "torch",
    ):
        assert word in text


def test_flags_of_linux(monkeypatch, tmp_path):
    cpuinfo = tmp_path / "cpuinfo"
    cpuinfo.write_text("model name\t: X 1\nflags\t\t: fpu avx2 amx_tile amx_bf16 avx512_bf16\n")
    monkeypatch.setattr(machine, "CPUINFO", cpuinfo)
    found = doctor._machine(native=False)
    assert found["processor"] == "X 1"
    assert found["amx"] is True
    assert found["avx512_bf16"] is True
    assert found["flags"]["avx512f"] is False
    cpuinfo.write_text("flags : avx2 amx_tile\n")
    assert doctor._machine(native=False)["amx"] is False


def test_a_system_that_tells_no_flags(monkeypatch, tmp_path):
    monkeypatch.setattr(machine, "CPUINFO", tmp_path / "no")
    found = doctor._machine(native=False)
    assert found["flags"] is None
    assert found["processor"]


def test_a_native_module_that_cannot_be_loaded_is_essential(monkeypatch, capsys):
    monkeypatch.setattr(doctor, "_build", lambda: {"error": "no _C"})
    assert cli.main(["doctor", "--json"]) == 1
    missing = json.loads(capsys.readouterr().out)["missing"]
    entry = next(e for e in missing if "native module" in e["what"])
    assert entry["essential"]
    assert "pip install" in entry["how"]
    assert cli.main(["doctor"]) == 1
    assert "MISSING: the native module: no _C" in capsys.readouterr().out


def test_bundled_models_that_are_not_there_are_essential(report):
    report["models"] = {"inferlab/tiny": {"present": False}}
    assert [e["essential"] for e in doctor._missing(report) if "tiny" in e["what"]] == [True]
    report["models"] = {"inferlab/tiny": {"present": True}}
    assert not [e for e in doctor._missing(report) if "tiny" in e["what"]]


def test_cuda_that_only_one_side_has(report):
    gpu = {"name": "G", "architecture": "sm_90", "memory_gb": 80.0}
    report["devices"] = {"cuda": [gpu], "torch_cuda": "12.8", "mps": False}
    report["build"] = {**report["build"], "cuda": None}
    assert any("INFERLAB_CUDA=ON" in e["how"] for e in doctor._missing(report))
    report["build"]["cuda"] = "12.8"
    assert not any("CUDA" in e["what"] for e in doctor._missing(report))
    report["devices"] = {"cuda": [], "torch_cuda": None, "mps": False}
    assert any("built without CUDA" in e["what"] for e in doctor._missing(report))


def test_extras_are_followed_into_other_extras(monkeypatch):
    requirements = {
        doctor.DISTRIBUTION: [
            "numpy>=1",
            'pytest>=8; extra == "test"',
            f'{doctor.DISTRIBUTION}[serve]; extra == "test"',
            'server[fast]; extra == "serve"',
            'other; extra == "quant"',
        ],
        "server": ['quick>=2; extra == "fast"', 'slow; extra == "slow"'],
    }
    installed = {doctor.DISTRIBUTION: "1", "pytest": "9.0", "server": "1", "quick": "1.5"}
    with_fake_requirements(monkeypatch, requirements, installed)
    assert doctor._unmet(doctor.DISTRIBUTION, {"test"}) == ["quick>=2 (found 1.5)"]
    assert doctor._unmet(doctor.DISTRIBUTION, {"quant"}) == ["other"]
    installed["quick"] = "2.0"
    assert doctor._unmet(doctor.DISTRIBUTION, {"test"}) == []


def test_bandwidth_reads_what_it_says(monkeypatch):
    from inferlab import _C

    sizes = []
    monkeypatch.setattr(_C, "read_memory", lambda data: sizes.append(data.nbytes))
    assert doctor.measure_bandwidth(2**20, repeats=3) > 0
    assert sizes == [2**20] * 4
    assert doctor.BANDWIDTH_BYTES >= 256 * 2**20
