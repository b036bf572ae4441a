"""The one noise (csrc/include/inferlab/noise.h): what a draw is for, and a row of it."""

from __future__ import annotations

import torch

from inferlab import _C

PURPOSE_TOKEN: int = _C.PURPOSE_TOKEN  # the target's choice at a position; drafters share it
PURPOSE_DRAFT: int = _C.PURPOSE_DRAFT  # draft draws under the `rejection` policy
PURPOSE_ACCEPT: int = _C.PURPOSE_ACCEPT  # acceptance uniforms under `rejection`
PURPOSE_RECOVERY: int = _C.PURPOSE_RECOVERY  # draws from the residual under `rejection`


def gumbel_row(
    seed: int, position: int, num_tokens: int, purpose: int, device: torch.device | str = "cpu"
) -> torch.Tensor:
    """Gumbel noise of tokens 0 .. num_tokens - 1 at one position: f32[num_tokens] on `device`."""
    row = torch.empty(num_tokens, dtype=torch.float32)
    signed = (seed & (2**64 - 1)) - (2**64 if seed & 2**63 else 0)
    _C.gumbel_row(signed, position, purpose, row)
    return row.to(device)
