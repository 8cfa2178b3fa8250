"""What is done to a weight: worked numbers, bounds, and torchao as the oracle of round-to-nearest."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from trl_trust.evaluation.compressors import quantization_grid, rtn


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
