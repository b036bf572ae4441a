"""What Metal's arguments must satisfy, checked once, as the compiled module checks its own.

Only shapes, dtypes, devices and layout: values stay on the device, and kernels skip what is out of
range.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch

from inferlab.kernels.metal.shaders import ELEMENTS

Shape = Sequence[int | None]  # None matches anything


def shape_of(t: torch.Tensor) -> str:
    return str(list(t.shape))


def check(
    name: str,
    t: torch.Tensor,
    like: torch.Tensor,
    shape: Shape,
    dtype: torch.dtype,
    *,
    contiguous: bool = True,
) -> torch.Tensor:
    """`t`, on like's device with this dtype and shape; not contiguous: in its last dimension."""
    if t.device != like.device:
        raise ValueError(f"{name} is on {t.device}; it must be on {like.device} as the others are")
    if t.dtype != dtype:
        raise TypeError(f"{name} has dtype {_name(t.dtype)}; it must be {_name(dtype)}")
    fits = t.dim() == len(shape) and all(
        want is None or have == want for have, want in zip(t.shape, shape, strict=True)
    )
    if not fits:
        want = ", ".join("*" if n is None else str(n) for n in shape)
        raise ValueError(f"{name} has shape {shape_of(t)}; it must be [{want}]")
    if contiguous and not t.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    if not contiguous and t.shape[-1] > 1 and t.stride(-1) != 1:
        raise ValueError(f"{name} must be contiguous in its last dimension")
    return t


def check_element(name: str, t: torch.Tensor) -> int:
    """The element type's number; f32, f16 and bf16 are known."""
    if t.dtype not in ELEMENTS:
        raise TypeError(
            f"{name} has dtype {_name(t.dtype)}; it must be float32, float16 or bfloat16"
        )
    return ELEMENTS[t.dtype]


def check_pages(name: str, pages: torch.Tensor, dims: int = 4) -> None:
    """[.., P, page_size, Hkv, D], contiguous."""
    check_element(name, pages)
    if pages.dim() != dims:
        raise ValueError(f"{name} has shape {shape_of(pages)}; it must have {dims} dimensions")
    if not pages.is_contiguous():
        raise ValueError(f"{name} must be contiguous")
    page_size = pages.shape[-3]
    if page_size <= 0 or page_size & (page_size - 1):
        raise ValueError(
            f"{name} has page size {page_size} (shape {shape_of(pages)}); it must be a power of two"
        )


def check_batch(
    like: torch.Tensor,
    batch: int,
    block_table: torch.Tensor,
    seq_lens: torch.Tensor,
    num_nodes: torch.Tensor | None = None,
) -> None:
    """Where the sequences of a batch lie in the pages."""
    check("block_table", block_table, like, (batch, None), torch.int32, contiguous=False)
    check("seq_lens", seq_lens, like, (batch,), torch.int32)
    if num_nodes is not None:
        check("num_nodes", num_nodes, like, (batch,), torch.int32)


def check_offset(node_offset: int) -> None:
    if node_offset < 0:
        raise ValueError(f"node_offset is {node_offset}; it must be >= 0")


def check_aligned(tensors: dict[str, torch.Tensor]) -> None:
    """They start at a multiple of 16 bytes, as whole tensors do."""
    for name, t in tensors.items():
        if t.storage_offset() * t.element_size() % 16:
            raise ValueError(
                f"{name} starts at an address that is no multiple of 16 bytes; it must"
            )


def page_table(pages: torch.Tensor, block_table: torch.Tensor) -> list[int]:
    """The fields of PageTable (csrc/metal/pages.h)."""
    count, page_size = pages.shape[-4], pages.shape[-3]
    return [count, page_size.bit_length() - 1, block_table.shape[1], block_table.stride(0)]


def _name(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")
