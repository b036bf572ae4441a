"""Certificates of greedy decoding: every divergence, its margins, and whose it is."""

from __future__ import annotations

import json

import pytest
import torch

from helpers.tiny_models import tiny_model, tiny_tokenizer
from inferlab import SpeculativePipeline
from inferlab.benchmarks.comparison import first_difference
from inferlab.benchmarks.divergence import row_behind, row_by_one
from inferlab.certify.greedy import MOST, certify_greedy, read_recorded
from inferlab.certify.recheck import recheck
from inferlab.errors import UsageError
from inferlab.models import loading

PROMPT = "the quick brown fox"


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A tiny model with two tokens that have the same logits everywhere, but for rounding."""
    path = tmp_path_factory.mktemp("model")
    model = tiny_model("llama", seed=3)
    model.to(torch.float32).save_pretrained(path)
    tiny_tokenizer().save_pretrained(path)
    return str(path)


def decoded(folder, tokens=12):
    pipeline = SpeculativePipeline(base_model=folder, draft_mode="none")
    return pipeline.generate(PROMPT, max_tokens=tokens, ignore_eos=True)["token_ids"]


def certify(folder, recorded, prompts=(PROMPT,), **config):
    return certify_greedy(
        {
            "config": {"base_model": folder, "draft_mode": "ngram", **config},
            "prompts": list(prompts),
            "recorded": recorded,
            "against": "a file",
            "max_tokens": 12,
            "exact": "float64",
        }
    )


def test_first_differences():
    assert first_difference([1, 2], [1, 2]) is None
    assert first_difference([1, 2], [1, 3]) == (1, (2, 3))
    assert first_difference([1], [1, 3]) == (1, (None, 3))


def test_one_token_behind_its_cache_is_the_whole_text(folder):
    model = loading.load(folder, device="cpu").model.double().eval()
    ids = [3, 4, 5, 6, 7]
    assert torch.allclose(row_by_one(model, ids), row_behind(model, ids), atol=1e-6)
    assert torch.equal(row_by_one(model, [3]), row_behind(model, [3]))


def test_generate_agrees(folder):
    found = certify(folder, None, [PROMPT, "jumps over"])
    assert found["certified"]
    assert (found["identical"], found["prompts"], found["divergences"]) == (2, 2, [])
    assert found["tokens"] > 0
    assert recheck(found)["confirmed"]
    elsewhere = {**found, "environment": {**found["environment"], "torch": "9.9"}}
    assert recheck(elsewhere)["confirmed"]
    assert recheck({**elsewhere, "prompts": 77})["differences"] == ["prompts: stated 77, found 2"]


def test_a_wrong_token_is_theirs_and_the_comparison_goes_on(folder):
    ids = decoded(folder)
    ids[2] = (ids[2] + 1) % 100
    after = SpeculativePipeline(base_model=folder, draft_mode="none")
    prompt = after.encode(PROMPT)
    follows = after.generate([*prompt, *ids[:3]], max_tokens=9, ignore_eos=True)["token_ids"]
    ids[3:] = follows
    ids[7] = (ids[7] + 1) % 100
    found = certify(folder, [ids[:8]])
    assert not found["certified"]
    first, second = found["divergences"]
    assert (first["position"], second["position"]) == (2, 7)
    assert first["verdict"] == second["verdict"] == "theirs"
    assert (first["theirs"], second["theirs"]) == (ids[2], ids[7])
    assert first["ours"] == first["best"]
    assert first["margin"] > first["allowed"]
    assert set(first["margins"]) == {"whole", "q1", "float64"}
    assert first["top2_margin"] <= first["margin"] + 1e-9
    assert "2 bugs" in found["summary"]


def test_rounding_decides_between_equal_tokens(tmp_path):
    """Two tokens whose logits differ by less than bfloat16 tells apart: either is right."""
    model = tiny_model("llama", seed=3)
    path = str(tmp_path / "tie")
    tiny_tokenizer().save_pretrained(path)
    model.save_pretrained(path)
    best = decoded(path, 1)[0]
    other = 40 if best != 40 else 41
    with torch.no_grad():
        rows = model.get_output_embeddings().weight
        rows[other] = rows[best] * (1 + 2**-12)
    model.save_pretrained(path)
    ours = SpeculativePipeline(base_model=path, draft_mode="none", dtype="bfloat16")
    own = ours.generate(PROMPT, max_tokens=1, ignore_eos=True)["token_ids"][0]
    assert own in (best, other)
    found = certify(path, [[best + other - own]], dtype="bfloat16")
    assert found["certified"]
    (one,) = found["divergences"]
    assert one["verdict"] == "tie"
    assert 0 < abs(one["margin"]) < one["rounding_step"]
    assert "1 ties within rounding, 0 bugs" in found["summary"]


def test_a_broken_engine_is_ours(folder, monkeypatch):
    ids = decoded(folder, 3)
    original = SpeculativePipeline.generate

    def broken(self, prompt, **params):
        results = original(self, prompt, **params)
        for result in results:
            result["token_ids"][0] = (result["token_ids"][0] + 1) % 100
        return results

    monkeypatch.setattr(SpeculativePipeline, "generate", broken)
    found = certify(folder, [ids])
    assert [one["verdict"] for one in found["divergences"]] == ["ours"] * 3


def test_a_file_of_nonsense_ends(folder):
    found = certify(folder, [[7] * (MOST + 9)])
    assert len(found["divergences"]) <= MOST


def test_packed_weights_are_refused():
    with pytest.raises(UsageError, match="has int8 weights"):
        certify("inferlab/tiny", [[5]], quantization="int8")


def test_ids_as_prompts_need_recorded_ids(folder):
    with pytest.raises(UsageError, match="need --ids"):
        certify(folder, None, [[3, 4]])


# --- files of other engines ---------------------------------------------------------------------

GOOD = {
    "lines": '{"prompt": "a", "token_ids": [1, 2]}\n\n{"prompt": "b", "ids": [3]}\n',
    "list": json.dumps([{"prompt": "a", "token_ids": [1, 2]}, {"prompt": "b", "ids": [3]}]),
    "ours": json.dumps(
        {"results": [{"prompt": "a", "token_ids": [1, 2]}, {"prompt": "b", "token_ids": [3]}]}
    ),
    "vllm": json.dumps(
        [
            {"prompt": "a", "outputs": [{"token_ids": [1, 2], "text": "x"}]},
            {"prompt": "b", "outputs": [{"token_ids": [3]}]},
        ]
    ),
}


@pytest.mark.parametrize("form", GOOD)
def test_recorded_ids_are_read(form, tmp_path):
    file = tmp_path / "ids.json"
    file.write_text(GOOD[form])
    assert read_recorded(file) == (["a", "b"], [[1, 2], [3]])


def test_prompt_ids_beat_the_text(tmp_path):
    file = tmp_path / "ids.jsonl"
    file.write_text('{"prompt": "a", "prompt_token_ids": [9, 8], "token_ids": [1]}')
    assert read_recorded(file) == ([[9, 8]], [[1]])


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "holds no entries"),
        ("{\n{", ":1: is not JSON"),
        ("[3]", "entry 0: must be an object"),
        ('{"prompt": "a"}', "entry 0: needs token_ids"),
        ('{"prompt": "a", "token_ids": ["x"]}', "entry 0: needs token_ids"),
        ('{"prompt": "", "token_ids": [1]}', "entry 0: needs prompt"),
    ],
)
def test_other_files_are_refused(text, message, tmp_path):
    file = tmp_path / "ids.json"
    file.write_text(text)
    with pytest.raises(UsageError, match=message):
        read_recorded(file)
    with pytest.raises(UsageError, match="cannot be read"):
        read_recorded(tmp_path / "none")
