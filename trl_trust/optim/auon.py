"""AuON and Hybrid-AuON (2509.24320): momentum divided by a scalar brake, the root mean square of a hyperbolic cosine.

What AuON is *not*: it does not orthogonalise. And on matrices of real size the brake is within 1e-5 of 1, because the
entries of a normalised (m, n) matrix are about 1/sqrt(m n) and cosh(0) = 1. What is left is momentum SGD, normalised
per matrix (`variant="paper"`) or plain (`variant="repo"`). Hybrid-AuON is Muon with the same scalar on top.

Provenance: both variants follow the manuscript's LaTeX source and the authors' code; `brake_scale="rms"` and
`shape_scale="match_rms_adamw"` are ours.
"""

import math
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, Literal

import torch
from torch import Tensor, nn

from ..settings import BelowOne, NonNegative, Positive, Range
from .matrix import Layout, MatrixOptimizer, MomentumDtype, ShapeScale, State, shape_factor
from .muon import NS_COEFFICIENTS, NS_DTYPES, NSCoefficients, NSForm, NSSteps, newton_schulz


Variant = Literal["paper", "repo"]

GAMMA = {"paper": 1.0, "repo": 1.5}
DELTA = 1e-8  # beside the brake, which is never below 1
MAX_COSH = 10.0  # bound on the cosh argument under brake_scale="rms": cosh(10)^2 is 1.2e8


def auon_direction(
    updates: Tensor,
    *,
    variant: Variant = "paper",
    gamma: float | None = None,
    ns_steps: int = 0,
    ns_coefficients: tuple[float, float, float] = NS_COEFFICIENTS,
    ns_dtype: torch.dtype | None = None,
    ns_form: NSForm = "auto",
    rms_form: Literal["sqrt", "square"] = "sqrt",
    brake_scale: Literal["frobenius", "rms"] = "frobenius",
    eps: float = 1e-7,
) -> Tensor:
    """Return AuON's directions for a batch of averaged gradients (..., m, n); the settings are those of [`AuON`].

    The matrix that is divided by the brake r is the normalised update (paper), the update itself (repo), or the result
    of Newton-Schulz (Hybrid).
    """
    gamma = GAMMA[variant] if gamma is None else gamma
    size = updates.shape[-2] * updates.shape[-1]
    norm = torch.linalg.vector_norm(updates, dim=(-2, -1), keepdim=True)  # (..., 1, 1)
    if ns_steps:
        core = newton_schulz(updates / (norm + eps), ns_steps, ns_coefficients, ns_dtype, ns_form)
        norm = torch.linalg.vector_norm(core, dim=(-2, -1), keepdim=True)
        numerator = 1.0
    else:
        core = updates
        numerator = 1.0 / (norm + eps) if variant == "paper" else 1.0
    # What the cosh sees: the paper's Hybrid takes the result of Newton-Schulz as it is, all others normalise.
    if brake_scale == "rms":
        argument = math.sqrt(size) / (norm + eps)
    elif ns_steps and variant == "paper":
        argument = 1.0
    else:
        argument = 1.0 / (norm + eps)
    x = core * (gamma * argument)
    if brake_scale == "rms":
        x = x.clamp_(-MAX_COSH, MAX_COSH)
    # mean(cosh^2) = 1 + mean(sinh^2), and the right-hand side keeps the digits that the left one rounds away.
    r = 1.0 + torch.linalg.vector_norm(x.sinh_(), dim=(-2, -1), keepdim=True).square() / size
    if rms_form == "sqrt":
        r = r.sqrt()
    return core * (numerator / (r + DELTA))


def auon_reference(
    weight: Tensor,
    grad: Tensor,
    buffer: Tensor,
    *,
    lr: float,
    momentum: float = 0.95,
    nesterov: bool = True,
    weight_decay: float = 0.0,
    variant: Variant = "paper",
    gamma: float | None = None,
    ns_steps: int = 0,
    rms_form: Literal["sqrt", "square"] = "sqrt",
    shape_scale: ShapeScale | None = None,
    eps: float = 1e-7,
) -> tuple[Tensor, Tensor]:
    """One step for one (m, n) matrix, as the paper writes it: new weight and new momentum.

    The tests pin [`AuON.step`] to it; it is here to be read.
    """
    gamma = GAMMA[variant] if gamma is None else gamma
    m, n = weight.shape
    buffer = momentum * buffer + (1 - momentum) * grad
    update = (1 - momentum) * grad + momentum * buffer if nesterov else buffer
    unit = update / (update.norm() + eps)
    if ns_steps:
        x = unit.T if m > n else unit
        for _ in range(ns_steps):
            a = x @ x.T
            x = NS_COEFFICIENTS[0] * x + (NS_COEFFICIENTS[1] * a + NS_COEFFICIENTS[2] * a @ a) @ x
        core = x.T if m > n else x
        seen = core if variant == "paper" else core / (core.norm() + eps)
    else:
        core = unit if variant == "paper" else update
        seen = unit
    mean_square = (gamma * seen).cosh().square().mean()
    r = mean_square.sqrt() if rms_form == "sqrt" else mean_square
    factor = shape_factor(shape_scale, m, n)
    if shape_scale == "match_rms_adamw" and not ns_steps:
        factor *= min(m, n) ** 0.5
    return weight * (1 - lr * weight_decay) - lr * factor * core / (r + DELTA), buffer


