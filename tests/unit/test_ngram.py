"""Prompt lookup: the suffix automaton and the trees it makes, against their definition."""

from __future__ import annotations

import json
import random
from collections import Counter

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.tiny_models import tiny_tokenizer
from inferlab import _C
from inferlab.config import SpecdecConfig
from inferlab.models import FakeLM
from inferlab.scheduler import Request
from inferlab.specdec.acceptance import kinds_of
from inferlab.specdec.batch import Batch
from inferlab.specdec.drafters import NgramDrafter, load_corpus
from inferlab.specdec.tree import Budget
from inferlab.types import SamplingParams

UNBOUNDED = 2**31 - 1


def automaton_of(tokens, sizes=()):
    """Of the tokens, given in parts of those sizes."""
    made, at = _C.SuffixAutomaton(), 0
    for size in (*sizes, len(tokens)):
        made.extend(tokens[at : at + size])
        at = min(at + size, len(tokens))
    return made


def ends_of(text, suffix):
    """Behind how many tokens the suffix ends, with a token behind it."""
    n = len(suffix)
    return [e for e in range(n, len(text)) if text[e - n : e] == suffix]


def longest_match(text, read, own):
    """Most tokens at the end of ``read`` that also stand in ``text``, earlier if it is its own."""
    last = len(text) - 1 if own else len(text)
    for n in range(len(read), 0, -1):
        if any(text[e - n : e] == read[len(read) - n :] for e in range(n, last + 1)):
            return n
    return 0


def brute_force(text, corpus, depth, branches, min_match, max_match, margin, nodes):
    """The definition of draft_trie: tokens, parents, depth and worth."""
    sources = [(text, True, min(longest_match(text, text, True), max_match))]
    sources.append((corpus, False, min(longest_match(corpus, text, False), max_match)))
    matches = []  # (length, is own, text, occurrences), one for each set of places
    for source, own, longest in sources:
        seen = None
        for n in range(longest, 0, -1):
            suffix = text[len(text) - n :]
            places = [e for e in range(n, len(source) + 1) if source[e - n : e] == suffix]
            if places != seen and n >= min_match:
                matches.append((n, own, source, ends_of(source, suffix)))
            seen = places
    worth = {}
    found = 0
    for n, own, source, ends in sorted(matches, key=lambda m: (-m[0] - margin * m[1], not m[1])):
        counts = Counter(source[e] for e in ends)
        newest = {source[e]: e for e in ends}
        order = sorted(counts, key=lambda c: (-counts[c], -newest[c]))
        for token in order[:branches]:
            virtual = list(source)
            start = newest[token]
            path = []
            for d in range(depth):
                if start + d >= len(source) and not own:
                    break
                path.append(virtual[start + d])
                virtual.append(path[-1])
            before = len(worth)
            for d in range(1, len(path) + 1):
                value = min(counts[token] / len(ends), 1.0) * n / (n + d)
                key = tuple(path[:d])
                worth[key] = max(worth.get(key, 0.0), value)
            found += len(worth) > before
            if found == branches:
                break
        if found == branches:
            break
    paths = sorted(worth, key=lambda p: -worth[p])[:nodes]  # stable: earlier found first
    place = {(): 0} | {path: i + 1 for i, path in enumerate(paths)}
    tokens = [text[-1], *(p[-1] for p in paths)]
    parents = [-1, *(place[p[:-1]] for p in paths)]
    return tokens, parents, max(map(len, paths), default=0), [1.0, *(worth[p] for p in paths)]


@st.composite
def texts(draw, max_size=50):
    alphabet = draw(st.integers(1, 4))
    return draw(st.lists(st.integers(0, alphabet - 1), min_size=1, max_size=max_size))


@settings(max_examples=200, deadline=None)
@given(texts(), st.lists(st.integers(0, 9), max_size=8))
def test_the_longest_repeated_suffix_is_found(text, sizes):
    length = longest_match(text, text, own=True)
    found, end = automaton_of(text, sizes).repeated()
    assert found == length
    assert end == (ends_of(text, text[len(text) - length :])[-1] if length else 0)


