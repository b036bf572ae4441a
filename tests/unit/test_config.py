"""YAML files and flags: what they may say, which of them wins, and what their errors name."""

import math
import os
from pathlib import Path

import pytest

from inferlab.config import (
    BaselineConfig,
    ConfigError,
    SpecdecConfig,
    VllmConfig,
    choices,
    find_config,
    load_config,
    packaged_configs,
)
from inferlab.config_file import read_yaml


@pytest.fixture
def write(tmp_path: Path):
    def _write(text: str, name: str = "x.yaml") -> str:
        file = tmp_path / name
        file.write_text(text, encoding="utf-8")
        return str(file)

    return _write


# --- the packaged files -------------------------------------------------------------------------


def test_baseline_file_has_the_seeds_values():
    config = load_config(BaselineConfig, "configs/baseline.yaml")
    assert config.model == "facebook/opt-125m"
    assert config.torch_dtype == "float32"
    assert config.max_new_tokens == 48
    assert config.temperature == 0.7
    assert config.do_sample is True
    assert config.device_priority == ("mps", "cuda", "cpu")
    assert config.log_level == "INFO"


def test_specdec_file_has_the_seeds_values():
    config = load_config(SpecdecConfig, "configs/specdec.yaml")
    assert (config.base_model, config.draft_model) == ("facebook/opt-125m", "distilgpt2")
    assert (config.max_draft, config.implementation) == (4, "fake")
    assert (config.temperature, config.do_sample, config.max_new_tokens) == (0.7, True, 64)
    assert (config.top_p, config.top_k, config.repetition_penalty) == (0.9, 50, 1.0)
    assert (config.device, config.max_memory_mb, config.seed) == ("auto", 500, 1234)
    assert (config.log_level, config.verbose) == ("INFO", False)


def test_specdec_hf_file_has_the_seeds_values():
    config = load_config(SpecdecConfig, "configs/specdec_hf.yaml")
    assert config.base_model == config.draft_model == "sshleifer/tiny-gpt2"
    assert (config.max_draft, config.implementation, config.draft_mode) == (2, "hf", "vanilla")
    assert config.medusa.num_heads == 2
    assert config.medusa.head_init == "tie"
    assert config.eagle.alpha == 0.7
    assert config.eagle.max_draft == 2
    assert (config.temperature, config.max_new_tokens, config.device) == (0.3, 24, "cpu")
    assert config.effective_temperature == 0.0, "do_sample: false is greedy"


def test_vllm_file_has_the_seeds_values():
    config = load_config(VllmConfig, "configs/vllm.yaml")
    assert config.url == "http://127.0.0.1:8000"
    assert (config.model, config.max_tokens, config.temperature) == ("llama-2-7b", 50, 0.7)
    assert (config.timeout, config.retry_attempts, config.retry_delay) == (30, 3, 1.0)
    assert (config.iterations, config.warmup_iterations) == (5, 1)


def test_defaults_without_a_file():
    config = load_config(SpecdecConfig)
    assert config.implementation == "hf"
    assert (config.base_model, config.draft_model) == ("inferlab/tiny", "inferlab/tiny-draft")
    assert (config.levels, config.controller_name, config.policy) == (4, "cost", "longest_prefix")
    assert (config.effective_temperature, config.max_new_tokens, config.seed) == (0.0, 64, 1234)
    assert (config.tau, config.agree_k, config.p) == (0.5, 5, 0.9)
    assert (config.min_k, config.max_k, config.target_acceptance) == (1, 8, 0.7)
    assert load_config(BaselineConfig).model == "inferlab/tiny"


# --- finding files ------------------------------------------------------------------------------


def test_packaged_file_is_found_from_anywhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert "configs/specdec.yaml" in packaged_configs()
    assert load_config(SpecdecConfig, "configs/specdec.yaml").implementation == "fake"


def test_a_real_file_beats_the_packaged_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    os.mkdir("configs")
    Path("configs/specdec.yaml").write_text("max_draft: 7\n")
    assert find_config("configs/specdec.yaml") == Path("configs/specdec.yaml")
    assert load_config(SpecdecConfig, "configs/specdec.yaml").max_draft == 7


