"""The geometry of GU (arXiv 2511.17100): what of a forget update leaves the retain loss unchanged to first order.

Everything is a pure function of flat tensors. `d` counts parameters, `m` retain covectors (gradients). `metric` P is
the diagonal that turns a gradient into a step, `-lr * P * g`; whitening is by its square root. The large products keep
the dtype of what comes in, accumulated in float64 in blocks; the m x m algebra is float64 throughout.

The formulas follow the authors' corrected derivation (repository `Lemutisme/geo-unlearning`, notes of July 2026). The
submission-era code whitened with P in place of sqrt(P), which is not orthogonal to the retain gradient.
"""

from itertools import combinations
from typing import NamedTuple

import torch
from torch import Tensor


RANK_TOL = 1e-10  # relative to the largest eigenvalue of the Gram matrix of unit columns
BLOCK = 1 << 20  # parameters that are widened to float64 at a time


class Projected(NamedTuple):
    """A projected forget gradient and what is worth logging, all 0-d float64 but `grad`.

    Attributes:
        grad: (d,) the gradient to hand to the optimizer.
        residual: largest |cosine| of the whitened result with a whitened retain covector.
        coverage: share of the whitened forget gradient's norm that lies in the span of the covectors.
        kept: norm of the whitened result over that of the whitened forget gradient.
        step_norm: length of the step P g in the norm of 1/P, which is the norm of the whitened result.
    """

    grad: Tensor
    residual: Tensor
    coverage: Tensor
    kept: Tensor
    step_norm: Tensor


def adam_metric(second_moment: Tensor, eps: float, bias_correction: float = 1.0) -> Tensor:
    """`1 / (sqrt(v / bias_correction) + eps)`, with `v` Adam's `exp_avg_sq` and `bias_correction` 1 - beta2^t."""
    return 1.0 / ((second_moment / bias_correction).sqrt() + eps)


def inner(a: Tensor, b: Tensor) -> Tensor:
    """`a' b` in float64 for a (d, k), b (d, l) -> (k, l), widened block by block."""
    out = torch.zeros(a.shape[1], b.shape[1], dtype=torch.float64, device=a.device)
    for start in range(0, a.shape[0], BLOCK):
        out += a[start : start + BLOCK].double().T @ b[start : start + BLOCK].double()
    return out


def minus(z: Tensor, columns: Tensor, weights: Tensor) -> Tensor:
    """`z - columns @ weights` for z (d,), columns (d, k), weights (k,) float64, computed in float64 block by block."""
    out = torch.empty_like(z)
    for start in range(0, z.shape[0], BLOCK):
        part = slice(start, start + BLOCK)
        out[part] = z[part].double() - columns[part].double() @ weights
    return out


def norm(x: Tensor) -> Tensor:
    """Length of x (d,), 0-d float64."""
    return inner(x[:, None], x[:, None])[0, 0].sqrt()


def orthonormal(columns: Tensor, scale: Tensor | None = None, *, tol: float = RANK_TOL) -> Tensor:
    """An orthonormal basis (d, r), r <= m, of the span of `columns` (d, m); zero and dependent columns are left out.

    Columns are multiplied by `scale` (d,) where it is given, brought to unit length, then orthogonalized in order (the
    first column's direction stays first), each twice against those before it, since once loses digits where columns
    are close. Stored column by column, and no second copy is made of `columns`.
    """
    basis, found = torch.empty_like(columns.T, memory_format=torch.contiguous_format), 0  # (m, d)
    for column in columns.T:
        q = column if scale is None else scale * column
        size = norm(q)
        if not size > 0:
            continue
        q = q / size
        for _ in range(2):
            q = minus(q, basis[:found].T, inner(basis[:found].T, q[:, None])[:, 0])
        rest = norm(q)
        if rest**2 > max(tol, torch.finfo(columns.dtype).eps ** 2 * 100):
            basis[found] = q / rest
            found += 1
    return basis[:found].T


def null_project(forget: Tensor, covectors: Tensor, metric: Tensor) -> Projected:
    """Remove from the forget gradient what moves the retain loss to first order: equation (1).

        Q = orth(S G), z = S g_f, g_perp = (z - Q Q'z) / S, S = sqrt(P)

    Args:
        forget: (d,) gradient of the forget loss.
        covectors: (d, m) retain gradients; zero columns are skipped; m may be 0.
        metric: (d,) positive diagonal P of the optimizer.
    """
    root = metric.sqrt()
    z = root * forget
    basis = orthonormal(covectors, root)
    perp = _remove(z, basis)
    return _projected(perp / root, z, perp, basis)


