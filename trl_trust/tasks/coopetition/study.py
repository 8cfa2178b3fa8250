"""The published figures, recomputed: the parameter sweep, the case study with its rubric, the companion's equilibria.

Provenance: **exact** where a published figure stands in [`reproduce`] (arXiv 2510.24909, section 6 as the authors'
code computes it; companion arXiv 2510.18802). NumPy and SciPy only.
"""

import itertools
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from .dynamics import TrustDynamics, TrustParams, signals, update
from .payoffs import Payoff, equilibrium


STANDARD_GRID = {
    "lambda_plus": (0.05, 0.08, 0.10, 0.12, 0.15),
    "lambda_minus": (0.15, 0.23, 0.30, 0.38, 0.45),
    "mu": (0.50, 0.55, 0.60, 0.65, 0.70),
    "delta": (0.01, 0.02, 0.03, 0.04, 0.05),
    "xi": (0.3, 0.4, 0.5, 0.6, 0.7),
    "kappa": (0.5, 0.75, 1.0, 1.25, 1.5),
    "rho": (0.10, 0.15, 0.20, 0.25, 0.30),
}
GRIDS = {"standard": STANDARD_GRID, "coarse": {name: values[::2] for name, values in STANDARD_GRID.items()}}
METRICS = ("negativity_ratio", "hysteresis", "cumulative", "dependency")
_READ = ("lambda_plus", "lambda_minus", "mu", "delta", "xi")  # kappa and rho enter no metric


def sweep(grid: str | dict = "standard", building: str = "gap", decay: str = "regime") -> dict[str, np.ndarray]:
    """The four metrics of the paper's sweep in every cell of a grid.

    The signals are set outright (such as tanh 2), at D = 0.5, so that `kappa` and `rho` count cells but change none.

    Args:
        grid: a key of `GRIDS`, or a dict name -> values with the seven names of `STANDARD_GRID`.
        building, decay: as in [`TrustParams`].

    Returns:
        name -> (cells,): the seven constants, then the metrics `negativity_ratio` (lambda- over lambda+), `hysteresis`
        (largest trust in 35 steps of tanh 2 that follow one of tanh(-3) from .85, over .85), `cumulative` (loss of
        four steps of tanh(-1) over the loss of one of tanh(-4), from .8) and `dependency` (loss in a step of tanh(-2)
        at D = .8 over the one at D = .2).

    Raises:
        ValueError: for an unknown grid, a missing name, or a value outside the range of `TrustParams`.
    """
    if isinstance(grid, str):
        if grid not in GRIDS:
            raise ValueError(f"grid={grid!r} must be one of {', '.join(GRIDS)}, or a dict of values.")
        grid = GRIDS[grid]
    if set(grid) != set(STANDARD_GRID) or not all(len(values) for values in grid.values()):
        raise ValueError(f"grid must have values for each of {', '.join(STANDARD_GRID)}; got {', '.join(grid)}.")
    for name in (*_READ, "kappa"):
        for value in grid[name]:
            TrustParams(**{name: value, "building": building, "decay": decay})

    axes = np.meshgrid(*(np.asarray(grid[name], float) for name in _READ), indexing="ij", sparse=True)
    constants = dict(zip(_READ, axes, strict=True))
    modes = {"building": building, "decay": decay}

    def after(trust, damage, strength, D=0.5):
        return update(trust, damage, np.tanh(strength), D, **constants, **modes)

    trust, damage = after(0.85, 0.0, -3.0)
    highest = trust
    for _ in range(35):
        trust, damage = after(trust, damage, 2.0)
        highest = np.maximum(highest, trust)
    small, worn = 0.8, 0.0
    for _ in range(4):
        small, worn = after(small, worn, -1.0)
    loss = {D: 0.8 - after(0.8, 0.0, -2.0, D)[0] for D in (0.2, 0.8)}
    metrics = {
        "negativity_ratio": constants["lambda_minus"] / constants["lambda_plus"],
        "hysteresis": highest / 0.85,
        "cumulative": (0.8 - small) / (0.8 - after(0.8, 0.0, -4.0)[0]),
        "dependency": loss[0.8] / loss[0.2],
    }
    sizes = [len(grid[name]) for name in STANDARD_GRID]
    cells = {
        name: axis.reshape(-1)
        for name, axis in zip(
            STANDARD_GRID,
            np.meshgrid(*(np.asarray(grid[name], float) for name in STANDARD_GRID), indexing="ij"),
            strict=True,
        )
    }
    for name, values in metrics.items():  # (5 axes that are read) -> all seven
        cells[name] = np.broadcast_to(values[..., None, None], sizes).reshape(-1)
    return cells


