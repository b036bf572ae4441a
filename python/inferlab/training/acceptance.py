"""How well a draft serves its target: tokens per target forward on held-out prompts."""

from __future__ import annotations

from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, PreTrainedTokenizerFast


@dataclass(frozen=True)
class Acceptance:
    """Agreement of a draft with its target on text the target wrote.

    Attributes:
        temperature: of the target and the draft.
        chain_length: draft tokens proposed per target forward (K).
        agreement: share of positions where the draft's choice is the target's.
        mean_accepted_length: accepted draft tokens plus the bonus token, per target forward.
        prompts: how many prompts were continued.
        new_tokens: tokens written per prompt.
    """

    temperature: float
    chain_length: int
    agreement: float
    mean_accepted_length: float
    prompts: int
    new_tokens: int

    def as_dict(self) -> dict[str, float]:
        """For JSON."""
        return asdict(self)


@torch.no_grad()
def measure_acceptance(
    target: LlamaForCausalLM,
    draft: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    prompts: list[str],
    *,
    new_tokens: int = 128,
    chain_length: int = 4,
    temperature: float = 0.0,
    seed: int = 0,
) -> Acceptance:
    """Simulates speculative decoding with chains, from one forward of each model.

    Above temperature 0 both models choose by Gumbel-max with the same noise at the same position
    (Daliri et al., "Coupling without communication", 2024). As an accepted token is the target's
    own choice, the target's text does not depend on the draft, and the draft can be run over the
    finished text once.
    """
    matches: list[Tensor] = []
    for index, prompt in enumerate(prompts):
        ids = tokenizer(prompt, return_tensors="pt").input_ids
        generator = torch.Generator().manual_seed(seed * 1_000_003 + index)
        noise = torch.empty(new_tokens, target.config.vocab_size)
        noise = -temperature * noise.exponential_(generator=generator).log()
        text = _write(target, ids, noise)
        logits = draft(input_ids=text[:, :-1], use_cache=False).logits[0, ids.shape[1] - 1 :]
        matches.append((logits.float() + noise).argmax(-1) == text[0, ids.shape[1] :])
    # The first new token comes from reading the prompt; drafting starts behind it.
    drafted = [match[1:] for match in matches]
    forwards = sum(count_forwards(match, chain_length) for match in drafted)
    return Acceptance(
        temperature=temperature,
        chain_length=chain_length,
        agreement=float(torch.cat(drafted).float().mean()),
        mean_accepted_length=sum(match.numel() for match in drafted) / forwards,
        prompts=len(prompts),
        new_tokens=new_tokens,
    )


def count_forwards(match: Tensor, chain_length: int) -> int:
    """Target forwards that write `match.numel()` tokens.

    Args:
        match: bool `[T]`, whether the draft's choice at that position is the target's.
        chain_length: draft tokens proposed per forward.
    """
    flags = match.tolist()
    position = forwards = 0
    while position < len(flags):
        accepted = 0
        while (
            accepted < chain_length
            and position + accepted < len(flags)
            and flags[position + accepted]
        ):
            accepted += 1
        position += accepted + 1
        forwards += 1
    return forwards


def _write(target: LlamaForCausalLM, ids: Tensor, noise: Tensor) -> Tensor:
    """The target's continuation under noise `[new_tokens, V]`: int64 `[1, P + new_tokens]`."""
    text, step, cache = ids, ids, None
    for row in noise:
        output = target(input_ids=step, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        step = (output.logits[0, -1].float() + row).argmax().view(1, 1)
        text = torch.cat([text, step], dim=1)
    return text
