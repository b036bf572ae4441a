"""The plain Hugging Face runner, on the bundled model."""

import pytest
import torch

from inferlab import baseline
from inferlab.baseline import LocalBaselineRunner
from inferlab.config import ConfigError
from inferlab.errors import Interrupted

PROMPT = "def main("


@pytest.fixture(scope="module")
def runner():
    return LocalBaselineRunner(device="cpu")


def test_result_has_the_seeds_keys_and_ours(runner):
    result = runner.run(PROMPT, max_new_tokens=6)
    assert {"device", "latency_ms", "text", "prompt", "max_new_tokens"} <= set(result)
    assert (result["prompt"], result["max_new_tokens"], result["device"]) == (PROMPT, 6, "cpu")
    assert (result["model"], result["dtype"]) == ("inferlab/tiny", "float32")
    assert result["num_tokens"] == len(result["token_ids"]) <= 6
    assert result["latency_ms"] > 0
    assert result["tokens_per_second"] == pytest.approx(
        result["num_tokens"] / result["latency_ms"] * 1e3
    )


def test_text_is_prompt_and_completion(runner):
    result = runner.run(PROMPT, max_new_tokens=6, temperature=0)
    assert result["text"] == PROMPT + result["completion"]
    assert result["completion"] == runner.tokenizer.decode(result["token_ids"])


def test_greedy_is_generate(runner):
    ids = runner.tokenizer(PROMPT, return_tensors="pt")
    expected = runner.model.generate(**ids, max_new_tokens=12, do_sample=False)
    for options in ({"temperature": 0.0}, {"do_sample": False}):
        result = runner.run(PROMPT, max_new_tokens=12, **options)
        assert result["token_ids"] == expected[0, ids["input_ids"].shape[1] :].tolist()
        assert result["temperature"] == 0.0


def test_the_seed_decides_and_nothing_else(runner):
    options = {"max_new_tokens": 12, "temperature": 1.5}
    torch.manual_seed(1)
    first = runner.run(PROMPT, seed=5, **options)
    after = torch.rand(1)
    torch.manual_seed(1)
    assert torch.equal(after, torch.rand(1)), "the generator around it is left alone"
    assert runner.run(PROMPT, seed=5, **options)["token_ids"] == first["token_ids"]
    others = {tuple(runner.run(PROMPT, seed=s, **options)["token_ids"]) for s in range(4)}
    assert len(others) > 1


def test_defaults_are_the_configurations():
    runner = LocalBaselineRunner("configs/baseline.yaml", model_name="inferlab/tiny", seed=3)
    assert runner.config.max_new_tokens == 48
    assert runner.model_name == "inferlab/tiny"
    assert runner.config.seed == 3


@pytest.mark.parametrize("name", ["model", "model_name"])
def test_a_model_is_named_by_either_name(monkeypatch, name):
    class Asked(Exception):
        pass

    def load(model, **_):
        raise Asked(model)

    monkeypatch.setattr(baseline.loading, "load", load)
    for path in (None, "configs/baseline.yaml"):
        with pytest.raises(Asked, match=r"^X$"):
            LocalBaselineRunner(config_path=path, **{name: "X"})
    with pytest.raises(Asked, match=r"^X$"):
        LocalBaselineRunner(None, "X", model="X")
    with pytest.raises(ValueError, match="model and model_name are two names"):
        LocalBaselineRunner(None, "X", model="Y")


def test_a_temperature_beats_do_sample_false_of_the_configuration():
    runner = LocalBaselineRunner(do_sample=False, device="cpu")
    assert runner.run(PROMPT, 2)["temperature"] == 0.0
    assert runner.run(PROMPT, 2, temperature=0.5)["temperature"] == 0.5


def test_what_is_refused(runner):
    with pytest.raises(ValueError, match="prompt is empty"):
        runner.run("")
    with pytest.raises(ConfigError, match="max_new_tokens: 0 is not allowed"):
        runner.run(PROMPT, 0)
    with pytest.raises(ConfigError, match=r"temperature: -1\.0 is not allowed"):
        runner.run(PROMPT, temperature=-1.0)
    limit = runner.context_length
    with pytest.raises(ValueError, match=f"exceed the context of inferlab/tiny \\({limit} tokens"):
        runner.run(PROMPT, limit)
    with pytest.raises(ConfigError, match=r"max_token: is not a key; did you mean"):
        LocalBaselineRunner(max_token=3)
    with pytest.raises(FileNotFoundError, match="does not exist"):
        LocalBaselineRunner(model_name="./no/such/directory")


def test_ctrl_c_keeps_the_tokens_so_far(runner, monkeypatch):
    whole = runner.run(PROMPT, 12, temperature=0)["token_ids"]
    put = baseline._Collector.put

    def put_five(self, value):
        put(self, value)
        if len(self.token_ids) == 5:
            raise KeyboardInterrupt

    monkeypatch.setattr(baseline._Collector, "put", put_five)
    with pytest.raises(Interrupted) as caught:
        runner.run(PROMPT, 12, temperature=0, keep_partial=True)
    (result,) = caught.value.results
    assert result["token_ids"] == whole[:5]
    assert result["finish_reason"] == "interrupted"
    assert result["text"].startswith(PROMPT)
