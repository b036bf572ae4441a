"""Medusa and EAGLE heads: their forward against a plain restatement, and the published files."""

from __future__ import annotations

import json
import math

import pytest
import torch
from safetensors.torch import load_file, save_file

from helpers.micro_training import MICRO, VOCAB, micro_model
from inferlab.models.draft_heads import (
    EagleHead,
    MedusaHeads,
    eagle_config,
    load_eagle,
    load_medusa,
    published_feature_layers,
    save_eagle,
    save_medusa,
)
from inferlab.models.draft_heads.paged import PagedEagle
from inferlab.models.loading import ModelLoadError

WIDTH, INNER = MICRO["hidden_size"], MICRO["intermediate_size"]
HEADS, KV_HEADS = MICRO["num_attention_heads"], MICRO["num_key_value_heads"]
DIM = MICRO["head_dim"]
DRAFT_VOCAB = 70


@pytest.fixture(scope="module")
def target():
    return micro_model(num_hidden_layers=8).bfloat16()


def linear(out: int, width: int) -> torch.Tensor:
    return torch.randn(out, width).bfloat16() / math.sqrt(width)


def medusa_weights(heads: int, layers: int, tied: bool = False) -> dict[str, torch.Tensor]:
    """As FasterDecoding/Medusa saves them."""
    weights = {}
    for head in range(heads):
        for layer in range(layers):
            weights[f"{head}.{layer}.linear.weight"] = linear(WIDTH, WIDTH)
            weights[f"{head}.{layer}.linear.bias"] = linear(1, WIDTH)[0]
        if not tied:
            weights[f"{head}.{layers}.weight"] = linear(VOCAB, WIDTH)
    return weights


def eagle_weights(version: int, *, fc_bias: bool = True, reduced: bool = False):
    """As SafeAILab/EAGLE saves them."""
    prefix = "layers.0" if version == 1 else "midlayer"
    inputs = WIDTH if version == 1 else 2 * WIDTH
    weights = {
        "fc.weight": linear(WIDTH, 2 * WIDTH if version == 1 else 3 * WIDTH),
        f"{prefix}.self_attn.q_proj.weight": linear(HEADS * DIM, inputs),
        f"{prefix}.self_attn.k_proj.weight": linear(KV_HEADS * DIM, inputs),
        f"{prefix}.self_attn.v_proj.weight": linear(KV_HEADS * DIM, inputs),
        f"{prefix}.self_attn.o_proj.weight": linear(WIDTH, HEADS * DIM),
        f"{prefix}.mlp.gate_proj.weight": linear(INNER, WIDTH),
        f"{prefix}.mlp.up_proj.weight": linear(INNER, WIDTH),
        f"{prefix}.mlp.down_proj.weight": linear(WIDTH, INNER),
        f"{prefix}.post_attention_layernorm.weight": 1 + linear(1, WIDTH)[0],
    }
    if version == 1 and fc_bias:
        weights["fc.bias"] = linear(1, WIDTH)[0]
    if version == 3:
        weights["midlayer.hidden_norm.weight"] = 1 + linear(1, WIDTH)[0]
        weights["midlayer.input_layernorm.weight"] = 1 + linear(1, WIDTH)[0]
        weights["norm.weight"] = 1 + linear(1, WIDTH)[0]
        weights["lm_head.weight"] = linear(DRAFT_VOCAB if reduced else VOCAB, WIDTH)
    if reduced:
        ids = torch.randperm(VOCAB)[:DRAFT_VOCAB].sort().values
        weights["d2t"] = ids - torch.arange(DRAFT_VOCAB)
        weights["t2d"] = torch.zeros(VOCAB, dtype=torch.bool).index_fill_(0, ids, True)
    return weights


# What the published configurations say, in their old spelling.
EAGLE_CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
    "hidden_act": "silu",
    "hidden_size": WIDTH,
    "initializer_range": 0.02,
    "intermediate_size": INNER,
    "max_position_embeddings": 256,
    "model_type": "llama",
    "num_attention_heads": HEADS,
    "num_key_value_heads": KV_HEADS,
    "num_hidden_layers": 1,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500.0,
    "rope_scaling": None,
    "tie_word_embeddings": False,
    "torch_dtype": "float16",
    "transformers_version": "4.28.1",
    "vocab_size": VOCAB,
}


