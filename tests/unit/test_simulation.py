"""Simulated replicas: what queueing theory says, and that nothing is lost on the way."""

from __future__ import annotations

import json
import math
from functools import lru_cache

import numpy as np
import pytest

from helpers.recordings import record
from inferlab import SpeculativePipeline, cli
from inferlab.errors import UsageError
from inferlab.lengths import Lengths
from inferlab.scheduler import PageAllocator, Request, Scheduler
from inferlab.simulation.acceptance import Chances, Recorded
from inferlab.simulation.clock import simulate
from inferlab.simulation.drafting import Drafting
from inferlab.simulation.load import Arrivals, Load, Requests
from inferlab.simulation.planning import cases, enough, row_of
from inferlab.simulation.prices import NO_OVERHEAD, Overhead, Prices
from inferlab.simulation.routing import make_router
from inferlab.simulation.setting import PAYS, ROUTINGS, Setting
from inferlab.simulation.sources import of_recording
from inferlab.simulation.summary import Objectives, summarize
from inferlab.simulation.world import NEVER
from inferlab.specdec.costs import CostModel, DraftCosts, StepCosts
from inferlab.types import SamplingParams

MODELS = ("real", "light")
FLAT = CostModel(StepCosts((1,), (1.0,)))
"""Every step takes a millisecond: a text of n tokens n of them."""
COSTS = CostModel(
    StepCosts((1, 8, 64), (2.0, 2.5, 6.0), per_sequence=0.05, per_key=1e-4, per_product=1e-5),
    DraftCosts(((1, ((0, 0.1), (8, 4.0))),), reading=((32, 1.0), (512, 4.0))),
)
SPREAD = Lengths.parse("lognormal:128:0.8"), Lengths.parse("exp:64")


chances_of = lru_cache(Chances)


def run(load, setting, *, costs=COSTS, chances=(0.8, 0.7), overhead=NO_OVERHEAD, **more):
    return simulate(load, setting, chances_of(chances), Prices(costs, overhead=overhead), **more)


def waits(outcome):
    """In milliseconds, where a text takes as long as it has tokens."""
    service = outcome.requests.output
    return (outcome.ended - outcome.arrived) * 1e3 - service


# --- queueing theory ----------------------------------------------------------------------------


def queue(model, rate, output, count=40_000, kind="poisson", cv=1.0, **setting):
    """A server that takes one text at a time."""
    load = Load(count, Arrivals(rate, kind, cv), Lengths("fixed", 8, 8), output)
    chosen = Setting(max_batch=1, shares=False, **setting)
    return run(load, chosen, costs=FLAT, model=model)


@pytest.mark.parametrize(("model", "count"), [("light", 60_000), ("real", 4000)])
@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_fixed_lengths_wait_as_in_m_d_1(model, count, busy):
    outcome = queue(model, busy * 100, Lengths("fixed", 10, 10), count)
    expected = busy / (2 * (1 - busy)) * 10  # Pollaczek and Khinchine
    assert waits(outcome).mean() == pytest.approx(expected, rel=0.04 if model == "light" else 0.15)
    assert summarize(outcome)["utilisation"] == pytest.approx(busy, rel=0.03)


@pytest.mark.parametrize("busy", [0.5, 0.8])
def test_geometric_lengths_wait_as_in_m_g_1(busy):
    """Which M/M/1 is with lengths that have no least unit."""
    mean = 50
    outcome = queue("light", busy * 1000 / mean, Lengths("exp", mean), 100_000)
    second = mean**2 * (2 - 1 / mean)  # moment of a geometric variable
    expected = busy / mean * second / (2 * (1 - busy))
    assert waits(outcome).mean() == pytest.approx(expected, rel=0.05)
    assert expected == pytest.approx(busy / (1 - busy) * mean, rel=0.02)  # M/M/1
    found = summarize(outcome)
    assert found["queue"] == pytest.approx(busy**2 / (1 - busy), rel=0.05)  # Little


def test_a_d_d_1_never_waits():
    outcome = queue("light", 99.0, Lengths("fixed", 10, 10), 1000, kind="constant")
    assert np.abs(waits(outcome)).max() < 1e-6


