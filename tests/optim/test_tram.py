"""TRAM against its formulas, its worked numbers, reference SAM, and itself inside real trainers."""

import copy
import math
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from trl_trust.optim.predictions import kl_rows
from trl_trust.optim.tram import TRAM, ascent_, fisher_ascent_, global_norm


torch.set_num_threads(1)
F64 = torch.float64


def tensors(*values):
    return [torch.tensor(v, dtype=F64) for v in values]


class FixedDistance(TRAM):
    """TRAM with a constant radius is SAM (plain) or ASAM (adaptive)."""

    fixed = 0.2

    def __init__(self, base, **options):
        super().__init__(base, tram_variant="init", **options)

    def _distance(self, *args):
        return torch.tensor(self.fixed, dtype=F64)

    @property
    def climbs(self):
        return True


class Classifier(nn.Module):
    """float64, with a BatchNorm to count passes, dropout on demand."""

    def __init__(self, dropout=0.0, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.first = nn.Linear(5, 8)
        self.norm = nn.BatchNorm1d(8)
        self.dropout = nn.Dropout(dropout)
        self.last = nn.Linear(8, 3)
        self.forwards = {"grad": 0, "no_grad": 0}
        self.double()

    def forward(self, x, labels=None):
        self.forwards["grad" if torch.is_grad_enabled() else "no_grad"] += 1
        logits = self.last(self.dropout(torch.tanh(self.norm(self.first(x)))))
        loss = None if labels is None else F.cross_entropy(logits, labels)
        return {"loss": loss, "logits": logits}


class Words(nn.Module):
    """A bag of words with input embeddings, for the variants that put noise on them."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        self.embedding = nn.Embedding(11, 6)
        self.last = nn.Linear(6, 3)
        self.forwards = 0
        self.double()

    def get_input_embeddings(self):
        return self.embedding

    def forward(self, ids, labels=None):
        self.forwards += 1
        logits = self.last(torch.tanh(self.embedding(ids)).mean(1))
        return {"loss": F.cross_entropy(logits, labels), "logits": logits}


def batches(number, size=6, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "x": torch.randn(size, 5, dtype=F64, generator=generator),
            "labels": torch.randint(3, (size,), generator=generator),
        }
        for _ in range(number)
    ]


def word_batches(number, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return [
        {
            "ids": torch.randint(11, (4, 7), generator=generator),
            "labels": torch.randint(3, (4,), generator=generator),
        }
        for _ in range(number)
    ]


def state_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def assert_same_bits(a, b):
    assert a.keys() == b.keys()
    different = [name for name in a if not torch.equal(a[name], b[name])]
    assert not different, different


def train(model, optimizer, data, backward=None):
    for batch in data:
        optimizer.zero_grad()
        if backward is None:
            model(**batch)["loss"].backward()
        else:
            optimizer.backward(model, lambda batch=batch: model(**batch)["loss"])
        optimizer.step()
    return state_of(model)


# ------------------------------------------------------------------------------------------------- the worked numbers


@pytest.mark.parametrize(
    ("adaptive", "expected"), [(False, [0.12, -0.16, 0.0]), (True, [0.07022469, -0.37453167, 0.0])]
)
def test_worked_ascent(adaptive, expected):
    theta, g = tensors([1.0, 2.0, -3.0], [0.3, -0.4, 0.0])
    (eps,) = ascent_([theta], [g.clone()], 0.2, adaptive)
    torch.testing.assert_close(eps, torch.tensor(expected, dtype=F64), atol=1e-8, rtol=0)
    radius = (eps / theta.abs()).norm() if adaptive else eps.norm()
    assert radius.item() == pytest.approx(0.2, abs=1e-12)


def test_the_public_codes_formulas_are_not_ours():
    theta, g = tensors([1.0, 2.0, -3.0], [0.3, -0.4, 0.0])
    for adaptive, wrong in ((False, [0.4, 0.4, 0.4]), (True, [0.234082, 0.936329, 2.106741])):
        (eps,) = ascent_([theta], [g.clone()], 0.2, adaptive)
        assert (eps - torch.tensor(wrong, dtype=F64)).abs().max() > 0.3


def test_parameters_at_zero_stay_there_under_the_adaptive_metric():
    theta, g = tensors([0.0, 2.0], [1.0, -1.0])
    (eps,) = ascent_([theta], [g], 0.2, adaptive=True)
    torch.testing.assert_close(eps, torch.tensor([0.0, -0.4], dtype=F64))


@pytest.mark.parametrize(("theta", "g"), [([1.0, 2.0], [0.0, 0.0]), ([0.0, 0.0], [1.0, 1.0])])
def test_a_zero_norm_gives_no_perturbation(theta, g):
    theta, g = tensors(theta, g)
    (eps,) = ascent_([theta], [g], 0.2, adaptive=True)
    assert torch.equal(eps, torch.zeros(2, dtype=F64))


class Quadratic(nn.Module):
    def __init__(self):
        super().__init__()
        self.theta = nn.Parameter(torch.tensor([1.0, 2.0, -3.0], dtype=F64))

    def forward(self):
        target = torch.tensor([0.7, 2.4, -3.0], dtype=F64)
        return {"loss": 0.5 * (self.theta - target).square().sum(), "logits": self.theta[None]}


@pytest.mark.parametrize(
    ("adaptive", "gradient", "after"),
    [
        (True, [0.370225, -0.774532, 0.0], [0.962978, 2.077453, -3.0]),
        (False, [0.42, -0.56, 0.0], [0.958, 2.056, -3.0]),
    ],
)
def test_worked_descent(adaptive, gradient, after):
    model = Quadratic()
    tram = FixedDistance(torch.optim.SGD(model.parameters(), lr=0.1), tram_adaptive=adaptive)
    loss = tram.backward(model, lambda: model()["loss"])
    assert loss.item() == pytest.approx(0.5 * (0.3**2 + 0.4**2))  # at theta, not at theta + eps
    assert torch.equal(model.theta.detach(), torch.tensor([1.0, 2.0, -3.0], dtype=F64))
    torch.testing.assert_close(model.theta.grad, torch.tensor(gradient, dtype=F64), atol=1e-6, rtol=0)
    tram.step()
    torch.testing.assert_close(model.theta.detach(), torch.tensor(after, dtype=F64), atol=1e-6, rtol=0)


def test_worked_distance():
    p, q = tensors([[0.5, 0.3, 0.2]], [[0.2, 0.5, 0.3]])
    assert kl_rows(p.log(), q.log()).item() == pytest.approx(0.223805, abs=1e-6)
    assert kl_rows(p.log(), q.log(), "reverse").item() == pytest.approx(0.193794, abs=1e-6)
    assert kl_rows(p.log(), q.log(), "symmetric").item() == pytest.approx((0.223805 + 0.193794) / 2, abs=1e-6)


def test_worked_fisher():
    g = torch.tensor([2.0, -1.0, 0.5], dtype=F64)
    direction, fisher = tensors([0.3, -0.4, 0.0], [4.0, 1.0, 0.25])
    (eps,) = fisher_ascent_([direction.clone()], [g], gamma=0.1, eta=0.1)  # g^2 is that F
    torch.testing.assert_close(eps, torch.tensor([0.046790, -0.079401, 0.0], dtype=F64), atol=1e-6, rtol=0)
    assert (eps * (1 + 0.1 * fisher) * eps).sum().item() == pytest.approx(0.01, abs=1e-12)


# ----------------------------------------------------------------------------------------------------- the invariants


@settings(max_examples=50, deadline=None)
@given(
    sizes=st.lists(st.integers(1, 6), min_size=1, max_size=4),
    seed=st.integers(0, 2**16),
    d=st.floats(1e-3, 10),
    dtype=st.sampled_from([torch.float32, F64]),
)
def test_radius(sizes, seed, d, dtype):
    generator = torch.Generator().manual_seed(seed)
    theta = [torch.randn(n, n, generator=generator, dtype=dtype) for n in sizes]
    g = [torch.randn(n, n, generator=generator, dtype=dtype) for n in sizes]
    tolerance = {"rel": 1e-4 if dtype == torch.float32 else 1e-10}
    plain = ascent_(theta, [x.clone() for x in g], d, adaptive=False)
    assert global_norm(plain).item() == pytest.approx(d, **tolerance)
    adaptive = ascent_(theta, [x.clone() for x in g], d, adaptive=True)
    assert global_norm(e / t.abs() for e, t in zip(adaptive, theta, strict=True)).item() == pytest.approx(
        d, **tolerance
    )
    scaled = ascent_(theta, [1e3 * x for x in g], d, adaptive=True)
    for e, s in zip(adaptive, scaled, strict=True):
        torch.testing.assert_close(e, s)
    gamma, eta = d, 0.3
    eps = fisher_ascent_([x.clone() for x in g], [t.clone() for t in theta], gamma, eta)
    ellipse = sum((e.square() * (1 + eta * t.square())).sum() for e, t in zip(eps, theta, strict=True))
    assert ellipse.item() == pytest.approx(gamma**2, **tolerance)


@settings(max_examples=50, deadline=None)
@given(rows=st.integers(1, 9), classes=st.integers(2, 7), seed=st.integers(0, 2**16))
def test_distance_is_torchs_kl_div(rows, classes, seed):
    generator = torch.Generator().manual_seed(seed)
    p, q = (torch.randn(rows, classes, generator=generator, dtype=F64) for _ in range(2))
    expected = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    torch.testing.assert_close(kl_rows(p, q).mean(), expected)
    # The public code averages over classes as well, and divides by the batch again: rows * classes too small.
    wrong = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="mean") / rows
    torch.testing.assert_close(wrong * rows * classes, expected)


@pytest.mark.parametrize("step", [1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0])
def test_small_distances_survive_float32(step):
    """At a learning rate of 1e-6 a step moves predictions by less than float32 resolves, if summed plainly."""
    generator = torch.Generator().manual_seed(0)
    p = 3 * torch.randn(64, 5000, generator=generator)
    q = p + step * torch.randn(64, 5000, generator=generator)
    exact = F.kl_div(q.double().log_softmax(-1), p.double().log_softmax(-1), log_target=True, reduction="batchmean")
    assert kl_rows(p, q).mean().item() == pytest.approx(exact.item(), rel=0.02)
    plain = F.kl_div(q.log_softmax(-1), p.log_softmax(-1), log_target=True, reduction="batchmean")
    assert step > 1e-5 or abs(plain - exact) > exact
    assert torch.equal(kl_rows(p, p), torch.zeros(64))


def test_distance_allows_excluded_tokens():
    p = torch.tensor([[0.0, 1.0, -math.inf]], dtype=F64)
    assert kl_rows(p, p).item() == 0.0
    far = torch.tensor([[0.0, 1.0, -500.0]], dtype=torch.float32)  # its probability underflows
    assert kl_rows(far, far.flip(-1)).item() == pytest.approx(500 / (1 + math.e), rel=0.01)
    assert kl_rows(torch.tensor([[0.0, 1.0, 0.0]], dtype=F64), p).item() == math.inf


def test_layer_rescaling_leaves_the_adaptive_perturbed_loss_alone():
    torch.manual_seed(0)
    a, b, x = torch.randn(4, 5, dtype=F64), torch.randn(2, 4, dtype=F64), torch.randn(7, 5, dtype=F64)

    def perturbed(a, b, adaptive):
        params = [a.clone().requires_grad_(), b.clone().requires_grad_()]
        loss = lambda params: (x @ params[0].T @ params[1].T).square().mean()
        grads = list(torch.autograd.grad(loss(params), params))
        with torch.no_grad():
            eps = ascent_(params, grads, 0.3, adaptive)
            return loss([p + e for p, e in zip(params, eps, strict=True)])

    torch.testing.assert_close(perturbed(a, b, True), perturbed(7 * a, b / 7, True))
    assert (perturbed(a, b, False) - perturbed(7 * a, b / 7, False)).abs() > 1e-2


def reference_sam(model, lr, data, rho, adaptive):
    """(A)SAM written down plainly, SGD inside."""
    for batch in data:
        params = list(model.parameters())
        buffers = [(b, b.clone()) for b in model.buffers()]
        grads = torch.autograd.grad(model(**batch)["loss"], params)
        counted = [b.clone() for b, _ in buffers]
        with torch.no_grad():
            scale = [p.abs() if adaptive else torch.ones_like(p) for p in params]
            norm = torch.sqrt(sum((s * g).square().sum() for s, g in zip(scale, grads, strict=True)))
            eps = [rho * s.square() * g / norm for s, g in zip(scale, grads, strict=True)]
            for p, e in zip(params, eps, strict=True):
                p.add_(e)
        grads = torch.autograd.grad(model(**batch)["loss"], params)
        with torch.no_grad():
            for p, e, g in zip(params, eps, grads, strict=True):
                p.sub_(e).sub_(lr * g)
            for (b, _), c in zip(buffers, counted, strict=True):
                b.copy_(c)
    return state_of(model)


@pytest.mark.parametrize("adaptive", [True, False])
def test_with_a_constant_radius_it_is_sam(adaptive):
    model, other = Classifier(), Classifier()
    tram = FixedDistance(torch.optim.SGD(model.parameters(), lr=0.1), tram_adaptive=adaptive)
    ours = train(model, tram, batches(5), backward=True)
    reference = reference_sam(other, 0.1, batches(5), 0.2, adaptive)
    torch.testing.assert_close(ours, reference, rtol=1e-10, atol=1e-12)
    plain = Classifier()
    assert (train(plain, torch.optim.SGD(plain.parameters(), lr=0.1), batches(5))["last.weight"]
            - ours["last.weight"]).abs().max() > 1e-4  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.4])
def test_at_distance_zero_it_is_the_base_optimizer_bit_for_bit(dropout):
    class Zero(FixedDistance):
        fixed = 0.0

    model, other = Classifier(dropout), Classifier(dropout)
    torch.manual_seed(1)
    ours = train(model, Zero(torch.optim.AdamW(model.parameters(), lr=0.1)), batches(5), backward=True)
    torch.manual_seed(1)
    plain = train(other, torch.optim.AdamW(other.parameters(), lr=0.1), batches(5))
    assert_same_bits(ours, plain)


def test_the_first_prev_and_init_steps_are_plain():
    for variant in ("prev", "init"):
        model, other = Classifier(), Classifier()
        tram = TRAM(torch.optim.AdamW(model.parameters(), lr=0.1), tram_variant=variant)
        ours = train(model, tram, batches(1), backward=True)
        assert_same_bits(ours, train(other, torch.optim.AdamW(other.parameters(), lr=0.1), batches(1)))
        assert model.forwards == {"grad": 1, "no_grad": 0}


def test_passes_of_prev_and_init():
    for variant in ("prev", "init"):
        model = Classifier()
        tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.1), tram_variant=variant)
        train(model, tram, batches(4), backward=True)
        assert model.forwards == {"grad": 1 + 3 * 2, "no_grad": 3}
        assert model.norm.num_batches_tracked == 4  # once per batch: in pass 1 only


@pytest.mark.parametrize(
    ("variant", "passes", "forwards"), [("noise", None, 3), ("fisher", "shared", 2), ("fisher", "separate", 3)]
)
def test_passes_of_noise_and_fisher(variant, passes, forwards):
    model = Words()
    options = {} if passes is None else {"tram_fisher_passes": passes}
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.1), tram_variant=variant, **options)
    backwards = []
    model.embedding.weight.register_post_accumulate_grad_hook(lambda p: backwards.append(1))
    train(model, tram, word_batches(4), backward=True)
    assert model.forwards == 4 * forwards
    assert len(backwards) == 4 * (3 if passes == "separate" else 2)


def test_tram_every():
    model, other = Classifier(), Classifier()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.1), tram_every=3)
    train(model, tram, batches(7), backward=True)
    assert model.forwards["no_grad"] == 2  # steps 3 and 6: at step 0 there is no anchor yet
    # prev is always the parameters before the last step, also when that one was plain
    tram = TRAM(torch.optim.SGD(other.parameters(), lr=0.1), tram_every=2)
    data = batches(3)
    train(other, tram, data[:1], backward=True)
    before = state_of(other)
    train(other, tram, data[1:2], backward=True)
    assert torch.equal(tram.anchor[other.last.weight], before["last.weight"])


@pytest.mark.parametrize("kind", ["forward", "reverse", "symmetric"])
@pytest.mark.parametrize("variant", ["prev", "init"])
@pytest.mark.parametrize("accumulation", [1, 3])
def test_against_an_implementation_with_all_copies(variant, accumulation, kind):
    """One copy of the parameters gives the trajectory of a reference that keeps anchor and restore point apart."""
    model, other = Classifier(), Classifier()
    data = batches(4 * accumulation)
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.5), tram_variant=variant, tram_divergence=kind)
    distances = []
    for start in range(0, len(data), accumulation):
        tram.zero_grad()
        for i in range(accumulation):
            batch = data[start + i]
            tram.backward(model, lambda batch=batch: model(**batch)["loss"], last=i == accumulation - 1)
            if tram.anchor:
                distances.append(tram._sums["distance"].clone())
        tram.step()

    first, anchor = copy.deepcopy(other), None
    expected = []
    for start in range(0, len(data), accumulation):
        total = [torch.zeros_like(p) for p in other.parameters()]
        for i in range(accumulation):
            batch = data[start + i]
            shifted = copy.deepcopy(other)
            output = other(**batch)
            grads = list(torch.autograd.grad(output["loss"], list(other.parameters())))
            if anchor is not None:
                reference = copy.deepcopy(first if variant == "init" else anchor).eval()
                for b, value in zip(reference.buffers(), other.buffers(), strict=True):
                    b.copy_(value)  # statistics are not parameters: the anchor uses those of now
                with torch.no_grad():
                    d = kl_rows(reference(**batch)["logits"], output["logits"], kind).mean()
                    expected.append(d)
                    for p, e in zip(
                        shifted.parameters(), ascent_(list(other.parameters()), grads, d, True), strict=True
                    ):
                        p.add_(e)
            for t, g in zip(
                total, torch.autograd.grad(shifted(**batch)["loss"], list(shifted.parameters())), strict=True
            ):
                t.add_(g)
        anchor = copy.deepcopy(other)
        with torch.no_grad():
            for p, t in zip(other.parameters(), total, strict=True):
                p.sub_(0.5 * t)
    torch.testing.assert_close(state_of(model), state_of(other), rtol=1e-9, atol=1e-11)
    torch.testing.assert_close(torch.stack(distances).diff(), torch.stack(expected)[1:], rtol=1e-9, atol=1e-9)
    assert torch.stack(expected).max() > 1e-4


def test_extra_memory_is_one_copy():
    """`prev` holds one copy of the parameters and, when its last micro-batch climbs, restores from that very copy."""
    model = Classifier()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.1))
    data = batches(3)
    train(model, tram, data[:1], backward=True)
    assert {p.shape for p in tram.anchor} == {p.shape for p in model.parameters()}
    tram.zero_grad()
    tram.ascend(model, lambda: model(**data[1])["loss"], last=True)
    kept = dict(tram._undo)
    assert all(kept[p] is tram.anchor[p] for p in model.parameters())
    tram.restore()
    for variant in ("noise", "fisher"):
        words = Words()
        tram = TRAM(torch.optim.SGD(words.parameters(), lr=0.1), tram_variant=variant)
        train(words, tram, word_batches(2), backward=True)
        assert not tram.anchor


@pytest.mark.parametrize("last", [True, False])
@pytest.mark.parametrize("variant", ["prev", "init", "noise", "fisher"])
def test_parameters_batch_and_accumulated_gradients_come_back(variant, last):
    model = Words()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.1), tram_variant=variant)
    data = word_batches(3)
    train(model, tram, data[:1], backward=True)
    before, batch = state_of(model), copy.deepcopy(data[1])
    anchor = {p: a.clone() for p, a in tram.anchor.items()}
    accumulated = {p: torch.randn_like(p) for p in model.parameters()}
    for p in model.parameters():
        p.grad = accumulated[p].clone()
    tram.ascend(model, lambda: model(**data[1])["loss"], last=last)
    assert not torch.equal(model.last.weight, before["last.weight"])  # it did climb
    assert all(torch.equal(p.grad, accumulated[p]) for p in model.parameters())
    shifted = copy.deepcopy(model)
    shifted.zero_grad()
    shifted(**data[1])["loss"].backward()
    model(**data[1])["loss"].backward()
    tram.restore()
    assert_same_bits(state_of(model), before)
    assert all(torch.equal(data[1][k], batch[k]) for k in batch)
    for p, q in zip(model.parameters(), shifted.parameters(), strict=True):
        torch.testing.assert_close(p.grad, accumulated[p] + q.grad)
        if not last:  # the micro-batches that follow still need it
            assert variant not in ("prev", "init") or torch.equal(tram.anchor[p], anchor[p])


def test_an_error_in_the_second_pass_leaves_the_parameters_as_they_were():
    model = Classifier()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.1))
    data = batches(2)
    train(model, tram, data[:1], backward=True)
    before, calls = state_of(model), []

    def loss():
        calls.append(1)
        if len(calls) == 2:
            raise RuntimeError("out of memory")
        return model(**data[1])["loss"]

    model.norm.eval()
    with pytest.raises(RuntimeError, match="out of memory"):
        tram.backward(model, loss)
    assert_same_bits(state_of(model), before)


def test_micro_batches_each_have_their_own_perturbation():
    model = Words()
    tram = FixedDistance(torch.optim.SGD(model.parameters(), lr=0.1))
    data = word_batches(4)
    alone = []
    for batch in data:
        tram.zero_grad()
        tram.backward(model, lambda batch=batch: model(**batch)["loss"], last=False)
        alone.append([p.grad.clone() for p in model.parameters()])
    tram.zero_grad()
    for i, batch in enumerate(data):
        tram.backward(model, lambda batch=batch: model(**batch)["loss"], last=i == 3)
    for p, *grads in zip(model.parameters(), *alone, strict=True):
        torch.testing.assert_close(p.grad, sum(grads))


def test_frozen_and_unused_parameters_are_not_perturbed():
    model = Classifier()
    model.first.weight.requires_grad_(False)
    model.unused = nn.Parameter(torch.ones(3, dtype=F64))
    tram = FixedDistance(torch.optim.SGD(model.parameters(), lr=0.1))
    before = state_of(model)
    tram.ascend(model, lambda: model(**batches(1)[0])["loss"])
    assert torch.equal(model.first.weight, before["first.weight"])
    assert torch.equal(model.unused, before["unused"])
    assert not torch.equal(model.last.weight, before["last.weight"])
    tram.restore()
    assert model.unused.grad is None


def test_a_broken_distance_skips_the_ascent_and_is_counted():
    model = Classifier()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.1))
    data = batches(2)
    train(model, tram, data[:1], backward=True)
    with torch.no_grad():
        tram.anchor[model.last.bias].fill_(math.nan)
    expected = copy.deepcopy(model)
    expected(**data[1])["loss"].backward()
    tram.zero_grad()
    tram.backward(model, lambda: model(**data[1])["loss"])
    assert torch.equal(model.last.weight.grad, expected.last.weight.grad)
    metrics = tram.metrics()
    assert metrics["tram/skipped"] == 1
    assert metrics["tram/distance"] == 0
    assert metrics["tram/eps_norm"] == 0
    assert tram.metrics() == {}


def test_the_cap():
    data = batches(3)

    def norms(cap):
        model = Classifier()
        tram = TRAM(torch.optim.SGD(model.parameters(), lr=5.0), tram_max_distance=cap, tram_adaptive=False)
        train(model, tram, data[:1], backward=True)
        tram.zero_grad()
        tram.backward(model, lambda: model(**data[1])["loss"])
        return tram.metrics()

    free, capped = norms(None), norms(0.01)
    assert free["tram/distance"] > 0.02
    assert free["tram/distance_capped"] == 0
    assert capped["tram/distance"] == pytest.approx(0.01)
    assert capped["tram/eps_norm"] == pytest.approx(0.01)
    assert capped["tram/distance_capped"] == 1
    assert set(free) == {
        f"tram/{name}"
        for name in ("distance", "distance_capped", "eps_norm", "grad_norm_ascent", "loss_perturbed", "skipped")
    }


def test_dropout():
    data = batches(3)

    def distance(**options):
        model = Classifier(dropout=0.5)
        model.norm = nn.Identity()
        tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.0), **options)  # nothing ever moves
        train(model, tram, data[:1], backward=True)
        tram.backward(model, lambda: model(**data[1])["loss"])
        return tram.metrics()["tram/distance"]

    with pytest.warns(UserWarning, match="dropout"):
        assert distance() > 1e-3
    assert distance(tram_anchor_eval=False) == 0


def test_noise_is_new_each_time_and_leaves_the_random_state_alone():
    model = Words()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.0), tram_variant="noise")
    batch = word_batches(1)[0]
    state, distances = torch.get_rng_state(), []
    for _ in range(3):
        tram.backward(model, lambda: model(**batch)["loss"])
        distances.append(tram.metrics()["tram/distance"])
    assert len(set(distances)) == 3
    assert min(distances) > 0
    assert torch.equal(torch.get_rng_state(), state)


def test_the_size_of_the_noise():
    model = Words()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.0), tram_variant="noise", tram_noise_std=0.25)
    ids = torch.zeros(100, 200, dtype=torch.long)
    with tram._noise(model)():
        noised = model.embedding(ids)
    z = noised - model.embedding(ids)
    assert z.std().item() == pytest.approx(0.25, rel=0.01)
    assert abs(z.mean().item()) < 0.01


@pytest.mark.parametrize("variant", ["prev", "init", "noise", "fisher"])
def test_save_and_resume_is_exact(variant, tmp_path):
    def make():
        model = Words()
        return model, TRAM(torch.optim.Adam(model.parameters(), lr=0.1), tram_variant=variant)

    data = word_batches(6)
    model, tram = make()
    train(model, tram, data[:3], backward=True)
    torch.save({"model": model.state_dict(), "optimizer": tram.state_dict()}, tmp_path / "checkpoint")
    expected = train(model, tram, data[3:], backward=True)

    torch.manual_seed(99)
    resumed, again = make()
    again.seed = 12345  # another process, another seed: the saved one must win
    saved = torch.load(tmp_path / "checkpoint", weights_only=True)
    resumed.load_state_dict(saved["model"])
    again.load_state_dict(saved["optimizer"])
    assert again.steps == 3
    assert_same_bits(train(resumed, again, data[3:], backward=True), expected)


def test_the_anchor_matters_to_the_resumed_run(tmp_path):
    """Without it the first resumed step would be plain: the test above can fail."""
    data = word_batches(6)
    model = Words()
    tram = TRAM(torch.optim.Adam(model.parameters(), lr=0.1))
    train(model, tram, data[:3], backward=True)
    forgetful = copy.deepcopy(model)
    other = TRAM(torch.optim.Adam(forgetful.parameters(), lr=0.1))
    other.load_state_dict(tram.base.state_dict())  # a plain Adam's checkpoint is accepted, and has no anchor
    assert not other.anchor
    ours, theirs = train(model, tram, data[3:], backward=True), train(forgetful, other, data[3:], backward=True)
    assert not torch.equal(ours["last.weight"], theirs["last.weight"])


def test_resuming_with_another_variant_raises():
    model = Words()
    saved = TRAM(torch.optim.SGD(model.parameters(), lr=0.1), tram_variant="noise").state_dict()
    with pytest.raises(ValueError, match="'noise'"):
        TRAM(torch.optim.SGD(model.parameters(), lr=0.1)).load_state_dict(saved)


def test_bf16_parameters_keep_a_bf16_anchor():
    model = Words().bfloat16()
    tram = TRAM(torch.optim.AdamW(model.parameters(), lr=0.1))
    train(model, tram, word_batches(2), backward=True)
    saved = copy.deepcopy(tram.state_dict())
    tram.load_state_dict(saved)
    assert all(a.dtype == torch.bfloat16 for a in tram.anchor.values())
    assert all(torch.isfinite(p).all() for p in model.parameters())


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"tram_noise_std": 0.1}, "does nothing"),
        ({"tram_fisher_gamma": 3.0}, "tram_fisher_gamma=3.0 does nothing with tram_variant='prev'.*'fisher'"),
        ({"tram_fisher_eta": 3.0}, "does nothing"),
        ({"tram_fisher_passes": "separate"}, "tram_fisher_passes='separate' does nothing"),
        ({"tram_variant": "init", "tram_noise_std": 0.2}, "use tram_variant='noise' or 'fisher'"),
        ({"tram_variant": "fisher", "tram_max_distance": 0.5}, "tram_max_distance=0.5 does nothing"),
        ({"tram_variant": "fisher", "tram_adaptive": False}, "use tram_variant='prev' or 'init' or 'noise'"),
        ({"tram_variant": "fisher", "tram_divergence": "reverse"}, "tram_divergence='reverse' does nothing"),
        ({"tram_variant": "fisher", "tram_anchor_eval": False}, "tram_anchor_eval=False does nothing"),
        ({"tram_variant": "fisher", "tram_distance_scope": "local"}, "does nothing"),
        ({"tram_variant": "fisher", "tram_chunk_size": 2}, "does nothing"),
    ],
)
def test_settings_that_a_variant_would_ignore_raise(options, match):
    with pytest.raises(ValueError, match=match):
        TRAM(torch.optim.SGD([nn.Parameter(torch.ones(2))], lr=0.1), **options)


def test_noise_needs_embeddings():
    model = Classifier()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.1), tram_variant="noise")
    with pytest.raises(ValueError, match="get_input_embeddings"):
        tram.backward(model, lambda: model(**batches(1)[0])["loss"])


def test_a_loss_that_does_not_call_the_model_raises():
    model = Classifier()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.1))
    train(model, tram, batches(1), backward=True)
    with pytest.raises(RuntimeError, match="no forward of Classifier"):
        tram.backward(model, lambda: model.last.weight.square().sum())


def test_it_is_an_optimizer_to_schedulers_and_pickle():
    model = Words()
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.1))
    scheduler = torch.optim.lr_scheduler.LambdaLR(tram, lambda step: 0.5**step)
    train(model, tram, word_batches(1), backward=True)
    scheduler.step()
    assert tram.param_groups[0]["lr"] == tram.base.param_groups[0]["lr"] == 0.05
    # The scheduler has put a `step` into the instance, which steps the original whatever it is copied to.
    for copied, other in (copy.deepcopy((model, tram)), pickle.loads(pickle.dumps((model, tram)))):
        train(copied, other, word_batches(1), backward=True)
        assert (other.steps, tram.steps) == (2, 1)
        assert not torch.equal(copied.last.weight, model.last.weight)


@pytest.mark.parametrize("variant", ["prev", "fisher"])
def test_a_step_without_an_ascent_warns_once(variant):
    model, data = Words(), word_batches(4)
    tram = TRAM(torch.optim.SGD(model.parameters(), lr=0.1), tram_variant=variant, tram_every=2)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        train(model, tram, data, backward=True)
        tram.param_groups[0]["lr"] = 0.0
        tram.step()  # torch's distributed checkpoint makes such a step to create the state
        tram.step()
        tram.param_groups[0]["lr"] = 0.1
    with pytest.warns(UserWarning, match=r"TRAM has not climbed.*TRAM\.backward") as record:
        train(model, tram, data)
    assert len(record) == 1


def test_what_is_trained_by_others_gets_one_gradient():
    """A second optimizer on a part of the model: pass 1 leaves nothing in its gradients either."""
    model, batch = Words(), word_batches(1)[0]
    model(**batch)["loss"].backward()
    expected = model.embedding.weight.grad.clone()
    model.zero_grad()
    tram = FixedDistance(torch.optim.SGD(model.last.parameters(), lr=0.1))
    tram.fixed = 0.0
    tram.backward(model, lambda: model(**batch)["loss"])
    assert torch.equal(model.embedding.weight.grad, expected)