@dataclass(frozen=True)
class Study:
    """A case study: what two agents did in phases, and the constants.

    Attributes:
        names: of the agents.
        actions: for each phase, the actions (2,).
        lengths: steps of each phase.
        params: the constants.
        D, trust0: (2, 2).
        baseline: of both agents.
    """

    names: tuple[str, str]
    actions: tuple[tuple[float, float], ...]
    lengths: tuple[int, ...]
    params: TrustParams
    D: tuple[tuple[float, ...], ...]
    trust0: tuple[tuple[float, ...], ...]
    baseline: float = 5.0


class Case(NamedTuple):
    """A study that was run: trust and damage (steps + 1, 2, 2), signals (steps, 2) and where the phases end."""

    study: Study
    trust: np.ndarray
    damage: np.ndarray
    signal: np.ndarray
    ends: tuple[int, ...]

    @property
    def phases(self) -> list[tuple[int, int]]:
        """Start and end of each phase, as steps."""
        return list(itertools.pairwise((0, *self.ends)))

    def f(self, real_pairs: bool = False) -> float:
        """F of a one-way analysis of variance of trust by phase; with the diagonal (as published) or without it."""
        from scipy.stats import f_oneway

        trust = self.trust[:, [0, 1], [1, 0]] if real_pairs else self.trust
        return float(f_oneway(*(trust[start:end].reshape(-1) for start, end in self.phases)).statistic)


_DEC = TrustParams(mu=0.60, delta=0.03, building="product")
_RENAULT_NISSAN = Study(
    names=("Renault", "Nissan"),
    actions=((6.5, 6.5), (7.0, 7.0), (3.0, 3.5), (5.5, 5.8), (6.0, 6.2)),
    lengths=(12, 40, 4, 15, 8),
    params=_DEC,
    D=((0.0, 0.65), (0.75, 0.0)),
    trust0=((1.0, 0.5), (1.0, 0.55)),
)
STUDIES = {
    "renault_nissan": {
        "published": _RENAULT_NISSAN,
        "committed": replace(_RENAULT_NISSAN, params=replace(_DEC, decay="always")),
        "current": replace(
            _RENAULT_NISSAN,
            actions=((6.5, 6.5), (7.0, 7.0), (2.0, 2.0), (6.2, 6.2), (6.5, 6.5)),
            params=TrustParams(lambda_plus=0.08, lambda_minus=0.25, mu=0.55, delta=0.02),
        ),
    }
}
CORRECTED_START = ((1.0, 0.5), (0.55, 1.0))  # as released, .55 stands on the diagonal


def case_study(name: str = "renault_nissan", variant: str = "published", **changes) -> Case:
    """Run a case study.

    Args:
        name: a key of `STUDIES`.
        variant: `"published"` (code of December 2025), `"committed"` (the JSON beside it), `"current"` (code of 2026).
        changes: fields of [`Study`] to replace, and constants of [`TrustParams`] to replace (`mu=0`).

    Raises:
        ValueError: for an unknown name, variant or field.
    """
    if name not in STUDIES or variant not in STUDIES[name]:
        known = ", ".join(f"{study} ({', '.join(variants)})" for study, variants in STUDIES.items())
        raise ValueError(f"no case study {name!r} with variant {variant!r}; there are {known}.")
    study = STUDIES[name][variant]
    fields = {key: changes.pop(key) for key in list(changes) if key in Study.__dataclass_fields__}
    unknown = set(changes) - set(TrustParams.__dataclass_fields__)
    if unknown:
        raise ValueError(f"unknown changes {', '.join(sorted(unknown))} to the case study.")
    study = replace(study, **fields)
    study = replace(study, params=replace(study.params, **changes))
    actions = np.repeat(np.asarray(study.actions, float), study.lengths, axis=0)  # (steps, 2)
    dynamics = TrustDynamics(study.params, D=study.D, baselines=study.baseline, trust0=study.trust0)
    trust, damage = dynamics.run(actions)
    signal = signals(actions, study.baseline, study.params.kappa)[:, 0]
    return Case(study, trust, damage, signal, tuple(np.cumsum(study.lengths).tolist()))