@pytest.mark.parametrize("path", ["nowhere.yaml", "configs/nowhere.yaml", "other/specdec.yaml"])
def test_missing_file_is_named_and_the_packaged_ones_offered(path):
    with pytest.raises(ConfigError, match=f"^{path}: does not exist; .*configs/vllm.yaml"):
        load_config(SpecdecConfig, path)


def test_directory_is_not_a_file(tmp_path):
    with pytest.raises(ConfigError, match="is a directory"):
        load_config(SpecdecConfig, str(tmp_path))


# --- precedence ---------------------------------------------------------------------------------


def test_caller_beats_file_beats_default(write):
    path = write("max_draft: 7\ntau: 0.25\n")
    config = load_config(SpecdecConfig, path, {"max_draft": 3, "p": None})
    assert (config.max_draft, config.tau, config.p) == (3, 0.25, 0.9)


def test_k_is_max_draft_under_another_name(write):
    assert load_config(SpecdecConfig, write("K: 6\n")).max_draft == 6
    assert load_config(SpecdecConfig, write("max_draft: 6\n"), {"K": 2}).max_draft == 2
    assert load_config(SpecdecConfig, write("K: 6\n"), {"max_draft": 2}).max_draft == 2
    with pytest.raises(ConfigError, match="K: 6 contradicts max_draft: 5"):
        load_config(SpecdecConfig, write("K: 6\nmax_draft: 5\n"))


def test_a_given_temperature_beats_do_sample_false_of_the_file(write):
    path = write("do_sample: false\ntemperature: 0.3\n")
    assert load_config(SpecdecConfig, path).effective_temperature == 0.0
    assert load_config(SpecdecConfig, path, {"temperature": 0.8}).effective_temperature == 0.8
    both = {"temperature": 0.8, "do_sample": False}
    assert load_config(SpecdecConfig, path, both).effective_temperature == 0.0


def test_blocks_are_merged_key_by_key(write):
    path = write("ngram: {min_match: 2, max_match: 6}\n")
    config = load_config(SpecdecConfig, path, {"ngram": {"max_match": 3}})
    assert (config.ngram.min_match, config.ngram.max_match) == (2, 3)


def test_force_device_beats_device(write):
    path = write("device: cuda\nforce_device: cpu\n")
    assert load_config(SpecdecConfig, path).requested_device == "cpu"


# --- what YAML may look like --------------------------------------------------------------------


def test_yaml_as_people_write_it(write):
    config = load_config(
        SpecdecConfig, write("tau: 1e-3\nstop: END\ndtype: bf16\ntree: [4, 2, 1]\nmin_p: 0\n")
    )
    assert config.tau == 0.001
    assert config.stop == ("END",)
    assert config.dtype == "bfloat16"
    assert config.tree == (4, 2, 1)
    assert load_config(SpecdecConfig, write("")) == load_config(SpecdecConfig)


def test_configurations_are_frozen():
    with pytest.raises(ValueError, match="frozen"):
        load_config(SpecdecConfig).max_draft = 3  # type: ignore[misc]


def test_api_key_is_not_printed(write):
    config = load_config(VllmConfig, write("api_key: s3cret\nbase_url: https://h/v/\n"))
    assert config.api_key == "s3cret"
    assert "s3cret" not in repr(config)
    assert config.url == "https://h/v"


# --- what is refused ----------------------------------------------------------------------------

