"""The trust dynamics, the payoffs and the published figures."""

import csv
from dataclasses import replace

import nashpy
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_trust.tasks.coopetition import (
    Payoff,
    TrustDynamics,
    TrustParams,
    case_study,
    equilibrium,
    reproduce,
    score,
    sweep,
)
from trl_trust.tasks.coopetition.command import main
from trl_trust.tasks.coopetition.study import METRICS


unit = st.floats(0, 1)
rates = st.floats(0.01, 1)


def test_one_relation():
    trust, damage = TrustDynamics(TrustParams(), D=0.5).run(np.repeat([[7.0], [2.0], [7.0]], 2, 1))
    np.testing.assert_allclose(trust[1:, 0, 1], [0.548201, 0.343642, 0.349362], atol=5e-7)
    np.testing.assert_allclose(damage[1:, 1, 0], [0, 0.597033, 0.579122], atol=5e-7)
    trust, _ = TrustDynamics(TrustParams(building="product"), D=0.5).run(np.repeat([[7.0], [2.0], [7.0]], 2, 1))
    np.testing.assert_allclose(trust[1:, 0, 1], [0.548201, 0.343642, 0.369140], atol=5e-7)


def scalar_step(t, r, s, D, p):
    """The equations of section 3 for one pair, without arrays."""
    if s > 0:
        room = max(0.0, 1 - r - t) if p.building == "gap" else (1 - t) * (1 - r)
        t_after = t + p.lambda_plus * s * room
    else:
        t_after = t + p.lambda_minus * s * t * (1 + p.xi * D)
    if s < 0:
        change = -p.mu * s * (1 - r)
        if p.decay == "always":
            change = change + -p.delta * r
    else:
        change = -p.delta * r
    return min(max(t_after, 0.0), 1.0), min(max(r + change, 0.0), 1.0)


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_arrays_are_the_scalar_equations_bit_for_bit_and_keep_the_limits(data):
    params = TrustParams(
        lambda_plus=data.draw(rates),
        lambda_minus=data.draw(rates),
        mu=data.draw(unit),
        delta=data.draw(unit),
        xi=data.draw(st.floats(0, 5)),
        building=data.draw(st.sampled_from(["gap", "product"])),
        decay=data.draw(st.sampled_from(["regime", "always"])),
    )
    n, steps = data.draw(st.integers(2, 3)), data.draw(st.integers(1, 6))
    rng = np.random.default_rng(data.draw(st.integers(0, 99)))
    D, start, hurt = rng.random((3, n, n))
    actions = rng.uniform(0, 10, (steps, 4, n))
    trust, damage = TrustDynamics(params, D=D, trust0=start, damage0=hurt).run(actions)
    assert trust.shape == damage.shape == (steps + 1, 4, n, n)
    assert ((trust >= 0) & (trust <= 1) & (damage >= 0) & (damage <= 1)).all()
    signal = np.tanh(params.kappa * (actions - 5.0))
    for step, row, i, j in np.ndindex(steps, 4, n, n):
        before = trust[step, row, i, j], damage[step, row, i, j]
        after = trust[step + 1, row, i, j], damage[step + 1, row, i, j]
        s = signal[step, row, j]
        assert after == (before if i == j else scalar_step(*before, s, D[i, j], params))
        if params.building == "gap" and i != j and after[0] > before[0]:
            assert after[0] <= 1 - before[1] + 1e-15


def test_dependence_amplifies_erosion():
    dynamics = [TrustDynamics(TrustParams(trust0=0.8), D=D) for D in (0.8, 0.2)]
    losses = [0.8 - d.run(np.array([[5.0, 3.0]]))[0][1, 0, 1] for d in dynamics]
    assert losses[0] / losses[1] == pytest.approx(1.4 / 1.1, abs=1e-12)


def test_refusals():
    for change in ({"lambda_plus": 0.0}, {"mu": 1.1}, {"kappa": 0.0}, {"xi": -1.0}, {"building": "both"}):
        with pytest.raises(ValueError, match=next(iter(change))):
            TrustParams(**change)
    with pytest.raises(ValueError, match="D="):
        TrustDynamics(D=1.5)
    with pytest.raises(ValueError, match="trust0="):
        TrustDynamics(trust0=float("nan"))
    with pytest.raises(ValueError, match="finite"):
        TrustDynamics().run(np.array([[np.nan, 1.0]]))
    with pytest.raises(ValueError, match="alpha"):
        Payoff(alpha=(0.5, 0.6))
    with pytest.raises(ValueError, match="renault_nissan"):
        case_study("renault")
    with pytest.raises(ValueError, match="nu"):
        case_study(nu=1)
    with pytest.raises(ValueError, match="grid"):
        sweep("fine")


def test_every_published_figure():
    assert [figure for figure in reproduce() if not figure.ok] == []


def test_the_figures_can_differ():
    changed = case_study(mu=0.61)
    assert f"{changed.f():.4f}" != "35.0447"
    assert score(case_study(mu=0.0)).total < 49
    assert (
        np.median(sweep(building="gap")["hysteresis"]) < 0.9 < 1.1 < np.median(sweep(building="product")["hysteresis"])
    )


def test_the_sweep_has_one_row_per_cell(tmp_path, capsys):
    assert main(["sweep", "--grid", "coarse", "--out", str(tmp_path)]) == 0
    with (tmp_path / "sweep.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 3**7 and set(METRICS) < set(rows[0])
    for row in rows[:: 3**5]:
        ratio = float(row["lambda_minus"]) / float(row["lambda_plus"])
        assert float(row["negativity_ratio"]) == ratio
        xi = float(row["xi"])
        assert float(row["dependency"]) == pytest.approx((1 + 0.8 * xi) / (1 + 0.2 * xi))
    assert (tmp_path / "sweep.png").stat().st_size > 10_000
    assert "2,187 cells" in capsys.readouterr().out


def test_reproduce_fails_where_a_figure_differs(monkeypatch, capsys):
    from trl_trust.tasks.coopetition import study

    assert main(["reproduce"]) == 0
    wrong = replace(study.STUDIES["renault_nissan"]["published"], lengths=(12, 40, 4, 15, 9))
    monkeypatch.setitem(study.STUDIES["renault_nissan"], "published", wrong)
    assert main(["reproduce"]) == 1
    assert "NO" in capsys.readouterr().out


@pytest.mark.parametrize("form", ["log", "power"])
@pytest.mark.parametrize("dependence", [0.0, 0.7])
def test_no_agent_gains_by_leaving_the_equilibrium(form, dependence):
    game = Payoff(form=form, D=((0.0, dependence), (dependence, 0.0)))
    actions, value = equilibrium(game)
    at = game.utility(actions)
    for i in range(2):
        others = np.repeat(actions[None], 101, 0)
        others[:, i] = np.linspace(0, game.endowment, 101)
        assert game.utility(others)[:, i].max() <= at[i] + 1e-9
    assert value == pytest.approx(float(game.value(actions)))


def test_equilibrium_is_nashpys_on_the_grid():
    game = Payoff(theta=4.0)
    levels = np.arange(11.0)
    profiles = np.stack(np.meshgrid(levels, levels, indexing="ij"), -1)  # (11, 11, 2)
    table = game.utility(profiles)
    bimatrix, pick = nashpy.Game(table[..., 0], table[..., 1]), np.eye(11)
    pure = [(i, j) for i in range(11) for j in range(11) if all(bimatrix.is_best_response(pick[i], pick[j]))]
    actions, _ = equilibrium(game)
    assert pure and min(np.abs(np.array(pure) - actions).max(-1)) <= 1.0
