"""What a checkpoint's generation_config changes: both sides alike, or none, with a word."""

from __future__ import annotations

import json
import logging
import tempfile
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from helpers.tiny_models import tiny_model, tiny_tokenizer
from inferlab.baseline import LocalBaselineRunner
from inferlab.benchmarks.runners import GenerateRunner
from inferlab.models import HFModel
from inferlab.models.generation_defaults import not_followed
from inferlab.models.loading import ModelLoadError
from inferlab.specdec.pipeline import SpeculativePipeline

PROMPT = "the draft model"
COUNT = 24


def plain(**entries) -> list[int]:
    """By `generate`, with nothing but these entries set."""
    model = tiny_model("llama")
    ids = torch.tensor([tiny_tokenizer().encode(PROMPT)])
    options = {"max_new_tokens": COUNT, "do_sample": False, "pad_token_id": 0, **entries}
    options.setdefault("eos_token_id", 1)
    with torch.inference_mode():
        output = model.generate(ids, attention_mask=torch.ones_like(ids), **options)
    return output[0, ids.shape[1] :].tolist()


@cache
def first() -> int:
    return plain()[0]


FOLLOWED = {
    "suppress_tokens": lambda: [first(), 3, 10**6],
    "bad_words_ids": lambda: [[first()], [1]],  # 1 ends a text, which is not forbidden
    "sequence_bias": lambda: [[[first()], -100.0], [[9], 2.0]],
    "repetition_penalty": lambda: 1.9,
    "min_new_tokens": lambda: 20,
    "min_length": lambda: 20,
    "forced_eos_token_id": lambda: 7 if plain()[-1] != 7 else 8,
}
NOT_FOLLOWED = {
    "bad_words_ids": lambda: [plain()[:2]],
    "sequence_bias": lambda: [[plain()[:2], -100.0]],
    "num_beams": lambda: 3,
    "forced_eos_token_id": lambda: [1, 2],
    "exponential_decay_length_penalty": lambda: (1, 9.0),
    "encoder_repetition_penalty": lambda: 30.0,
    "no_repeat_ngram_size": lambda: 1,
    "begin_suppress_tokens": lambda: [first()],
}


def saved(path: Path, **entries) -> str:
    tiny_model("llama").save_pretrained(path)
    file = path / "generation_config.json"
    file.write_text(json.dumps({"eos_token_id": 1, **entries}))
    tiny_tokenizer().save_pretrained(path)
    return str(path)


@pytest.fixture
def folder(tmp_path):
    return partial(saved, tmp_path)


def both_sides(folder: str, **options) -> list[list[int]]:
    """Tokens of the baseline, of the engine with and without drafts, of the bench's `generate`."""
    baseline = LocalBaselineRunner(model_name=folder, device="cpu", **options)
    runs = [baseline.run(PROMPT, COUNT, temperature=0)]
    target = None
    for mode in ("none", "recycling"):
        pipeline = SpeculativePipeline(
            base_model=folder,
            draft_mode=mode,
            device="cpu",
            max_new_tokens=COUNT,
            target=target,
            **options,
        )
        target = pipeline.target
        runs.append(pipeline.generate(PROMPT))
    assert isinstance(pipeline.target, HFModel)
    runs.append(GenerateRunner(pipeline.target, pipeline.config).run(PROMPT))
    return [run["token_ids"] for run in runs]


def ends() -> list[int]:
    """End-of-text ids that a text of these models comes to soon, so that least lengths show."""
    return [1, plain()[2]]


@pytest.mark.parametrize("name", FOLLOWED)
def test_what_a_sampler_can_do_is_followed(folder, name, caplog):
    entries = {name: FOLLOWED[name](), "eos_token_id": ends() if "min" in name else 1}
    expected = plain(**entries)
    assert expected != plain(eos_token_id=entries["eos_token_id"])
    with caplog.at_level(logging.WARNING, "inferlab"):
        assert both_sides(folder(**entries)) == [expected] * 4
    assert "generation_config" not in caplog.text


def test_the_first_token_behind_a_prompt_of_one_may_be_forced(folder):
    path = folder(forced_bos_token_id=11)
    pipeline = SpeculativePipeline(base_model=path, draft_mode="recycling", device="cpu")
    ids = torch.tensor([[5]])
    expected = tiny_model("llama").generate(
        ids, max_new_tokens=9, do_sample=False, pad_token_id=0, eos_token_id=1,
        forced_bos_token_id=11,
    )[0, 1:].tolist()  # fmt: skip
    assert expected[0] == 11
    for batch in ([[5]], [[5], [5, 6]]):
        found = pipeline.generate(batch, max_tokens=9)
        assert found[0]["token_ids"] == expected
    assert pipeline.generate([5], max_tokens=1)["token_ids"] == [11]
    assert joined(pipeline.stream([5], max_tokens=9)) == expected
    assert not pipeline.engine.scheduler.has_work


