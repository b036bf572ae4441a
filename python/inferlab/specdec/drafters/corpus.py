"""A corpus file as a suffix automaton: text that drafts may be copied from."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from inferlab import _C

CORPUS_FORMATS = "UTF-8 text, .npy, .json or .jsonl of token ids"


def load_corpus(path: str | os.PathLike[str], tokenizer: Any, vocab_size: int) -> Any:
    """Reads a corpus for `NgramDrafter`; takes about 100 bytes of memory per token.

    Args:
        path: a ``.npy`` array of token ids, a ``.json`` list of ids or of lists of ids, a
            ``.jsonl`` file with a list of ids a line; anything else is UTF-8 text.
        tokenizer: the target's; text only.
        vocab_size: ids are below it.

    Returns:
        A frozen suffix automaton, to be shared by all sequences.

    Raises:
        ValueError: a file that cannot be read, is empty, or holds something else.
    """
    file = Path(path)
    try:
        tokens = _READERS.get(file.suffix.lower(), _read_text)(file, tokenizer)
    except UnicodeDecodeError as error:
        raise ValueError(
            f"ngram corpus {file} is not UTF-8 ({error.reason} at byte {error.start}); it must be "
            f"{CORPUS_FORMATS}"
        ) from error
    except OSError as error:
        raise ValueError(f"ngram corpus {file}: {error.strerror or error}") from error
    if not tokens:
        raise ValueError(f"ngram corpus {file} is empty; it must have at least one token")
    outside = next((t for t in tokens if not 0 <= t < vocab_size), None)
    if outside is not None:
        raise ValueError(
            f"ngram corpus {file} contains token id {outside}; the target's ids are in "
            f"[0, {vocab_size})"
        )
    automaton = _C.SuffixAutomaton()
    automaton.extend(tokens)
    automaton.freeze()
    return automaton


def _read_text(file: Path, tokenizer: Any) -> list[int]:
    text = file.read_text(encoding="utf-8-sig")
    if tokenizer is None:
        raise ValueError(
            f"ngram corpus {file} is text, and the target has no tokenizer; give token ids (.npy, "
            f".json or .jsonl)"
        )
    ids: list[int] = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return ids


def _read_npy(file: Path, tokenizer: Any) -> list[int]:
    try:
        array = np.load(file, allow_pickle=False)
    except (ValueError, EOFError) as error:
        raise ValueError(f"ngram corpus {file} is not a .npy array: {error}") from error
    if not isinstance(array, np.ndarray) or not np.issubdtype(array.dtype, np.integer):
        kind = getattr(array, "dtype", type(array).__name__)
        raise ValueError(f"ngram corpus {file} holds {kind}; it must be an array of integers")
    ids: list[int] = array.ravel().tolist()
    return ids


def _read_json(file: Path, tokenizer: Any) -> list[int]:
    content = _parse(file.read_text(encoding="utf-8-sig"), str(file))
    nested = isinstance(content, list) and any(isinstance(part, list) for part in content)
    return list(_ids(content if nested else [content], str(file)))


def _read_jsonl(file: Path, tokenizer: Any) -> list[int]:
    ids: list[int] = []
    for number, line in enumerate(file.read_text(encoding="utf-8-sig").splitlines(), 1):
        if line.strip():
            where = f"{file}, line {number}"
            ids += _ids([_parse(line, where)], where)
    return ids


def _parse(text: str, where: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:  # not JSON, huge numbers, endless brackets
        raise ValueError(f"ngram corpus {where} is not JSON: {error}") from error


def _ids(documents: Iterable[Any], where: str) -> Iterator[int]:
    for document in documents:
        wrong = [document]
        if isinstance(document, list):
            wrong = [t for t in document if not isinstance(t, int) or isinstance(t, bool)]
        if wrong:
            raise ValueError(
                f"ngram corpus {where} holds {str(wrong[0])[:40]!r}; it must be lists of token ids"
            )
        yield from document


_READERS = {".npy": _read_npy, ".json": _read_json, ".jsonl": _read_jsonl}
