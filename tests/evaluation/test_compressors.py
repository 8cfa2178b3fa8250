"""What is done to a weight: worked numbers, bounds, and torchao as the oracle of round-to-nearest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.evaluation.compressors import (
    Inputs,
    Method,
    awq,
    gptq,
    magnitude,
    output_error,
    quantization_grid,
    rtn,
    snap,
    sparsegpt,
    wanda,
)


GROUP = torch.tensor([[-1, 0.2, 0.8, 2]], dtype=torch.float64)


@pytest.mark.parametrize(
    "bits, step, values",
    [
        (2, 1.0, [-1, 0, 1, 2]),
        (3, 0.428571, [-0.857143, 0, 0.857143, 2.142857]),
        (4, 0.2, [-1, 0.2, 0.8, 2]),
        (8, 0.011765, [-1, 0.2, 0.8, 2]),
    ],
)
def test_rtn_worked_numbers(bits, step, values):
    assert quantization_grid(GROUP, bits)[0].item() == pytest.approx(step, abs=5e-7)
    assert rtn(GROUP, bits)[0].tolist() == pytest.approx(values, abs=5e-7)


def test_constant_groups():
    assert torch.allclose(rtn(torch.full((2, 8), 0.7, dtype=torch.float64), 2), torch.tensor(0.7, dtype=torch.float64))
    assert (rtn(torch.zeros(2, 8), 4) == 0).all()


@given(st.integers(0, 9999), st.integers(2, 8), st.integers(1, 40), st.sampled_from([-1, 1, 3, 8, 64]))
def test_rtn_error_is_at_most_half_a_step_and_groups_are_their_own(seed, bits, size, group_size):
    g = torch.Generator().manual_seed(seed)
    weight = torch.randn(3, size, generator=g, dtype=torch.float64)
    out = rtn(weight, bits, group_size)
    width = size if group_size == -1 else group_size
    for start in range(0, size, width):
        group = weight[:, start : start + width]
        step, _ = quantization_grid(group, bits)
        assert ((out[:, start : start + width] - group).abs() <= step / 2 + 1e-12).all()
        assert torch.equal(out[:, start : start + width], rtn(group, bits, -1))
        assert all(len(row.unique()) <= 2**bits for row in out[:, start : start + width])


def test_error_ratios_of_gaussian_groups():
    weight = torch.randn(4096, 128, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    error = {bits: (rtn(weight, bits) - weight).square().mean().sqrt() for bits in (8, 4, 3)}
    assert (error[4] / error[8]).item() == pytest.approx(17.0, abs=0.1)
    assert (error[3] / error[8]).item() == pytest.approx(36.483, abs=0.2)


@pytest.mark.parametrize("kwargs, message", [({"bits": 9}, "bits=9"), ({"bits": 4, "group_size": 0}, "group_size=0")])
def test_rtn_refuses(kwargs, message):
    with pytest.raises(ValueError, match=message):
        rtn(torch.zeros(2, 4), **kwargs)


@pytest.mark.parametrize("bits", range(2, 9))
def test_rtn_is_torchaos_to_the_bit(bits):
    from torchao.quantization import IntxWeightOnlyConfig, quantize_
    from torchao.quantization.granularity import PerGroup
    from torchao.quantization.quant_primitives import MappingType

    torch.manual_seed(bits)
    model = torch.nn.Sequential(torch.nn.Linear(256, 64, bias=False))
    expected = rtn(model[0].weight.detach(), bits)
    config = IntxWeightOnlyConfig(
        weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(128), mapping_type=MappingType.ASYMMETRIC
    )
    quantize_(model, config)
    assert torch.equal(model[0].weight.dequantize(), expected)


# -- pruning --------------------------------------------------------------------------------------

ROW = torch.tensor([[0.1, -0.5, 0.3, 0.05]], dtype=torch.float64)


def test_pruning_worked_numbers():
    assert magnitude(ROW, 2, 4)[0].tolist() == [0, -0.5, 0.3, 0]
    assert wanda(ROW, torch.tensor([10.0, 1, 1, 4]), 2, 4)[0].tolist() == [0.1, -0.5, 0, 0]
    assert magnitude(torch.ones(1, 4), 2, 4)[0].tolist() == [1, 1, 0, 0]  # ties go to the lower index


@given(
    st.integers(0, 999),
    st.sampled_from([(1, 2), (2, 4), (4, 8), (3, 4)]),
    st.sampled_from(["mag", "wanda", "sparsegpt"]),
)
def test_pruned_groups_keep_exactly_n_of_m(seed, pattern, kind):
    weight, inputs = random_layer(seed, out=5, width=16)
    n, m = pattern
    out = Method.parse(f"{kind}{n}:{m}")(weight, inputs)
    assert ((out != 0).reshape(5, -1, m).sum(-1) == n).all()
    share = Method.parse(f"{kind}50")(weight, inputs)
    assert ((share != 0).sum(-1) == 8).all()


def test_wanda_with_equal_norms_is_magnitude():
    weight, _ = random_layer(0)
    assert torch.equal(wanda(weight, torch.full((128,), 3.0), 2, 4), magnitude(weight, 2, 4))


# -- what follows the inputs ------------------------------------------------------------------------------------------


def random_layer(seed, out=96, width=128, tokens=512, correlated=True):
    """A Gaussian weight and inputs, correlated and of unequal norms."""
    g = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=g, dtype=torch.float64)
    x = draw(tokens, width)
    if correlated:
        x = (x @ (torch.eye(width, dtype=torch.float64) + draw(width, width) / width**0.5)) * draw(width).exp()
    inputs = Inputs(width)
    inputs.add(x)
    return draw(out, width), inputs


def test_identity_hessian_is_the_plain_method():
    weight, _ = random_layer(1)
    eye = torch.eye(128, dtype=torch.float64)
    assert torch.equal(gptq(weight, eye, 3, 48), rtn(weight, 3, 48))  # the last group is short
    assert torch.equal(sparsegpt(weight, eye, 2, 4), magnitude(weight, 2, 4))
    assert torch.equal(sparsegpt(weight, eye, 64), magnitude(weight, 64))


def test_gptq_is_the_optimal_update_of_two_columns():
    """By hand: after the first column is rounded, the second takes up what least squares gives it."""
    hessian = torch.tensor([[2.0, 1.0], [1.0, 3.0]], dtype=torch.float64)
    weight = torch.tensor([[0.4, 0.9]], dtype=torch.float64)
    damped = hessian + 0.01 * 2.5 * torch.eye(2, dtype=torch.float64)
    first = rtn(weight[:, :1], 2, 1)  # groups of one: the first is on its own grid exactly
    assert torch.equal(first, weight[:, :1])
    pruned = sparsegpt(weight, hessian, 1, 2)
    # pruning w_0: the least of (w - v)' H (w - v) with v_0 = 0 has v_1 = w_1 + w_0 H_01 / H_11
    assert pruned[0].tolist() == pytest.approx([0.0, 0.9 + 0.4 * damped[0, 1].item() / damped[1, 1].item()], abs=1e-12)


def test_dead_inputs_get_weight_zero():
    weight, inputs = random_layer(2, out=4, width=8)
    inputs.hessian[3] = inputs.hessian[:, 3] = 0
    for out in (gptq(weight, inputs.hessian, 4, -1), sparsegpt(weight, inputs.hessian, 2, 4)):
        assert (out[:, 3] == 0).all() and out.isfinite().all()
    inputs._sum_abs[3] = 0
    assert awq(weight, inputs.mean_abs, inputs.hessian, 3).isfinite().all()


def test_strides_change_nothing():
    """Errors are spread stride by stride; column by column gives the same."""
    weight, inputs = random_layer(3, out=4, width=300)
    out = gptq(weight, inputs.hessian, 3, 32)
    slow, H = weight.clone(), inputs.hessian + 0.01 * inputs.hessian.diagonal().mean() * torch.eye(300).double()
    upper = torch.linalg.cholesky(torch.linalg.inv(H), upper=True)
    for j in range(300):
        if j % 32 == 0:
            grid = quantization_grid(slow[:, j : j + 32], 3)
        q = snap(slow[:, j : j + 1], *grid, 3)[:, 0]
        slow[:, j + 1 :] -= ((slow[:, j] - q) / upper[j, j])[:, None] * upper[j, j + 1 :]
        slow[:, j] = q
    assert torch.allclose(out, slow, atol=1e-9)


def test_order_of_methods_in_output_error():
    """On 20 layers with correlated inputs of unequal norms each order holds in each of them."""
    methods = ("rtn4", "gptq4", "awq4", "rtn3", "gptq3", "awq3", "mag2:4", "wanda2:4", "sparsegpt2:4")
    errors = {token: [] for token in methods}
    for seed in range(20):
        weight, inputs = random_layer(seed)
        whole = output_error(weight, torch.zeros_like(weight), inputs.hessian)
        for token in methods:
            errors[token].append(output_error(weight, Method.parse(token)(weight, inputs, 64), inputs.hessian) / whole)
    for better, worse in [("gptq4", "rtn4"), ("gptq3", "rtn3"), ("awq4", "rtn4"), ("awq3", "rtn3"),
                          ("sparsegpt2:4", "wanda2:4"), ("wanda2:4", "mag2:4")]:  # fmt: skip
        assert all(a < b for a, b in zip(errors[better], errors[worse], strict=True)), (better, worse)


@pytest.mark.parametrize(
    "token, message",
    [
        ("gtpq4", "did you mean 'gptq4'"), ("rtn9", "'rtn9' is unknown; did you mean"), ("mag4:2", "mag4:2"),
        ("wanda2:32", "wanda2:32"), ("mag95", "mag95"), ("int4", "unknown"), ("", "there are rtn"),
    ],
)  # fmt: skip
def test_unknown_methods_name_the_nearest(token, message):
    with pytest.raises(ValueError, match=message):
        Method.parse(token)


def test_bits_per_weight():
    bits = lambda token: Method.parse(token).bits_per_weight(128, 1024)
    assert (bits("rtn4"), bits("mag2:4"), bits("mag50")) == (4 + 20 / 128, 9.0, 9.0)