@settings(max_examples=200, deadline=None)
@given(texts(), texts())
def test_a_text_is_matched_against_another(corpus, text):
    automaton = automaton_of(corpus)
    automaton.freeze()
    cursor = (0, 0)
    for i, token in enumerate(text):
        cursor = automaton.follow(cursor, [token])
        assert cursor[1] == longest_match(corpus, text[: i + 1], own=False)
    assert automaton.follow((0, 0), text) == cursor


@settings(max_examples=300, deadline=None)
@given(
    texts(),
    st.one_of(st.just([]), texts()),
    st.lists(st.integers(0, 9), max_size=8),
    st.tuples(
        st.integers(1, 6),
        st.integers(1, 5),
        st.integers(1, 3),
        st.integers(0, 5),
        st.integers(0, 3),
        st.integers(0, 9),
    ),
)
def test_a_draft_agrees_with_the_definition(text, corpus, sizes, limits):
    depth, branches, min_match, more, margin, nodes = limits
    max_match = min_match + more if more < 5 else UNBOUNDED
    other, cursor = None, (0, 0)
    if corpus:
        other = automaton_of(corpus)
        other.freeze()
        cursor = other.follow(cursor, text)
    limits = (depth, branches, min_match, max_match, margin, nodes)
    made = _C.draft_trie(automaton_of(text, sizes), other, cursor, *limits)
    assert made == brute_force(text, corpus, *limits)


def test_a_text_that_repeats_itself_is_drafted_to_full_depth():
    period = [5, 6, 7]
    made = automaton_of(period * 1000)
    tokens, parents, depth, worth = _C.draft_trie(made, None, (0, 0), 8, 1, 1, UNBOUNDED, 0, 99)
    assert tokens == [7, *(period * 3)[:8]]
    assert parents == list(range(-1, 8))
    assert depth == 8
    assert worth == [1.0, *(pytest.approx(2997 / (2997 + d)) for d in range(1, 9))]
    assert made.repeated() == (2997, 2997)


def test_many_tokens_and_many_edges_are_held():
    rng = np.random.default_rng(0)
    text = rng.integers(0, 5000, 20_000).tolist()
    text += text[3000:3040]
    made = automaton_of(text, [7000])
    assert made.repeated() == (40, 3040)
    tokens, *_ = _C.draft_trie(made, None, (0, 0), 8, 1, 1, UNBOUNDED, 0, 99)
    assert tokens[1:] == text[3040:3048]


def test_nothing_is_drafted_where_nothing_repeats():
    made = automaton_of(list(range(20)))
    assert made.repeated() == (0, 0)
    assert _C.draft_trie(made, None, (0, 0), 4, 2, 1, 4, 0, 9) == ([19], [-1], 0, [1.0])


def test_what_does_not_fit_is_refused():
    made = automaton_of([1, 2, 1])
    with pytest.raises(ValueError, match=r"tokens has -1; token ids must be in \[0"):
        made.extend([3, -1])
    assert len(made) == 3
    with pytest.raises(ValueError, match=r"cursor is \(99, 1\)"):
        made.follow((99, 1), [1])
    with pytest.raises(ValueError, match=r"cursor is \(-1, 1\)"):
        _C.draft_trie(made, made, (-1, 1), 4, 1, 1, 4, 0, 9)
    with pytest.raises(ValueError, match="branches is 0"):
        _C.draft_trie(made, None, (0, 0), 4, 0, 1, 4, 0, 9)
    with pytest.raises(ValueError, match="own has no tokens"):
        _C.draft_trie(_C.SuffixAutomaton(), None, (0, 0), 4, 1, 1, 4, 0, 9)
    lookup = _C.PromptLookup(None, 1, 1, 4, 0)
    with pytest.raises(ValueError, match="margin is -1"):
        _C.PromptLookup(None, 1, 1, 4, -1)
    with pytest.raises(ValueError, match="one list for each text"):
        lookup.draft([1, 2], [[3]], 4, 9, None)
    with pytest.raises(ValueError, match="a text has no tokens"):
        lookup.draft([1], [[]], 4, 9, None)
    with pytest.raises(ValueError, match="depth is 0"):
        lookup.draft([1], [[1]], 0, 9, None)
    made.freeze()
    with pytest.raises(RuntimeError, match="frozen"):
        made.extend([1])


