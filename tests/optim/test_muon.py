import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_trust.optim import FISMO, AuON, HybridAuON, Muon, muon
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


# ------------------------------------------------------------------------------------------------------ the Gram form


def textbook(x, steps, coefficients=muon.NS_COEFFICIENTS):
    a, b, c = coefficients
    for _ in range(steps):
        gram = x @ x.mT
        x = a * x + (b * gram + c * gram @ gram) @ x
    return x


def unit(x):
    return x / torch.linalg.matrix_norm(x, keepdim=True)


def spectrum(values, columns):
    """A matrix (len(values), columns) of these singular values, float64."""
    left = torch.linalg.qr(gaussian(len(values), len(values), dtype=torch.float64))[0]
    right = torch.linalg.qr(gaussian(columns, len(values), seed=1, dtype=torch.float64))[0]
    return (left * values) @ right.T


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 9), st.integers(1, 30), st.integers(0, 9), st.integers(1, 3), st.sampled_from([1, 2, 4]))
def test_all_forms_are_one_polynomial(m, n, steps, batch, stripes):
    x = unit(gaussian(batch, m, n, dtype=torch.float64))
    expected = textbook(x, steps)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(muon, "STRIPES_FROM", 1)
        patch.setattr(muon, "STRIPES", stripes)
        for form in ("plain", "gram", "auto"):
            found = newton_schulz(x, steps, form=form)
            torch.testing.assert_close(found, expected, rtol=1e-10, atol=1e-11)
            torch.testing.assert_close(newton_schulz(x.mT, steps, form=form).mT, found, rtol=1e-10, atol=1e-11)


def test_plain_is_the_textbooks_to_the_bit():
    x, (a, b, c) = unit(gaussian(20, 90)), muon.NS_COEFFICIENTS
    y = x
    for _ in range(5):
        gram = y @ y.T
        y = torch.addmm(y, torch.addmm(gram, gram, gram, beta=b, alpha=c), y, beta=a)
    assert torch.equal(newton_schulz(x, form="plain"), y)
    assert not torch.equal(newton_schulz(x), y)  # .. and the shape is one for the Gram form


@pytest.mark.parametrize(
    "values", [1 / torch.arange(1.0, 129), 10 ** -torch.linspace(0, 4, 128), torch.ones(128)], ids=["1/i", "1e-4", "1"]
)
def test_restarts_keep_bfloat16_where_the_plain_form_is(values):
    x = unit(spectrum(values.double(), 384))
    exact = newton_schulz(x, form="plain")

    def error(**options):
        found = newton_schulz(x.bfloat16(), **options).double()
        return ((found - exact).norm() / exact.norm()).item(), torch.linalg.matrix_norm(found, 2).item()

    plain, restarted, one_piece = (error(form=f, schedule=s) for f, s in (("plain", ()), ("gram", ()), ("gram", (5,))))
    # .04: the diagonals of the small products are rounded to bf16 too; equal singular values then move all at once.
    assert restarted[0] < plain[0] + 0.04 and restarted[1] < plain[1] + 0.05
    if values.min() < 0.1:
        assert one_piece[0] > plain[0] + 0.5  # what the restarts are for


def test_auto_is_gram_for_wide_and_tall_matrices_and_gentle_polynomials():
    for shape in ((16, 32), (32, 16), (4, 400)):
        x = unit(gaussian(*shape))
        assert torch.equal(newton_schulz(x), newton_schulz(x, form="gram"))
        steep = (8.0, -20.0, 13.0)
        assert torch.equal(newton_schulz(x, 1, steep), newton_schulz(x, 1, steep, form="plain"))
        assert torch.equal(newton_schulz(x, 3, steep), newton_schulz(x, 3, steep, form="plain"))
    x = unit(gaussian(16, 31))
    assert torch.equal(newton_schulz(x), newton_schulz(x, form="plain"))


@pytest.mark.parametrize("optimizer", [Muon, HybridAuON, AuON, FISMO])
def test_every_optimizer_that_orthogonalises_takes_the_form(optimizer):
    ends = {}
    for form in ("plain", "gram", "auto"):
        options = {"ns_steps": 5, "ns_dtype": "float32", "ns_form": form}
        params, _ = steps_of(optimizer, [(4, 12)], dtype=torch.float64, lr=0.1, **options)
        ends[form] = params[0].detach()
    torch.testing.assert_close(ends["gram"], ends["plain"], rtol=0, atol=1e-10)
    assert torch.equal(ends["gram"], ends["auto"]) and not torch.equal(ends["gram"], ends["plain"])
