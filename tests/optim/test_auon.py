import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.optim import AuON, HybridAuON
from trl_trust.optim.auon import auon_direction, auon_reference
from trl_trust.optim.muon import newton_schulz


G = torch.tensor([[1.0, 2.0], [3.0, 4.0]], dtype=torch.float64)
G2 = torch.tensor([[0.0, 1.0], [-1.0, 0.0]], dtype=torch.float64)
TALL = torch.tensor([[1.0, 0.0], [0.0, 2.0], [2.0, 1.0]], dtype=torch.float64)

HYBRID_PAPER = {"ns_steps": 1}
HYBRID_REPO = {"variant": "repo", "ns_steps": 5}


def gaussian(m, n, seed=0, dtype=torch.float64):
    return torch.randn(m, n, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def parameter(value):
    return torch.nn.Parameter(torch.as_tensor(value).clone())


def brake(update, **options):
    """r, read off the direction: in every form the direction is known up to it."""
    direction = auon_direction(update, **options)
    if options.get("ns_steps"):
        core = newton_schulz(update / update.norm(), options["ns_steps"])
    else:
        core = update if options.get("variant") == "repo" else update / update.norm()
    return (core.norm() / direction.norm()).item()


def run(optimizer_class, grads, start, **options):
    w = parameter(start)
    optimizer = optimizer_class([w], **options)
    for grad in grads:
        w.grad = grad.clone()
        optimizer.step()
    return w.detach(), optimizer


# --------------------------------------------------------------------------------------------------- worked numbers


@pytest.mark.parametrize(
    ("options", "r", "expected"),
    [
        ({}, 1.1335178165, (0.1610686469, 0.3221372937, 0.4832059406, 0.6442745874)),
        ({"variant": "repo"}, 1.3241119461, (0.7552231482, 1.5104462964, 2.2656694445, 3.0208925927)),
        (HYBRID_PAPER, 1.0702610523, (-0.0067602253, 0.3296864616, 0.4165281214, 0.4409685245)),
        (
            {**HYBRID_PAPER, "rms_form": "square"},
            1.1454587201,
            (-0.0063164265, 0.3080430340, 0.3891836676, 0.4120195945),
        ),
        (HYBRID_REPO, 1.3079507175, (-0.5204026235, 0.6311702673, 0.5667609659, 0.1983561165)),
    ],
)
def test_directions_of_the_specification(options, r, expected):
    assert auon_direction(G, **options).flatten().tolist() == pytest.approx(list(expected), abs=1e-9)
    assert brake(G, **options) == pytest.approx(r, abs=2e-7)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.2903071003, 0, 0, 0.5806142006, 0.5806142006, 0.2903071003)),
        ({"shape_scale": "original"}, (0.3555521322, 0, 0, 0.7111042644, 0.7111042644, 0.3555521322)),
        ({"variant": "repo"}, (0.8213516191, 0, 0, 1.6427032383, 1.6427032383, 0.8213516191)),
        (HYBRID_REPO, (0.3331538317, 0.0094715893, 0.0189431786, 0.6663076634, 0.6757792526, 0.3520970103)),
    ],
)
def test_tall_matrix_of_the_specification(options, expected):
    moved, _ = run(AuON, [TALL], torch.zeros_like(TALL), lr=1.0, momentum=0.0, **options)
    assert (-moved).flatten().tolist() == pytest.approx(list(expected), abs=1e-9)


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        ({}, (0.9838931353, -0.0322137294, -0.0483205941, 0.9355725413)),
        ({"variant": "repo", "weight_decay": 0.1}, (0.9144776852, -0.1510446296, -0.2265669445, 0.6879107407)),
    ],
)
def test_steps_from_the_identity(options, expected):
    moved, _ = run(AuON, [G], torch.eye(2, dtype=torch.float64), lr=0.1, momentum=0.0, **options)
    assert moved.flatten().tolist() == pytest.approx(list(expected), abs=1e-9)


def test_momentum_with_look_ahead():
    first, _ = run(AuON, [G], torch.zeros_like(G), lr=1.0)
    both, _ = run(AuON, [G, G2], torch.zeros_like(G), lr=1.0)
    second = [0.1487696188, 0.6189805192, 0.1248675748, 0.5950784751]
    assert (first - both).flatten().tolist() == pytest.approx(second, abs=1e-9)
    look_ahead = [
        torch.tensor([[0.0975, 0.195], [0.2925, 0.39]]),
        torch.tensor([[0.045125, 0.18775], [0.037875, 0.1805]]),
    ]
    for update, r in zip(look_ahead, (1.1335177685, 1.1359381943), strict=True):
        # The printed r's include eps in the norm, which the helper leaves out: 1e-7 of .59 and .27.
        assert brake(update.double()) == pytest.approx(r, abs=1e-6)
    assert brake(look_ahead[1].double(), variant="repo") == pytest.approx(1.3355856006, abs=1e-6)


