"""csrc/include/inferlab/noise.h in torch: integer Philox and an exactly rounded fma."""

from __future__ import annotations

import torch

_MASK = 0xFFFFFFFF
_LOG_POLY = (
    -1.1514610310e-1,
    1.1676998740e-1,
    -1.2420140846e-1,
    1.4249322787e-1,
    -1.6668057665e-1,
    2.0000714765e-1,
    -2.4999993993e-1,
    3.3333331174e-1,
)


def _mul_hi_lo(a: int, b: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """High and low 32 bits of a * b for 32-bit unsigned a, b in int64 (which would overflow)."""
    low = a * (b & 0xFFFF)
    high = a * (b >> 16) + (low >> 16)
    return high >> 16, ((high & 0xFFFF) << 16) | (low & 0xFFFF)


def philox4x32_10(
    counter: tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor],
    key: tuple[torch.Tensor, torch.Tensor],
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Salmon et al. 2011. All words are int64 tensors holding 32-bit unsigned values."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    for _ in range(10):
        hi0, lo0 = _mul_hi_lo(0xD2511F53, c0)
        hi1, lo1 = _mul_hi_lo(0xCD9E8D57, c2)
        c0, c1, c2, c3 = hi1 ^ c1 ^ k0, lo1, hi0 ^ c3 ^ k1, lo0
        k0 = (k0 + 0x9E3779B9) & _MASK
        k1 = (k1 + 0xBB67AE85) & _MASK
    return c0, c1, c2, c3


def noise_words(
    seed: torch.Tensor, position: torch.Tensor, tokens: torch.Tensor, purpose: int
) -> torch.Tensor:
    """The 32-bit word of each token, as int64; seed, position and tokens broadcast (int64)."""
    seed, position, tokens = torch.broadcast_tensors(seed, position, tokens)
    zero = torch.zeros_like(tokens)
    words = philox4x32_10(
        (position & _MASK, tokens >> 2, zero + purpose, zero),
        (seed & _MASK, (seed >> 32) & _MASK),
    )
    return torch.stack(words, -1).gather(-1, (tokens & 3).unsqueeze(-1)).squeeze(-1)


def fma32(a: torch.Tensor, b: float | torch.Tensor, c: float | torch.Tensor) -> torch.Tensor:
    """float32 fma(a, b, c) with its one rounding: the product is exact in float64, the sum is
    rounded to odd there (TwoSum gives its error), and so the last rounding sees the true side."""
    product = a.double() * torch.as_tensor(b, dtype=torch.float32, device=a.device).double()
    addend = torch.as_tensor(c, dtype=torch.float32, device=a.device).double()
    total = product + addend
    part = total - product
    error = (product - (total - part)) + (addend - part)
    even = (total.view(torch.int64) & 1) == 0
    towards = torch.where(error > 0, torch.inf, -torch.inf).to(total.dtype)
    return torch.where((error != 0) & even, torch.nextafter(total, towards), total).float()


def log32(x: torch.Tensor) -> torch.Tensor:
    """noise_log: natural logarithm of positive normal float32, the same bits as the header's."""
    shifted = x.contiguous().view(torch.int32).long() - 0x3F3504F3
    e = (shifted >> 23).float()
    m = ((shifted & 0x007FFFFF) + 0x3F3504F3).int().view(torch.float32)
    f = m - 1.0
    p = torch.full_like(f, 7.0376836292e-2)
    for coefficient in _LOG_POLY:
        p = fma32(p, f, coefficient)
    f2 = f * f
    r = (p * f) * f2
    r = fma32(e, -2.12194440e-4, r)
    r = fma32(f2, -0.5, r)
    r = r + f
    return fma32(e, 0.693359375, r)


def gumbel_from_words(words: torch.Tensor) -> torch.Tensor:
    """noise_gumbel: standard Gumbel float32 from 32-bit words in int64."""
    u = fma32(words.float(), 2.0**-32, 2.0**-33)
    u = u.clamp(max=0.99999994)
    w = 1.0 - u
    delta = (1.0 - w) - u
    return -log32(-(log32(w) + delta))


def uniform(seed: int, position: int, token: int, purpose: int) -> float:
    """noise_uniform: one float32 in (0, 1), exact as a Python float."""
    word = noise_words(
        torch.tensor(seed), torch.tensor(position), torch.tensor(token), purpose
    ).item()
    return ((int(word) >> 9) + 0.5) * 2.0**-23


def gumbel_row(
    seed: int, position: int, num_tokens: int, purpose: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Gumbel noise of tokens 0 .. num_tokens - 1 at one position: f32[num_tokens].

    Computed on the CPU where the device has no float64 (MPS).
    """
    where = "cpu" if torch.device(device).type == "mps" else device
    tokens = torch.arange(num_tokens, dtype=torch.int64, device=where)
    key = torch.tensor(seed, dtype=torch.int64, device=where)
    at = torch.tensor(position, dtype=torch.int64, device=where)
    return gumbel_from_words(noise_words(key, at, tokens, purpose)).to(device)