def write_eagle(folder, weights, name="model.safetensors", **changes):
    (folder / "config.json").write_text(json.dumps({**EAGLE_CONFIG, **changes}))
    if name.endswith(".bin"):
        torch.save(weights, folder / name)
    else:
        save_file(weights, folder / name)
    return folder


# The forwards, restated with loops.


def norm(x, weight, eps=1e-5):
    return x / (x.square().mean(-1, keepdim=True) + eps).sqrt() * weight


def rotate(x, position, theta=500.0):
    """One head's vector `[D]`, its halves turned against each other."""
    half = x.numel() // 2
    angle = position * theta ** (-torch.arange(half) / half)
    first, second = x[:half], x[half:]
    return torch.cat(
        [first * angle.cos() - second * angle.sin(), second * angle.cos() + first * angle.sin()]
    )


def plain_eagle(weights, version, embeds, features):
    """`[T, H]`, `[T, F]` -> `[T, H]`, one position after the other."""
    w = {key.removeprefix("midlayer.").removeprefix("layers.0."): v for key, v in weights.items()}
    rows = []
    keys, values = [], []
    for position, (embed, feature) in enumerate(zip(embeds, features, strict=True)):
        if version == 1:
            residual = w["fc.weight"] @ torch.cat([embed, feature]) + w.get("fc.bias", 0)
            x = residual
        else:
            residual = w["fc.weight"] @ feature if feature.numel() != WIDTH else feature
            x = torch.cat(
                [
                    norm(embed, w["input_layernorm.weight"]),
                    norm(residual, w["hidden_norm.weight"]),
                ]
            )
        query = (w["self_attn.q_proj.weight"] @ x).view(HEADS, DIM)
        keys.append(rotate(w["self_attn.k_proj.weight"] @ x, position))
        values.append(w["self_attn.v_proj.weight"] @ x)
        mixed = []
        for head in range(HEADS):
            scores = torch.stack(keys) @ rotate(query[head], position) / math.sqrt(DIM)
            mixed.append(scores.softmax(0) @ torch.stack(values))
        hidden = residual + w["self_attn.o_proj.weight"] @ torch.cat(mixed)
        y = norm(hidden, w["post_attention_layernorm.weight"])
        gate = torch.nn.functional.silu(w["mlp.gate_proj.weight"] @ y)
        inner = gate * (w["mlp.up_proj.weight"] @ y)
        rows.append(hidden + w["mlp.down_proj.weight"] @ inner)
    return torch.stack(rows)


@pytest.mark.parametrize(
    ("version", "options"),
    [(1, {}), (1, {"fc_bias": False}), (3, {}), (3, {"reduced": True})],
)
def test_eagle_forward_is_the_published_one(tmp_path, version, options):
    torch.manual_seed(version)
    target = micro_model(num_hidden_layers=8)
    weights = eagle_weights(version, **options)
    head = load_eagle(write_eagle(tmp_path, weights), target)
    assert head.version == version
    assert head.feature_layers == ((-1,) if version == 1 else (1, 3, 4))
    assert head.feature_size == WIDTH * len(head.feature_layers)
    embeds, features = torch.randn(9, WIDTH), torch.randn(9, head.feature_size)
    wide = {key: value.float() for key, value in weights.items()}
    expected = plain_eagle(wide, version, embeds, features)
    hidden = head(embeds[None], features[None])
    torch.testing.assert_close(hidden[0], expected, rtol=1e-4, atol=1e-5)
    # A deeper level takes the layer's own output for a feature.
    again = head(embeds[None], hidden)
    torch.testing.assert_close(
        again[0], plain_eagle(wide, version, embeds, expected), rtol=1e-4, atol=1e-5
    )
    if version == 1:
        logits = expected @ target.lm_head.weight.T
    else:
        logits = norm(expected, wide["norm.weight"]) @ wide["lm_head.weight"].T
    torch.testing.assert_close(head.draft_logits(hidden)[0], logits, rtol=1e-4, atol=1e-5)
    if not options.get("reduced"):
        torch.testing.assert_close(head.logits(hidden)[0], logits, rtol=1e-4, atol=1e-5)
        return
    full = head.logits(hidden)[0]
    known = weights["t2d"]
    torch.testing.assert_close(full[:, known], logits, rtol=1e-4, atol=1e-5)
    assert (full[:, ~known] == float("-inf")).all()


