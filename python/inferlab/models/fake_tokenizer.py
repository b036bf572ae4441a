"""FakeLM's tokenizer: every byte, and words to make what it writes readable. Built in memory."""

from __future__ import annotations

from functools import cache
from itertools import product

from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from inferlab.models.spelling import byte_alphabet

EOS_ID = 256
FIRST_WORD_ID = 257
MIN_VOCAB = 320

_WORDS = """
the of and to in a is that for it as was with be by on not he his but at are this have from or had
an they which one you were all her she there would their we him been has when who will no more if
out so up said what its about than into them can only other time new some could these two may
first then do any like my now over such our man me even most made after also did many off before
must well back through years much where your way down should because long each just state those
people too little good world make very year still see own work men day get here between both life
being under three never know same last another while us might great old come since against go came
right used take token draft model tree cache page node batch key value prompt text small large
fast slow step next final early late open close light dark water fire stone river mountain forest
city street house door window table paper letter word line story music colour green blue red white
black morning evening night summer winter north south east west left hand eye voice heart mind
idea question answer number point side end part place road sea sky sun moon star wind rain snow
bird fish horse leaf grass field farm bread milk salt sugar fruit apple cup plate chair bed wall
floor glass metal paint brush knife boat train ship wheel
"""


@cache
def fake_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Ids 0-255 are the bytes, 256 is ``<|end|>``, then words with a leading space.

    Text goes in and comes out unchanged: words it knows become one token, all else bytes.

    Raises:
        ValueError: `vocab_size` below 320.
    """
    if vocab_size < MIN_VOCAB:
        raise ValueError(
            f"vocab_size is {vocab_size}, the fake tokenizer needs at least {MIN_VOCAB}"
        )
    alphabet = byte_alphabet()
    # Scores: a word beats the bytes that spell it.
    pieces = [(alphabet[byte], -10.0) for byte in range(256)]
    pieces.append(("<|end|>", -100.0))
    pieces += [(alphabet[32] + word, -1.0) for word in _words(vocab_size - FIRST_WORD_ID)]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=0))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|end|>")


def _words(count: int) -> list[str]:
    """`count` different words: common ones, then made-up ones of two syllables and more."""
    words = list(dict.fromkeys(_WORDS.split()))[:count]
    known = set(words)
    syllables = [c + v for c, v in product("bdfgklmnprstvz", "aeiou")]
    length = 2
    while len(words) < count:
        for parts in product(syllables, repeat=length):
            word = "".join(parts)
            if word not in known:
                words.append(word)
            if len(words) == count:
                break
        length += 1
    return words
