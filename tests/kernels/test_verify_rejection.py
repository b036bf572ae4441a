"""verify_tree_rejection is right in distribution, and the checks that say so catch broken rules."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.sampling_cases import (
    chain,
    likely_tokens,
    random_logits,
    random_parents,
    random_walk,
)
from helpers.speculative_rules import (
    BROKEN_RULES,
    BROKEN_WITH_REPLACEMENT,
    accepts,
    assert_exact,
    assert_follows,
    draws,
    emitted,
    exact,
    outcomes,
    residual,
)
from inferlab import _C
from inferlab.kernels import (
    SamplingTensors,
    build_tree,
    reference,
    sample,
    verify_tree_match,
    verify_tree_rejection,
)
from inferlab.kernels.noise import PURPOSE_DRAFT

# Target and draft: overlapping, nearly disjoint, with zeros on either side, equal.
PAIRS = [
    ([0.5, 0.3, 0.2], [0.2, 0.5, 0.3]),
    ([0.1, 0.6, 0.3], [0.4, 0.3, 0.3]),
    ([0.9, 0.05, 0.05], [0.05, 0.05, 0.9]),
    ([0.0, 0.7, 0.3], [0.6, 0.2, 0.2]),
    ([0.25, 0.25, 0.5], [0.0, 0.5, 0.5]),
    ([0.5, 0.3, 0.2], [0.5, 0.3, 0.2]),
    ([0.4, 0.4, 0.1, 0.1], [0.1, 0.2, 0.3, 0.4]),
]
WIDE = PAIRS[-1]  # its residual has two tokens, so that a second mistake can show
MODES = [(1, True), (2, True), (3, True), (1, False), (2, False), (3, False)]
DRAWS = 100_000


@pytest.fixture(autouse=True)
def restore_native_settings():
    yield
    _C.force_isa("auto")
    _C.set_num_threads(0)


def logits_of(p):
    return torch.log(torch.tensor(p, dtype=torch.float64)).float()


def star(children):
    return [-1] + [0] * children


def run(p_rows, q_rows, parents, tokens, seeds, **options):
    """Native verification of one tree for many seeds; p_rows, q_rows: logits [N, V]."""
    batch = len(seeds)
    links = build_tree(torch.tensor([parents] * batch, dtype=torch.int32))
    draft = None if q_rows is None else q_rows.expand(batch, -1, -1)
    sampling = SamplingTensors.of(batch, temperature=1.0, seed=seeds)
    lens = torch.full((batch,), 7, dtype=torch.int32)
    return verify_tree_rejection(
        p_rows.expand(batch, -1, -1), draft, tokens, links, lens, sampling, **options
    )


# The enumeration: all draft draws, all acceptance outcomes, exact fractions.


@pytest.mark.parametrize(("p", "q"), PAIRS)
@pytest.mark.parametrize(("count", "with_replacement"), MODES)
def test_enumerated_rule_gives_the_target(p, q, count, with_replacement):
    count = count if with_replacement else min(count, sum(v > 0 for v in q))
    for duplicated in (False, True) if not with_replacement else (False,):
        result = emitted(exact(p), exact(q), count, with_replacement, duplicated=duplicated)
        assert_exact(result, exact(p))


@pytest.mark.parametrize("rule", BROKEN_RULES)
def test_enumeration_catches_broken_rules(rule):
    p, q = map(exact, WIDE)
    with_replacement = rule in BROKEN_WITH_REPLACEMENT
    duplicated = rule == "duplicates_counted_twice"
    with pytest.raises(AssertionError):
        assert_exact(emitted(p, q, 2, with_replacement, rule, duplicated), p)


def test_enumeration_finds_the_known_wrong_distribution():
    """Two iid siblings, the residual not updated between them."""
    p, q = exact([0.5, 0.3, 0.2]), exact([0.2, 0.5, 0.3])
    wrong = emitted(p, q, 2, True, "residual_not_updated")
    assert wrong == exact([0.35, 0.39, 0.26])


# The kernel, given the siblings: its outcomes against the enumerated ones.


@pytest.mark.parametrize(("p", "q"), [*PAIRS[:5], WIDE])
@pytest.mark.parametrize("with_replacement", [True, False])
def test_kernel_outcomes_for_every_draft_draw(p, q, with_replacement):
    rows = logits_of(p).expand(3, -1), logits_of(q).expand(3, -1)
    seeds = list(range(8000))
    for siblings, _ in draws(exact(q), 2, with_replacement):
        tokens = torch.tensor([[0, *siblings]] * len(seeds), dtype=torch.int32)
        result = run(*rows, star(2), tokens, seeds, with_replacement=with_replacement)
        counts = np.bincount(result.accepted_tokens[:, 0].numpy(), minlength=len(p))
        expected = outcomes(exact(p), exact(q), siblings, with_replacement)
        assert_follows(counts, np.array([float(v) for v in expected]))


@pytest.mark.parametrize("siblings", [[3, 3], [3, 3, 2], [3, 2, 3], [2, 2, 2]])
@pytest.mark.parametrize("with_replacement", [True, False])
def test_kernel_outcomes_with_duplicated_siblings(siblings, with_replacement):
    p, q = WIDE
    rows = [logits_of(r).expand(len(siblings) + 1, -1) for r in (p, q)]
    seeds = list(range(30_000))
    tokens = torch.tensor([[0, *siblings]] * len(seeds), dtype=torch.int32)
    parents = star(len(siblings))
    result = run(*rows, parents, tokens, seeds, with_replacement=with_replacement)
    counts = np.bincount(result.accepted_tokens[:, 0].numpy(), minlength=4)
    expected = outcomes(exact(p), exact(q), siblings, with_replacement)
    assert_follows(counts, np.array([float(v) for v in expected]))
    if not with_replacement:
        twice = outcomes(exact(p), exact(q), siblings, False, "duplicates_counted_twice")
        with pytest.raises(AssertionError):
            assert_follows(counts, np.array([float(v) for v in twice]))


# The kernel from draft draws to output, 1e5 draws.


def speculate(p, q, parents, with_replacement, seeds):
    """Draws a tree from q as a drafter does (purpose 1, positions by depth), then verifies it.

    p, q: logits [N, V]. Siblings drawn with replacement get seeds of their own."""
    batch, nodes = len(seeds), len(parents)
    depth = [0] * nodes
    tokens = torch.zeros(batch, nodes, dtype=torch.int32)
    children = {n: [c for c in range(nodes) if parents[c] == n] for n in range(nodes)}
    for n in range(nodes):
        depth[n] = 0 if n == 0 else depth[parents[n]] + 1
        if not children[n]:
            continue
        position = torch.full((batch,), 8 + depth[n], dtype=torch.int64)
        row = q[n].expand(batch, -1)
        if with_replacement:
            for c in children[n]:
                own = SamplingTensors.of(
                    batch, temperature=1.0, seed=[s + (c << 40) for s in seeds]
                )
                tokens[:, c] = sample(row, position, own, purpose=PURPOSE_DRAFT)[:, 0]
        else:
            shared = SamplingTensors.of(batch, temperature=1.0, seed=seeds)
            drawn = sample(
                row, position, shared, purpose=PURPOSE_DRAFT, num_samples=len(children[n])
            )
            tokens[:, children[n]] = drawn
    return run(p, q, parents, tokens, seeds, with_replacement=with_replacement)


@pytest.mark.parametrize("with_replacement", [True, False])
@pytest.mark.parametrize(("p", "q"), PAIRS)
def test_siblings_give_the_target(p, q, with_replacement):
    count = 2
    rows = logits_of(p).expand(3, -1), logits_of(q).expand(3, -1)
    result = speculate(*rows, star(count), with_replacement, list(range(DRAWS)))
    counts = np.bincount(result.accepted_tokens[:, 0].numpy(), minlength=len(p))
    assert_follows(counts, np.array(p))


@pytest.mark.parametrize("rule", BROKEN_RULES)
def test_samples_catch_broken_rules(rule):
    p, q = map(exact, WIDE)
    with_replacement = rule in BROKEN_WITH_REPLACEMENT
    wrong = emitted(p, q, 2, with_replacement, rule, rule == "duplicates_counted_twice")
    counts = np.random.default_rng(0).multinomial(DRAWS, [float(v) for v in wrong])
    with pytest.raises(AssertionError):
        assert_follows(counts, np.array(WIDE[0]))


@pytest.mark.parametrize("with_replacement", [True, False])
@pytest.mark.parametrize("parents", [[-1, 0, 1], [-1, 0, 0, 1, 1, 2], [-1, 0, 0, 0, 1, 2, 2, 5]])
def test_trees_give_the_target_jointly(parents, with_replacement):
    """The first two tokens together follow p(a) p(b | a), whatever the tree: chi-square over pairs.

    A walk that ends at the root emits one token; its second is then drawn as the next step would,
    from the target's row for that token."""
    rng = np.random.default_rng(3)
    vocab, nodes = 4, len(parents)
    p_next = rng.dirichlet(np.ones(vocab), vocab + 1)  # row 4: at the root
    q_next = rng.dirichlet(np.ones(vocab), vocab + 1)
    seeds = list(range(DRAWS))
    tokens = torch.zeros(DRAWS, nodes, dtype=torch.int32)
    p_rows = torch.zeros(DRAWS, nodes, vocab)
    q_rows = torch.zeros(DRAWS, nodes, vocab)
    p_table, q_table = logits_of(p_next), logits_of(q_next)
    depth = [0] * nodes
    for n in range(nodes):
        state = torch.full((DRAWS,), vocab) if n == 0 else tokens[:, n].long()
        depth[n] = 0 if n == 0 else depth[parents[n]] + 1
        p_rows[:, n], q_rows[:, n] = p_table[state], q_table[state]
        below = [c for c in range(nodes) if parents[c] == n]
        if not below:
            continue
        position = torch.full((DRAWS,), 8 + depth[n], dtype=torch.int64)
        for i, c in enumerate(below):
            if with_replacement or i == 0:
                own = [s + (c << 40) for s in seeds] if with_replacement else seeds
                sampling = SamplingTensors.of(DRAWS, temperature=1.0, seed=own)
                count = 1 if with_replacement else len(below)
                drawn = sample(
                    q_rows[:, n], position, sampling, purpose=PURPOSE_DRAFT, num_samples=count
                )
            tokens[:, c] = drawn[:, 0 if with_replacement else i]
    links = build_tree(torch.tensor([parents] * DRAWS, dtype=torch.int32))
    sampling = SamplingTensors.of(DRAWS, temperature=1.0, seed=seeds)
    lens = torch.full((DRAWS,), 7, dtype=torch.int32)
    result = verify_tree_rejection(
        p_rows, q_rows, tokens, links, lens, sampling, with_replacement=with_replacement
    )
    first = result.accepted_tokens[:, 0].long()
    later = sample(p_table[first], lens.long() + 2, sampling)[:, 0]
    second = torch.where(result.num_accepted > 1, result.accepted_tokens[:, 1], later).long()
    counts = np.bincount((first * vocab + second).numpy(), minlength=vocab * vocab)
    joint = p_next[vocab][:, None] * p_next[:vocab]
    assert_follows(counts, joint)
    assert (result.num_accepted > 1).float().mean() > 0.2  # something was speculated


