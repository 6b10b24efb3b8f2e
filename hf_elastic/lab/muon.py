"""Muon, the optimizer that orthogonalises the momentum of a matrix before it steps."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

# Quintic Newton-Schulz coefficients of https://kellerjordan.github.io/posts/muon/. They are chosen for a steep slope
# at zero: five rounds bring singular values near 1, not onto it, which the optimizer does not need.
_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
_ROUNDS = 5
_EPS = 1e-7


def orthogonalize(matrices: Tensor) -> Tensor:
    """Replaces the singular values of matrices by values near 1 and keeps their singular vectors.

    Args:
        matrices (`torch.Tensor` of shape `(..., rows, columns)`): Any leading dimensions are a batch of matrices.

    Returns:
        `torch.Tensor` of the same shape: `U S' V^T` for the singular value decomposition `U S V^T`, with S' in
        `[0.68, 1.21]` wherever S is above 0.002 of the matrix's Frobenius norm; smaller values grow, but less far.
    """
    a, b, c = _COEFFICIENTS
    tall = matrices.size(-2) > matrices.size(-1)
    x = matrices.mT if tall else matrices
    # The Frobenius norm bounds the largest singular value, which must not exceed 1 for the iteration to stay bounded.
    x = x / x.norm(dim=(-2, -1), keepdim=True).clamp(min=_EPS)
    for _ in range(_ROUNDS):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Muon with Nesterov momentum, for matrices and for batches of matrices such as the weights of all experts.

    It follows `torch.optim.Muon` with `adjust_lr_fn="match_rms_adamw"`, except that it also takes parameters of more
    than two dimensions, each of whose trailing matrices is treated on its own, and that it works in the parameters'
    own precision, as bfloat16 has no advantage on a CPU.

    Args:
        params (`Iterable[torch.nn.Parameter]`): Parameters of shape `(..., rows, columns)`.
        lr (`float`): Learning rate. The step of a matrix is `lr * 0.2 * sqrt(max(rows, columns))` times its
            orthogonalised momentum, which gives it about the size of a step of AdamW.
        momentum (`float`, *optional*, defaults to 0.95): Decay of the running mean of the gradient, in `[0, 1)`.
        weight_decay (`float`, *optional*, defaults to 0.0): Decoupled decay; every step shrinks the weights by
            `lr * weight_decay`.

    Raises:
        `ValueError`: If a parameter has fewer than two dimensions.
    """

    def __init__(
        self, params: Iterable[torch.nn.Parameter], lr: float, momentum: float = 0.95, weight_decay: float = 0.0
    ) -> None:
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})
        shapes = [tuple(p.shape) for group in self.param_groups for p in group["params"] if p.ndim < 2]
        if shapes:
            raise ValueError(
                f"Muon takes parameters of two or more dimensions, got the shapes {shapes}. "
                "Give biases, norms and other vectors to another optimizer, such as `torch.optim.AdamW`."
            )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Takes one step; parameters without a gradient stay as they are."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._step_parameter(
                        parameter, parameter.grad, group["lr"], group["momentum"], group["weight_decay"]
                    )
        return loss

    def _step_parameter(
        self, parameter: Tensor, gradient: Tensor, lr: float, momentum: float, weight_decay: float
    ) -> None:
        state = self.state[parameter]
        if "momentum_buffer" not in state:
            state["momentum_buffer"] = torch.zeros_like(parameter)
        mean = state["momentum_buffer"].lerp_(gradient, 1 - momentum)
        update = orthogonalize(gradient.lerp(mean, momentum))
        parameter.mul_(1 - lr * weight_decay)
        parameter.add_(update, alpha=-lr * 0.2 * max(parameter.shape[-2:]) ** 0.5)
