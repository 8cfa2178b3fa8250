"""The projections against worked numbers and the properties that the paper claims for them."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_trust.unlearn.projection import (
    adam_metric,
    best_invariant_step,
    cone_project,
    joint_gradient,
    null_project,
    sign_project,
    tangent_step,
)


def vec(*numbers):
    return torch.tensor(numbers, dtype=torch.float64)


P, G_F, G_R = vec(1, 4), vec(1, 1), vec(1, 0.5)
close = lambda a, b, tol=1e-12: torch.testing.assert_close(a, b, rtol=tol, atol=tol)


def test_worked_numbers():
    out = null_project(G_F, G_R[:, None], P)
    close(out.grad, vec(-0.5, 0.25))
    close(P * out.grad, vec(-0.5, 1))
    assert abs(G_R @ (P * out.grad)) < 1e-12
    close(out.step_norm**2, torch.tensor(0.5, dtype=torch.float64))
    step = best_invariant_step(G_F, G_R[:, None], P, 1.0)
    close(step, vec(0.5, -1) / 0.5**0.5)
    close(step, vec(0.707107, -1.414214), 1e-6)
    assert (G_F @ step).item() == pytest.approx(-0.5 / 0.5**0.5)
    joint = joint_gradient(out.grad, G_R, gamma=0.125)
    close(joint, vec(0.9375, 0.53125))
    assert (G_R @ (P * joint)).item() == pytest.approx(2.0)


def test_worked_cone():
    step, lam = cone_project(vec(1, 4), G_R[:, None], 1 / P)
    close(step, vec(-0.5, 1))
    close(lam, vec(1.5))
    columns, ones = torch.stack([vec(1, 0), vec(1, 1)], 1), vec(1, 1)
    step, lam = cone_project(vec(2, -1), columns, ones)
    close(lam, vec(2, 0))
    close(step, vec(0, -1))
    step, lam = cone_project(vec(2, 1), columns, ones)
    close(lam, vec(1, 1))
    close(step, vec(0, 0))


def test_worked_sign():
    basis = torch.eye(3, dtype=torch.float64)[:, :2]
    out = sign_project(vec(3, -2, 1), vec(1, 1, 0), basis, torch.ones(3, dtype=torch.float64))
    # a = (3, -2), b = (1, 1): the first is kept, scaled by .5 * 1 / 3
    close(out.grad, vec(0.5, 0, 1))
    joint = joint_gradient(out.grad, vec(1, 1, 0))
    close(joint, vec(1.5, 1, 1))
    assert (vec(1, 1, 0) @ joint).item() == pytest.approx(2.5)


def test_adam_metric():
    close(adam_metric(vec(0.04, 0.01), 0.1, 0.25), 1 / (vec(0.4, 0.2) + 0.1))


def draw(seed, d, m, dtype):
    g = torch.Generator().manual_seed(seed)
    make = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64).to(dtype)
    return make(d), make(d, m), (make(d).abs() + 0.01) * 10 ** (2 * make(d))


shapes = given(seed=st.integers(0, 10**6), d=st.integers(12, 60), m=st.integers(0, 9))


@shapes
@settings(max_examples=40, deadline=None)
@pytest.mark.parametrize("dtype,tol", [(torch.float32, 1e-6), (torch.float64, 1e-12)])
def test_orthogonal_in_the_metric(dtype, tol, seed, d, m):
    g_f, G, P = draw(seed, d, m, dtype)
    out = null_project(g_f, G, P)
    z, S = P.double().sqrt() * out.grad.double(), P.double().sqrt()
    for column in G.T:
        w = S * column.double()
        # relative to what was projected: where nearly all of g_f is in the span, rounding is all that is left
        assert abs(z @ w) <= 4 * tol * w.norm() * max(z.norm(), 1e-3 * (S * g_f.double()).norm())
    assert 0 <= out.kept <= 1 + 1e-6
    close(out.kept**2 + out.coverage**2, torch.ones_like(out.kept), 1e-5 if dtype == torch.float32 else 1e-10)


@shapes
@settings(max_examples=40, deadline=None)
def test_raw_form_idempotent_and_update_form(seed, d, m):
    g_f, G, P = draw(seed, d, m, torch.float64)
    P = P.clamp(0.1, 10)
    out = null_project(g_f, G, P).grad
    raw = g_f - G @ torch.linalg.pinv(G.T @ (P[:, None] * G)) @ (G.T @ (P * g_f)) if m else g_f
    close(out, raw, 1e-9)
    close(null_project(out, G, P).grad, out, 1e-9)
    close(tangent_step(P * g_f, G, 1 / P), P * out, 1e-9)


def test_beats_every_other_feasible_move():
    g_f, G, P = draw(3, 8, 3, torch.float64)
    P = P.clamp(0.1, 10)
    best = best_invariant_step(g_f, G, P, 0.7)
    assert (best**2 / P).sum().sqrt().item() == pytest.approx(0.7)
    moves = torch.randn(8, 20_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    moves -= (P[:, None] * G) @ torch.linalg.solve(G.T @ (P[:, None] * G), G.T @ moves)
    moves *= 0.7 / (moves**2 / P[:, None]).sum(0).sqrt()
    assert (G.T @ moves).abs().max() < 1e-9
    assert g_f @ best <= (g_f @ moves).min()
    assert g_f @ best > 1.2 * (g_f @ moves).min()  # and the random ones come near, so the test means something


def test_edges():
    g_f, G, P = draw(5, 10, 3, torch.float64)
    assert torch.equal(null_project(G @ vec(1, -2, 3), G, P).grad, torch.zeros(10, dtype=torch.float64))
    free = null_project(g_f, G, P).grad
    close(null_project(free, G, P).grad, free, 1e-9)
    close(null_project(g_f, G[:, :0], P).grad, g_f)
    with_zero = torch.cat([G, torch.zeros(10, 1, dtype=torch.float64), G[:, :1]], 1)
    close(null_project(g_f, with_zero, P).grad, free, 1e-9)


@given(seed=st.integers(0, 10**6), m=st.integers(1, 6), twice=st.booleans())
@settings(max_examples=40, deadline=None)
def test_cone_satisfies_its_optimality_conditions(seed, m, twice):
    step, G, M = draw(seed, 12, m, torch.float64)
    M = M.clamp(0.1, 10)
    if twice:
        G = torch.cat([G, 3 * G[:, :1]], 1)
    out, lam = cone_project(step, G, M)
    slope = G.T @ out
    assert slope.max() <= 1e-9 and lam.min() >= 0
    assert (lam * slope).abs().max() <= 1e-8
    close(M * (step - out), G @ lam, 1e-8)
    again, lam_again = cone_project(
        out - 1e-6 * (G / M[:, None]) @ torch.linalg.pinv(G.T @ (G / M[:, None])).sum(1), G, M
    )
    assert lam_again.abs().max() < 1e-6 and (again - out).abs().max() < 1e-3


def test_a_safe_step_is_returned_to_the_bit():
    _, G, M = draw(7, 12, 4, torch.float32)
    safe = -torch.linalg.pinv(G.double().T).sum(1).float()
    out, lam = cone_project(safe, G, M)
    assert out is safe and not lam.any()


def test_sgd_on_a_quadratic_retain_loss():
    # retain loss g_r'x + x'x / 2 at 0: the projected step changes it by |step|^2 / 2, four times less at half the rate
    changes = []
    for lr in (0.1, 0.05, 0.025):
        step = -lr * null_project(vec(1, 1) * 0.5**0.5, vec(1, -1)[:, None], vec(1, 1)).grad
        changes.append((vec(1, -1) @ step + step @ step / 2).item())
    assert changes[0] == pytest.approx(4 * changes[1]) and changes[1] == pytest.approx(4 * changes[2])


def test_a_realized_adamw_step_is_corrected_in_its_own_metric():
    # AdamW, lr .01: stage `grad` hands it (-.2, .4) at the first step, which becomes -lr * sign
    parameter = torch.nn.Parameter(torch.zeros(2, dtype=torch.float64))
    optimizer = torch.optim.AdamW([parameter], lr=0.01, weight_decay=0.0)
    cosines = []
    for step in range(4):
        metric = torch.ones(2, dtype=torch.float64)
        if step:
            metric = adam_metric(optimizer.state[parameter]["exp_avg_sq"], 1e-8, 1 - 0.999**step)
        parameter.grad = null_project(G_F, G_R[:, None], metric).grad
        before = parameter.detach().clone()
        optimizer.step()
        moved = parameter.detach() - before
        cosines.append((moved @ G_R / moved.norm() / G_R.norm()).item())
        if step == 0:
            weight = 1 / adam_metric(optimizer.state[parameter]["exp_avg_sq"], 1e-8, 1 - 0.999)
            close(tangent_step(moved, G_R[:, None], weight), vec(0.005556, -0.011111), 1e-4)
    assert cosines == pytest.approx([0.316228, 0.289743, 0.270837, 0.255763], abs=2e-3)