def test_deterministic_drafter_gives_the_target():
    p = [0.15, 0.5, 0.25, 0.1]
    tokens = torch.tensor([[0, 1, 3]] * DRAWS, dtype=torch.int32)
    result = run(logits_of(p).expand(3, -1), None, star(2), tokens, list(range(DRAWS)))
    assert_follows(np.bincount(result.accepted_tokens[:, 0].numpy(), minlength=4), np.array(p))
    accepted = (result.accepted_nodes[:, 1] == 1).float().mean()
    assert float(accepted) == pytest.approx(0.5, abs=0.01)


def test_acceptance_rate_of_a_chain_is_the_overlap():
    p, q = PAIRS[0]
    rows = logits_of(p).expand(2, -1), logits_of(q).expand(2, -1)
    result = speculate(*rows, [-1, 0], False, list(range(DRAWS)))
    overlap = sum(min(a, b) for a, b in zip(p, q, strict=True))
    assert float((result.num_accepted == 2).float().mean()) == pytest.approx(overlap, abs=0.008)


def test_filters_apply_to_target_and_draft():
    p = np.array([0.4, 0.3, 0.2, 0.1])
    q = np.array([0.1, 0.2, 0.3, 0.4])
    batch = 50_000
    options = {"temperature": 1.0, "top_k": 3, "seed": list(range(batch))}
    sampling = SamplingTensors.of(batch, **options)
    rows = [logits_of(r).expand(batch, 2, -1) for r in (p, q)]
    position = torch.full((batch,), 8)
    drawn = sample(rows[1][:, 0], position, sampling, purpose=PURPOSE_DRAFT)
    tokens = torch.cat([torch.zeros(batch, 1, dtype=torch.int32), drawn], 1)
    lens = torch.full((batch,), 7, dtype=torch.int32)
    result = verify_tree_rejection(*rows, tokens, chain(2, batch), lens, sampling)
    counts = np.bincount(result.accepted_tokens[:, 0].numpy(), minlength=4)
    assert_follows(counts, np.array([4 / 9, 3 / 9, 2 / 9, 0]))


