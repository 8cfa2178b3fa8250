"""From noise to rewards: the grid with its tables, one roll-out of the chain, and advantages. No trainer in here."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .steps import equalizer, sigma_grid, step_mean, variance


@dataclass(frozen=True)
class StepTable:
    """What a grid fixes for each of its T steps, so that sampling and training cannot differ in it.

    Attributes:
        sigmas: (T + 1,) noise levels from 1 to 0, float64.
        variances: (T,) `Sigma`, 0 for a deterministic step, float64.
        scale: (T,) the equalizer's factor of a step's policy loss, 1 without it.
        random: steps with noise, which alone have a log-probability and are trained.
        sde_type: rule of the means.
    """

    sigmas: Tensor
    variances: Tensor
    scale: Tensor
    random: tuple[int, ...]
    sde_type: str

    def __len__(self) -> int:
        return len(self.variances)

    def mean(self, v: Tensor, x: Tensor, steps: Tensor) -> tuple[Tensor, Tensor]:
        """`mu` (B, ...) and `Sigma` (B, 1, ...) at the steps (B,) of `x`, (B, ...), for the velocity `v`."""
        levels = torch.stack([self.sigmas[:-1], self.sigmas[1:], self.variances])[:, steps.cpu()]  # (3, B)
        s, s_next, sigma = levels.to(x).reshape(3, -1, *[1] * (x.dim() - 1))
        return step_mean(v, x, s, s_next, sigma, self.sde_type), sigma


def step_table(
    num_inference_steps: int,
    shift: float,
    eta: float,
    sde_type: str = "sage",
    sigma_clamp: float = 3e-3,
    first_step: str = "clamp",
    deterministic_steps: Sequence[int] = (),
    grad_equalizer: bool = True,
) -> StepTable:
    """The table of a grid.

    `first_step`, for s = 1, where the noise of the continuous process diverges: `"clamp"` is the rule's own
    substitute, `"ode"` takes the step without noise, `"flow_cap"` takes no more noise than `flow` would.

    Raises:
        ValueError: if the grid is so fine at its start that the clamp leaves a step without noise, or no step is
        random.
    """
    sigmas = sigma_grid(num_inference_steps, shift)
    s, s_next, first = sigmas[:-1], sigmas[1:], sigmas[1]
    variances = variance(s, s_next, eta, sde_type, first, sigma_clamp)
    if eta > 0 and sde_type == "sage" and (variances <= 0).any():
        raise ValueError(
            f"sigma_clamp={sigma_clamp!r}: the grid of num_inference_steps={num_inference_steps} and shift={shift:g} "
            f"has its second level at {first:.6f}, above 1 - sigma_clamp, so that the first step has no noise; take a "
            f"smaller sigma_clamp or fewer steps."
        )
    if first_step == "flow_cap":
        variances[0] = torch.minimum(variances[0], variance(s[0], s_next[0], eta, "flow", first))
    held = set(deterministic_steps) | ({0} if first_step == "ode" else set())
    variances[sorted(held)] = 0.0
    random = tuple(i for i, value in enumerate(variances.tolist()) if value > 0)
    if not random:
        raise ValueError(f"eta={eta!r}: every step is deterministic, so that nothing is trained; leave one random.")
    scale = torch.ones_like(variances)
    if grad_equalizer:
        scale = equalizer(sigmas, eta, sde_type, sigma_clamp, variances, sorted(held))
    return StepTable(sigmas, variances, scale, random, sde_type)


@torch.no_grad()
def roll_out(
    velocity: Callable[[Tensor, Tensor], Tensor], x: Tensor, table: StepTable, noise: Callable[[int], Tensor]
) -> tuple[Tensor, Tensor]:
    """Follow the chain from noise to data.

    Args:
        velocity: of `x` (B, ...) at steps (B,), `v` (B, ...).
        x: (B, ...) standard normal, the latents at s = 1.
        noise: standard normal (B, ...) for a step.

    Returns:
        The T + 1 latents (B, T + 1, ...) and the T means (B, T, ...).
    """
    latents, means = [x], []
    for i in range(len(table)):
        steps = torch.full((len(x),), i, device=x.device)
        mu, sigma = table.mean(velocity(x, steps), x, steps)
        x = mu + sigma.sqrt() * noise(i) if i in table.random else mu
        latents.append(x)
        means.append(mu)
    return torch.stack(latents, 1), torch.stack(means, 1)


def ode_table(num_inference_steps: int, shift: float) -> StepTable:
    """The table of the plain ODE, for evaluation."""
    sigmas = sigma_grid(num_inference_steps, shift)
    zeros = torch.zeros_like(sigmas[1:])
    return StepTable(sigmas, zeros, zeros + 1, (), "flow")


def row_noise(shape: Sequence[int], seed: int, phase: int, rows: Sequence[int], what: int) -> Tensor:
    """(len(rows), *shape) standard normal on the CPU, a function of the seed, the phase, the row over all processes
    and what it is for. So a run has the same noise on one process or several, and after a resume."""
    drawn = []
    for row in rows:
        g = torch.Generator().manual_seed(stream(seed, phase, row, what))
        drawn.append(torch.randn(tuple(shape), generator=g))
    return torch.stack(drawn)


def stream(*key: int) -> int:
    """A seed of 63 bits from whole numbers."""
    state = 0x9E3779B97F4A7C15
    for part in key:  # splitmix64
        state = (state + part + 0x9E3779B97F4A7C15) & (2**64 - 1)
        state = ((state ^ (state >> 30)) * 0xBF58476D1CE4E5B9) & (2**64 - 1)
        state = ((state ^ (state >> 27)) * 0x94D049BB133111EB) & (2**64 - 1)
        state ^= state >> 31
    return state >> 1


def group_advantages(
    rewards: Tensor, num_generations: int, scale_rewards: str = "group", adv_clip: float = math.inf
) -> Tensor:
    """(N,) advantages of rewards (N,), whole groups in order; NaN marks an unscored sample, which gets 0.

    `scale_rewards`: `"group"` divides by the group's population standard deviation, at least 1e-6; `"group_trl"` by
    the sample deviation plus 1e-4, as TRL does; `"batch"` by the population deviation of all; `"none"` by 1. A group
    whose rewards are equal, or that has one scored sample, gets exactly 0.
    """
    groups = rewards.double().view(-1, num_generations)
    scored = ~groups.isnan()
    count = scored.sum(1, keepdim=True)
    filled = groups.nan_to_num(0.0)
    mean = filled.sum(1, keepdim=True) / count.clamp(min=1)
    gap = torch.where(scored, filled - mean, 0.0)
    square = gap.square().sum(1, keepdim=True)
    if scale_rewards == "group":
        gap = gap / (square / count.clamp(min=1)).sqrt().clamp(min=1e-6)
    elif scale_rewards == "group_trl":
        gap = gap / ((square / (count - 1).clamp(min=1)).sqrt() + 1e-4)
    elif scale_rewards == "batch":
        values = rewards.double()[~rewards.isnan()]
        gap = gap / (values.std(correction=0) if len(values) else values.sum()).clamp(min=1e-6)
    # rounding of the mean must not become an advantage
    span = groups.nan_to_num(-math.inf).amax(1, keepdim=True) - groups.nan_to_num(math.inf).amin(1, keepdim=True)
    return torch.where(span > 0, gap, 0.0).clamp(-adv_clip, adv_clip).flatten().to(rewards.dtype)