@settings(max_examples=200, deadline=None)
@given(
    st.lists(texts(), min_size=1, max_size=4),
    st.one_of(st.none(), texts()),
    st.integers(1, 3),
    st.randoms(use_true_random=False),
)
def test_drafts_of_a_batch_are_the_best_nodes_of_each(together, corpus, branches, rng):
    """As many as a judge keeps, ragged, beside what is best of the rest."""
    other = None
    if corpus is not None:
        other = automaton_of(corpus)
        other.freeze()
    lookup = _C.PromptLookup(other, branches, 1, UNBOUNDED, 2)

    class Judge:
        def followed(self, requests, kinds, accepted):
            assert len(requests) == len(kinds) == len(accepted)

        def keep(self, requests, kinds):
            self.heard = dict(zip(requests, kinds, strict=True))
            return [rng.randint(0, len(of)) for of in kinds]

    for grown in range(1, 1 + max(map(len, together))):
        batch = {7 + i: text[:grown] for i, text in enumerate(together)}
        judge = rng.choice((None, Judge()))
        tokens, parents, is_chain, depths, counts, left_out = lookup.draft(
            list(batch), list(batch.values()), 4, 9, judge
        )
        for row, (request, text) in enumerate(batch.items()):
            cursor = (0, 0) if other is None else other.follow((0, 0), text)
            whole, above, _, worth = _C.draft_trie(
                automaton_of(text), other, cursor, 4, branches, 1, UNBOUNDED, 2, 9
            )
            count, padding = counts[row], tokens.shape[1] - counts[row]
            assert tokens[row].tolist() == whole[:count] + [0] * padding
            assert parents[row].tolist() == above[:count] + [-2] * padding
            if judge is None:
                assert count == len(whole)
            else:
                assert judge.heard[request] == kinds_of(worth[1:])
            rest = (above[count], whole[count]) if count < len(whole) else (-1, 0)
            assert left_out[row] == rest
            levels = [0]
            for parent in above[1:count]:
                levels.append(levels[parent] + 1)
            assert depths[row] == max(levels)
        own = [parents[row, 1:count].tolist() for row, count in enumerate(counts)]
        assert is_chain == all(of == list(range(len(of))) for of in own)


@pytest.mark.parametrize("branches", [1, 3])
@pytest.mark.parametrize("seed", range(8))
def test_a_judge_hears_how_far_texts_went_along_all_that_was_offered(branches, seed):
    """Whatever was kept of it, and also where some steps were drafted by nobody."""
    rng = random.Random(seed)
    lookup = _C.PromptLookup(None, branches, 1, UNBOUNDED, 2)
    text = [rng.randint(0, 2) for _ in range(4)]
    offered: tuple[int, list[int], list[int]] | None = None  # length then, its parents, its kinds

    class Judge:
        def followed(self, requests, kinds, accepted):
            self.told = kinds[0], accepted[0]

        def keep(self, requests, kinds):
            self.offered = kinds[0]
            return [rng.randint(0, len(of)) for of in kinds]

    for _ in range(40):
        judge = Judge()
        lookup.draft([1], [text], 4, 9, judge)
        walk: list[int] = []
        known: list[int] = []
        if offered is not None:
            length, tokens, parents, known = offered
            at = 0
            for token in text[length:]:
                below = [n for n in range(1, len(tokens)) if parents[n] == at]
                at = next((n for n in below if tokens[n] == token), -1)
                if at < 0:
                    break
                walk.append(at)
            else:  # the text has not come further
                known = known[
                    : next((n - 1 for n in range(1, len(tokens)) if parents[n] == at), 99)
                ]
        assert judge.told == (known, walk)
        tokens, parents, _, worth = _C.draft_trie(
            automaton_of(text), None, (0, 0), 4, branches, 1, UNBOUNDED, 2, 9
        )
        assert judge.offered == kinds_of(worth[1:])
        offered = len(text), tokens, parents, judge.offered
        text = text + [rng.randint(0, 2) for _ in range(rng.choice((1, 1, 2, 6)))]


