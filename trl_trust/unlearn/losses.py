"""Ten forget losses and three retain losses, pure functions of log-probabilities, logits or activations.

Formulas of `locuslab/open-unlearning` (MIT; formulas only). B sequences, T positions (shifted: position t holds what
is said of token t), V words, H hidden. `mask` (B, T) is 1 on answer tokens. `logps` are natural logarithms.

Every forget loss is to be minimized. [`FORGET_LOSSES`] says which of them need a reference model or a second answer,
and their defaults.
"""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class ForgetLoss:
    """What a forget loss needs, and its defaults where they differ from `gamma=1, alpha=1`.

    Attributes:
        reference: whether it reads a frozen copy of the model before unlearning.
        alternate: whether it reads a second answer to each question.
        reads: those of `beta`, `beta1`, `beta2`, `delta` that it reads.
        defaults: setting -> default.
    """

    reference: bool = False
    alternate: bool = False
    reads: tuple[str, ...] = ()
    defaults: tuple[tuple[str, float], ...] = ()


FORGET_LOSSES: dict[str, ForgetLoss] = {
    "ga": ForgetLoss(defaults=(("alpha", 0.0),)),
    "graddiff": ForgetLoss(),
    "npo": ForgetLoss(reference=True, reads=("beta",), defaults=(("beta", 0.1),)),
    "simnpo": ForgetLoss(reads=("beta", "delta"), defaults=(("beta", 4.5), ("delta", 0.0), ("gamma", 0.125))),
    "dpo": ForgetLoss(reference=True, alternate=True, reads=("beta",), defaults=(("beta", 0.1),)),
    "wga": ForgetLoss(reads=("beta",), defaults=(("beta", 1.0), ("gamma", 0.1))),
    "satimp": ForgetLoss(reads=("beta1", "beta2"), defaults=(("beta1", 5.0), ("beta2", 1.0), ("gamma", 0.1))),
    "undial": ForgetLoss(reference=True, reads=("beta",), defaults=(("beta", 10.0), ("alpha", 0.0))),
    "ceu": ForgetLoss(defaults=(("alpha", 0.0),)),
    "rmu": ForgetLoss(reference=True),
}


