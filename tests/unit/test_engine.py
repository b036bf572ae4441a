"""The engine on FakeLM: stop conditions, batches, pages, penalties, faults, Ctrl-C."""

from __future__ import annotations

import random
from collections import Counter
from dataclasses import replace

import pytest
import torch

from inferlab.errors import Interrupted
from inferlab.models import FakeLM, ForwardOutput
from inferlab.scheduler import Request
from inferlab.specdec.control import Choice
from inferlab.specdec.controllers import FixedController, make_controller
from inferlab.specdec.drafters import ModelDrafter, NgramDrafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy, make_policy
from inferlab.specdec.tree import NO_DRAFT, DraftTree, TreeShape
from inferlab.types import SamplingParams

PAGES = 512
PROMPTS = [
    [300 + i for i in range(3)],
    [260],
    [270 + (i * i) % 60 for i in range(50)],
    [1, 2, 3, 300, 301],
]


def make_engine(
    drafter: str = "vanilla",
    *,
    agreement: float = 0.7,
    widths: tuple[int, ...] = (1, 1, 1, 1),
    policy: Policy | None = None,
    pages: int = PAGES,
    page_size: int = 16,
    max_batch: int = 32,
    target: FakeLM | None = None,
    controller=None,
) -> Engine:
    target = target or FakeLM(seed=3)
    policy = policy or Policy()
    made = None
    if drafter == "vanilla":
        draft = FakeLM(seed=3, agreement=agreement)
        made = ModelDrafter(
            draft,
            draft.new_cache(pages, page_size),
            TreeShape.regular(widths),
            coupled=not policy.needs_draft_logits,
            keep_logits=policy.needs_draft_logits,
        )
    elif drafter == "ngram":
        made = NgramDrafter(max_depth=len(widths), branches=max(widths))
    return Engine(
        target,
        target.new_cache(pages, page_size),
        policy,
        controller or FixedController(len(widths)),
        made,
        max_batch,
    )


def tokens_of(engine: Engine, params: SamplingParams, prompts=PROMPTS) -> list[list[int]]:
    return [r.token_ids for r in engine.generate([(p, params) for p in prompts])]


PARAMS = [
    SamplingParams(max_tokens=40),
    SamplingParams(max_tokens=40, temperature=1.0, seed=5),
    SamplingParams(max_tokens=40, temperature=0.8, top_k=20, top_p=0.9, min_p=0.01, seed=6),
    SamplingParams(
        max_tokens=40,
        temperature=0.9,
        repetition_penalty=1.3,
        presence_penalty=0.5,
        frequency_penalty=0.3,
        seed=7,
    ),
    SamplingParams(max_tokens=40, repetition_penalty=1.5),
    SamplingParams(max_tokens=40, logit_bias={300: 50.0, 301: 49.5}, temperature=0.5, seed=8),
]


@pytest.mark.parametrize("page_size", [1, 16])
@pytest.mark.parametrize("widths", [(1, 1, 1, 1), (3, 2, 1), (2, 2, 2, 2)])
@pytest.mark.parametrize("drafter", ["vanilla", "ngram"])
@pytest.mark.parametrize("params", PARAMS, ids=range(len(PARAMS)))
def test_speculation_gives_the_tokens_of_plain_decoding(params, drafter, widths, page_size):
    plain = tokens_of(make_engine("none"), params)
    engine = make_engine(drafter, widths=widths, pages=4096, page_size=page_size)
    assert tokens_of(engine, params) == plain
    assert engine.scheduler.allocator.num_free == 4096


@pytest.mark.parametrize("max_batch", [1, 2, 32])
def test_the_batch_changes_no_token(max_batch):
    prompts = [[260 + (i * j) % 200 for j in range(1, 3 + i % 7)] for i in range(40)]
    params = SamplingParams(max_tokens=20, temperature=0.8, seed=1)
    alone = [tokens_of(make_engine(), params, [p])[0] for p in prompts]
    assert tokens_of(make_engine(max_batch=max_batch), params, prompts) == alone


