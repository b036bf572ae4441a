"""Measuring what steps cost, and keeping it on disk."""

import pytest

from inferlab import SpeculativePipeline
from inferlab.cli import main
from inferlab.models import FakeLM
from inferlab.specdec import cost_cache, costing
from inferlab.specdec.cost_cache import describe_costs, kept_costs
from inferlab.specdec.costing import (
    GRID,
    Bench,
    NoRoomError,
    RandomDrafter,
    measure,
    of_nodes,
)
from inferlab.specdec.costs import CostModel, StepCosts, StepTime
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import NO_DRAFT, Budget

COSTS = CostModel(StepCosts.fit([StepTime(1, 1, 32, 2.0), StepTime(1, 2, 32, 3.0)]))


@pytest.fixture
def folder(tmp_path, monkeypatch):
    monkeypatch.setattr(cost_cache, "user_cache_path", lambda name: tmp_path / name)
    return tmp_path / "inferlab" / "costs"


def bench_of(num_pages):
    model = FakeLM()
    drafter = RandomDrafter(model.vocab_size)
    return Bench(model, Policy(), model.new_cache(num_pages, 16), drafter)


def test_the_steps_that_were_asked_for_are_timed():
    bench = bench_of(64)
    budgets = [of_nodes(1), of_nodes(4), of_nodes(20)]
    assert budgets == [NO_DRAFT, Budget(3, 3), Budget(8, 19)]
    steps = list(bench.steps(3, 30, budgets))
    assert [step.budget for step in steps] == budgets
    for _, rows, ms, phases in steps:
        assert rows >= 3
        assert 0 < phases["verify"] <= ms
    allocator = bench.engine.scheduler.allocator
    assert allocator.num_free == allocator.num_pages == 64, "nothing is left behind"


def test_what_has_no_room_is_not_measured():
    with pytest.raises(NoRoomError, match="pages, there are 20"):
        list(bench_of(20).steps(4, 32, [NO_DRAFT]))
    with pytest.raises(NoRoomError, match="the cache has 8"):
        list(bench_of(8).steps(1, 32, [NO_DRAFT]))
    assert measure(FakeLM(), Policy(), 4, 16) is None


class Broken(FakeLM):
    """Its logits become NaN after a few forwards."""

    forwards = 0

    def forward(self, *args, **kwargs):
        output = super().forward(*args, **kwargs)
        self.forwards += 1
        if self.forwards > self.good:
            output.logits.fill_(float("nan"))
        return output


@pytest.mark.parametrize("good", [0, 3])
def test_a_model_that_fails_is_named_and_not_waited_for(good):
    model = Broken()
    model.good = good
    with pytest.raises(ValueError, match="are NaN"):
        measure(model, Policy(), 2048, 16)


def test_what_takes_long_is_measured_once_and_the_rest_several_times(monkeypatch):
    def forwards():
        model = Broken()
        model.good = 10**6
        assert measure(model, Policy(), 2048, 16, max_batch=1) is not None
        return model.forwards

    monkeypatch.setattr(costing, "ENOUGH_S", 0.0)
    once = forwards()
    monkeypatch.setattr(costing, "ENOUGH_S", float("inf"))
    assert forwards() == costing.PASSES * once > once > 7


@pytest.mark.parametrize("mode", ["ngram", "recycling", "medusa-lite", "eagle-lite", "medusa"])
def test_what_is_measured_is_not_the_drafter_in_use(mode):
    pipeline = SpeculativePipeline(draft_mode=mode)
    assert pipeline._plan.build(4) is not pipeline.engine.drafter


def test_batches_up_to_the_largest_are_measured():
    costs = measure(FakeLM(), Policy(), 2048, 16, max_batch=4)
    assert costs is not None
    assert max(costs.step.rows) == max(b * nodes for b, _, nodes in GRID if b <= 4)
    assert costs.draft.table == ()
    assert [tokens for tokens, _ in costs.reading] == [31, 124, 191]


def test_a_pipeline_measures_itself_and_its_drafter_and_is_not_touched(folder):
    pipeline = SpeculativePipeline(implementation="fake", max_batch=4, max_new_tokens=20)
    free = pipeline.engine.scheduler.allocator.num_free
    before = pipeline.generate("a text")["token_ids"]
    costs = pipeline.costs()
    assert [batch for batch, _ in costs.draft.table] == [1, 4]
    assert [nodes for nodes, _ in costs.draft.table[0][1]][:2] == [0, 1]
    assert costs.ms(1, 4, 50) > 0
    assert pipeline.costs() == costs, "kept"
    assert pipeline.generate("a text")["token_ids"] == before
    assert pipeline.engine.scheduler.allocator.num_free == free
    assert len(list(folder.iterdir())) == 1


def test_a_result_tells_of_its_own_calls_decisions(folder):
    pipeline = SpeculativePipeline(implementation="fake", controller="cost", max_new_tokens=20)
    for texts in (["a text"], ["another", "a third", "a fourth"]):
        results = pipeline.generate(texts, ignore_eos=True)
        steps = sum(results[-1]["controller"]["steps_by_nodes"].values())
        assert 0 < steps <= 20
    everything = pipeline.controller.describe()["steps_by_nodes"]
    assert sum(everything.values()) > steps


def test_costs_are_kept_by_what_they_hang_on(folder):
    calls = []

    def measured():
        calls.append(1)
        return COSTS

    facts = describe_costs(FakeLM(), None, 4, {"policy": "longest_prefix"})
    assert kept_costs(facts, measured) == kept_costs(facts, measured) == COSTS
    assert len(calls) == 1
    kept_costs({**facts, "threads": [99]}, measured)
    assert len(calls) == 2
    kept_costs(facts, measured, anew=True)
    assert len(calls) == 3


@pytest.mark.parametrize("content", [b"", b"\xff", b'{"version": 0}', b"[1]"])
def test_a_file_that_cannot_be_read_is_made_anew(folder, content):
    kept_costs({}, lambda: COSTS)
    (file,) = folder.iterdir()
    file.write_bytes(content)
    assert kept_costs({}, lambda: COSTS) == COSTS
    assert CostModel.from_json(file.read_text()) == COSTS


def test_a_cache_that_cannot_be_written_costs_nothing_but_time(folder):
    folder.parent.mkdir()
    folder.write_text("a file is in the way")
    assert kept_costs({}, lambda: COSTS) == COSTS


def test_calibrate_prints_how_well_steps_are_predicted(folder, capsys):
    assert main(["calibrate", "--costs", "--impl", "fake"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split() == ["batch", "nodes", "context", "measured", "predicted", "off"]
    assert any(line.startswith("off by ") and line.endswith("percentile") for line in lines)
    assert any(line.startswith("drafting for 16: 0 nodes ") for line in lines)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--costs", "--output", "x"], "--output: has no meaning beside --costs"),
        ([], "--output: missing"),
    ],
)
def test_what_cannot_be_meant_is_refused(capsys, flags, message):
    assert main(["calibrate", *flags]) == 2
    assert message in capsys.readouterr().err


def test_a_cache_without_room_is_named(folder, capsys, tmp_path):
    (tmp_path / "small.yaml").write_text("implementation: fake\nnum_pages: 2\n")
    assert main(["calibrate", "--costs", "--config", str(tmp_path / "small.yaml")]) == 2
    assert "raise num_pages or kv_memory_mb" in capsys.readouterr().err
