"""Tokenizers of different kinds, trained on the standard library, and models made to speak them."""

from __future__ import annotations

import argparse
import copy
import json
import shutil
import textwrap
from functools import cache
from pathlib import Path
from typing import Any

import torch
from tokenizers import (
    Tokenizer,
    decoders,
    models,
    normalizers,
    pre_tokenizers,
    processors,
    trainers,
)
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from inferlab.models import BUNDLED, HFModel
from inferlab.models.spelling import Spelling

KINDS = ("byte_bpe", "unigram", "sentencepiece_bpe", "wordpiece")


def corpus() -> list[str]:
    files = (argparse.__file__, textwrap.__file__, shutil.__file__, json.__file__)
    return [Path(file).read_text(encoding="utf-8") for file in files]


@cache
def trained_tokenizer(kind: str, size: int = 1200) -> PreTrainedTokenizerFast:
    """A tokenizer of one kind; ``<s>`` begins a text of the sentencepiece kinds."""
    special = ["<unk>", "<s>", "</s>"]
    trainer: Any
    if kind == "byte_bpe":
        tokenizer = Tokenizer(models.BPE())
        tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
        tokenizer.decoder = decoders.ByteLevel()
        trainer = trainers.BpeTrainer(
            vocab_size=size,
            special_tokens=special,
            initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
            show_progress=False,
        )
    elif kind == "unigram":
        tokenizer = Tokenizer(models.Unigram())
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        tokenizer.decoder = decoders.Metaspace()
        trainer = trainers.UnigramTrainer(
            vocab_size=size, special_tokens=special, unk_token="<unk>", show_progress=False
        )
    elif kind == "sentencepiece_bpe":
        # As Llama 2: no pre-tokenizer, a prefix by the normalizer, bytes for what is unknown.
        bytes_ = [f"<0x{byte:02X}>" for byte in range(256)]
        tokenizer = Tokenizer(models.BPE(unk_token="<unk>", byte_fallback=True, fuse_unk=True))
        tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()
        trainer = trainers.BpeTrainer(
            vocab_size=size, special_tokens=special + bytes_, show_progress=False
        )
    elif kind == "wordpiece":
        tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
        tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
        tokenizer.decoder = decoders.WordPiece(prefix="##")
        trainer = trainers.WordPieceTrainer(
            vocab_size=size, special_tokens=special, show_progress=False
        )
    else:
        raise ValueError(f"kind is {kind!r}; it must be one of {KINDS}")
    tokenizer.train_from_iterator(corpus(), trainer)
    if kind == "sentencepiece_bpe":
        tokenizer = _as_llama(tokenizer)
    if kind in ("unigram", "sentencepiece_bpe"):
        tokenizer.post_processor = processors.TemplateProcessing(
            single="<s> $A", special_tokens=[("<s>", tokenizer.token_to_id("<s>"))]
        )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def _as_llama(tokenizer: Tokenizer) -> Tokenizer:
    """The byte tokens as tokens of the model, not as special ones, and Llama's pipeline."""
    data = json.loads(tokenizer.to_str())
    data["added_tokens"] = data["added_tokens"][:3]
    data["pre_tokenizer"] = None
    tokenizer = Tokenizer.from_str(json.dumps(data))
    tokenizer.normalizer = normalizers.Sequence(
        [normalizers.Prepend("\u2581"), normalizers.Replace(" ", "\u2581")]
    )
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("\u2581", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def permuted(name: str, seed: int = 0) -> HFModel:
    """A bundled model with its ids shuffled, in weights and tokenizer."""
    original = HFModel.load(name, device="cpu", dtype="float32")
    order = torch.randperm(original.vocab_size, generator=torch.Generator().manual_seed(seed))
    place = order.argsort()  # of each old id
    data = json.loads((BUNDLED[name] / "tokenizer.json").read_text())
    vocabulary = data["model"]["vocab"]
    data["model"]["vocab"] = {token: int(place[id_]) for token, id_ in vocabulary.items()}
    for token in data["added_tokens"]:
        token["id"] = int(place[token["id"]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer.from_str(json.dumps(data)),
        bos_token=original.tokenizer.bos_token,
        eos_token=original.tokenizer.eos_token,
    )
    with original.plain() as model:
        shuffled = copy.deepcopy(model)
    with torch.no_grad():
        weight = shuffled.get_input_embeddings().weight
        weight.copy_(weight[order].clone())
    return HFModel(shuffled, tokenizer, name=f"{name}, permuted")


def reheaded(name: str, tokenizer: PreTrainedTokenizerFast) -> HFModel:
    """A bundled model that speaks another vocabulary, as well as can be without training.

    A token is read as the last of the bundled tokens that spell it, and is as likely as the first
    of them; a little less where they are several.
    """
    original = HFModel.load(name, device="cpu", dtype="float32")
    old, new = Spelling(original.tokenizer), Spelling(tokenizer)
    with original.plain() as model:
        config = copy.deepcopy(model.config)
        config.vocab_size = len(new.pieces)
        config.tie_word_embeddings = False
        config.bos_token_id, config.eos_token_id = new.roles["bos"], new.roles["eos"]
        config.pad_token_id = None
        weights = {k: v for k, v in model.state_dict().items() if "embed" not in k}
        embedding = model.get_input_embeddings().weight.detach()
    weights.pop("lm_head.weight", None)
    made: PreTrainedModel = AutoModelForCausalLM.from_config(config, dtype=torch.float32)
    made.load_state_dict(weights, strict=False)
    with torch.no_grad():
        inputs, head = made.get_input_embeddings().weight, made.get_output_embeddings().weight
        for id_, piece in enumerate(new.pieces):
            ids = list(old.encode(piece)) if piece else [old.roles["eos"]]
            inputs[id_] = embedding[ids[-1]] if ids else 0
            head[id_] = embedding[ids[0]] * (1.0 if len(ids) == 1 else 0.97) if ids else 0
    return HFModel(made.eval(), tokenizer, name=f"{name}, reheaded")
