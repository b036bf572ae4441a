"""What tests run on the ranks of a model, see `helpers.ranks`."""

from __future__ import annotations

import os
import signal
import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from helpers.ranks import together
from inferlab import SpeculativePipeline
from inferlab.models import HFModel
from inferlab.models.parallel.part import ModelPart
from inferlab.models.parallel.sums import ordered_sum

PROMPTS = [[5, 9, 33, 12, 5, 9, 33, 71, 5, 9], [101], [(7 * i * i + 3) % 160 for i in range(37)]]
NEW_TOKENS = 24


def decoded(
    model: str, modes: list[dict[str, Any]], temperatures: list[float], **where: Any
) -> list[list[Any]]:
    """Token ids and log-probabilities of `PROMPTS`, by setting and temperature."""
    runs = []
    for mode in modes:
        pipeline = SpeculativePipeline(
            base_model=model, kv_memory_mb=16, seed=7, cost_cache=False, **where, **mode
        )
        for temperature in temperatures:
            requests = [
                pipeline.request(
                    prompt,
                    max_tokens=NEW_TOKENS,
                    temperature=temperature,
                    logprobs=0,
                    ignore_eos=True,
                )
                for prompt in PROMPTS
            ]
            results = pipeline.engine.generate(requests)
            runs.append(
                [
                    [
                        each.token_ids,
                        [of.logprob for of in each.logprobs or []],
                        each.stats.accepted,
                    ]
                    for each in results
                ]
            )
    return runs


def all_sharded(runs: dict[str, tuple[str, list[dict[str, Any]], list[float]]]) -> Any:
    """`sharded` for each of several."""
    return {name: sharded(*run) for name, run in runs.items()}


def sharded(model: str, modes: list[dict[str, Any]], temperatures: list[float]) -> Any:
    """`decoded` on this process's ranks."""
    return decoded(model, modes, temperatures, tensor_parallel=int(os.environ["WORLD_SIZE"]))


def disturbed(runs: dict[str, Any]) -> Any:
    """`all_sharded`, while rank 1 takes any logits for its own, and of a model that is called
    "other" has norms of its own."""
    if int(os.environ["RANK"]) == 1:
        forward, build = HFModel.forward, HFModel._build

        def perturbed(self: HFModel, *args: Any) -> Any:
            output = forward(self, *args)
            return output._replace(logits=torch.randn_like(output.logits))

        def perturbed_build(self: HFModel) -> None:
            generator = torch.Generator().manual_seed(1)
            for name, weight in self.model.named_parameters():
                if self.name.endswith("other") and "norm" in name:
                    weight.data += 0.1 * torch.randn(weight.shape, generator=generator)
            build(self)

        HFModel.forward = perturbed  # type: ignore[method-assign]
        HFModel._build = perturbed_build  # type: ignore[method-assign]
    return all_sharded(runs)


def runs_for_ever(model: str, folder: str) -> Any:
    """Decodes until something goes wrong, which it returns; comes through a Ctrl-C before that."""
    pipeline = SpeculativePipeline(
        base_model=model, tensor_parallel=2, draft_mode="ngram", k=2, kv_memory_mb=16
    )
    expected = pipeline.generate(PROMPTS[0], NEW_TOKENS, ignore_eos=True)["token_ids"]
    forward = ModelPart.forward

    def interrupted(self: ModelPart, *args: Any) -> Any:
        ModelPart.forward = forward  # type: ignore[method-assign]
        os.kill(os.getpid(), signal.SIGINT)
        return forward(self, *args)

    ModelPart.forward = interrupted  # type: ignore[method-assign]
    try:
        pipeline.generate(PROMPTS[0], NEW_TOKENS, ignore_eos=True)
    except KeyboardInterrupt as interrupt:
        print("interrupted", interrupt, file=sys.stderr)
        again = pipeline.generate(PROMPTS[0], NEW_TOKENS, ignore_eos=True)["token_ids"]
        assert again == expected
    else:
        raise AssertionError("Ctrl-C was lost")
    try:
        while True:
            pipeline.generate(PROMPTS[0], NEW_TOKENS, ignore_eos=True)
            Path(folder, "running").touch()
    except RuntimeError as error:
        try:
            pipeline.generate(PROMPTS[0], NEW_TOKENS)
        except RuntimeError as later:
            print(later, file=sys.stderr)
            return [type(error).__name__, str(error), str(later)]
        raise


class Sums(ModelPart):
    """Sums of the ranks' rows, alone and in company, beside models."""

    def rows(self, count: int, dtype: torch.dtype, ordered: bool) -> torch.Tensor:
        """Of ``count`` rows [count, 96], of which each has the same numbers in any company."""
        part = torch.stack([self._row(row, dtype) for row in range(count)])
        if ordered:
            return ordered_sum(part, dist.group.WORLD)
        dist.all_reduce(part)
        return part

    def _row(self, row: int, dtype: torch.dtype) -> torch.Tensor:
        generator = torch.Generator().manual_seed(1000 * dist.get_rank() + row)
        return torch.randn(96, generator=generator).to(dtype)


def sums_and_runs(counts: list[int], *run: Any) -> Any:
    """Whether the first row's sum has the same bits whatever the number of rows: ours, by dtype,
    and torch's; how far ours is from the sum in float64; and `sharded`."""
    ranks = together(Sums())
    same = {}
    for dtype in (torch.float32, torch.bfloat16):
        for ordered in (True, False):
            rows = [ranks.everywhere("rows", count, dtype, ordered) for count in counts]
            same[f"{dtype}, {ordered}"] = all(torch.equal(each[0], rows[0][0]) for each in rows)
    parts = [
        torch.randn(96, generator=torch.Generator().manual_seed(1000 * rank)).double()
        for rank in range(ranks.size)
    ]
    own = ranks.everywhere("rows", 1, torch.float32, True)[0].double()
    return same, float((own - sum(parts)).abs().max()), sharded(*run)