# What others got wrong.


def test_shared_noise_is_biased_and_purposes_are_not():
    """vLLM #47386, #54282: draft and recovery draws shared their noise; wanted 10/60/30 %."""
    p, q = [0.1, 0.6, 0.3], [0.5, 0.3, 0.2]
    rows = logits_of(p).expand(2, -1), logits_of(q).expand(2, -1)
    seeds = list(range(DRAWS))
    result = speculate(*rows, [-1, 0], False, seeds)
    assert_follows(np.bincount(result.accepted_tokens[:, 0].numpy(), minlength=3), np.array(p))

    # The same rule with one Gumbel row for both draws: about 10.0/62.3/27.7 %.
    position = torch.full((DRAWS,), 8)
    sampling = SamplingTensors.of(DRAWS, temperature=1.0, seed=seeds)
    left = logits_of(np.maximum(np.array(p) - np.array(q), 0).tolist())
    drawn = sample(rows[1][:1].expand(DRAWS, -1), position, sampling)[:, 0].numpy()
    recovered = sample(left.expand(DRAWS, -1), position, sampling)[:, 0].numpy()
    u = np.random.default_rng(0).random(DRAWS)
    out = np.where(u * np.array(q)[drawn] < np.array(p)[drawn], drawn, recovered)
    with pytest.raises(AssertionError):
        assert_follows(np.bincount(out, minlength=3), np.array(p))


