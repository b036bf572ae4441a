"""Frequencies that the length of a text decides: the tokens of `generate`, however they come."""

from __future__ import annotations

from functools import cache
from types import SimpleNamespace

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    Gemma3TextConfig,
    LlamaConfig,
    Phi3Config,
    PhimoeConfig,
    PreTrainedConfig,
)

from helpers.compare import assert_same_tokens, generated
from helpers.decoding import GREEDY
from helpers.repeat_graphs import graphs_of
from helpers.tiny_models import VOCAB, random_model
from inferlab.models import HFModel
from inferlab.models.draft_heads.eagle import EagleHead, eagle_config
from inferlab.models.draft_heads.paged import PagedEagle
from inferlab.models.rotary import context_length
from inferlab.scheduler import READ_TOKENS, Request
from inferlab.specdec.controllers import FixedController
from inferlab.specdec.drafters import ModelDrafter
from inferlab.specdec.drafters import model as model_drafter
from inferlab.specdec.engine import Engine
from inferlab.specdec.policies import Policy
from inferlab.specdec.tree import TreeShape
from inferlab.types import GenerationResult, SamplingParams

SWITCH = 48
NEW_TOKENS = 40
# Across the switch while decoding, after one step, long from the start, and short throughout.
PROMPTS = [
    list(range(5, 25)),
    [3 + (7 * i) % 150 for i in range(SWITCH)],
    list(range(3, 90)),
    [9, 8, 9, 8],
]

_SHAPE = {
    "vocab_size": VOCAB,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "tie_word_embeddings": False,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
}


def _longrope(width: int, switch: int = SWITCH) -> dict[str, object]:
    return {
        "rope_type": "longrope",
        "rope_theta": 1e4,
        "factor": 4.0,
        "attention_factor": 1.1,
        "original_max_position_embeddings": switch,
        "short_factor": [1.0] * width,
        "long_factor": [1 + 2.0 * i for i in range(width)],
    }


def config_of(name: str, switch: int = SWITCH, context: int = 256) -> PreTrainedConfig:
    """A small model whose frequencies change behind ``switch`` tokens."""
    dynamic = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    if name == "llama-longrope":
        return LlamaConfig(
            **_SHAPE, max_position_embeddings=context, rope_parameters=_longrope(8, switch)
        )
    if name == "llama-dynamic":
        return LlamaConfig(**_SHAPE, max_position_embeddings=switch, rope_parameters=dynamic)
    if name == "phi3":  # reads the text anew at the switch; rotates half of each head
        return Phi3Config(
            **_SHAPE,
            max_position_embeddings=context,
            original_max_position_embeddings=switch,
            partial_rotary_factor=0.5,
            rope_parameters={**_longrope(4, switch), "partial_rotary_factor": 0.5},
        )
    if name == "gemma3":  # scaling by layer type
        return Gemma3TextConfig(
            **_SHAPE,
            head_dim=16,
            max_position_embeddings=switch,
            sliding_window=7,
            layer_types=["sliding_attention", "full_attention", "full_attention"],
            rope_parameters={
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4},
                "full_attention": {**dynamic, "factor": 32.0},
            },
        )
    static = {
        "linear": {"factor": 4.0},
        "yarn": {"factor": 4.0, "original_max_position_embeddings": switch},
        "llama3": {
            "factor": 4.0,
            "original_max_position_embeddings": switch,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
        },
        "proportional": {"partial_rotary_factor": 0.5},
    }[name]
    rope = {"rope_type": name, "rope_theta": 1e4, **static}
    return LlamaConfig(**_SHAPE, max_position_embeddings=context, rope_parameters=rope)


BY_LENGTH = ("llama-longrope", "llama-dynamic", "phi3", "gemma3")
BY_POSITION = ("linear", "yarn", "llama3", "proportional")


@cache
def target_of(name: str) -> HFModel:
    target = HFModel(random_model(config_of(name), seed=3))
    target.context_length = None  # Gemma-3's sliding layers are not stretched
    return target


def by_fresh_model(
    config: PreTrainedConfig, prompt: list[int], count: int = NEW_TOKENS
) -> list[int]:
    """By a model that has seen no other text: dynamic scaling keeps what the last one left."""
    return generated(random_model(config, seed=3), prompt, count)


@cache
def expected_of(name: str) -> list[list[int]]:
    return [by_fresh_model(config_of(name), prompt) for prompt in PROMPTS]