def test_requests_with_different_parameters_share_a_batch():
    requests = list(zip(PROMPTS, PARAMS[:4], strict=True))
    together = make_engine().generate(requests)
    for (prompt, params), result in zip(requests, together, strict=True):
        assert result.token_ids == tokens_of(make_engine("none"), params, [prompt])[0]


def test_agreement_shows_in_the_acceptance_rate():
    params = SamplingParams(max_tokens=200)
    rates = []
    for agreement in (0.0, 0.5, 1.0):
        results = make_engine(agreement=agreement).generate([(p, params) for p in PROMPTS])
        rates.append(
            sum(r.stats.accepted for r in results) / sum(r.stats.proposed for r in results)
        )
    assert rates[0] == 0.0
    assert 0.2 < rates[1] < 0.5  # 0.5 + 0.25 + 0.125 + 0.0625 of 4
    assert rates[2] == 1.0


def test_counts_add_up():
    result = make_engine().generate([(PROMPTS[0], SamplingParams(max_tokens=64))])[0]
    stats = result.stats
    assert len(result.token_ids) == 64
    assert stats.emitted == 64  # every token comes out of a step
    assert stats.prefill_forwards == 0  # the prompt was read in the first step's forward
    assert stats.target_forwards == stats.steps
    assert stats.accepted + stats.steps == stats.emitted
    assert set(result.timings_ms) == {"prefill", "draft", "verify", "accept", "commit", "rest"}
    assert sum(result.timings_ms.values()) == pytest.approx(result.latency_ms, rel=1e-6)


def test_max_tokens_of_one_needs_no_draft():
    result = make_engine().generate([(PROMPTS[0], SamplingParams(max_tokens=1))])[0]
    assert (len(result.token_ids), result.stats.steps, result.stats.proposed) == (1, 1, 0)
    assert result.finish_reason == "length"


@pytest.mark.parametrize("drafter", ["none", "vanilla"])
def test_a_stop_token_ends_the_text_and_is_its_last_token(drafter):
    free = tokens_of(make_engine("none"), SamplingParams(max_tokens=40), PROMPTS[:1])[0]
    stop = free[17]
    params = SamplingParams(max_tokens=40, stop_token_ids=(stop,))
    result = make_engine(drafter, agreement=1.0).generate([(PROMPTS[0], params)])[0]
    assert result.token_ids == free[: free.index(stop) + 1]
    assert result.finish_reason == "stop"


@pytest.mark.parametrize("drafter", ["none", "vanilla"])
def test_min_tokens_forbids_the_end_until_then(drafter):
    free = tokens_of(make_engine("none"), SamplingParams(max_tokens=40), PROMPTS[:1])[0]
    params = SamplingParams(max_tokens=40, min_tokens=30, stop_token_ids=tuple(set(free)))
    plain = make_engine("none").generate([(PROMPTS[0], params)])[0]
    result = make_engine(drafter, agreement=1.0).generate([(PROMPTS[0], params)])[0]
    assert result.token_ids == plain.token_ids
    assert 30 <= len(result.token_ids) <= 40
    assert not set(result.token_ids[:30]) & set(free)


def test_the_end_of_text_token_ends_unless_ignored():
    bias = {256: 1000.0}
    params = SamplingParams(max_tokens=10, logit_bias=bias)
    assert tokens_of(make_engine(), params, PROMPTS[:1]) == [[256]]
    ignoring = SamplingParams(max_tokens=10, logit_bias=bias, ignore_eos=True)
    assert tokens_of(make_engine(), ignoring, PROMPTS[:1]) == [[256] * 10]
    at_least = SamplingParams(max_tokens=10, logit_bias=bias, min_tokens=4)
    result = make_engine().generate([(PROMPTS[0], at_least)])[0]
    assert len(result.token_ids) == 5
    assert result.token_ids[-1] == 256


