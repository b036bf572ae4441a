"""The same jobs done by FlashInfer and sgl-kernel, where these are installed (CUDA only).

Each function returns {peer's name: a function of one case}, or nothing where the peer is absent or
does not do the job. What a peer asks to be done once per step and not once per layer (FlashInfer's
`plan`) is outside the timing; conversions that its kernels need (fp32 logits, probabilities) are
inside. Written for FlashInfer 0.6 and sgl-kernel 0.3.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import importlib.util
import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch

Peers = dict[str, Callable[[Any], object]]

FLASHINFER, SGL = "FlashInfer", "sgl-kernel"
_MODULES = {FLASHINFER: "flashinfer", SGL: "sgl_kernel"}
_PACKAGES = {FLASHINFER: "flashinfer-python", SGL: "sgl-kernel"}


def load(name: str, device: torch.device) -> Any:
    """The peer's module, or None where it is not installed or the benchmark is not on CUDA."""
    module = _MODULES[name]
    if device.type != "cuda" or importlib.util.find_spec(module) is None:
        return None
    return importlib.import_module(module)


def versions() -> dict[str, str]:
    """Versions of the installed peers."""
    found = {}
    for name, package in _PACKAGES.items():
        try:
            found[name] = importlib.metadata.version(package)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


# ---- sampling -----------------------------------------------------------------------------------


def sample(device: torch.device, options: Mapping[str, Any]) -> Peers:
    """Of logits [B, V]. FlashInfer takes fp32 and divides by no temperature itself."""
    flashinfer = load(FLASHINFER, device)
    if flashinfer is None or options["temperature"] == 0:
        return {}
    ops = flashinfer.sampling
    # As tensors, so that a CUDA graph can hold the call.
    noise = {k: torch.zeros(1, dtype=torch.int64, device=device) for k in ("seed", "offset")}
    temperature, top_k, top_p = options["temperature"], options.get("top_k"), options.get("top_p")

    def run(logits: torch.Tensor) -> torch.Tensor:
        scaled = logits.float() / temperature
        if top_k and top_p:
            return ops.top_k_top_p_sampling_from_logits(scaled, top_k, top_p, **noise)
        if top_k:
            return ops.top_k_sampling_from_probs(torch.softmax(scaled, -1), top_k, **noise)
        if top_p:
            return ops.top_p_sampling_from_probs(torch.softmax(scaled, -1), top_p, **noise)
        return ops.sampling_from_logits(scaled, **noise)

    return {FLASHINFER: run}


# ---- verification -------------------------------------------------------------------------------


def verify(
    device: torch.device,
    first_child: torch.Tensor,
    next_sibling: torch.Tensor,
    levels: int,
    options: Mapping[str, Any],
) -> Peers:
    """Of a case that begins with logits [B, N, V] and tokens [B, N]: sgl-kernel's tree kernels, and
    before them what its server does: arg-max of all rows, or filtered probabilities of all rows."""
    sgl = load(SGL, device)
    if sgl is None:
        return {}
    batch, nodes = first_child.shape
    index = torch.arange(batch * nodes, device=device).reshape(batch, nodes)
    links = (index, first_child.long(), next_sibling.long())
    predicts = torch.empty(batch * nodes, dtype=torch.int32, device=device)
    accepted = torch.empty(batch, levels, dtype=torch.int32, device=device)
    counts = torch.empty(batch, dtype=torch.int32, device=device)
    outputs = (predicts, accepted, counts)

    def greedy(case: Any) -> None:
        choices = torch.argmax(case[0], -1)
        sgl.verify_tree_greedy(*outputs, case[1].long(), *links, choices)

    coins = torch.rand(batch, nodes, device=device)
    last_coin = torch.rand(batch, device=device)
    tree_sampling = sgl.tree_speculative_sampling_target_only
    takes_draft = "draft_probs" in inspect.signature(tree_sampling).parameters

    def sampled(case: Any) -> None:
        logits, tokens = case[0], case[1]
        p = torch.softmax(logits.flatten(0, 1).float() / options["temperature"], -1)
        if options.get("top_k"):
            p = sgl.top_k_renorm_probs(p, options["top_k"])
        if options.get("top_p"):
            p = sgl.top_p_renorm_probs(p, options["top_p"])
        p = p.reshape(logits.shape)
        draft = (torch.zeros_like(p),) if takes_draft else ()
        tree_sampling(*outputs, tokens.long(), *links, coins, last_coin, p, *draft)

    return {SGL: greedy if options["temperature"] == 0 else sampled}


