"""The engine: plan -> read -> step -> emit, until every request is done."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import closing, nullcontext
from itertools import count
from weakref import WeakMethod

import torch

from inferlab.errors import Interrupted
from inferlab.models import ForwardBatch, ForwardOutput, KVCache, TargetModel, allowed_vocab
from inferlab.scheduler import Chunk, PageAllocator, Plan, Request, Scheduler
from inferlab.specdec import constrained, step
from inferlab.specdec.batch import Batch
from inferlab.specdec.constrained import Constrained
from inferlab.specdec.control import Choice, Controller, Outlook, StepObservation
from inferlab.specdec.drafters import Drafter
from inferlab.specdec.emission import Emission
from inferlab.specdec.logprobs import token_logprobs
from inferlab.specdec.members import Members
from inferlab.specdec.policies import Policy
from inferlab.specdec.reading import Reading
from inferlab.specdec.recording import Recorder
from inferlab.specdec.text import NewText, StopStrings, special_tokens, text_decoder
from inferlab.specdec.tree import NO_DRAFT, Budget, DraftTree
from inferlab.specdec.turns import Turns
from inferlab.specdec.walk import Outcome, came_true
from inferlab.types import GenerationResult, SamplingParams, TokenLogprobs, check_room

UNTOLD = 32
"""Steps decided on at once where no drafter hears of any text."""
ASLEEP = Choice(NO_DRAFT)


class Engine:
    """Decodes requests in a batch, with or without speculation: plain decoding is a tree of N = 1.

    Every token comes out of a step. A text is read up to its last token, which is the root of the
    first step and rides in the same forward; so a new prompt, and a text that lost its pages and is
    read anew, are one case.

    ``add``, ``step`` and ``abort`` are for one thread; ``run`` and ``generate`` may be called from
    several, whose requests then run in one batch.

    Args:
        target: the model that decides.
        cache: its K/V pages.
        policy: which draft tokens are kept.
        controller: how much is drafted per step.
        drafter: who drafts; None decodes plainly.
        max_batch: requests that run together at most.
        recorder: keeps what each step did, to be replayed.
        shares_prefixes: texts that begin alike share K/V pages, of texts that have ended as well.
            Weights must not be changed meanwhile.

    Attributes:
        before_forward: called when the target is about to compute, and others may have the
            interpreter: the moment to wake them.
    """

    def __init__(
        self,
        target: TargetModel,
        cache: KVCache,
        policy: Policy,
        controller: Controller,
        drafter: Drafter | None = None,
        max_batch: int = 32,
        recorder: Recorder | None = None,
        shares_prefixes: bool = False,
    ) -> None:
        self.recorder = recorder
        self.target = target
        self.cache = cache
        self.policy = policy
        self.controller = controller
        self.drafter = drafter
        self.clock = step.Clock()
        self.before_forward: Callable[[], None] | None = None
        tree_slots = drafter.max_nodes if drafter is not None else 1
        self._ladder = drafter.ladder() if drafter is not None else ()
        # Where a text's length changes how it is read, its beginning is not that of a longer one.
        self.scheduler = Scheduler(
            PageAllocator(cache.num_pages, cache.page_size),
            max_batch,
            tree_slots,
            shares=shares_prefixes and target.reread_length is None,
            adopt=_weakly(self._adopt),  # an engine goes, with its cache, when nobody has it
        )
        self._follows = True  # whether the drafter heard of the last text
        self._ids = count()
        self._turns = Turns(self)
        self._batch: Batch | None = None
        self._members: Members | None = None  # the last, of some of a batch
        self._asleep = 0  # steps of this batch, of which the controller has decided already
        self._slept: list[float] = []  # ms of those that were
        self._slept_heard = False  # whether the drafter heard of them
        self._unheard: set[int] = set()  # requests that the drafter was not told of
        self._stops: dict[int, StopStrings] = {}
        self._special_tokens: dict[int, str] | None = None
        self._clock_at_start: dict[int, dict[str, float]] = {}

    def check(self, request: Request) -> None:
        """Whether a request could run.

        Raises:
            ValueError: empty prompt, token ids outside the vocabulary, stop strings without a
                tokenizer, more tokens than the model's context or the K/V cache can hold.
        """
        prompt, params = request.prompt, request.params
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
        check_room("max_tokens", len(prompt), params.max_tokens, limit, self.target.name)
        self.scheduler.check(request)

    def add(self, request: Request) -> Request:
        """Queues a request and gives it its number. Raises ValueError as `check` does."""
        self.check(request)
        request.request_id = next(self._ids)
        request.arrived_at = time.perf_counter()
        if request.params.stop:
            self._stops[request.request_id] = self._stop_strings(request)
        self.scheduler.add(request)
        if 0 in request.forced:
            self._emit(request, [request.forced[0]])
            if request.params.logprobs is not None:
                request.logprobs.append(TokenLogprobs(0.0, []))
        if request.max_draft == 0:
            self._unheard.add(request.request_id)
        return request

    @torch.inference_mode()
    def step(self) -> list[Emission]:
        """Reads on, decodes one step, and says which requests have new tokens or have ended."""
        if self.recorder is None:
            return self._step()
        with self.recorder.timed(self.clock, self._is_idle):
            return self._step()

    def _step(self) -> list[Emission]:
        started = time.perf_counter()
        self.scheduler.expire(started)
        done = self._retire()  # of those that ended before their first step, or by the clock
        self._restart_outgrown()
        plan = self.scheduler.plan()
        before_ms = (time.perf_counter() - started) * 1e3
        self.clock.start("prefill" if plan.chunks else "commit")
        for request in plan.preempted:
            self._forget(request)
        for request in plan.admitted:
            self._clock_at_start.setdefault(request.request_id, dict(self.clock.totals))
        if plan.grown and self._batch is not None:
            self._batch.refresh_pages()
            if self._members is not None:
                self._members.batch.refresh_pages()
        if plan.admitted:
            self.target.notice_changes()
        rode = self._read(plan) if plan.chunks else False
        decoded = self._decode(plan.decode) if plan.decode and not rode else None
        emissions = {r.request_id: Emission.of(r) for r in (*plan.started, *plan.decode)}
        if decoded is not None:
            # All of a step counts, as it does where steps were measured beforehand.
            observed, asleep = decoded
            spent = before_ms + observed.step_ms + self.clock.since_lap()
            self._tell(observed._replace(step_ms=spent), asleep)
        for request in (*done, *self._retire()):
            emissions.setdefault(request.request_id, Emission.of(request))
        return list(emissions.values())

    def abort(self, request_id: int, reason: str = "aborted") -> Emission | None:
        """Ends a request, waiting or running, and frees its pages; None if there is no such."""
        for request in (*self.scheduler.running, *self.scheduler.waiting):
            if request.request_id == request_id:
                request.finish_reason = request.finish_reason or reason
                self._retire()
                if self.recorder is not None and self._is_idle():
                    self.recorder.write()
                return Emission.of(request)
        return None

    def _is_idle(self) -> bool:
        return not self.scheduler.running and not self.scheduler.waiting

    def recover(self) -> None:
        """After a step that did not come to its end: what runs is read anew from its tokens."""
        self._batch = None
        for request in reversed(list(self.scheduler.running)):
            self.scheduler.preempt(request)

    def run(self, requests: Sequence[Request]) -> Generator[Emission]:
        """Runs requests and yields what they get, as it comes; closing the iterator aborts the
        rest. Raises as `generate` does."""
        yield from self._turns.run(requests)

    def generate(
        self,
        requests: Iterable[Request | tuple[Sequence[int], SamplingParams]],
        on_finish: Callable[[int, GenerationResult], None] | None = None,
    ) -> list[GenerationResult]:
        """Runs requests to their end; results in the order of the requests.

        Args:
            requests: new requests, or prompt token ids and parameters of each.
            on_finish: called with index and result as requests finish.

        Raises:
            ValueError: one of the requests can not run (see `check`); none has run then.
            Interrupted: on Ctrl-C, with the partial results.
            RuntimeError: in a child of `fork` that cannot go on with what it was given: a model on
                a GPU, or an engine in the middle of a step.
        """
        made = [r if isinstance(r, Request) else Request(*r) for r in requests]
        index_of = {request: i for i, request in enumerate(made)}
        results: dict[Request, GenerationResult] = {}
        try:
            with closing(self.run(made)) as emissions:
                for emission in emissions:
                    request = emission.request
                    if emission.finished:
                        results[request] = self.result(request)
                        if on_finish is not None:
                            on_finish(index_of[request], results[request])
        except KeyboardInterrupt as interrupt:
            for request in made:
                if request not in results:
                    results[request] = self.result(request)
                    results[request].finish_reason = "interrupted"
            raise Interrupted([results[request] for request in made]) from interrupt
        return [results[request] for request in made]

    def result(self, request: Request) -> GenerationResult:
        """What a request has come to, also before its end."""
        timings = dict(request.timings_ms)
        latency = timings.pop("total", (time.perf_counter() - request.arrived_at) * 1e3)
        first = request.first_token_at
        return GenerationResult(
            token_ids=request.output,
            finish_reason=request.finish_reason or "interrupted",
            stats=request.stats,
            latency_ms=latency,
            first_token_ms=(first - request.arrived_at) * 1e3 if first is not None else latency,
            timings_ms=timings,
            text=self._text(request),
            error=request.error,
            logprobs=request.logprobs if request.params.logprobs is not None else None,
        )

    def _restart_outgrown(self) -> None:
        """Has texts read anew that have just reached the target's ``reread_length``, as `generate`
        does in the forward for the token behind it."""
        length = self.target.reread_length
        if length is None:
            return
        for request in self.scheduler.running:
            if request.num_cached == length >= request.read_length and request.is_read:
                request.num_cached = 0
                request.read_length = length + 1
                self._forget(request)

    def _forget(self, request: Request) -> None:
        """Lets go of what is known of a request but its tokens."""
        self._wake()
        self._batch = self._members = None
        if request.max_draft != 0 or request.finished:
            self._unheard.discard(request.request_id)
        if self.drafter is not None:
            self.drafter.release(request)

    def _read(self, plan: Plan) -> bool:
        """Parts of texts, in one forward, which the drafter hears of. Those that come to their root
        get a token: first tokens do not wait for drafts. So do the roots of those that decode,
        plainly, where they ride in it; returns whether they did."""
        told = self._is_told(plan)
        drafter = self.drafter if told else None
        chunks = plan.chunks
        riding = plan.decode if self._may_ride(plan, told) else []
        if riding:
            self._wake()
            self._batch = self._members = None
            chunks = [*chunks, *(Chunk(r, r.num_cached, r.num_cached, True) for r in riding)]
        reading = Reading(chunks, self.target.device)
        layers = drafter.feature_layers if drafter is not None else ()
        output = self._forward(reading.batch, layers)
        for chunk in plan.chunks:
            chunk.request.num_cached = chunk.stop
            chunk.request.stats.prefill_forwards += not chunk.root  # else it is a step's
        if drafter is not None:
            drafter.prefill(reading, output)
        self.clock.lap("prefill", "accept" if plan.started or riding else None)
        if started := [*plan.started, *riding]:
            batch = Batch.of(started, self.target)
            tree = DraftTree.root_only(batch.roots)
            grammars = Constrained.of(batch, tree)
            self._conclude(batch, tree, reading.at_roots(output), drafter, grammars=grammars)
        return bool(riding)

    def _forward(self, rows: ForwardBatch, layers: tuple[int, ...]) -> ForwardOutput:
        """The target's logits, and the hidden states that the drafter needs; K/V of all rows goes
        behind the committed."""
        if self.before_forward is not None:
            self.before_forward()
        return self.target.forward(rows, self.cache, layers)

    def _may_ride(self, plan: Plan, told: bool) -> bool:
        """Whether those that decode take part in the forward that reads. Where rows are packed they
        cost next to nothing there, less for a token than any draft; but a drafter that must hear of
        their steps would have to be told of them apart."""
        if self.recorder is not None or self.target.device.type != "cpu":
            return False
        if self.drafter is None or not self.drafter.hears_all:
            return True
        return not told and all(r.request_id in self._unheard for r in plan.decode)

    def _is_told(self, plan: Plan) -> bool:
        """Whether the drafter hears of the chunks. It hears of all or none; of one whose beginning
        it was not told it is of no use."""
        drafter = self.drafter
        if drafter is None or not drafter.hears_all:
            return drafter is not None
        begun = {c.request.request_id for c in plan.chunks if c.start > c.request.read_from}
        new = [c.request for c in plan.chunks if c.request.request_id not in begun]
        told = not begun <= self._unheard
        if not told and new:
            tokens = sum(request.unread + 1 for request in new)
            told = self.controller.follows(tokens, self._outlook([*plan.decode, *new]))
        if not told:
            self._unheard |= {request.request_id for request in new}
        if new:
            self._follows = told
        return told

    def _adopt(self, request: Request) -> int:
        """How many tokens in shared pages are not read anew: all of them, but those that a drafter
        must hear of, while texts are told to it at all."""
        drafter = self.drafter
        held = request.num_cached if drafter is None else drafter.adopt(request)
        if drafter is not None and held < request.num_cached and not self._follows:
            self._unheard.add(request.request_id)
            return request.num_cached
        return held

    def _decode(self, requests: list[Request]) -> tuple[StepObservation, bool]:
        """One step for requests that are read up to their roots; what the controller is to hear of
        it, and whether it had decided on it together with others."""
        batch = self._batch
        if batch is None or batch.requests != requests:
            self._wake()
            batch = self._batch = Batch.of(requests, self.target)
        members = self._told(batch)
        asleep = self._asleep > 0
        choice, lagging = (ASLEEP, False) if asleep else self._choose(batch, members)
        if choice.budget != NO_DRAFT and choice.members is not None:
            members = self._members_of(batch, choice.members)
        drafter = self.drafter
        if (members is not None and not members.places) or (
            choice.budget == NO_DRAFT and drafter is not None and not drafter.hears_all
        ):
            drafter = None
        spent = self.clock.lap("commit", "draft")
        if drafter is not None and choice.budget != NO_DRAFT:
            drafted_for = batch if members is None else members.batch
            judge = choice.judge
            if self.recorder is not None:
                judge = self.recorder.listen(drafter, judge)
            tree = own = drafter.propose(drafted_for, choice.budget, judge)
            if any(r.max_draft is not None for r in drafted_for.requests):
                tree = own = own.capped([r.max_draft for r in drafted_for.requests])
            if members is not None:
                tree = members.spread(own)
        else:
            tree = own = DraftTree.root_only(batch.roots)
        draft_ms = self.clock.lap("draft", "verify")
        grammars = Constrained.of(batch, tree)
        if grammars is not None and grammars.cut(self.policy) and members is not None:
            own.cut([tree.node_counts[place] for place in members.places])
        layers = drafter.feature_layers if drafter is not None else ()
        output = self._forward(step.rows_of(self.target, batch, tree), layers)
        spent += draft_ms + self.clock.lap("verify", "accept")
        outcomes, after = self._conclude(
            batch, tree, output, drafter, members, own, choice.budget, lagging, grammars
        )
        self._asleep = self._asleep - 1 if asleep else choice.steps - 1
        if choice.gives_up and drafter is not None and drafter.hears_all:
            self._unheard |= {request.request_id for request in requests}
            self._members = None
        visited = [tree.ranks_of(outcome.nodes) for outcome in outcomes]
        seen = came_true(tree, outcomes) if self.policy.is_match else ()
        observed = StepObservation(
            len(batch),
            choice.budget,
            spent + after,
            list(tree.depths),
            visited,
            lagging,
            step.num_rows(tree, batch.device),
            draft_ms,
            drafter is not None,
            seen,
        )
        return observed, asleep

    def _tell(self, observed: StepObservation, asleep: bool) -> None:
        """The controller hears of a step, or, where it sleeps, of several together."""
        if not asleep:
            self.controller.observe(observed)
            return
        self._slept.append(observed.step_ms)
        self._slept_heard = observed.heard
        if self._asleep == 0:
            self._wake()

    def _wake(self) -> None:
        """Tells the controller of the steps that it did not hear of."""
        if self._slept and self._batch is not None:
            self.controller.rested(len(self._batch), self._slept, self._slept_heard)
        self._slept = []
        self._asleep = 0

    def _conclude(
        self,
        batch: Batch,
        tree: DraftTree,
        output: ForwardOutput,
        drafter: Drafter | None,
        members: Members | None = None,
        own: DraftTree | None = None,
        budget: Budget | None = None,
        lagging: bool = False,
        grammars: Constrained | None = None,
    ) -> tuple[list[Outcome], float]:
        """What follows the forward; returns what was kept, and the ms that it took.

        Args:
            drafter: who hears of it.
            members: of whom it hears, where not of all.
            own: through which trees these walked.
            budget, lagging: for the recorder; None means first tokens.
            grammars: of the requests that have one.
        """
        with nullcontext() if grammars is None else grammars.masked(output.logits):
            walk = step.verify(self._policies(batch), output, tree, batch)
            spent = self.clock.lap("accept", "commit")
            if self.recorder is not None:
                self.recorder.look(batch, tree, output)
                self.clock.start("commit")
        step.commit(self.cache, batch, walk)
        if members is None:
            if drafter is not None:
                drafter.commit(batch, walk)
            self._members = None
        elif drafter is not None and own is not None:
            part = members.walks(walk, own)
            drafter.commit(members.batch, part)
            members.batch.advance(part)
        batch.advance(walk)
        spent += self.clock.lap("commit", "accept")
        outcomes = walk.read()
        spent += self.clock.lap("accept", "commit")
        if members is not None:
            members.heard(walk)
        emitted_tokens = []
        for i, (request, outcome) in enumerate(zip(batch.requests, outcomes, strict=True)):
            emitted = self._emit(request, outcome.tokens)
            if request.params.logprobs is not None and emitted:
                request.logprobs += self._logprobs(request, output.logits[i], outcome, emitted)
            accepted = min(outcome.accepted, emitted)
            request.stats.record(tree.depths[i], tree.node_counts[i] - 1, accepted, emitted)
            request.num_drafted += accepted
            request.num_cached = len(request.tokens) - 1
            emitted_tokens.append(emitted)
        if not any(r.finished for r in batch.requests):
            batch.refresh()
            if members is not None:
                members.batch.refresh()
        spent += self.clock.lap("commit")
        if self.recorder is not None:
            self.recorder.keep(batch, tree, outcomes, emitted_tokens, self.clock, budget, lagging)
            self.clock.start()
        return outcomes, spent

    def _policies(self, batch: Batch) -> list[Policy]:
        """Of each sequence; one, where that is everybody's."""
        if all(request.acceptance is None for request in batch.requests):
            return [self.policy]
        return [
            self.policy if request.acceptance is None else Policy(*request.acceptance)
            for request in batch.requests
        ]

    def _logprobs(
        self, request: Request, logits: torch.Tensor, outcome: Outcome, emitted: int
    ) -> list[TokenLogprobs]:
        """Of the last ``emitted`` tokens. ``logits``: [N, V], at the nodes of its tree."""
        rows = logits[outcome.nodes[:emitted]]
        most = request.params.logprobs or 0
        return token_logprobs(rows, request.tokens[-emitted:], most, allowed_vocab(self.target))

    def _told(self, batch: Batch) -> Members | None:
        """Whose steps the drafter hears of; None: all."""
        if not self._unheard:
            return None
        told = [i for i, r in enumerate(batch.requests) if r.request_id not in self._unheard]
        return None if len(told) == len(batch) else self._members_of(batch, told)

    def _members_of(self, batch: Batch, places: Sequence[int]) -> Members:
        members = self._members
        if members is None or not members.is_of(batch, places):
            requests = [batch.requests[place] for place in places]
            own = Batch.of(requests, self.target) if requests else batch
            members = self._members = Members(batch, places, own)
        return members

    def _choose(self, batch: Batch, told: Members | None) -> tuple[Choice, bool]:
        """What to draft, and whether the drafter must catch up for it."""
        drafter = self.drafter
        if drafter is None or (told is not None and not told.places):
            return Choice(NO_DRAFT, steps=UNTOLD), False
        unread = drafter.unread(batch if told is None else told.batch)
        lagging = max(unread)
        if drafter.hears_all:  # it is never far behind
            unread = []
        outlook = self._outlook(batch.requests, unread, None if told is None else told.places)
        if batch.sampling.changes_logits:  # with each token, so what is written tells no drafter
            outlook = outlook._replace(written=())
        choice = self.controller.choose(outlook)
        levels, nodes = choice.budget
        if levels == 0:
            return choice._replace(budget=NO_DRAFT), False
        able = batch if told is None else told.batch
        useful = max(_useful(request) for request in able.requests)
        levels = min(levels, drafter.max_depth, useful)
        if min(levels, nodes) < 1:
            return Choice(NO_DRAFT), False
        if unread and choice.members is not None:
            lagging = max(unread[place] for place in choice.members)
        return choice._replace(budget=Budget(levels, nodes)), lagging > 0

    def _outlook(
        self,
        requests: Sequence[Request],
        unread: Sequence[int] = (),
        able: Sequence[int] | None = None,
    ) -> Outlook:
        assert self.drafter is not None
        return Outlook(
            ladder=self._ladder,
            requests=[r.request_id for r in requests],
            context=sum(len(r.tokens) for r in requests) / len(requests),
            remaining=[r.remaining for r in requests],
            unread=unread,
            able=able,
            waiting=bool(self.scheduler.waiting),
            joining=len(self.scheduler.running) > len(requests),
            packs=self.target.device.type == "cpu",
            known=self.drafter.known,
            written=[r.num_output for r in requests],
        )

    def _emit(self, request: Request, tokens: list[int]) -> int:
        """Appends tokens until one ends the request; returns how many were kept."""
        if request.finished:  # its constraint failed in this step
            return 0
        params = request.params
        stops = self._stops.get(request.request_id)
        if request.first_token_at is None:
            request.first_token_at = time.perf_counter()
        for emitted, token in enumerate(tokens):
            if token < 0:
                constrained.end_without_token(request)
                if request.finished:
                    return emitted
                request.finish_reason = "error"
                request.error = (
                    f"the logits of {self.target.name} at position {len(request.tokens)} are NaN "
                    f"or all -inf; no token can be chosen from them"
                )
                return emitted
            token = request.forced.get(request.num_output, token)
            request.tokens.append(token)
            stopped = stops is not None and stops.add(token)
            if request.num_output > params.min_tokens or params.min_tokens == 0:
                if token in params.stop_token_ids or (
                    not params.ignore_eos and token in self.target.eos_token_ids
                ):
                    request.finish_reason = "stop"
                elif stopped:
                    request.finish_reason = "stop_string"
            constrained.advance(request)
            if request.finish_reason is None and request.remaining == 0:
                request.finish_reason = "length"
            if request.finished:
                return emitted + 1
        return len(tokens)

    def _retire(self) -> list[Request]:
        done = self.scheduler.retire()
        now = time.perf_counter()
        for request in done:
            self._forget(request)
            before = self._clock_at_start.pop(request.request_id, self.clock.totals)
            spent = {p: t - before[p] for p, t in self.clock.totals.items()}
            total = (now - request.arrived_at) * 1e3
            spent["rest"] = max(total - sum(spent.values()), 0.0)
            request.timings_ms = spent
            request.timings_ms["total"] = total
            request.text = self._text(request)
            self._stops.pop(request.request_id, None)
        return done

    def _text(self, request: Request) -> str:
        """What the new tokens add to the prompt's text, cut before the stop string."""
        if request.text is not None:
            return request.text
        if self.target.tokenizer is None:
            return ""
        text = NewText(text_decoder(self.target.tokenizer), request.prompt).of(request.output)
        stops = self._stops.get(request.request_id)
        if request.finish_reason == "stop_string" and stops is not None:
            return stops.cut(text)
        return text

    def _stop_strings(self, request: Request) -> StopStrings:
        if self._special_tokens is None:
            self._special_tokens = special_tokens(self.target.tokenizer)
        text = NewText(text_decoder(self.target.tokenizer), request.prompt)
        params = request.params
        return StopStrings(params.stop, text, self._special_tokens, params.min_tokens)


def _useful(request: Request) -> int:
    """Levels of drafts that a request could keep."""
    most = request.remaining - 1
    return most if request.max_draft is None else min(most, request.max_draft)


def _weakly(method: Callable[[Request], int]) -> Callable[[Request], int]:
    """A method that does not keep its object."""
    reference = WeakMethod(method)

    def call(request: Request) -> int:
        held = reference()
        assert held is not None, "who plans steps is the engine's own"
        return held(request)

    return call
