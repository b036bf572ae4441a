"""One record of every request; and every command's JSON is what its published schema says."""

from __future__ import annotations

import json
from pathlib import Path

import jsonschema
import pytest

from helpers.faulty_server import FaultyServer, Respond, chat, closed_port, delta
from inferlab import SpeculativePipeline, cli, doctor
from inferlab.cli.schema import COMMANDS, RECORD, schema
from inferlab.records import record_of, total_stats
from inferlab.specdec.costs import CostModel, StepCosts

FAKE = ("--impl", "fake", "--max-tokens", "6")


def check(name: str, value: object) -> None:
    jsonschema.validate(value, schema(name), cls=jsonschema.Draft202012Validator)


def printed(capsys, *words: str, code: int = 0) -> object:
    """What a command printed with --json, validated."""
    assert cli.main([*words, "--json"]) == code
    value = json.loads(capsys.readouterr().out)
    check(words[0], value)
    return value


@pytest.fixture
def server():
    with FaultyServer() as running:
        yield running


@pytest.fixture
def prompts(tmp_path: Path) -> str:
    """Three prompts: one with labels, one that cannot be run, and one with nothing else."""
    file = tmp_path / "prompts.jsonl"
    file.write_text(
        '{"prompt": "one", "id": 1.5, "category": ["c"]}\n{"prompt": ""}\n{"prompt": "x"}\n'
    )
    return str(file)


# --- the record ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def pipeline() -> SpeculativePipeline:
    return SpeculativePipeline(implementation="fake", k=3)


def test_a_record_keeps_counts_and_the_mapping_is_a_view_of_it(pipeline):
    result = pipeline.generate("Hello", max_tokens=9, temperature=0.5, seed=7)
    record = record_of(result)
    assert (record.source, record.version) == ("specdec", 1)
    assert (record.prompt, record.max_tokens, record.temperature, record.seed) == (
        "Hello",
        9,
        0.5,
        7,
    )
    assert record.prompt_tokens == len(pipeline.target.tokenizer.encode("Hello"))
    assert record.token_ids == result["token_ids"] == result["generated_tokens"]
    assert record.counted_by == "ids"
    assert 0 < record.first_token_ms <= record.latency_ms
    stats = record.speculation.stats
    assert result["acceptance_rate"] == stats.accepted / stats.proposed
    assert result["mean_accepted_length"] == stats.emitted / stats.steps
    assert result["tokens_per_second"] == pytest.approx(9 / record.latency_ms * 1e3)


def test_records_come_back_from_json(pipeline):
    result = pipeline.generate("Hello", max_tokens=9)
    record = record_of(result)
    assert record_of(json.loads(json.dumps(result))) == record
    assert record.as_json() == result["record"]
    with pytest.raises(ValueError, match="version"):
        record_of({"record": {**result["record"], "version": 2}})


def test_counts_of_many_records_are_added(pipeline):
    records = [record_of(r) for r in pipeline.generate(["a", "b c", "d"], max_tokens=9)]
    total = total_stats(records)
    assert total.steps == sum(r.speculation.stats.steps for r in records)
    assert total.offered_at[0] == sum(r.speculation.stats.offered_at[0] for r in records)


def test_token_ids_have_no_prompt_text(pipeline):
    record = record_of(pipeline.generate([5, 6, 7], max_tokens=2))
    assert (record.prompt, record.prompt_tokens) == (None, 3)


# --- schemas ------------------------------------------------------------------------------------


def test_every_command_with_json_has_a_schema():
    kinds = cli.make_parser()._subparsers._group_actions[0].choices
    with_json = {
        name
        for name, parser in kinds.items()
        for part in (parser, *(parser._subparsers._group_actions[0].choices.values()
                               if parser._subparsers else ()))
        if "--json" in part._option_string_actions
    }  # fmt: skip
    assert with_json == set(COMMANDS)


@pytest.mark.parametrize("name", [RECORD, *COMMANDS])
def test_schemas_are_schemas(capsys, name):
    assert cli.main(["schema", name]) == 0
    shown = json.loads(capsys.readouterr().out)
    assert shown == schema(name)
    jsonschema.Draft202012Validator.check_schema(shown)