class Rubric(NamedTuple):
    """Points of the paper's rubric, at most 15 each, 60 in all."""

    state: int
    behavior: int
    mechanism: int
    outcome: int

    @property
    def total(self) -> int:
        return sum(self)


def score(case: Case) -> Rubric:
    """The paper's rubric, as its code has it; m is the mean of the whole trust matrix, its diagonal included.

    - state: the constant 10, which the code gives where nobody supplies observations.
    - behavior: 3 for each phase in which m moves in the direction of the mean signal.
    - mechanism: 5 if mean erosion in a step exceeds 1.5 x mean building, 5 if a phase with mean signal < -.3 is
      followed by one with mean signal > .3 at whose end m is below .9 of what it was before the violation, 5 if damage
      exceeds .3.
    - outcome: 7 if the last m lies in [.2, .8], else 4; 2 more, up to 8, for each phase end across which m moves by
      more than .05.
    """
    m = case.trust.mean((1, 2))
    phases = case.phases
    strength = [case.signal[start:end].mean() for start, end in phases]
    behavior = sum(3 for g, (start, end) in zip(strength, phases, strict=True) if (m[end] - m[start]) * g > 0)

    change = np.diff(m)
    rate = {sign: np.abs(steps).mean() if len(steps := change[change * sign > 0]) else 0.0 for sign in (1, -1)}
    biased = rate[-1] > 1.5 * rate[1]
    marked = any(
        strength[i] < -0.3 and strength[j] > 0.3 and m[phases[j][1]] < 0.9 * m[phases[i][0]]
        for i, j in itertools.combinations(range(len(phases)), 2)
    )
    mechanism = 5 * (int(biased) + int(marked) + int(case.damage.max() > 0.3))

    turns = sum(2 for end in case.ends if end + 1 < len(m) and abs(m[end + 1] - m[end - 1]) > 0.05)
    outcome = (7 if 0.2 <= m[-1] <= 0.8 else 4) + min(8, turns)
    return Rubric(10, behavior, mechanism, outcome)


# what is taken out of the model -> the change that does it; 1e-300 stands for a rate of 0, which is not allowed
ABLATIONS = {
    "nothing": {},
    "lambda- = lambda+": {"lambda_minus": 0.10},
    "mu = 0": {"mu": 0.0},
    "lambda- = 0": {"lambda_minus": 1e-300},
    "lambda+ = 0": {"lambda_plus": 1e-300},
    "xi = 0": {"xi": 0.0},
    "delta = 1": {"delta": 1.0},
}


def companion(form: str) -> tuple[np.ndarray, np.ndarray, float, float]:
    """The companion's platform game with `form` "log" or "power".

    Returns:
        the actions (2,) in the equilibrium without and with interdependence (D and gamma), and the rise of the mean
        action and of the value created, as shares. Value is measured with the game's own gamma at both.
    """
    shape = {"log": dict(theta=20.0, gamma=0.65), "power": dict(power=0.75, gamma=0.5)}[form]
    game = Payoff(endowment=100.0, form=form, alpha=(0.55, 0.45), D=((0.0, 0.64), (0.86, 0.0)), **shape)
    alone, _ = equilibrium(replace(game, D=((0.0, 0.0), (0.0, 0.0)), gamma=0.0))
    joined, value = equilibrium(game)
    return alone, joined, joined.mean() / alone.mean() - 1, value / float(game.value(alone)) - 1


class Figure(NamedTuple):
    """A figure, what was published, what comes out here, and whether they are the same to the published digits."""

    name: str
    published: str
    ours: str
    ok: bool