@pytest.mark.parametrize("model", MODELS)
def test_each_waits_as_lindley_says(model):
    """In any queue with one server: as long as the one before, and that one's service, less the
    time between their arrivals."""
    count = 20_000 if model == "light" else 1000
    outcome = queue(model, 16.0, Lengths("exp", 50), count, kind="gamma", cv=2.0)
    gaps = np.diff(outcome.arrived) * 1e3
    expected = [0.0]
    for gap, service in zip(gaps.tolist(), outcome.requests.output.tolist(), strict=False):
        expected.append(max(0.0, expected[-1] + service - gap))
    assert waits(outcome) == pytest.approx(np.array(expected), abs=1e-6)


def test_two_choices_have_the_tails_of_the_mean_field():
    """P(a queue has k or more) = busy ** (2 ** k - 1) (Mitzenmacher, 1996), so by Little the mean
    time in the system is the sum of these tails over the rate, for exponential lengths."""
    busy, mean, servers = 0.9, 50, 200
    outcome = queue(
        "light",
        busy * servers * 1000 / mean,
        Lengths("exp", mean),
        80_000,
        replicas=servers,
        routing="two-choices",
    )
    tails = sum(busy ** (2**k - 1) for k in range(1, 12))
    found = ((outcome.ended - outcome.arrived) * 1e3)[20_000:].mean()
    assert found == pytest.approx(tails / busy * mean, rel=0.05)


@pytest.mark.parametrize("model", MODELS)
def test_a_closed_loop_has_as_many_as_clients(model):
    load = Load(2000, Arrivals(clients=6, think_ms=4.0), Lengths("fixed", 8, 8), SPREAD[1])
    outcome = run(load, Setting(), model=model)
    cycle = (outcome.ended - outcome.arrived).mean() + 0.004
    assert len(outcome.arrived) / outcome.seconds * cycle == pytest.approx(6, rel=0.03)


def test_a_batch_is_a_machine_that_all_share():
    """Steps take as long for many as for one, so nobody hears of the others but for reading."""
    load = Load(300, Arrivals(rate=40), Lengths("fixed", 8, 8), Lengths("fixed", 20, 20))
    outcome = run(load, Setting(max_batch=100), costs=FLAT)
    # A text waits for the step that runs and is read beside 19 others, each one step more at most.
    took = (outcome.ended - outcome.arrived) * 1e3
    assert took.min() >= 20 - 1e-6
    assert np.median(took) < 2 * 20


# --- nothing is lost ----------------------------------------------------------------------------

HARD = (
    Setting(replicas=3, levels=3),
    Setting(replicas=2, levels=2, pages=260, routing="two-choices"),
    Setting(replicas=3, levels=0, max_batch=4, read_tokens=48, routing="round-robin"),
    Setting(replicas=4, levels=PAYS, max_k=4, routing="prefix", pages=600),
    Setting(replicas=1, levels=4, pages=140, page_size=8, tree_slots=32),
)


@pytest.mark.parametrize("setting", HARD, ids=str)
@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("closed", [False, True])
def test_every_request_ends_once_and_tokens_add_up(setting, model, closed):
    arrivals = Arrivals(clients=40) if closed else Arrivals(rate=60, kind="gamma", cv=2)
    prompts, outputs = Lengths("uniform", 1, 300), Lengths("uniform", 1, 90)
    load = Load(300, arrivals, prompts, outputs, groups=9, shared=100, zipf=1.0)
    outcome = run(load, setting, model=model, overhead=Overhead(latency_ms=1.0))
    asked, tally = outcome.requests, outcome.tally
    assert tally.ended == len(asked) == 300
    assert tally.tokens == asked.output.sum()
    assert (outcome.arrived < outcome.first).all()
    assert (outcome.first <= outcome.ended).all()
    assert (outcome.ended < NEVER).all()
    assert tally.busy_s <= outcome.seconds * setting.replicas + 1e-6
    assert tally.most_pages <= (setting.pages or math.inf) + setting.max_batch
    if tally.preempted == 0:
        assert tally.read + tally.shared == (asked.prompt - 1).sum()
    else:
        assert tally.read + tally.shared > (asked.prompt - 1).sum()
    if setting.levels == 0 and not tally.preempted:
        assert tally.walks == (asked.output - 1).sum()