@pytest.mark.parametrize("drafter", ["none", "vanilla"])
def test_a_stop_string_is_found_and_cut_off(drafter):
    engine = make_engine("none")
    free = engine.generate([(PROMPTS[0], SamplingParams(max_tokens=40))])[0]
    word = free.text.split()[12]
    stop = f" {word}"
    result = make_engine(drafter, agreement=1.0).generate(
        [(PROMPTS[0], SamplingParams(max_tokens=40, stop=(stop,)))]
    )[0]
    assert result.finish_reason == "stop_string"
    assert result.text == free.text[: free.text.index(stop)]
    assert result.token_ids == free.token_ids[: len(result.token_ids)]


@pytest.mark.parametrize("drafter", ["none", "vanilla"])
def test_a_stop_string_before_min_tokens_does_not_count(drafter):
    free = make_engine("none").generate([(PROMPTS[0], SamplingParams(max_tokens=40))])[0]
    words = free.text.split()
    early, late = f" {words[3]}", f" {words[30]}"
    stop = (early, late)
    params = SamplingParams(max_tokens=40, min_tokens=20, stop=stop)
    result = make_engine(drafter, agreement=1.0).generate([(PROMPTS[0], params)])[0]
    assert len(result.token_ids) > 20
    if result.finish_reason == "stop_string":
        ends = [result.text + s for s in stop]
        assert any(free.text.startswith(end) for end in ends)
    assert early in result.text


def test_long_prompts_are_processed_in_chunks():
    prompt = [260 + i % 200 for i in range(1300)]
    params = SamplingParams(max_tokens=8)
    result = make_engine(pages=256).generate([(prompt, params)])[0]
    assert result.stats.prefill_forwards == 2  # and the rest in the first step's forward
    assert result.token_ids == make_engine("none").generate([(prompt, params)])[0].token_ids


def test_requests_wait_for_pages():
    params = SamplingParams(max_tokens=20)
    engine = make_engine(pages=5)  # 3 prompt + 20 new + 5 tree slots: two pages each
    prompts = [[260 + i] * 3 for i in range(7)]
    alone = [tokens_of(make_engine("none"), params, [p])[0] for p in prompts]
    assert tokens_of(engine, params, prompts) == alone
    assert engine.scheduler.allocator.num_free == 5


@pytest.mark.parametrize(
    ("prompt", "params", "message"),
    [
        ([], SamplingParams(), "prompt is empty"),
        ([5, 512], SamplingParams(), "token id 512"),
        ([-1], SamplingParams(), "token id -1"),
        ([5], SamplingParams(stop_token_ids=(512,)), "stop_token_ids contains token id 512"),
        ([5], SamplingParams(logit_bias={600: 1.0}), "logit_bias contains token id 600"),
        ([5] * 4096, SamplingParams(), r"\(4096 tokens\); shorten the prompt$"),
        ([5] * 4000, SamplingParams(max_tokens=97), r"exceed the context of fake \(4096 tokens\)"),
        ([5] * 600, SamplingParams(max_tokens=64), r"needs 42 K/V pages .* the cache has 16"),
    ],
)
def test_impossible_requests_are_refused_before_anything_runs(prompt, params, message):
    engine = make_engine(pages=16)
    with pytest.raises(ValueError, match=message):
        engine.generate([(PROMPTS[0], SamplingParams()), (prompt, params)])
    assert engine.scheduler.allocator.num_free == 16
    assert not engine.scheduler.has_work
    # The engine goes on working.
    assert len(tokens_of(engine, SamplingParams(max_tokens=5), PROMPTS[:1])[0]) == 5


class BrokenLM(FakeLM):
    """Gives NaN logits where the context holds more than ``good`` tokens."""

    good = 20

    def forward(self, batch, cache, layers=()):
        logits = super().forward(batch, cache, layers).logits
        positions = batch.positions[:, batch.positions.shape[1] - logits.shape[1] :, None]
        return ForwardOutput(torch.where(positions >= self.good, float("nan"), logits))


