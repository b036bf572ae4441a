"""What a checkpoint's ``generation_config`` asks for: one rule for the engine and for `generate`.

A checkpoint may change how its tokens are chosen. What can be said as a bias on single tokens is
followed on both sides: ``suppress_tokens``, and ``bad_words_ids`` and ``sequence_bias`` where all
their words are one token. Everything else that changes tokens (beams, penalties, forced or counted
tokens, ...) is followed on neither and named once in a warning. Lengths, temperature, top-k and
top-p are the caller's to give; end-of-text ids are always followed.
"""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

logger = logging.getLogger(__name__)

_WARNED: WeakSet[Any] = WeakSet()  # models, each of which is worth one warning
_BIASES = ("suppress_tokens", "bad_words_ids", "sequence_bias")

# Entries that change tokens, and the values that do not.
_OFF: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(_BIASES, ()),
    "num_beams": (1,),
    "num_beam_groups": (1,),
    "num_return_sequences": (1,),
    "penalty_alpha": (0,),
    "dola_layers": (),
    "use_mtp": (False,),
    "guidance_scale": (1,),
    "min_length": (0,),
    "min_new_tokens": (0,),
    "min_p": (0,),
    "top_h": (),
    "typical_p": (1,),
    "epsilon_cutoff": (0,),
    "eta_cutoff": (0,),
    "repetition_penalty": (1,),
    "encoder_repetition_penalty": (1,),
    "no_repeat_ngram_size": (0,),
    "encoder_no_repeat_ngram_size": (0,),
    "forced_bos_token_id": (),
    "forced_eos_token_id": (),
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
}


def token_bias(model: Any, vocab_size: int) -> dict[int, float]:
    """What a model's generation config adds to the logits of single tokens; {} without one."""
    config = getattr(model, "generation_config", None)
    if config is None:
        return {}
    bias: dict[int, float] = {}
    for name in _BIASES:
        for token, value in (_single_tokens(config, name) or {}).items():
            if 0 <= token < vocab_size:
                bias[token] = bias.get(token, 0.0) + value
    return bias


def not_followed(model: Any) -> tuple[str, ...]:
    """Names of the entries that change tokens and are followed on neither side."""
    config = getattr(model, "generation_config", None)
    return tuple(
        name
        for name in _OFF
        if _is_on(config, name) and not (name in _BIASES and _single_tokens(config, name))
    )


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


@contextmanager
def same_rule(model: Any, *, ignore: bool = False) -> Iterator[None]:
    """Lets ``model.generate`` follow what the engine does, for the length of a ``with`` block.

    Args:
        model: a Hugging Face model.
        ignore: follow nothing but token ids (end of text, padding).
    """
    own = model.generation_config
    config = copy.deepcopy(own)
    for name in _OFF if ignore else not_followed(model):
        if getattr(config, name, None) is not None:
            setattr(config, name, None)
    if ignore:
        config.temperature, config.top_k, config.top_p = 1.0, 0, 1.0
    model.generation_config = config
    try:
        yield
    finally:
        model.generation_config = own


def _is_on(config: Any, name: str) -> bool:
    value = getattr(config, name, None)
    return value is not None and value not in _OFF[name]


def _single_tokens(config: Any, name: str) -> dict[int, float] | None:
    """An entry as a bias on single tokens; None where it is no such thing."""
    value = getattr(config, name, None)
    if value is None:
        return None
    forbidden = float("-inf")
    if name == "suppress_tokens":
        return {int(token): forbidden for token in value}
    if name == "bad_words_ids":
        words = [(list(word), forbidden) for word in value]
        ends = config.eos_token_id  # transformers forbids no end of text
        ends = ends if isinstance(ends, list) else [ends]
        words = [(word, bias) for word, bias in words if word not in [[end] for end in ends]]
    else:
        pairs = value.items() if isinstance(value, dict) else value
        words = [(list(word), float(bias)) for word, bias in pairs]
    if any(len(word) != 1 for word, _ in words):
        return None
    return {int(word[0]): bias for word, bias in words}
