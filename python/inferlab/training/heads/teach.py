"""One training run of a student: material, features, trainer, held-out reports, curve."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.utils.data import Dataset
from transformers import PreTrainedTokenizerFast, TrainerCallback, TrainingArguments

from inferlab.models import HFModel
from inferlab.training.heads.losses import POSITION_DECAY
from inferlab.training.heads.students import Student
from inferlab.training.heads.trainer import Clock, DraftTrainer, last_checkpoint
from inferlab.training.material.features import (
    Batches,
    TokenBatches,
    cache_matches,
    read_features,
    write_cache,
)
from inferlab.training.material.sources import Source
from inferlab.training.material.writing import MaterialConfig, make_windows
from inferlab.training.measure.acceptance import Chains, Trial
from inferlab.training.measure.curve import draw_curve

RUN_FILE = "run.json"


@dataclass(frozen=True)
class RunConfig:
    """When to stop, how fast to learn, what to report, where to keep what.

    Attributes:
        output: folder for checkpoints, curve and the finished weights.
        cache: folder for windows and features; runs with the same data and target may share it.
        steps, minutes: the run ends when either is used up; the learning rate follows whichever is
            further on.
        lr: peak learning rate.
        tokens_per_batch: tokens of a batch; a window longer than that is a batch alone.
        accumulate: batches per update.
        save_every, eval_every, log_every: updates between checkpoints, held-out measurements, lines
            of the log.
        nodes: of the trees that the finished student is measured with.
        depth: positions that acceptance is measured at.
        new_tokens: written behind each held-out prompt.
        keep_features: read the target's hidden states once, to disk; False reads them every time.
        resume: go on from the last checkpoint in `output`.
        compile: compile the loss with torch.compile.
        stop_after: end after so many updates as if interrupted, for tests.
    """

    output: Path
    cache: Path
    steps: int
    minutes: float | None = None
    lr: float = 3e-3
    tokens_per_batch: int = 4096
    accumulate: int = 1
    save_every: int = 100
    eval_every: int = 100
    log_every: int = 10
    nodes: int = 32
    depth: int = 5
    new_tokens: int = 128
    seed: int = 0
    keep_features: bool = True
    resume: bool = False
    compile: bool = True
    stop_after: int | None = None
    material: MaterialConfig = field(default_factory=MaterialConfig)

    def __post_init__(self) -> None:
        for flag, value, least in (
            ("--steps", self.steps, 1),
            ("--batch-tokens", self.tokens_per_batch, 1),
            ("--accumulate", self.accumulate, 1),
        ):
            if value < least:
                raise ValueError(f"{flag} is {value}, expected at least {least}")
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"--minutes is {self.minutes}, expected more than 0")
        if not self.lr > 0:
            raise ValueError(f"--lr is {self.lr}, expected more than 0")


@dataclass(frozen=True)
class Taught:
    """What a run did: updates, minutes, and the history of losses and acceptance."""

    steps: int
    minutes: float
    history: list[dict[str, Any]]


class Watch(TrainerCallback):
    """Measures acceptance on held-out prompts while training."""

    def __init__(
        self, student: Student, target: HFModel, source: Source, config: RunConfig
    ) -> None:
        self.student, self.target, self.source, self.config = student, target, source, config

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % self.config.eval_every == 0:
            self.report(state)
        if self.config.stop_after == state.global_step:
            control.should_training_stop = True

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.draw(state)

    def draw(self, state: Any) -> None:
        """Draws how the run went so far, beside the checkpoints."""
        draw_curve(
            self.config.output / "curve.png", state.log_history, title=self.student.description
        )

    def report(self, state: Any) -> None:
        """Adds an entry to the history and prints it."""
        found = self.measure()
        state.log_history.append(
            {"step": state.global_step, **{f"heldout_{k}": v for k, v in asdict(found).items()}}
        )
        shares = " ".join(f"{share:.1%}" for share in found.by_position)
        print(
            f"\nstep {state.global_step}: held-out acceptance by position {shares}; accepted "
            f"length {found.length:.2f} in chains",
            flush=True,
        )

    def measure(self) -> Chains:
        """Acceptance of the student as it is now; leaves the training's random numbers alone."""
        config, student = self.config, self.student
        with torch.random.fork_rng(), TemporaryDirectory(dir=config.output) as folder:
            student.save(Path(folder))
            trial = Trial(
                self.target,
                student.mode,
                Path(folder),
                cut_heldout(config, self.source),
                new_tokens=config.new_tokens,
            )
            return trial.chains(min(config.depth, student.max_positions))


def cut_heldout(config: RunConfig, source: Source) -> list[list[int]]:
    """The held-out prompts, cut in front to the length that the target is taught with."""
    return [prompt[-config.material.max_prompt :].tolist() for prompt in source.heldout]


def require_accelerate() -> None:
    """Raises ValueError when the trainer's library is not installed."""
    if importlib.util.find_spec("accelerate") is None:
        raise ValueError("accelerate is missing; pip install 'llm-inference-lab[train]'")


