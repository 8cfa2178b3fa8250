"""FISMO, Fisher-structured momentum-orthogonalised optimizer (2601.21750): Muon in a whitened space.

A Kronecker pair (P, Q) models the Fisher matrix, F ~ Q kron P. The step is the steepest descent in the spectral norm
of the space that the pair whitens: D maximises <G, D> subject to ||P^1/2 D Q^1/2||_2 <= 1. P = Q = I is Muon.

    P = trace-normalised average of  G Q^-1 G^T / n  + damping
    Q = trace-normalised average of  G^T P^-1 G / m  + damping          with the new P
    M = average of P^-1/2 G Q^-1/2                                      momentum lives in the whitened space
    D = P^-1/2 polar(M) Q^-1/2

Provenance: this structure is confirmed by two independent transcriptions of the paper; its hyper-parameters, the start
P = Q = I and the treatment of roots are a reconstruction. Relative damping, grafting, momentum in parameter space and
one-sided factors are ours.

The printed damping (`damping="paper"`) is *not* invariant to the scale of the gradient: language-model gradients are
far below 1 an entry, the damping then outweighs the data, P and Q stay at I, and FISMO is a Muon of several times the
memory. Hence `damping="relative"`.
"""

import warnings
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from ..settings import BelowOne, Count, Fraction, NonNegative, Positive, Whole
from .matrix import BlockState, MatrixOptimizer, ShapeScale, State
from .muon import NS_COEFFICIENTS, NS_DTYPES, NSCoefficients, NSForm, NSSteps, muon_direction


Damping = Literal["paper", "relative"]
Root = Literal["eigh", "newton_schulz", "cholesky"]

MAX_FACTOR_NUMEL = 2**26  # elements of the factors that are worked on at one time: 256 MB in float32
NS_ROOT_STEPS = 30  # enough for a condition number of 1e8: each step multiplies a small eigenvalue by 9/4
NS_ROOT_TOLERANCE = 1e-2  # on R A R = I, root mean square; beyond it the root counts as failed
WARN_STEP, WARN_CONDITION = 100, 1.01  # when to look whether the paper's damping has switched the factors off


# -------------------------------------------------------------------------------------------------------------------
# The pieces, each on a batch (..., m, n)


def polar(x: Tensor) -> Tensor:
    """U V^T for x = U S V^T, exact. Directions without a singular value stay 0, and so does a zero matrix.

    An SVD returns an arbitrary frame for them, which would move the weights in a step without a gradient.
    """
    u, s, vh = torch.linalg.svd(x, full_matrices=False)  # (..., m, r), (..., r), (..., r, n)
    floor = s[..., :1] * (max(x.shape[-2:]) * torch.finfo(x.dtype).eps)
    return (u * (s > floor).to(u.dtype).unsqueeze(-2)) @ vh


def blend_factor(factor: Tensor, data: Tensor, decay: float, damping: Damping, mu: float) -> Tensor:
    """Move `factor` (..., m, m), of trace m, towards `data` plus damping; symmetric, of trace m again.

    `paper`: data + mu I. `relative`: data scaled to trace m, plus mu I; data without a usable trace is left out. Then
    the smallest eigenvalue never falls below mu / (1 + mu), and the result does not depend on the scale of `data`.
    """
    m = factor.shape[-1]
    eye = torch.eye(m, dtype=factor.dtype, device=factor.device)
    if damping == "relative":
        trace = _trace(data)
        usable = torch.isfinite(trace) & (trace > 0)
        data = torch.where(usable, data * (m / trace), 0)
    mixed = torch.lerp(data + mu * eye, factor, decay)
    mixed = mixed * (m / _trace(mixed))
    return (mixed + mixed.mT) / 2


