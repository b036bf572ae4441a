"""New text and stop strings, against decoding everything at every token."""

import random

import pytest

from helpers.tiny_models import tiny_tokenizer
from helpers.vocabularies import KINDS, reheaded, trained_tokenizer
from inferlab import SpeculativePipeline
from inferlab.baseline import LocalBaselineRunner
from inferlab.models import FakeLM, HFModel
from inferlab.specdec.text import (
    NewText,
    StopStrings,
    TextStream,
    special_tokens,
    text_decoder,
    unsettled_tokens,
)

TOKENIZERS = {
    "bundled": lambda: HFModel.load("inferlab/tiny", device="cpu").tokenizer,
    "fake": lambda: FakeLM().tokenizer,
    "tiny": tiny_tokenizer,
    **{kind: lambda kind=kind: trained_tokenizer(kind) for kind in KINDS},
}
PROMPT = "import os\n\ndef parse_args("


@pytest.fixture(scope="module", params=TOKENIZERS)
def tokenizer(request):
    return TOKENIZERS[request.param]()


def random_output(tokenizer, rng: random.Random, length: int) -> list[int]:
    """Ids at random: any at all, special ones, bytes that make no characters, and real text."""
    real = tokenizer.encode(
        "usage: show program's version — 漢字 and é 🙂🙂 exit" * 4, add_special_tokens=False
    )
    special = list(special_tokens(tokenizer))
    out: list[int] = []
    while len(out) < length:
        kind = rng.random()
        if kind < 0.4:
            at = rng.randrange(len(real))
            out += real[at : at + rng.randrange(1, 30)]
        elif kind < 0.7:
            out += [rng.choice(special)] * rng.randrange(1, 25)
        else:
            out += [rng.randrange(len(tokenizer)) for _ in range(rng.randrange(1, 8))]
    return out[:length]


def expected_end(tokenizer, prompt: list[int], out: list[int], stop: str) -> int | None:
    """The first token after which the new text contains ``stop``, by decoding all of it."""
    decode = text_decoder(tokenizer)
    for n in range(1, len(out) + 1):
        text, before = decode(prompt + out[:n]), decode(prompt)
        if stop in (text[len(before) :] if text.startswith(before) else decode(out[:n])):
            return n
    return None


def found_end(tokenizer, prompt: list[int], out: list[int], stop: str, min_tokens=0) -> int | None:
    text = NewText(text_decoder(tokenizer), prompt)
    strings = StopStrings((stop,), text, special_tokens(tokenizer), min_tokens)
    return next((n for n, token in enumerate(out, 1) if strings.add(token)), None)


def test_a_stop_string_is_found_at_the_first_token_that_completes_it(tokenizer):
    rng = random.Random(1)
    prompt = tokenizer.encode(PROMPT)
    for _ in range(4):
        out = random_output(tokenizer, rng, 150)
        text = NewText(text_decoder(tokenizer), prompt).of(out)
        for _ in range(12):
            at = rng.randrange(len(text))
            stop = text[at : at + rng.randrange(1, 12)]
            if "\ufffd" in stop:
                continue  # may be a character on its way
            assert found_end(tokenizer, prompt, out, stop) == expected_end(
                tokenizer, prompt, out, stop
            ), stop


def test_the_prompts_text_and_the_new_text_are_the_whole_text(tokenizer):
    rng = random.Random(2)
    decode = text_decoder(tokenizer)
    for _ in range(20):
        prompt = tokenizer.encode(PROMPT[: rng.randrange(1, len(PROMPT))])
        out = tokenizer.encode("usage of the parser, é 漢", add_special_tokens=False)
        out = out[rng.randrange(len(out) - 1) :]
        if decode(prompt + out).startswith(decode(prompt)):
            new = NewText(decode, prompt).of(out)
            assert decode(prompt) + new == decode(prompt + out)


@pytest.mark.parametrize("kind", ["unigram", "sentencepiece_bpe"])
def test_new_text_keeps_the_blank_that_it_starts_with(kind):
    tokenizer = trained_tokenizer(kind)
    ids = tokenizer.encode("the parser of the arguments")
    at = next(i for i in range(3, len(ids)) if tokenizer.convert_ids_to_tokens(ids[i])[0] == "▁")
    decode = text_decoder(tokenizer)
    assert NewText(decode, ids[:at]).of(ids[at:]).startswith(" ")
    assert not decode(ids[at:]).startswith(" ")


def test_a_character_that_begins_in_the_prompt_is_new_text():
    tokenizer = FakeLM().tokenizer
    prompt, out = [ord("a"), 0xE2, 0x82], [0xAC, ord("b")]
    new = NewText(text_decoder(tokenizer), prompt)
    assert [new.of(out[:1]), new.of(out)] == ["€", "€b"]
    assert found_end(tokenizer, prompt, out, "€") == 1


def test_a_name_of_a_special_token_means_the_token():
    tokenizer = FakeLM().tokenizer
    end = tokenizer.eos_token_id
    assert found_end(tokenizer, [300], [301, 302, end, 303], "<|end|>") == 3
    assert found_end(tokenizer, [300], [301, end, 302, end], "<|end|>", min_tokens=2) == 4
    assert found_end(tokenizer, [300], [301, end], "<|end") is None


def test_what_stood_before_min_tokens_does_not_count():
    tokenizer = FakeLM().tokenizer
    end = tokenizer.eos_token_id
    out = [*b"abab", end, *b"ab"]
    assert found_end(tokenizer, [300], out, "ab") == 2
    assert found_end(tokenizer, [300], out, "ab", min_tokens=2) == 4
    assert found_end(tokenizer, [300], out, "ab", min_tokens=3) == 4
    assert found_end(tokenizer, [300], out, "ab", min_tokens=5) == 7


