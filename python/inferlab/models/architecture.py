"""Which architectures the paged cache can serve, found out by looking and by one traced pass."""

from __future__ import annotations

import inspect
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NoReturn

import torch
from transformers import PreTrainedModel

from inferlab.models.attention_hook import (
    PASS_KEYWORD,
    LayerSpec,
    MissingStepError,
    Trace,
    UnsupportedArchitectureError,
)
from inferlab.models.experts import QuantizedExperts
from inferlab.models.quantized import QuantizedLinear
from inferlab.models.untouched import is_untouched

# Families whose logits are compared with Hugging Face's own in the tests, by config.model_type.
TESTED = (
    "opt",
    "gpt2",
    "gpt_neox",
    "llama",
    "mistral",
    "qwen2",
    "qwen3",
    "phi3",
    "gemma2",
    "gemma3_text",
)

_TESTED_NAMES = "OPT, GPT-2, GPT-NeoX, Llama, Mistral, Qwen2, Qwen3, Phi-3, Gemma-2 and Gemma-3"


def check_config(config: Any, name: str, model_class: type | None) -> None:
    """Refuses by name what cannot work, before any weight is read.

    Args:
        config: a transformers config.
        name: what the user called the model.
        model_class: the class that transformers would build for causal LM; None if it has none.

    Raises:
        UnsupportedArchitectureError: with the reason and what works.
    """
    kind = config.model_type
    if getattr(config, "is_encoder_decoder", False):
        _refuse(name, kind, "is an encoder-decoder, not a causal language model")
    if any(getattr(config, part, None) is not None for part in ("vision_config", "audio_config")):
        _refuse(name, kind, "is multimodal; load a text-only checkpoint of the family")
    if model_class is None:
        _refuse(name, kind, "is not a causal language model")
    if getattr(config, "index_topk", None):
        _refuse(name, kind, "lets an index choose which keys each token sees (sparse attention)")
    if getattr(model_class, "_is_stateful", False):
        _refuse(name, kind, "keeps a recurrent state, which cannot be rolled back along a tree")
    if not getattr(model_class, "_supports_attention_backend", False):
        _refuse(name, kind, "does not call transformers' attention interface")


def check_model(model: PreTrainedModel, name: str) -> None:
    """`check_config` for a model that is already there."""
    check_config(model.config, name, type(model) if model.can_generate() else None)
    if model.get_output_embeddings() is None:
        _refuse(name, model.config.model_type, "has no language-modelling head")


@dataclass(frozen=True)
class ForwardPlan:
    """How to get from tokens to logits.

    Attributes:
        layers: what each attention layer asks of the kernel, as the model itself passes it.
        decoder: the model below the output head, if logits are nothing but ``head(hidden)``;
            None where the model does something after its head (soft-cap, scaling).
        decoder_forward: the decoder's forward without transformers' decorators.
        vocab_size: columns of the logits.
        devices: of each layer, where its pages must lie.
    """

    layers: tuple[LayerSpec, ...]
    decoder: torch.nn.Module | None
    decoder_forward: Callable[..., Any] | None
    vocab_size: int
    devices: tuple[torch.device, ...]


def plan_forward(model: PreTrainedModel, device: torch.device, name: str) -> ForwardPlan:
    """Runs short passes with attention replaced by a recorder.

    The decorators and output objects around a forward cost 0.1 ms, a fifth of a small draft
    model's pass. They are left out where nobody has changed these forwards and the way without them
    gives the same bits.

    Raises:
        UnsupportedArchitectureError: a layer does not reach the hook or asks for what it lacks, or
            the pass fails.
    """
    config = model.config.get_text_config(decoder=True)
    inputs = {
        "input_ids": torch.arange(2, device=device).unsqueeze(0),
        "position_ids": torch.arange(2, device=device).unsqueeze(0),
        "use_cache": False,
    }
    trace = Trace(config, name)
    with torch.inference_mode():
        with trial_pass(name, config.model_type):
            logits = model(**inputs, **{PASS_KEYWORD: trace}).logits
        layers, width = trace.layers(_empty_layers(model)), logits.shape[-1]
        places = trace.devices(device)
        decoder = model.get_decoder()
        bare = inspect.unwrap(type(decoder).forward)
        if not (is_untouched(model) and is_untouched(decoder)):
            return ForwardPlan(layers, None, None, width, places)
        try:
            out = bare(decoder, **inputs, **{PASS_KEYWORD: Trace(config, name)})
            same = torch.equal(model.get_output_embeddings()(out.last_hidden_state), logits)
        except (TypeError, AttributeError, RuntimeError, UnsupportedArchitectureError):
            # A decoder that cannot be called like this; its model can.
            same = False
    decoder, bare = (decoder, bare) if same else (None, None)
    return ForwardPlan(layers, decoder, bare, width, places)


def unwrapped(model: Any, name: str) -> PreTrainedModel:
    """The transformers model inside torch.compile's wrapper or PEFT's, adapters in their places.

    Raises:
        UnsupportedArchitectureError: PEFT puts virtual tokens in front of the text.
    """
    model = getattr(model, "_orig_mod", model)
    adapters = getattr(model, "peft_config", None)
    if hasattr(model, "get_base_model") and isinstance(adapters, dict):
        if any(getattr(each, "is_prompt_learning", False) for each in adapters.values()):
            raise UnsupportedArchitectureError(
                f"{name} learns prompts (PEFT's prompt or prefix tuning), whose virtual tokens the "
                "paged cache lacks; adapters inside the layers, such as LoRA, work"
            )
        model = model.get_base_model()
    return model


