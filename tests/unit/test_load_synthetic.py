"""Made-up texts have exactly the tokens that were asked for, whatever the tokenizer."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from helpers.tiny_models import tiny_tokenizer
from helpers.vocabularies import KINDS, corpus, trained_tokenizer
from inferlab.errors import UsageError
from inferlab.lengths import Lengths
from inferlab.load.conversations import Conversation
from inferlab.load.synthetic import Synthetic, Writer, make_conversations
from inferlab.models import BUNDLED, ModelLoadError
from inferlab.models.fake_tokenizer import fake_tokenizer
from inferlab.models.loading import load_tokenizer


def glued() -> PreTrainedTokenizerFast:
    """A vocabulary without spaces, whose words merge with their neighbours."""
    tokenizer = Tokenizer(models.BPE(unk_token="<unk>"))
    tokenizer.decoder = decoders.Fuse()
    trainer = trainers.BpeTrainer(vocab_size=400, special_tokens=["<unk>"], show_progress=False)
    text = ("".join(c for c in part if c.isalpha())[:20_000] for part in corpus())
    tokenizer.train_from_iterator(text, trainer)
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>")


def bytes_alone() -> PreTrainedTokenizerFast:
    tokenizer = Tokenizer(
        models.BPE({c: i for i, c in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}, [])
    )
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


TOKENIZERS = {
    "inferlab/tiny": lambda: load_tokenizer("inferlab/tiny"),
    "160 ids": tiny_tokenizer,
    "400 ids": lambda: tiny_tokenizer(400),
    "fake": lambda: fake_tokenizer(2000),
    "glued": glued,
    "bytes": bytes_alone,
    **{kind: lambda kind=kind: trained_tokenizer(kind) for kind in KINDS},
}


@cache
def tokenizer_of(name: str) -> Any:
    return TOKENIZERS[name]()


@cache
def writer_of(name: str, seed: int = 0) -> Writer:
    return Writer(tokenizer_of(name), name, seed)


def tokens(name: str, text: str) -> int:
    """Counted anew, by nothing of the writer's."""
    return len(tokenizer_of(name).encode(text, add_special_tokens=False))


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=25, deadline=None)
@given(length=st.integers(1, 700), key=st.integers(0, 2**63))
def test_texts_have_the_tokens_that_were_asked_for(name, length, key):
    writer = writer_of(name)
    text = writer.text(writer.draws(length, key))
    assert tokens(name, text) == writer.tokens(text) == length
    assert text == text.strip()


@pytest.mark.parametrize("name", TOKENIZERS)
@settings(max_examples=15, deadline=None)
@given(prefix=st.integers(1, 200), suffix=st.integers(1, 200), key=st.integers(0, 2**32))
def test_a_shared_beginning_is_the_same_tokens(name, prefix, suffix, key):
    writer = writer_of(name)
    shared = writer.draws(prefix, 1, key)
    texts = [
        writer.text(np.concatenate([shared, writer.draws(suffix, 0, key, i)])) for i in range(2)
    ]
    rows = [tokenizer_of(name).encode(text, add_special_tokens=False) for text in texts]
    alone = tokenizer_of(name).encode(writer.text(shared), add_special_tokens=False)
    assert rows[0][:prefix] == rows[1][:prefix] == alone
    assert [len(row) for row in rows] == [prefix + suffix] * 2


def test_the_seed_decides():
    first, again, other = (
        w.text(w.draws(40, 3))
        for w in (writer_of("fake"), Writer(tokenizer_of("fake")), writer_of("fake", 1))
    )
    assert first == again != other


def first_turns(conversations: list[Conversation]) -> list[str]:
    return [c.turns[0].text for c in conversations]


@pytest.mark.parametrize(
    ("inputs", "low", "high"),
    [("12", 12, 12), ("5-40", 5, 40), ("normal:30:8", 1, 80)],
)
def test_conversations_have_their_lengths(inputs, low, high):
    wanted = Synthetic(60, Lengths.parse(inputs), Lengths.parse("3-9"), turns=2)
    conversations = make_conversations(wanted, writer_of("inferlab/tiny"))
    counts = [tokens("inferlab/tiny", t.text) for c in conversations for t in c.turns]
    assert len(conversations) == 60
    assert len(counts) == 120
    assert all(low <= count <= high for count in counts)
    assert len(set(counts)) > 1 or low == high
    assert {t.max_tokens for c in conversations for t in c.turns} == set(range(3, 10))
    assert len({t.text for c in conversations for t in c.turns}) == 120
    assert [c.id for c in conversations] == list(range(60))
    assert make_conversations(wanted, writer_of("inferlab/tiny")) == conversations


