"""The four step rules that turn a flow's ODE into a Markov chain with densities, and the gradient equalizer.

A flow transformer predicts `v`, an estimate of `z - x0` (noise minus data), at noise level `s` in (0, 1]; data is at
0. A step goes from `s` to `s_next < s`, by `D = s - s_next`. The ODE step `x - D v` has no density; each rule adds
noise of variance `Sigma` and, to keep the marginals, half a score of drift:

    x0_hat = x - s v,   x1_hat = x + (1 - s) v,   score = -x1_hat / s                                    (1)
    mu = x - D v + Sigma score / 2                                                                       (2)
    x_next = mu + sqrt(Sigma) eps                                                                        (3)
    logp = mean over an image of  -(x_next - mu)^2 / (2 Sigma) - log(2 pi Sigma) / 2                     (4)

Everything here is a pure function of tensors. Equations are numbered as in docs/sage.md.

Provenance: **exact**. `sage` and the equalizer: arXiv 2603.21872 and its authors' code, of which formulas were taken
and no text; `flow`: Flow-GRPO; `dance`: DanceGRPO; `cps`: arXiv 2509.05952.
"""

import math
from collections.abc import Sequence

import torch
from torch import Tensor


SDE_TYPES = ("sage", "flow", "dance", "cps")


def sigma_grid(num_steps: int, shift: float = 1.0) -> Tensor:
    """(num_steps + 1,) float64 noise levels from 1 to 0: uniform, then `s <- shift s / (1 + (shift - 1) s)`."""
    s = torch.linspace(1.0, 0.0, num_steps + 1, dtype=torch.float64)
    return shift * s / (1 + (shift - 1) * s)


def step_stats(
    v: Tensor,
    x: Tensor,
    s: Tensor | float,
    s_next: Tensor | float,
    eta: float,
    sde_type: str = "sage",
    s_first_inner: float | None = None,
    clamp: float = 3e-3,
) -> tuple[Tensor, Tensor]:
    """Mean and variance of one step.

    Args:
        v: (B, ...) predicted velocity.
        x: (B, ...) latents at `s`.
        s, s_next: noise levels, numbers or (B,); `0 <= s_next < s <= 1`.
        eta: strength of the noise; 0 is the ODE.
        sde_type: one of [`SDE_TYPES`].
        s_first_inner: the grid's second level, which `flow` puts in place of s = 1 in its denominator.
        clamp: `sage` takes no s above 1 - clamp into its logarithm, which diverges at 1.

    Returns:
        `mu` (B, ...) and `Sigma`, of the shape (B, 1, ...) of a row's number. Where `Sigma` is 0 the step is
        deterministic, and `mu` is its result.
    """
    s, s_next = _rows(s, x), _rows(s_next, x)
    sigma = variance(s, s_next, eta, sde_type, s_first_inner, clamp)
    return step_mean(v, x, s, s_next, sigma, sde_type), sigma


def variance(
    s: Tensor, s_next: Tensor, eta: float, sde_type: str, s_first_inner: float | None = None, clamp: float = 3e-3
) -> Tensor:
    """`Sigma` of each step, of the shape of `s`. It does not depend on the sample, so a grid has one table of it."""
    D = s - s_next
    if sde_type == "sage":  # the integral of s / (1 - s) over the step: additive over sub-steps
        inner = lambda level: (1 - level).clamp(min=clamp)
        return eta**2 * (torch.log(inner(s_next) / inner(s)) - D)
    if sde_type == "flow":
        first = s_next if s_first_inner is None else s_first_inner
        return eta**2 * s / (1 - torch.where(s == 1, first, s)) * D
    if sde_type == "dance":
        return eta**2 * D
    if sde_type == "cps":
        return (s_next * math.sin(eta * math.pi / 2)) ** 2
    raise ValueError(f"sde_type={sde_type!r} must be one of {', '.join(SDE_TYPES)}.")


