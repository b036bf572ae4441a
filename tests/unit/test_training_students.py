"""Training of drafts, Medusa heads and EAGLE heads: data, features, losses, whole tiny runs."""

from __future__ import annotations

import argparse
import errno
import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import load_file

from helpers.micro_training import (
    VOCAB,
    micro_model,
    micro_tokenizer,
    write_micro_corpus,
)
from inferlab.cli import train
from inferlab.models import HFModel
from inferlab.models.draft_heads import EagleHead, eagle_config, load_eagle, load_medusa
from inferlab.specdec.calibration import measured_acceptance
from inferlab.training import precision
from inferlab.training.heads import losses, students, teach, trainer
from inferlab.training.heads.unroll import unroll
from inferlab.training.material import features, sources, writing
from inferlab.training.measure import curve
from inferlab.training.measure.acceptance import ChainCounter, Trial
from inferlab.training.target.architectures import causal_bias
from inferlab.training.target.tokenizer import train_tokenizer

MICRO_RUN = [
    *("--steps", "6", "--windows", "24", "--window", "16", "--batch-tokens", "64"),
    *("--eval-prompts", "2", "--no-compile", "--threads", "1", "--device", "cpu"),
]
KINDS = {
    "draft": [],
    "medusa": ["--heads", "2", "--layers", "2"],
    "medusa-root": ["--heads", "2", "--root-token"],
    "eagle": ["--features", "1", "3", "-1", "--depth", "2"],
    "eagle-1": ["--version", "1"],
}