def joined(pieces) -> list[int]:
    return [token for piece in pieces for token in piece.token_ids]


def test_the_last_token_may_be_a_bad_word(folder):
    entries = {"bad_words_ids": [[91], [88]], "forced_eos_token_id": 91}
    assert plain(**entries)[-1] == 91
    assert both_sides(folder(**entries)) == [plain(**entries)] * 4


def test_all_that_is_followed_is_followed_together(folder):
    value = plain(suppress_tokens=[first()])
    entries = {
        "suppress_tokens": [first()],
        "bad_words_ids": [[value[0]]],
        "repetition_penalty": 1.4,
        "eos_token_id": ends(),
        "min_length": 30,
        "min_new_tokens": 9,  # transformers lets it win
    }
    assert both_sides(folder(**entries)) == [plain(**entries)] * 4


IDS = st.integers(3, 159)
ENTRIES = {
    "suppress_tokens": st.lists(IDS, max_size=80),
    "bad_words_ids": st.lists(IDS.map(lambda token: [token]), min_size=1, max_size=80),
    "repetition_penalty": st.floats(0.5, 3),
    "min_new_tokens": st.integers(0, COUNT),
    "min_length": st.integers(0, 40),
    "forced_eos_token_id": IDS,
    "eos_token_id": st.lists(IDS, min_size=1, max_size=9, unique=True),
}


@settings(max_examples=25, deadline=None)
@given(entries=st.fixed_dictionaries({}, optional=ENTRIES))
def test_any_entries_are_followed_together(entries):
    # transformers reads no file that forces and suppresses one token
    assume(entries.get("forced_eos_token_id") not in entries.get("suppress_tokens", ()))
    entries.setdefault("eos_token_id", 1)
    with tempfile.TemporaryDirectory() as name:
        path = saved(Path(name), **entries)
        assert both_sides(path) == [plain(**entries)] * 4, entries


def test_the_part_that_can_be_followed_is(folder, caplog):
    single, pair = [first()], plain(suppress_tokens=[first()])[:2]
    expected = plain(bad_words_ids=[single])
    assert plain(bad_words_ids=[single, pair]) != expected != plain()
    with caplog.at_level(logging.WARNING, "inferlab"):
        assert both_sides(folder(bad_words_ids=[single, pair])) == [expected] * 4
    assert "sets the longer words of bad_words_ids, which neither" in caplog.text


def test_a_bias_beside_a_penalty_is_not_followed_but_named(folder, caplog):
    entries = {"sequence_bias": [[[first()], -3.0]], "repetition_penalty": 1.4}
    with caplog.at_level(logging.WARNING, "inferlab"):
        assert both_sides(folder(**entries)) == [plain(repetition_penalty=1.4)] * 4
    assert "sets sequence_bias, which neither" in caplog.text


def test_values_that_are_given_win(folder):
    path = folder(repetition_penalty=1.9, min_new_tokens=20, eos_token_id=ends())

    def tokens(arguments, **options):
        pipeline = SpeculativePipeline(base_model=path, draft_mode="none", device="cpu", **options)
        return pipeline.generate(PROMPT, COUNT, **arguments)["token_ids"]

    by_penalty = plain(repetition_penalty=1.2, min_new_tokens=20, eos_token_id=ends())
    assert tokens({"repetition_penalty": 1.2}) == by_penalty == tokens({}, repetition_penalty=1.2)
    soon = plain(repetition_penalty=1.9, eos_token_id=ends())
    assert tokens({"min_tokens": 0}) == soon == tokens({}, min_new_tokens=0)
    assert tokens({"repetition_penalty": 1.0, "min_tokens": 0}) == plain(eos_token_id=ends())


NOTHING: tuple[dict, ...] = (
    {"suppress_tokens": []},
    {"bad_words_ids": []},
    {"bad_words_ids": [[]]},
    {"bad_words_ids": [[1]]},
    {"sequence_bias": []},
    {"max_length": 20},
    {"max_length": 4096},
    {"min_length": 0},
    {"is_assistant": True},
    {"use_cache": False},
    {"cache_implementation": "static"},
    {"return_dict_in_generate": True, "output_scores": True, "output_logits": True},
    {"output_attentions": True, "output_hidden_states": True, "return_dict_in_generate": True},
)