@pytest.mark.parametrize("model", MODELS)
@pytest.mark.parametrize("routing", ROUTINGS)
def test_the_same_seed_is_the_same_run(model, routing):
    load = Load(200, Arrivals(rate=50), *SPREAD, groups=5, shared=64)
    setting = Setting(replicas=3, routing=routing, levels=2)
    one, again, other = (run(load, setting, model=model, seed=seed) for seed in (3, 3, 4))
    assert summarize(one) == summarize(again)
    assert (one.ended == again.ended).all()
    assert summarize(one) != summarize(other)


# --- the light model beside the engine's scheduler ----------------------------------------------


def both(load, setting, **more):
    return [summarize(run(load, setting, model=model, **more)) for model in MODELS]


@pytest.mark.parametrize("arrivals", [Arrivals(rate=25), Arrivals(rate=70), Arrivals(clients=14)])
@pytest.mark.parametrize(
    "setting",
    [Setting(), Setting(levels=4), Setting(max_batch=8, levels=2), Setting(read_tokens=64)],
    ids=str,
)
def test_the_light_model_is_the_real_one_where_all_fits(setting, arrivals):
    real, light = both(Load(400, arrivals, *SPREAD), setting)
    exact = 1e-6 if setting.levels == 0 else 0.01  # drafts at a text's end
    for key in ("tokens_per_second", "utilisation", "batch", "tokens_per_step"):
        assert light[key] == pytest.approx(real[key], rel=exact), key
    assert light["queue"] == pytest.approx(real["queue"], rel=0.02, abs=0.01)
    assert light["pages"] == pytest.approx(real["pages"], rel=0.1)
    for key in ("ttft_ms", "tpot_ms", "e2e_ms"):
        for at in ("mean", "p50", "p90"):
            assert light[key][at] == pytest.approx(real[key][at], rel=max(exact, 0.02)), (key, at)


@pytest.mark.parametrize(
    ("setting", "groups", "rate"),
    [
        (Setting(levels=PAYS), 0, 60),
        (Setting(levels=2, pages=300), 0, 60),
        (Setting(replicas=4, levels=2, pages=900, routing="least-loaded"), 20, 110),
        (Setting(replicas=4, levels=2, pages=900, routing="prefix"), 20, 110),
    ],
    ids=str,
)
def test_the_light_model_is_close_where_pages_are_few_or_shared(setting, groups, rate):
    load = Load(500, Arrivals(rate=rate), *SPREAD, groups=groups, shared=400 * (groups > 0))
    runs = [both(load, setting, seed=seed) for seed in range(3)]

    def means(value):
        return np.mean([[value(model) for model in models] for models in runs], axis=0)

    for key in ("tokens_per_second", "utilisation", "tokens_per_step", "batch", "shared"):
        real, light = means(lambda found, key=key: found[key])
        close = 0.15 if key == "shared" else 0.05  # of few pages, which are still known is chance
        assert light == pytest.approx(real, rel=close, abs=0.01), key
    for key in ("ttft_ms", "tpot_ms", "e2e_ms"):
        real, light = means(lambda found, key=key: found[key]["mean"])
        assert light == pytest.approx(real, rel=0.1), key
    real, light = means(lambda found: found["preempted"])
    assert (light >= 1) == (real >= 1)


def test_the_real_model_plans_as_the_engine_does():
    """One text of 1,000 tokens, by hand."""
    outcome = run(
        Load(1, Arrivals(clients=1), Lengths("fixed", 1001, 1001), Lengths("fixed", 3, 3)),
        Setting(read_tokens=600, read_beside=600),
        model="real",
    )
    step = COSTS.step
    read = step.ms(1, 600, 300) + step.ms(1, 400, 800)
    assert outcome.first[0] * 1e3 == pytest.approx(read)
    decoded = sum(COSTS.ms(1, 0, context) for context in (1002, 1003))
    assert outcome.ended[0] * 1e3 == pytest.approx(read + decoded)


# --- parts --------------------------------------------------------------------------------------


def test_chances_give_the_lengths_that_follow_from_them():
    acceptance = Chances([0.8, 0.5])
    assert acceptance.mean(0) == 1
    assert acceptance.mean(1) == pytest.approx(1.8, rel=0.01)
    assert acceptance.mean(3) == pytest.approx(1 + 0.8 + 0.4 + 0.2, rel=0.01)
    steps, given = acceptance.steps(3, 200), acceptance.emitted(3)
    assert (steps[:, 1] == 0).all()
    for trace in range(5):
        at, count = 1, 0
        while at < 200:
            at, count = at + int(given[trace, at]), count + 1
        assert steps[trace, 200] == count