# ---- KV cache and attention ---------------------------------------------------------------------


def _paging(table: torch.Tensor, slots: Sequence[int], page_size: int) -> tuple[torch.Tensor, ...]:
    """FlashInfer's page table: indptr [B + 1], indices, last_page_len [B], for `slots` used of
    each sequence."""
    used = [(n + page_size - 1) // page_size for n in slots]
    starts = [0]
    for count in used:
        starts.append(starts[-1] + count)
    indices = torch.cat([row[:count] for row, count in zip(table, used, strict=True)])
    last = [n - (count - 1) * page_size for n, count in zip(slots, used, strict=True)]
    as_i32: dict[str, Any] = {"dtype": torch.int32, "device": table.device}
    return torch.tensor(starts, **as_i32), indices, torch.tensor(last, **as_i32)


def attention(device: torch.device, cases: Sequence[Any], scale: float) -> Peers:
    """Of cases with q [B, N, Hq, D], k_pages, v_pages, table, length, and mask [N, length + N] bool
    or None (a chain)."""
    flashinfer = load(FLASHINFER, device)
    if flashinfer is None or cases[0].q.dtype == torch.float32:
        return {}
    batch, nodes, q_heads, dim = cases[0].q.shape
    page_size, kv_heads = cases[0].k_pages.shape[1:3]
    dtype, length = cases[0].q.dtype, cases[0].length
    kinds = {"q_data_type": dtype, "kv_data_type": dtype, "sm_scale": scale}
    workspace = torch.zeros(128 << 20, dtype=torch.uint8, device=device)
    planned = {}
    for case in cases:
        paging = _paging(case.table, [length + nodes] * batch, page_size)
        sizes = (q_heads, kv_heads, dim, page_size)
        if nodes == 1:
            wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
                workspace, "NHD", use_tensor_cores=q_heads // kv_heads >= 4
            )
            wrapper.plan(*paging, *sizes, **kinds)
        else:
            wrapper = flashinfer.BatchPrefillWithPagedKVCacheWrapper(workspace, "NHD")
            starts = torch.arange(batch + 1, dtype=torch.int32, device=device) * nodes
            if case.mask is None:
                kinds["causal"] = True
            else:
                kinds["custom_mask"] = case.mask.expand(batch, -1, -1).flatten()
            wrapper.plan(starts, *paging, *sizes, **kinds)
        planned[id(case)] = wrapper

    def run(case: Any) -> torch.Tensor:
        return planned[id(case)].run(case.q.flatten(0, 1), (case.k_pages, case.v_pages))

    return {FLASHINFER: run}


def kv_append(
    device: torch.device,
    dtype: torch.dtype,
    table: torch.Tensor,
    lengths: Sequence[int],
    nodes: int,
    page_size: int,
) -> Peers:
    """Of a case that begins with k, v [B, N, Hkv, D], k_pages, v_pages."""
    flashinfer = load(FLASHINFER, device)
    if flashinfer is None or dtype == torch.float32:
        return {}
    indptr, indices, last = _paging(table, [n + nodes for n in lengths], page_size)
    step = torch.arange(nodes, dtype=torch.int32, device=device)
    batch_index = torch.arange(len(table), dtype=torch.int32, device=device)
    batch_index = batch_index.repeat_interleave(nodes)
    positions = torch.cat([step + n for n in lengths])

    def run(case: Any) -> None:
        k, v, k_pages, v_pages = case[:4]
        flashinfer.append_paged_kv_cache(
            k.flatten(0, 1), v.flatten(0, 1), batch_index, positions, (k_pages, v_pages),
            indices, indptr, last,
        )  # fmt: skip

    return {FLASHINFER: run}


# ---- layer --------------------------------------------------------------------------------------


def rms_norm(device: torch.device, weight: torch.Tensor) -> Peers:
    flashinfer = load(FLASHINFER, device)
    if flashinfer is None or weight.dtype == torch.float32:
        return {}
    return {FLASHINFER: lambda x: flashinfer.rmsnorm(x, weight)}


def silu_mul(device: torch.device, dtype: torch.dtype) -> Peers:
    flashinfer = load(FLASHINFER, device)
    if flashinfer is None or dtype == torch.float32:
        return {}
    return {FLASHINFER: lambda x: flashinfer.silu_and_mul(x)}