def test_zero_probability_is_never_accepted():
    assert accepts(0.0, 0.5, 0.0, "zero_accepted")  # the mistake: u = 0 lets it through
    assert not accepts(0.0, 0.5, 0.0)
    p = logits_of([0.0, 0.7, 0.3]).expand(2, -1)
    tokens = torch.tensor([[0, 0]] * 20_000, dtype=torch.int32)
    for q in (logits_of([0.6, 0.2, 0.2]).expand(2, -1), logits_of([1e-9, 0.5, 0.5]).expand(2, -1)):
        result = run(p, q, [-1, 0], tokens, list(range(20_000)))
        assert (result.num_accepted == 1).all()
        assert (result.accepted_tokens[:, 0] > 0).all()
    result = run(p, None, [-1, 0], tokens, list(range(20_000)))
    assert (result.accepted_tokens[:, 0] > 0).all()


def test_equal_models_accept_everything_and_empty_residuals_do_no_harm():
    """p = q is never rejected, however close to 1 u comes; without a residual p stays as it was."""
    p = exact([0.5, 0.3, 0.2])
    assert residual(p, p) == p
    equal = torch.tensor([0.25, 0.75], dtype=torch.float64)
    assert torch.equal(reference.verify.residual(equal, equal), equal)
    rows = torch.randn(2, 500)
    tokens = sample(
        rows[:1].expand(20_000, -1),
        torch.full((20_000,), 8),
        SamplingTensors.of(20_000, temperature=1.0, seed=list(range(20_000))),
        purpose=PURPOSE_DRAFT,
    )
    tokens = torch.cat([torch.zeros_like(tokens), tokens], 1)
    result = run(rows, rows.clone(), [-1, 0], tokens, list(range(20_000)))
    assert (result.num_accepted == 2).all()


