"""Certificates of decoding: replays, samples of engines, and making a certificate again."""

from __future__ import annotations

import copy
import json

import numpy as np
import pytest

from helpers.broken_verifiers import BrokenPolicy, match, verifier
from helpers.fake_probabilities import next_probabilities
from inferlab.certify.facts import describe_model, parse_sampler, sampler_text
from inferlab.certify.lossless import certify_lossless, num_tests
from inferlab.certify.recheck import read_certificate, recheck
from inferlab.certify.sampled import TOKENS, likeliest
from inferlab.errors import UsageError
from inferlab.models import FakeLM, HFModel
from inferlab.output import write_json
from inferlab.types import SamplingParams

SETTINGS = {
    "config": {"implementation": "fake", "fake": {"agreement": 0.6}},
    "draft_modes": ["vanilla", "ngram"],
    "trees": ["its own", "3,2"],
    "samplers": ["greedy", "temperature=0.8,top_k=6"],
    "batches": [1, 3],
    "quantizations": ["none"],
    "prompts": ["one two", "three", "a b c a b"],
    "max_tokens": 12,
    "samples": 300,
    "seed": 5,
}


def settings(**changed):
    return {**SETTINGS, **changed}


def of_part(certificate, part):
    return [check for check in certificate["checks"] if check["part"] == part]


@pytest.fixture(scope="module")
def certificate():
    return certify_lossless(settings())


def test_the_engine_is_lossless(certificate):
    assert certificate["certified"]
    assert certificate["summary"] == f"certified: {len(certificate['checks'])} checks passed"
    replays = of_part(certificate, "replay")
    assert len(replays) == 2 * 2 * 2 * 2
    assert all(check["compared"] == 3 for check in replays)
    vanilla = [check for check in replays if check["name"].startswith("vanilla")]
    assert min(check["accepted_length"] for check in vanilla) > 1.2
    assert len(of_part(certificate, "sampled")) == 2 * 2
    assert num_tests(SETTINGS) == len(of_part(certificate, "sampled")) + len(
        of_part(certificate, "trees")
    )


def test_rejection_is_replayed_greedily_and_sampled_above():
    config = {**SETTINGS["config"], "policy": "rejection"}
    found = certify_lossless(settings(config=config, draft_modes=["vanilla"], batches=[2]))
    assert found["certified"]
    assert [check["name"] for check in of_part(found, "replay")] == [
        "vanilla, tree its own, greedy, batch 2",
        "vanilla, tree 3,2, greedy, batch 2",
    ]
    assert len(of_part(found, "sampled")) == 2


def test_a_lossy_policy_is_measured_and_not_certified():
    config = {**SETTINGS["config"], "policy": "conf_threshold", "tau": 0.01}
    found = certify_lossless(settings(config=config, draft_modes=["vanilla"], batches=[2]))
    assert not found["certified"]
    assert all(check["passed"] for check in found["checks"])
    assert found["summary"].startswith("not certified: conf_threshold is lossy, by a total")
    assert not of_part(found, "replay")
    distances = [check["distance"] for check in found["checks"] if "distance" in check]
    most = max(distance["tv"] for distance in distances)
    assert f"a total variation of up to {most:.3f} (" in found["summary"]
    worst = max((check["distance"] for check in of_part(found, "sampled")), key=lambda d: d["tv"])
    assert 0 < worst["tv_interval"][0] < worst["tv"] < worst["tv_interval"][1]
    assert 0 < worst["kl_interval"][0] <= worst["kl"] <= worst["kl_interval"][1]


def broken_parts(policy, **changed):
    """Certifies an engine that runs a broken policy; the parts that failed, and the certificate.

    Its small cases are those of the right kernel: real decoding must show it."""
    usual = {"draft_modes": ["vanilla"], "trees": ["chain"], "batches": [2], "samples": 300}
    found = certify_lossless(settings(**{**usual, **changed}), policy=policy)
    assert not found["certified"]
    assert "vanilla, tree chain" in found["summary"]
    return {check["part"] for check in found["checks"] if not check["passed"]}, found


def test_an_engine_that_takes_every_draft_is_found():
    policy = BrokenPolicy("longest_prefix", verifier=match("first child always taken"))
    parts, found = broken_parts(policy)
    assert parts == {"replay", "sampled"}
    details = [check["detail"] for check in of_part(found, "replay") if not check["passed"]]
    assert all("differ from plain decoding, first prompt 0 at new token" in d for d in details)


def test_an_engine_whose_samples_are_the_drafts_is_found():
    """Of the bundled pair; only samples can tell, as another seed's tokens are nobody's."""
    policy = BrokenPolicy("rejection", verifier=verifier("always accepted"))
    text = {"prompts": ["def add(a, b):"], "max_tokens": 4, "samplers": ["temperature=1,top_k=8"]}
    parts, found = broken_parts(policy, config={}, samples=200, **text)
    assert parts == {"sampled"}
    (check,) = of_part(found, "sampled")
    assert "; tokens " in check["detail"]
    assert check["distance"]["p_value"] < 1e-7