def test_positions_shift_nothing_but_the_angle(target):
    head = EagleHead(eagle_config(target.config), 1, target)
    embeds, features = torch.randn(1, 6, WIDTH), torch.randn(1, 6, WIDTH)
    moved = head(embeds, features, torch.arange(40, 46)[None])
    torch.testing.assert_close(moved, head(embeds, features), rtol=1e-4, atol=1e-5)


def test_rotation_stays_fp32_in_a_bf16_head(target):
    head = EagleHead(eagle_config(target.config), 3, target)
    before = head.rotary.inv_freq.clone()
    head.bfloat16()
    assert head.fc.weight.dtype == torch.bfloat16
    assert torch.equal(head.rotary.inv_freq, before)


def test_own_embedding_is_used(tmp_path, target):
    table = linear(VOCAB, WIDTH)
    own = load_eagle(
        write_eagle(tmp_path, {**eagle_weights(1), "embed_tokens.weight": table}), target
    )
    tokens = torch.tensor([[5, 7]])
    assert torch.equal(own.embed(tokens), table[tokens])
    shared = EagleHead(eagle_config(target.config), 1, target)
    assert torch.equal(shared.embed(tokens), target.model.embed_tokens.weight[tokens])


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("layers", [1, 3])
def test_medusa_forward_is_the_published_one(tmp_path, layers, tied):
    torch.manual_seed(layers)
    target = micro_model()
    weights = medusa_weights(3, layers, tied)
    save_file(weights, tmp_path / "medusa_lm_head.safetensors")
    heads = load_medusa(tmp_path, target)
    assert (heads.num_heads, heads.num_layers, heads.tied) == (3, layers, tied)
    hidden = torch.randn(2, 5, WIDTH)
    expected = []
    for head in range(3):
        x = hidden
        for layer in range(layers):
            y = x @ weights[f"{head}.{layer}.linear.weight"].float().T
            y = y + weights[f"{head}.{layer}.linear.bias"].float()
            x = x + y * torch.sigmoid(y)
        table = target.lm_head.weight if tied else weights[f"{head}.{layers}.weight"].float()
        expected.append(x @ table.T)
    logits = heads(hidden)
    assert logits.shape == (2, 5, 3, VOCAB)
    torch.testing.assert_close(logits, torch.stack(expected, dim=2), rtol=1e-4, atol=1e-5)


def test_heads_that_read_the_token(tmp_path):
    """The token's embedding, projected, is added to the hidden state; nothing else changes."""
    target = micro_model()
    weights = {**medusa_weights(2, 1), "root_projection": linear(WIDTH, WIDTH)}
    save_file(weights, tmp_path / "medusa_lm_head.safetensors")
    heads = load_medusa(tmp_path, target)
    hidden, tokens = torch.randn(3, WIDTH), torch.tensor([7, 8, 9])
    with pytest.raises(ValueError, match="tokens is None"):
        heads(hidden)
    logits = heads(hidden, tokens)
    del weights["root_projection"]
    save_file(weights, tmp_path / "medusa_lm_head.safetensors")
    plain = load_medusa(tmp_path, target)
    assert (heads.reads_token, plain.reads_token) == (True, False)
    embeds = target.model.embed_tokens.weight[tokens]
    moved = hidden + embeds @ heads.root_projection.T
    torch.testing.assert_close(logits, plain(moved), rtol=1e-4, atol=1e-5)


def test_fresh_medusa_heads_say_what_the_target_says(target):
    heads = MedusaHeads(2, 1, WIDTH, VOCAB, target_head=target.lm_head).bfloat16()
    heads.start_from_target()
    hidden = torch.randn(3, WIDTH).bfloat16()
    for logits in heads(hidden).unbind(1):
        assert torch.equal(logits, target.lm_head(hidden))


# Files.


@pytest.mark.parametrize(("version", "reduced"), [(1, False), (3, False), (3, True)])
def test_eagle_files_round_trip(tmp_path, target, version, reduced):
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    weights = eagle_weights(version, reduced=reduced)
    head = load_eagle(write_eagle(tmp_path / "first", weights), target)
    save_eagle(tmp_path / "second", head)
    saved = load_file(tmp_path / "second" / "model.safetensors")
    assert saved.keys() == weights.keys()
    for key, tensor in weights.items():
        assert torch.equal(saved[key], tensor), key
    again = load_eagle(tmp_path / "second", target)
    assert again.feature_layers == head.feature_layers
    assert again.config.rope_parameters == head.config.rope_parameters
    assert again.config.rms_norm_eps == 1e-5


