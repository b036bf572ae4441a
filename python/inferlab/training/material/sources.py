"""Where teaching material comes from: the corpus of `.py` files, or a file of texts or prompts."""

from __future__ import annotations

import hashlib
import json
import platform
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedTokenizerFast

from inferlab.training.material.corpus import Corpus, cut_prompts, stdlib_root, training_texts
from inferlab.training.material.windows import encode_documents

TEST_SHARE = 3  # test suites are spread over as many epochs
HELDOUT_PROMPT_CHARS = 240
HELDOUT_SHARE = 0.05


@dataclass(frozen=True)
class Source:
    """Data as token ids, split by text: what is held out is never taught.

    Attributes:
        name: for messages, e.g. "--data FILE".
        title: for model cards.
        fingerprint: of the contents, so that a cache made of other data is noticed.
        prompts: int32 each; asked of the target as they are. Empty: prompts are cut from texts.
        heldout: int32 each, prompts that acceptance is measured on.
        newline_ids: ids of the tokens that begin a line end.
        epoch_documents: token documents of epoch 0, 1, ..; None when the data has prompts only.
    """

    name: str
    title: str
    fingerprint: str
    prompts: list[np.ndarray]
    heldout: list[np.ndarray]
    newline_ids: np.ndarray
    epoch_documents: Callable[[int], list[np.ndarray]] = field(repr=False)
    documents: bool = True

    def stream(self) -> np.ndarray:
        """All training texts, one behind the other."""
        return np.concatenate(self.epoch_documents(0))


def open_source(
    data: str, corpus: str | None, tokenizer: PreTrainedTokenizerFast, heldout_prompts: int
) -> Source:
    """What `--data` and `--corpus` name."""
    if data == "corpus":
        folder = None if corpus is None else Path(corpus)
        return corpus_source(Corpus.of(folder), tokenizer, heldout_prompts=heldout_prompts)
    if corpus is not None:
        raise ValueError(f"--corpus {corpus}: not with --data {data}; leave one of them out")
    return file_source(Path(data), tokenizer, heldout_prompts=heldout_prompts)


def corpus_source(
    corpus: Corpus, tokenizer: PreTrainedTokenizerFast, *, heldout_prompts: int
) -> Source:
    """The `.py` files of a corpus; prompts are cut from them."""
    cache: dict[int, list[np.ndarray]] = {}

    def epoch_documents(epoch: int) -> list[np.ndarray]:
        turn = epoch % TEST_SHARE
        if turn not in cache:
            texts = list(training_texts(corpus, turn, test_share=TEST_SHARE))
            cache[turn] = encode_documents(texts, tokenizer)
        return cache[turn]

    digest = hashlib.sha256()
    for path in corpus.train_files():
        digest.update(f"{path}\0{(corpus.root / path).stat().st_size}\0".encode())
    return Source(
        name=f"--data corpus ({corpus.root})",
        title=f"the source code of Python's standard library, {platform.python_version()}"
        if corpus.root == stdlib_root()
        else f"the texts of {corpus.root.name}",
        fingerprint=digest.hexdigest(),
        prompts=[],
        heldout=[
            np.array(tokenizer(prompt).input_ids, dtype=np.int32)
            for prompt in cut_prompts(corpus, heldout_prompts, max_chars=HELDOUT_PROMPT_CHARS)
        ],
        newline_ids=newline_ids(tokenizer),
        epoch_documents=epoch_documents,
    )


def newline_ids(tokenizer: PreTrainedTokenizerFast) -> np.ndarray:
    """Ids of the tokens whose text begins with a newline."""
    spellings = ("Ċ", "\n", "<0x0A>")  # byte-level BPE, plain, byte fallback
    return np.array(
        [index for token, index in tokenizer.get_vocab().items() if token.startswith(spellings)]
    )


PIECE_CHARS = 4096
HELDOUT_PROMPT_TOKENS = 64