def test_a_verifier_that_is_handed_in_is_judged():
    found = certify_lossless(
        settings(draft_modes=["vanilla"], trees=["chain"], batches=[1], samples=0),
        verifier=match("first child always taken"),
    )
    assert not found["certified"]
    assert found["summary"].startswith("not certified:")
    assert not any(check["part"] == "replay" for check in found["checks"] if not check["passed"])


PENALTIES = {"repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.25}


@pytest.mark.parametrize("penalties", [{}, PENALTIES], ids=["", "penalised"])
def test_the_law_of_continuations_is_the_models_own(penalties):
    model = FakeLM(seed=3)
    prompt = [300, 301]
    sampler = {"temperature": 0.7, "top_k": 4, **penalties}
    cells = likeliest(model, prompt, sampler, 10)
    assert len(cells) == 10
    assert list(cells.values()) == sorted(cells.values(), reverse=True)
    params = SamplingParams(**sampler)
    for tokens, chance in cells.items():
        product = 1.0
        for i in range(TOKENS):
            product *= next_probabilities(model, prompt, params, tokens[:i])[tokens[i]]
        assert chance == pytest.approx(product, rel=1e-5)


# --- what is written beside it ------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "sampler"),
    [
        ("greedy", {"temperature": 0.0}),
        ("0.8", {"temperature": 0.8}),
        ("temperature=0.8,top_p=0.9", {"temperature": 0.8, "top_p": 0.9}),
        ("top_k=5", {"temperature": 1.0, "top_k": 5}),
        (
            "temperature=0,repetition_penalty=1.2,presence_penalty=-1",
            {"temperature": 0.0, "repetition_penalty": 1.2, "presence_penalty": -1.0},
        ),
    ],
)
def test_samplers_are_spelled(text, sampler):
    assert parse_sampler(text) == sampler
    assert parse_sampler(sampler_text(sampler)) == sampler


@pytest.mark.parametrize("text", ["hot", "top_q=1", "top_p=2", "temperature=-1", "top_k=1.5", ""])
def test_other_samplers_are_refused(text):
    with pytest.raises(UsageError, match="--sampler: "):
        parse_sampler(text)


def test_models_are_known_again_by_their_weights():
    one = HFModel.load("inferlab/tiny-draft")
    described = describe_model(one)
    assert described == describe_model(HFModel.load("inferlab/tiny-draft"))
    with one.plain() as module:
        weight = next(module.parameters())
        weight.data[0, 0] += 1
    assert describe_model(one)["weights"] != described["weights"]
    assert describe_model(FakeLM())["weights"] is None


# --- made again ---------------------------------------------------------------------------------


@pytest.fixture
def stated(certificate, tmp_path):
    """The certificate as its file has it."""
    write_json(tmp_path / "c.json", certificate)
    return read_certificate(tmp_path / "c.json", "lossless")


def test_a_certificate_is_confirmed(stated):
    found = recheck(stated)
    assert found["confirmed"], found["differences"]
    assert found["summary"].startswith("confirmed: every figure came out again; certified")


def test_what_was_changed_is_found(stated):
    changed = copy.deepcopy(stated)
    index = next(i for i, c in enumerate(changed["checks"]) if c["part"] == "sampled")
    changed["checks"][index]["distance"]["tv"] /= 2
    changed["models"][0]["parameters"] = 7
    found = recheck(changed)
    assert not found["confirmed"]
    places = [line.split(":")[0] for line in found["differences"]]
    assert places == ["models[0].parameters", f"checks[{index}].distance.tv"]
    # Elsewhere last bits may differ, but not who was certified, and by which checks.
    changed["environment"]["processor"] = "another"
    changed["checks"][0]["passed"] = False
    elsewhere = recheck(changed)["differences"]
    assert [line.split(":")[0] for line in elsewhere] == [
        "models[0].parameters",
        "checks[0].passed",
    ]


def test_files_that_are_no_certificates_are_refused(tmp_path, certificate):
    file = tmp_path / "c.json"
    for text, message in (
        ("{", "cannot be read"),
        ("[]", "is no certificate of lossless"),
        (json.dumps({"kind": "greedy"}), "use inferlab certify greedy --check"),
        (json.dumps({"kind": "lossless"}), "Field required"),
    ):
        file.write_text(text)
        with pytest.raises(UsageError, match=message):
            read_certificate(file, "lossless")
    with pytest.raises(UsageError, match="--check: "):
        read_certificate(tmp_path / "none.json", "lossless")
    assert np.isfinite(certificate["false_alarm"])
