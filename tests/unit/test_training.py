"""Training: the split, the tokenizer, exact resumption, safe checkpoints, the bundled pair."""

from __future__ import annotations

import argparse
import errno
import json
from pathlib import Path

import numpy as np
import pytest
import torch

transformers = pytest.importorskip("transformers")

from helpers.micro_training import micro_model, write_micro_corpus  # noqa: E402
from helpers.micro_training import micro_tokenizer as make_micro_tokenizer  # noqa: E402
from inferlab.cli import train  # noqa: E402
from inferlab.training import precision  # noqa: E402
from inferlab.training.material import corpus  # noqa: E402
from inferlab.training.material.windows import WindowSampler  # noqa: E402
from inferlab.training.target import checkpoint, optim  # noqa: E402
from inferlab.training.target.architectures import use_training_attention  # noqa: E402
from inferlab.training.target.loop import LoopConfig  # noqa: E402
from inferlab.training.target.pretrain import pretrain  # noqa: E402
from inferlab.training.target.tokenizer import train_tokenizer  # noqa: E402

ASSETS = Path(train.__file__).parents[1] / "assets"
BUNDLED = {"tiny": 6_000_000, "tiny-draft": 1_000_000}  # name: upper bound of parameters

SNIPPET = '''\
def area(width, height=2):
    """Area of a rectangle, in cm\u00b2 \u2014 \U0001f40d."""
\tif width < 0:\r
        raise ValueError(f"width is {width!r}")


    return width  *  height \x20\x20
    # trailing
'''
MICRO_LOOP = LoopConfig(steps=6, lr=1e-3, phases=((0.0, 16), (0.5, 32)), eval_every=2)


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small only lose time to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def micro_corpus(tmp_path_factory: pytest.TempPathFactory) -> corpus.Corpus:
    return write_micro_corpus(tmp_path_factory.mktemp("corpus"))


@pytest.fixture(scope="module")
def micro_tokenizer(micro_corpus):
    return make_micro_tokenizer(micro_corpus, SNIPPET)


# The corpus and its split.


def test_split_is_by_file_disjoint_and_stable():
    found = corpus.Corpus.of()
    train_files, heldout = set(found.train_files()), set(found.heldout_files())
    assert not train_files & heldout
    assert train_files | heldout == set(found.paths)
    assert found == corpus.Corpus.of()
    assert not any(corpus.is_test_file(path) for path in heldout)
    assert all(path.is_file() for path in corpus.heldout_files())


def test_split_depends_on_the_relative_path_alone():
    # Known answers: a change here would let the bundled models be tested on what they learned.
    assert corpus.path_hash("argparse.py") == pytest.approx(0.7861, abs=1e-4)
    assert not corpus.is_heldout("argparse.py")


def test_heldout_share():
    library = [path for path in corpus.Corpus.of().paths if not corpus.is_test_file(path)]
    share = sum(map(corpus.is_heldout, library)) / len(library)
    assert 0.02 < share < 0.09


def test_machine_specific_and_generated_files_are_skipped():
    paths = corpus.Corpus.of().paths
    assert not [path for path in paths if "site-packages" in path or "_sysconfigdata" in path]