@pytest.mark.parametrize("drafter", ["none", "vanilla"])
def test_nan_logits_end_a_request_with_an_error_and_leave_the_others_alone(drafter):
    target = BrokenLM(seed=3)
    engine = make_engine(drafter, target=target, agreement=1.0)
    short = SamplingParams(max_tokens=10)
    results = engine.generate([(PROMPTS[0], SamplingParams(max_tokens=40)), (PROMPTS[1], short)])
    assert results[0].finish_reason == "error"
    assert "NaN" in results[0].error
    assert (
        results[0].token_ids
        == tokens_of(make_engine("none"), short, PROMPTS[:1])[0] + (results[0].token_ids[10:])
    )
    assert len(results[0].token_ids) == 18  # positions 3..20
    assert results[1].finish_reason == "length"
    assert engine.scheduler.allocator.num_free == PAGES


class InterruptingLM(FakeLM):
    calls = 0

    def forward(self, batch, cache, layers=()):
        self.calls += 1
        if self.calls == 12:
            raise KeyboardInterrupt
        return super().forward(batch, cache, layers)


def test_ctrl_c_keeps_what_there_was():
    target = InterruptingLM(seed=3)
    engine = make_engine("none", target=target)
    with pytest.raises(Interrupted) as caught:
        engine.generate([(PROMPTS[0], SamplingParams(max_tokens=5)), (PROMPTS[1], PARAMS[0])])
    finished, partial = caught.value.results
    assert finished.finish_reason == "length"
    assert partial.finish_reason == "interrupted"
    expected = tokens_of(make_engine("none"), PARAMS[0], PROMPTS[1:2])[0]
    assert 0 < len(partial.token_ids) < 40
    assert partial.token_ids == expected[: len(partial.token_ids)]
    assert engine.scheduler.allocator.num_free == PAGES
    assert len(tokens_of(engine, SamplingParams(max_tokens=5), PROMPTS[:1])[0]) == 5


LOSSY = [("conf_threshold", {"tau": 0.0}), ("topk_agree", {"k": 512}), ("typical", {"p": 1.0})]