BAD_SPECDEC = [
    ("max_draft: -1", "max_draft: -1 is not allowed; must be an integer from 0 to 64"),
    ("K: 65", "K: 65 is not allowed; must be an integer from 0 to 64"),
    ("max_draft: four", "max_draft: 'four' is not allowed; must be an integer from 0 to 64"),
    ("max_draft: '4'", "max_draft: '4' is not allowed; must be an integer"),
    ("max_draft: true", "max_draft: true is not allowed; must be an integer"),
    ("max_new_tokens: 0", "max_new_tokens: 0 is not allowed; must be an integer of at least 1"),
    ("max_new_tokens: 1.5", "max_new_tokens: 1.5 is not allowed"),
    ("tau: 1.5", "tau: 1.5 is not allowed; must be a number from 0 to 1"),
    ("p: -0.1", "p: -0.1 is not allowed; must be a number from 0 to 1"),
    ("k: 0", "k: 0 is not allowed; must be an integer of at least 1"),
    ("top_p: 0", "top_p: 0 is not allowed; must be a number above 0 and at most 1"),
    ("temperature: -0.1", "temperature: -0.1 is not allowed; must be a number from 0 to 100"),
    ("temperature: .nan", "temperature: nan is not allowed; must be a number from 0"),
    ("temperature: .inf", "temperature: inf is not allowed; must be a number from 0"),
    ("repetition_penalty: 0", "repetition_penalty: 0 is not allowed; must be a number above 0"),
    ("seed: -1", "seed: -1 is not allowed; must be an integer from 0 to 9223372036854775807"),
    ("do_sample: 'yes'", "do_sample: 'yes' is not allowed; must be true or false"),
    ("policy: best", "policy: 'best' is not allowed; must be one of longest_prefix, rejection,"),
    ("device: tpu", "device: 'tpu' is not allowed; must be auto, cpu, mps, cuda or cuda:N"),
    (
        "force_device: tpu",
        "force_device: 'tpu' is not allowed; must be one of cpu, mps, cuda or null",
    ),
    ("dtype: int8", "dtype: 'int8' is not allowed; must be one of auto, float32,"),
    ("page_size: 17", "page_size: 17 is not allowed; must be one of 1, 2, 4, 8, 16,"),
    ("max_memory_mb: 0", "max_memory_mb: 0 is not allowed; must be a number above 0 or null"),
    ("tree: [2, 0]", "tree: [2, 0] is not allowed; must be chain, optimal, grown or a list of"),
    ("tree: 4", "tree: 4 is not allowed; must be chain, optimal, grown or a list of"),
    ("tree: [15, 17]", "tree: [15, 17] is not allowed: it has 271 nodes; must have at most 256"),
    ("stop: ['']", "stop: [''] is not allowed; must be a list of texts"),
    ("device_priority: [tpu]", "device_priority: ['tpu'] is not allowed"),
    ("base_model: ''", "base_model: '' is not allowed; must be a hub id or a directory"),
    ("{controller: adaptive, max_k: 0}", "min_k: 1 is not allowed; must be at most max_k (0)"),
    ("min_k: 9", "min_k: 9 is not allowed; must be at most max_k (8)"),
    ("min_new_tokens: 65", "min_new_tokens: 65 is not allowed; must be at most max_new_tokens"),
    ("medusa: 3", "medusa: 3 is not allowed; must be a mapping with the keys enabled,"),
    ("medusa: {num_heads: 0}", "medusa.num_heads: 0 is not allowed; must be an integer from 1"),
    ("medusa: {heads: 1}", "medusa.heads: is not a key; did you mean 'num_heads'?"),
    (
        "ngram: {min_match: 5, max_match: 4}",
        "ngram.min_match: 5 is not allowed; must be at most max_match (4)",
    ),
    ("fake: {agreement: 2}", "fake.agreement: 2 is not allowed; must be a number from 0 to 1"),
    ("max_darft: 3", "max_darft: is not a key; did you mean 'max_draft'?"),
    ("max_tokens: 3", "max_tokens: is not a key; did you mean 'max_new_tokens'?"),
    ("host: h", "host: is a key of vllm files; this one is read as a specdec file"),
    ("zzz: 1", "zzz: is not a key; valid keys are K, agree_k, allow_pickle,"),
    ("1: 2", "1 is not a key"),
    ("tree: wide", "tree: 'wide' is not allowed; must be chain, optimal, grown or a list of"),
    (
        "{draft_mode: ensemble, tree: optimal}",
        "tree: 'optimal' is not for draft_mode: 'ensemble'; its members draft trees of their own",
    ),
    (
        "{draft_mode: medusa-lite, tree: [2, 1]}",
        "tree: [2, 1] is not for draft_mode: 'medusa-lite'; it drafts a chain: leave it out",
    ),
    (
        "{draft_mode: eagle-lite, tree: chain}",
        "tree: 'chain' is not for draft_mode: 'eagle-lite'; it drafts a chain: leave it out",
    ),
    (
        "{draft_mode: ngram, tree: optimal}",
        "tree: 'optimal' is not for draft_mode: 'ngram'; where a match was says nothing of ranks",
    ),
    (
        "tree: grown",
        "tree: 'grown' is not for draft_mode: 'vanilla'; only 'medusa' and 'eagle' grow",
    ),
    ("eagle: {enabled: true}", "eagle.enabled: true contradicts draft_mode: 'vanilla'"),
]