def step_mean(v: Tensor, x: Tensor, s: Tensor, s_next: Tensor, sigma: Tensor, sde_type: str) -> Tensor:
    """`mu` (B, ...) for a given `Sigma`; `s`, `s_next` and `sigma` broadcast against `x`."""
    x1_hat = x + (1 - s) * v
    if sde_type == "cps":
        return (1 - s_next) * (x - s * v) + (s_next**2 - sigma).clamp(min=0).sqrt() * x1_hat
    return x - (s - s_next) * v - sigma * x1_hat / (2 * s)


def log_prob(x_next: Tensor, mu: Tensor, sigma: Tensor, reduction: str = "mean", density: str = "gaussian") -> Tensor:
    """(B,) log-probability (4) of a step; gradient reaches `mu` only.

    Args:
        x_next: (B, ...) where the step went. Detached.
        mu: (B, ...) and `sigma` (B, 1, ...), positive: mean and variance.
        reduction: `"mean"` or `"sum"` over the dimensions of a sample.
        density: `"published"` is what CPS publishes, `-(x_next - mu)^2` without variance or normalizer.
    """
    square = (x_next.detach() - mu).square()
    value = -square if density == "published" else -square / (2 * sigma) - 0.5 * torch.log(2 * math.pi * sigma)
    return _reduce(value, reduction)


def gaussian_kl(mu: Tensor, other: Tensor, sigma: Tensor, reduction: str = "mean") -> Tensor:
    """(B,) KL of two steps with one variance: `(mu - other)^2 / (2 Sigma)`, the closed form of (9) and (10)."""
    return _reduce((mu - other).square() / (2 * sigma), reduction)


def gradient_norms(s: Tensor, s_next: Tensor, sigma: Tensor, sde_type: str) -> Tensor:
    """(T,) `N`, (5) and (6): root mean square of `dlogp / dv` at a sampled step, times the root of the dimension."""
    if sde_type == "cps":
        slope = -s * (1 - s_next) + (1 - s) * (s_next**2 - sigma).clamp(min=0).sqrt()
    else:
        slope = (s - s_next) + sigma * (1 - s) / (2 * s)
    return slope.abs() / sigma.sqrt()


def equalizer(
    sigmas: Tensor,
    eta: float,
    sde_type: str = "sage",
    clamp: float = 3e-3,
    variances: Tensor | None = None,
    deterministic: Sequence[int] = (),
) -> Tensor:
    """(T,) `S`, (7): what each step's policy loss is multiplied by, so that every step moves `v` alike.

    `S_i = median(N) / N_i`, with the lower median of an even number, over the steps that are random and trained; 1 for
    the others.

    Args:
        sigmas: (T + 1,) noise levels, from 1 to 0.
        eta, sde_type, clamp: as in [`step_stats`].
        variances: (T,) `Sigma` where they are not those of the rule, such as with a capped first step.
        deterministic: steps without noise.
    """
    s, s_next = sigmas[:-1], sigmas[1:]
    if variances is None:
        variances = variance(s, s_next, eta, sde_type, sigmas[1], clamp)
    norms = gradient_norms(s, s_next, variances, sde_type)
    valid = norms.isfinite() & (norms > 0)
    valid[list(deterministic)] = False
    scale = torch.ones_like(norms)
    if valid.any():
        scale[valid] = norms[valid].median() / norms[valid]  # torch's median is the lower one
    return scale


def _rows(value: Tensor | float, like: Tensor) -> Tensor:
    """A number or (B,) as (B, 1, ...), in the dtype of `like`."""
    value = torch.as_tensor(value, dtype=like.dtype, device=like.device)
    return value.reshape(-1, *[1] * (like.dim() - 1))


def _reduce(x: Tensor, reduction: str) -> Tensor:
    x = x.flatten(1)
    return x.sum(1) if reduction == "sum" else x.mean(1)