@pytest.mark.parametrize("version", [1, 3])
@pytest.mark.parametrize("wrapper", ["", "module.", "module.model."])
def test_what_lies_around_the_weights_changes_nothing(tmp_path, target, version, wrapper):
    """Rotary buffers, wrappers in the names, other names of the layer, a copied LM head."""
    weights = eagle_weights(version, reduced=version == 3)
    (tmp_path / "plain").mkdir()
    (tmp_path / "published").mkdir()
    expected = load_eagle(write_eagle(tmp_path / "plain", weights), target)
    published = {k.replace("midlayer.", "layers.0."): v for k, v in weights.items()}
    published["layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(DIM // 2)
    if version == 1:
        published["lm_head.weight"] = target.lm_head.weight.detach().clone()
    published = {wrapper + key: tensor for key, tensor in published.items()}
    head = load_eagle(write_eagle(tmp_path / "published", published), target)
    assert head.version == version
    embeds, features = torch.randn(1, 4, WIDTH), torch.randn(1, 4, head.feature_size)
    inputs = embeds.bfloat16(), features.bfloat16()
    assert torch.equal(head.logits(head(*inputs)), expected.logits(expected(*inputs)))


def test_wrapped_medusa_weights(tmp_path, target):
    weights = {f"module.{key}": tensor for key, tensor in medusa_weights(2, 1).items()}
    save_file(weights, tmp_path / "medusa_lm_head.safetensors")
    assert load_medusa(tmp_path, target).num_heads == 2


@pytest.mark.parametrize("reduced", [False, True])
def test_eagle3_without_an_lm_head_takes_the_targets(tmp_path, target, reduced):
    weights = eagle_weights(3, reduced=reduced)
    del weights["lm_head.weight"]
    (tmp_path / "first").mkdir()
    (tmp_path / "second").mkdir()
    head = load_eagle(write_eagle(tmp_path / "first", weights), target)
    hidden = torch.randn(2, 5, WIDTH).bfloat16()
    expected = target.lm_head(head.norm(hidden))
    logits = head.logits(hidden)
    ids = torch.arange(VOCAB)
    if reduced:
        ids = weights["d2t"] + torch.arange(DRAFT_VOCAB)
        rest = torch.ones(VOCAB, dtype=torch.bool).index_fill_(0, ids, False)
        assert (logits[..., rest] == float("-inf")).all()
    torch.testing.assert_close(logits[..., ids], expected[..., ids])
    torch.testing.assert_close(PagedEagle(head).logits(hidden), logits)
    save_eagle(tmp_path / "second", head)
    again = load_eagle(tmp_path / "second", target)
    assert torch.equal(again.logits(hidden), logits)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda d2t: d2t[9].add_(VOCAB), r"safetensors: 'd2t' makes draft token 9 .* \[0, 300\)"),
        (lambda d2t: d2t[0].sub_(1 + d2t[0]), "'d2t' makes draft token 0 the target's token -1"),
        (lambda d2t: d2t[1].copy_(d2t[0] - 1), "'d2t' makes two draft tokens the same"),
    ],
)
@pytest.mark.parametrize("lm_head", [True, False])
def test_draft_vocabularies_that_the_target_has_not(tmp_path, target, change, complaint, lm_head):
    weights = eagle_weights(3, reduced=True)
    change(weights["d2t"])
    if not lm_head:
        del weights["lm_head.weight"]
    with pytest.raises(ModelLoadError, match=complaint):
        load_eagle(write_eagle(tmp_path, weights), target)


@pytest.mark.parametrize("moved", [False, True])
def test_a_full_vocabulary_in_another_order(tmp_path, target, moved):
    ids = torch.randperm(VOCAB) if moved else torch.arange(VOCAB)
    weights = {**eagle_weights(3), "d2t": ids - torch.arange(VOCAB)}
    head = load_eagle(write_eagle(tmp_path, weights), target)
    assert (head.draft_to_target is not None) == moved
    hidden = torch.randn(3, WIDTH).bfloat16()
    assert torch.equal(head.logits(hidden)[:, ids], head.draft_logits(hidden))