@pytest.fixture(autouse=True, scope="module")
def _one_thread():
    """Models this small only lose time to threads."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def world(tmp_path_factory):
    """A folder with a corpus and a target."""
    root = tmp_path_factory.mktemp("world")
    (root / "corpus").mkdir()
    tokenizer = micro_tokenizer(write_micro_corpus(root / "corpus"))
    tokenizer.save_pretrained(root / "target")
    micro_model(num_hidden_layers=8).bfloat16().save_pretrained(root / "target")
    return root


@pytest.fixture(scope="module")
def tokenizer(world):
    import transformers

    return transformers.AutoTokenizer.from_pretrained(world / "target")


@pytest.fixture(scope="module")
def target(tokenizer):
    return HFModel(micro_model(num_hidden_layers=8), tokenizer, name="t")


@pytest.fixture
def short_runs(monkeypatch):
    """Runs measure and save within their few steps."""
    original = teach.RunConfig.__init__

    def init(self, **options):
        defaults = {"save_every": 2, "eval_every": 3, "log_every": 1, "new_tokens": 40, "depth": 3}
        original(self, **{**defaults, **options})

    monkeypatch.setattr(teach.RunConfig, "__init__", init)
    # Takes longer than all the rest; one test draws.
    monkeypatch.setattr(teach, "draw_curve", lambda file, history, title: None)


def run_command(*arguments: str) -> int:
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    return train.run(parser.parse_args(arguments))


def command(kind: str, world: Path, output: Path, *more: str) -> list[str]:
    return [
        *(kind.partition("-")[0], "--base-model", str(world / "target"), "--output", str(output)),
        *("--corpus", str(world / "corpus"), *MICRO_RUN, *KINDS[kind], *more),
    ]


# Files of data.


def file_of(tmp_path, name, content):
    path = tmp_path / name
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return path


LINES = "".join(f"def g{i}(x):\n    return {i}\n" for i in range(3000))


def test_text_is_split_apart(tmp_path, tokenizer):
    source = sources.file_source(file_of(tmp_path, "a.txt", LINES), tokenizer, heldout_prompts=3)
    taught = tokenizer.decode(source.stream())
    assert len(source.heldout) == 3
    assert len(taught) > 0.9 * len(LINES)
    for prompt in source.heldout:
        assert tokenizer.decode(prompt) in LINES
        assert tokenizer.decode(prompt) not in taught


@pytest.mark.parametrize(
    ("entry", "said"),
    [
        ({"prompt": "ask {}"}, "ask {}"),
        ({"turns": ["first {}", "second"], "question_id": 7}, "first {}"),
        (
            {
                "messages": [
                    {"role": "user", "content": "one {}"},
                    {"role": "assistant", "content": "two"},
                    {"role": "user", "content": "three"},
                    {"role": "assistant", "content": "four"},
                ]
            },
            "one {}\ntwo\nthree",
        ),
    ],
)
def test_prompts_are_asked(tmp_path, tokenizer, entry, said):
    lines = "\n".join(json.dumps(entry).replace("{}", str(i)) for i in range(40)) + "\n\n"
    source = sources.file_source(file_of(tmp_path, "a.jsonl", lines), tokenizer, heldout_prompts=9)
    asked = [tokenizer.decode(p) for p in source.prompts]
    held = [tokenizer.decode(p) for p in source.heldout]
    assert len(held) == 2
    assert sorted(asked + held) == sorted(said.replace("{}", str(i)) for i in range(40))
    assert not source.documents


def test_texts_and_prompts_mix(tmp_path, tokenizer, target):
    lines = [json.dumps({"text": f"def a{i}(x):\n    return x\n" * 20}) for i in range(40)]
    lines += [json.dumps({"prompt": f"def b{i}(x):"}) for i in range(40)]
    path = file_of(tmp_path, "a.jsonl", "\n".join(lines))
    source = sources.file_source(path, tokenizer, heldout_prompts=9)
    config = writing.MaterialConfig(
        generated_windows=6, corpus_windows=5, long_windows=2, window_length=16, long_length=32,
        min_prompt=2, max_prompt=8, generation_batch=3,
    )  # fmt: skip
    kinds = writing.make_windows(target, source, config, seed=0)
    assert [tuple(kind.shape) for kind in kinds] == [(6, 17), (5, 17), (2, 33)]
    again = writing.make_windows(target, source, config, seed=0)
    assert all(torch.equal(a, b) for a, b in zip(kinds, again, strict=True))


def test_chat_template_is_used(tmp_path, world):
    import transformers

    tokenizer = transformers.AutoTokenizer.from_pretrained(world / "target")
    tokenizer.chat_template = "{% for m in messages %}<{{ m.content }}>{% endfor %}:"
    path = file_of(tmp_path, "a.jsonl", '{"turns": ["x"]}\n{"turns": ["y"]}\n')
    source = sources.file_source(path, tokenizer, heldout_prompts=9)
    said = {tokenizer.decode(p) for p in [*source.prompts, *source.heldout]}
    assert said == {"<x>:", "<y>:"}


@pytest.mark.parametrize(
    ("name", "content", "complaint"),
    [
        ("a.txt", "", "the file is empty"),
        ("a.txt", " \n ", "the file is empty"),
        ("a.txt", b"\xff\xfe\x00 text", r"not UTF-8 text \(byte 0\)"),
        ("a.txt", "a\0b", "zero bytes"),
        ("a.txt", "too little", "1 texts or prompts are too few"),
        ("a.csv", "a,b", "ends in .txt or .jsonl"),
        ("a.jsonl", '{"text": "a"}\n{"text": \n', "line 2: broken JSON"),
        ("a.jsonl", '{"text": "a"}\n\n{"txt": "b"}\n', "line 3: expected an object with 'text'"),
        ("a.jsonl", '["text"]\n', "line 1: expected an object"),
        ("a.jsonl", '{"turns": []}\n', "line 1: expected an object"),
        ("a.jsonl", '{"messages": ["hello"]}\n', "line 1: expected an object"),
    ],
)
def test_bad_data_is_named(tmp_path, tokenizer, name, content, complaint):
    with pytest.raises(ValueError, match=f"--data .*{name}.*{complaint}"):
        sources.file_source(file_of(tmp_path, name, content), tokenizer, heldout_prompts=1)


def test_missing_data_is_named(tmp_path, tokenizer):
    with pytest.raises(ValueError, match=r"--data .*nowhere.txt: no such file"):
        sources.file_source(tmp_path / "nowhere.txt", tokenizer, heldout_prompts=1)


@pytest.mark.parametrize("category", ["writing", "code"])
def test_prompt_sets_are_read(tmp_path, tokenizer, category):
    """As Spec-Bench and its HumanEval part have them."""
    body = 'def f(l: list, t: int):\n    """True."""\n' if category == "code" else "A letter.\n"
    lines = [
        json.dumps(
            {"question_id": i, "category": category, "turns": [f"{i}: {body * 9}", "Again."]}
        )
        for i in range(164)
    ]
    path = file_of(tmp_path, "questions.jsonl", "\n".join(lines))
    source = sources.file_source(path, tokenizer, heldout_prompts=5)
    assert len(source.prompts) > 50
    assert 1 < len(source.heldout) <= 5


# Features.


def test_features_are_the_hidden_states(target):
    tokens = torch.randint(VOCAB, (2, 10))
    found = features.read_features(target, tokens, (0, 5, -1))
    with target.plain() as model:
        states = model(tokens[:, :-1], output_hidden_states=True).hidden_states
    expected = torch.cat([states[1], states[6], states[-1]], dim=-1)
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-3)
    assert not found.is_inference()  # it may be trained on


@pytest.mark.parametrize("family", ["gpt2", "opt", "qwen3"])
def test_features_of_other_families(family):
    from helpers.tiny_models import tiny_model

    wrapped = HFModel(tiny_model(family))
    tokens = torch.randint(100, (1, 8))
    found = features.read_features(wrapped, tokens, (1,))
    with wrapped.plain() as model:
        expected = model(tokens[:, :-1], output_hidden_states=True).hidden_states[2]
    torch.testing.assert_close(found.float(), expected, rtol=1e-2, atol=1e-3)


def test_cached_batches_hold_every_window_once(tmp_path, target, monkeypatch):
    monkeypatch.setattr(features, "SHARD_TOKENS", 64)
    monkeypatch.setattr(features, "READ_TOKENS", 32)
    kinds = [torch.arange(12 * 17).view(12, 17).int() % VOCAB, torch.randint(VOCAB, (4, 33)).int()]
    layers = (2, -1)
    features.write_cache(tmp_path / "cache", target, kinds, layers, {"seed": 1})
    assert len(list((tmp_path / "cache").glob("shard-*.safetensors"))) == 5
    batches = features.Batches(tmp_path / "cache", tokens_per_batch=64, seed=0)
    rows = [batches[index] for index in range(len(batches))]
    assert sorted(tuple(row["tokens"].shape) for row in rows) == [(2, 33)] * 2 + [(4, 17)] * 3
    seen = torch.cat([row["tokens"] for row in rows if row["tokens"].shape[1] == 17])
    assert torch.equal(seen[seen[:, 0].argsort()], kinds[0][kinds[0][:, 0].argsort()].long())
    for row in rows:
        assert torch.equal(row["features"], features.read_features(target, row["tokens"], layers))
    bare = features.TokenBatches(kinds, tokens_per_batch=64, seed=0)
    assert len(bare) == len(batches)
    assert all(torch.equal(bare[i]["tokens"], rows[i]["tokens"]) for i in range(len(bare)))


def test_a_cache_is_used_for_the_very_same_run_only(tmp_path, target):
    windows = torch.randint(VOCAB, (3, 17)).int()
    features.write_cache(tmp_path, target, [windows], (-1,), {"seed": 1, "data": "a"})
    assert features.cache_matches(tmp_path, {"seed": 1, "data": "a"})
    assert not features.cache_matches(tmp_path, {"seed": 1, "data": "b"})
    (tmp_path / "index.json").unlink()
    assert not features.cache_matches(tmp_path, {"seed": 1, "data": "a"})


def test_a_full_disk_leaves_no_half_cache(tmp_path, target, monkeypatch):
    def full_disk(*args, **kwargs):
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(features, "save_file", full_disk)
    windows = torch.randint(VOCAB, (3, 17)).int()
    with pytest.raises(OSError, match=r"No space left.*free some space.*--no-cache"):
        features.write_cache(tmp_path / "cache", target, [windows], (-1,), {})
    assert not (tmp_path / "cache").exists()


# Unrolled heads and losses.


@pytest.mark.parametrize("version", [1, 3])
def test_unrolled_levels_are_drafts_from_every_position(version):
    """Against drafting from each position alone, token after token, with plain forwards."""
    torch.manual_seed(version)
    target = micro_model(num_hidden_layers=8, num_attention_heads=4, num_key_value_heads=2)
    head = EagleHead(eagle_config(target.config), version, target)
    tokens = torch.randint(VOCAB, (1, 9))
    feature = torch.randn(1, 8, head.feature_size)
    with torch.no_grad():
        levels = list(unroll(head, tokens, feature, causal_bias(8), 3))
        embeds = head.embed(tokens[:, 1:])
        first = head(embeds, feature)
        torch.testing.assert_close(levels[0], first, rtol=1e-4, atol=1e-5)
        for position in range(6):
            # What is fed: the target's features up to the position, then the head's own outputs.
            # EAGLE-3's are told apart by their width, so they enter the layer fused.
            known = feature if version == 1 else head.fc(feature)
            fed = known[:, : position + 1]
            hidden = first[:, position : position + 1]
            for level in (1, 2):
                fed = torch.cat([fed, hidden], dim=1)
                hidden = head(embeds[:, : fed.shape[1]], fed)[:, -1:]
                torch.testing.assert_close(
                    levels[level][:, position], hidden[:, 0], rtol=1e-4, atol=1e-5
                )


def test_agreement_loss_has_the_gradient_of_the_divergence():
    teacher, student = torch.randn(5, 11), torch.randn(5, 11, requires_grad=True)
    losses.agreement_loss(student, losses.targets(teacher, 0.3)).backward()
    got = student.grad.clone()
    student.grad = None
    log_q = student.log_softmax(-1)
    divergence = torch.nn.functional.kl_div(log_q, teacher.softmax(-1), reduction="batchmean")
    first = torch.nn.functional.cross_entropy(student, teacher.argmax(-1))
    (0.7 * divergence + 0.3 * first).backward()
    torch.testing.assert_close(got, student.grad, rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("rows", [1, 128, 300])
def test_loss_in_blocks_is_that_of_whole_logits(rows, frozen):
    states = torch.randn(rows, 16, requires_grad=True)
    weight = torch.randn(50, 16, requires_grad=not frozen)
    target = losses.targets(torch.randn(rows, 50), 0.3)
    inputs = [x for x in (states, weight) if x.requires_grad]
    whole = losses.agreement_loss(states @ weight.T, target)
    in_blocks = losses.linear_agreement_loss(states, weight, target)
    torch.testing.assert_close(in_blocks, whole)
    wanted = torch.autograd.grad(3 * whole, inputs)
    got = torch.autograd.grad(3 * in_blocks, inputs)
    torch.testing.assert_close(got, wanted, rtol=1e-4, atol=1e-6)


def guesses_of(student, tokens, feats):
    """Logits [positions, of each beginning, V]: column i of row r is about token r + 2 + i."""
    module = student.module
    if student.mode == "medusa":
        return module(feats[0, :-1, -32:], tokens[0, 1:-1])
    if student.mode == "vanilla":
        return module(tokens[:, :-1]).logits[0, 1:, None]
    levels = unroll(
        module, tokens, feats[..., : module.feature_size], causal_bias(12), student.positions
    )
    return torch.stack([module.logits(hidden[0, :-1]) for hidden in levels], dim=1)


@pytest.mark.parametrize("kind", ["medusa", "medusa-root", "eagle3", "eagle1", "draft"])
def test_losses_are_right_about_their_positions(kind, target, tokenizer):
    """Each position's loss is the cross-entropy of the guess that drafting makes there."""
    torch.manual_seed(3)
    student = {
        "medusa": lambda: students.medusa_student(target, num_heads=3, argmax_weight=0.0),
        "medusa-root": lambda: students.medusa_student(
            target, num_heads=2, root_token=True, argmax_weight=0.0
        ),
        "eagle3": lambda: students.eagle_student(
            target, feature_layers=(1, 3, -1), steps=3, argmax_weight=0.0
        ),
        "eagle1": lambda: students.eagle_student(target, version=1),
        "draft": lambda: students.draft_student(micro_model(7), tokenizer, argmax_weight=0.0),
    }[kind]()
    student.module.float()
    if kind.startswith("medusa"):
        for parameter in student.module.parameters():
            torch.nn.init.normal_(parameter, std=0.1)
    tokens = torch.randint(VOCAB, (1, 13))
    feats = features.read_features(target, tokens, student.feature_layers).float()
    lm_head = target.model.lm_head.weight.detach()
    with torch.no_grad():
        got = student.loss(student.module, tokens, feats, lm_head=lm_head)
        guesses = guesses_of(student, tokens, feats)
    if kind == "eagle1":  # two losses in one, with noise: only that it is one number
        assert got.shape == (1,)
        assert got.isfinite().all()
        return
    teacher = (feats[0, :, -lm_head.shape[1] :] @ lm_head.T).softmax(-1)
    assert got.shape == (student.positions,)
    for position in range(student.positions):
        rows = teacher[1 + position :]
        log_q = guesses[: rows.shape[0], position].log_softmax(-1)
        per_row = -(rows[: log_q.shape[0]] * log_q).sum(-1)
        if kind == "draft":
            everything = student.module(tokens[:, :-1]).logits[0].log_softmax(-1)
            per_row = -(teacher * everything).sum(-1)
        torch.testing.assert_close(got[position], per_row.mean(), rtol=1e-3, atol=1e-4)


