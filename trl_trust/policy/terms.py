"""What a policy term sees and returns, and the pieces that several terms are made of. Tensors only: no trainer here.

A method's loss is a pure function `name_loss(batch: PolicyBatch, *, ...) -> PolicyLoss`.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor


# |log ratio| beyond which exp() is capped in telemetry and in methods whose spec allows it: e^20 is 5e8.
LOG_RATIO_LIMIT = 20.0


# --------------------------------------------------------------------------------------------------------------------
# What a policy term sees and returns
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class PolicyBatch:
    """What a policy term may read. B responses, T completion tokens; only `logps` (and `entropies`) carry gradient.

    Attributes:
        logps: (B, T) log-probabilities of the sampled tokens under the policy being trained.
        old_logps: (B, T) the same under the policy at generation time, as the trainer computed it.
        mask: (B, T) 1 where a token counts: inside the completion, and written by the model rather than by a tool.
        advantages: (B, 1), or (B, T) from subclasses that give one per token.
        entropies: (B, T) entropy of the next-token distribution at each position, in nats.
        ref_logps: (B, T) under the reference model; `None` when `beta` is 0 and the method does not need it.
        sampling_logps: (B, T) as reported by the sampler (vLLM), NaN where it could not score a token; `None` without.
        rewards: (B,) weighted sum of the rewards, NaN where no reward function scored the response.
        group: (B,) index of the prompt a response answers, within the generation batch and over all processes.
        extras: row tensors that the method added in [`TrustGRPOTrainer.extend_rollouts`], by name.
    """

    logps: Tensor
    old_logps: Tensor
    mask: Tensor
    advantages: Tensor
    entropies: Tensor | None = None
    ref_logps: Tensor | None = None
    sampling_logps: Tensor | None = None
    rewards: Tensor | None = None
    group: Tensor | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)

    def __post_init__(self):
        shape, rows = self.logps.shape, self.logps.shape[:1]
        expected = dict.fromkeys(("old_logps", "mask", "entropies", "ref_logps", "sampling_logps"), (shape,))
        expected |= {"advantages": ((*rows, 1), shape), "rewards": (rows,), "group": (rows,)}
        for name, shapes in expected.items():
            x = getattr(self, name)
            if x is not None and x.shape not in shapes:
                wanted = " or ".join(str(tuple(s)) for s in shapes)
                raise ValueError(f"{name} has shape {tuple(x.shape)}, but logps {tuple(shape)}: expected {wanted}.")

    @property
    def sampler_logps(self) -> Tensor:
        """(B, T) log-probabilities under the policy that generated: the sampler's where known, else `old_logps`."""
        if self.sampling_logps is None:
            return self.old_logps
        return torch.where(self.sampling_logps.isnan(), self.old_logps, self.sampling_logps)


@dataclass(frozen=True)
class PolicyLoss:
    """What a policy term returns.

    Attributes:
        per_token_loss: (B, T), or (B, 1) when a response is one action. Positions outside the mask may hold anything
            finite.
        metrics: name to tensor. A (B, T) tensor is averaged over the live tokens, a (B, 1) tensor over the responses,
            a 0-d tensor over processes; where the name ends in `min` or `max`, the extremum is taken instead. NaN
            entries do not count. Names must not depend on the data: every process has to report the same ones.
        batch_loss: 0-d term for losses that are no sum over rows (pairwise ones). It is added after aggregation and
            divided by the number of accumulated micro-batches; masks and corrections do not touch it.
    """

    per_token_loss: Tensor
    metrics: Mapping[str, Tensor] = field(default_factory=dict)
    batch_loss: Tensor | None = None


# --------------------------------------------------------------------------------------------------------------------
# The clipped term that GRPO, GSPO and several methods share
# --------------------------------------------------------------------------------------------------------------------


def clipped_surrogate(
    ratio: Tensor, advantages: Tensor, low: float | Tensor, high: float | Tensor, delta: float | None = None
) -> Tensor:
    """PPO's pessimistic surrogate, as a loss: `-min(min(ratio, delta) A, clip(ratio, 1 - low, 1 + high) A)`.

    Args:
        ratio: (B, T) or (B, 1).
        advantages: broadcastable to `ratio`.
        low, high: widths below and above 1, a number or a tensor broadcastable to `ratio`.
        delta: cap of the unclipped branch (two-sided clipping, INTELLECT-2); `None` for none.
    """
    clipped = torch.clamp(ratio, 1 - low, 1 + high)
    if delta is not None:
        ratio = torch.clamp(ratio, max=delta)
    return -torch.min(ratio * advantages, clipped * advantages)


def sequence_mean(x: Tensor, mask: Tensor) -> Tensor:
    """(B, T) to (B, 1): mean of `x` over each response's live tokens, 0 for a response without any."""
    return (x * mask).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1.0)


def importance_ratio(logps: Tensor, old_logps: Tensor) -> Tensor:
    """`exp(logps - old_logps)`, the exponent held within `LOG_RATIO_LIMIT`, beyond which it has no gradient."""
    return torch.exp((logps - old_logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))


def k3(log_ratio: Tensor) -> Tensor:
    """`exp(d) - 1 - d` of d = log new - log old: estimates KL(old || new) from what old drew; never negative."""
    return torch.exp(log_ratio) - 1 - log_ratio


def beyond(ratio: Tensor, advantages: Tensor, low: float | Tensor, high: float | Tensor) -> Tensor:
    """Where [`clipped_surrogate`] has no gradient, bool: beyond the band on the side that the advantage pushes to."""
    return ((ratio > 1 + high) & (advantages > 0)) | ((ratio < 1 - low) & (advantages < 0))


def clip_ratios(ratio: Tensor, batch: PolicyBatch, low: float | Tensor, high: float | Tensor) -> dict[str, Tensor]:
    """The metrics `clip_ratio/*` as TRL logs them, for [`clipped_surrogate`] of `ratio`, (B, T) or (B, 1)."""
    too_low = ((ratio < 1 - low) & (batch.advantages < 0)).float()
    too_high = ((ratio > 1 + high) & (batch.advantages > 0)).float()
    # NaN, not 0, for an empty response: it has no clip ratio that could be the smallest
    by_sequence = lambda x: x if x.shape[1] == 1 else (x * batch.mask).sum(-1, keepdim=True) / batch.mask.sum(-1, True)
    return {
        "clip_ratio/low_mean": too_low,
        "clip_ratio/high_mean": too_high,
        "clip_ratio/region_mean": too_low + too_high,
        "clip_ratio/low_min": by_sequence(too_low),
        "clip_ratio/high_max": by_sequence(too_high),
    }


def grpo_loss(
    batch: PolicyBatch,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    delta: float | None = None,
    importance_sampling_level: str = "token",
) -> PolicyLoss:
    """GRPO's clipped term (arXiv 2402.03300, eq. 3), or GSPO's (2507.18071) at `importance_sampling_level="sequence"`.

    It is TRL's own term in the shape of this package: the proof that the base loses nothing, and what other methods
    reduce to. Metrics: `clip_ratio/{low_mean,low_min,high_mean,high_max,region_mean}`, as TRL logs them.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    log_ratio = batch.logps - batch.old_logps  # (B, T)
    if importance_sampling_level == "sequence":
        log_ratio = sequence_mean(log_ratio, batch.mask)  # (B, 1)
    ratio = torch.exp(log_ratio)

    capped = ratio if delta is None else torch.clamp(ratio, max=delta)
    return PolicyLoss(
        clipped_surrogate(ratio, batch.advantages, epsilon, epsilon_high, delta),
        clip_ratios(capped, batch, epsilon, epsilon_high),
    )