def test_what_pays_is_what_the_formula_says():
    acceptance, prices = Chances([0.8]), Prices(COSTS)
    drafting = Drafting(Setting(levels=PAYS, max_k=6), acceptance, prices)
    few, many = drafting.levels(1, 30), drafting.levels(64, 30)
    assert few > many
    rates = [acceptance.mean(k) / prices.decode_ms(1, k, 32) for k in range(7)]
    assert few == int(np.argmax(rates))


def test_overhead_is_added_where_it_says():
    plain, more = (
        Prices(FLAT, overhead=overhead) for overhead in (Overhead(), Overhead(2, 0.1, 0.01, 0.5))
    )
    assert plain.decode_ms(4, 0, 9) == 1
    assert more.decode_ms(4, 0, 9) == pytest.approx(2 + 0.1 + 4 * 0.01)
    assert more.read_ms(3, 90, 9, ended=2) == pytest.approx(2 + 0.1 + 2 * (0.5 + 0.01))


def test_lengths():
    random = np.random.default_rng(0)
    means = {"7": 7, "10-20": 15, "normal:90:20": 90, "exp:40": 40, "lognormal:50:0.5": 50 * 1.133}
    for text, mean in means.items():
        assert Lengths.parse(text).draw(20_000, random).mean() == pytest.approx(mean, rel=0.03)
    for text in ("", "0", "-3", "9-3", "exp:0", "lognormal:5", "normal:5", "x", "exp:nan", "9-inf"):
        with pytest.raises(UsageError, match="lengths"):
            Lengths.parse(text)


def test_arrivals_have_their_rate_and_spread():
    for kind, cv in (("poisson", 1.0), ("gamma", 2.5), ("constant", 0.0)):
        load = Load(50_000, Arrivals(20.0, kind, cv or 1.0))
        gaps = np.diff(Requests.of(load).arrives)
        assert gaps.mean() == pytest.approx(1 / 20, rel=0.05)
        assert gaps.std() / gaps.mean() == pytest.approx(cv, abs=0.1)


def test_groups_are_as_popular_as_zipf_says():
    drawn = Requests.of(Load(40_000, Arrivals(1.0), groups=4, shared=10, zipf=1.0))
    shares = np.bincount(drawn.group) / 40_000
    weights = 1 / np.arange(1, 5)
    assert shares == pytest.approx(weights / weights.sum(), abs=0.01)
    assert (drawn.prompt == 138).all()


def test_routers():
    least = make_router(Setting(replicas=3, routing="least-loaded"))
    for expected in (0, 1, 2, 0):
        assert least.choose(-1) == expected
        least.begins(expected)
    least.ends(2)
    assert least.choose(-1) == 2
    prefix = make_router(Setting(replicas=8, routing="prefix"), seed=1)
    homes = {prefix.choose(group) for group in range(50)}
    assert len(homes) > 4
    for _ in range(80):
        prefix.begins(prefix.choose(7))
    assert max(prefix.load) <= math.ceil(1.25 * 81 / 8)
    assert sum(prefix.load) == 80


def test_prefix_routing_reads_less():
    lengths = Lengths("fixed", 32, 32), Lengths("fixed", 20, 20)
    load = Load(600, Arrivals(rate=80), *lengths, groups=40, shared=512)
    found = {
        routing: summarize(
            run(load, Setting(replicas=6, routing=routing, pages=400), model="light")
        )
        for routing in ROUTINGS
    }
    assert found["prefix"]["shared"] > 1.2 * found["round-robin"]["shared"]
    assert found["prefix"]["ttft_ms"]["mean"] < found["round-robin"]["ttft_ms"]["mean"]


def test_enough_replicas():
    load = Load(300, Arrivals(), Lengths("fixed", 32, 32), Lengths("fixed", 50, 50))
    rows = []
    for asked, chosen in cases(load, Setting(), rate=[5.0, 60.0], replicas=[1, 2, 4, 8]):
        found = summarize(run(asked, chosen, model="light"), Objectives(ttft=20.0, tpot=3.5))
        assert found["goodput"] <= found["requests_per_second"] * 1.01
        rows.append(row_of(asked, chosen, found))
    few, many = (found["replicas"] for found in enough(rows, 0.9))
    assert (few, many > few) == (1, True)
    assert [found["replicas"] for found in enough(rows[-4:-3], 0.999)] == [None]


