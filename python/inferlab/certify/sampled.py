"""The sampled part: what a real engine emits, against the target's own distribution.

Continuations of a few tokens of one prompt are the cells: the likeliest ones, whose probabilities
are products of the target's own, and all others together. Many seeds through the engine fill them.
"""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Sequence

import numpy as np
import torch

from inferlab.certify.cases import sampled_law
from inferlab.certify.facts import Sampler
from inferlab.certify.outputs import Check, failed, passed, sampled_distance
from inferlab.kernels import SamplingTensors
from inferlab.models import (
    ForwardBatch,
    KVCache,
    TargetModel,
    allowed_vocab,
    last_rows,
    unknown_ids,
)
from inferlab.records import record_of, total_stats
from inferlab.specdec.pipeline import SpeculativePipeline

CELLS = 64
TOKENS = 3
"""Of a continuation: the first is chosen plainly, the others behind drafts."""
BATCH = 64
DECODED = TOKENS + 4
"""Of each sample: more than are counted, so that drafts are as long as elsewhere."""
_LEAST = 1e-4  # a continuation less likely than this is no cell of its own

Continuation = tuple[int, ...]


def likeliest(
    target: TargetModel, prompt: Sequence[int], sampler: Sampler, cells: int = CELLS
) -> dict[Continuation, float]:
    """The likeliest continuations of `TOKENS` tokens, best first, with their probabilities.

    Logits are those that the engine decodes by: of the same forwards, from the same cache.
    """
    pages = -(-(len(prompt) + TOKENS) // 16)
    cache = target.new_cache(pages)
    heap: list[tuple[float, Continuation]] = [(-1.0, ())]
    found: dict[Continuation, float] = {}
    while heap and len(found) < cells:
        chance, behind = heapq.heappop(heap)
        if len(behind) == TOKENS:
            found[behind] = -chance
            continue
        sampling = SamplingTensors.of(1, **sampler, prompt_tokens=[prompt], output_tokens=[behind])
        law = sampled_law(_next_logits(target, [*prompt, *behind], cache, pages), sampling)
        for token in np.nonzero(law * -chance >= _LEAST)[0].tolist():
            heapq.heappush(heap, (chance * float(law[token]), (*behind, token)))
    return found


def _next_logits(
    target: TargetModel, tokens: Sequence[int], cache: KVCache, pages: int
) -> torch.Tensor:
    """f32[V] behind a text; -inf where no token is."""
    ids = torch.tensor([tokens], device=target.device)
    with torch.inference_mode():
        logits = target.forward(
            ForwardBatch(
                tokens=ids,
                positions=torch.arange(len(tokens), device=target.device)[None],
                seq_lens=torch.zeros(1, dtype=torch.int32, device=target.device),
                block_table=torch.arange(pages, dtype=torch.int32, device=target.device)[None],
                scored=last_rows(ids),
            ),
            cache,
        ).logits
    row = logits[0, 0].float().cpu().clone()
    row[allowed_vocab(target) :] = -torch.inf
    if target.tokenizer is not None and target.plain() is not None:
        row[unknown_ids(target.tokenizer, allowed_vocab(target))] = -torch.inf
    return row


def sampled(
    name: str,
    pipeline: SpeculativePipeline,
    prompt: Sequence[int],
    expected: dict[Continuation, float],
    sampler: Sampler,
    seeds: Sequence[int],
    level: float,
) -> Check:
    """Decodes one continuation for each seed, and tests where they fall.

    Args:
        expected: of `likeliest`.
        level: of the test: the chance that a lossless engine fails it.
    """
    results = []
    # In groups that begin together: while others are still read, the engine does not draft.
    for first in range(0, len(seeds), BATCH):
        group = list(seeds[first : first + BATCH])
        results += pipeline.generate(
            [list(prompt)] * len(group),
            max_tokens=DECODED,
            seed=group,
            ignore_eos=True,
            **sampler,
        )
    seen = Counter(tuple(result["token_ids"][:TOKENS]) for result in results)
    counts = [seen[cell] for cell in expected]
    target = list(expected.values())
    counts.append(len(seeds) - sum(counts))
    target.append(max(1.0 - sum(target), 0.0))
    if target[-1] < 1e-9:  # rounding of the sum: nothing else is possible
        target[-1] = 0.0
    distance = sampled_distance(counts, target)
    stats = total_stats(record_of(result) for result in results)
    text = (
        f"{len(seeds)} seeds, {len(counts)} cells, p = {distance['p_value']:.2g}, "
        f"{stats.accepted} drafts accepted"
    )
    make = passed
    if pipeline.policy.lossless and (distance["p_value"] or 0.0) < level:
        worst = int(np.argmax(np.abs(np.array(counts) / len(seeds) - np.array(target))))
        cell = list([*expected, ("any other",)][worst])
        text += f"; tokens {cell}: {counts[worst] / len(seeds):.3f} for {target[worst]:.3f}"
        make = failed
    check = make("sampled", name, text, distance)
    check["accepted_length"] = stats.mean_accepted_length
    return check
