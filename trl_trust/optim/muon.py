"""Muon, the baseline that the other matrix optimizers are measured against: orthogonalised momentum (K. Jordan, 2024).

The same rule as `torch.optim.Muon`, with three differences: equal shapes are orthogonalised in one batch, leading
dimensions are batches (experts of a mixture), and AdamW for everything else is inside.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..settings import BelowOne, NonNegative, Number, Positive, Range
from .matrix import MatrixOptimizer, ShapeScale, State


# Keller Jordan's quintic: steep at zero, it does not converge to 1 but into about [.7, 1.15].
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# `None` is the precision of the update itself: float32, or float64 for float64 parameters.
NS_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
NSSteps = Annotated[int, Range(0, 99, whole=True)]
NSCoefficients = tuple[Number, Number, Number]


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Push the singular values of a batch of matrices towards 1: x <- a x + (b A + c A^2) x with A = x x^T.

    Args:
        x: (..., m, n), with singular values at most 1 (divide by the Frobenius norm). Not written to.
        steps: Number of iterations; 0 returns `x`.
        coefficients: (a, b, c).
        dtype: Precision of the iteration; default, and of the result always, that of `x`.

    Returns:
        (..., m, n), about U V^T for x = U S V^T.
    """
    a, b, c = coefficients
    result_dtype, shape = x.dtype, x.shape
    tall = shape[-2] > shape[-1]
    y = (x.mT if tall else x).to(dtype or x.dtype)  # (..., m, n) with m <= n: of the two products A is the smaller one
    y = y.reshape(-1, *y.shape[-2:]).contiguous()  # (batch, m, n)
    multiply_add = torch.baddbmm
    if y.shape[0] == 1:  # a batch of one makes bmm copy its operands
        y, multiply_add = y.squeeze(0), torch.addmm
    for _ in range(steps):
        gram = y @ y.mT  # (batch, m, m)
        y = multiply_add(y, multiply_add(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    return (y.mT if tall else y).reshape(shape).to(result_dtype)


def muon_direction(
    updates: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
) -> Tensor:
    """Normalise a batch of matrices (..., m, n) by their Frobenius norms and orthogonalise them."""
    norm = torch.linalg.vector_norm(updates, dim=(-2, -1), keepdim=True).clamp(min=eps)
    dtype = dtype or updates.dtype
    return newton_schulz(updates.to(dtype) / norm.to(dtype), steps, coefficients).to(updates.dtype)


class Muon(MatrixOptimizer):
    """Momentum orthogonalised by Newton-Schulz, for matrices; AdamW for the rest.

    Args:
        params: Model, parameters or groups; see [`MatrixOptimizer`].
        lr: Learning rate of the matrices.
        momentum: Weight of the past in the average of gradients, in [0, 1).
        nesterov: Look ahead by one more average.
        weight_decay: Decoupled, times `lr`.
        ns_steps: Newton-Schulz iterations, 0 to 99.
        ns_coefficients: Of the quintic.
        ns_dtype: Precision of the iteration, `"bfloat16"` (as `torch.optim.Muon`) or `"float32"`.
        shape_scale: `"original"`, `"match_rms_adamw"` or `None`; see [`trl_trust.optim.matrix.shape_factor`].
        eps: Floor of the norm.
        shared: Settings of routing and AdamW; see [`MatrixOptimizer`].
    """

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: NonNegative | Tensor = 0.02,
        *,
        momentum: BelowOne = 0.95,
        nesterov: bool = True,
        weight_decay: NonNegative = 0.0,
        ns_steps: NSSteps = 5,
        ns_coefficients: NSCoefficients = NS_COEFFICIENTS,
        ns_dtype: Literal["bfloat16", "float32"] = "bfloat16",
        shape_scale: ShapeScale | None = "original",
        eps: Positive = 1e-7,
        **shared,
    ):
        defaults = {
            "momentum": momentum,
            "nesterov": nesterov,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
            "shape_scale": shape_scale,
            "eps": eps,
        }
        super().__init__(params, lr, matrix_defaults=defaults, weight_decay=weight_decay, **shared)

    def direction(self, updates: Tensor, states: Sequence[State], group: dict[str, Any]) -> Tensor:
        dtype = NS_DTYPES[group["ns_dtype"]]
        return muon_direction(updates, group["ns_steps"], group["ns_coefficients"], group["eps"], dtype)
