"""Payoffs of the investment game and its equilibria (arXiv 2510.18802, the companion of the trust paper).

Each agent keeps what it does not invest, earns from what it invests, and takes its share of what the investments
create together:

    pi_i = e_i - a_i + f(a_i) + alpha_i gamma g,    g = (prod_j a_j)^(1/N),    sum_i alpha_i = 1
    f(a) = theta ln(1 + a)  ("log")   or   a^power  ("power")

Provenance: **exact** (the authors' code and the figures of the companion, which [`trl_trust.tasks.coopetition.study`]
reproduces). NumPy only.
"""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from .dynamics import unit_interval


@dataclass(frozen=True)
class Payoff:
    """The one-shot game of N agents.

    Attributes:
        endowment: what each agent has, and the most it can invest; > 0.
        form: `"log"` or `"power"`, the shape of what an investment earns.
        theta: scale of the logarithmic form.
        power: exponent of the power form.
        gamma: complementarity, the weight of what is created together; >= 0.
        alpha: shares (N,) of it; positive, their sum is 1.
        D: dependence (N, N): in equilibrium i maximizes pi_i + sum_j D_ij pi_j. The diagonal is not used.

    Raises:
        ValueError: for a value outside its range.
    """

    endowment: float = 10.0
    form: str = "log"
    theta: float = 3.0
    power: float = 0.75
    gamma: float = 0.65
    alpha: tuple[float, ...] = (0.5, 0.5)
    D: tuple[tuple[float, ...], ...] = ((0.0, 0.7), (0.7, 0.0))

    def __post_init__(self):
        if self.form not in ("log", "power"):
            raise ValueError(f"form={self.form!r} must be 'log' or 'power'.")
        for name in ("endowment", "theta", "power"):
            if not 0 < getattr(self, name) < np.inf:
                raise ValueError(f"{name}={getattr(self, name)!r} must be a finite number > 0.")
        if not 0 <= self.gamma < np.inf:
            raise ValueError(f"gamma={self.gamma!r} must be a finite number >= 0.")
        if min(self.alpha) <= 0 or abs(sum(self.alpha) - 1) > 1e-9:
            raise ValueError(f"alpha={self.alpha!r} must be positive shares whose sum is 1.")
        if unit_interval("D", self.D).shape != (len(self.alpha),) * 2:
            raise ValueError(f"D={self.D!r} must have one row and one column for each of the shares {self.alpha!r}.")

    def production(self, actions: np.ndarray) -> np.ndarray:
        """What each investment earns by itself, f(a), elementwise."""
        return self.theta * np.log1p(actions) if self.form == "log" else np.asarray(actions, float) ** self.power

    def together(self, actions: np.ndarray) -> np.ndarray:
        """What the investments (..., N) create together, gamma g, (...)."""
        actions = np.asarray(actions, float)
        return self.gamma * np.prod(actions, axis=-1) ** (1 / actions.shape[-1])

    def private(self, actions: np.ndarray) -> np.ndarray:
        """pi of each agent, (..., N)."""
        actions = np.asarray(actions, float)
        shared = np.asarray(self.alpha) * self.together(actions)[..., None]
        return self.endowment - actions + self.production(actions) + shared

    def utility(self, actions: np.ndarray) -> np.ndarray:
        """pi_i + sum_j D_ij pi_j of each agent, (..., N)."""
        pi = self.private(actions)
        D = np.asarray(self.D) * (1 - np.eye(len(self.alpha)))
        return pi + pi @ D.T

    def value(self, actions: np.ndarray) -> np.ndarray:
        """What is created in all: sum of f(a_i), and gamma g; (...)."""
        return self.production(actions).sum(-1) + self.together(actions)


def golden_section(function: Callable[[float], float], low: float, high: float, tolerance: float = 1e-9) -> float:
    """Where a function with one peak in [low, high] is largest, to `tolerance`."""
    ratio = (5**0.5 - 1) / 2
    left, right = high - ratio * (high - low), low + ratio * (high - low)
    at_left, at_right = function(left), function(right)
    while high - low > tolerance:
        if at_left < at_right:
            low, left, at_left = left, right, at_right
            right = low + ratio * (high - low)
            at_right = function(right)
        else:
            high, right, at_right = right, left, at_left
            left = high - ratio * (high - low)
            at_left = function(left)
    return (low + high) / 2


def equilibrium(payoff: Payoff, *, damping: float = 0.5, tolerance: float = 2e-8) -> tuple[np.ndarray, float]:
    """A pure equilibrium of the one-shot game, by damped best response with golden-section search.

    Utility is concave in an agent's own action (for `power` <= 1), so its best response has one peak.

    Args:
        payoff: the game.
        damping: share of the way to its best response that each agent goes in a round, in (0, 1].
        tolerance: largest distance to the best response at which to stop, as a share of the endowment; golden-section
            search resolves about 1e-8 of it in float64.

    Returns:
        actions (N,) and the value that they create in all.

    Raises:
        RuntimeError: if best responses do not settle within 1,000 rounds.
    """
    n = len(payoff.alpha)
    actions = np.full(n, payoff.endowment / 2)

    def reply(i: int) -> float:
        def own_utility(a: float) -> float:
            return payoff.utility(np.where(np.arange(n) == i, a, actions))[i]

        return golden_section(own_utility, 0.0, payoff.endowment)

    for _ in range(1000):
        best = np.array([reply(i) for i in range(n)])
        gap = np.abs(best - actions).max()
        actions = actions + damping * (best - actions)
        if gap < tolerance * payoff.endowment:
            return actions, float(payoff.value(actions))
    raise RuntimeError(f"best responses did not settle within 1,000 rounds; the last step was {gap:.3g}")