def batch_of(*prompts):
    params = SamplingParams(max_tokens=8)
    requests = [Request(p, params, request_id=i, pages=[0]) for i, p in enumerate(prompts)]
    return Batch(requests, torch.device("cpu"), ())


def test_a_tree_of_a_smaller_budget_is_the_first_nodes_of_a_larger_one():
    batch = batch_of([1, 2, 3, 1, 2, 4, 1, 2, 5, 1, 2])
    drafter = NgramDrafter(max_depth=4, branches=3)
    whole = drafter.propose(batch, Budget(4, 99))
    assert whole.node_counts == [13]
    for nodes in range(1, 12):
        part = drafter.propose(batch, Budget(4, nodes))
        assert part.node_counts == [nodes + 1]
        assert part.tokens[0].tolist() == whole.tokens[0, : nodes + 1].tolist()
        assert torch.equal(part.links.depth, whole.links.depth[:, : nodes + 1])
    # The three tokens that followed [1, 2] once each, the newest first.
    assert whole.tokens[0, whole.links.depth[0] == 1].tolist() == [5, 4, 3]


def test_ragged_trees_share_a_batch():
    batch = batch_of([1, 2, 3, 1, 2], [7, 8], [5, 5])
    tree = NgramDrafter(max_depth=3).propose(batch, Budget(3, 99))
    assert tree.node_counts == [4, 1, 4]
    assert tree.depths == [3, 0, 3]
    assert tree.tokens.tolist() == [[2, 3, 1, 2], [8, 0, 0, 0], [5, 5, 5, 5]]
    assert tree.links.depth.tolist() == [[0, 1, 2, 3], [0, -1, -1, -1], [0, 1, 2, 3]]


def test_a_sequence_is_forgotten_when_it_leaves():
    batch = batch_of([1, 2, 1])
    drafter = NgramDrafter()
    drafter.propose(batch, Budget(2, 9))
    drafter.release(batch.requests[0])
    other = batch_of([4, 3, 4])  # the same request id
    assert drafter.propose(other, Budget(2, 9)).tokens.tolist() == [[4, 3, 4]]


def test_a_corpus_is_drafted_from_where_it_matches_longer(tmp_path):
    file = tmp_path / "ids.json"
    file.write_text(json.dumps([[9, 1, 2, 3, 4, 5], [2, 6]]))
    corpus = load_corpus(file, None, 10)
    drafter = NgramDrafter(max_depth=3, corpus=corpus, corpus_margin=1)
    # No match of its own; one as long as the corpus's; none at all; the newest of the corpus; one
    # token against two of the corpus, and against three.
    prompts = [[1, 2], [9, 1, 2, 8, 9, 1, 2], [7], [7, 2], [2, 8, 1, 2], [2, 8, 9, 1, 2]]
    tree = drafter.propose(batch_of(*prompts), Budget(3, 99))
    assert tree.tokens.tolist() == [
        [2, 3, 4, 5], [2, 8, 9, 1], [7, 0, 0, 0], [2, 6, 0, 0], [2, 8, 1, 2], [2, 3, 4, 5]
    ]  # fmt: skip
    assert drafter.describe()["corpus_tokens"] == 8


