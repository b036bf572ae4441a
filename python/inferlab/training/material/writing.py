"""Teaching material for drafts and draft heads: windows of token ids, mostly the target's writing.

Speculative decoding accepts a draft's token when it is the one the target chooses after text the
target wrote itself. So most windows are written by the target from prompts of the training data,
half of them greedily and the others at several temperatures (DistillSpec, Zhou et al., 2024);
the others are the training texts themselves.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from rich.progress import track
from torch import Tensor
from transformers import DynamicCache

from inferlab.training.material.sources import Source
from inferlab.training.material.windows import WindowSampler


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


def make_windows(target: Any, source: Source, config: MaterialConfig, *, seed: int) -> list[Tensor]:
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


def write(target: Any, source: Source, config: MaterialConfig, *, seed: int) -> Tensor:
    """Lets the target continue prompts: int32 `[generated_windows, window_length + 1]`.

    Prompts are those of the data, or end where a line of a training text ends.

    Raises:
        ValueError: the data has neither prompts nor a line end far enough into its texts.
    """
    rng = np.random.default_rng([seed, 1])
    generator = torch.Generator(device=target.device).manual_seed(seed)
    batch = min(config.generation_batch, config.generated_windows)
    low, high = config.temperatures
    temperatures = torch.linspace(low, high, batch)
    temperatures[: round(config.greedy_share * batch)] = 0.0
    written = []
    for _ in track(range(-(-config.generated_windows // batch)), description="target writes"):
        prompts = _draw_prompts(source, batch, config, rng)
        written.append(
            generate(
                target,
                torch.from_numpy(prompts.astype(np.int64)).to(target.device),
                length=config.window_length + 1,
                temperatures=temperatures.to(target.device),
                generator=generator,
            ).cpu()
        )
    return torch.cat(written)[: config.generated_windows].int()


def _draw_prompts(
    source: Source, count: int, config: MaterialConfig, rng: np.random.Generator
) -> np.ndarray:
    """`count` prompts of one length, int32 `[count, P]`."""
    if source.prompts:
        # Prompts of similar length, cut in front to the shortest of them.
        order = sorted(range(len(source.prompts)), key=lambda i: source.prompts[i].size)
        first = int(rng.integers(len(order)))
        chosen = [source.prompts[order[(first + i) % len(order)]] for i in range(count)]
        length = min(min(prompt.size for prompt in chosen), config.max_prompt)
        return np.stack([prompt[-length:] for prompt in chosen])
    stream = source.stream()
    ends = np.flatnonzero(np.isin(stream, source.newline_ids))
    ends = ends[ends >= config.max_prompt]
    if not ends.size:
        raise ValueError(
            f"{source.name}: no line ends behind its first {config.max_prompt} tokens, so there "
            "is nothing for the target to continue; use more data"
        )
    length = int(rng.integers(config.min_prompt, config.max_prompt + 1))
    return np.stack([stream[end - length : end] for end in rng.choice(ends, count)])


@torch.no_grad()
def generate(
    target: Any,
    prompts: Tensor,
    *,
    length: int,
    temperatures: Tensor,
    generator: torch.Generator | None = None,
) -> Tensor:
    """Continues a batch of prompts of one length, without stopping at end of text.

    Args:
        prompts: int64 `[B, P]`.
        length: tokens per row of the result.
        temperatures: fp32 `[B]`; rows with 0 are greedy.

    Returns:
        int64 `[B, length]`.
    """
    cache = DynamicCache(config=target.config)
    sampled = temperatures > 0
    noise_scale = temperatures[sampled, None]
    tokens, step = [prompts], prompts
    while sum(part.shape[1] for part in tokens) < length:
        output = target(input_ids=step, past_key_values=cache, use_cache=True, logits_to_keep=1)
        logits = output.logits[:, -1].float()
        # Gumbel-max, scaled by the temperature; greedy rows are spared the noise.
        exponential = torch.empty_like(logits[sampled]).exponential_(generator=generator)
        logits[sampled] -= noise_scale * exponential.log()
        step = logits.argmax(-1, keepdim=True)
        tokens.append(step)
    return torch.cat(tokens, dim=1)