@pytest.mark.parametrize(("text", "message"), BAD_SPECDEC, ids=[text for text, _ in BAD_SPECDEC])
def test_bad_value_names_file_key_value_and_what_is_allowed(write, text, message):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(SpecdecConfig, path)
    assert str(caught.value).startswith(f"{path}: {message}")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("port: 0", "port: 0 is not allowed; must be an integer from 1 to 65535"),
        ("base_url: localhost", "must be an http:// or https:// address or null"),
        ("timeout: 0", "timeout: 0 is not allowed; must be a number above 0"),
        ("endpoint: embed", "must be one of chat, completions"),
        ("retry_attempts: 0", "retry_attempts: 0 is not allowed"),
        ("max_draft: 3", "max_draft: is a key of specdec files; this one is read as a vllm file"),
    ],
)
def test_bad_server_value(write, text, message):
    with pytest.raises(ConfigError) as caught:
        load_config(VllmConfig, write(text))
    assert message in str(caught.value)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("a: 1\nb: [1,\n", ":3: is not valid YAML"),
        ("max_draft: 1\nmax_draft: 2\n", ":2: is not valid YAML: key 'max_draft' is given twice"),
        (
            "a: &a {x: 1}\nb: {<<: *a, y: 1, y: 2}\n",
            ":2: is not valid YAML: key 'y' is given twice",
        ),
        ("seed: !!int 1:30\n", ":1: is not valid YAML: '1:30' is not a number"),
        ("tau: !!float 1:30\n", ":1: is not valid YAML: '1:30' is not a number"),
        (f"seed: {'9' * 5000}\n", ":1: is not valid YAML: '999"),
        ("seed: !!timestamp 2026-13-45\n", ": is not valid YAML: month must be"),
        (f"a: {'[' * 5000}\n", ": is not valid YAML: it is nested too deep"),
        ("- 1\n", ": must hold a mapping (key: value), not [1]"),
        ("max_draft: !!python/object:os.system 1\n", ":1: is not valid YAML"),
    ],
)
def test_broken_yaml_names_file_and_line(write, text, message):
    path = write(text)
    with pytest.raises(ConfigError) as caught:
        load_config(SpecdecConfig, path)
    assert str(caught.value).startswith(path + message)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("010", 10),
        ("0o10", 8),
        ("0x1F", 31),
        ("-010", -10),
        ("+7", 7),
        ("1:30", "1:30"),
        ("1:30.5", "1:30.5"),
        ("1_000", "1_000"),
        ("1_000.5", "1_000.5"),
        ("0b11", "0b11"),
        ("08", 8),
        ("1e-3", 0.001),
        ("1.", 1.0),
        (".5", 0.5),
        ("-.inf", -math.inf),
        ("inf", "inf"),
        ("no", "no"),
        ("Off", "Off"),
        ("y", "y"),
        ("TRUE", True),
        ("null", None),
        ("~", None),
        ("", None),
        ("none", "none"),
        ("2026-01-01", "2026-01-01"),
        ("=", "="),
        ("'010'", "010"),
    ],
)
def test_values_are_those_of_yaml_1_2(write, text, value):
    found = read_yaml(write(f"key: {text}\n"))["key"]
    assert found == value
    assert type(found) is type(value)


