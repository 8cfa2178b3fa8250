"""Trust and reputation between agents, step by step (arXiv 2510.24909).

Two layers for each ordered pair i -> j: trust T_ij in [0, 1], and the damage R_ij in [0, 1] that violations leave in
j's reputation with i. Actions above the baseline build trust slowly, up to the ceiling 1 - R; actions below it erode
it quickly and leave damage, which fades only in good times. "Trust" here is trust between agents; it has nothing to do
with the region in which a policy may move.

Provenance: **exact**. Equations and defaults are those of the authors' code (`vikpant/strategic-coopetition`, MIT).
The sources disagree on two points, so both are settings: `building` and `decay`; which of them the paper's second
version prescribes is not known here.

NumPy only. Shapes: N agents, any leading batch dimensions `...`.
"""

from dataclasses import dataclass
from typing import Annotated, Literal

import numpy as np

from trl_trust.settings import Fraction, NonNegative, Positive, Range, Settings, check, setting


Rate = Annotated[float, Range(0, 1, above=True)]


@dataclass(frozen=True)
class TrustParams(Settings):
    """
    The constants of the trust dynamics.

    Raises:
        ValueError: for a constant outside its range.
    """

    lambda_plus: Rate = setting(0.10, "Rate at which trust is built.")
    lambda_minus: Rate = setting(0.30, "Rate at which trust erodes; over `lambda_plus` it is the negativity bias.")
    mu: Fraction = setting(0.60, "Severity of a violation: the share of intact reputation that one can damage.")
    delta: Fraction = setting(0.03, "Share of the damage that fades in a step without violation.")
    xi: NonNegative = setting(0.50, "How much dependence amplifies erosion: by the factor 1 + xi D.")
    kappa: Positive = setting(1.0, "Sensitivity of the signal tanh(kappa (action - baseline)).")
    trust0: Fraction = setting(0.5, "Trust of all pairs at the start.")
    damage0: Fraction = setting(0.0, "Damage of all pairs at the start.")
    building: Literal["gap", "product"] = setting(
        "gap", "How trust grows: by the gap to the ceiling, max(0, 1 - R - T) (code since 2026), or by (1 - T)(1 - R)."
    )
    decay: Literal["regime", "always"] = setting(
        "regime", "When damage fades: in steps without violation (code), or in every step (docs, committed data)."
    )

    def __post_init__(self):
        check(self)


def signals(actions: np.ndarray, baselines: np.ndarray | float, kappa: float = 1.0) -> np.ndarray:
    """How agent i reads what j did: `tanh(kappa (a_j - b_j))`, (..., 1, N) which broadcasts over the readers i."""
    return np.tanh(kappa * (np.asarray(actions, float) - baselines))[..., None, :]


def update(
    trust, damage, signal, D, *, lambda_plus, lambda_minus, mu, delta, xi, building="gap", decay="regime"
) -> tuple[np.ndarray, np.ndarray]:
    """One step of trust and damage from the state before it. All arguments broadcast, the constants too.

        dT = lambda+ s max(0, 1 - R - T)  ("gap")  or  lambda+ s (1 - T)(1 - R)  ("product")     where s > 0
             lambda- s T (1 + xi D)                                                              where s <= 0
        dR = -mu s (1 - R)                  where s < 0, less delta R there too with decay="always"
             -delta R                       where s >= 0

    Returns:
        trust and damage after the step, clipped to [0, 1].
    """
    room = np.maximum(0.0, 1 - damage - trust) if building == "gap" else (1 - trust) * (1 - damage)
    d_trust = np.where(signal > 0, lambda_plus * signal * room, lambda_minus * signal * trust * (1 + xi * D))
    faded = -delta * damage
    hurt = -mu * signal * (1 - damage)
    d_damage = np.where(signal < 0, hurt + faded if decay == "always" else hurt, faded)
    return np.clip(trust + d_trust, 0.0, 1.0), np.clip(damage + d_damage, 0.0, 1.0)


class TrustDynamics:
    """Trust and damage of N agents over time.

    Args:
        params: the constants.
        D: dependence D_ij of i on j in [0, 1], (N, N) or a number for all pairs. The diagonal is not used.
        baselines: what is expected of each agent, (N,) or a number.
        trust0: (N, N) or a number, in place of `params.trust0`.
        damage0: (N, N) or a number, in place of `params.damage0`.

    Raises:
        ValueError: for an entry outside its range or shapes that do not fit.
    """

    def __init__(self, params: TrustParams | None = None, D=0.7, baselines=5.0, trust0=None, damage0=None):
        self.params = TrustParams() if params is None else params
        self.D = unit_interval("D", D)
        self.baselines = np.asarray(baselines, float)
        if not np.isfinite(self.baselines).all():
            raise ValueError(f"baselines={baselines!r} must be finite numbers.")
        self.trust0 = unit_interval("trust0", self.params.trust0 if trust0 is None else trust0)
        self.damage0 = unit_interval("damage0", self.params.damage0 if damage0 is None else damage0)

    def start(self, n: int, batch: tuple[int, ...] = ()) -> tuple[np.ndarray, np.ndarray]:
        """Trust and damage before the first step, (*batch, n, n) each."""
        shape = (*batch, n, n)
        return np.broadcast_to(self.trust0, shape).copy(), np.broadcast_to(self.damage0, shape).copy()

    def step(self, trust: np.ndarray, damage: np.ndarray, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The state after one step, (..., N, N), from the state before it and the actions (..., N)."""
        p = self.params
        signal = signals(actions, self.baselines, p.kappa)  # (..., 1, N)
        after = update(
            trust,
            damage,
            signal,
            self.D,
            lambda_plus=p.lambda_plus,
            lambda_minus=p.lambda_minus,
            mu=p.mu,
            delta=p.delta,
            xi=p.xi,
            building=p.building,
            decay=p.decay,
        )
        pairs = ~np.eye(trust.shape[-1], dtype=bool)
        return np.where(pairs, after[0], trust), np.where(pairs, after[1], damage)

    def run(self, actions: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Trust and damage, (steps + 1, ..., N, N) each, of actions (steps, ..., N); the first entry is the start."""
        actions = np.asarray(actions, float)
        if actions.ndim < 2 or not np.isfinite(actions).all():
            raise ValueError(f"actions of shape {actions.shape} must be finite numbers of shape (steps, ..., agents).")
        state = self.start(actions.shape[-1], actions.shape[1:-1])
        states = [state]
        for now in actions:
            state = self.step(*state, now)
            states.append(state)
        trust, damage = zip(*states, strict=True)
        return np.stack(trust), np.stack(damage)


def unit_interval(name: str, values) -> np.ndarray:
    """`values` as a float array; `ValueError` naming it unless all lie in [0, 1]."""
    array = np.asarray(values, float)
    if not ((array >= 0) & (array <= 1)).all():
        raise ValueError(f"{name}={values!r} must be numbers in [0, 1].")
    return array
