"""The ten forget losses against worked numbers, and what padding may not change."""

import pytest
import torch

from trl_trust.unlearn import losses as L


def tensor(x):
    return torch.tensor(x, dtype=torch.float64)


LOGPS, MASK = tensor([[0.5, 0.25]]).log(), torch.ones(1, 2, dtype=torch.float64)
REF = tensor([[-1.5, -1.5]])  # sums to -3


def test_worked_numbers():
    worked = {
        -1.039721: L.ga_loss(LOGPS, MASK),
        14.804680: L.npo_loss(LOGPS, REF, MASK),
        13.862944: L.npo_loss(LOGPS, LOGPS, MASK),
        0.004110: L.simnpo_loss(LOGPS, MASK),
        -0.346574: L.wga_loss(LOGPS, MASK),
        -0.005923: L.satimp_loss(LOGPS, MASK),
        14.287923: L.dpo_loss(tensor([[-2.0]]), tensor([[-2.5]]), tensor([[1.0]]), LOGPS, REF, MASK),
    }
    for number, loss in worked.items():
        assert loss.item() == pytest.approx(number, abs=6e-7)
    # the answer's tokens are 1 (skipped by CE-U) and 0; the last logits predict nothing
    logits = tensor([[[2.0, 1, 0], [2.0, 1, 0], [9.0, 9, 9]]])
    labels = torch.tensor([[-100, -100, 0]])
    assert L.undial_loss(logits, logits, labels).item() == pytest.approx(1.676433, abs=6e-7)
    assert L.ceu_loss(logits, torch.tensor([[-100, 1, 0]])).item() == pytest.approx(1.676547, abs=6e-7)
    assert L.ceu_loss(logits, labels).item() == 0  # one answer token only, which is skipped


def test_activation_loss():
    activation = tensor([[[1.0, 3], [0, 0]], [[2.0, 0], [0, 2]]])
    # sequence 1: token 1 only, (1 + 9) / 2; sequence 2: (4 / 2 + 4 / 2) / 2
    assert L.activation_loss(activation, torch.zeros(2), tensor([[1.0, 0], [1, 1]])).item() == pytest.approx(3.5)


def test_kl_and_logps():
    torch.manual_seed(0)
    one, other = torch.randn(2, 2, 4, 5, dtype=torch.float64)
    labels = torch.tensor([[-100, 3, 1, -100], [-100, -100, 0, 4]])
    logps, mask = L.answer_logps(one, labels)
    assert mask.tolist() == [[1, 1, 0], [0, 1, 1]] and logps[0, 2] == 0
    assert logps[1, 2].item() == pytest.approx(one[1, 2].log_softmax(-1)[4].item())
    p, q = one.softmax(-1), other.softmax(-1)
    kl = (p * (p / q).log()).sum(-1)
    expected = (kl[0, 0] + kl[0, 1] + kl[1, 1] + kl[1, 2]) / 4
    assert L.kl_loss(one, other, labels).item() == pytest.approx(expected.item())
    assert L.nll_loss(logps, mask).item() == pytest.approx(
        torch.nn.functional.cross_entropy(one[:, :-1].reshape(-1, 5), labels[:, 1:].reshape(-1)).item()
    )


@pytest.mark.parametrize("name", sorted(L.FORGET_LOSSES))
def test_padding_changes_nothing_and_forgetting_lowers_the_answer(name):
    torch.manual_seed(1)
    logits, ref = torch.randn(2, 2, 6, 5, dtype=torch.float64)
    labels = torch.tensor([[-100, -100, 3, 1, 2, -100], [-100, 0, 4, 1, -100, -100]])

    def loss(logits, ref, labels):
        logps, mask = L.answer_logps(logits, labels)
        ref_logps = L.answer_logps(ref, labels)[0]
        return {
            "ga": lambda: L.ga_loss(logps, mask),
            "graddiff": lambda: L.ga_loss(logps, mask),
            "npo": lambda: L.npo_loss(logps, ref_logps, mask),
            "simnpo": lambda: L.simnpo_loss(logps, mask),
            "dpo": lambda: L.dpo_loss(ref_logps, ref_logps, mask, logps, ref_logps, mask),
            "wga": lambda: L.wga_loss(logps, mask),
            "satimp": lambda: L.satimp_loss(logps, mask),
            "undial": lambda: L.undial_loss(logits, ref, labels),
            "ceu": lambda: L.ceu_loss(logits, labels),
            "rmu": lambda: L.activation_loss(logits[:, 1:], -torch.ones(5), mask),
        }[name]()

    logits.requires_grad_()
    value = loss(logits, ref, labels)
    pad = lambda x: torch.nn.functional.pad(x, (0, 0, 0, 3), value=7.0)
    padded = loss(pad(logits), pad(ref), torch.nn.functional.pad(labels, (0, 3), value=-100))
    assert padded.item() == pytest.approx(value.item())
    if name != "rmu":
        (grad,) = torch.autograd.grad(value, logits)
        before, after = (L.answer_logps(x, labels)[0].sum() for x in (logits, logits - 1e-3 * grad))
        assert after < before


