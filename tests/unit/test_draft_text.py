"""A target's tokens as a draft of another vocabulary reads them, and what it writes on."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from helpers.vocabularies import KINDS, trained_tokenizer
from inferlab.models import VocabularyMap
from inferlab.specdec.drafters.draft_text import DraftText

TEXT = 'def parse(self, x):\n    return [a + 1 for a in x]  # "quoted", not unquoted'
SIZE = 1200


def text_of(vocabulary: VocabularyMap, tokens: list[int], spelt: bool = False) -> DraftText:
    text = DraftText(vocabulary)
    text.update(tokens, spelt=spelt)
    return text


@pytest.mark.parametrize("spelt", [False, True])
@pytest.mark.parametrize("kind", ["byte_bpe", "unigram", "sentencepiece_bpe"])
def test_a_text_is_read_in_the_drafts_tokens(kind, spelt):
    vocabulary = VocabularyMap(trained_tokenizer("byte_bpe", 700), trained_tokenizer(kind))
    tokens = trained_tokenizer("byte_bpe", 700).encode(TEXT)
    text = text_of(vocabulary, tokens, spelt)
    assert vocabulary.draft.spell(text.ids).strip() == TEXT.encode()
    if spelt:
        # Word by word as all at once.
        assert text.ids == trained_tokenizer(kind).encode(TEXT)


def test_known_tokens_are_taken_over_as_they_are():
    tokenizer = trained_tokenizer("byte_bpe")
    letters = [tokenizer.get_vocab()[c] for c in "return"]
    vocabulary = VocabularyMap(tokenizer, tokenizer)
    assert text_of(vocabulary, letters).ids == letters
    assert text_of(vocabulary, letters, True).ids == tokenizer.encode("return")


@settings(deadline=None, max_examples=60)
@given(
    tokens=st.lists(st.integers(0, SIZE - 1), min_size=1, max_size=60),
    cuts=st.lists(st.integers(1, 9), min_size=1),
    target=st.sampled_from(KINDS),
    draft=st.sampled_from(KINDS),
)
def test_any_tokens_step_by_step_are_as_all_at_once(tokens, cuts, target, draft):
    """Garbage too: half characters, special tokens anywhere."""
    vocabulary = VocabularyMap(trained_tokenizer(target), trained_tokenizer(draft))
    text = DraftText(vocabulary)
    end, turn = 0, 0
    while end < len(tokens):
        end += cuts[turn % len(cuts)]
        turn += 1
        text.update(tokens[:end])
        text.reuse()
        assert text.cached == text.ids[: len(text.cached)]
        assert len(text.cached) < max(len(text.ids), 1)
        text.cached = list(text.ids)
        proposed = text.continued(text.ids[-4:], 5)
        assert len(proposed) <= 5
        assert all(0 <= id_ < SIZE for id_ in proposed)
    assert text.ids == text_of(vocabulary, tokens).ids


def test_a_new_token_may_change_the_end_of_what_was_read():
    target, draft = trained_tokenizer("byte_bpe", 700), trained_tokenizer("byte_bpe")
    vocabulary = VocabularyMap(target, draft)
    tokens = target.encode(TEXT)
    text = DraftText(vocabulary)
    kept = []
    for end in range(1, len(tokens) + 1):
        text.update(tokens[:end], spelt=True)
        before = len(text.cached)
        text.reuse()
        kept.append(len(text.cached) - before)
        text.cached = list(text.ids)
    assert min(kept) < 0, "nothing was ever read anew: nothing was tested"
    # Nearly all of it stays.
    assert sum(-k for k in kept) < 2 * len(tokens)


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram", "sentencepiece_bpe"])
def test_what_the_draft_writes_becomes_the_targets_tokens(kind):
    target, draft = trained_tokenizer("byte_bpe", 900), trained_tokenizer(kind)
    vocabulary = VocabularyMap(target, draft)
    tokens = target.encode("def parse(self, parser):\n    return self.parse_args(parser)")
    right = 0
    for cut in range(1, len(tokens)):
        text = text_of(vocabulary, tokens[:cut], True)
        rest = vocabulary.target.spell(tokens[cut:])
        proposed = text.continued(vocabulary.draft.longest_match(rest), 100)
        assert vocabulary.target.spell(proposed) == rest
        right += proposed == tokens[cut:]
    assert right > 0.8 * (len(tokens) - 1)


def test_a_special_token_ends_what_the_draft_writes():
    target, draft = trained_tokenizer("byte_bpe", 900), trained_tokenizer("unigram")
    vocabulary = VocabularyMap(target, draft)
    text = text_of(vocabulary, target.encode("return"))
    written = [*draft.encode("self", add_special_tokens=False), draft.eos_token_id, 50, 51]
    assert text.continued(written, 9) == [*target.encode(" self"), target.eos_token_id]
    assert text.continued([draft.eos_token_id], 9) == [target.eos_token_id]
    assert text.continued(written, 1) == target.encode(" self")[:1]


def test_each_begins_a_text_in_its_own_way():
    plain, framed = trained_tokenizer("byte_bpe"), trained_tokenizer("unigram")
    there = VocabularyMap(plain, framed)
    assert text_of(there, plain.encode("return")).ids[0] == framed.bos_token_id
    bos = [plain.bos_token_id, *plain.encode("return")]
    assert text_of(there, bos).ids.count(framed.bos_token_id) == 1
    back = VocabularyMap(framed, plain)
    assert text_of(back, framed.encode("return")).ids[0] == plain.bos_token_id
    end = [*plain.encode("return"), plain.eos_token_id, *plain.encode("x")]
    assert framed.eos_token_id in text_of(there, end).ids
