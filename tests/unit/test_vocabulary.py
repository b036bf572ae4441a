"""Ids of different tokenizers: what they spell, and which mean the same."""

from __future__ import annotations

import pytest
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from helpers.vocabularies import KINDS, permuted, trained_tokenizer
from inferlab.models import FakeLM, HFModel, VocabularyMap
from inferlab.models.spelling import Spelling, ends_inside_character

TEXT = 'def parse(self, x):\n    return [a + 1 for a in x]  # "quoted"'


@pytest.fixture(scope="module")
def target() -> HFModel:
    return HFModel.load("inferlab/tiny", device="cpu", dtype="float32")


@pytest.mark.parametrize("kind", ["byte_bpe", "unigram", "sentencepiece_bpe"])
def test_ids_spell_the_text_they_encode(kind):
    tokenizer = trained_tokenizer(kind)
    spelling = Spelling(tokenizer)
    ids = tokenizer.encode(TEXT, add_special_tokens=False)
    space = b"" if kind == "byte_bpe" else b" "  # sentencepiece puts one before every text
    assert spelling.spell(ids) == space + TEXT.encode()


def test_wordpiece_spells_words_with_the_space_before_them():
    spelling = Spelling(trained_tokenizer("wordpiece"))
    ids = spelling.encode(b" return arguments(self)")
    assert spelling.spell(list(ids)) == b" return arguments( self)"


@pytest.mark.parametrize("kind", KINDS)
def test_a_word_is_encoded_with_its_space_and_without_another(kind):
    spelling = Spelling(trained_tokenizer(kind))
    assert spelling.spell(list(spelling.encode(b" return"))) == b" return"
    if kind != "wordpiece":
        assert spelling.spell(list(spelling.encode(b"   return"))) == b"   return"
        assert spelling.spell(list(spelling.encode(b" "))) == b" "


@pytest.mark.parametrize("kind", ["byte_bpe", "sentencepiece_bpe"])
def test_unknown_characters_are_bytes(kind):
    spelling = Spelling(trained_tokenizer(kind))
    for text in (" é漢字😀".encode(), " é".encode()[:2], " 😀".encode()[:4]):
        assert spelling.spell(list(spelling.encode(text))) == text


@pytest.mark.parametrize("kind", ["unigram", "wordpiece"])
def test_an_unfinished_character_is_left_out_where_there_are_no_bytes(kind):
    spelling = Spelling(trained_tokenizer(kind))
    assert spelling.encode(b" return" + "é".encode()[:1]) == spelling.encode(b" return")


def test_where_a_character_ends():
    assert ends_inside_character("é".encode()[:1])
    assert not ends_inside_character("é".encode())
    assert not ends_inside_character(b"")


@pytest.mark.parametrize("kind", KINDS)
def test_the_longest_tokens_that_spell_a_text(kind):
    spelling = Spelling(trained_tokenizer(kind))
    ids = spelling.longest_match(b"return self")
    assert spelling.spell(ids) == b"return self"
    assert len(ids) < len(b"return self")
    if kind in ("unigram", "wordpiece"):
        assert spelling.longest_match(b"return\x00self") == spelling.longest_match(b"return")


def test_what_comes_before_a_text():
    assert Spelling(trained_tokenizer("unigram")).prefix == (1,)
    assert Spelling(trained_tokenizer("byte_bpe")).prefix == ()


def test_a_tokenizer_without_a_decoder_has_words_with_spaces():
    words = Tokenizer(models.WordLevel({"<unk>": 0, "the": 1}, unk_token="<unk>"))
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=words, unk_token="<unk>")
    assert Spelling(tokenizer).pieces == [None, b" the"]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("other", KINDS)
def test_shared_tokens_spell_the_same(kind, other):
    vocabulary = VocabularyMap(trained_tokenizer(kind), trained_tokenizer(other))
    targets, drafts = (ids.tolist() for ids in vocabulary.shared())
    assert len(set(targets)) == len(set(drafts)) == len(targets) > 100
    for target_id, draft_id in zip(targets, drafts, strict=True):
        assert vocabulary.target.pieces[target_id] == vocabulary.draft.pieces[draft_id]
        assert vocabulary.draft_to_target[draft_id] == target_id
    roles = vocabulary.target.roles
    for role in ("bos", "eos", "unk"):
        assert vocabulary.to_draft[roles[role]] == vocabulary.draft.roles[role]
    if kind == other:
        assert vocabulary.coverage == 1.0


def test_byte_tokens_of_different_kinds_are_the_same():
    vocabulary = VocabularyMap(
        trained_tokenizer("byte_bpe"), trained_tokenizer("sentencepiece_bpe")
    )
    for text in (b"\n", "é".encode()[:1], b" return"):
        assert vocabulary.to_draft[vocabulary.target.ids[text]] == vocabulary.draft.ids[text] > 0


def test_a_letter_comes_before_the_byte_that_spells_it():
    spelling = Spelling(trained_tokenizer("sentencepiece_bpe"))
    vocabulary = trained_tokenizer("sentencepiece_bpe").get_vocab()
    assert spelling.pieces[vocabulary["<0x41>"]] == b"A" == spelling.pieces[vocabulary["A"]]
    assert spelling.ids[b"A"] == vocabulary["A"] > vocabulary["<0x41>"]


def test_one_special_token_of_many_roles_is_the_end_of_text(target):
    vocabulary = VocabularyMap(target.tokenizer, trained_tokenizer("byte_bpe"))
    assert target.tokenizer.bos_token_id == target.tokenizer.eos_token_id == 0
    assert vocabulary.to_draft[0] == vocabulary.draft.roles["eos"]
    assert vocabulary.draft_to_target[vocabulary.draft.roles["bos"]] == 0


def test_shuffled_ids_are_found_again(target):
    draft = permuted("inferlab/tiny-draft")
    vocabulary = VocabularyMap.of(target, draft)
    assert vocabulary.coverage == 1.0
    assert sorted(vocabulary.to_draft) == list(range(target.vocab_size))
    assert draft.tokenizer.encode(TEXT) == [
        vocabulary.to_draft[id_] for id_ in target.tokenizer.encode(TEXT)
    ]


def test_logits_may_be_wider_or_narrower_than_the_tokenizers():
    tokenizer = trained_tokenizer("byte_bpe")
    size = len(tokenizer)
    wide = VocabularyMap(tokenizer, tokenizer, target_size=size + 8, draft_size=size - 8)
    assert wide.to_draft == [*range(size - 8), *[-1] * 16]
    assert wide.draft_to_target.tolist() == list(range(size - 8))


def test_without_a_tokenizer_there_is_no_map(target):
    with pytest.raises(ValueError, match="draft_tokenizer is None"):
        VocabularyMap(target.tokenizer, None)
    with pytest.raises(ValueError, match=r"fake has no tokenizer.*tokenizer\.json"):
        VocabularyMap.of(target, FakeLM(64))