def test_groups_begin_alike_and_go_on_differently():
    wanted = Synthetic(21, Lengths.parse("7"), Lengths.parse("4"), turns=2, groups=4, prefix=50)
    conversations = make_conversations(wanted, writer_of("inferlab/tiny"))
    encoded = [tokenizer_of("inferlab/tiny").encode(text) for text in first_turns(conversations)]
    assert {len(row) for row in encoded} == {57}
    begins: dict[str, set[tuple[int, ...]]] = {}
    for conversation, row in zip(conversations, encoded, strict=True):
        begins.setdefault(str(conversation.id).split("/")[0], set()).add(tuple(row[:50]))
    assert sorted(begins) == [f"group-{i}" for i in range(4)]
    assert all(len(beginnings) == 1 for beginnings in begins.values())
    assert len(set.union(*begins.values())) == 4
    assert len({tuple(row) for row in encoded}) == 21
    sizes = [sum(str(c.id).startswith(f"group-{i}/") for c in conversations) for i in range(4)]
    assert sorted(sizes) == [5, 5, 5, 6]
    assert {tokens("inferlab/tiny", c.turns[1].text) for c in conversations} == {7}


def test_what_cannot_be_met_is_said():
    words = {"<unk>": 0, "7": 1, "_": 2}
    numbers = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(words, unk_token="<unk>")), unk_token="<unk>"
    )
    with pytest.raises(UsageError, match="numbers: no word of its vocabulary is a single token"):
        Writer(numbers, "numbers")
    whole = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel({"<unk>": 0, "a": 1, "b": 2}, "<unk>")),
        unk_token="<unk>",
    )
    with pytest.raises(UsageError, match="whole: its words do not stay single tokens"):
        Writer(whole, "whole")
    with pytest.raises(UsageError, match="at least one token"):
        writer_of("fake").text(writer_of("fake").draws(0, 1))
    with pytest.raises(UsageError, match="seed: -1"):
        Writer(tokenizer_of("fake"), seed=-1)


def test_a_text_whose_tokens_changed_is_not_given_away(monkeypatch):
    """A word that begins to merge with others is noticed where it is written."""
    writer = Writer(tokenizer_of("160 ids"), "160 ids")
    word, id_ = writer._words[0]
    monkeypatch.setattr(writer, "_words", [(word + "qqq", id_), *writer._words[1:]])
    with pytest.raises(UsageError, match="160 ids: a text that should have 400 tokens has"):
        writer.text(writer.draws(400, 1))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"conversations": 0}, "conversations: 0 is not allowed; must be at least 1"),
        ({"turns": 0}, "turns: 0 is not allowed"),
        ({"groups": -1}, "groups: -1 is not allowed"),
        ({"groups": 3}, "groups and prefix: 3 and 0 do not go together"),
        ({"prefix": 3}, "groups and prefix: 0 and 3 do not go together"),
    ],
)
def test_bad_wishes_are_named(change, message):
    given = {"conversations": 1, "inputs": Lengths.parse("1"), "outputs": Lengths.parse("1")}
    with pytest.raises(UsageError, match=message):
        Synthetic(**{**given, **change})


def test_a_tokenizer_is_loaded_without_its_model(tmp_path):
    folder = tmp_path / "made"
    tiny_tokenizer().save_pretrained(folder)
    assert load_tokenizer(folder).get_vocab() == tiny_tokenizer().get_vocab()
    assert load_tokenizer("inferlab/tiny").vocab_size == len(tokenizer_of("inferlab/tiny"))
    with pytest.raises(ModelLoadError, match="no usable tokenizer"):
        load_tokenizer(BUNDLED["inferlab/tiny-medusa"])
    with pytest.raises(FileNotFoundError, match="does not exist"):
        load_tokenizer("./nowhere")