def teach(config: RunConfig, student: Student, target: HFModel, source: Source) -> Taught:
    """Trains `student.module` in place and writes checkpoints and the curve.

    Raises:
        ValueError: the data is too little, there is nothing to resume, or it was begun otherwise.
        OSError: the output could not be written; the last checkpoint is intact.
    """
    require_accelerate()
    made_from = {
        "base_model": target.name,
        "vocabulary": vocabulary_fingerprint(target.tokenizer),
        "data": source.fingerprint,
        "material": asdict(config.material),
        "seed": config.seed,
    }
    resume = last_checkpoint(config.output) if config.resume else None
    _check_same_run(config, {**made_from, "student": student.description})
    config.output.mkdir(parents=True, exist_ok=True)
    batches = _batches(config, student, target, source, made_from)
    if not len(batches):  # type: ignore[arg-type]
        raise ValueError(
            f"{source.name}: too little for one batch of {config.tokens_per_batch} tokens; use "
            "more data, more --windows or a smaller --batch-tokens"
        )
    _write_json(config.output / RUN_FILE, {**made_from, "student": student.description})
    clock = Clock(config.steps, config.minutes)
    watch = Watch(student, target, source, config)
    trainer = DraftTrainer(
        student.module,
        _arguments(config, target),
        loss=_loss(config, student, target),
        weights=POSITION_DECAY ** torch.arange(float(student.positions)),
        clock=clock,
        vocab_size=target.vocab_size,
        train_dataset=batches,
    )
    trainer.add_callback(watch)
    student.module.train()
    trainer.train(resume_from_checkpoint=None if resume is None else os.fspath(resume))
    watch.report(trainer.state)
    watch.draw(trainer.state)
    return Taught(trainer.state.global_step, clock.elapsed, list(trainer.state.log_history))


def vocabulary_fingerprint(tokenizer: PreTrainedTokenizerFast) -> str:
    """The same for tokenizers that map the same token strings to the same ids."""
    vocabulary = sorted(tokenizer.get_vocab().items(), key=lambda item: item[1])
    return hashlib.sha256(repr(vocabulary).encode()).hexdigest()


def _arguments(config: RunConfig, target: HFModel) -> TrainingArguments:
    on_cpu = target.device.type == "cpu"
    arguments = TrainingArguments(
        output_dir=str(config.output),
        max_steps=config.steps,
        per_device_train_batch_size=1,  # an item is a batch
        gradient_accumulation_steps=config.accumulate,
        learning_rate=config.lr,
        max_grad_norm=0.0,  # the optimizer clips
        logging_steps=config.log_every,
        save_steps=config.save_every,
        save_total_limit=2,
        remove_unused_columns=False,
        report_to=[],
        seed=config.seed,
        use_cpu=on_cpu,
        dataloader_pin_memory=not on_cpu,
    )
    # Where several GPUs are visible the trainer would split each batch among copies of the student,
    # which the compiled loss does not know of; there is no argument for it.
    arguments._n_gpu = min(arguments.n_gpu, 1)
    return arguments


def _loss(config: RunConfig, student: Student, target: HFModel) -> Any:
    head: Any = target.head
    dtype = next(student.module.parameters()).dtype
    lm_head = head.weight.detach().to(dtype)
    compiled = torch.compile(student.loss, dynamic=False) if config.compile else student.loss

    def loss(module: Any, tokens: Tensor, features: Tensor | None) -> Tensor:
        if features is None:
            features = read_features(target, tokens, student.feature_layers)
        features = features.to(tokens.device, dtype)
        result: Tensor = compiled(module, tokens, features, lm_head=lm_head)
        return result

    return loss


def _batches(
    config: RunConfig,
    student: Student,
    target: HFModel,
    source: Source,
    made_from: dict[str, Any],
) -> Dataset[dict[str, Tensor]]:
    """The material as batches; windows and features are made, or found in the cache."""
    kinds = _windows(config, target, source, made_from)
    sizes = {"tokens_per_batch": config.tokens_per_batch, "seed": config.seed}
    if not config.keep_features:
        return TokenBatches(kinds, **sizes)
    layers = student.feature_layers
    folder = config.cache / ("features" + "".join(f"_{layer}" for layer in layers))
    if not cache_matches(folder, made_from):
        write_cache(folder, target, kinds, layers, made_from)
    return Batches(folder, **sizes)


def _windows(
    config: RunConfig, target: HFModel, source: Source, made_from: dict[str, Any]
) -> list[Tensor]:
    config.cache.mkdir(parents=True, exist_ok=True)
    file, note = config.cache / "windows.safetensors", config.cache / "windows.json"
    if not (file.is_file() and _read_json(note) == json.loads(json.dumps(made_from))):
        note.unlink(missing_ok=True)
        kinds = make_windows(target, source, config.material, seed=config.seed)
        save_file({str(index): kind for index, kind in enumerate(kinds)}, file)
        _write_json(note, made_from)
    stored = load_file(file)
    return [stored[str(index)] for index in range(len(stored))]


def _check_same_run(config: RunConfig, run: dict[str, Any]) -> None:
    """A resumed run must be the one that was begun."""
    begun = _read_json(config.output / RUN_FILE) if config.resume else None
    if begun is None:
        return
    for key, value in json.loads(json.dumps(run)).items():
        if begun.get(key) != value:
            what = {
                "vocabulary": "its tokenizer differs from that of --base-model",
                "data": "it was begun with other --data",
            }.get(key, f"it was begun with {key} = {begun.get(key)}, this run has {value}")
            raise ValueError(
                f"--resume: {config.output}: {what}; go on with what it was begun with, or name "
                "another --output"
            )


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None


def _write_json(file: Path, content: dict[str, Any]) -> None:
    file.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