def test_feature_layers_come_from_the_config(tmp_path, target):
    layers = {"eagle_aux_hidden_state_layer_ids": [0, 5, -1]}
    head = load_eagle(write_eagle(tmp_path, eagle_weights(3), eagle_config=layers), target)
    assert head.feature_layers == (0, 5, -1)


def test_published_feature_layers():
    assert published_feature_layers(32) == (1, 15, 28)
    with pytest.raises(ValueError, match="at least 6 layers"):
        published_feature_layers(5)


def test_medusa_files_round_trip(tmp_path, target):
    weights = medusa_weights(4, 2)
    (tmp_path / "first").mkdir()
    save_file(weights, tmp_path / "first" / "medusa_lm_head.safetensors")
    # The hub's configuration of 5 heads says 2; the weights are right.
    (tmp_path / "first" / "config.json").write_text('{"medusa_num_heads": 2}')
    heads = load_medusa(tmp_path / "first", target)
    save_medusa(tmp_path, heads, base_model="somebody/model")
    config = json.loads((tmp_path / "config.json").read_text())
    assert (config["medusa_num_heads"], config["medusa_num_layers"]) == (4, 2)
    assert config["base_model_name_or_path"] == "somebody/model"
    saved = load_file(tmp_path / "medusa_lm_head.safetensors")
    assert saved.keys() == weights.keys()
    assert all(torch.equal(saved[key], weights[key]) for key in weights)


def test_pickles_need_permission(tmp_path, target):
    torch.save(medusa_weights(2, 1), tmp_path / "medusa_lm_head.pt")
    with pytest.raises(ModelLoadError, match=r"medusa_lm_head\.pt: a pickle.*allow_pickle=True"):
        load_medusa(tmp_path, target)
    assert load_medusa(tmp_path, target, allow_pickle=True).num_heads == 2
    write_eagle(tmp_path, eagle_weights(3), "pytorch_model.bin")
    with pytest.raises(ModelLoadError, match="allow_pickle=True"):
        load_eagle(tmp_path, target)
    assert load_eagle(tmp_path, target, allow_pickle=True).version == 3


def test_heads_follow_their_target(tmp_path):
    target = micro_model(num_hidden_layers=8).to(torch.float64)
    head = load_eagle(write_eagle(tmp_path, eagle_weights(3)), target)
    assert head.fc.weight.dtype == torch.float64
    assert not any(p.requires_grad for p in head.parameters())
    assert all(p.requires_grad for p in target.parameters())


@pytest.mark.parametrize("load", [load_medusa, load_eagle])
def test_missing_files(tmp_path, target, load):
    with pytest.raises(FileNotFoundError, match="nowhere"):
        load("./nowhere", target)
    with pytest.raises(ModelLoadError, match=r"none of .* is in"):
        load(tmp_path, target)
    with pytest.raises(ModelLoadError, match="hf download nobody/nothing"):
        load("nobody/nothing", target)


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (lambda w: w.pop("1.0.linear.bias"), r"'1\.0\.linear\.bias' is missing.*get it again"),
        (lambda w: w.update({"norm.weight": torch.ones(3)}), "'norm.weight' is no weight of"),
        (
            lambda w: w.update({"0.1.weight": linear(VOCAB + 1, WIDTH)}),
            r"'0\.1\.weight' has the shape \[301, 32\], expected \[300, 32\]",
        ),
        (
            lambda w: w.update({"0.0.linear.weight": linear(64, 64)}),
            r"expected \[32, 32\] for a target of hidden size 32 and 300 tokens",
        ),
        (lambda w: [w.pop(key) for key in list(w) if "linear" in key], "no residual block"),
    ],
)
def test_wrong_medusa_weights(tmp_path, target, change, complaint):
    weights = medusa_weights(2, 1)
    change(weights)
    save_file(weights, tmp_path / "medusa_lm_head.safetensors")
    with pytest.raises(ModelLoadError, match=r"medusa_lm_head\.safetensors.*" + complaint):
        load_medusa(tmp_path, target)