# Acceptance.


@pytest.mark.parametrize("temperature", [0.0, 0.8])
def test_a_model_is_its_own_best_draft(world, temperature):
    target = HFModel.load(world / "target", device="cpu", dtype="float32")
    prompts = [[5, 6, number] for number in range(6)]
    trial = Trial(
        target, "vanilla", world / "target", prompts, new_tokens=21, temperature=temperature
    )
    found = trial.chains(4)
    assert found.by_position == (1.0,) * 4
    # The first step drafts nothing, four steps keep all they draft.
    assert found.length == trial.static(trial.rates(4, 8), levels=4, nodes=8) == 21 / 5


def test_a_position_is_judged_where_those_before_it_were_right():
    counter = ChainCounter(3)
    seen = [((0, 0, 0), 3), ((0,), 3), ((), 3), ((0,), 1)]  # the last chain is cut short
    accepted, depths = zip(*seen, strict=True)
    counter.observe(SimpleNamespace(accepted=accepted, depths=depths))
    assert counter.shares == (3 / 4, 1 / 2, 1.0)


def test_a_trial_keeps_within_the_context(world):
    target = HFModel.load(world / "target", device="cpu", dtype="float32")
    trial = Trial(target, "vanilla", world / "target", [[5] * 250, [6]], new_tokens=999)
    assert trial.chains(2).length == pytest.approx(2.3, abs=0.5)


