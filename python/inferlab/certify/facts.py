"""What is written beside a certificate: its configuration, which models, and how samplers are
spelled."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from typing import Any

import torch

from inferlab.certify.outputs import Model
from inferlab.config import SpecdecConfig
from inferlab.errors import UsageError
from inferlab.machine import launched_as
from inferlab.models import TargetModel, format_of
from inferlab.types import SamplingParams

_PART = 4096  # bytes of each tensor

Sampler = dict[str, Any]

_SETTINGS = {
    "temperature": float, "top_k": int, "top_p": float, "min_p": float,
    "repetition_penalty": float, "presence_penalty": float, "frequency_penalty": float,
}  # fmt: skip


def config_of(settings: Mapping[str, Any]) -> SpecdecConfig:
    """The configuration that a certificate's settings hold, of whatever kind.

    Raises:
        ValueError: keys or values that are not allowed, no prompt, nothing to decode; a target on
            several ranks, none of which has the weights that a certificate names.
    """
    if not settings["prompts"]:
        raise UsageError("prompts are missing; a certificate is of one at least")
    if settings["max_tokens"] < 1:
        raise UsageError(
            f"--max-tokens: {settings['max_tokens']} is not allowed; must be at least 1"
        )
    config = SpecdecConfig.model_validate(settings["config"])
    if config.record is not None:
        raise UsageError("config.record has no meaning in a certificate; leave it out")
    if (config.tensor_parallel or launched_as()[1]) > 1:
        raise UsageError(
            "--tensor-parallel: a certificate is of a target on one process, whose weights it "
            "names; leave it out"
        )
    return config


def describe_model(model: TargetModel) -> Model:
    """Name, format and a fingerprint of the weights, by which `--check` knows them again."""
    return {
        "name": model.name,
        "format": format_of(model),
        "parameters": model.num_parameters,
        "vocab_size": model.vocab_size,
        "weights": _fingerprint(model),
    }


def _fingerprint(model: TargetModel) -> str | None:
    """SHA-256 of names, shapes and the first 4096 bytes of all tensors; None without weights."""
    plain = model.plain()
    if plain is None:
        return None
    digest = hashlib.sha256()
    with plain as module:
        for name, tensor in sorted(module.state_dict().items()):
            digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
            values = tensor.detach().flatten()[: _PART // tensor.element_size()].cpu()
            digest.update(values.contiguous().view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def parse_sampler(text: str) -> Sampler:
    """A sampler from text: ``greedy``, a temperature, or settings: ``temperature=1,top_p=0.9``.

    Raises:
        UsageError: an unknown setting or a value that is not allowed.
    """
    sampler: Sampler = {"temperature": 0.0 if text == "greedy" else 1.0}
    for part in [] if text == "greedy" else text.split(","):
        name, equals, value = part.strip().partition("=")
        if not equals:
            name, value = "temperature", name
        if name not in _SETTINGS:
            raise UsageError(
                f"--sampler: {text!r} has {name!r}; give greedy, a temperature, or settings of "
                f"{', '.join(_SETTINGS)}: temperature=0.8,top_p=0.9"
            )
        try:
            sampler[name] = _SETTINGS[name](value)
        except ValueError:
            raise UsageError(f"--sampler: {text!r}: {name} is {value!r}, not a number") from None
    try:
        SamplingParams(**sampler)
    except ValueError as error:
        raise UsageError(f"--sampler: {text!r}: {error}") from None
    return sampler


def sampler_text(sampler: Sampler) -> str:
    """A sampler as `parse_sampler` reads it."""
    if sampler == {"temperature": 0.0}:
        return "greedy"
    return ",".join(f"{name}={value:g}" for name, value in sampler.items())
