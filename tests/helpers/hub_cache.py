"""A hub cache on disk, laid out as ``huggingface_hub`` does, with the seed's models inside.

Configs are those of the hub but for fewer layers and a vocabulary as small as the generated
tokenizer (padded by a few columns, as OPT's is); weights are random.
"""

from __future__ import annotations

import hashlib
import tempfile
from pathlib import Path

import torch
from transformers import GPT2Config, OPTConfig, PreTrainedConfig

from helpers.tiny_models import random_model, tiny_tokenizer

TOKENIZER_SIZE = 400

_GPT2 = {
    "activation_function": "gelu_new",
    "bos_token_id": 0,
    "eos_token_id": 1,
    "n_positions": 1024,
    "architectures": ["GPT2LMHeadModel"],
}


def hub_config(repo_id: str) -> PreTrainedConfig:
    """The config of one of the hub models that the seed's commands name, scaled down."""
    if repo_id == "facebook/opt-125m":
        return OPTConfig(
            vocab_size=TOKENIZER_SIZE + 8,
            hidden_size=768,
            num_hidden_layers=2,
            ffn_dim=3072,
            num_attention_heads=12,
            max_position_embeddings=2048,
            word_embed_proj_dim=768,
            do_layer_norm_before=True,
            activation_function="relu",
            bos_token_id=0,
            eos_token_id=1,
            pad_token_id=2,
            architectures=["OPTForCausalLM"],
        )
    if repo_id == "distilgpt2":
        return GPT2Config(vocab_size=TOKENIZER_SIZE, n_embd=768, n_head=12, n_layer=2, **_GPT2)
    if repo_id == "sshleifer/tiny-gpt2":
        return GPT2Config(vocab_size=TOKENIZER_SIZE, n_embd=2, n_head=2, n_layer=2, **_GPT2)
    raise ValueError(f"no config for hub model {repo_id!r}")


HUB_MODELS: tuple[str, ...] = ("facebook/opt-125m", "distilgpt2", "sshleifer/tiny-gpt2")


def write_hub_cache(
    hf_home: Path, repo_ids: tuple[str, ...] = HUB_MODELS, *, dtype: torch.dtype = torch.float16
) -> Path:
    """Writes the models to ``hf_home/hub``; set HF_HOME to `hf_home` to use them.

    Returns:
        The hub directory (what HF_HUB_CACHE names).
    """
    hub = hf_home / "hub"
    for repo_id in repo_ids:
        with tempfile.TemporaryDirectory() as scratch:
            random_model(hub_config(repo_id), dtype=dtype).save_pretrained(scratch)
            tiny_tokenizer(TOKENIZER_SIZE).save_pretrained(scratch)
            _store(hub, repo_id, Path(scratch))
    return hub


def _store(hub: Path, repo_id: str, files: Path) -> None:
    """``refs/main`` names the commit; ``snapshots/<commit>`` links to content-addressed blobs."""
    root = hub / ("models--" + repo_id.replace("/", "--"))
    commit = hashlib.sha1(repo_id.encode()).hexdigest()
    snapshot, blobs = root / "snapshots" / commit, root / "blobs"
    for directory in (snapshot, blobs, root / "refs"):
        directory.mkdir(parents=True, exist_ok=True)
    (root / "refs" / "main").write_text(commit)
    for file in files.iterdir():
        content = file.read_bytes()
        blob = blobs / hashlib.sha256(content).hexdigest()
        blob.write_bytes(content)
        (snapshot / file.name).symlink_to(Path("..") / ".." / "blobs" / blob.name)
