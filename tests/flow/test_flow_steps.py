"""The step rules and the equalizer: worked numbers in float64, invariants, and shapes."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.flow.steps import (
    SDE_TYPES,
    equalizer,
    gaussian_kl,
    gradient_norms,
    log_prob,
    sigma_grid,
    step_stats,
    variance,
)


f64 = lambda x: torch.tensor(x, dtype=torch.float64)
WORKED = {  # s .8 -> .6, eta 1 (cps .5), x 1, v .5: Sigma, mu, N
    "sage": (0.4931472, 0.5609613, 0.3725817),
    "flow": (0.8, 0.35, 0.3354102),
    "dance": (0.2, 0.7625, 0.5031153),
    "cps": (0.18, 0.7066905, 0.5542472),
}


@pytest.mark.parametrize("rule", SDE_TYPES)
def test_worked_step(rule):
    eta = 0.5 if rule == "cps" else 1.0
    mu, sigma = step_stats(f64([[0.5]]), f64([[1.0]]), 0.8, 0.6, eta, rule)
    norm = gradient_norms(f64(0.8), f64(0.6), sigma.squeeze(), rule)
    assert (sigma.item(), mu.item(), norm.item()) == pytest.approx(WORKED[rule], abs=6e-8)


def test_worked_density():
    mu, sigma = step_stats(f64([[0.5]]), f64([[1.0]]), 0.8, 0.6, 1.0, "sage")
    assert log_prob(f64([[0.6]]), mu, sigma).item() == pytest.approx(-0.5670099, abs=6e-8)
    assert gaussian_kl(mu, mu + 0.02, sigma).item() == pytest.approx(4.0556e-4, rel=1e-4)


def test_half_steps():
    halves = lambda rule: sum(variance(f64(a), f64(b), 1.0, rule).item() for a, b in ((0.8, 0.7), (0.7, 0.6)))
    assert halves("sage") == pytest.approx(0.4931472, abs=6e-8)
    assert halves("flow") == pytest.approx(0.6333333, abs=6e-8)  # and one step gives .8: not additive


@given(a=st.floats(0.01, 0.99), u=st.floats(0.0, 1.0), w=st.floats(0.01, 0.99), eta=st.floats(0.01, 2.0))
def test_sage_is_additive_and_below_flow(a, u, w, eta):
    s, s_next = f64(a), f64(a * u * 0.99)
    middle = s_next + w * (s - s_next)
    sage = lambda x, y: variance(x, y, eta, "sage")
    torch.testing.assert_close(sage(s, middle) + sage(middle, s_next), sage(s, s_next), rtol=1e-9, atol=1e-12)
    assert sage(s, s_next) <= variance(s, s_next, eta, "flow")


def test_ratio_to_flow():
    ratio = lambda s, D: (variance(f64(s), f64(s - D), 1.0, "sage") / variance(f64(s), f64(s - D), 1.0, "flow")).item()
    assert [ratio(0.6, D) for D in (0.1, 0.01, 0.001)] == pytest.approx([0.8209570, 0.9795075, 0.9979201], abs=6e-8)
    assert [1 / ratio(s, s) for s in (0.3, 0.1, 0.01)] == pytest.approx([2.2686, 2.0728, 2.0067], abs=6e-5)


def deviations(rule, grid, eta):
    return variance(grid[:-1], grid[1:], eta, rule, grid[1]).sqrt()


def test_worked_grid_of_20():
    grid = sigma_grid(20, 5.0)
    rows = [[deviations(rule, grid, 0.5)[i].item() for rule in ("sage", "flow", "dance")] for i in (0, 1, 9, 19)]
    worked = [[0.5555, 0.5, 0.0510], [0.4256, 0.5186, 0.0532], [0.1896, 0.1995, 0.0807], [0.0795, 0.1171, 0.2282]]
    for row, numbers in zip(rows, worked, strict=True):
        assert row == pytest.approx(numbers, abs=6e-5)
    for rule, ends in {"sage": (0.0188, 2.7716), "flow": (0.0208, 2.0020), "dance": (0.2041, 1.3465)}.items():
        norms = gradient_norms(grid[:-1], grid[1:], deviations(rule, grid, 0.5) ** 2, rule)
        assert (norms.min().item(), norms.max().item()) == pytest.approx(ends, abs=6e-5)
    scale = equalizer(grid, 0.5)
    assert (scale[0].item(), scale[-1].item()) == pytest.approx((8.1506, 0.0551), abs=6e-5)


def test_worked_grid_of_4():
    grid = sigma_grid(4)
    sigma = deviations("sage", grid, 0.7)
    assert gradient_norms(grid[:-1], grid[1:], sigma**2, "sage").tolist() == pytest.approx(
        [0.1748, 0.6142, 1.0438, 2.0436], abs=6e-5
    )
    assert equalizer(grid, 0.7).tolist() == pytest.approx([3.5128, 1, 0.5884, 0.3005], abs=6e-5)
    assert sigma[0].item() == pytest.approx(1.4299, abs=6e-5)  # the trap of the first step
    assert deviations("flow", grid, 0.7)[0].item() == pytest.approx(0.7, abs=1e-12)


@pytest.mark.parametrize(
    ("s", "s_next", "worked"),
    [
        (0.95, 0.9, (0.8125, 0.8118, 0.9597, 1.1109)),
        (0.9, 0.7, (0.5125, 0.5002, 0.9422, 1.8848)),
        (0.5, 0.4, (0.25, 0.2420, 0.2573, 0.2620)),
    ],
)
def test_variance_after_one_step_of_a_gaussian(s, s_next, worked):
    """Data N(1.5, .25) and its exact velocity: the variance one step later, target / ODE / sage / flow."""
    before = (1 - s) ** 2 * 0.25 + s**2
    slope = (s - (1 - s) * 0.25) / before  # v = E[z - x0 | x] is affine in x with this slope

    def after(rule, eta):
        x = f64([[0.0], [1.0]])
        mu, sigma = step_stats(slope * x, x, s, s_next, eta, rule)
        return ((mu[1] - mu[0]) ** 2 * before).item() + sigma.item()

    target = (1 - s_next) ** 2 * 0.25 + s_next**2
    assert (target, after("flow", 0.0), after("sage", 1.0), after("flow", 1.0)) == pytest.approx(worked, abs=6e-5)


# -- invariants ------------------------------------------------------------------------------------------------------


@given(
    rule=st.sampled_from(SDE_TYPES),
    shape=st.lists(st.integers(1, 3), min_size=1, max_size=4),
    s=st.floats(0.05, 1.0),
    u=st.floats(0.0, 0.95),
    eta=st.floats(0.0, 1.0),
)
def test_shapes_and_finiteness(rule, shape, s, u, eta):
    x, v = torch.randn(2, *shape, dtype=torch.float64), torch.randn(2, *shape, dtype=torch.float64)
    mu, sigma = step_stats(v, x, f64([s, s]), f64([s * u, s * u]), eta, rule)
    assert mu.shape == x.shape and sigma.shape == (2, *[1] * len(shape))
    assert mu.isfinite().all() and sigma.isfinite().all()
    if eta == 0:
        torch.testing.assert_close(mu, x - (s - s * u) * v, rtol=1e-9, atol=1e-9)


def test_score_in_terms_of_the_data():
    x, v, s = torch.randn(5, 3, dtype=torch.float64), torch.randn(5, 3, dtype=torch.float64), 0.7
    mu, sigma = step_stats(v, x, s, 0.5, 1.0, "dance")
    score = (mu - (x - 0.2 * v)) * 2 / sigma
    torch.testing.assert_close(score, -(x - (1 - s) * (x - s * v)) / s**2)


@pytest.mark.parametrize("rule", SDE_TYPES)
def test_the_last_step_of_the_ode_limit(rule):
    x, v = torch.randn(2, 4, dtype=torch.float64), torch.randn(2, 4, dtype=torch.float64)
    mu, _ = step_stats(v, x, 0.3, 0.0, 1e-9, rule)
    torch.testing.assert_close(mu, x - 0.3 * v)


@pytest.mark.parametrize("rule", SDE_TYPES)
@pytest.mark.parametrize("step", [0, 3, 6])
def test_the_equalizer_predicts_the_gradient(rule, step):
    """Root mean square of |dlogp / dv| times sqrt(numel) is N, within sampling error."""
    grid, g = sigma_grid(8, 2.0), torch.Generator().manual_seed(step)
    x, v = (torch.randn(4000, 6, generator=g, dtype=torch.float64) for _ in range(2))
    v.requires_grad_()
    s, s_next = grid[step].item(), grid[step + 1].item()
    mu, sigma = step_stats(v, x, s, s_next, 0.6, rule, grid[1].item())
    x_next = mu.detach() + sigma.sqrt() * torch.randn(mu.shape, generator=g, dtype=torch.float64)
    (grad,) = torch.autograd.grad(log_prob(x_next, mu, sigma).sum(), v)
    seen = grad.square().sum(1).mean().sqrt() * math.sqrt(6)
    norm = gradient_norms(f64(s), f64(s_next), sigma.flatten()[0], rule)
    assert seen.item() == pytest.approx(norm.item(), rel=0.03)


def test_the_equalizer_passes_over_steps_without_noise():
    grid = sigma_grid(5)
    scale = equalizer(grid, 0.5, "cps")
    assert scale[-1] == 1 and (scale[:-1] != 1).any()  # w = s' sin(.) is 0 at s' = 0
    assert equalizer(grid, 0.0).tolist() == [1.0] * 5
    held = equalizer(grid, 0.5, deterministic=(0, 1))
    assert held[:3].tolist() == pytest.approx([1, 1, gradient_ratio(grid, 3, 2)]) and held[3] == 1


def gradient_ratio(grid, i, j):
    norms = gradient_norms(grid[:-1], grid[1:], variance(grid[:-1], grid[1:], 0.5, "sage", grid[1]), "sage")
    return (norms[i] / norms[j]).item()


def test_published_cps_density_is_not_the_gaussian_one():
    mu, sigma = step_stats(f64([[0.5]]), f64([[1.0]]), 0.8, 0.6, 0.5, "cps")
    assert log_prob(f64([[0.6]]), mu, sigma, density="published").item() == pytest.approx(-((0.6 - mu.item()) ** 2))


def test_unknown_rule():
    with pytest.raises(ValueError, match="sde_type='euler' must be one of sage, flow, dance, cps"):
        variance(f64(0.5), f64(0.4), 1.0, "euler")