def run(
    target: HFModel,
    prompts: list[list[int]],
    shape: TreeShape | None = None,
    count: int = NEW_TOKENS,
    read_tokens: int = READ_TOKENS,
) -> list[GenerationResult]:
    """With the target as its own draft, which agrees up to the switch and drafts beyond it."""
    drafter = None
    if shape is not None:
        drafter = ModelDrafter(target, target.new_cache(256), shape)
    engine = Engine(target, target.new_cache(256), Policy(), FixedController(6), drafter, 8)
    engine.scheduler.read_tokens = read_tokens
    params = SamplingParams(max_tokens=count, ignore_eos=True)
    return engine.generate([(p, params) for p in prompts])


SHAPES = [None, TreeShape.chain(6), TreeShape.regular((3, 2, 1, 1))]


@pytest.mark.parametrize("shape", SHAPES, ids=["plain", "chain", "tree"])
@pytest.mark.parametrize("name", BY_LENGTH + BY_POSITION)
def test_tokens_are_those_of_generate_alone_and_in_a_batch(name, shape):
    for prompts in (*([prompt] for prompt in PROMPTS), PROMPTS):
        for prompt, result in zip(prompts, run(target_of(name), prompts, shape), strict=True):
            assert result.token_ids == expected_of(name)[PROMPTS.index(prompt)]
            assert (result.stats.accepted > 0) == (shape is not None)


@st.composite
def rotary_configs(draw) -> PreTrainedConfig:
    """Any kind of scaling, with numbers of its own."""
    kind = draw(st.sampled_from(("longrope", "dynamic", *BY_POSITION)))
    original = draw(st.integers(16, 64))
    factor = draw(st.sampled_from((2.0, 3.5, 8.0)))
    rope = {"rope_type": kind, "rope_theta": draw(st.sampled_from((1e3, 1e4)))}
    context = int(original * factor)
    partly = kind == "longrope" and draw(st.booleans())
    if kind == "longrope":
        width = 4 if partly else 8
        factors = st.lists(st.floats(1, 20, width=32), min_size=width, max_size=width)
        rope |= {
            "factor": factor,
            "original_max_position_embeddings": original,
            "short_factor": draw(factors),
            "long_factor": draw(factors),
        }
        if draw(st.booleans()):
            rope["attention_factor"] = draw(st.floats(0.8, 1.5))
    elif kind in ("yarn", "llama3"):
        rope |= {"factor": factor, "original_max_position_embeddings": original}
        if kind == "llama3":
            rope |= {"low_freq_factor": 1.0, "high_freq_factor": draw(st.sampled_from((2.0, 4.0)))}
    elif kind == "proportional":
        rope["partial_rotary_factor"] = draw(st.sampled_from((0.25, 0.5)))
    else:
        rope["factor"] = factor
        context = original
    if partly:
        return Phi3Config(
            **_SHAPE,
            max_position_embeddings=context,
            original_max_position_embeddings=original,
            rope_parameters={**rope, "partial_rotary_factor": 0.5},
        )
    return LlamaConfig(**_SHAPE, max_position_embeddings=context, rope_parameters=rope)


@settings(max_examples=30, deadline=None)
@given(
    config=rotary_configs(),
    lengths=st.lists(st.integers(1, 70), min_size=1, max_size=4),
    shape=st.sampled_from(SHAPES),
    read_tokens=st.integers(1, 80),
    seed=st.integers(0, 2**16),
)
def test_any_scaling_of_texts_of_any_length(config, lengths, shape, read_tokens, seed):
    generator = torch.Generator().manual_seed(seed)
    prompts = [torch.randint(3, VOCAB, (n,), generator=generator).tolist() for n in lengths]
    target = HFModel(random_model(config, seed=3))
    target.context_length = None
    results = run(target, prompts, shape, 20, read_tokens)
    for prompt, result in zip(prompts, results, strict=True):
        expected = by_fresh_model(config, prompt, 20)
        assert_same_tokens(target, prompt, expected, result.token_ids, GREEDY, str(config))


@pytest.mark.parametrize("name", BY_LENGTH)
def test_the_switch_shows(name):
    """What the tests here are about: other tokens, were the frequencies never to change."""
    config = config_of(name, switch=4096, context=4096)
    fixed = [by_fresh_model(config, prompt) for prompt in PROMPTS]
    same = [a == b for a, b in zip(fixed, expected_of(name), strict=True)]
    assert same[3]
    assert not any(same[:3]) if name != "gemma3" else not all(same[:3])


