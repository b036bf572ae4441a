"""What a checkpoint's ``generation_config`` asks for: one rule for the engine and for `generate`.

A checkpoint may change how its tokens are chosen. Followed on both sides is what a sampler can do
token by token, by the same formulas:

* a bias on single tokens: ``suppress_tokens``, and the words of ``bad_words_ids`` and
  ``sequence_bias`` that are one token (an end of text is never a bad word, as in transformers);
* ``repetition_penalty``, over prompt and output;
* ``min_new_tokens``, or without it ``min_length``, which counts the prompt;
* ``forced_eos_token_id``, the last token of a text that is as long as it may be, and
  ``forced_bos_token_id``, the first behind a prompt of one token; each a single id.

Everything else that changes tokens is followed on neither side and named once in a warning: words
of several tokens, beams, ``begin_suppress_tokens``, decays, n-grams, contrast, ... So is a finite
``sequence_bias`` beside a repetition penalty: transformers adds it first, the engine behind.
Lengths, temperature, top-k and top-p are the caller's to give; end-of-text ids are always followed.
What changes how `generate` works or what it returns, but no tokens, is left out of the comparison.
"""

from __future__ import annotations

import copy
import json
import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from weakref import WeakSet

from transformers import GenerationConfig

logger = logging.getLogger(__name__)

_WARNED: WeakSet[Any] = WeakSet()  # models, each of which is worth one warning
_WORDS = ("bad_words_ids", "sequence_bias")
_ENDS = ("forced_bos_token_id", "forced_eos_token_id")