def test_a_schema_refuses_what_it_does_not_know(pipeline):
    record = pipeline.generate("Hello", max_tokens=2)["record"]
    check(RECORD, record)
    for change in ({"more": 1}, {"version": 2}, {"num_tokens": "2"}, {"source": "elsewhere"}):
        with pytest.raises(jsonschema.ValidationError):
            check(RECORD, {**record, **change})
    for key in record:
        with pytest.raises(jsonschema.ValidationError):
            check(RECORD, {k: v for k, v in record.items() if k != key})


@pytest.mark.parametrize(
    "more", [(), ("--draft-mode", "none"), ("--tree", "2,1", "--policy", "typical")]
)
def test_specdec(capsys, tmp_path, more):
    output = tmp_path / "out.json"
    value = printed(capsys, "specdec", *FAKE, "--prompt", "Hello", "--output", str(output), *more)
    assert json.loads(output.read_text()) == value
    check(RECORD, value["record"])


def test_specdec_of_many(capsys, prompts):
    value = printed(capsys, "specdec", *FAKE, "--prompts", prompts, code=1)
    assert [("record" in result) for result in value["results"]] == [True, False, True]


def test_advise(capsys, monkeypatch):
    costs = CostModel(StepCosts((1,), (1.0,)))
    monkeypatch.setattr(SpeculativePipeline, "costs", lambda self: costs)
    words = ("advise", *FAKE, "--prompt", "Hello", "--batch", "1", "--verify", "--iterations", "1")
    value = printed(capsys, *words)
    assert set(value["best"]) == set(value["verified"]) == {"1"}


def test_baseline(capsys, prompts):
    printed(capsys, "baseline", "--max-tokens", "3", "--prompt", "Hello")
    printed(capsys, "baseline", "--max-tokens", "3", "--prompts", prompts, code=1)


def test_ping(capsys, server):
    asked = ("ping", "--port", str(server.port))
    server.answers = [Respond.json(chat())]
    assert printed(capsys, *asked, "--prompt", "Hi")["record"]["exchange"]["attempts"] == 1
    printed(capsys, *asked, "--ping-only")
    server.answers = [Respond.events(delta(content="a"), delta(content="b"), delta("stop"))]
    record = printed(capsys, *asked, "--prompt", "Hi", "--stream")["record"]
    assert len(record["text_times_ms"]) == 2
    server.answers = [Respond.json({"error": "no"}, 400)]
    assert printed(capsys, *asked, "--prompt", "Hi", code=1)["record"]["counted_by"] is None
    with closed_port() as port:
        refused = ("ping", "--port", str(port), "--prompt", "Hi")
        assert printed(capsys, *refused, code=1)["record"]["model"] is None


BENCH = ("bench", "--no-progress", "--iterations", "2", "--warmup", "0")


def test_bench_of_the_engine(capsys, prompts, tmp_path):
    fake = (*BENCH, "--mode", "specdec", *FAKE)
    prefix = tmp_path / "out"
    value = printed(capsys, *fake, "--prompt", "Hello", "--output", str(prefix))
    assert json.loads(prefix.with_suffix(".json").read_text()) == value
    printed(capsys, *fake, "--prompts", prompts, "--compare-baseline", code=1)
    real = (*BENCH, "--mode", "specdec", "--max-tokens", "6", "--prompt", "Hello")
    printed(capsys, *real, "--compare-baseline", "--eval-perplexity")


def test_bench_compare(capsys, prompts, tmp_path):
    prefix = tmp_path / "out"
    fake = (*BENCH, "--mode", "specdec", *FAKE, "--prompts", prompts, "--compare-baseline")
    printed(capsys, *fake, "--output", str(prefix), code=1)
    file = str(prefix.with_suffix(".json"))
    assert cli.main(["bench", "compare", file, file, "--json"]) == 0
    check("bench compare", json.loads(capsys.readouterr().out))


def test_bench_of_the_baseline(capsys):
    printed(capsys, *BENCH, "--max-tokens", "3", "--prompt", "Hello", "--eval-perplexity")


def test_bench_of_a_server(capsys, server):
    asked = (*BENCH, "--mode", "http", "--port", str(server.port), "--prompt", "Hi")
    server.answers = [Respond.json(chat())]
    printed(capsys, *asked)
    server.answers = [Respond.events(delta(content="a"), delta(content="b"), delta("stop"))]
    printed(capsys, *asked, "--stream")
    server.answers = [Respond.json({"error": "no"}, 400)]
    printed(capsys, *asked, code=1)
    with closed_port() as port:
        printed(capsys, *asked, "--port", str(port), code=1)