def test_yaml_surprises_reach_no_configuration(write):
    assert load_config(SpecdecConfig, write("seed: 010\n")).seed == 10
    assert load_config(SpecdecConfig, write("stop: no\n")).stop == ("no",)
    assert load_config(SpecdecConfig, write("base_model: 2026-01-01\n")).base_model == "2026-01-01"
    for text, message in (
        ("seed: 1:30", "seed: '1:30' is not allowed; must be an integer"),
        ("max_new_tokens: 1_000", "max_new_tokens: '1_000' is not allowed; must be an integer"),
        ("do_sample: yes", "do_sample: 'yes' is not allowed; must be true or false"),
    ):
        with pytest.raises(ConfigError) as caught:
            load_config(SpecdecConfig, write(text))
        assert message in str(caught.value)


def test_merge_keys_may_override(write):
    text = (
        "base: &base {seed: 1, tau: 0.1, p: 0.3}\n"
        "middle: &middle {<<: *base, seed: 2}\n"
        "top: {<<: *middle, tau: 0.2}\n"
        "both: {<<: [*middle, *base], p: 0.4}\n"
    )
    found = read_yaml(write(text))
    assert found["middle"] == {"seed": 2, "tau": 0.1, "p": 0.3}
    assert found["top"] == {"seed": 2, "tau": 0.2, "p": 0.3}
    assert found["both"] == {"seed": 2, "tau": 0.1, "p": 0.4}


@pytest.mark.parametrize(
    ("text", "seed"),
    [
        ("<<: [{seed: 3}, {seed: 5}]", 3),
        ("seed: 7\n<<: [{seed: 3}, {seed: 5}]", 7),
        ("<<: [{seed: 3}, {seed: 5}]\nseed: 7", 7),
        ("<<: [{p: 0.5}, {<<: {seed: 2}, p: 0.1}, {seed: 3}]", 2),
        ("<<: [{<<: [{seed: 1}, {seed: 2}]}, {seed: 3}]", 1),
        ("<<: {seed: 4}", 4),
    ],
)
def test_of_merged_mappings_the_earlier_wins(write, text, seed):
    assert load_config(SpecdecConfig, write(text)).seed == seed


@pytest.mark.parametrize("text", ["<<: 3", "seed: 1\n<<: [{seed: 2}, 3]", "<<: [[{seed: 1}]]"])
def test_what_is_no_mapping_cannot_be_merged(write, text):
    with pytest.raises(ConfigError, match=r"ya?ml:\d: is not valid YAML: << merges a mapping or"):
        read_yaml(write(text))


def test_merging_does_not_grow_with_every_mention(write):
    """Each mapping holds the one before twice: 2 to the 40th keys, if they were kept."""
    lines = ["k0: &k0 {seed: 1}"]
    lines += [f"k{n}: &k{n} {{<<: [*k{n - 1}, *k{n - 1}]}}" for n in range(1, 40)]
    assert read_yaml(write("\n".join(lines)))["k39"] == {"seed": 1}


def test_a_byte_order_mark_is_no_part_of_a_key(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xef\xbb\xbfseed: 3\n")
    assert read_yaml(path) == {"seed": 3}


def test_a_file_that_is_not_text(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"a: \xff\xfe")
    with pytest.raises(ConfigError, match="is not UTF-8 text"):
        read_yaml(path)


def test_a_bad_flag_is_named_as_the_user_wrote_it(write):
    path = write("max_draft: 2\n")
    with pytest.raises(ConfigError, match=r"^--K: 99 is not allowed; must be an integer from 0"):
        load_config(SpecdecConfig, path, {"K": 99}, names={"K": "--K"})
    with pytest.raises(ConfigError, match=r"^--tau: 2.0 is not allowed"):
        load_config(SpecdecConfig, path, {"tau": 2.0}, names={"tau": "--tau"})
    with pytest.raises(ConfigError, match=r"^max_draft: 99 is not allowed"):
        load_config(SpecdecConfig, None, {"max_draft": 99})
    with pytest.raises(ConfigError, match=r"^max_drfat: is not a key"):
        load_config(SpecdecConfig, path, {"max_drfat": 1})


def test_choices_of_flags_come_from_the_types():
    assert choices(SpecdecConfig, "controller") == ("fixed", "adaptive", "cost")
    assert choices(SpecdecConfig, "force_device") == ("cpu", "mps", "cuda")
    assert choices(BaselineConfig, "torch_dtype") == ("auto", "float32", "bfloat16", "float16")