# Entries that change tokens and cannot be followed, and the values that change nothing.
_OFF: dict[str, tuple[Any, ...]] = {
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "use_mtp": (False,),
    "guidance_scale": (1,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "remove_invalid_values": (False,),
    "exponential_decay_length_penalty": (),
    "begin_suppress_tokens": ([],),
    "token_healing": (False,),
    "watermarking_config": (),
    "constraints": (),
    "force_words_ids": (),
    "stop_strings": (),
    "max_time": (),
    "prompt_lookup_num_tokens": (),
    "max_new_tokens": (),
    "max_length": (20,),  # what transformers wrote into every file
}

# What the baseline keeps of a checkpoint, beside what is followed.
_KEPT = (
    *("bos_token_id", "eos_token_id", "pad_token_id", "decoder_start_token_id"),
    *("do_sample", "temperature", "top_k", "top_p", "transformers_version"),
)


@dataclass(frozen=True)
class Followed:
    """What both sides follow.

    Attributes:
        bias: what is added to the logits of tokens, by id.
        repetition_penalty: 1 is off.
        min_new_tokens: None where the checkpoint does not say.
        min_length: of prompt and output, where ``min_new_tokens`` is None.
        first_token: the first new token behind a prompt of one; None: it is chosen.
        last_token: the last one of as many as there may be; None: it is chosen.
        dropped: entries, or parts of them, that are not followed.
    """

    bias: dict[int, float] = field(default_factory=dict)
    repetition_penalty: float = 1.0
    min_new_tokens: int | None = None
    min_length: int = 0
    first_token: int | None = None
    last_token: int | None = None
    dropped: tuple[str, ...] = ()

    def least_new_tokens(self, prompt_length: int) -> int:
        """How many new tokens a text must have before it may end."""
        if self.min_new_tokens is not None:
            return self.min_new_tokens
        return max(0, self.min_length - prompt_length)

    def forced(self, prompt_length: int, max_tokens: int) -> dict[int, int]:
        """New tokens that are not chosen, by their place among the new ones."""
        forced = {}
        if self.last_token is not None:
            forced[max_tokens - 1] = self.last_token
        if self.first_token is not None and prompt_length == 1:
            forced.setdefault(0, self.first_token)
        return forced


def followed(model: Any, vocab_size: int | None = None) -> Followed:
    """What a model's generation config asks for and both sides do; nothing without one.

    Args:
        model: a Hugging Face model.
        vocab_size: columns of its logits; None: token ids are not checked against it.

    Raises:
        ValueError: an entry that is not what transformers defines, named.
    """
    config = getattr(model, "generation_config", None)
    if config is None:
        return Followed()
    dropped = []
    bias: dict[int, float] = {}
    penalty = _number(config, "repetition_penalty", 1.0)
    if not 0 < penalty < math.inf:
        raise _wrong("repetition_penalty", config.repetition_penalty, "a number above 0")
    for token in _ids("suppress_tokens", getattr(config, "suppress_tokens", None)):
        bias[token] = -math.inf
    for name in _WORDS:
        words = _words(config, name)
        single = {word[0]: value for word, value in words if len(word) == 1}
        if penalty != 1.0 and any(math.isfinite(value) and value for value in single.values()):
            dropped.append(name)
            single = {token: value for token, value in single.items() if math.isinf(value)}
        elif any(len(word) > 1 and value for word, value in words):
            dropped.append(f"the longer words of {name}" if single else name)
        for token, value in single.items():
            bias[token] = bias.get(token, 0.0) + value
    ends = {}
    for name in _ENDS:
        ids = _ids(name, getattr(config, name, None), one=True)
        known = [id_ for id_ in ids if id_ >= 0 and (vocab_size is None or id_ < vocab_size)]
        ends[name] = known[0] if len(known) == len(ids) == 1 else None
        if ids and ends[name] is None:
            dropped.append(name)
    return Followed(
        {t: v for t, v in bias.items() if t >= 0 and (vocab_size is None or t < vocab_size)},
        penalty,
        _count(config, "min_new_tokens"),
        _count(config, "min_length") or 0,
        ends["forced_bos_token_id"],
        ends["forced_eos_token_id"],
        tuple(dropped),
    )


def not_followed(model: Any) -> tuple[str, ...]:
    """Names of the entries that change tokens and are followed on neither side, or in part."""
    config: Any = getattr(model, "generation_config", None)
    names = [name for name in _OFF if _is_on(config, name)]
    limit = getattr(model.config.get_text_config(decoder=True), "max_position_embeddings", None)
    if "max_length" in names and isinstance(limit, int) and config.max_length >= limit:
        names.remove("max_length")  # the model's own limit
    if getattr(config, "cache_implementation", None) == "quantized":
        names.append("cache_implementation")
    return (*followed(model).dropped, *names)


def warn_of_not_followed(model: Any, name: str) -> None:
    """Names them in a warning, where there are any; once for a model."""
    names = not_followed(model)
    if names and model not in _WARNED:
        _WARNED.add(model)
        logger.warning(
            "the generation_config.json of %s sets %s, which neither the engine nor the baseline "
            "follows; give what has a flag by its flag. --ignore-generation-config says nothing",
            name,
            ", ".join(names),
        )


def check_file(file: Path) -> None:
    """Reads a ``generation_config.json`` as transformers will, to say what is wrong with it.

    Raises:
        ValueError: it, or an entry of it, cannot be used.
    """
    try:
        fields = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:
        logger.warning("%s is not JSON and is ignored, as transformers does: %s", file, error)
        return
    if not isinstance(fields, dict):
        raise ValueError(f"generation_config.json holds a {type(fields).__name__}, not an object")
    plain = _Fields()
    vars(plain).update(fields)
    _ids("eos_token_id", fields.get("eos_token_id"), one=True)
    followed(_Holder(plain))
    try:
        GenerationConfig.from_dict(fields)
    except Exception as error:
        raise ValueError(f"generation_config.json: {str(error) or type(error).__name__}") from error


@contextmanager
def same_rule(model: Any, *, ignore: bool = False) -> Iterator[None]:
    """Lets ``model.generate`` follow what the engine does, for the length of a ``with`` block.

    Args:
        model: a Hugging Face model.
        ignore: follow nothing but token ids (end of text, padding).
    """
    own = model.generation_config
    rule = Followed() if ignore else followed(model, _width(model))
    config = copy.deepcopy(own)
    for name, value in vars(GenerationConfig()).items():
        if name not in _KEPT and not name.startswith("_"):
            setattr(config, name, value)
    # transformers refuses to suppress what it is to force, but not to add -inf to it.
    forced = (rule.first_token, rule.last_token)
    suppressed = {t for t, value in rule.bias.items() if value == -math.inf and t not in forced}
    config.suppress_tokens = sorted(suppressed) or None
    biases = [[[t], value] for t, value in rule.bias.items() if t not in suppressed]
    config.sequence_bias = biases or None
    if rule.repetition_penalty != 1.0:
        config.repetition_penalty = rule.repetition_penalty
    if rule.min_new_tokens is not None:
        config.min_new_tokens = rule.min_new_tokens
    elif rule.min_length:
        config.min_length = rule.min_length
    config.forced_bos_token_id, config.forced_eos_token_id = rule.first_token, rule.last_token
    if ignore:
        config.temperature, config.top_k, config.top_p = 1.0, 0, 1.0
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


class _Fields:
    """The entries of a file as attributes."""


@dataclass(frozen=True)
class _Holder:
    """Something with a generation config, as a model is."""

    generation_config: Any


def _width(model: Any) -> int | None:
    width = getattr(model.get_output_embeddings(), "out_features", None)
    return width if isinstance(width, int) else None


def _is_on(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return value is not None and value not in _OFF[name]


def _wrong(name: str, value: Any, expected: str) -> ValueError:
    return ValueError(f"generation_config.json: {name} is {value!r}; it must be {expected}")


def _is_id(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _ids(name: str, value: Any, *, one: bool = False) -> list[int]:
    """A list of token ids; ``one``: a single one may stand alone."""
    if value is None:
        return []
    if one and _is_id(value):
        return [value]
    if not isinstance(value, (list, tuple)) or not all(map(_is_id, value)):
        raise _wrong(name, value, f"{'a token id or ' if one else ''}a list of token ids")
    return list(value)


def _words(config: Any, name: str) -> list[tuple[list[int], float]]:
    """Words of any length and their biases; without those that change nothing."""
    value = getattr(config, name, None)
    if value is None:
        return []
    if name == "bad_words_ids":
        expected = "a list of words, which are lists of token ids: [[5], [6, 7]]"
        if not isinstance(value, (list, tuple)):
            raise _wrong(name, value, expected)
        pairs = [(word, -math.inf) for word in value]
    else:
        expected = "a list of words with their biases: [[[5], 1.5], [[6, 7], -2.0]]"
        if isinstance(value, dict):
            value = list(value.items())
        if not isinstance(value, (list, tuple)) or not all(
            isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in value
        ):
            raise _wrong(name, value, expected)
        pairs = [(word, bias) for word, bias in value]
    words = []
    ends = _ids("eos_token_id", getattr(config, "eos_token_id", None), one=True)
    for word, bias in pairs:
        is_word = isinstance(word, (list, tuple)) and all(map(_is_id, word))
        if not is_word or not isinstance(bias, (int, float)) or bias != bias or bias == math.inf:
            raise _wrong(name, value, expected)
        is_end = name == "bad_words_ids" and list(word) in [[end] for end in ends]
        if word and not is_end:
            words.append((list(word), float(bias)))
    return words


def _number(config: Any, name: str, default: float) -> float:
    value = getattr(config, name, None)
    if value is None:
        return default
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise _wrong(name, value, "a number")
    return float(value)


def _count(config: Any, name: str) -> int | None:
    value = getattr(config, name, None)
    if value is not None and not (_is_id(value) and value >= 0):
        raise _wrong(name, value, "a count of tokens")
    return value