def answer_logps(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """Log-probabilities (B, T-1) of the labels, 0 where they are -100, and their mask (B, T-1), in float32 or above.

    Args:
        logits: (B, T, V) as a model returns them.
        labels: (B, T), -100 where nothing is asked.
    """
    labels, logits = labels[:, 1:], logits[:, :-1]
    mask = labels != -100
    logits = logits if logits.dtype == torch.float64 else logits.float()
    logps = logits.log_softmax(-1).gather(-1, labels.clamp(min=0)[..., None])[..., 0]
    return logps.masked_fill(~mask, 0.0), mask.to(logps.dtype)


def token_mean(x: Tensor, mask: Tensor) -> Tensor:
    """Mean of x (B, T) over answer tokens, 0-d."""
    return (x * mask).sum() / mask.sum().clamp(min=1.0)


def nll_loss(logps: Tensor, mask: Tensor) -> Tensor:
    """Mean negative log-probability of the answer tokens, in nats: the retain loss."""
    return token_mean(-logps, mask)


def ga_loss(logps: Tensor, mask: Tensor) -> Tensor:
    """Gradient ascent: the negative of [`nll_loss`]. GradDiff is this beside a retain loss."""
    return -nll_loss(logps, mask)


def npo_loss(logps: Tensor, ref_logps: Tensor, mask: Tensor, *, beta: float = 0.1) -> Tensor:
    """NPO (arXiv 2404.05868): `-(2/beta) log sigmoid(-beta (logp - logp_ref))`, sums over each answer."""
    ratio = ((logps - ref_logps) * mask).sum(1)  # (B,)
    return -(2 / beta) * F.logsigmoid(-beta * ratio).mean()


def simnpo_loss(logps: Tensor, mask: Tensor, *, beta: float = 4.5, delta: float = 0.0) -> Tensor:
    """SimNPO (arXiv 2410.07163): `-(2/beta) log sigmoid(beta (mean nll - delta))`, one mean an answer."""
    nll = -(logps * mask).sum(1) / mask.sum(1).clamp(min=1.0)  # (B,)
    return -(2 / beta) * F.logsigmoid(beta * (nll - delta)).mean()


def dpo_loss(
    win_logps: Tensor,
    win_ref_logps: Tensor,
    win_mask: Tensor,
    logps: Tensor,
    ref_logps: Tensor,
    mask: Tensor,
    *,
    beta: float = 0.1,
) -> Tensor:
    """DPO with the answer to forget as the losing one: `-(2/beta) log sigmoid(beta (win - lose log-ratio))`."""
    win = ((win_logps - win_ref_logps) * win_mask).sum(1)  # (B,)
    lose = ((logps - ref_logps) * mask).sum(1)
    return -(2 / beta) * F.logsigmoid(beta * (win - lose)).mean()


def wga_loss(logps: Tensor, mask: Tensor, *, beta: float = 1.0) -> Tensor:
    """WGA (arXiv 2502.19301): gradient ascent weighted by `p^beta`, the weight detached."""
    return -token_mean((beta * logps.detach()).exp() * -logps, mask)


def satimp_loss(logps: Tensor, mask: Tensor, *, beta1: float = 5.0, beta2: float = 1.0) -> Tensor:
    """SatImp (arXiv 2505.11953): gradient ascent weighted by `p^beta1 (1-p)^beta2`, the weight detached."""
    p = logps.detach().exp()
    return -token_mean(p**beta1 * (1 - p) ** beta2 * -logps, mask)


def undial_loss(logits: Tensor, ref_logits: Tensor, labels: Tensor, *, beta: float = 10.0) -> Tensor:
    """UNDIAL (arXiv 2402.10052): cross-entropy to the reference with the true token's logit lowered by `beta`.

    Args: logits, ref_logits: (B, T, V) as models return them; labels: (B, T).
    """
    labels, logits, ref_logits = labels[:, 1:], logits[:, :-1], ref_logits[:, :-1]
    target = F.one_hot(labels.clamp(min=0), logits.shape[-1])
    soft = (ref_logits - beta * target).softmax(-1)
    return token_mean(-(soft * logits.log_softmax(-1)).sum(-1), (labels != -100).to(logits.dtype))


def ceu_loss(logits: Tensor, labels: Tensor, *, skip: int = 1) -> Tensor:
    """CE-U (arXiv 2503.01224): cross-entropy to the model's own distribution without the true token, detached.

    The first `skip` tokens of each answer are left out.
    """
    labels, logits = labels[:, 1:], logits[:, :-1]
    mask = labels != -100
    mask = (mask & (mask.cumsum(1) > skip)).to(logits.dtype)
    target = F.one_hot(labels.clamp(min=0), logits.shape[-1]).bool()
    soft = logits.detach().masked_fill(target, -torch.inf).softmax(-1)
    return token_mean(-(soft * logits.log_softmax(-1)).sum(-1), mask)


def activation_loss(activation: Tensor, target: Tensor, mask: Tensor) -> Tensor:
    """RMU (arXiv 2403.03218): mean squared difference of a layer's output (B, T, H) to `target`.

    The target is `scale * u`, u a fixed random unit vector, on what is to be forgotten, and the reference's output on
    what is retained. The mean is taken within a sequence first; one without answer tokens counts 0.
    """
    squares = ((activation - target) ** 2).mean(-1)  # (B, T)
    return ((squares * mask).sum(1) / mask.sum(1).clamp(min=1.0)).mean()


def kl_loss(logits: Tensor, other: Tensor, labels: Tensor) -> Tensor:
    """KL(logits' distribution || other's) in nats, (B, T, V) each, mean over answer tokens."""
    logps, other_logps = logits[:, :-1].log_softmax(-1), other[:, :-1].log_softmax(-1)
    mask = (labels[:, 1:] != -100).to(logps.dtype)
    return token_mean((logps.exp() * (logps - other_logps)).sum(-1), mask)