def test_certain_target_and_disjoint_draft():
    p = torch.tensor([[0.0, -torch.inf, -torch.inf]] * 3)
    q = torch.tensor([[-torch.inf, 0.0, -torch.inf]] * 3)
    tokens = torch.tensor([[0, 1, 1]] * 100, dtype=torch.int32)
    for with_replacement in (True, False):
        result = run(p, q, star(2), tokens, list(range(100)), with_replacement=with_replacement)
        assert (result.accepted_tokens[:, 0] == 0).all()


def test_broken_draft_row_leaves_the_choice_to_the_target():
    p = [0.2, 0.5, 0.3]
    q = torch.full((2, 3), torch.nan)
    tokens = torch.tensor([[0, 1]] * DRAWS, dtype=torch.int32)
    result = run(logits_of(p).expand(2, -1), q, [-1, 0], tokens, list(range(DRAWS)))
    assert (result.num_accepted == 1).all()
    assert_follows(np.bincount(result.accepted_tokens[:, 0].numpy(), minlength=3), np.array(p))


def test_temperature_zero_is_match():
    rng = np.random.default_rng(1)
    logits = random_logits(rng, (4, 30, 60), "ties", torch.float32)
    parents = random_parents(rng, 4, 30)
    links = build_tree(parents)
    sampling = SamplingTensors.of(4, temperature=0.0)
    lens = torch.tensor([5, 6, 7, 8], dtype=torch.int32)
    tokens = likely_tokens(rng, logits, parents, links, lens, sampling)
    expected = verify_tree_match(logits, tokens, links, lens, sampling)
    for draft in (None, torch.randn(4, 30, 60)):
        result = verify_tree_rejection(logits, draft, tokens, links, lens, sampling)
        assert all(torch.equal(a, b) for a, b in zip(result, expected, strict=True))


@settings(max_examples=60, deadline=None, derandomize=True)
@given(
    seed=st.integers(0, 2**32 - 1),
    batch=st.sampled_from([1, 3]),
    nodes=st.sampled_from([1, 2, 7, 64, 65]),
    vocab=st.sampled_from([1, 19, 111, 1000, 4097, 20_000]),
    kind=st.sampled_from(["normal", "ties", "flat", "masked", "broken"]),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
    draft=st.sampled_from(["none", "near", "other"]),
    with_replacement=st.booleans(),
    isa=st.sampled_from(["auto", _C.build_info()["isas"][0]]),
    threads=st.sampled_from([1, 2]),
)
def test_matches_the_reference(
    seed, batch, nodes, vocab, kind, dtype, draft, with_replacement, isa, threads
):
    rng = np.random.default_rng(seed)
    nodes = min(nodes, 7) if vocab > 5000 else nodes
    logits = random_logits(rng, (batch, nodes, vocab), kind, dtype)
    other = random_logits(rng, (batch, nodes, vocab), kind, dtype)
    near = (logits.float() + 0.5 * torch.randn(logits.shape)).to(dtype)
    draft_logits = {"none": None, "near": near, "other": other}[draft]
    walk, allowed = random_walk(rng, logits)
    options = {"with_replacement": with_replacement, "allowed_vocab": allowed}
    arguments = (logits, draft_logits, *walk)
    _C.force_isa(isa)
    _C.set_num_threads(threads)
    ours = verify_tree_rejection(*arguments, **options)
    theirs = reference.verify_tree_rejection(*arguments, **options)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs, strict=True))


def test_bad_draft_logits():
    good = (torch.zeros(1, 2, dtype=torch.int32), chain(2), torch.zeros(1, dtype=torch.int32))
    with pytest.raises(ValueError, match=r"draft_logits has shape \[1, 2, 5\]; it must be"):
        verify_tree_rejection(
            torch.zeros(1, 2, 6), torch.zeros(1, 2, 5), *good, SamplingTensors.of(1)
        )
    with pytest.raises(TypeError, match="draft_logits has dtype int64"):
        verify_tree_rejection(
            torch.zeros(1, 2, 6), torch.zeros(1, 2, 6).long(), *good, SamplingTensors.of(1)
        )