def logits_width(model: Any) -> int:
    """Columns of a model's logits; what the output head does not say, one short pass shows.

    Raises:
        UnsupportedArchitectureError: the pass fails.
    """
    width = getattr(model.get_output_embeddings(), "out_features", None)
    if not isinstance(width, int):
        one = torch.zeros(1, 1, dtype=torch.int64, device=model.device)
        name = str(getattr(model, "name_or_path", "")) or type(model).__name__
        with trial_pass(name, model.config.model_type), torch.inference_mode():
            width = model(input_ids=one, use_cache=False).logits.shape[-1]
    return width


def _head_tensor(model: PreTrainedModel) -> torch.Tensor:
    """Some weight of the output head; torch's quantised linears have a method for it."""
    head: Any = model.get_output_embeddings()
    if isinstance(head, QuantizedLinear):
        return head.data
    weight = getattr(head, "weight", None)
    if callable(weight):
        weight = weight()
    if not isinstance(weight, torch.Tensor):
        weight = next(head.parameters(), next(model.parameters()))
    return weight


def execution_device(model: PreTrainedModel, name: str) -> torch.device:
    """Where a model computes: where its weights are, or where accelerate brings them. Of one whose
    layers lie on several GPUs it is the first, which tokens go to and logits come back to.

    Raises:
        UnsupportedArchitectureError: weights that are nowhere.
    """
    places = (getattr(model, "hf_device_map", None) or {}).values()
    gpus = [place for place in places if str(place) not in ("cpu", "disk")]
    if len(set(map(str, gpus))) > 1:
        return torch.device(gpus[0])
    weight = _head_tensor(model)
    if weight.device.type != "meta":
        return weight.device
    hook = getattr(model.get_output_embeddings(), "_hf_hook", None)
    place = getattr(hook, "execution_device", None)
    if place is None:
        raise UnsupportedArchitectureError(
            f"{name} has no weights (meta tensors); load them, or offload with accelerate, whose "
            "hooks bring them when they are needed"
        )
    return torch.device(place)


@contextmanager
def trial_pass(name: str, kind: str) -> Iterator[None]:
    """Whatever a model's own code raises in a short pass says that it cannot be served.

    Raises:
        UnsupportedArchitectureError: with the reason.
    """
    try:
        yield
    except (UnsupportedArchitectureError, torch.OutOfMemoryError):
        raise
    except MissingStepError as error:
        _refuse(name, kind, "does not hand the arguments of its call on to its attention", error)
    except Exception as error:
        if isinstance(error, (TypeError, AttributeError)) and "NoneType" in str(error):
            why = "works on an attention mask or a cache of its own, and there are none"
        else:
            why = f"fails in a short pass over the paged cache ({type(error).__name__}: {error})"
        _refuse(name, kind, f"{why}{_place_of(error)}", error)


def _place_of(error: Exception) -> str:
    """Where in a model's own code an exception came from."""
    frames = traceback.extract_tb(error.__traceback__)
    for frame in reversed(frames):
        if "modeling_" in frame.filename:
            return f", in {Path(frame.filename).name}, line {frame.lineno}"
    return ""


def decoder_layers(model: PreTrainedModel, count: int, name: str) -> torch.nn.ModuleList:
    """The list of a model's ``count`` decoder layers, whatever its family calls it.

    Raises:
        ValueError: there is none of that length.
    """
    for module in model.get_decoder().modules():
        if isinstance(module, torch.nn.ModuleList) and len(module) == count:
            return module
    raise ValueError(
        f"{name} ({model.config.model_type}) keeps its decoder layers where they cannot be found; "
        "only its last hidden state (-1) can be read"
    )


def check_against_plain(
    plain: torch.Tensor, paged: torch.Tensor, name: str, kind: str, *, routed: bool
) -> None:
    """Compares logits [1, N, V] of one text by the model's own attention and over the paged cache.

    Args:
        routed: there are experts, and rounding may send tokens to others: half of them must agree.

    Raises:
        UnsupportedArchitectureError: they differ by more than rounding.
    """
    tolerance = 1e-3 if plain.dtype == torch.float32 else 0.1
    scale = plain.float().std().clamp_min(1e-6)
    errors = (plain.float() - paged.float()).abs().amax(-1).flatten() / scale
    error = (errors.median() if routed else errors.max()).item()
    if not error <= tolerance:
        _refuse(name, kind, f"gives other logits on the paged cache (off by {error:.2g} sigma)")


def _refuse(name: str, kind: str, why: str, cause: Exception | None = None) -> NoReturn:
    raise UnsupportedArchitectureError(
        f"{name}: architecture {kind!r} {why}. Tested families: {_TESTED_NAMES}; other decoders "
        "whose attention goes through transformers' AttentionInterface are taken too"
    ) from cause


def works_by_rows(model: PreTrainedModel) -> bool:
    """Whether a model's own modules may be given [1, R] rows of B sequences in place of [B, N].

    Only families that tests hold to it, as their libraries wrote them: what others do with the
    shape, in a hook, an adapter or code of their own, is not known.
    """
    return model.config.model_type in TESTED and all(map(_is_the_librarys, model.modules()))


def _is_the_librarys(module: Any) -> bool:
    library = type(module).__module__.partition(".")[0]
    known = library in ("torch", "transformers") or type(module) in (
        QuantizedLinear,
        QuantizedExperts,
    )
    return known and is_untouched(module)


def _empty_layers(model: PreTrainedModel) -> list[int]:
    """Layers of the decoder without weights, such as what was put there to leave a layer out."""
    count = model.config.get_text_config(decoder=True).num_hidden_layers
    for stack in model.get_decoder().modules():
        if isinstance(stack, torch.nn.ModuleList) and len(stack) == count:
            return [i for i, layer in enumerate(stack) if not any(True for _ in layer.parameters())]
    return []