def test_every_loss_is_its_formula_on_random_tensors():
    """Each formula written again, answer by answer and token by token, as open-unlearning states it."""
    g = torch.Generator().manual_seed(2)
    logits, ref, win, win_ref = torch.randn(4, 3, 7, 9, generator=g, dtype=torch.float64)
    labels = torch.randint(0, 9, (3, 7), generator=g)
    for row, (start, end) in enumerate(((2, 7), (3, 5), (1, 6))):
        labels[row, :start] = labels[row, end:] = -100
    answers = [[(t, y.item()) for t, y in enumerate(row) if y != -100] for row in labels]
    p = lambda x, b, t: x[b, t - 1].softmax(-1)
    tokens = [p(logits, b, t)[y] for b, answer in enumerate(answers) for t, y in answer]
    total = lambda x: torch.stack([sum(p(x, b, t)[y].log() for t, y in a) for b, a in enumerate(answers)])
    mean = lambda xs: torch.stack(list(xs)).mean()
    F = torch.nn.functional
    lengths = torch.tensor([len(a) for a in answers])
    lose = total(logits) - total(ref)
    soft_ref = lambda b, t, y: (ref[b, t - 1] - 10 * F.one_hot(torch.tensor(y), 9)).softmax(-1)

    def without(b, t, y):
        rest = p(logits, b, t).clone()
        rest[y] = 0
        return rest / rest.sum()

    pairs = [(b, t, y) for b, a in enumerate(answers) for t, y in a]
    later = [(b, t, y) for b, a in enumerate(answers) for t, y in a[1:]]
    expected = {
        "ga": mean(x.log() for x in tokens),
        "graddiff": mean(x.log() for x in tokens),
        "npo": -2 / 0.1 * F.logsigmoid(-0.1 * lose).mean(),
        "simnpo": -2 / 4.5 * F.logsigmoid(-4.5 * total(logits) / lengths - 4.5 * 0.3).mean(),
        "dpo": -2 / 0.1 * F.logsigmoid(0.1 * (total(win) - total(win_ref) - lose)).mean(),
        "wga": mean(x**0.7 * x.log() for x in tokens),
        "satimp": mean(x**5 * (1 - x) * x.log() for x in tokens),
        "undial": mean(-(soft_ref(b, t, y) * p(logits, b, t).log()).sum() for b, t, y in pairs),
        "ceu": mean(-(without(b, t, y) * p(logits, b, t).log()).sum() for b, t, y in later),
        "rmu": mean(mean((logits[b, t - 1] - 2) ** 2 for t, _ in a) for b, a in enumerate(answers)),
    }
    logps, mask = L.answer_logps(logits, labels)
    ref_logps, win_logps, win_ref_logps = (L.answer_logps(x, labels)[0] for x in (ref, win, win_ref))
    found = {
        "ga": L.ga_loss(logps, mask),
        "graddiff": L.ga_loss(logps, mask),
        "npo": L.npo_loss(logps, ref_logps, mask),
        "simnpo": L.simnpo_loss(logps, mask, delta=0.3),
        "dpo": L.dpo_loss(win_logps, win_ref_logps, mask, logps, ref_logps, mask),
        "wga": L.wga_loss(logps, mask, beta=0.7),
        "satimp": L.satimp_loss(logps, mask),
        "undial": L.undial_loss(logits, ref, labels),
        "ceu": L.ceu_loss(logits, labels),
        "rmu": L.activation_loss(logits[:, :-1], torch.full((9,), 2.0), mask),
    }
    assert expected.keys() == found.keys() == L.FORGET_LOSSES.keys()
    for name in expected:
        assert found[name].item() == pytest.approx(expected[name].item(), rel=1e-10), name