def test_brake_of_large_matrices_is_one_in_bfloat16():
    for seed in range(3):
        r = brake(gaussian(512, 512, seed), variant="repo")
        assert 4.29e-6 <= r - 1 <= 8.65e-6
        assert torch.tensor(r).bfloat16() == 1


@pytest.mark.parametrize(("gamma", "r"), [(0.25, 1.03), (0.5, 1.15), (1.0, 2.06)])
def test_brake_on_root_mean_square(gamma, r):
    values = [brake(gaussian(256, 256, seed), gamma=gamma, brake_scale="rms") for seed in range(3)]
    assert values == pytest.approx([r] * 3, rel=0.06)


def test_heavy_tails_stay_finite():
    spike = torch.zeros(256, 256)
    spike[0, 0] = 1.0
    assert brake(spike, brake_scale="rms") > 10  # clamped at 10, cosh(10)^2 / 65536 is 1.8e3
    assert auon_direction(spike, brake_scale="rms").isfinite().all()


# ------------------------------------------------------------------------------------------------------- invariants


@given(st.integers(1, 9), st.integers(1, 9), st.floats(0.1, 3.0), st.integers(0, 10_000))
def test_brake_lies_between_flat_and_one_hot(m, n, gamma, seed):
    size = m * n
    lower = math.sqrt(1 + math.sinh(gamma / math.sqrt(size)) ** 2)
    upper = math.sqrt(1 + math.sinh(gamma) ** 2 / size)
    update = gaussian(m, n, seed)
    update = update / update.norm()  # of norm 1, so that eps is 1e-7 of it
    assert lower * (1 - 1e-6) <= brake(update, gamma=gamma) <= upper * (1 + 1e-6)
    one_hot = torch.zeros(m, n, dtype=torch.float64)
    one_hot[0, 0] = -1
    assert brake(torch.ones(m, n, dtype=torch.float64), gamma=gamma) == pytest.approx(lower, rel=1e-6)
    assert brake(one_hot, gamma=gamma) == pytest.approx(upper, rel=1e-6)


@given(st.integers(1, 9), st.integers(1, 9), st.integers(0, 10_000))
def test_paper_form_is_a_positive_multiple_of_norm_at_most_one(m, n, seed):
    update = gaussian(m, n, seed)
    direction = auon_direction(update)
    assert direction.norm() <= 1 + 1e-12
    torch.testing.assert_close(direction / direction.norm(), update / update.norm())
    eps_share = 1e-7 / update.norm().item()  # what eps takes off the result of the smaller one
    torch.testing.assert_close(auon_direction(1e3 * update), direction, rtol=2 * eps_share + 1e-12, atol=0)


def test_repo_form_is_homogeneous():
    update = gaussian(6, 4)
    torch.testing.assert_close(auon_direction(7 * update, variant="repo"), 7 * auon_direction(update, variant="repo"))


def test_repo_form_tends_to_plain_momentum_sgd():
    generator = torch.Generator().manual_seed(0)
    grads = [torch.randn(64, 48, dtype=torch.float64, generator=generator) for _ in range(20)]
    start = torch.randn(64, 48, dtype=torch.float64, generator=generator)
    moved, _ = run(AuON, grads, start, lr=0.1, weight_decay=0.1, variant="repo")
    w, buffer = start.clone(), torch.zeros_like(start)
    for grad in grads:
        buffer = 0.95 * buffer + 0.05 * grad
        w = w * (1 - 0.1 * 0.1) - 0.1 * (0.05 * grad + 0.95 * buffer)
    assert (moved - w).norm() / (w - start).norm() < 1e-3
    assert not torch.equal(moved, w)


def test_paper_form_without_momentum_is_normalised_sgd():
    grad = gaussian(256, 256)
    moved, _ = run(AuON, [grad], torch.zeros_like(grad), lr=1.0, momentum=0.0)
    torch.testing.assert_close(-moved, grad / grad.norm(), rtol=1e-4, atol=0)
    assert (-moved).square().mean().sqrt().item() == pytest.approx(1 / 256, rel=1e-4)


@pytest.mark.parametrize("steps", [1, 3, 5])
def test_hybrid_with_an_idle_brake_is_muon(steps):
    update = gaussian(40, 60)
    hybrid = auon_direction(update, ns_steps=steps, gamma=1e-8)
    torch.testing.assert_close(hybrid, newton_schulz(update / (update.norm() + 1e-7), steps))