def reproduce() -> list[Figure]:
    """All figures of the page, recomputed; `ok` is false where one differs. About a second on one core."""
    figures = []

    def add(name: str, published: str, value: float, digits: int, scale: str = ""):
        ours = f"{value:.{digits}f}{scale}"
        figures.append(Figure(name, published, ours, ours == published))

    for building, hysteresis in (
        ("product", ("1.1116", "0.7881", "1.1707", "0.129")),
        ("gap", ("0.8341", "0.4951", "1.0317", "0.967")),
    ):
        cells = sweep(building=building)
        ratio, back, worn, held = (cells[name] for name in METRICS)
        for name, published, value, digits in (
            ("cells", "78125", len(ratio), 0),
            ("negativity ratio, median", "3.0", np.median(ratio), 1),
            ("negativity ratio, least", "1.0", ratio.min(), 1),
            ("negativity ratio, largest", "9.0", ratio.max(), 1),
            ("negativity ratio > 1, share", "0.960", (ratio > 1).mean(), 3),
            ("hysteresis, median", hysteresis[0], np.median(back), 4),
            ("hysteresis, least", hysteresis[1], back.min(), 4),
            ("hysteresis, largest", hysteresis[2], back.max(), 4),
            ("hysteresis < 1, share", hysteresis[3], (back < 1).mean(), 3),
            ("cumulative, median", "1.9734", np.median(worn), 4),
            ("cumulative, least", "1.5099", worn.min(), 4),
            ("cumulative, largest", "2.4986", worn.max(), 4),
            ("cumulative > 1, share", "1.000", (worn > 1).mean(), 3),
            ("dependency, mean", "1.2709", held.mean(), 4),
            ("dependency > 1, share", "1.000", (held > 1).mean(), 3),
        ):
            add(f"sweep ({building}): {name}", published, value, digits)

    for variant, f, pairs, corrected, ends in (
        ("published", "35.0447", "379.75", "36.5162", ".8399 .9972 .1675 .3330 .5103"),
        ("committed", "34.3588", "361.32", "36.2202", ".8399 .9972 .1675 .3548 .5337"),
        ("current", "36.2506", "424.61", "34.9782", ".7971 .9918 .2003 .2149 .2738"),
    ):
        name = f"Renault-Nissan ({variant})"
        case = case_study(variant=variant)
        add(f"{name}: F", f, case.f(), 4)
        add(f"{name}: F, two real pairs", pairs, case.f(real_pairs=True), 2)
        add(f"{name}: F, corrected start", corrected, case_study(variant=variant, trust0=CORRECTED_START).f(), 4)
        for phase, (end, published) in enumerate(zip(case.ends, ends.split(), strict=True), 1):
            add(f"{name}: trust of Renault, end of phase {phase}", f"0{published}", case.trust[end, 0, 1], 4)
        ours = "+".join(map(str, score(case)))
        figures.append(Figure(f"{name}: points of 60", "10+15+15+9", ours, ours == "10+15+15+9"))
    for (name, change), total in zip(ABLATIONS.items(), ("49", "43", "44", "25", "37", "51", "49"), strict=True):
        add(f"points of 60 without: {name}", total, score(case_study(building="gap", **change)).total, 0)

    for form, alone, first, second, rise, gain in (
        ("log", "19.0000", "26.6334", "27.3991", "42.19", "14.14"),
        ("power", "0.3164", "0.8329", "0.8767", "170.17", "120.09"),
    ):
        before, after, more, worth = companion(form)
        add(f"companion ({form}): action alone", alone, before[0], 4)
        add(f"companion ({form}): action of the first", first, after[0], 4)
        add(f"companion ({form}): action of the second", second, after[1], 4)
        add(f"companion ({form}): cooperation, %", rise, 100 * more, 2)
        add(f"companion ({form}): value, %", gain, 100 * worth, 2)

    for building, last in (("gap", "0.349362"), ("product", "0.369140")):
        actions = np.repeat([[7.0], [2.0], [7.0]], 2, 1)
        trust, damage = TrustDynamics(TrustParams(building=building), D=0.5).run(actions)
        published = (("0.548201", "0.000000"), ("0.343642", "0.597033"), (last, "0.579122"))
        for step, (t, r) in enumerate(published, 1):
            add(f"one relation ({building}): trust after step {step}", t, trust[step, 0, 1], 6)
            add(f"one relation ({building}): damage after step {step}", r, damage[step, 0, 1], 6)
    return figures
