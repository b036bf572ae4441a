"""What an engine emits as pieces of text."""

from __future__ import annotations

from collections.abc import Callable, Generator, Sequence
from contextlib import closing
from dataclasses import dataclass

from inferlab.scheduler import Request
from inferlab.specdec.engine import Engine
from inferlab.specdec.results import SpecdecResult
from inferlab.specdec.text import NewText, TextStream, text_decoder, unsettled_tokens


@dataclass(frozen=True)
class Piece:
    """Some text of a stream, and what it was made of.

    Attributes:
        index: of the prompt.
        text: what is new, possibly nothing.
        token_ids: the new tokens; their text may come with a later piece.
        drafted: how many of them were drafted and accepted; the others are the target's own.
        result: what `SpeculativePipeline.generate` returns, with a prompt's last piece.
    """

    index: int
    text: str
    token_ids: list[int]
    drafted: int
    result: SpecdecResult | None = None


def run_pieces(
    engine: Engine,
    requests: Sequence[Request],
    result_of: Callable[[int], SpecdecResult],
    with_text: bool = True,
) -> Generator[Piece]:
    """Runs requests, numbered in this order; closing it aborts what has not ended.

    Args:
        result_of: the result of the request of a number, once it has ended.
        with_text: False leaves ``Piece.text`` empty, which saves its decoding.
    """
    index_of = {request: index for index, request in enumerate(requests)}
    decode = text_decoder(engine.target.tokenizer)
    unsettled = unsettled_tokens(engine.target.tokenizer) if with_text else frozenset()
    texts = [
        TextStream(NewText(decode, r.prompt), r.params.stop, unsettled)
        for r in (requests if with_text else ())
    ]
    with closing(engine.run(requests)) as emissions:
        for emission in emissions:
            index = index_of[emission.request]
            text, result = "", None
            if emission.finished:
                result = result_of(index)
                text = texts[index].end(result["text"]) if with_text else ""
            elif with_text:
                text = texts[index].add(emission.tokens)
            yield Piece(index, text, emission.tokens, emission.drafted, result)