def sign_project(
    forget: Tensor, retain: Tensor, covectors: Tensor, metric: Tensor, *, tau: float = 0.0, kappa: float = 0.5
) -> Projected:
    """[`null_project`] that keeps tangent components which help both losses: those with a_i b_i > tau.

    `a = Q'z_f`, `b = Q'z_r`. What is kept is scaled by min(1, kappa ||z_perp|| / ||z_keep||). With the current retain
    gradient as first covector, b is 0 beyond its first entry: only the component along it can be kept.
    """
    root = metric.sqrt()
    z = root * forget
    basis = orthonormal(covectors, root)
    perp = _remove(z, basis)
    a, b = inner(basis, z[:, None])[:, 0], inner(basis, (root * retain)[:, None])[:, 0]
    keep = torch.where(a * b > tau, a, 0.0)
    scale = (kappa * norm(perp) / keep.norm()).clamp(max=1.0) if keep.any() else 0.0
    out = minus(perp, basis, -scale * keep)
    return _projected(out / root, z, out, basis)


def cone_project(step: Tensor, covectors: Tensor, weight: Tensor) -> tuple[Tensor, Tensor]:
    """The step nearest to `step` in the norm of `weight` that raises no retain loss to first order, G'D <= 0.

        D = argmin 1/2 ||D - D0||_M^2 subject to G'D <= 0;  D = D0 - M^-1 G lam, lam >= 0, complementary

    The active set is found by enumeration in float64 (2^m of them, m <= 9). Columns are scaled to unit length in the
    norm of M^-1, never orthogonalized, since that would change the cone. A step inside it is returned as it is.

    Args:
        step: (d,) the proposed change of the parameters, D0.
        covectors: (d, m) retain gradients, m <= 9.
        weight: (d,) positive diagonal M, the inverse of the metric P.

    Returns:
        The step (d,) and the multipliers `lam` (m,) float64 of the columns as given.
    """
    m = covectors.shape[1]
    if m > 9:
        raise ValueError(f"covectors: {m} columns; the cone enumerates active sets, so 9 at most")
    lam = torch.zeros(m, dtype=torch.float64, device=step.device)
    slope = inner(covectors, step[:, None])[:, 0]  # (m,)
    if not (slope > 0).any():
        return step, lam
    gram = inner(covectors, covectors / weight[:, None])
    size = gram.diagonal().sqrt()
    live = size > 0
    size = torch.where(live, size, 1.0)
    gram, slope = gram / (size[:, None] * size[None, :]), slope / size
    columns = [i for i in range(m) if live[i]]
    tol = 1e-12 * max(1.0, slope.abs().max().item())
    best, best_violation = None, float("inf")
    for count in range(1, len(columns) + 1):
        for active in combinations(columns, count):
            index = list(active)
            trial = torch.zeros_like(lam)
            trial[index] = torch.linalg.lstsq(gram[index][:, index], slope[index, None], driver="gelsd").solution[:, 0]
            violation = max((-trial).max().item(), (slope - gram @ trial)[live].max().item())
            if violation < best_violation:
                best, best_violation = trial, violation
            if violation <= tol:
                break
        if best_violation <= tol:
            break
    lam = best.clamp(min=0) / size
    correction = (covectors.double() @ lam) / weight.double()
    return (step.double() - correction).to(step.dtype), lam


def tangent_step(step: Tensor, covectors: Tensor, weight: Tensor) -> Tensor:
    """[`null_project`] for a step instead of a gradient, equation (2): `D0 - P G (G'PG)^+ G'D0`, P = 1 / weight."""
    root = weight.sqrt()
    return _remove(root * step, orthonormal(covectors, 1 / root)) / root


def best_invariant_step(forget: Tensor, covectors: Tensor, metric: Tensor, radius: float) -> Tensor:
    """Equation (3), the steepest retain-invariant step of length at most `radius` in the norm of 1/P.

    min g_f'D s.t. G'D = 0, ||D||_{1/P} <= radius; zero where the forget gradient lies in the span of the covectors.
    """
    projected = null_project(forget, covectors, metric)
    length = projected.step_norm
    return -radius * metric * projected.grad / length if length > 0 else torch.zeros_like(forget)


def joint_gradient(projected: Tensor, retain: Tensor, *, gamma: float = 1.0, alpha: float = 1.0) -> Tensor:
    """Equation (4): `gamma g_perp + alpha g_r`, so that g_r'D = -lr alpha g_r'P g_r whatever the forget loss does."""
    return gamma * projected + alpha * retain


def _remove(z: Tensor, basis: Tensor) -> Tensor:
    """`z - Q Q'z`, twice, in float64 sums."""
    for _ in range(2):
        z = minus(z, basis, inner(basis, z[:, None])[:, 0])
    return z


def _projected(grad: Tensor, z: Tensor, result: Tensor, basis: Tensor) -> Projected:
    whole, rest = norm(z), norm(result)
    along = inner(basis, z[:, None])[:, 0].norm()
    left = inner(basis, result[:, None])[:, 0].abs().max() if basis.shape[1] else whole.new_zeros(())
    tiny = torch.finfo(torch.float64).tiny
    # a result that is rounding only has no direction: its cosine is measured against the whole gradient
    floor = torch.finfo(z.dtype).eps * 16 * whole
    if basis.shape[1] and rest <= floor:
        grad, rest, left = torch.zeros_like(grad), torch.zeros_like(rest), torch.zeros_like(left)
    return Projected(
        grad, left / rest.clamp(min=tiny), along / whole.clamp(min=tiny), rest / whole.clamp(min=tiny), rest
    )