# --- recordings ---------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def recorded(tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(SpeculativePipeline, "costs", lambda self: COSTS)
        results, recording = record(folder, "vanilla", k=6)
    return results, recording, folder


@pytest.mark.parametrize("model", MODELS)
def test_recorded_texts_take_the_steps_they_took(recorded, model):
    results, recording, _ = recorded
    source = of_recording(recording)
    assert source.measured
    texts = source.texts
    assert [text.output for text in texts] == [result["num_tokens"] for result in results]
    load = Load(len(texts), Arrivals(clients=1), texts=texts, in_order=True)
    setting = Setting(levels=6, shares=False)
    outcome = simulate(load, setting, source.acceptance, source.prices, model=model)
    first = len(texts)  # of each text, which is no walk
    assert outcome.tally.walks == sum(result["steps"] for result in results) - first
    took = float(recording.columns["step.ms"].sum()) / 1e3
    assert outcome.seconds == pytest.approx(took, rel=0.1)


def test_fewer_levels_accept_less(recorded):
    acceptance = Recorded(recorded[1])
    means = [acceptance.mean(k) for k in range(7)]
    assert means == sorted(means)
    assert means[0] == 1 < means[6]
    assert acceptance.nodes(0) == 0 < acceptance.nodes(3) <= 3


def test_the_command_on_a_recording(recorded, capsys):
    words = ["simulate", str(recorded[2]), "--rate", "30", "--requests", "60", "--ttft", "100"]
    assert cli.main([*words, "--replicas", "1,2"]) == 0
    shown = capsys.readouterr().out
    assert "4 recorded requests" in shown
    assert "enough for 99% of the requests" in shown
    assert cli.main([*words, "--output-tokens", "20", "--K", "0,2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)["rows"]
    assert [row["K"] for row in rows] == [0, 2]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ((), "one of --rate and --clients"),
        (("--rate", "1", "--clients", "1"), "one of --rate and --clients"),
        (("--rate", "0"), "is not a list of rates"),
        (("--rate", "1", "--K", "2"), "--K: 2 needs to know what is accepted"),
        (("--rate", "1", "--K", "65", "--acceptance", "1"), "--K: 65 is not allowed"),
        (("--rate", "1", "--acceptance", "1.5"), "is not a list of chances"),
        (("--rate", "1", "--routing", "x", "--costs", "COSTS"), "routing: 'x' is unknown"),
        (("--rate", "1", "--groups", "4"), "--groups: is of --prefix-tokens"),
        (("--clients", "1", "--cv", "2"), "--cv: is of --arrivals gamma"),
        (("--rate", "1", "--attain", "0.9"), "--attain: is of --ttft"),
        (("--rate", "1", "--costs", "nowhere"), "--costs: nowhere: No such file"),
        (("--rate", "1", "--costs", "COSTS", "--pages", "2"), "pages: a request needs"),
        (("--rate", "1", "--costs", "COSTS", "--prompt-tokens", "x"), "--prompt-tokens: 'x'"),
    ],
)
def test_bad_input_is_told_in_a_line(capsys, tmp_path, words, message):
    file = tmp_path / "costs.json"
    file.write_text(FLAT.to_json())
    try:
        code = cli.main(["simulate", *(str(file) if w == "COSTS" else w for w in words)])
    except SystemExit as error:  # of argparse
        code = error.code
    assert code == 2
    assert message in capsys.readouterr().err.strip().splitlines()[-1]


def test_the_scheduler_is_the_engines():
    """A request that the engine's scheduler would admit later is admitted later here."""
    scheduler = Scheduler(PageAllocator(8, 16), 4, 1)
    for _ in range(3):
        scheduler.add(Request(list(range(40)), SamplingParams(max_tokens=8)))
    assert len(scheduler.plan().admitted) == 2
    load = Load(3, Arrivals(clients=3), Lengths("fixed", 40, 40), Lengths("fixed", 8, 8))
    for model in MODELS:
        setting = Setting(pages=8, max_batch=4, shares=False)
        outcome = run(load, setting, costs=FLAT, model=model)
        assert outcome.first[2] > outcome.ended[0], model