def test_an_untrained_head_is_tried(target, tmp_path):
    student = students.eagle_student(target, feature_layers=(1, 3, -1))
    student.save(tmp_path)
    trial = Trial(target, student.mode, tmp_path, [[5, 6, 7], [9, 4]], new_tokens=40)
    assert len(trial.chains(3).by_position) == 3
    rates = trial.rates(3, 8)
    for length in (trial.static(rates, levels=3, nodes=8), trial.grown(levels=3, nodes=8)):
        assert 1.0 <= length <= 4.0


# Whole runs.


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("flags", [{"avx2"}, {"avx512_bf16"}], ids=["fp32", "bf16"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_leaves_a_loadable_student(world, tmp_path, capsys, monkeypatch, kind, flags):
    monkeypatch.setattr(precision, "cpu_flags", lambda: flags)
    if kind == "medusa":
        monkeypatch.setattr(teach, "draw_curve", curve.draw_curve)
    assert run_command(*command(kind, world, tmp_path)) == 0
    out = capsys.readouterr().out
    assert "step 3: held-out acceptance by position" in out
    report = json.loads((tmp_path / "training.json").read_text())
    assert [entry["temperature"] for entry in report["acceptance"]] == [0.0, 0.8]
    assert report["steps"] == 6
    assert report["command"].startswith(f"inferlab train {kind.partition('-')[0]} --base-model")
    assert "--steps 6" in report["command"]
    assert report["command"] in (tmp_path / "README.md").read_text()
    if kind != "draft":  # whose chains hold so long that these texts have few steps
        assert measured_acceptance(str(tmp_path)), "who drafts with it knows what to expect"
        assert json.loads((tmp_path / "acceptance.json").read_text())["temperature"] == 0.0
    if kind == "medusa":
        assert (tmp_path / "curve.png").read_bytes().startswith(b"\x89PNG")
    base = micro_model(num_hidden_layers=8).bfloat16()
    if kind == "draft":
        import transformers

        loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path)
        assert loaded.dtype == torch.bfloat16
        assert transformers.AutoTokenizer.from_pretrained(tmp_path).get_vocab()
    elif kind.startswith("medusa"):
        heads = load_medusa(tmp_path, base)
        assert (heads.num_heads, heads.num_layers) == (2, 2 if kind == "medusa" else 1)
        assert heads.reads_token == (kind == "medusa-root")
    else:
        head = load_eagle(tmp_path, base)
        assert head.version == (1 if kind == "eagle-1" else 3)
        assert head.feature_layers == ((-1,) if kind == "eagle-1" else (1, 3, -1))


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize("kind", ["draft", "medusa", "eagle"])
def test_training_teaches(world, tmp_path, monkeypatch, kind):
    monkeypatch.setattr(teach.Watch, "on_step_end", lambda self, args, state, control, **kw: None)
    assert run_command(*command(kind, world, tmp_path, "--lr", "0.02", "--steps", "30")) == 0
    state = json.loads((tmp_path / "checkpoint-30" / "trainer_state.json").read_text())
    history = [entry["loss"] for entry in state["log_history"] if "loss" in entry]
    assert sum(history[-5:]) < 0.97 * sum(history[:5])


def weights_of(folder: Path) -> dict[str, torch.Tensor]:
    return load_file(next(folder.glob("*.safetensors")))


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize(("kind", "cached"), [*((kind, True) for kind in KINDS), ("eagle", False)])
def test_a_resumed_run_equals_an_uninterrupted_one(world, tmp_path, monkeypatch, kind, cached):
    more = ["--accumulate", "2"] + ([] if cached else ["--no-cache"])
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    assert run_command(*command(kind, world, whole, *more)) == 0
    with monkeypatch.context() as patch:
        original = trainer.DraftTrainer.compute_loss
        calls = []

        def interrupted(self, *args, **kwargs):
            calls.append(1)
            if len(calls) == 10:  # in step 5 of 6; the last checkpoint is of step 4
                raise KeyboardInterrupt
            return original(self, *args, **kwargs)

        patch.setattr(trainer.DraftTrainer, "compute_loss", interrupted)
        with pytest.raises(KeyboardInterrupt):
            run_command(*command(kind, world, parts, *more))
    assert trainer.last_checkpoint(parts).name == "checkpoint-4"
    assert run_command(*command(kind, world, parts, "--resume", *more)) == 0
    expected, got = weights_of(whole), weights_of(parts)
    for name, tensor in expected.items():
        assert torch.equal(tensor, got[name]), name


@pytest.mark.usefixtures("short_runs")
def test_runs_share_a_cache(world, tmp_path, monkeypatch):
    cache = str(tmp_path / "cache")
    assert run_command(*command("medusa", world, tmp_path / "a", "--cache", cache)) == 0
    for name in ("make_windows", "write_cache"):
        monkeypatch.setattr(teach, name, lambda *args, **kwargs: pytest.fail("made again"))
    assert run_command(*command("draft", world, tmp_path / "b", "--cache", cache)) == 0


@pytest.mark.usefixtures("short_runs")
def test_a_full_disk_leaves_the_last_checkpoint_intact(world, tmp_path, monkeypatch, capsys):
    original = torch.save

    def full_disk(content, file, *args, **kwargs):
        if "checkpoint-4" in str(file):
            Path(file).write_bytes(b"half an optim")
            raise RuntimeError("[enforce fail at inline_container.cc] . PytorchStreamWriter failed")
        return original(content, file, *args, **kwargs)

    with monkeypatch.context() as patch:
        patch.setattr(torch, "save", full_disk)
        assert run_command(*command("medusa", world, tmp_path)) == 2
    message = capsys.readouterr().err
    assert "checkpoint-4: checkpoint not written" in message
    assert "--resume" in message
    assert not (tmp_path / "checkpoint-4").exists()
    assert trainer.last_checkpoint(tmp_path).name == "checkpoint-2"
    assert run_command(*command("medusa", world, tmp_path, "--resume")) == 0
    assert json.loads((tmp_path / "training.json").read_text())["steps"] == 6


def test_more_heads_and_blocks_start_as_the_earlier_ones(target, tmp_path):
    first = students.medusa_student(target, num_heads=2, num_layers=1)
    for parameter in first.module.parameters():
        torch.nn.init.normal_(parameter, std=0.1)
    first.module.bfloat16()  # as it is saved, on every machine
    first.save(tmp_path)
    common = {"init_from": str(tmp_path)}
    hidden = torch.randn(5, 32).bfloat16()
    same = students.medusa_student(target, **common).module.bfloat16()
    assert torch.equal(same(hidden), first.module(hidden))
    more = students.medusa_student(target, num_heads=3, num_layers=4, **common)
    assert torch.equal(more.module.bfloat16()(hidden)[:, :2], first.module(hidden))
    assert all(parameter.requires_grad for parameter in more.module.parameters())
    more.save(tmp_path)
    with pytest.raises(ValueError, match=r"--layers is 1, .* have 4 blocks"):
        students.medusa_student(target, num_layers=1, **common)


def test_eagle_starts_from_an_earlier_head(target, tmp_path):
    first = students.eagle_student(target, feature_layers=(1, 3, -1))
    first.save(tmp_path)
    again = students.eagle_student(target, init_from=str(tmp_path))
    assert again.feature_layers == (1, 3, -1)
    for name, weights in again.module.state_dict().items():
        saved = first.module.state_dict()[name].bfloat16()
        assert torch.equal(weights.bfloat16(), saved), name
    assert all(parameter.requires_grad for parameter in again.module.parameters())


def test_what_an_earlier_head_is_can_not_be_asked_for(target):
    for options, flags in (
        ({"version": 3}, "--version: not with --init-from x"),
        ({"version": 1, "feature_layers": (1, 3, -1)}, "--version and --features: not with"),
    ):
        with pytest.raises(ValueError, match=flags):
            students.eagle_student(target, init_from="x", **options)
    with pytest.raises(ValueError, match="--tied: not with --init-from x"):
        students.medusa_student(target, init_from="x", tied=True)


# What goes wrong.


@pytest.mark.parametrize(
    ("kind", "more", "complaint"),
    [
        ("medusa", ["--steps", "0"], "--steps is 0"),
        ("medusa", ["--minutes", "0"], "--minutes is 0"),
        ("medusa", ["--lr", "-1"], "--lr is -1"),
        ("medusa", ["--accumulate", "0"], "--accumulate is 0"),
        ("medusa", ["--batch-tokens", "0"], "--batch-tokens is 0"),
        ("medusa", ["--windows", "0"], "--windows is 0"),
        ("medusa", ["--heads", "0"], "--heads is 0"),
        ("medusa", ["--eval-prompts", "0"], "--eval-prompts is 0"),
        ("medusa", ["--threads", "0"], "--threads is 0"),
        ("medusa", ["--text-windows", "-1"], "--text-windows is -1"),
        ("medusa", ["--window", "512"], "--window is 512, the target reads at most 255 tokens"),
        ("medusa", ["--resume"], "--resume: no checkpoint in"),
        ("medusa", ["--base-model", "./nowhere"], "--base-model ./nowhere"),
        ("medusa", ["--corpus", "nowhere"], "--corpus nowhere"),
        ("medusa", ["--data", "a.txt"], "not with --data a.txt"),
        ("medusa", ["--init-from", "./nowhere"], "'./nowhere' does not exist"),
        ("medusa", ["--batch-tokens", "9999"], "too little for one batch of 9999 tokens"),
        ("eagle", ["--depth", "0"], "--depth is 0"),
        ("eagle", ["--features", "0", "8", "-1"], "--features: 8 is no layer of 0 to 7"),
        ("draft", ["--init-from", "./nowhere"], "--init-from ./nowhere"),
    ],
)
def test_bad_arguments_are_named(world, tmp_path, monkeypatch, capsys, kind, more, complaint):
    monkeypatch.chdir(tmp_path)
    assert run_command(*command(kind, world, tmp_path / "out", *more)) == 2
    assert complaint in capsys.readouterr().err


def test_base_model_is_required(capsys):
    with pytest.raises(SystemExit):
        run_command("eagle", "--output", "out")
    assert "--base-model" in capsys.readouterr().err


def test_a_draft_with_another_tokenizer_is_refused(world, tmp_path, capsys):
    other = train_tokenizer(["other words"], vocab_size=258, max_length=64)
    other.save_pretrained(tmp_path / "draft")
    micro_model().save_pretrained(tmp_path / "draft")
    more = ["--init-from", str(tmp_path / "draft")]
    assert run_command(*command("draft", world, tmp_path / "out", *more)) == 2
    message = capsys.readouterr().err
    assert "--init-from" in message
    assert "same tokenizer" in message


def test_a_target_with_too_large_a_tokenizer_is_refused(world, tokenizer, tmp_path, capsys):
    tokenizer.save_pretrained(tmp_path / "target")
    small = micro_model()
    small.resize_token_embeddings(200)
    small.save_pretrained(tmp_path / "target")
    assert run_command(*command("medusa", world, tmp_path / "out", "--base-model",
                                str(tmp_path / "target"))) == 2  # fmt: skip
    assert "tokenizer has 300 tokens, the model 200" in capsys.readouterr().err


@pytest.mark.usefixtures("short_runs")
@pytest.mark.parametrize(
    ("more", "complaint"),
    [
        (["--seed", "1"], "seed = 0, this run has 1"),
        (["--heads", "3"], "student = 2 Medusa heads"),
        (["--data"], "it was begun with other --data"),
        (["--base-model"], "tokenizer differs from that of --base-model"),
    ],
)
def test_another_run_is_not_resumed(world, tokenizer, tmp_path, capsys, more, complaint):
    begun = command("medusa", world, tmp_path / "out")
    assert run_command(*begun) == 0
    if more == ["--data"]:
        text = file_of(tmp_path, "a.txt", LINES)
        begun = [word for word in begun if word not in ("--corpus", str(world / "corpus"))]
        more = ["--data", str(text)]
    if more == ["--base-model"]:
        # The same name, but what is there now has another tokenizer.
        run = json.loads((tmp_path / "out" / "run.json").read_text())
        run["vocabulary"] = "another"
        (tmp_path / "out" / "run.json").write_text(json.dumps(run))
        more = []
    assert run_command(*begun, *more, "--resume") == 2
    message = capsys.readouterr().err
    assert "--resume" in message
    assert complaint in message


def test_accelerate_is_asked_for(world, tmp_path, monkeypatch, capsys):
    found = importlib.util.find_spec
    monkeypatch.setattr(
        importlib.util, "find_spec", lambda name, *a: None if name == "accelerate" else found(name)
    )
    assert run_command(*command("medusa", world, tmp_path)) == 2
    message = capsys.readouterr().err
    assert message.count("\n") == 1
    assert "pip install 'llm-inference-lab[train]'" in message


def test_matplotlib_is_asked_for(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(ValueError, match="matplotlib is missing; pip install matplotlib"):
        curve.draw_curve(tmp_path / "curve.png", [], title="x")


# Devices.


def test_a_fresh_draft_is_where_the_target_is(world, target, tokenizer):
    parser = argparse.ArgumentParser()
    train.add_arguments(parser)
    args = parser.parse_args(command("draft", world, world / "never"))
    elsewhere = argparse.Namespace(
        config=target.config, tokenizer=tokenizer, device=torch.device("meta")
    )
    student = train.make_student(args, elsewhere)
    assert {p.device.type for p in student.module.parameters()} == {"meta"}


def test_one_gpu_of_several_trains(tmp_path, monkeypatch):
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    target = argparse.Namespace(device=torch.device("cuda"))
    config = teach.RunConfig(output=tmp_path, cache=tmp_path, steps=1)
    arguments = teach._arguments(config, target)
    assert arguments.n_gpu == 1
    assert arguments.train_batch_size == 1


def test_another_gpu_than_the_first_is_refused(world, capsys):
    assert run_command(*command("draft", world, world / "never"), "--device", "cuda:1") == 2
    said = capsys.readouterr().err
    assert "--device is 'cuda:1'" in said
    assert "CUDA_VISIBLE_DEVICES=1" in said