def test_by_default_a_corpus_wins_where_it_matches_much_longer(tmp_path):
    file = tmp_path / "ids.json"
    file.write_text(json.dumps([1, 2, 3, 4, 5, 6, 7, 8]))
    drafter = NgramDrafter(max_depth=1, corpus=load_corpus(file, None, 10))
    tree = drafter.propose(batch_of([6, 9, 2, 3, 4, 5, 6], [6, 9, 1, 2, 3, 4, 5, 6]), Budget(1, 9))
    # One token of its own against five of the corpus, and against six.
    assert tree.tokens.tolist() == [[6, 9], [6, 7]]
    assert SpecdecConfig().ngram.max_match is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"min_match": 0}, "ngram min_match is 0"),
        ({"min_match": 3, "max_match": 2}, "ngram max_match is 2"),
        ({"branches": 0}, "ngram branches is 0"),
        ({"corpus_margin": -1}, "ngram corpus_margin is -1"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        NgramDrafter(**settings)


def test_a_corpus_is_read_in_every_format(tmp_path):
    tokenizer = tiny_tokenizer()
    text = "the quick brown fox jumps over the lazy dog"
    ids = tokenizer.encode(text)
    (tmp_path / "a.txt").write_text(text)
    (tmp_path / "a.json").write_text(json.dumps(ids))
    (tmp_path / "a.jsonl").write_text(f"{json.dumps(ids[:4])}\n\n{json.dumps(ids[4:])}\n")
    np.save(tmp_path / "a.npy", np.array(ids, dtype=np.uint16))
    for name in ("a.txt", "a.json", "a.jsonl", "a.npy"):
        marked = tmp_path / f"marked-{name}"  # texts with a byte-order mark are the same texts
        content = (tmp_path / name).read_bytes()
        marked.write_bytes(content if name.endswith("npy") else b"\xef\xbb\xbf" + content)
        for file in (tmp_path / name, marked):
            corpus = load_corpus(file, tokenizer, len(tokenizer))
            assert len(corpus) == len(ids), file
            assert corpus.follow((0, 0), ids)[1] == len(ids), file


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", None, "No such file"),
        ("a.txt", b"", "is empty"),
        ("a.txt", b"\xff\xfe\xfa", "is not UTF-8"),
        ("a.json", b"{", "a.json is not JSON"),
        ("a.json", b'{"ids": [1]}', "holds \"{'ids'"),
        ("a.json", b"[1, 2.5]", "holds '2.5'"),
        ("a.json", b"[[1, true]]", "holds 'True'"),
        ("a.json", b"[1, 160]", r"token id 160; the target's ids are in \[0, 160\)"),
        ("a.json", b"[1, -3]", "token id -3"),
        ("a.jsonl", b"[1]\n[2,]\n", "a.jsonl, line 2 is not JSON"),
        ("a.jsonl", b"[1]\n" + b"[" * 100_000, "a.jsonl, line 2 is not JSON"),
        ("a.json", b"[" + b"9" * 5000 + b"]", "a.json is not JSON"),
        ("a.jsonl", b"[1]\n7\n", "line 2 holds '7'"),
        ("a.npy", b"no array", "is not a .npy array"),
    ],
)
def test_a_bad_corpus_is_refused(tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message) as error:
        load_corpus(tmp_path / name, tiny_tokenizer(), 160)
    assert "ngram corpus" in str(error.value)


def test_arrays_that_are_no_tokens_are_refused(tmp_path):
    np.save(tmp_path / "a.npy", np.zeros(3))
    with pytest.raises(ValueError, match="holds float64; it must be an array of integers"):
        load_corpus(tmp_path / "a.npy", None, 160)
    with pytest.raises(ValueError, match="Is a directory"):
        load_corpus(tmp_path, None, 160)
    (tmp_path / "b.txt").write_text("text")
    with pytest.raises(ValueError, match="the target has no tokenizer"):
        load_corpus(tmp_path / "b.txt", FakeLM(vocab_size=8).tokenizer, 8)