def test_bench_of_a_load(capsys, server, tmp_path):
    load = ("bench", "--no-progress", "--mode", "http", "--port", str(server.port))
    load += ("--prompt", "Hi", "--concurrency", "2", "--requests", "3", "--slo", "ttft=1000")
    usage = {"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": 2}}
    events = (delta(content="a"), delta(content="b"), delta("stop"), usage, "data: [DONE]\n\n")
    server.answers = [Respond.events(*events)]
    prefix = tmp_path / "out"
    value = printed(capsys, *load, "--tokenizer", "inferlab/tiny", "--output", str(prefix))
    assert json.loads(prefix.with_suffix(".json").read_text()) == value
    check(RECORD, value["records"][0])
    printed(capsys, *load, "--sweep", "1000")
    server.answers = [Respond.json({"error": "no"}, 400)]
    printed(capsys, *load, code=1)


def test_bench_of_all_formats(capsys):
    printed(capsys, *BENCH, "--quantization-matrix", "--prompt", "a b", "--max-tokens", "4")


def test_bench_of_all_modes(capsys):
    modes = (*BENCH, "--modes", "ngram,vanilla", "--batch", "1,2", "--prompt", "a b a b")
    printed(capsys, *modes, *FAKE)
    printed(capsys, *modes, "--max-tokens", "6")


def test_certify(capsys, tmp_path):
    file = str(tmp_path / "certificate.json")
    lossless = ("certify", "lossless", *FAKE, "--prompt", "Hello", "--samples", "40")
    value = printed(capsys, *lossless, "--sampler", "0.9", "--tree", "2,1", "--output", file)
    assert {check["part"] for check in value["checks"]} == {
        *("exact", "trap", "trees", "sampled", "replay")
    }
    printed(capsys, "certify", "lossless", "--check", file)
    lossy = (*lossless, "--policy", "typical", "--samples", "0")
    printed(capsys, *lossy, code=1)
    real = ("--prompt", "import os", "--max-tokens", "4")
    printed(capsys, "certify", "greedy", *real)
    printed(capsys, "certify", "quality", *real, "--quantizations", "int8", "--policies", "typical")


def test_calibrate(capsys, tmp_path):
    few = ("--num-prompts", "6", "--max-tokens", "40", "--K", "3")
    told = printed(capsys, "calibrate", "--costs", "--impl", "fake", "--no-cost-cache")
    assert told["steps"]
    assert told["off_p90"] >= told["off_median"]
    told = printed(capsys, "calibrate", "--reliability", *few)
    assert sum(row["nodes"] for row in told["bins"]) == told["nodes"] > 0
    told = printed(capsys, "calibrate", "--output", str(tmp_path), *few)
    assert 1 <= len(told["rates"]) <= 3


def test_replay(capsys, monkeypatch, tmp_path):
    monkeypatch.setattr(SpeculativePipeline, "costs", lambda self: None)
    printed(capsys, "specdec", *FAKE, "--prompt", "a b", "--record", str(tmp_path))
    value = printed(capsys, "replay", str(tmp_path), "--K", "2", "--controller", "adaptive")
    assert [line["setting"] for line in value["settings"]] == ["recorded", "K 2", "adaptive"]
    assert printed(capsys, "replay", str(tmp_path), "--grid", "--batch", "2")["grid"]


def test_simulate(capsys, tmp_path):
    costs = tmp_path / "costs.json"
    costs.write_text(CostModel(StepCosts((1, 8), (1.0, 2.0))).to_json())
    words = ("simulate", "--costs", str(costs), "--requests", "9", "--acceptance", "0.5")
    value = printed(capsys, *words, "--rate", "9", "--replicas", "1,2", "--ttft", "50")
    assert [row["K"] for row in value["rows"]] == [0, "pays", 0, "pays"]
    assert len(value["enough"]) == 2
    value = printed(capsys, *words, "--clients", "2", "--output-tokens", "1")
    assert value["rows"][0]["result"]["tpot_ms"] is None


def test_doctor(capsys, monkeypatch):
    monkeypatch.setattr(doctor.measure_bandwidth, "__defaults__", (2**20, 2))
    printed(capsys, "doctor")
    monkeypatch.setattr(doctor, "_build", lambda: {"error": "no _C"})
    printed(capsys, "doctor", code=1)
