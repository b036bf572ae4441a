"""The tokenizer of the bundled models: byte-level BPE that knows about indentation."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from inferlab.training.material.corpus import Corpus, is_test_file
from inferlab.training.target.architectures import MAX_POSITIONS

END_OF_TEXT = "<|endoftext|>"

# In this order: indentation as one piece; a word with at most one character glued to its front
# (" name", ".name", "_name"); up to three digits; punctuation; newlines; other white space.
# Newlines stay apart from the indentation behind them, so that a prompt may end in either.
_PIECES = (
    r"(?<![^\n])[ \t]+"
    r"|[^\r\n\p{L}\p{N}]?\p{L}+"
    r"|\p{N}{1,3}"
    r"| ?[^\s\p{L}\p{N}]+"
    r"|[\r\n]+"
    r"|\s+(?!\S)|\s+"
)


def corpus_tokenizer(corpus: Corpus, vocab_size: int) -> PreTrainedTokenizerFast:
    """A tokenizer that has learnt from the training files of a corpus, test suites left out."""
    library = [path for path in corpus.train_files() if not is_test_file(path)]
    return train_tokenizer(
        (text for path in library if (text := corpus.read(path))),
        vocab_size=vocab_size,
        max_length=MAX_POSITIONS,
    )


def train_tokenizer(
    texts: Iterable[str], *, vocab_size: int, max_length: int
) -> PreTrainedTokenizerFast:
    """Learns byte-level BPE merges; `decode(encode(text)) == text` for every text.

    `<|endoftext|>` (id 0) is begin, end and padding token at once. Encoding adds no token.

    Args:
        texts: documents to learn from.
        vocab_size: number of tokens including the 256 bytes and `<|endoftext|>`.
        max_length: context length in tokens, noted in the tokenizer's configuration.

    Raises:
        ValueError: the texts hold too few different pairs for that many tokens.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_PIECES), "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=[END_OF_TEXT],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(texts, trainer)
    if tokenizer.get_vocab_size() != vocab_size:
        raise ValueError(
            f"--corpus: it yields only {tokenizer.get_vocab_size()} tokens, the model's vocabulary "
            f"has {vocab_size}; use a larger corpus or a smaller --vocab-size"
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=END_OF_TEXT,
        eos_token=END_OF_TEXT,
        pad_token=END_OF_TEXT,
        model_max_length=max_length,
        clean_up_tokenization_spaces=False,
        model_input_names=["input_ids", "attention_mask"],
    )
