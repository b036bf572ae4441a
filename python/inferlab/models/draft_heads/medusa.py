"""Medusa heads: each guesses one later token from the target's last hidden state alone.

Cai et al., "Medusa: simple LLM inference acceleration framework with multiple decoding heads",
2024. From the hidden state that the target's LM head turns into the token at position t + 1, head
i guesses the token at position t + 2 + i.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from inferlab.models.fused import product
from inferlab.models.quantized import weight_of


class ResidualBlock(nn.Module):
    """x + SiLU(W x + b); a fresh one has W = 0 and so leaves x nearly as it is."""

    def __init__(self, hidden_size: int) -> None:
        super().__init__()
        self.linear = nn.Linear(hidden_size, hidden_size)
        nn.init.zeros_(self.linear.weight)
        nn.init.zeros_(self.linear.bias)

    def forward(self, x: Tensor) -> Tensor:
        """`[.., H]` -> `[.., H]`."""
        return x + F.silu(self.linear(x))


class MedusaHeads(nn.ModuleList):
    """All heads; a list, so that the names of its weights are those of the published files.

    Args:
        num_heads: offsets guessed.
        num_layers: residual blocks per head.
        hidden_size, vocab_size: of the target.
        target_head: the target's LM head, `[V, H]` without bias; it is used, not owned.
        tied: the heads end in `target_head` instead of LM heads of their own.
        embedding: the target's embedding, for heads that read the newest token; not owned.
    """

    root_projection: nn.Parameter | None

    def __init__(
        self,
        num_heads: int,
        num_layers: int,
        hidden_size: int,
        vocab_size: int,
        *,
        target_head: nn.Module,
        tied: bool = False,
        embedding: nn.Module | None = None,
    ) -> None:
        super().__init__(
            nn.Sequential(
                *(ResidualBlock(hidden_size) for _ in range(num_layers)),
                *(nn.Linear(hidden_size, vocab_size, bias=False) for _ in range(not tied)),
            )
            for _ in range(num_heads)
        )
        self.num_heads = num_heads
        self.num_layers = num_layers
        self.hidden_size = hidden_size
        self.vocab_size = vocab_size
        self.tied = tied
        # In a tuple, so that the target's weights do not become weights of the heads.
        self._target_head: tuple[Any] = (target_head,)
        self._embedding = (embedding,)
        self._stacked: list[tuple[Tensor, Tensor]] = []
        projection = None if embedding is None else torch.zeros(hidden_size, hidden_size)
        self.root_projection = None if projection is None else nn.Parameter(projection)

    def start_from_target(self) -> None:
        """Copies the target's LM head into the heads' own, from where training learns fastest."""
        if self.tied:
            return
        with torch.no_grad():
            for head in range(self.num_heads):
                self.lm_head(head).copy_(self._target_head[0].weight)

    @torch.no_grad()
    def start_from(self, earlier: MedusaHeads) -> None:
        """Copies the heads that both have; further blocks of these come behind the copied ones."""
        for head in range(min(self.num_heads, earlier.num_heads)):
            for layer in range(earlier.num_layers):
                block = self.get_submodule(f"{head}.{layer}")
                block.load_state_dict(earlier.get_submodule(f"{head}.{layer}").state_dict())
            if not self.tied:
                self.lm_head(head).copy_(earlier.lm_head(head))
        if self.root_projection is not None and earlier.root_projection is not None:
            self.root_projection.copy_(earlier.root_projection)

    @property
    def reads_token(self) -> bool:
        """Whether `forward` needs the newest token."""
        return self.root_projection is not None

    def hidden(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """What the LM heads see: `[.., H]` -> `[.., heads, H]`; arguments as for `forward`."""
        if self.root_projection is not None:
            embedding = self._embedding[0]
            if tokens is None or embedding is None:
                raise ValueError("tokens is None, but these heads read the newest token")
            embeds = embedding(tokens).to(hidden.dtype)
            hidden = hidden + F.linear(embeds, self.root_projection)
        return torch.stack([self._blocks(head)(hidden) for head in self], dim=-2)

    def forward(self, hidden: Tensor, tokens: Tensor | None = None) -> Tensor:
        """Logits of every head.

        Args:
            hidden: the target's hidden states after its final norm, `[.., H]`.
            tokens: what was chosen from them, `[..]`; used where `reads_token`.

        Returns:
            `[.., heads, V]`; head i at position t is about the token at position t + 2 + i.
        """
        states = self.hidden(hidden, tokens).unbind(-2)
        logits = [F.linear(state, self.lm_head(i)) for i, state in enumerate(states)]
        return torch.stack(logits, dim=-2)

    def lm_head(self, head: int) -> Tensor:
        """`[V, H]`, what makes logits of one head's part of `hidden`."""
        if self.tied:
            weight: Tensor = self._target_head[0].weight
            return weight
        return self.get_parameter(f"{head}.{self.num_layers}.weight")

    def logits(self, hidden: Tensor, tokens: Tensor | None, count: int) -> Tensor:
        """`forward` of the first ``count`` heads, by the kernels: `[B, H]` to `[B, count, V]`.

        Block i of all heads is one batched product. The weights must not change any more.
        """
        if self.root_projection is not None:
            embedding = self._embedding[0]
            assert embedding is not None
            assert tokens is not None
            hidden = product(embedding(tokens).to(hidden.dtype), self.root_projection, None, hidden)
        states = hidden.expand(count, -1, -1)  # [count, B, H]
        for weight, bias in self._stacked_blocks():
            states = states + F.silu(torch.baddbmm(bias[:count], states, weight[:count]))
        if self.tied:
            rows = states.transpose(0, 1).flatten(0, 1)
            return product(rows, weight_of(self._target_head[0])).view(len(hidden), count, -1)
        return torch.stack([product(states[i], self.lm_head(i)) for i in range(count)], dim=1)

    def _stacked_blocks(self) -> list[tuple[Tensor, Tensor]]:
        """By block, over the heads: transposed weights [heads, H, H], biases [heads, 1, H]."""
        if not self._stacked:
            for layer in range(self.num_layers):
                linears: list[Any] = [
                    self.get_submodule(f"{i}.{layer}").linear for i in range(len(self))
                ]
                self._stacked.append(
                    (
                        torch.stack([linear.weight.T for linear in linears]),
                        torch.stack([linear.bias[None] for linear in linears]),
                    )
                )
        return self._stacked

    def _blocks(self, head: nn.Module) -> nn.Sequential:
        return nn.Sequential(*list(head.children())[: self.num_layers])
