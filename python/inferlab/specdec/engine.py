"""The engine: schedule -> step -> emit, until every request is done."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Callable, Iterable
from collections.abc import Sequence as SequenceOf
from itertools import count
from typing import Any

import numpy as np
import torch

from inferlab import kernels
from inferlab.models import (
    ForwardBatch,
    ForwardOutput,
    KVCache,
    TargetModel,
    use_threads_that_exist,
)
from inferlab.models.transfer import upload
from inferlab.scheduler import (
    NewText,
    PageAllocator,
    Scheduler,
    Sequence,
    StopStrings,
    special_tokens,
    text_decoder,
)
from inferlab.specdec import step
from inferlab.specdec.batch import Batch
from inferlab.specdec.controllers import Controller, StepObservation
from inferlab.specdec.drafters import Drafter
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import NO_DRAFT, Budget
from inferlab.types import GenerationResult, SamplingParams

PREFILL_CHUNK = 512


class Interrupted(KeyboardInterrupt):
    """Ctrl-C during a generation. ``results`` holds what every request had produced by then."""

    def __init__(self, results: list[Any]) -> None:
        super().__init__("generation interrupted")
        self.results = results


class Engine:
    """Decodes requests in a batch, with or without speculation: plain decoding is a tree of N = 1.

    Args:
        target: the model that decides.
        cache: its K/V pages.
        policy: which draft tokens are kept.
        controller: how much is drafted per step.
        drafter: who drafts; None decodes plainly.
        max_batch: sequences that run together at most.
    """

    def __init__(
        self,
        target: TargetModel,
        cache: KVCache,
        policy: Policy,
        controller: Controller,
        drafter: Drafter | None = None,
        max_batch: int = 32,
    ) -> None:
        self.target = target
        self.cache = cache
        self.policy = policy
        self.controller = controller
        self.drafter = drafter
        self.clock = step.Clock()
        tree_slots = drafter.max_nodes if drafter is not None else 1
        self._ladder = drafter.ladder() if drafter is not None else ()
        self._feature_layers = drafter.feature_layers if drafter is not None else ()
        self.scheduler = Scheduler(
            PageAllocator(cache.num_pages, cache.page_size), max_batch, tree_slots
        )
        self._ids = count()
        self._process = os.getpid()
        self._lock = threading.Lock()
        self._generating: int | None = None  # the thread that holds the lock
        self._batch: Batch | None = None
        self._special_tokens: dict[int, str] | None = None
        self._clock_at_start: dict[int, dict[str, float]] = {}

    def submit(self, prompt: SequenceOf[int], params: SamplingParams) -> Sequence:
        """Queues a request.

        Raises:
            ValueError: empty prompt, token ids outside the vocabulary, stop strings without a
                tokenizer, more tokens than the model's context or the K/V cache can hold.
        """
        if not prompt:
            raise ValueError("prompt is empty; it must have at least one token")
        for name, ids in (
            ("prompt", prompt),
            ("stop_token_ids", params.stop_token_ids),
            ("logit_bias", params.logit_bias or ()),
        ):
            outside = [t for t in ids if not 0 <= t < self.target.vocab_size]
            if outside:
                raise ValueError(
                    f"{name} contains token id {outside[0]}; ids of {self.target.name} are in "
                    f"[0, {self.target.vocab_size})"
                )
        if params.stop and self.target.tokenizer is None:
            raise ValueError(
                f"stop is {params.stop!r}, but {self.target.name} has no tokenizer to find texts "
                f"with; give stop_token_ids, or add tokenizer.json to the model's directory"
            )
        limit = self.target.context_length
        if limit is not None and len(prompt) + params.max_tokens > limit:
            room = limit - len(prompt)
            remedy = f" or ask for at most {room} new tokens" if room > 0 else ""
            raise ValueError(
                f"prompt ({len(prompt)} tokens) and max_tokens ({params.max_tokens}) exceed the "
                f"context of {self.target.name} ({limit} tokens); shorten the prompt{remedy}"
            )
        sequence = Sequence(next(self._ids), prompt, params, time.perf_counter())
        sequence.stop_strings = self._stop_strings(prompt, params)
        self.scheduler.add(sequence)
        return sequence

    @torch.inference_mode()
    def step(self) -> list[Sequence]:
        """Admits, decodes one step, emits. Returns the sequences that finished in it."""
        admitted = self.scheduler.admit()
        self.clock.start()
        for sequence in admitted:
            self._clock_at_start[sequence.request_id] = dict(self.clock.totals)
            self._prefill(sequence)
        if admitted:
            self._batch = None
        done = self._retire()
        if self.scheduler.running:
            self._reread()
            self._decode()
            done += self._retire()
        return done

    def generate(
        self,
        requests: Iterable[tuple[SequenceOf[int], SamplingParams]],
        on_finish: Callable[[int, GenerationResult], None] | None = None,
    ) -> list[GenerationResult]:
        """Runs requests to their end; results in the order of the requests.

        One call at a time: from several threads each waits for the one before it.

        Args:
            requests: prompt token ids and parameters of each.
            on_finish: called with index and result as requests finish.

        Raises:
            Interrupted: on Ctrl-C, with the partial results.
            RuntimeError: called from ``on_finish``; or in a child of `fork` that cannot go on with
                what it was given: a model on a GPU, or an engine in the middle of another call.
        """
        self._enter_process()
        if self._generating == threading.get_ident():
            raise RuntimeError(
                "generate was called from within its own callback; collect what is to be done and "
                "call it when the first call has returned"
            )
        with self._lock:
            self._generating = threading.get_ident()
            try:
                return self._generate(requests, on_finish)
            finally:
                self._generating = None

    def _enter_process(self) -> None:
        """Makes the engine usable in a child of `fork`, or says that it is not."""
        use_threads_that_exist()
        if self._process == os.getpid():
            return
        if self.target.device.type != "cpu" or self._generating is not None:
            what = (
                "is in the middle of another call"
                if self.target.device.type == "cpu"
                else f"has its model on {self.target.device}"
            )
            raise RuntimeError(
                f"this process was forked from one whose engine {what}, and cannot use it; load "
                f"the model in the child, or start it with multiprocessing's 'spawn'"
            )
        self._process = os.getpid()
        self._lock = threading.Lock()

    def _generate(
        self,
        requests: Iterable[tuple[SequenceOf[int], SamplingParams]],
        on_finish: Callable[[int, GenerationResult], None] | None,
    ) -> list[GenerationResult]:
        sequences: list[Sequence] = []
        results: dict[int, GenerationResult] = {}
        try:
            for prompt, params in requests:
                sequences.append(self.submit(prompt, params))
            index_of = {s.request_id: i for i, s in enumerate(sequences)}
            while self.scheduler.has_work:
                for sequence in self.step():
                    index = index_of[sequence.request_id]
                    results[index] = self._result(sequence)
                    if on_finish is not None:
                        on_finish(index, results[index])
        except KeyboardInterrupt as interrupt:
            self.abort("interrupted")
            for i, sequence in enumerate(sequences):
                results.setdefault(i, self._result(sequence))
            raise Interrupted([results[i] for i in range(len(sequences))]) from interrupt
        except BaseException:
            self.abort("error")
            raise
        return [results[i] for i in range(len(sequences))]

    def abort(self, reason: str) -> None:
        """Ends everything that waits or runs and frees its pages."""
        for sequence in (*self.scheduler.waiting, *self.scheduler.running):
            sequence.finish_reason = sequence.finish_reason or reason
        self.scheduler.waiting.clear()
        self._retire()
        self._batch = None

    def _prefill(self, sequence: Sequence) -> None:
        """The prompt, in chunks; the last chunk's logits give the first token."""
        batch = Batch.of([sequence], self.target)
        output = self._read(batch, sequence.prompt, len(sequence.prompt), self._after_chunk)
        position = batch.seq_lens[:, None].to(torch.int64)
        drawn = kernels.sample(
            output.logits, position, batch.sampling, allowed_vocab=batch.allowed_vocab
        )
        token = int(drawn[0, 0, 0])
        self._emit(sequence, [token])
        self.clock.lap("prefill")

    def _after_chunk(self, batch: Batch, start: int, output: ForwardOutput) -> None:
        """Counts a chunk of a prompt and shows it to the drafter."""
        (sequence,) = batch.sequences
        sequence.num_cached = min(start + PREFILL_CHUNK, len(sequence.prompt))
        if self.drafter is not None:
            self.drafter.prefill(batch, start, output)

    def _read(
        self,
        batch: Batch,
        tokens: SequenceOf[int],
        length: int,
        then: Callable[[Batch, int, ForwardOutput], None] | None = None,
    ) -> ForwardOutput:
        """Forwards a text from its start, in chunks; logits of its last token, [1, 1, V].

        Args:
            batch: of the one sequence, with no token cached.
            tokens: the text.
            length: of what `generate` reads in the forward that these tokens belong to.
            then: called after each chunk with the chunk's start.
        """
        (sequence,) = batch.sequences
        whole = torch.full_like(batch.seq_lens, length)
        for start in range(0, len(tokens), PREFILL_CHUNK):
            chunk = tokens[start : start + PREFILL_CHUNK]
            positions = torch.arange(start, start + len(chunk), device=batch.device)
            output = self.target.forward(
                ForwardBatch(
                    tokens=upload([chunk], np.int64, batch.device),
                    positions=positions[None],
                    seq_lens=batch.seq_lens,
                    block_table=batch.block_table,
                    last_only=True,
                    prompt_lens=whole,
                ),
                self.cache,
                self._feature_layers,
            )
            batch.seq_lens += len(chunk)
            sequence.stats.prefill_forwards += 1
            if then is not None:
                then(batch, start, output)
        return output

    def _reread(self) -> None:
        """Reads texts anew that have just reached the target's ``reread_length``, as `generate`
        does in the forward for the token behind it."""
        length = self.target.reread_length
        if length is None:
            return
        for sequence in self.scheduler.running:
            if sequence.num_cached == length:
                sequence.num_cached = 0
                batch = Batch.of([sequence], self.target)
                self._read(batch, sequence.tokens[:length], length + 1)
                sequence.num_cached = length
                self.clock.lap("prefill")

    def _decode(self) -> None:
        """One step for the running batch."""
        batch = self._batch
        if batch is None:
            batch = self._batch = Batch.of(list(self.scheduler.running), self.target)
        budget = self._choose_budget(batch)
        drafting = budget != NO_DRAFT
        lagging = drafting and self.drafter is not None and self.drafter.is_lagging(batch)
        spent = self.clock.lap("commit")
        tree = step.propose(self.drafter, batch, budget)
        spent += self.clock.lap("draft")
        output = step.forward(self.target, self.cache, batch, tree, self._feature_layers)
        spent += self.clock.lap("verify")
        walk = step.verify(self.policy, output.logits, tree, batch)
        spent += self.clock.lap("accept")
        step.commit(self.cache, self.drafter, batch, tree, walk, output)
        spent += self.clock.lap("commit")
        outcomes = step.read(walk)
        spent += self.clock.lap("accept")
        for i, (sequence, outcome) in enumerate(zip(batch.sequences, outcomes, strict=True)):
            emitted = self._emit(sequence, outcome.tokens)
            accepted = min(outcome.accepted, emitted)
            sequence.stats.record(tree.depths[i], tree.node_counts[i] - 1, accepted, emitted)
            if self.drafter is not None:
                self.drafter.settle(sequence, tree, emitted)
            sequence.num_cached = len(sequence.tokens) - 1
        if not any(s.finished for s in batch.sequences):
            batch.refresh()
        spent += self.clock.lap("commit")
        visited = [tree.ranks_of(outcome.nodes) for outcome in outcomes]
        self.controller.observe(
            StepObservation(len(batch), budget, spent, list(tree.depths), visited, lagging)
        )

    def _choose_budget(self, batch: Batch) -> Budget:
        if self.drafter is None:
            return NO_DRAFT
        levels, nodes = self.controller.choose(len(batch), self._ladder)
        if levels == 0:
            return NO_DRAFT
        useful = max(s.remaining for s in batch.sequences) - 1
        levels = min(levels, self.drafter.max_depth, useful)
        return Budget(levels, nodes) if min(levels, nodes) > 0 else NO_DRAFT

    def _emit(self, sequence: Sequence, tokens: list[int]) -> int:
        """Appends tokens until one ends the sequence; returns how many were kept."""
        params = sequence.params
        if sequence.first_token_at is None:
            sequence.first_token_at = time.perf_counter()
        for emitted, token in enumerate(tokens):
            if token < 0:
                sequence.finish_reason = "error"
                sequence.error = (
                    f"the logits of {self.target.name} at position {len(sequence.tokens)} are NaN "
                    f"or all -inf; no token can be chosen from them"
                )
                return emitted
            sequence.tokens.append(token)
            stopped = sequence.stop_strings is not None and sequence.stop_strings.add(token)
            if sequence.num_output > params.min_tokens or params.min_tokens == 0:
                if token in params.stop_token_ids or (
                    not params.ignore_eos and token in self.target.eos_token_ids
                ):
                    sequence.finish_reason = "stop"
                elif stopped:
                    sequence.finish_reason = "stop_string"
            if sequence.finish_reason is None and sequence.remaining == 0:
                sequence.finish_reason = "length"
            if sequence.finished:
                return emitted + 1
        return len(tokens)

    def _retire(self) -> list[Sequence]:
        done = self.scheduler.retire()
        if done:
            self._batch = None
            now = time.perf_counter()
            for sequence in done:
                if self.drafter is not None:
                    self.drafter.release(sequence)
                before = self._clock_at_start.pop(sequence.request_id, self.clock.totals)
                spent = {p: t - before[p] for p, t in self.clock.totals.items()}
                total = (now - sequence.arrived_at) * 1e3
                spent["rest"] = max(total - sum(spent.values()), 0.0)
                sequence.timings_ms = spent
                sequence.timings_ms["total"] = total
        return done

    def _result(self, sequence: Sequence) -> GenerationResult:
        timings = dict(sequence.timings_ms)
        latency = timings.pop("total", (time.perf_counter() - sequence.arrived_at) * 1e3)
        first = sequence.first_token_at
        return GenerationResult(
            token_ids=sequence.output,
            finish_reason=sequence.finish_reason or "interrupted",
            stats=sequence.stats,
            latency_ms=latency,
            first_token_ms=(first - sequence.arrived_at) * 1e3 if first is not None else latency,
            timings_ms=timings,
            text=self._text(sequence),
            error=sequence.error,
        )

    def _text(self, sequence: Sequence) -> str:
        """What the new tokens add to the prompt's text, cut before the stop string."""
        if self.target.tokenizer is None:
            return ""
        text = NewText(text_decoder(self.target.tokenizer), sequence.prompt).of(sequence.output)
        if sequence.finish_reason == "stop_string" and sequence.stop_strings is not None:
            return sequence.stop_strings.cut(text)
        return text

    def _stop_strings(self, prompt: SequenceOf[int], params: SamplingParams) -> StopStrings | None:
        if not params.stop:
            return None
        if self._special_tokens is None:
            self._special_tokens = special_tokens(self.target.tokenizer)
        text = NewText(text_decoder(self.target.tokenizer), prompt)
        return StopStrings(params.stop, text, self._special_tokens, params.min_tokens)