def test_match_rms_adamw_gives_each_form_the_same_size():
    grad = gaussian(96, 32, dtype=torch.float32)
    for options in ({}, {"ns_steps": 30, "ns_coefficients": (1.5, -0.5, 0.0)}):
        moved, _ = run(AuON, [grad], torch.zeros_like(grad), lr=1.0, shape_scale="match_rms_adamw", **options)
        assert moved.square().mean().sqrt().item() == pytest.approx(0.2, rel=0.02)


# ---------------------------------------------------------------------------------------- fast path against reference


@given(
    m=st.integers(1, 8),
    n=st.integers(1, 8),
    copies=st.integers(1, 3),
    seed=st.integers(0, 1000),
    variant=st.sampled_from(["paper", "repo"]),
    ns_steps=st.sampled_from([0, 1, 5]),
    rms_form=st.sampled_from(["sqrt", "square"]),
    nesterov=st.booleans(),
    momentum=st.sampled_from([0.0, 0.9]),
    weight_decay=st.sampled_from([0.0, 0.1]),
    shape_scale=st.sampled_from([None, "original", "match_rms_adamw"]),
    transposed=st.booleans(),
)
def test_step_equals_the_reference(m, n, copies, seed, variant, ns_steps, shape_scale, transposed, **options):
    if shape_scale == "match_rms_adamw" and variant == "repo" and not ns_steps:
        shape_scale = None
    options |= {"variant": variant, "ns_steps": ns_steps, "shape_scale": shape_scale}
    generator = torch.Generator().manual_seed(seed)
    draw = lambda: torch.randn(m, n, dtype=torch.float64, generator=generator)
    weights = [draw() for _ in range(copies)]
    params = [parameter(w.T if transposed else w) for w in weights]
    optimizer = AuON([{"params": params, "transposed": transposed}], lr=0.1, **options)
    buffers = [torch.zeros_like(w) for w in weights]
    for _ in range(3):
        for i, p in enumerate(params):
            grad = draw()
            p.grad = grad.T.clone() if transposed else grad.clone()
            weights[i], buffers[i] = auon_reference(weights[i], grad, buffers[i], lr=0.1, **options)
        optimizer.step()
    for p, w in zip(params, weights, strict=True):
        torch.testing.assert_close(p.detach().T if transposed else p.detach(), w, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_low_precision_stays_near_the_reference(dtype):
    start, grad = gaussian(24, 16, 1), gaussian(24, 16, 2)
    moved, optimizer = run(AuON, [grad.to(dtype)] * 3, start.to(dtype), lr=0.5)
    w, buffer = start.to(dtype).double(), torch.zeros_like(start)
    for _ in range(3):
        w, buffer = auon_reference(w, grad.to(dtype).double(), buffer, lr=0.5)
    eps = torch.finfo(dtype).eps  # three roundings, also of an entry that was larger before it came near zero
    torch.testing.assert_close(moved.double(), w, rtol=3 * eps, atol=0.05 * eps)
    assert all(s["momentum_buffer"].dtype == torch.float32 for s in optimizer.state.values())


@pytest.mark.parametrize("options", [{}, {"variant": "repo"}, HYBRID_PAPER, HYBRID_REPO, {"brake_scale": "rms"}])
def test_direction_compiles_in_one_graph(options):
    compiled = torch.compile(auon_direction, backend="aot_eager", fullgraph=True)
    batch = torch.stack([gaussian(6, 9, seed) for seed in range(3)])
    torch.testing.assert_close(compiled(batch, **options), auon_direction(batch, **options))


@pytest.mark.parametrize("options", [{}, {"variant": "repo"}, HYBRID_PAPER, HYBRID_REPO, {"brake_scale": "rms"}])
def test_batch_equals_matrix_by_matrix_and_zero_stays_zero(options):
    batch = torch.stack(
        [torch.stack([gaussian(5, 7, 10 * i + j) for j in range(2)]) for i in range(3)]
    )  # (3, 2, 5, 7)
    batch[1, 1] = 0
    before = batch.clone()
    result = auon_direction(batch, **options)
    assert torch.equal(batch, before)
    assert torch.equal(result[1, 1], torch.zeros(5, 7, dtype=torch.float64))
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(result[i, j], auon_direction(batch[i, j], **options))


# --------------------------------------------------------------------------------------------------------- settings


def test_hybrid_defaults_follow_the_variant():
    w = parameter(torch.ones(3, 3))
    assert HybridAuON([w], lr=0.1).param_groups[0]["ns_steps"] == 1
    assert HybridAuON([w], lr=0.1, variant="repo").param_groups[0]["ns_steps"] == 5
    assert HybridAuON([w], lr=0.1, variant="repo", ns_steps=3).param_groups[0]["ns_steps"] == 3


def test_matching_adamw_needs_a_known_norm():
    with pytest.raises(ValueError, match="use variant='paper'"):
        AuON([parameter(torch.ones(3, 3))], lr=0.1, shape_scale="match_rms_adamw", variant="repo")