@pytest.mark.parametrize(("number", "max_chars"), [(1, 240), (20, 240), (48, 120)])
def test_heldout_prompts(number, max_chars):
    prompts = corpus.heldout_prompts(number, max_chars=max_chars)
    assert prompts == corpus.heldout_prompts(number, max_chars=max_chars)
    assert len(set(prompts)) == number
    assert all(max_chars // 4 <= len(prompt) <= max_chars for prompt in prompts)
    assert not any(prompt.endswith("\n") for prompt in prompts)


@pytest.mark.parametrize("arguments", [{"num_prompts": 0}, {"max_chars": 3}])
def test_heldout_prompts_rejects(arguments):
    with pytest.raises(ValueError, match=next(iter(arguments))):
        corpus.heldout_prompts(**arguments)


def test_a_folder_has_texts_of_any_domain(tmp_path):
    for number in range(60):
        suffix = (".txt", ".md", ".rst", ".py")[number % 4]
        (tmp_path / f"text{number}{suffix}").write_text(f"Chapter {number}")
    (tmp_path / "picture.png").write_bytes(b"no text")
    found = corpus.Corpus.of(tmp_path)
    assert len(found.paths) == 60
    assert found.read("text0.txt") == "Chapter 0"


def test_empty_corpus_names_flag_and_remedy(tmp_path):
    with pytest.raises(ValueError, match=r"--corpus .*name a folder"):
        corpus.Corpus.of(tmp_path)


# The tokenizer.


@pytest.mark.parametrize(
    "text", [SNIPPET, "", "\n", "    ", "\n\n        x", " x\t\ty \r\n", "a  b   c", "é\u0300中文"]
)
def test_tokenizer_roundtrip(micro_tokenizer, text):
    ids = micro_tokenizer(text).input_ids
    assert micro_tokenizer.decode(ids) == text
    assert micro_tokenizer.eos_token_id not in ids


def test_tokenizer_special_token(micro_tokenizer):
    ids = {micro_tokenizer.bos_token_id, micro_tokenizer.eos_token_id, micro_tokenizer.pad_token_id}
    assert ids == {0}
    assert len(micro_tokenizer) == 300


def test_tokenizer_vocabulary_too_large():
    with pytest.raises(ValueError, match=r"--corpus.*--vocab-size"):
        train_tokenizer(["tiny"], vocab_size=4096, max_length=64)


# Windows, optimizer, attention.


def test_windows_cover_an_epoch_once():
    sampler = WindowSampler(lambda epoch: [np.arange(97, dtype=np.int32) + 100 * epoch], seed=3)
    rows = torch.cat([sampler.batch(16 * i, num_windows=2, length=8) for i in range(6)])
    assert rows.shape == (12, 9)
    assert (rows.diff(dim=1) == 1).all()
    assert rows[:, 0].unique().numel() == 12
    assert sampler.batch(97, num_windows=1, length=8).min() >= 100  # the next epoch


def test_orthogonalize_evens_out_singular_values():
    torch.manual_seed(0)
    for shape in [(3, 20, 50), (2, 50, 20)]:
        values = torch.linalg.svdvals(optim.orthogonalize(torch.randn(shape)))
        assert values.min() > 0.3
        assert values.max() < 1.4


@pytest.mark.parametrize(
    ("flags", "device", "expected"),
    [
        ({"avx2", "fma"}, "cpu", torch.float32),
        ({"avx512f", "avx512_bf16"}, "cpu", torch.bfloat16),
        ({"asimd", "bf16"}, "cpu", torch.bfloat16),
        ({"avx2"}, "cuda", torch.bfloat16),
    ],
)
def test_bf16_is_trained_in_where_the_processor_multiplies_it(monkeypatch, flags, device, expected):
    monkeypatch.setattr(precision, "cpu_flags", lambda: flags)
    assert precision.training_dtype(torch.device(device)) == expected


def test_learning_rate_rises_stays_and_falls():
    rates = [
        optim.learning_rate(p, peak=1.0, warmup=0.1, cooldown=0.5) for p in (0, 0.05, 0.3, 0.75, 1)
    ]
    assert rates == pytest.approx([0.01, 0.5, 1.0, 0.5, 0.0])


@pytest.mark.parametrize("length", [1, 19, 64])
def test_training_attention_matches_transformers(length):
    model = micro_model(num_attention_heads=4, num_key_value_heads=2)
    tokens = torch.randint(300, (2, length))
    with torch.no_grad():
        expected = model(tokens).logits
        use_training_attention(model)
        torch.testing.assert_close(model(tokens).logits, expected, rtol=1e-4, atol=1e-5)


# Resumption and checkpoints.


def micro_pretrain(corpus_, tokenizer, folder, **options):
    model = micro_model().bfloat16()
    result = pretrain(
        model,
        corpus_,
        tokenizer,
        MICRO_LOOP,
        seed=1,
        checkpoint=folder / "checkpoint.pt",
        use_compiler=False,
        tokens_per_step=64,
        **options,
    )
    return model, result


def test_resumed_pretraining_is_bit_identical(micro_corpus, micro_tokenizer, tmp_path):
    (tmp_path / "whole").mkdir()
    whole, expected = micro_pretrain(micro_corpus, micro_tokenizer, tmp_path / "whole")
    micro_pretrain(micro_corpus, micro_tokenizer, tmp_path, stop_after=3)
    resumed, result = micro_pretrain(micro_corpus, micro_tokenizer, tmp_path, resume=True)
    assert len(result.losses) == 6
    assert result.losses == expected.losses
    for name, weights in whole.state_dict().items():
        assert torch.equal(weights, resumed.state_dict()[name]), name


@pytest.mark.parametrize("failing", ["torch.save", "os.fsync", "os.replace"])
def test_checkpoint_survives_a_full_disk(tmp_path, monkeypatch, failing):
    path = tmp_path / "checkpoint.pt"
    checkpoint.save_checkpoint(path, {"step": 1})

    def full_disk(*args, **kwargs):
        if failing == "torch.save":
            args[1].write(b"half a checkp")
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(failing, full_disk)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save_checkpoint(path, {"step": 2})
    monkeypatch.undo()
    assert checkpoint.load_checkpoint(path) == {"step": 1}
    assert list(tmp_path.iterdir()) == [path]


def test_broken_checkpoint_is_reported(tmp_path):
    path = tmp_path / "checkpoint.pt"
    with pytest.raises(ValueError, match=r"--resume: no checkpoint"):
        checkpoint.load_checkpoint(path)
    path.write_bytes(b"half a checkp")
    with pytest.raises(ValueError, match=r"--resume: .*not a readable checkpoint"):
        checkpoint.load_checkpoint(path)


# The command.


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return train.run(parser.parse_args(arguments))


@pytest.mark.parametrize(
    ("arguments", "complaint"),
    [
        (("target", "--steps", "0"), "--steps is 0"),
        (("target", "--minutes", "-1"), "--minutes is -1"),
        (("target", "--lr", "0"), "--lr is 0"),
        (("target", "--threads", "0"), "--threads is 0"),
        (("target", "--corpus", "nowhere"), "--corpus nowhere"),
    ],
)
def test_bad_arguments_are_named(tmp_path, monkeypatch, capsys, arguments, complaint):
    monkeypatch.chdir(tmp_path)
    assert run_command(*arguments, "--output", "out") == 2
    assert complaint in capsys.readouterr().err


def test_nothing_to_resume(tmp_path, micro_corpus, capsys):
    assert run_command("target", "--output", str(tmp_path), "--resume", "--no-compile") == 2
    assert "--resume: no checkpoint" in capsys.readouterr().err


# The bundled pair.


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_model_loads_and_writes(name):
    folder = ASSETS / name
    model = transformers.AutoModelForCausalLM.from_pretrained(folder)
    tokenizer = transformers.AutoTokenizer.from_pretrained(folder)
    assert model.dtype == torch.bfloat16
    assert model.num_parameters() < BUNDLED[name]
    assert model.config.vocab_size == len(tokenizer) == 4096
    assert tokenizer.decode(tokenizer(SNIPPET).input_ids) == SNIPPET
    ids = tokenizer("import os\n\n\ndef main():", return_tensors="pt").input_ids
    out = model.generate(ids, max_new_tokens=4, min_new_tokens=4, do_sample=False)
    assert out.shape[1] == ids.shape[1] + 4


def test_bundled_pair_shares_a_tokenizer_and_is_small():
    files = [path for name in BUNDLED for path in (ASSETS / name).iterdir()]
    assert sum(path.stat().st_size for path in files) <= 16 * 2**20
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (ASSETS / "tiny" / name).read_bytes() == (ASSETS / "tiny-draft" / name).read_bytes()


@pytest.mark.parametrize("name", BUNDLED)
def test_bundled_report_is_complete(name):
    report = json.loads((ASSETS / name / "training.json").read_text(encoding="utf-8"))
    card = (ASSETS / name / "README.md").read_text(encoding="utf-8")
    assert f"{report['heldout_perplexity']:.2f}" in card
    assert "testing and benchmarking only" in card