def inverse_root(factor: Tensor, kind: Root, floor: float) -> tuple[Tensor, Tensor]:
    """A root of each matrix in `factor` (..., m, m), and which are good (..., 1, 1).

    `eigh` and `newton_schulz` return the symmetric F^-1/2, `cholesky` the lower C with C C^T = F: any root serves if
    it is used for one step only, see [`unwhiten`].
    """
    finite = torch.isfinite(factor).all(-1).all(-1)[..., None, None]
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    factor = torch.where(finite, factor, eye)  # LAPACK throws at NaN
    if kind == "cholesky":
        root, info = torch.linalg.cholesky_ex(factor)
        good = (info == 0)[..., None, None]
    elif kind == "eigh":
        root, good = _eigh_root(factor, floor)
    else:
        root = _newton_schulz_root(factor)
        error = torch.linalg.matrix_norm(root @ factor @ root - eye)[..., None, None]
        good = error <= NS_ROOT_TOLERANCE * factor.shape[-1] ** 0.5
    good = finite & good & torch.isfinite(root).all(-1).all(-1)[..., None, None]
    return root, good


def _eigh_root(factor: Tensor, floor: float) -> tuple[Tensor, Tensor]:
    try:
        w, v = torch.linalg.eigh(factor)  # (..., m) ascending, (..., m, m)
    except torch.linalg.LinAlgError:
        if factor.shape[:-2].numel() == 1:
            return factor, torch.zeros_like(factor[..., :1, :1], dtype=torch.bool)
        # One bad matrix fails the whole batch: do them one by one.
        flat = factor.reshape(-1, *factor.shape[-2:])
        roots, good = zip(*(_eigh_root(one, floor) for one in flat.split(1)), strict=True)
        return torch.cat(roots).view_as(factor), torch.cat(good).view(*factor.shape[:-2], 1, 1)
    w = torch.maximum(w, floor * w[..., -1:])
    return (v * w.rsqrt().unsqueeze(-2)) @ v.mT, torch.ones_like(w[..., :1, None], dtype=torch.bool)


def _newton_schulz_root(factor: Tensor) -> Tensor:
    """Coupled iteration: Y to A^1/2 and Z to A^-1/2. Products only, so it suits an accelerator."""
    norm = torch.linalg.matrix_norm(factor)[..., None, None]
    eye = torch.eye(factor.shape[-1], dtype=factor.dtype, device=factor.device)
    y, z = factor / norm, eye.expand_as(factor)
    for _ in range(NS_ROOT_STEPS):
        t = 1.5 * eye - 0.5 * (z @ y)
        y, z = y @ t, t @ z
    return z * norm.rsqrt()


def whiten(root: Tensor | None, x: Tensor, kind: Root) -> Tensor:
    """F^-1/2 x, or C^-1 x for a Cholesky root, which differs by a rotation from the left. No root: x."""
    if root is None:
        return x
    return torch.linalg.solve_triangular(root, x, upper=False) if kind == "cholesky" else root @ x


def unwhiten(root: Tensor | None, x: Tensor, kind: Root) -> Tensor:
    """The transpose of [`whiten`]: F^-1/2 x, or C^-T x. The rotation of the one cancels that of the other."""
    if root is None:
        return x
    return torch.linalg.solve_triangular(root.mT, x, upper=True) if kind == "cholesky" else root @ x


def _trace(x: Tensor) -> Tensor:
    return x.diagonal(dim1=-2, dim2=-1).sum(-1)[..., None, None]


def _unit(x: Tensor) -> Tensor:
    """Each matrix over its largest entry: the squares of what is left neither underflow nor overflow. Zero stays."""
    return x / x.abs().amax((-2, -1), keepdim=True).clamp(min=torch.finfo(x.dtype).tiny)