@pytest.mark.parametrize(
    ("change", "config", "complaint"),
    [
        (lambda w: w.pop("norm.weight"), {}, "'norm.weight' is missing"),
        (lambda w: w.update(x=torch.ones(1)), {}, "'x' is no weight of EagleHead"),
        (lambda w: None, {"vocab_size": 299}, "vocab_size is 299, its target has 300"),
        (lambda w: None, {"hidden_size": 64}, "hidden_size is 64 and it has no 'embed_tokens"),
        (lambda w: None, {"intermediate_size": 50}, r"shape \[48, 32\], expected \[50, 32\]"),
        (
            lambda w: w.update({"lm_head.weight": linear(DRAFT_VOCAB, WIDTH)}),
            {},
            "70 of the target's 300 tokens, but 'd2t'",
        ),
    ],
)
def test_wrong_eagle_weights(tmp_path, target, change, config, complaint):
    weights = eagle_weights(3)
    change(weights)
    with pytest.raises(ModelLoadError, match=complaint):
        load_eagle(write_eagle(tmp_path, weights, **config), target)


def test_damaged_files(tmp_path, target):
    write_eagle(tmp_path, eagle_weights(1))
    whole = (tmp_path / "model.safetensors").read_bytes()
    (tmp_path / "model.safetensors").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ModelLoadError, match=r"model\.safetensors: damaged.*get it again"):
        load_eagle(tmp_path, target)
    (tmp_path / "model.safetensors").write_bytes(whole)
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(ModelLoadError, match=r"config\.json: not the configuration"):
        load_eagle(tmp_path, target)
    (tmp_path / "config.json").unlink()
    with pytest.raises(ModelLoadError, match=r"config\.json"):
        load_eagle(tmp_path, target)


def same_weights(head, expected):
    own, wanted = head.state_dict(), expected.state_dict()
    return own.keys() == wanted.keys() and all(torch.equal(own[key], wanted[key]) for key in own)


PREFIXES = ("module.", "model.", "_orig_mod.", "module._orig_mod.", "eagle.", "a.draft_model.")


@pytest.mark.parametrize("prefix", PREFIXES)
@pytest.mark.parametrize("version", [1, 3])
def test_what_wrappers_put_in_front_of_eagles_keys(tmp_path, target, version, prefix):
    weights = eagle_weights(version, reduced=version == 3)
    expected = load_eagle(write_eagle(tmp_path, weights), target)
    plain = ("d2t", "t2d")  # which are no weights of a module
    wrapped = {key if key in plain else prefix + key: value for key, value in weights.items()}
    assert same_weights(load_eagle(write_eagle(tmp_path, wrapped), target), expected)


def test_compiled_parts_of_a_head(tmp_path, target):
    weights = eagle_weights(3)
    expected = load_eagle(write_eagle(tmp_path, weights), target)
    inner = {key.replace("midlayer.", "midlayer._orig_mod."): each for key, each in weights.items()}
    assert same_weights(load_eagle(write_eagle(tmp_path, inner), target), expected)


@pytest.mark.parametrize(
    "prefix", ["module.", "_orig_mod.", "base_model.medusa_head.", "module._orig_mod.medusa_head."]
)
def test_what_wrappers_put_in_front_of_medusas_keys(tmp_path, target, prefix):
    weights = medusa_weights(2, 1)
    file = tmp_path / "medusa_lm_head.safetensors"
    save_file(weights, file)
    expected = load_medusa(tmp_path, target)
    save_file({prefix + key: value for key, value in weights.items()}, file)
    assert same_weights(load_medusa(tmp_path, target), expected)


def shard(folder, weights):
    """As transformers saves models that are large."""
    (folder / "model.safetensors").unlink()
    names = sorted(weights)
    listed = {}
    for number, part in enumerate((names[:4], names[4:]), 1):
        name = f"model-0000{number}-of-00002.safetensors"
        save_file({key: weights[key] for key in part}, folder / name)
        listed |= dict.fromkeys(part, name)
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"metadata": {}, "weight_map": listed}))
    return index


def test_sharded_heads(tmp_path, target):
    weights = eagle_weights(3)
    expected = load_eagle(write_eagle(tmp_path, weights), target)
    index = shard(tmp_path, weights)
    assert same_weights(load_eagle(tmp_path, target), expected)
    good = index.read_text()
    for text, complaint in (
        (good.replace("00002-of", "00009-of"), "lists model-00009-of-00002.safetensors, which is"),
        (good.replace("model-00002", "../model-00002"), "files of other folders"),
        (good.replace("norm.weight", "norms.weight"), "which no shard holds"),
        ("[]", "not a valid shard index"),
    ):
        index.write_text(text)
        with pytest.raises(ModelLoadError, match=complaint):
            load_eagle(tmp_path, target)


