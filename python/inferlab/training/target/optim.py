"""Optimizer of the trainers: Muon for matrices, AdamW for the rest, fp32 master weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)


class MasterOptimizer:
    """Updates a (bf16 or fp32) model through fp32 master weights.

    Hidden matrices are updated by Muon (Jordan et al., 2024), scaled to the root mean square that
    AdamW has (Liu et al., "Muon is scalable for LLM training", 2025), so that one learning rate
    serves both. Matrices of one shape are orthogonalised together, which on a CPU is what makes
    Muon cheap for narrow models. Embeddings and norms are updated by AdamW.

    Args:
        model: its trainable parameters are updated in place.
        weight_decay: decoupled, for matrices only.
        max_norm: gradients are clipped to this global 2-norm.
        vocab_size: matrices of so many rows are tables of tokens, like embeddings.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        weight_decay: float = 0.01,
        momentum: float = 0.95,
        betas: tuple[float, float] = (0.9, 0.95),
        max_norm: float = 1.0,
        vocab_size: int | None = None,
    ) -> None:
        self.weight_decay = weight_decay
        self.momentum = momentum
        self.betas = betas
        self.max_norm = max_norm
        self.step_count = 0
        self._params = {n: p for n, p in model.named_parameters() if p.requires_grad}
        self._master = {n: p.detach().float().clone() for n, p in self._params.items()}
        groups: dict[tuple[int, ...], list[str]] = {}
        self._adam_names: list[str] = []
        for name, param in self._params.items():
            is_table = "embed" in name or "lm_head" in name or param.shape[0] == vocab_size
            if param.ndim == 2 and not is_table:
                groups.setdefault(tuple(param.shape), []).append(name)
            else:
                self._adam_names.append(name)
        self._muon_groups = list(groups.values())
        self._state = {n: torch.zeros_like(p) for n, p in self._master.items()}
        self._second = {n: torch.zeros_like(self._master[n]) for n in self._adam_names}

    @torch.no_grad()
    def step(self, lr: float) -> float:
        """One update; clears the gradients.

        Args:
            lr: learning rate of this step.

        Returns:
            Global 2-norm of the gradient before clipping.
        """
        self.step_count += 1
        grads = {n: p.grad.float() for n, p in self._params.items() if p.grad is not None}
        norm = torch.stack([g.norm() for g in grads.values()]).norm()
        scale = torch.clamp(self.max_norm / (norm + 1e-6), max=1.0)
        for names in self._muon_groups:
            self._muon_step([n for n in names if n in grads], grads, scale, lr)
        for name in self._adam_names:
            if name in grads:
                self._adam_step(name, grads[name] * scale, lr)
        for name, param in self._params.items():
            param.copy_(self._master[name])
            param.grad = None
        return float(norm)

    def _muon_step(
        self, names: list[str], grads: dict[str, Tensor], scale: Tensor, lr: float
    ) -> None:
        if not names:
            return
        updates = []
        for name in names:
            grad = grads[name] * scale
            buffer = self._state[name].lerp_(grad, 1.0 - self.momentum)
            updates.append(grad.lerp(buffer, self.momentum))  # Nesterov
        update = orthogonalize(torch.stack(updates).to(self._params[names[0]].dtype))
        rms = 0.2 * max(update.shape[-2:]) ** 0.5
        for name, direction in zip(names, update, strict=True):
            master = self._master[name]
            master.mul_(1.0 - lr * self.weight_decay).sub_(direction, alpha=lr * rms)

    def _adam_step(self, name: str, grad: Tensor, lr: float) -> None:
        beta1, beta2 = self.betas
        first = self._state[name].lerp_(grad, 1.0 - beta1)
        second = self._second[name].lerp_(grad.square(), 1.0 - beta2)
        first_hat = first / (1.0 - beta1**self.step_count)
        second_hat = second / (1.0 - beta2**self.step_count)
        self._master[name].sub_(first_hat / (second_hat.sqrt() + 1e-10), alpha=lr)

    def state_dict(self) -> dict[str, Any]:
        """Everything needed to continue bit by bit."""
        return {
            "step": self.step_count,
            "master": self._master,
            "first": self._state,
            "second": self._second,
        }

    @torch.no_grad()
    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restores `state_dict` and writes the weights into the model."""
        self.step_count = state["step"]
        for own, saved in (
            (self._master, state["master"]),
            (self._state, state["first"]),
            (self._second, state["second"]),
        ):
            for name, tensor in own.items():
                tensor.copy_(saved[name])
        for name, param in self._params.items():
            param.copy_(self._master[name])


def orthogonalize(matrices: Tensor) -> Tensor:
    """Nearest semi-orthogonal matrices, roughly, by five Newton-Schulz iterations.

    Args:
        matrices: `[N, rows, columns]`; bf16 is enough.

    Returns:
        fp32 `[N, rows, columns]`, singular values of about 0.7 to 1.2.
    """
    a, b, c = _NEWTON_SCHULZ
    x = matrices
    wide = x.shape[-2] <= x.shape[-1]
    x = x if wide else x.mT
    x = x / (x.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    for _ in range(5):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return (x if wide else x.mT).float()


def learning_rate(progress: float, *, peak: float, warmup: float, cooldown: float) -> float:
    """Warm-up, plateau, linear cooldown to zero (WSD).

    Args:
        progress: share of the training done, in [0, 1].
        peak: learning rate of the plateau.
        warmup: share spent rising linearly.
        cooldown: share spent falling linearly, at the end.
    """
    if progress < warmup:
        return peak * max(progress / warmup, 0.01)
    return peak * min(1.0, (1.0 - progress) / cooldown)