@pytest.mark.parametrize("entries", NOTHING, ids=str)
def test_what_changes_no_token_changes_nothing_and_is_not_named(folder, entries, caplog):
    path = folder(**entries)
    with caplog.at_level(logging.WARNING, "inferlab"):
        assert both_sides(path) == [plain()] * 4
    assert "generation_config" not in caplog.text


@pytest.mark.parametrize("entry", [("max_length", 30), ("max_new_tokens", 5)])
def test_lengths_are_the_callers_and_named(folder, entry, caplog):
    path = folder(**dict([entry]))
    with caplog.at_level(logging.WARNING, "inferlab"):
        assert both_sides(path) == [plain()] * 4
    assert f"sets {entry[0]}, which neither" in caplog.text


WRONG: tuple[tuple[dict, str], ...] = (
    ({"eos_token_id": "1"}, "eos_token_id is '1'; it must be a token id or a list of token ids"),
    ({"eos_token_id": [1, "2"]}, "eos_token_id is"),
    ({"suppress_tokens": 5}, "suppress_tokens is 5; it must be a list of token ids"),
    ({"suppress_tokens": "5"}, "suppress_tokens is '5'"),
    ({"suppress_tokens": ["5"]}, "suppress_tokens is"),
    ({"bad_words_ids": [5, 6]}, "bad_words_ids is [5, 6]; it must be a list of words"),
    ({"bad_words_ids": [["a"]]}, "bad_words_ids is"),
    ({"sequence_bias": 3}, "sequence_bias is 3"),
    ({"sequence_bias": [[5, 2.0]]}, "sequence_bias is"),
    ({"repetition_penalty": 0}, "repetition_penalty is 0; it must be a number above 0"),
    ({"repetition_penalty": "1.2"}, "repetition_penalty is '1.2'"),
    ({"min_length": -1}, "min_length is -1"),
    ({"num_return_sequences": 2}, "num_return_sequences"),
)


@pytest.mark.parametrize(("entries", "message"), WRONG, ids=lambda value: str(value)[:40])
def test_what_cannot_be_read_is_named_before_any_work(folder, entries, message):
    path = folder(**entries)
    for make in (
        lambda: SpeculativePipeline(base_model=path, draft_mode="none", device="cpu"),
        lambda: LocalBaselineRunner(model_name=path, device="cpu"),
    ):
        with pytest.raises(ModelLoadError) as caught:
            make()
        assert "generation_config.json: " in str(caught.value)
        assert message in str(caught.value)
        assert path in str(caught.value)


def test_a_file_that_is_no_object_is_refused(folder, tmp_path):
    path = folder()
    (tmp_path / "generation_config.json").write_text("[1]")
    with pytest.raises(ModelLoadError, match=r"generation_config\.json holds a list"):
        LocalBaselineRunner(model_name=path, device="cpu")


@pytest.mark.parametrize("name", NOT_FOLLOWED)
def test_the_rest_changes_nothing_and_is_named(folder, name, caplog):
    value = NOT_FOLLOWED[name]()
    assert plain(**{name: value}) != plain()
    path = folder(**{name: value})
    with caplog.at_level(logging.WARNING, "inferlab"):
        assert both_sides(path) == [plain()] * 4
    warnings = [r.getMessage() for r in caplog.records if "generation_config" in r.getMessage()]
    assert len(warnings) == 2  # a model for either side
    assert all(f"sets {name}, which neither" in warning for warning in warnings)


def test_all_of_it_can_be_ignored(folder, caplog):
    path = folder(suppress_tokens=[first()], num_beams=3, top_k=2)
    with caplog.at_level(logging.WARNING, "inferlab"):
        assert both_sides(path, ignore_generation_config=True) == [plain()] * 4
    assert "generation_config" not in caplog.text


def test_a_callers_bias_is_added(folder):
    pipeline = SpeculativePipeline(
        base_model=folder(suppress_tokens=[first()]), draft_mode="none", device="cpu"
    )
    second = plain(suppress_tokens=[first()])[0]
    bias = {second: -100.0, first(): 100.0}
    token = pipeline.generate(PROMPT, 1, logit_bias=bias)["token_ids"][0]
    assert token not in (first(), second)


def test_ordinary_checkpoints_are_not_spoken_of():
    assert not_followed(tiny_model("llama")) == ()