def test_pickles_that_hold_a_state_dict(tmp_path, target):
    write_eagle(tmp_path, {"state_dict": eagle_weights(3)}, "pytorch_model.bin")
    assert load_eagle(tmp_path, target, allow_pickle=True).version == 3


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"eagle_config": "x"}, "eagle_config is 'x'; it must be an object"),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": ["a", 1, 2]}},
            "numbered from 0 to 7",
        ),
        (
            {"eagle_config": {"eagle_aux_hidden_state_layer_ids": [1, 99, 2]}},
            "numbered from 0 to 7",
        ),
        ({"eagle_config": {"eagle_aux_hidden_state_layer_ids": 3}}, "numbered from 0 to 7"),
        ({"vocab_size": "x"}, "not the configuration of an EAGLE head"),
        ({"transformer_layer_config": {}}, "library speculators, whose layout is not read"),
    ],
)
def test_wrong_eagle_configurations(tmp_path, target, changes, complaint):
    with pytest.raises(ModelLoadError, match=complaint) as caught:
        load_eagle(write_eagle(tmp_path, eagle_weights(3), **changes), target)
    assert "config.json" in str(caught.value)


@pytest.mark.parametrize("key", ["hidden_size", "vocab_size", "num_attention_heads"])
def test_sizes_are_not_made_up(tmp_path, target, key):
    write_eagle(tmp_path, eagle_weights(3))
    fields = {name: value for name, value in EAGLE_CONFIG.items() if name != key}
    (tmp_path / "config.json").write_text(json.dumps(fields))
    with pytest.raises(ModelLoadError, match=f"config.json.*has no '{key}'"):
        load_eagle(tmp_path, target)


def test_a_folder_of_something_else(tmp_path, target):
    write_eagle(tmp_path, {"embed.weight": linear(3, 3)})
    with pytest.raises(ModelLoadError, match=r"no 'fc\.weight' .*'embed\.weight'"):
        load_eagle(tmp_path, target)


@pytest.mark.parametrize("rows", [VOCAB - 20, VOCAB + 20])
def test_heads_that_are_padded_otherwise_than_their_target(tmp_path, target, rows):
    known = VOCAB - 25
    weights = eagle_weights(3)
    weights["embed_tokens.weight"] = linear(VOCAB, WIDTH)
    expected = load_eagle(write_eagle(tmp_path, weights), target)
    for key in ("embed_tokens.weight", "lm_head.weight"):
        more = torch.cat([weights[key], linear(20, WIDTH)])
        weights[key] = more[:rows].contiguous()
    folder = write_eagle(tmp_path, weights, vocab_size=rows)
    head = load_eagle(folder, target, known_ids=known)
    hidden, tokens = torch.randn(3, WIDTH).bfloat16(), torch.arange(known)
    assert head.logits(hidden).shape == (3, VOCAB)
    assert torch.equal(head.logits(hidden)[:, :known], expected.logits(hidden)[:, :known])
    assert torch.equal(head.embed(tokens), expected.embed(tokens))
    for ids in (None, VOCAB + 21):
        with pytest.raises(ModelLoadError, match=f"vocab_size is {rows}, its target has {VOCAB}"):
            load_eagle(folder, target, known_ids=ids)


def test_medusa_heads_that_are_padded_otherwise_than_their_target(tmp_path, target):
    weights = medusa_weights(2, 1)
    file = tmp_path / "medusa_lm_head.safetensors"
    save_file(weights, file)
    expected = load_medusa(tmp_path, target)
    save_file({k: v[:-20].clone() if v.shape[0] == VOCAB else v for k, v in weights.items()}, file)
    heads = load_medusa(tmp_path, target, known_ids=VOCAB - 25)
    for head, own in zip(heads, expected, strict=True):
        assert torch.equal(head[-1].weight[:-20], own[-1].weight[:-20])
    with pytest.raises(ModelLoadError, match="has the shape"):
        load_medusa(tmp_path, target)
