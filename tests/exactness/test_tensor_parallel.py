"""A model on several ranks: to the bit the tokens and log-probabilities of plain decoding there,
and the tokens of one process; ranks that end, and ranks that disagree."""

import time
from pathlib import Path

import pytest
from transformers import MixtralConfig

from helpers import ranks
from helpers.sharded_runs import decoded
from helpers.tiny_models import VOCAB, saved_model, tiny_config

pytestmark = [pytest.mark.slow, pytest.mark.xdist_group("ranks")]

PLAIN = {"draft_mode": "none"}
NGRAM = {"draft_mode": "ngram", "k": 3}
TREES = {"draft_mode": "recycling", "k": 3, "tree": [2, 2, 1]}
SELF = {"draft_mode": "self", "k": 2, "early_exit": {"layers": 1}}
LITE = [{"draft_mode": "medusa-lite", "k": 2}, {"draft_mode": "eagle-lite", "k": 2}]
BUNDLED = [
    {"draft_mode": mode, "controller": "fixed"} for mode in ("vanilla", "eagle", "medusa", "self")
]
TEMPERATURES = [0.0, 0.8]
# Phi-3 has Q, K and V in one weight, Qwen-2 here one K/V head: attention is whole on each rank.
FAMILIES = ("llama", "qwen3", "gemma2", "phi3", "qwen2", "gpt_neox", "mixtral")


def config_of(family):
    if family != "mixtral":
        return tiny_config(family)
    base = tiny_config("llama").to_dict()
    sizes = {name: base[name] for name in ("hidden_size", "num_hidden_layers", "head_dim")}
    return MixtralConfig(
        **sizes,
        vocab_size=VOCAB,
        intermediate_size=96,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        max_position_embeddings=128,
        bos_token_id=0,
        eos_token_id=1,
    )


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("ranks")


@pytest.fixture(scope="module")
def models(folder):
    return {name: saved_model(config_of(name), folder / name) for name in FAMILIES}


@pytest.fixture(scope="module")
def modes(folder):
    draft = saved_model(tiny_config("llama"), folder / "draft", seed=1)
    vanilla = {"draft_mode": "vanilla", "k": 3, "draft_model": draft}
    every = [PLAIN, NGRAM, TREES, SELF, *LITE, vanilla]
    return {name: every if name in ("llama", "qwen3") else [PLAIN, TREES] for name in FAMILIES}


@pytest.fixture(scope="module")
def on_two(folder, models, modes):
    """Of each model, runs by mode and temperature: one for each prompt."""
    asked = {name: (path, modes[name], TEMPERATURES) for name, path in models.items()}
    asked["bundled"] = ("inferlab/tiny", [PLAIN, *BUNDLED], TEMPERATURES)
    kept = {"kv_cache_dtype": "int8"}
    asked["int8 K/V"] = (models["llama"], [PLAIN | kept, TREES | kept], TEMPERATURES)
    return ranks.run("helpers.sharded_runs:all_sharded", 2, folder, asked)


def of_temperature(runs, index):
    return runs[index :: len(TEMPERATURES)]


def tokens_and_logprobs(runs):
    return [(ids, logprobs) for ids, logprobs, _ in runs]


@pytest.mark.parametrize("name", [*FAMILIES, "bundled", "int8 K/V"])
@pytest.mark.parametrize("temperature", TEMPERATURES)
def test_drafts_change_no_bit(on_two, name, temperature):
    plain, *drafted = of_temperature(on_two[name], TEMPERATURES.index(temperature))
    assert drafted
    for runs in drafted:
        assert tokens_and_logprobs(runs) == tokens_and_logprobs(plain)
    if name == "int8 K/V":
        as_it_is = of_temperature(on_two["llama"], TEMPERATURES.index(temperature))[0]
        assert tokens_and_logprobs(plain) != tokens_and_logprobs(as_it_is)
    if name == "bundled":  # trained drafts: much is accepted
        assert all(sum(accepted for *_, accepted in runs) > 0 for runs in drafted)


@pytest.mark.parametrize("name", FAMILIES)
def test_one_process_gives_the_same_tokens(on_two, models, name):
    alone = decoded(models[name], [PLAIN], TEMPERATURES)
    for one, other in zip(alone, on_two[name][: len(TEMPERATURES)], strict=True):
        assert [ids for ids, *_ in one] == [ids for ids, *_ in other]


@pytest.fixture(scope="module")
def on_three(tmp_path_factory):
    folder = tmp_path_factory.mktemp("three")
    config = tiny_config("llama")
    config.hidden_size, config.num_attention_heads, config.num_key_value_heads = 96, 6, 3
    model = saved_model(config, folder / "model")
    run = (model, [PLAIN, TREES, NGRAM], [0.8])
    return ranks.run("helpers.sharded_runs:sums_and_runs", 3, folder, [1, 2, 3, 5, 17, 1200], *run)


def test_three_ranks_add_up_in_one_order(on_three):
    same, error, _ = on_three
    assert same == {
        "torch.float32, True": True,
        "torch.bfloat16, True": True,
        "torch.float32, False": False,  # or this could not fail
        "torch.bfloat16, False": False,
    }
    assert error < 1e-6


def test_three_ranks_decode_alike(on_three):
    plain, *drafted = map(tokens_and_logprobs, on_three[-1])
    assert drafted == [plain] * 2


@pytest.fixture(scope="module")
def while_one_is_disturbed(models, tmp_path_factory):
    folder = tmp_path_factory.mktemp("disturbed")
    (folder / "other").symlink_to(models["llama"])
    paths = {"same": models["llama"], "other": str(folder / "other")}
    asked = {name: (path, [PLAIN, TREES], [0.8]) for name, path in paths.items()}
    return ranks.run("helpers.sharded_runs:disturbed", 2, folder, asked)


def test_what_a_rank_thinks_of_its_logits_decides_nothing(on_two, while_one_is_disturbed):
    expected = of_temperature(on_two["llama"], TEMPERATURES.index(0.8))[0]
    for runs in while_one_is_disturbed["same"]:
        assert tokens_and_logprobs(runs) == tokens_and_logprobs(expected)


def test_ranks_that_compute_otherwise_decide_alike(while_one_is_disturbed):
    plain, drafted = map(tokens_and_logprobs, while_one_is_disturbed["other"])
    assert drafted == plain
    assert plain != tokens_and_logprobs(while_one_is_disturbed["same"][0])


@pytest.mark.parametrize("victim", [0, 1])
def test_ranks_do_not_outlive_each_other(models, tmp_path, victim):
    function = "helpers.sharded_runs:runs_for_ever"
    processes = ranks.start(function, 2, tmp_path, models["llama"], str(tmp_path))
    deadline = time.monotonic() + ranks.TIMEOUT_S
    while not (tmp_path / "running").exists():
        assert time.monotonic() < deadline
        assert all(process.poll() is None for process in processes)
        time.sleep(0.05)
    processes[victim].kill()
    codes = ranks.finish(processes, timeout_s=30)
    survivor = Path(tmp_path / f"log{1 - victim}").read_text()
    if victim == 0:
        assert codes[1] == 1
        assert "rank 1 of 2 ends: another rank has ended" in survivor
    else:
        assert codes[0] == 0  # it caught the error
        kind, message, later = ranks.result(tmp_path)
        assert kind == "RankLostError"
        assert "a rank has ended or hangs" in message
        assert later == message