class AuON(MatrixOptimizer):
    """Momentum of each matrix, divided by its norm and by a cosh brake; AdamW for the rest.

    Args:
        params: Model, parameters or groups; see [`MatrixOptimizer`].
        lr: Learning rate of the matrices. It does not carry over from Muon: the root mean square of an update is
            1/sqrt(m n) here and about 1/sqrt(max(m, n)) there. `shape_scale="match_rms_adamw"` makes AdamW's fit.
        momentum: Weight of the past in the average of gradients, in [0, 1).
        nesterov: Look ahead by one more average.
        momentum_dtype: How momentum is kept; `"bfloat16"` takes half the memory, see [`trl_trust.optim.rounding`].
        weight_decay: Decoupled, times `lr`.
        variant: `"paper"` divides the normalised momentum by the brake, `"repo"` the momentum itself.
        gamma: Scale inside the cosh, in (0, 10]. Default: 1 (paper), 1.5 (repo).
        ns_steps: Newton-Schulz iterations before the brake; 0 is AuON, more is Hybrid-AuON.
        ns_coefficients: Of the quintic.
        ns_dtype: Precision of the iteration, `"float32"` or `"bfloat16"`.
        ns_form: How it is computed, `"plain"`, `"gram"`, or `"auto"` by shape; see [`newton_schulz`].
        rms_form: `"sqrt"` or, as the paper prints the Hybrid, `"square"`.
        shape_scale: `None`, `"original"` = sqrt(max(1, m/n)), or `"match_rms_adamw"`, which brings the update's root
            mean square to .2 sqrt(max(m, n)) times an orthogonal one's.
        brake_scale: `"frobenius"`, or `"rms"`: the cosh sees the update over its root mean square (clamped to 10), so
            that the brake answers to heavy tails.
        eps: Floor of the norm, > 0.
        shared: Settings of routing and AdamW; see [`MatrixOptimizer`].

    Raises:
        ValueError: If a setting is out of range, or `shape_scale="match_rms_adamw"` is asked of `variant="repo"` with
            `ns_steps=0`, whose update has no fixed norm.
    """

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: NonNegative | Tensor,
        *,
        momentum: BelowOne = 0.95,
        nesterov: bool = True,
        momentum_dtype: MomentumDtype = "float32",
        weight_decay: NonNegative = 0.0,
        variant: Variant = "paper",
        gamma: Annotated[float, Range(0, 10, above=True)] | None = None,
        ns_steps: NSSteps = 0,
        ns_coefficients: NSCoefficients = NS_COEFFICIENTS,
        ns_dtype: Literal["float32", "bfloat16"] = "float32",
        ns_form: NSForm = "auto",
        rms_form: Literal["sqrt", "square"] = "sqrt",
        shape_scale: ShapeScale | None = None,
        brake_scale: Literal["frobenius", "rms"] = "frobenius",
        eps: Positive = 1e-7,
        **shared,
    ):
        defaults = {
            "momentum": momentum,
            "nesterov": nesterov,
            "momentum_dtype": momentum_dtype,
            "variant": variant,
            "gamma": gamma,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
            "ns_form": ns_form,
            "rms_form": rms_form,
            "shape_scale": shape_scale,
            "brake_scale": brake_scale,
            "eps": eps,
        }
        super().__init__(params, lr, matrix_defaults=defaults, weight_decay=weight_decay, **shared)

    def validate(self, group: dict[str, Any]) -> None:
        if group["shape_scale"] == "match_rms_adamw" and group["variant"] == "repo" and not group["ns_steps"]:
            raise ValueError(
                "shape_scale='match_rms_adamw' needs an update of known norm, which variant='repo' has only with "
                "ns_steps > 0; use variant='paper'"
            )

    def layout(self, group: dict[str, Any]) -> Layout:
        return "owner" if group["ns_steps"] else "sharded"  # two scalars a matrix need no gathering

    def scale(self, group: dict[str, Any], m: int, n: int) -> float:
        factor = shape_factor(group["shape_scale"], m, n)
        if group["shape_scale"] == "match_rms_adamw" and not group["ns_steps"]:
            factor *= math.sqrt(min(m, n))  # the norm is 1 here, sqrt(min(m, n)) for an orthogonal update
        return factor

    def direction(self, updates: Tensor, states: Sequence[State], group: dict[str, Any]) -> Tensor:
        return auon_direction(
            updates,
            variant=group["variant"],
            gamma=group["gamma"],
            ns_steps=group["ns_steps"],
            ns_coefficients=group["ns_coefficients"],
            ns_dtype=NS_DTYPES[group["ns_dtype"]],
            ns_form=group["ns_form"],
            rms_form=group["rms_form"],
            brake_scale=group["brake_scale"],
            eps=group["eps"],
        )


class HybridAuON(AuON):
    """AuON after Newton-Schulz: an orthogonalised momentum, divided by the brake.

    Args:
        params: Model, parameters or groups; see [`MatrixOptimizer`].
        lr: Learning rate of the matrices, comparable to Muon's.
        variant: `"paper"` takes one Newton-Schulz step, `"repo"` five.
        ns_steps: Overrides that number, 1 to 99.
        options: As [`AuON`].
    """

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: NonNegative | Tensor,
        *,
        variant: Variant = "paper",
        ns_steps: Annotated[int, Range(1, 99, whole=True)] | None = None,
        **options,
    ):
        if ns_steps is None:
            ns_steps = 1 if variant == "paper" else 5
        super().__init__(params, lr, variant=variant, ns_steps=ns_steps, **options)
