"""Teaching material for drafts and draft heads: windows of token ids, mostly the target's writing.

Speculative decoding accepts a draft's token when it is the one the target chooses after text the
target wrote itself. So most windows are written by the target from prompts of the training data,
half of them greedily and the others at several temperatures (DistillSpec, Zhou et al., 2024);
the others are the training texts themselves.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from rich.progress import Progress
from torch import Tensor

from inferlab.config import SpecdecConfig
from inferlab.models import HFModel
from inferlab.specdec.pipeline import SpeculativePipeline
from inferlab.training.material.sources import Source
from inferlab.training.material.windows import WindowSampler
from inferlab.types import SamplingParams


@dataclass(frozen=True)
class MaterialConfig:
    """How much of what.

    Attributes:
        generated_windows: sequences the target writes.
        corpus_windows: windows of training text, of the same length.
        long_windows: windows of training text that fill the context.
        window_length: tokens per generated sequence, prompt included.
        long_length: tokens per long window.
        min_prompt, max_prompt: range of prompt lengths in tokens.
        greedy_share: share of the generated sequences written at temperature 0; the others
            use temperatures spread evenly over `temperatures`.
        temperatures: lowest and highest sampling temperature.
        generation_batch: sequences written at once.
    """

    generated_windows: int = 3072
    corpus_windows: int = 1536
    long_windows: int = 128
    window_length: int = 256
    long_length: int = 1024
    min_prompt: int = 16
    max_prompt: int = 128
    greedy_share: float = 0.5
    temperatures: tuple[float, float] = (0.5, 1.0)
    generation_batch: int = 256

    def __post_init__(self) -> None:
        if not 0 < self.min_prompt <= self.max_prompt < self.window_length:
            raise ValueError(
                f"prompt lengths {self.min_prompt} to {self.max_prompt} do not fit into windows of "
                f"{self.window_length} tokens"
            )
        if self.generated_windows < 1:
            raise ValueError(f"--windows is {self.generated_windows}, expected at least 1")


def make_windows(
    target: HFModel, source: Source, config: MaterialConfig, *, seed: int
) -> list[Tensor]:
    """The target's writing, then training text in short and in long windows.

    Returns:
        int32 `[N, T + 1]` each; kinds that the data has no text for are left out. The same
        target, data and seed give the same windows.
    """
    kinds = [write(target, source, config, seed=seed)]
    if source.documents:
        sampler = WindowSampler(source.epoch_documents, seed=seed)
        size = sampler.epoch_stream(0).size
        for count, length in (
            (config.corpus_windows, config.window_length),
            (config.long_windows, config.long_length),
        ):
            if count and size > length:
                kinds.append(sampler.batch(0, num_windows=count, length=length).int())
    return kinds


def write(target: HFModel, source: Source, config: MaterialConfig, *, seed: int) -> Tensor:
    """Lets the target continue prompts: int32 `[generated_windows, window_length + 1]`.

    Prompts are those of the data, or end where a line of a training text ends. The engine decodes
    them, without a drafter; ends of text do not end a window.

    Raises:
        ValueError: the data has neither prompts nor a line end far enough into its texts.
    """
    count, length = config.generated_windows, config.window_length + 1
    batch = min(config.generation_batch, count)
    pages = -(-(length + 1) // SpecdecConfig().page_size)
    engine = SpeculativePipeline(
        config=SpecdecConfig(draft_mode="none", max_batch=batch, num_pages=batch * pages),
        target=target,
    ).engine
    prompts = _draw_prompts(source, config, np.random.default_rng([seed, 1]))
    greedy = round(config.greedy_share * count)
    temperatures = [0.0] * greedy + np.linspace(*config.temperatures, count - greedy).tolist()
    requests = [
        (
            prompt,
            SamplingParams(
                max_tokens=length - len(prompt),
                temperature=temperature,
                seed=seed * count + index,
                ignore_eos=True,
            ),
        )
        for index, (prompt, temperature) in enumerate(zip(prompts, temperatures, strict=True))
    ]
    with Progress() as progress:
        task = progress.add_task("target writes", total=count)
        written = engine.generate(requests, lambda *_: progress.advance(task))
    for result in written:
        if result.error is not None:
            raise ValueError(f"--base-model: {result.error}")
    rows = [[*prompt, *result.token_ids] for prompt, result in zip(prompts, written, strict=True)]
    return torch.tensor(rows, dtype=torch.int32)


def _draw_prompts(
    source: Source, config: MaterialConfig, rng: np.random.Generator
) -> list[list[int]]:
    """A prompt for every window that the target writes."""
    count = config.generated_windows
    if source.prompts:
        chosen = (source.prompts[index] for index in rng.integers(len(source.prompts), size=count))
        return [prompt[-config.max_prompt :].tolist() for prompt in chosen]
    stream = source.stream()
    ends = np.flatnonzero(np.isin(stream, source.newline_ids))
    ends = ends[ends >= config.max_prompt]
    if not ends.size:
        raise ValueError(
            f"{source.name}: no line ends behind its first {config.max_prompt} tokens, so there "
            "is nothing for the target to continue; use more data"
        )
    lengths = rng.integers(config.min_prompt, config.max_prompt + 1, size=count)
    return [
        stream[end - length : end].tolist()
        for end, length in zip(rng.choice(ends, count), lengths, strict=True)
    ]
