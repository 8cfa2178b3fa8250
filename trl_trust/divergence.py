"""Kullback-Leibler divergence and total variation of two policies, over the whole vocabulary.

What a trust region bounds and what compression costs are the same two numbers, so they are written once. In float64:
in float32 a divergence under 1e-6 is noise. The estimates from sampled tokens alone are elsewhere: k3 in the trainers'
telemetry, the two-outcome divergences in `policy.dppo`, which these bound from above.
"""

import torch
from torch import Tensor


def kl_divergence(logits: Tensor, other_logits: Tensor) -> Tensor:
    """KL(p || q) in nats, `sum p (ln p - ln q)`, p and q the softmax of the two.

    Args:
        logits, other_logits: (..., V), any real dtype; log-probabilities will do. `-inf` is a token without
            probability: it adds nothing where p has none, and infinity where only q has none.

    Returns:
        (...) float64, >= 0 (what rounding leaves below 0 is 0), exactly 0 for equal inputs.
    """
    logps, other_logps = _log_softmax(logits, other_logits)
    terms = torch.where(logps == -torch.inf, 0.0, logps.exp() * (logps - other_logps))  # (..., V)
    return terms.sum(-1).clamp(min=0.0)


def total_variation(logits: Tensor, other_logits: Tensor) -> Tensor:
    """TV(p, q) = `1/2 sum |p - q|`, in [0, 1]. Arguments and shape as [`kl_divergence`]; TV <= sqrt(KL / 2)."""
    logps, other_logps = _log_softmax(logits, other_logits)
    return 0.5 * (logps.exp() - other_logps.exp()).abs().sum(-1)


def _log_softmax(logits: Tensor, other_logits: Tensor) -> tuple[Tensor, Tensor]:
    if logits.shape != other_logits.shape:
        raise ValueError(f"the two policies differ in shape: {tuple(logits.shape)} and {tuple(other_logits.shape)}")
    return torch.log_softmax(logits.double(), -1), torch.log_softmax(other_logits.double(), -1)
