"""Decoding on a device, end to end, with a model of real size and no trained weights.

The model is Llama-3.1-8B's shape in bf16. Its weights are random, but the embedding of a token is
large and the output head holds the embeddings in another order: token t is followed by `order[t]`,
whatever rounding does, so that all ways of decoding must give the same text and a scripted drafter
can be right as often as it is told to. What a step costs does not depend on the weights' values.

A row per measurement is printed and appended to --rows at once. Times are medians of --rounds.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from inferlab.benchmarks.environment import describe_environment
from inferlab.kernels import build_tree
from inferlab.models import ForwardBatch, HFModel, KVCache
from inferlab.models.draft_heads import EagleHead, MedusaHeads, PagedEagle, eagle_config
from inferlab.models.transfer import upload
from inferlab.scheduler import Request
from inferlab.specdec.batch import Batch
from inferlab.specdec.control import Controller, Judge
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.costing import measure
from inferlab.specdec.drafters import (
    Drafter,
    EagleDrafter,
    MedusaDrafter,
    ModelDrafter,
    NgramDrafter,
    RecyclingDrafter,
)
from inferlab.specdec.engine import Engine
from inferlab.specdec.planner import CostController
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import Budget, DraftTree, TreeShape
from inferlab.types import GenerationResult, SamplingParams

PROMPT_TOKENS = 32
NODES = (1, 8, 16, 32, 64)
MOST_NODES = 128  # of a drafter of real size, with those that it expands and does not keep
LLAMA_8B = {
    "vocab_size": 128_256,
    "hidden_size": 4096,
    "intermediate_size": 14_336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
LLAMA_1B = {
    "vocab_size": 128_256,
    "hidden_size": 2048,
    "intermediate_size": 8192,
    "num_hidden_layers": 16,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
}
REHEARSAL = {
    "vocab_size": 512,
    "hidden_size": 128,
    "intermediate_size": 256,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


class ScriptedDrafter(Drafter):
    """Drafts a tree of `nodes` nodes, root included, whose first `right` levels are what comes.

    The main path is as deep as `levels`; other nodes hang on the root. Costs next to nothing.
    """

    name = "scripted"

    def __init__(self, order: Sequence[int], nodes: int, right: int, levels: int = 8) -> None:
        path = min(nodes - 1, max(levels, right))
        top = nodes - path  # children of the root, the path's first node among them
        deeper = [1, *range(top + 1, nodes - 1)][: path - 1]
        ranks = [0, 1, *range(path + 1, nodes), *range(2, path + 1)]
        self.shape = TreeShape((-1, *[0] * top, *deeper), tuple(ranks))
        self.max_nodes, self.max_depth = nodes, path
        self._order, self._right = order, right

    def propose(self, batch: Batch, budget: Budget, judge: Judge | None = None) -> DraftTree:
        shape = self.shape.within(budget)
        rows = []
        for sequence in batch.requests:
            tokens = [sequence.tokens[-1]]
            for node in range(1, shape.num_nodes):
                follows = self._order[tokens[shape.parents[node]]]
                wrong = shape.sibling_ranks[node] > 0 or shape.depths[node] > self._right
                offset = 1 + shape.sibling_ranks[node] if wrong else 0
                tokens.append((follows + offset) % len(self._order))
            rows.append(tokens)
        size = len(batch)
        return DraftTree(
            upload(rows, np.int32, batch.device),
            shape.links(size, batch.device),
            shape.is_chain,
            [shape.depth] * size,
            [shape.num_nodes] * size,
        )

    def describe(self) -> dict[str, Any]:
        return {"drafter": self.name}


class Bench:
    """The model, and the rows that are measured on it."""

    def __init__(self, args: argparse.Namespace) -> None:
        self.args = args
        self.device = torch.device(args.device)
        self.sizes = REHEARSAL if args.rehearse else LLAMA_8B
        started = time.perf_counter()
        order = cycle(self.sizes["vocab_size"])
        self.order: list[int] = order.tolist()
        model = make_model(self.sizes, self.device, order)
        self.weight_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
        self.weight_bytes -= model.model.embed_tokens.weight.nbytes  # a row of it is read
        self.target = HFModel(model, name="Llama-3.1-8B shape")
        generator = torch.Generator().manual_seed(1)
        self.prompt = torch.randint(len(order), (PROMPT_TOKENS,), generator=generator).tolist()
        self.params = SamplingParams(max_tokens=args.tokens, ignore_eos=True)
        self.text = self._follow(args.tokens)
        self._wait()
        self.row("model made and wrapped", time.perf_counter() - started, "s")
        self.row("weights that a step reads", self.weight_bytes / 1e9, "GB")

    def row(self, what: str, value: float, unit: str, **details: Any) -> None:
        more = ", ".join(f"{k} {v}" for k, v in details.items())
        print(f"{what:58} {value:10.3f} {unit:8} {more}", flush=True)
        record = {"what": what, "value": value, "unit": unit, **details}
        if self.args.rows is not None:
            with self.args.rows.open("a", encoding="utf-8") as file:
                file.write(json.dumps(record) + "\n")

    # ---- through the engine --------------------------------------------------------------------

    def plain(self) -> float:
        """Milliseconds of a plain step."""
        step_ms, _ = self._steps(None, "plain decoding")
        self.row("plain decoding", 1e3 / step_ms, "tok/s", step_ms=round(step_ms, 3))
        return step_ms

    def steps_by_nodes(self) -> None:
        """What a step costs that verifies N nodes and accepts none of them."""
        for nodes in NODES[1:]:
            drafter = ScriptedDrafter(self.order, nodes, right=0)
            step_ms, _ = self._steps(drafter, f"{nodes} nodes")
            self.row(f"step that verifies {nodes} nodes", step_ms, "ms")

    def speculation(self, plain_ms: float) -> None:
        """Speed-up by accepted length, bonus token included."""
        for right, nodes in ((1, 5), (2, 5), (2, 64), (4, 8), (4, 64)):
            drafter = ScriptedDrafter(self.order, nodes, right)
            step_ms, length = self._steps(drafter, f"{nodes} nodes, {right} right")
            self.row(
                f"speculation: {nodes} nodes, {length:.2f} tokens a step", length / step_ms * 1e3,
                "tok/s", times_plain=round(length / step_ms * plain_ms, 3),
            )  # fmt: skip

    def batches(self) -> None:
        for batch in (8, 32):
            step_ms, _ = self._steps(None, f"batch {batch}", batch)
            self.row(f"plain decoding, batch {batch}", batch * 1e3 / step_ms, "tok/s")
            drafter = ScriptedDrafter(self.order, 5, right=2)
            spec_ms, length = self._steps(drafter, f"batch {batch}, 5 nodes", batch)
            self.row(
                f"speculation, batch {batch}: 5 nodes, {length:.2f} tokens a step",
                batch * length * 1e3 / spec_ms, "tok/s",
                times_plain=round(length * step_ms / spec_ms, 3),
            )  # fmt: skip

    def _steps(
        self,
        drafter: Drafter | None,
        what: str,
        batch: int = 1,
        nodes: int | None = None,
        controller: Controller | None = None,
    ) -> tuple[float, float]:
        """Median milliseconds of a step behind the first token, and tokens a sequence kept in it.
        The text must be the one that the model was made to write. ``nodes``: see `_pages`."""
        engine = self._engine(drafter, batch, nodes, controller)
        times, lengths = [], []
        for round_ in range(self.args.rounds + 1):
            results = engine.generate([(self.prompt, self.params)] * batch)
            for result in results:
                self._must_be_text(result, what)
            stats = results[-1].stats
            if round_ or self.args.rounds == 0:  # the first warms up
                last = max(results, key=lambda r: r.latency_ms)
                times.append((last.latency_ms - last.first_token_ms) / (stats.steps - 1))
                lengths.append((len(results[-1].token_ids) - 1) / (stats.steps - 1))
        return statistics.median(times), statistics.median(lengths)

    # ---- drafters of real size -------------------------------------------------------------

    def drafters(self, plain_ms: float) -> None:
        """A step's price where a drafter of real size drafts. The draft model follows the same
        order, so all of its drafts are right; heads have random weights and guess nothing."""
        for name, make in (
            ("a draft model of 1.2 B, chain of 5", self._draft_model),
            ("an EAGLE-3 head, grown tree of 60", self._eagle),
            ("5 Medusa heads, grown tree of 63", self._medusa),
            ("recycling, tree of 80", self._recycling),
            ("n-grams, 8 nodes", lambda pages: NgramDrafter(8)),
        ):
            drafter = make(self._pages(MOST_NODES))
            step_ms, length = self._steps(drafter, name, nodes=MOST_NODES)
            self.row(f"step with {name}", step_ms, "ms", over_plain=round(step_ms / plain_ms, 3))
            self.row(
                f"    {length:.2f} tokens a step", length / step_ms * 1e3, "tok/s",
                times_plain=round(length / step_ms * plain_ms, 3),
            )  # fmt: skip

    def _draft_model(self, pages: int, right: float = 1.0) -> Drafter:
        """``right``: the share of tokens behind which it guesses what the target will choose."""
        order = torch.tensor(self.order)
        generator = torch.Generator().manual_seed(2)
        wrong = torch.rand(len(order), generator=generator) >= right
        order[wrong] = order[wrong].roll(1)
        sizes = REHEARSAL if self.args.rehearse else LLAMA_1B
        draft = HFModel(make_model(sizes, self.device, order), name="Llama-3.2-1B shape")
        return ModelDrafter(draft, draft.new_cache(pages), TreeShape.chain(5))

    # ---- by default ------------------------------------------------------------------------

    def by_default(self) -> None:
        """The controller that users get, which knows what steps cost and nothing of the drafter,
        beside plain decoding and always drafting five."""
        for batch in (1, 8):
            plain_ms, _ = self._steps(None, f"batch {batch}", batch, MOST_NODES)
            costs = None
            for what, make in (
                ("draft model that is always right", self._draft_model),
                ("draft model, right 7 times of 10", partial(self._draft_model, right=0.7)),
                ("draft model that is never right", partial(self._draft_model, right=0.0)),
                ("EAGLE-3 head that is never right", self._eagle),
                ("n-grams that are never found", lambda pages: NgramDrafter(8)),
            ):
                if costs is None or "draft model" not in what:
                    started = time.perf_counter()
                    costs = measure(self.target, Policy(), batch * 64, 16, make, max_batch=batch)
                    spent = time.perf_counter() - started
                    self.row(f"costs of steps with a {what}, measured", spent, "s")
                drafter = make(batch * self._pages(MOST_NODES))
                for name, controller in (
                    ("five at once", FixedController(5)),
                    ("by default", CostController(costs=costs)),
                ):
                    step_ms, length = self._steps(drafter, what, batch, MOST_NODES, controller)
                    self.row(
                        f"batch {batch}, {what}, {name}", batch * length / step_ms * 1e3, "tok/s",
                        times_plain=round(length / step_ms * plain_ms, 3), tokens=round(length, 2),
                    )  # fmt: skip

    def _eagle(self, pages: int) -> Drafter:
        with self.target.plain() as model, self._weights():
            layers = model.config.num_hidden_layers
            head = EagleHead(
                eagle_config(model.config, draft_vocab_size=min(32_000, len(self.order))),
                3,
                model,
                feature_layers=(0, layers // 2 - 1, layers - 1),
            )
        paged = PagedEagle(head.eval())
        return EagleDrafter(paged, paged.new_cache(pages, 16), depth=6, width=10, nodes=60)

    def _medusa(self, pages: int) -> Drafter:
        with self.target.plain() as model, self._weights():
            config = model.config
            heads = MedusaHeads(
                5, 1, config.hidden_size, config.vocab_size, target_head=model.lm_head, tied=False
            )
        return MedusaDrafter(heads.eval(), nodes=63)

    def _recycling(self, pages: int) -> Drafter:
        return RecyclingDrafter(len(self.order), self.device)

    @contextmanager
    def _weights(self) -> Iterator[None]:
        """Modules made here have the target's type and device."""
        default = torch.get_default_dtype()
        torch.set_default_dtype(self.target.dtype)
        try:
            with self.device:
                yield
        finally:
            torch.set_default_dtype(default)

    def _pages(self, nodes: int) -> int:
        """Pages of a sequence's K/V, with as many slots for a tree."""
        return (PROMPT_TOKENS + self.args.tokens + nodes) // 16 + 2

    def _engine(
        self,
        drafter: Drafter | None,
        batch: int = 1,
        nodes: int | None = None,
        controller: Controller | None = None,
    ) -> Engine:
        nodes = nodes or (drafter.max_nodes if drafter else 1)
        cache = self.target.new_cache(batch * self._pages(nodes))
        chosen = controller or FixedController(64)
        return Engine(self.target, cache, Policy(), chosen, drafter, batch)

    def _must_be_text(self, result: GenerationResult, what: str) -> None:
        if result.token_ids != self.text:
            same = next(
                (i for i, (a, b) in enumerate(zip(result.token_ids, self.text, strict=False))
                 if a != b), min(len(result.token_ids), len(self.text)),
            )  # fmt: skip
            raise AssertionError(f"{what}: token {same} is not the one that must come")

    def _follow(self, count: int) -> list[int]:
        text, token = [], self.prompt[-1]
        for _ in range(count):
            token = self.order[token]
            text.append(token)
        return text

    def _wait(self) -> None:
        if self.device.type == "cuda":
            torch.cuda.synchronize()

    # ---- by Hugging Face ---------------------------------------------------------------------

    def generate(self, plain_ms: float, name: str, **options: Any) -> None:
        """transformers' generate on the same weights."""
        ids = torch.tensor([self.prompt], device=self.device)

        def run(tokens: int) -> float:
            self._wait()
            started = time.perf_counter()
            output = model.generate(
                ids,
                attention_mask=torch.ones_like(ids),
                max_new_tokens=tokens,
                do_sample=False,
                eos_token_id=None,
                pad_token_id=0,
                **options,
            )
            self._wait()
            if output[0, PROMPT_TOKENS:].tolist() != self.text[:tokens]:
                raise AssertionError(f"{name} writes another text")
            return (time.perf_counter() - started) * 1e3

        few, many = 2, self.args.tokens
        with self.target.plain() as model, torch.inference_mode():
            run(many)
            times = [(run(many) - run(few)) / (many - few) for _ in range(self.args.rounds or 1)]
        step_ms = statistics.median(times)
        self.row(
            name, 1e3 / step_ms, "tok/s", step_ms=round(step_ms, 3),
            plain_over_it=round(step_ms / plain_ms, 3),
        )  # fmt: skip

    # ---- one forward ---------------------------------------------------------------------------

    def forwards(self) -> None:
        """A forward of N nodes: launch by launch, and as the engine runs it (from a graph)."""
        if self.device.type != "cuda":
            return
        cache = self.target.new_cache(32)
        for nodes in NODES:
            batch = self._forward_batch(nodes)
            self._time(f"forward of {nodes} nodes, launches", partial(self._launch, batch, cache))
            self._time(f"forward of {nodes} nodes", partial(self.target.forward, batch, cache))

    @torch.inference_mode()
    def _launch(self, batch: ForwardBatch, cache: KVCache) -> None:
        self.target._run(batch, cache, ())

    def _forward_batch(self, nodes: int) -> ForwardBatch:
        i32: dict[str, Any] = {"dtype": torch.int32, "device": self.device}
        length = PROMPT_TOKENS + 64
        parents = torch.tensor([[-1] + [(n - 1) // 2 for n in range(1, nodes)]], dtype=torch.int32)
        links = build_tree(parents.to(self.device))
        return ForwardBatch(
            tokens=torch.arange(nodes, device=self.device)[None],
            positions=(length + links.depth).to(torch.int64),
            seq_lens=torch.tensor([length], **i32),
            block_table=torch.arange(32, **i32)[None],
            ancestors=links.ancestors if nodes > 1 else None,
        )

    def _time(self, what: str, call: Callable[[], object], count: int = 10) -> None:
        for _ in range(3):
            call()
        times = []
        for _ in range(self.args.rounds or 1):
            start, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
            start.record()
            for _ in range(count):
                call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / count)
        ms = statistics.median(times)
        self.row(what, ms, "ms", gb_per_s=round(self.weight_bytes / ms / 1e6, 1))

    # ---- profiles ------------------------------------------------------------------------------

    def profiles(self) -> None:
        """Kernels per step, and how long the device had nothing to do."""
        self._profile("plain step", None)
        self._profile("step that verifies 64 nodes", ScriptedDrafter(self.order, 64, right=2))

    def _profile(self, what: str, drafter: Drafter | None, steps: int = 8) -> None:
        from torch.profiler import ProfilerActivity, profile

        on_device = self.device.type == "cuda"
        engine = self._engine(drafter)
        engine.add(Request(self.prompt, self.params))
        for _ in range(4):
            engine.step()
        activities = [ProfilerActivity.CUDA if on_device else ProfilerActivity.CPU]
        self._wait()
        with profile(activities=activities) as profiler:
            started = time.perf_counter()
            for _ in range(steps):
                engine.step()
            self._wait()
            wall_ms = (time.perf_counter() - started) * 1e3
        for request in list(engine.scheduler.running):
            engine.abort(request.request_id)
        events = [
            (event.name, event.time_range.elapsed_us())
            for event in profiler.events()
            if not on_device or event.device_type == torch.autograd.DeviceType.CUDA
        ]
        busy_ms = sum(us for _, us in events) / 1e3
        self.row(f"{what}: kernels and copies", len(events) / steps, "a step")
        if on_device:
            self.row(f"{what}: device idle", 100 * (1 - busy_ms / wall_ms), "%")
            by_name: dict[str, list[float]] = {}
            for name, us in events:
                by_name.setdefault(name, []).append(us)
            for name, each in sorted(by_name.items(), key=lambda kv: -sum(kv[1]))[:16]:
                count = len(each) / steps
                print(f"    {sum(each) / steps:9.1f} us a step, {count:6.1f} x  {name[:110]}")


def make_model(
    sizes: dict[str, int], device: torch.device, order: torch.Tensor
) -> LlamaForCausalLM:
    """The model in which token t is followed by ``order[t]``."""
    config = LlamaConfig(
        **sizes,
        max_position_embeddings=131_072,
        tie_word_embeddings=False,
        rope_parameters={
            "rope_type": "llama3",
            "rope_theta": 500_000.0,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 8192,
        },
    )
    torch.manual_seed(0)
    default = torch.get_default_dtype()
    torch.set_default_dtype(torch.bfloat16)
    try:
        with device:
            model = LlamaForCausalLM(config)
    finally:
        torch.set_default_dtype(default)
    with torch.no_grad():
        embeddings = model.model.embed_tokens.weight
        embeddings.normal_(std=16)  # what random layers add to it is about half as large
        # The row of the token that follows t is t's embedding.
        model.lm_head.weight[order.to(device)] = embeddings
    return model.eval()


def cycle(count: int) -> torch.Tensor:
    """A permutation in one cycle: no text repeats itself before it has seen every token."""
    ring = torch.randperm(count, generator=torch.Generator().manual_seed(0))
    order = torch.empty(count, dtype=torch.int64)
    order[ring] = ring.roll(-1)
    return order


def parts(bench: Bench) -> Iterator[tuple[str, Callable[[], object]]]:
    """What is measured, the most important first."""
    plain_ms = 0.0

    def plain() -> None:
        nonlocal plain_ms
        plain_ms = bench.plain()

    yield "plain", plain
    yield "forwards", bench.forwards
    yield "speculation", lambda: bench.speculation(plain_ms)
    yield "steps by nodes", bench.steps_by_nodes
    yield "drafters", lambda: bench.drafters(plain_ms)
    yield "by default", bench.by_default
    yield "profiles", bench.profiles
    yield "generate", lambda: bench.generate(plain_ms, "generate, eager")
    yield "batches", bench.batches
    yield (
        "compiled",
        lambda: bench.generate(
            plain_ms, "generate, static cache, compiled", cache_implementation="static"
        ),
    )


def main(argv: Sequence[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument(
        "--rows", type=Path, metavar="FILE.jsonl", help="append each row as it comes"
    )
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--rehearse", action="store_true", help="two small layers, one round")
    parser.add_argument("--only", nargs="*", default=(), metavar="PART")
    args = parser.parse_args(argv)
    if args.rehearse:
        args.rounds, args.tokens = 0, min(args.tokens, 24)
    print(json.dumps(describe_environment()))
    bench = Bench(args)
    failed = 0
    for name, run in parts(bench):
        if args.only and name not in args.only and name != "plain":
            continue
        try:
            run()
        except Exception as error:  # the other rows are still worth having
            failed += 1
            print(f"{name} failed: {type(error).__name__}: {error}", flush=True)
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
