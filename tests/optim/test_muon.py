import pytest
import torch

from trl_trust.optim import Muon
from trl_trust.optim.muon import muon_direction, newton_schulz


def gaussian(*shape, seed=0, dtype=torch.float32):
    return torch.randn(*shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def steps_of(optimizer_class, shapes, number=4, dtype=torch.float32, **options):
    params = [torch.nn.Parameter(gaussian(*shape, seed=i, dtype=dtype)) for i, shape in enumerate(shapes)]
    optimizer = optimizer_class(params, **options)
    for step in range(number):
        for i, p in enumerate(params):
            p.grad = gaussian(*p.shape, seed=100 * step + i, dtype=dtype)
        optimizer.step()
    return params, optimizer


@pytest.mark.parametrize("nesterov", [True, False])
@pytest.mark.parametrize("shape_scale", ["original", "match_rms_adamw"])
def test_agrees_with_torch(nesterov, shape_scale):
    shapes = [(24, 16), (16, 24), (24, 16), (8, 8)]
    options = {"lr": 0.02, "weight_decay": 0.1, "momentum": 0.9, "nesterov": nesterov}
    ours, optimizer = steps_of(Muon, shapes, shape_scale=shape_scale, **options)
    theirs, reference = steps_of(torch.optim.Muon, shapes, adjust_lr_fn=shape_scale, **options)
    for p, q in zip(ours, theirs, strict=True):
        assert torch.equal(optimizer.state[p]["momentum_buffer"], reference.state[q]["momentum_buffer"])  # bit for bit
        torch.testing.assert_close(p, q, rtol=0, atol=6e-3)  # bfloat16 orthogonalisation, four steps of .02 to .04


def test_float32_iteration_agrees_with_the_polar_factor():
    x = gaussian(12, 20, dtype=torch.float64)
    u, _, vh = torch.linalg.svd(x, full_matrices=False)
    # The cubic iteration converges, unlike Muon's quintic.
    polar = newton_schulz(x / x.norm(), steps=40, coefficients=(1.5, -0.5, 0.0))
    torch.testing.assert_close(polar, u @ vh, rtol=0, atol=1e-12)


@pytest.mark.parametrize("shape", [(64, 64), (96, 32), (32, 96)])
def test_five_steps_bring_singular_values_near_one(shape):
    for dtype in (torch.float32, torch.bfloat16):
        s = torch.linalg.svdvals(muon_direction(gaussian(*shape), dtype=dtype))
        assert s[: len(s) * 9 // 10].min() > 0.6  # a few of the smallest of a square Gaussian are still on their way
        assert s.max() < 1.25


def test_batches_are_matrix_by_matrix():
    batch = gaussian(3, 2, 6, 5, dtype=torch.float64)  # (k, experts, m, n)
    result = muon_direction(batch)
    for i in range(3):
        for j in range(2):
            torch.testing.assert_close(result[i, j], muon_direction(batch[i, j]))


def test_transposition_commutes():
    x = gaussian(7, 4, dtype=torch.float64)
    torch.testing.assert_close(muon_direction(x.T), muon_direction(x).T)


def test_zero_and_tiny_gradients():
    assert torch.equal(muon_direction(torch.zeros(4, 4)), torch.zeros(4, 4))
    x = gaussian(8, 8, dtype=torch.float64)
    torch.testing.assert_close(muon_direction(1e-3 * x), muon_direction(x))


def test_result_has_the_dtype_of_the_input():
    assert muon_direction(gaussian(4, 4), dtype=torch.bfloat16).dtype == torch.float32
    assert newton_schulz(gaussian(4, 4), steps=0).dtype == torch.float32


@pytest.mark.parametrize("dtype", [None, torch.bfloat16])
def test_direction_compiles_in_one_graph(dtype):
    compiled = torch.compile(muon_direction, backend="aot_eager", fullgraph=True)
    x = gaussian(3, 9, 6)
    torch.testing.assert_close(compiled(x, dtype=dtype), muon_direction(x, dtype=dtype))
