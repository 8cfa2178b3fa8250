"""Momentum in bfloat16: right on average, repeatable, and nothing where the option is off."""

import copy

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from trl_trust.optim import AuON, Muon
from trl_trust.optim.rounding import round_stochastically


FLOATS = st.floats(-(2.0**100), 2.0**100, width=32)


@given(FLOATS, FLOATS)
def test_one_of_the_two_neighbors(x, noise):
    x, noise = torch.tensor(x), torch.tensor(noise)
    got = round_stochastically(x, noise)
    lower = (x.view(torch.int32) & -0x10000).view(torch.float32)  # towards zero
    upper = ((x.view(torch.int32) & -0x10000) + 0x10000).view(torch.float32)
    assert got.dtype == torch.bfloat16 and got.float() in (lower, upper)
    exact = x.bfloat16()
    assert round_stochastically(exact.float(), noise) == exact  # nothing is added to what needs no rounding


@pytest.mark.parametrize("scale", [1e-12, 1.0, 1e12])
@pytest.mark.parametrize("coarse", [False, True], ids=["float32", "gradients in bf16"])
def test_right_on_average_and_as_wide_as_chance(scale, coarse):
    torch.manual_seed(0)
    x, noise = torch.randn(400_000), torch.randn(400_000) * scale
    noise = noise.bfloat16().float() if coarse else noise
    last_bit = (x.abs().log2().floor() - 7).exp2()
    error = (round_stochastically(x, noise).float() - x) / last_bit
    up = error * x.sign()
    assert abs(error.mean()) < 0.003 and abs(up.mean()) < 0.01
    assert error.std() == pytest.approx(6**-0.5, abs=0.01)  # of rounding by a uniform chance


def test_numbers_that_are_none():
    x = torch.tensor([float("inf"), float("-inf"), float("nan"), 0.0, -0.0])
    nan = torch.tensor(0x7FFFFFFF, dtype=torch.int32).view(torch.float32)  # as a GPU writes it
    for noise in torch.randn(50, 5):
        got = round_stochastically(x, noise)
        assert got[:2].tolist() == [float("inf"), float("-inf")] and got[2].isnan() and got[3:].tolist() == [0, 0]
        assert round_stochastically(nan, noise[0]).isnan()


def test_a_slow_average_does_not_stand_still():
    """At .999, where rounding to nearest stops far from the mean: the reason for chance."""
    torch.manual_seed(0)
    mean, exact = torch.randn(500), torch.zeros(500)
    nearest, chance = exact.bfloat16(), exact.bfloat16()
    for _ in range(4000):
        grad = mean + torch.randn(500)
        exact = exact.lerp(grad, 1e-3)
        nearest = nearest.float().lerp(grad, 1e-3).bfloat16()
        chance = round_stochastically(chance.float().lerp(grad, 1e-3), grad)
    far = {name: float((t.float() - exact).norm() / exact.norm()) for name, t in (("n", nearest), ("c", chance))}
    assert far["c"] < 0.08 < 0.2 < far["n"]


def model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 8), nn.Linear(8, 12), nn.LayerNorm(12))


def train(net, optimizer, steps):
    for step in steps:
        generator = torch.Generator().manual_seed(step)
        for p in net.parameters():
            p.grad = torch.randn(p.shape, generator=generator)
        optimizer.step()
    return [p.detach().clone() for p in net.parameters()]


@pytest.mark.parametrize("make", [Muon, AuON])
def test_half_the_state_near_the_same_path_and_no_generator_touched(make):
    runs = {}
    for dtype in ("float32", "bfloat16"):
        net = model()
        optimizer = make(net, lr=0.05, momentum_dtype=dtype)
        before = torch.get_rng_state()
        runs[dtype] = train(net, optimizer, range(20))
        assert torch.equal(torch.get_rng_state(), before)
        buffers = [s["momentum_buffer"] for s in optimizer.state.values() if "momentum_buffer" in s]
        assert {b.dtype for b in buffers} == {getattr(torch, dtype)}
    for start, full, half in zip(model().parameters(), runs["float32"], runs["bfloat16"], strict=True):
        gap = (half - full).norm() / (full - start).norm()
        assert gap < 0.03 and (gap > 0 or full.ndim == 1)


def test_resumed_to_the_bit_and_changed_on_the_way():
    net = model()
    optimizer = Muon(net, lr=0.05, momentum_dtype="bfloat16")
    train(net, optimizer, range(3))
    saved, weights = copy.deepcopy(optimizer.state_dict()), copy.deepcopy(net.state_dict())
    whole = train(net, optimizer, range(3, 6))
    again = model()
    again.load_state_dict(weights)
    resumed = Muon(again, lr=0.05, momentum_dtype="bfloat16")
    resumed.load_state_dict(copy.deepcopy(saved))
    assert all(map(torch.equal, whole, train(again, resumed, range(3, 6))))
    # a checkpoint holds the setting with the groups; who changes it afterwards gets what was asked for
    for dtype in ("float32", "bfloat16"):
        for group in resumed.param_groups:
            if group["rule"] == "matrix":
                group["momentum_dtype"] = dtype
        train(again, resumed, [6])
        assert resumed.state[again[0].weight]["momentum_buffer"].dtype == getattr(torch, dtype)
