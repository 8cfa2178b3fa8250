"""Muon, the baseline that the other matrix optimizers are measured against: orthogonalised momentum (K. Jordan, 2024).

The same rule as `torch.optim.Muon`, with three differences: equal shapes are orthogonalised in one batch, leading
dimensions are batches (experts of a mixture), and AdamW for everything else is inside.
"""

from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..settings import BelowOne, NonNegative, Number, Positive, Range
from .matrix import MatrixOptimizer, MomentumDtype, ShapeScale, State


# Keller Jordan's quintic: steep at zero, it does not converge to 1 but into about [.7, 1.15].
NS_COEFFICIENTS = (3.4445, -4.7750, 2.0315)
# `None` is the precision of the update itself: float32, or float64 for float64 parameters.
NS_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}
NSSteps = Annotated[int, Range(0, 99, whole=True)]
NSCoefficients = tuple[Number, Number, Number]
NSForm = Literal["auto", "plain", "gram"]

# Measured by benchmarks/gram.py on a CPU: from which n / m the Gram form is faster, from which m it pays to compute a
# symmetric product in stripes, and how many. Steeper polynomials than Jordan's were not looked at: they stay plain.
GRAM_FROM = 2
STRIPES_FROM = 512
STRIPES = 4


def newton_schulz(
    x: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    dtype: torch.dtype | None = None,
    form: NSForm = "auto",
    schedule: Sequence[int] | None = None,
) -> Tensor:
    """Push the singular values of a batch of matrices towards 1: x <- a x + (b A + c A^2) x with A = x x^T.

    The Gram form is the same polynomial. With P = a I + b A + c A^2, a step is x <- P x, and A becomes P A P: several
    steps are made on the small side's A alone, and x is multiplied once, by their product. It squares the condition
    number, so A is computed anew from x after three steps and after every two steps from then on; that keeps the
    drift in bf16 where the plain form's is (benchmarks/gram.py).

    Args:
        x: (..., m, n), with singular values at most 1 (divide by the Frobenius norm). Not written to.
        steps: Number of iterations; 0 returns `x`.
        coefficients: (a, b, c).
        dtype: Precision of the iteration; default, and of the result always, that of `x`.
        form: `"plain"`, the textbook's; `"gram"`; or `"auto"`, the one that was measured to be faster at this shape.
        schedule: Of the Gram form: steps between two computations of A, which add up to `steps`.

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
    m, n = y.shape[-2:]
    if form == "auto":
        form = "gram" if n >= GRAM_FROM * m and a <= NS_COEFFICIENTS[0] else "plain"
        stripes = STRIPES if m >= STRIPES_FROM and y.device.type == "cpu" else 1
    else:
        stripes = 1
    for length in (schedule or _schedule(steps)) if form == "gram" else (1,) * steps:
        gram, product = _symmetric(y, y.mT, stripes), None  # (batch, m, m) each
        for step in range(length):
            factor = _symmetric(gram, gram, stripes, gram, b, c)  # P - a I
            if step < length - 1:
                half = _symmetric(gram, factor, stripes, gram, a)  # P A
                gram = _symmetric(half, factor, stripes, half, a)  # P A P
            if length == 1:
                y = multiply_add(y, factor, y, beta=a)
            elif product is None:
                product = factor
                product.diagonal(dim1=-2, dim2=-1).add_(a)
            else:
                product = _symmetric(factor, product, stripes, product, a)
        if length > 1:
            y = product @ y
    return (y.mT if tall else y).reshape(shape).to(result_dtype)


def _schedule(steps: int) -> list[int]:
    """Steps between two computations of A: 3, 2, 2, ..."""
    first = min(3, steps)
    rest = steps - first
    return [length for length in (first, *[2] * (rest // 2), rest % 2) if length]


def _symmetric(
    left: Tensor, right: Tensor, stripes: int, plus: Tensor | None = None, beta: float = 1.0, alpha: float = 1.0
) -> Tensor:
    """beta plus + alpha left right, (..., m, m), which the caller knows to be symmetric.

    With more than one stripe of rows only what lies left of the diagonal is computed, (stripes + 1) / (2 stripes) of
    the work, and mirrored.
    """
    multiply_add = torch.addmm if left.ndim == 2 else torch.baddbmm
    if stripes == 1:
        return left @ right if plus is None else multiply_add(plus, left, right, beta=beta, alpha=alpha)
    m = left.shape[-2]
    out = left.new_empty((*left.shape[:-1], m))
    width = -(-m // stripes)
    for start in range(0, m, width):
        end = min(m, start + width)
        rows, columns = left[..., start:end, :], right[..., :, :end]
        if plus is None:
            out[..., start:end, :end] = rows @ columns
        else:
            out[..., start:end, :end] = multiply_add(plus[..., start:end, :end], rows, columns, beta=beta, alpha=alpha)
        out[..., :start, start:end] = out[..., start:end, :start].mT
    return out


def muon_direction(
    updates: Tensor,
    steps: int = 5,
    coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    eps: float = 1e-7,
    dtype: torch.dtype | None = None,
    form: NSForm = "auto",
) -> Tensor:
    """Normalise a batch of matrices (..., m, n) by their Frobenius norms and orthogonalise them."""
    norm = torch.linalg.vector_norm(updates, dim=(-2, -1), keepdim=True).clamp(min=eps)
    dtype = dtype or updates.dtype
    return newton_schulz(updates.to(dtype) / norm.to(dtype), steps, coefficients, form=form).to(updates.dtype)


class Muon(MatrixOptimizer):
    """Momentum orthogonalised by Newton-Schulz, for matrices; AdamW for the rest.

    Args:
        params: Model, parameters or groups; see [`MatrixOptimizer`].
        lr: Learning rate of the matrices.
        momentum: Weight of the past in the average of gradients, in [0, 1).
        nesterov: Look ahead by one more average.
        momentum_dtype: How momentum is kept; `"bfloat16"` takes half the memory, see [`trl_trust.optim.rounding`].
        weight_decay: Decoupled, times `lr`.
        ns_steps: Newton-Schulz iterations, 0 to 99.
        ns_coefficients: Of the quintic.
        ns_dtype: Precision of the iteration, `"bfloat16"` (as `torch.optim.Muon`) or `"float32"`.
        ns_form: How it is computed, `"plain"`, `"gram"`, or `"auto"` by shape; see [`newton_schulz`].
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
        momentum_dtype: MomentumDtype = "float32",
        weight_decay: NonNegative = 0.0,
        ns_steps: NSSteps = 5,
        ns_coefficients: NSCoefficients = NS_COEFFICIENTS,
        ns_dtype: Literal["bfloat16", "float32"] = "bfloat16",
        ns_form: NSForm = "auto",
        shape_scale: ShapeScale | None = "original",
        eps: Positive = 1e-7,
        **shared,
    ):
        defaults = {
            "momentum": momentum,
            "nesterov": nesterov,
            "momentum_dtype": momentum_dtype,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
            "ns_form": ns_form,
            "shape_scale": shape_scale,
            "eps": eps,
        }
        super().__init__(params, lr, matrix_defaults=defaults, weight_decay=weight_decay, **shared)

    def direction(self, updates: Tensor, states: Sequence[State], group: dict[str, Any]) -> Tensor:
        dtype = NS_DTYPES[group["ns_dtype"]]
        return muon_direction(
            updates, group["ns_steps"], group["ns_coefficients"], group["eps"], dtype, group["ns_form"]
        )