@pytest.mark.parametrize("name", BY_LENGTH)
def test_all_chunks_of_a_prompt_are_as_long_as_the_prompt(name):
    for prompt, expected in zip(PROMPTS, expected_of(name), strict=True):
        assert run(target_of(name), [prompt], read_tokens=20)[0].token_ids == expected


@pytest.mark.parametrize("name", BY_LENGTH)
def test_a_draft_model_reads_the_prompt_like_a_target(name, monkeypatch):
    monkeypatch.setattr(model_drafter, "READ_TOKENS", 20)
    (result,) = run(target_of(name), PROMPTS[2:3], SHAPES[1])
    assert result.stats.acceptance_rate > 0.8  # of itself; the last steps draft too much


@pytest.mark.parametrize("name", BY_LENGTH)
def test_without_the_fused_layers(name, monkeypatch):
    monkeypatch.setattr(target_of(name), "_fused", None)
    for prompt, result in zip(PROMPTS, run(target_of(name), PROMPTS, SHAPES[1]), strict=True):
        assert result.token_ids == expected_of(name)[PROMPTS.index(prompt)]


@pytest.mark.parametrize("name", ["llama-longrope", "llama-dynamic"])
def test_from_graphs(name, monkeypatch):
    graphs, repeat = graphs_of(target_of(name))
    monkeypatch.setattr(target_of(name), "_graphs", graphs)
    for prompt, result in zip(PROMPTS, run(target_of(name), PROMPTS, SHAPES[1]), strict=True):
        assert result.token_ids == expected_of(name)[PROMPTS.index(prompt)]
    assert repeat.replays > 0


@pytest.mark.parametrize("name", BY_LENGTH)
def test_the_plain_model_keeps_its_own_rule(name):
    target = target_of(name)
    run(target, PROMPTS[:1])
    ids = torch.tensor(PROMPTS[2:3])
    with target.plain() as model, torch.inference_mode():
        ours = model(ids, use_cache=False).logits
        theirs = random_model(config_of(name), seed=3)(ids, use_cache=False).logits
    assert torch.equal(ours, theirs)


def test_phi_moe_stays_below_its_switch():
    """Its forward scales by the longest text of the batch, which no frequencies undo."""
    rope = {**_longrope(8), "short_mscale": 1.0, "long_mscale": 1.2}
    config = PhimoeConfig(
        **_SHAPE, max_position_embeddings=256, rope_parameters=rope, num_local_experts=2
    )
    assert HFModel(random_model(config)).context_length == SWITCH


def test_a_draft_head_has_a_table_by_position():
    target = target_of("llama-longrope")
    head = EagleHead(eagle_config(target.config), 1, target.model)
    paged = PagedEagle(head)
    short, _ = head.rotary(torch.zeros(1), torch.arange(SWITCH)[None])
    torch.testing.assert_close(paged._cos[:SWITCH], short[0])


@pytest.mark.parametrize(
    ("rope", "expected"),
    [
        ({"rope_type": "default"}, 64),
        ({"rope_type": "linear", "factor": 4.0}, 256),
        ({"rope_type": "dynamic", "factor": 4.0}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 64}, 256),
        ({"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "llama3", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"rope_type": "longrope", "factor": 4.0, "original_max_position_embeddings": 16}, 64),
        ({"full": {"rope_type": "linear", "factor": 4.0}, "sliding": {"rope_type": "default"}}, 64),
    ],
)
def test_the_context_is_what_the_scaling_makes_of_it(rope, expected):
    config = SimpleNamespace(max_position_embeddings=64, rope_parameters=rope)
    assert context_length(config) == expected


@pytest.mark.parametrize("name", ["linear", "llama-dynamic"])
def test_a_stretched_context_can_be_used(name):
    config = config_of(name, context=64)
    limit = context_length(config)
    assert limit == 4 * config.max_position_embeddings
    target = HFModel(random_model(config, seed=3))
    prompt = PROMPTS[2][:50]
    for count in (NEW_TOKENS, limit - 50):
        engine = Engine(target, target.new_cache(64), Policy(), FixedController(1))
        params = SamplingParams(max_tokens=count, ignore_eos=True)
        assert engine.generate([(prompt, params)])[0].token_ids == by_fresh_model(
            config, prompt, count
        )
    with pytest.raises(ValueError, match=f"exceed the context .* \\({limit} tokens\\)"):
        engine.add(Request(prompt, SamplingParams(max_tokens=limit - 49)))