@pytest.mark.parametrize("widths", [(1, 1, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize(("name", "threshold"), LOSSY)
def test_lossy_policies_at_their_loosest_accept_every_draft(name, threshold, widths):
    policy = make_policy(name, **threshold)
    engine = make_engine(policy=policy, agreement=0.0, widths=widths)
    result = engine.generate([(PROMPTS[0], SamplingParams(max_tokens=41, temperature=1.0))])[0]
    assert result.stats.acceptance_rate == 1.0
    assert not policy.lossless


@pytest.mark.parametrize("widths", [(1, 1, 1, 1), (3, 2, 1)])
def test_rejection_at_temperature_zero_is_greedy(widths):
    params = SamplingParams(max_tokens=40)
    engine = make_engine(policy=Policy("rejection"), widths=widths)
    assert tokens_of(engine, params) == tokens_of(make_engine("none"), params)


@pytest.mark.parametrize("widths", [(1, 1, 1, 1), (3, 2, 1)])
@pytest.mark.parametrize("drafter", ["vanilla", "ngram"])
def test_rejection_accepts_a_perfect_draft_and_decodes_to_the_end(drafter, widths):
    params = SamplingParams(max_tokens=40, temperature=0.7, top_k=30, seed=4)
    engine = make_engine(drafter, policy=Policy("rejection"), widths=widths, agreement=1.0)
    results = engine.generate([(p, params) for p in PROMPTS])
    assert [len(r.token_ids) for r in results] == [40] * 4
    if drafter == "vanilla":
        assert all(r.stats.acceptance_rate > 0.95 for r in results)


@pytest.mark.parametrize("name", ["fixed", "adaptive", "cost"])
def test_every_controller_gives_the_same_tokens(name):
    params = SamplingParams(max_tokens=120, temperature=0.6, seed=2)
    engine = make_engine(controller=make_controller(name, k=3, max_k=4))
    assert tokens_of(engine, params) == tokens_of(make_engine("none"), params)


def test_a_draft_with_a_shorter_context_stops_drafting_there():
    target = FakeLM(seed=3)
    draft = FakeLM(seed=3, context_length=24)
    drafter = ModelDrafter(draft, draft.new_cache(PAGES), TreeShape.chain(4))
    engine = Engine(target, target.new_cache(PAGES), Policy(), FixedController(4), drafter)
    params = SamplingParams(max_tokens=60)
    assert tokens_of(engine, params) == tokens_of(make_engine("none"), params)


class Sleeping(FixedController):
    """Drafts in no step, and decides that for five at once."""

    def __init__(self):
        super().__init__(4)
        self.asked, self.told, self.rests = [], 0, []

    def choose(self, outlook):
        self.asked.append(outlook.batch_size)
        return Choice(NO_DRAFT, steps=5)

    def observe(self, step):
        self.told += 1

    def rested(self, batch_size, steps_ms, heard):
        assert min(steps_ms) > 0
        assert not heard
        self.rests.append((len(steps_ms), batch_size))


def test_a_controller_that_sleeps_is_asked_and_told_no_more_than_it_said():
    controller = Sleeping()
    engine = make_engine(controller=controller)
    expected = tokens_of(make_engine("none"), SamplingParams(max_tokens=18, ignore_eos=True))
    assert tokens_of(engine, SamplingParams(max_tokens=18, ignore_eos=True)) == expected
    size = len(PROMPTS)
    assert controller.asked == [size] * 4  # 17 steps behind the first token
    assert controller.told == 4
    assert controller.rests == [(4, size)] * 3 + [(1, size)]


def test_another_batch_wakes_a_controller():
    controller = Sleeping()
    engine = make_engine(controller=controller)
    lengths = (4, 9)
    engine.generate(
        [
            (p, SamplingParams(max_tokens=n, ignore_eos=True))
            for p, n in zip(PROMPTS, lengths, strict=False)
        ]
    )
    assert controller.asked == [2, 1]
    assert controller.rests == [(2, 2), (4, 1)]


class Deaf(Sleeping):
    """Tells the drafter of no text."""

    def follows(self, tokens, outlook):
        return False


def test_a_controller_is_not_asked_about_texts_that_no_drafter_hears_of():
    controller = Deaf()
    engine = make_engine(controller=controller)
    engine.drafter.hears_all = True
    tokens_of(engine, SamplingParams(max_tokens=60, ignore_eos=True))
    assert controller.asked == []
    assert controller.told == 2, "59 steps behind the first token, 32 at once"
    assert sum(steps for steps, _ in controller.rests) == 57


class Sparing(FixedController):
    """Keeps the first nodes of every draft, as many as it likes, and collects what it hears."""

    def __init__(self, seed: int) -> None:
        super().__init__(4)
        self.random, self.heard = random.Random(seed), []

    def choose(self, outlook):
        return super().choose(outlook)._replace(judge=self)

    def examined(self, requests, sure, right) -> bool:
        return True

    def followed(self, requests, kinds, accepted) -> None:
        return

    def goes_on(self, requests, kinds) -> bool:
        return True

    def keep(self, requests, kinds):
        return [self.random.randint(0, len(of)) for of in kinds]

    def observe(self, step) -> None:
        self.heard.append(step)


@pytest.mark.parametrize("drafter", ["vanilla", "ngram"])
def test_what_was_left_out_is_seen_to_come_true_or_not(drafter):
    params = SamplingParams(max_tokens=40, ignore_eos=True)
    controller = Sparing(seed=1)
    engine = make_engine(drafter, controller=controller)
    drafts: list[tuple[list[Request], list[int], DraftTree]] = []
    propose = engine.drafter.propose

    def watched(batch, budget, judge=None):
        tree = propose(batch, budget, judge)
        drafts.append((batch.requests[:], [r.num_output for r in batch.requests], tree))
        return tree

    engine.drafter.propose = watched
    tokens_of(engine, params)
    seen = Counter()
    told = [step.came_true for step in controller.heard if step.heard]
    for (requests, starts, tree), rights in zip(drafts, told, strict=True):
        assert not tree.left_out or len(rights) == len(requests)
        for i, ((count, token), right) in enumerate(zip(tree.left_out, rights, strict=True)):
            chain = [*tree.tokens[i, 1 : count + 1].tolist(), token]
            text = requests[i].output[starts[i] :][: len(chain)]
            assert right == (None if count < 0 else text == chain) or len(text) < len(chain)
            seen[right] += 1
    assert seen[False] > 5
    assert seen[True] > 10 or drafter == "ngram"  # texts of FakeLM do not repeat themselves


def test_a_policy_that_accepts_other_tokens_too_sees_nothing_of_what_was_left_out():
    controller = Sparing(seed=1)
    tokens_of(make_engine(policy=make_policy("typical"), controller=controller), SamplingParams())
    assert not any(step.came_true for step in controller.heard)


@pytest.mark.parametrize("drafter", ["none", "vanilla", "ngram"])
def test_log_probabilities_do_not_depend_on_drafts(drafter):
    params = SamplingParams(max_tokens=30, temperature=0.9, top_p=0.9, seed=8, logprobs=3)
    target = FakeLM(seed=3)
    engine = make_engine(drafter, widths=(2, 2, 1) if drafter == "vanilla" else (1, 1, 1))
    told = engine.generate([(p, params) for p in PROMPTS])
    silent = tokens_of(make_engine("none"), replace(params, logprobs=None))
    for prompt, result, tokens in zip(PROMPTS, told, silent, strict=True):
        assert result.token_ids == tokens
        assert len(result.logprobs) == len(tokens)
        scores = torch.log_softmax(logits_of(target, [*prompt, *tokens[:-1]]), dim=-1)
        for row, token, one in zip(scores[-len(tokens) :], tokens, result.logprobs, strict=True):
            assert one.logprob == pytest.approx(row[token].item(), abs=1e-5)
            values, ids = row.topk(3)
            assert [id_ for id_, _ in one.top] == ids.tolist()
            assert [value for _, value in one.top] == pytest.approx(values.tolist(), abs=1e-5)


def logits_of(model: FakeLM, tokens: list[int]) -> torch.Tensor:
    """[len(tokens), V]: behind each of them, read alone."""
    engine = Engine(model, model.new_cache(16), Policy(), FixedController(0), max_batch=1)
    rows = []
    verify = engine.policy.verify

    class Looking(Policy):
        def verify(self, logits, tree, batch):
            rows.append(logits[0, 0].clone())
            return verify(logits, tree, batch)

    engine.policy = Looking()
    for end in range(1, len(tokens) + 1):
        engine.generate([(tokens[:end], SamplingParams(max_tokens=1))])
    return torch.stack(rows)


def test_each_request_may_limit_its_drafts_and_have_a_policy_of_its_own():
    params = SamplingParams(max_tokens=40, temperature=1.0, seed=5)
    plain = tokens_of(make_engine("none"), params)
    engine = make_engine("vanilla")
    requests = [
        Request(p, params, max_draft=m) for p, m in zip(PROMPTS, (0, 1, 2, None), strict=True)
    ]
    engine.generate(requests)
    assert [r.output for r in requests] == plain
    assert [len(r.stats.offered_at) for r in requests] == [0, 1, 2, 4]
    assert requests[0].stats.steps == 40
    assert min(r.stats.accepted for r in requests[1:]) > 0
    requests = [Request(p, params) for p in PROMPTS]
    requests[0].acceptance = ("topk_agree", 500)
    requests[2].acceptance = ("longest_prefix", 0.0)
    engine.generate(requests)
    lossy = make_engine("vanilla", policy=make_policy("topk_agree", k=500))
    alone = lossy.generate([(PROMPTS[0], params)])
    assert [r.output for r in requests] == [alone[0].token_ids, *plain[1:]]
    assert requests[0].output != plain[0]
    assert requests[0].stats.acceptance_rate == 1.0