def file_source(path: Path, tokenizer: PreTrainedTokenizerFast, *, heldout_prompts: int) -> Source:
    """A file of texts or prompts.

    `.txt` is one text. Each line of a `.jsonl` is an object with a `text` to learn from, or with
    something to ask the target: `messages` (chat), `turns` (the first is asked) or `prompt`. Chats
    and turns go through the tokenizer's chat template where it has one. Held out is a twentieth of
    the lines, or of pieces of the text, chosen by a hash of what they say.

    Raises:
        ValueError: the file is missing, empty, no text, or too short; a line is broken, which is
            named by its number.
    """
    name = f"--data {path}"
    if not path.is_file():
        raise ValueError(f"{name}: no such file; name a .txt or .jsonl file, or 'corpus'")
    try:
        content = path.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{name}: not UTF-8 text (byte {error.start}); convert it, e.g. with iconv"
        ) from error
    if not content.strip():
        raise ValueError(f"{name}: the file is empty; name one with text in it")
    if "\0" in content:
        raise ValueError(f"{name}: it holds zero bytes, so it is no text; name a text file")
    if path.suffix == ".jsonl":
        texts, prompts = _read_lines(name, content, tokenizer)
    elif path.suffix == ".txt":
        texts, prompts = list(_pieces(content)), []
    else:
        raise ValueError(f"{name}: expected a file that ends in .txt or .jsonl")
    kept_texts, held_texts = _split(texts)
    kept_prompts, held_prompts = _split(prompts)
    if not held_texts and not held_prompts:
        raise ValueError(
            f"{name}: {len(texts) + len(prompts)} texts or prompts are too few to learn from one "
            "part and to measure on another; use more data"
        )
    documents = encode_documents(kept_texts, tokenizer) if kept_texts else []
    heldout = [*_encode(held_prompts, tokenizer)]
    for document in encode_documents(held_texts, tokenizer) if held_texts else []:
        heldout += [
            document[start : start + HELDOUT_PROMPT_TOKENS]
            for start in range(0, document.size, 4 * HELDOUT_PROMPT_TOKENS)
        ]
    return Source(
        name=name,
        title=path.name,
        fingerprint=hashlib.sha256(content.encode()).hexdigest(),
        prompts=_encode(kept_prompts, tokenizer),
        heldout=[prompt for prompt in heldout if prompt.size > 1][:heldout_prompts],
        newline_ids=newline_ids(tokenizer),
        epoch_documents=lambda epoch: documents,
        documents=bool(documents),
    )


def _encode(prompts: list[str], tokenizer: PreTrainedTokenizerFast) -> list[np.ndarray]:
    encoded = [np.array(tokenizer(prompt).input_ids, dtype=np.int32) for prompt in prompts]
    return [ids for ids in encoded if ids.size]


def _pieces(text: str) -> Iterable[str]:
    """Whole lines, together about `PIECE_CHARS` long."""
    piece: list[str] = []
    size = 0
    for line in text.splitlines(keepends=True):
        piece.append(line)
        size += len(line)
        if size >= PIECE_CHARS:
            yield "".join(piece)
            piece, size = [], 0
    if piece:
        yield "".join(piece)


def _read_lines(
    name: str, content: str, tokenizer: PreTrainedTokenizerFast
) -> tuple[list[str], list[str]]:
    """Texts and prompts of a `.jsonl` file."""
    texts: list[str] = []
    prompts: list[str] = []
    for number, line in enumerate(content.split("\n"), start=1):
        if not line.strip():
            continue
        try:
            entry = json.loads(line)
        except ValueError as error:
            raise ValueError(f"{name}, line {number}: broken JSON: {error}") from error
        try:
            if isinstance(entry.get("text"), str):
                texts.append(entry["text"])
            else:
                prompts.append(_prompt(entry, tokenizer))
        except (AttributeError, KeyError, IndexError, TypeError) as error:
            raise ValueError(
                f"{name}, line {number}: expected an object with 'text', 'prompt', 'messages' "
                "(a list of role and content) or 'turns' (a list of texts)"
            ) from error
    return texts, prompts


def _prompt(entry: dict[str, Any], tokenizer: PreTrainedTokenizerFast) -> str:
    if isinstance(entry.get("prompt"), str):
        return str(entry["prompt"])
    messages = entry.get("messages") or [{"role": "user", "content": entry["turns"][0]}]
    # Up to what a user said last; the target shall answer it.
    last = max(
        i for i, message in enumerate([{"role": "user"}, *messages]) if message["role"] == "user"
    )
    messages = messages[:last] or messages
    if tokenizer.chat_template:
        return str(
            tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        )
    return "\n".join(str(message["content"]) for message in messages)


def _split(texts: list[str]) -> tuple[list[str], list[str]]:
    """Training and held-out texts, apart by what they say; both get one where there are two."""
    unique = list(dict.fromkeys(text for text in texts if text.strip()))
    order = sorted(unique, key=lambda text: hashlib.sha256(text.encode()).digest())
    count = max(1, round(HELDOUT_SHARE * len(order))) if len(order) > 1 else 0
    held = set(order[:count])
    return [text for text in unique if text not in held], [t for t in unique if t in held]