def fismo_reference(
    grad: Tensor,
    p: Tensor,
    q: Tensor,
    momentum_buffer: Tensor,
    *,
    momentum: float = 0.95,
    factor_decay: float = 0.95,
    damping_value: float = 1e-2,
    damping: Damping = "relative",
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """One step for one (m, n) matrix as the paper writes it, with exact roots and polar: D, P, Q, M.

    The tests pin [`FISMO`] to it; it is here to be read. Start from P = Q = I and M = 0.
    """
    m, n = grad.shape

    def power(x, exponent):
        w, v = torch.linalg.eigh(x)
        return v @ torch.diag(w**exponent) @ v.T

    def blend(factor, data):
        size = len(factor)
        if damping == "relative":
            data = size * data / data.trace() if data.trace() > 0 else 0 * data
        mixed = factor_decay * factor + (1 - factor_decay) * (data + damping_value * torch.eye(size, dtype=data.dtype))
        mixed = size * mixed / mixed.trace()
        return (mixed + mixed.T) / 2

    p = blend(p, grad @ power(q, -1) @ grad.T / n)
    q = blend(q, grad.T @ power(p, -1) @ grad / m)
    p_root, q_root = power(p, -0.5), power(q, -0.5)
    momentum_buffer = momentum * momentum_buffer + (1 - momentum) * p_root @ grad @ q_root
    return p_root @ polar(momentum_buffer) @ q_root, p, q, momentum_buffer


# -------------------------------------------------------------------------------------------------------------------
# The optimizer


class FISMO(MatrixOptimizer):
    """Orthogonalised momentum in a Fisher-whitened space, for matrices; AdamW for the rest.

    State of a matrix, in float32: `momentum_buffer` (m, n), `left_factor` and `left_root` (m, m), `right_factor` and
    `right_root` (n, n), and the integers `step` and `failures`.

    Args:
        params: Model, parameters or groups; see [`MatrixOptimizer`].
        lr: Learning rate of the matrices (reconstruction; Muon's).
        momentum: Weight of the past in the average, in [0, 1) (reconstruction). No Nesterov.
        factor_decay: Weight of the past in P and Q, in [0, 1] (reconstruction).
        damping_value: mu, > 0 (reconstruction).
        damping: `"relative"` (ours) or `"paper"`; see [`blend_factor`].
        weight_decay: Decoupled, times `lr`.
        ns_steps: Newton-Schulz iterations of the polar factor, 0 to 99; 0 is an exact SVD.
        ns_coefficients: Of the quintic.
        ns_dtype: Precision of the iteration, `"float32"` or `"bfloat16"`.
        ns_form: How it is computed, `"plain"`, `"gram"`, or `"auto"` by shape; see [`newton_schulz`].
        root: How P^-1/2 is found. `"cholesky"` is exact and by far the fastest where no whitened momentum outlives the
            step: `momentum=0` or `momentum_space="param"`. Else `"eigh"`, or `"newton_schulz"`, products only.
        eig_floor: Floor of the eigenvalues under `"eigh"`, relative to the largest, > 0.
        update_interval: Factors and roots are refreshed every so many steps. A refresh costs a host synchronisation.
        graft: `"none"`, or `"polar"` (ours): give D the Frobenius norm of polar(M), which is Muon's step length.
        momentum_space: `"whitened"`, or `"param"` (ours): average the gradient, and whiten the average at each step.
        shape_scale: `"original"`, `"match_rms_adamw"` or `None`; see [`trl_trust.optim.matrix.shape_factor`].
        max_factor_dim: A side longer than this is not whitened.
        max_failures: Failed refreshes in a row that are tolerated, the old factors kept; the next one raises.
        shared: Settings of routing and AdamW; see [`MatrixOptimizer`].

    Raises:
        ValueError: If a setting is out of range, or `root="cholesky"` is asked for with whitened momentum.
        RuntimeError: In `step`, after more than `max_failures` failed refreshes in a row.
    """

    shared_momentum = False

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: NonNegative | Tensor = 0.02,
        *,
        momentum: BelowOne = 0.95,
        factor_decay: Fraction = 0.95,
        damping_value: Positive = 1e-2,
        damping: Damping = "relative",
        weight_decay: NonNegative = 0.0,
        ns_steps: NSSteps = 5,
        ns_coefficients: NSCoefficients = NS_COEFFICIENTS,
        ns_dtype: Literal["float32", "bfloat16"] = "float32",
        ns_form: NSForm = "auto",
        root: Root = "eigh",
        eig_floor: Positive = 1e-8,
        update_interval: Count = 1,
        graft: Literal["none", "polar"] = "none",
        momentum_space: Literal["whitened", "param"] = "whitened",
        shape_scale: ShapeScale | None = "original",
        max_factor_dim: Count = 8192,
        max_failures: Whole = 3,
        **shared,
    ):
        defaults = {
            "momentum": momentum,
            "factor_decay": factor_decay,
            "damping_value": damping_value,
            "damping": damping,
            "ns_steps": ns_steps,
            "ns_coefficients": ns_coefficients,
            "ns_dtype": ns_dtype,
            "ns_form": ns_form,
            "root": root,
            "eig_floor": eig_floor,
            "update_interval": update_interval,
            "graft": graft,
            "momentum_space": momentum_space,
            "shape_scale": shape_scale,
            "max_factor_dim": max_factor_dim,
            "max_failures": max_failures,
        }
        super().__init__(params, lr, matrix_defaults=defaults, weight_decay=weight_decay, **shared)

    def validate(self, group: dict[str, Any]) -> None:
        if group["root"] == "cholesky" and group["momentum"] > 0 and group["momentum_space"] == "whitened":
            raise ValueError(
                f"root='cholesky' needs momentum=0 or momentum_space='param', got momentum={group['momentum']}: its "
                "frame turns from step to step, and momentum averaged in it is an average of nothing; use root='eigh'"
            )

    def direction(self, updates: Tensor, states: Sequence[State], group: dict[str, Any]) -> Tensor:
        m, n = updates.shape[-2:]
        sides = [side for side in (m, n) if side <= group["max_factor_dim"]]
        factors = updates[0, ..., 0, 0].numel() * sum(side * side for side in sides)
        size = max(1, MAX_FACTOR_NUMEL // max(1, factors))
        return torch.cat(
            [
                self._direction(part, states[start : start + size], group)
                for start, part in zip(range(0, len(states), size), updates.split(size), strict=True)
            ]
        )

    def _direction(self, grads: Tensor, states: Sequence[State], group: dict[str, Any]) -> Tensor:
        for state, grad in zip(states, grads, strict=True):
            if "step" not in state:
                state.update(self.new_state(grad, group))
        # Parameters that had no gradient now and then may be due at other times than their batch.
        due = [i for i, state in enumerate(states) if state["step"] % group["update_interval"] == 0]
        if len(due) == len(states):
            self._refresh(grads, states, group)
        elif due:
            self._refresh(grads[due], [states[i] for i in due], group)
        for state in states:
            state["step"] += 1

        kind = group["root"]
        left, right = _stack(states, "left_root"), _stack(states, "right_root")  # (k, ..., m, m), (k, ..., n, n)

        def both(side, x):  # (k, ..., m, n)
            return side(right, side(left, x, kind).mT, kind).mT

        averages = [state["momentum_buffer"] for state in states]
        new = grads if group["momentum_space"] == "param" else both(whiten, grads)
        torch._foreach_lerp_(averages, list(new.unbind()), 1 - group["momentum"])
        average = _stack(states, "momentum_buffer")
        whitened = both(whiten, average) if group["momentum_space"] == "param" else average
        # The step does not depend on the scale of the gradient, so Muon's floor of the norm has no place here.
        unit = _unit(whitened)
        if group["ns_steps"] == 0:
            orthogonal = polar(unit)
        else:
            dtype = NS_DTYPES[group["ns_dtype"]] if group["ns_dtype"] == "bfloat16" else None
            # The norm is 1 or more, except where a momentum has decayed into subnormal numbers: a floor of 1 lets that
            # one fade, which otherwise would go on stepping at full length in the direction of its last bits.
            orthogonal = muon_direction(
                unit, group["ns_steps"], group["ns_coefficients"], 1.0, dtype, group["ns_form"]
            )
        direction = both(unwhiten, orthogonal)
        if group["graft"] == "polar":
            norm = torch.linalg.matrix_norm(direction, keepdim=True)
            ratio = torch.linalg.matrix_norm(orthogonal, keepdim=True) / norm
            direction = direction * torch.where(norm > 0, ratio, 0)
        return direction

    def new_state(self, like: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        state = {"step": 0, "failures": 0, "momentum_buffer": torch.zeros_like(like)}
        for side, size in (("left", like.shape[-2]), ("right", like.shape[-1])):
            if size <= group["max_factor_dim"]:
                for what in ("factor", "root"):  # of the identity, every root is the identity
                    eye = torch.eye(size, dtype=like.dtype, device=like.device)
                    state[f"{side}_{what}"] = eye.expand(*like.shape[:-2], size, size).clone()
        return state

    def pass_over(self, state: State) -> None:
        state["step"] += 1  # failures are counted by the owner alone, who raises

    def _refresh(self, grads: Tensor, states: Sequence[State], group: dict[str, Any]) -> None:
        """Update factors and roots; where that fails, keep the old ones and count."""
        kind, m, n = group["root"], *grads.shape[-2:]
        if group["damping"] == "relative":  # which does not see the scale
            grads = _unit(grads)
        good = torch.ones_like(grads[..., :1, :1], dtype=torch.bool)  # (k, ..., 1, 1)
        new = {}

        def renew(side, data):
            factor = _stack(states, f"{side}_factor")
            factor = blend_factor(factor, data, group["factor_decay"], group["damping"], group["damping_value"])
            root, rooted = inverse_root(factor, kind, group["eig_floor"])
            new[f"{side}_factor"], new[f"{side}_root"] = factor, root
            return root, rooted & torch.isfinite(_trace(data))  # `relative` leaves such data out, but it is a failure

        left, right = _stack(states, "left_root"), _stack(states, "right_root")
        if left is not None:
            x = whiten(right, grads.mT, kind)  # (k, ..., n, m): its square is G Q^-1 G^T
            left, rooted = renew("left", x.mT @ x / n)
            good = good & rooted
        if right is not None:
            x = whiten(left, grads, kind)  # with the new P
            _, rooted = renew("right", x.mT @ x / m)
            good = good & rooted
        for name, value in new.items():
            old = [state[name] for state in states]
            torch._foreach_copy_(old, list(torch.where(good, value, torch.stack(old)).unbind()))
        for state, fine in zip(states, good.flatten(1).all(1).tolist(), strict=True):
            state["failures"] = 0 if fine else state["failures"] + 1
            if state["failures"] > group["max_failures"]:
                raise RuntimeError(
                    f"FISMO could not update the factors of a {m}x{n} matrix {state['failures']} times in a row "
                    f"(max_failures={group['max_failures']}). Either its gradient is not finite: skip_nonfinite=True "
                    "leaves such steps out. Or P and Q are out of hand: use damping='relative', a larger "
                    "damping_value, or gradient clipping"
                )
        if group["damping"] == "paper" and states[0]["step"] // group["update_interval"] == WARN_STEP:
            self._warn_if_idle(states)

    def _warn_if_idle(self, states: Sequence[State]) -> None:
        if not getattr(self, "_warned", False) and all(
            max(_condition_numbers(state).values(), default=1.0) < WARN_CONDITION for state in states
        ):
            self._warned = True
            warnings.warn(
                f"with damping='paper' the factors of some matrices are still the identity after {WARN_STEP} updates, "
                "so FISMO is Muon there: the gradients are too small for damping_value. Use damping='relative'",
                stacklevel=2,
            )

    def condition_numbers(self) -> dict[str, dict[str, float]]:
        """Condition numbers of P ("left") and Q ("right") of each matrix; the largest one, where there are several.

        Takes an eigenvalue decomposition each: for a look now and then. Under FSDP2 all ranks have to call it; under
        ZeRO each has its own matrices.
        """
        names = {
            parameter: group["param_names"][i] if "param_names" in group else f"group {g}, parameter {i}"
            for g, group in enumerate(self.param_groups)
            for i, parameter in enumerate(group["params"])
        }
        numbers = {}
        for parameter, state in self.state.items():
            # Under ZeRO it is a vector, whose state has that of this rank's matrices by their names.
            for prefix in dict.fromkeys(key[: key.rfind(":") + 1] for key in state if key.endswith("failures")):
                numbers[prefix[:-1] or names[parameter]] = _condition_numbers(BlockState(state, prefix))
        return numbers


def _stack(states: Sequence[State], name: str) -> Tensor | None:
    return torch.stack([state[name] for state in states]) if name in states[0] else None


def _condition_numbers(state: State) -> dict[str, float]:
    numbers: dict[str, float] = {}
    for key, factor in state.items():  # "left_factor", or "block0.left_factor" of a fused weight
        side, _, what = key.rpartition(".")[2].partition("_")
        if what == "factor":
            factor = factor.full_tensor() if isinstance(factor, DTensor) else factor
            eigenvalues = torch.linalg.eigvalsh(factor)
            condition = (eigenvalues[..., -1] / eigenvalues[..., 0]).max().item()
            numbers[side] = max(condition, numbers.get(side, condition))
    return numbers