@pytest.mark.parametrize("piece", [b"ab ", "漢".encode(), b"\x80"], ids=["text", "han", "invalid"])
def test_long_outputs_are_not_decoded_as_a_whole_at_every_token(piece):
    tokenizer = FakeLM().tokenizer
    longest = 0

    def decode(ids):
        nonlocal longest
        longest = max(longest, len(ids))
        return text_decoder(tokenizer)(ids)

    strings = StopStrings(("no such text",), NewText(decode, [300]), special_tokens(tokenizer))
    for token in [*(piece * 400), *([tokenizer.eos_token_id] * 1000), *b"no such tex"]:
        assert not strings.add(token)
    assert strings.add(ord("t"))
    assert longest < 100


def test_the_pipeline_stops_behind_tokens_without_text():
    pipeline = SpeculativePipeline(kv_memory_mb=64)
    tokenizer = pipeline.target.tokenizer
    end = tokenizer.eos_token_id
    options = {
        "max_tokens": 120,
        "temperature": 1.2,
        "seed": 3,
        "ignore_eos": True,
        "logit_bias": {end: 7.0},
    }
    free = pipeline.generate("import os", **options)
    out, text = free["token_ids"], free["text"]
    assert text == tokenizer.decode(out, skip_special_tokens=True)
    last_end = max(i for i, token in enumerate(out) if token == end)
    assert out.count(end) > 3
    at = len(tokenizer.decode(out[:last_end], skip_special_tokens=True))
    for stop in {text[at - 3 : at + 3], text[at - 2 : at + 2], text[4:9]}:
        result = pipeline.generate("import os", stop=stop, **options)
        assert result["num_tokens"] == expected_end(tokenizer, [], out, stop)
        assert result["text"] == text[: text.index(stop)]
        assert result["finish_reason"] == "stop_string"


def test_a_stop_string_without_a_tokenizer_is_refused_before_anything_runs():
    pipeline = SpeculativePipeline(target=FakeLM(64), draft_mode="none")
    with pytest.raises(ValueError, match=r"stop is .* has no tokenizer .*stop_token_ids"):
        pipeline.generate([5, 6], 10, stop="x")
    assert len(pipeline.generate([5, 6], 10)["token_ids"]) == 10


@pytest.mark.parametrize("kind", ["unigram", "sentencepiece_bpe", "byte_bpe"])
def test_prompt_and_text_of_a_result_are_the_whole_text(kind, tmp_path):
    tokenizer = trained_tokenizer(kind)
    model = reheaded("inferlab/tiny", tokenizer)
    pipeline = SpeculativePipeline(target=model, draft_mode="none", kv_memory_mb=32)
    decode = text_decoder(tokenizer)
    blanks = 0
    for seed, prompt in enumerate(("import os", "def main", "class Error", "return the") * 3):
        ids = tokenizer.encode(prompt)
        for given in (prompt, ids):
            result = pipeline.generate(given, 8, temperature=1.5, seed=seed)
            assert decode(ids) + result["text"] == decode(ids + result["token_ids"])
            blanks += result["text"].startswith(" ")
    assert blanks
    with model.plain() as plain:
        plain.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    runner = LocalBaselineRunner(model_name=str(tmp_path), device="cpu")
    result = runner.run("class Error", 8, temperature=0.0)
    assert result["text"] == decode(tokenizer.encode("class Error")) + result["completion"]


def test_pieces_of_a_stream_are_the_text(tokenizer):
    rng = random.Random(3)
    decode = text_decoder(tokenizer)
    for _ in range(6):
        prompt = (
            tokenizer.encode(PROMPT) if rng.random() < 0.7 else random_output(tokenizer, rng, 9)
        )
        out = random_output(tokenizer, rng, 120)
        text = NewText(decode, prompt)
        stream, pieces, at = TextStream(text, (), unsettled_tokens(tokenizer)), [], 0
        while at < len(out):
            count = rng.randrange(1, 6)
            pieces.append(stream.add(out[at : at + count]))
            at += count
        whole = text.of(out)
        given = "".join(pieces)
        assert whole.startswith(given)
        assert given + stream.end(whole) == whole


def test_what_may_begin_a_stop_string_is_kept_back(tokenizer):
    rng = random.Random(4)
    prompt = tokenizer.encode(PROMPT)
    found = 0
    for _ in range(12):
        out = tokenizer.encode("usage: show program's version and exit\n" * 6)
        text = NewText(text_decoder(tokenizer), prompt)
        whole = text.of(out)
        start = rng.randrange(len(whole) // 2, len(whole) - 8)
        stops = (whole[start : start + 8], "never said")
        strings = StopStrings(stops, text, special_tokens(tokenizer))
        stream, given = TextStream(text, stops), ""
        for n, token in enumerate(out, 1):
            ended = strings.add(token)
            given += stream.add([token]) if not ended else ""
            if ended:
                cut = strings.cut(text.of(out[:n]))
                assert cut.startswith(given)
                assert given + stream.end(cut) == cut
                found += 1
                break
            assert not any(stop in given for stop in stops)
    assert found == 12


def test_a_stream_gives_text_as_soon_as_it_is_certain(tokenizer):
    out = tokenizer.encode("usage: show the version and exit\n" * 4, add_special_tokens=False)
    stream = TextStream(NewText(text_decoder(tokenizer), tokenizer.encode(PROMPT)))
    assert all(stream.add([token]) for token in out[1:])
