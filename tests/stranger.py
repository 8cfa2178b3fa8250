"""Cautious GRPO: GRPO's clip, under which tokens count less where the policy is sure.

Nearest TRL loss: `loss_type="dapo"`. Two lines of it are changed. Provenance: inspired, and nobody's paper: a
method as small as can be, which `test_owed.py` adds to the package to see what else is asked for.
"""

from dataclasses import dataclass

from trl_trust.policy.base import PolicyBatch, PolicyLoss, TrustGRPOConfig, TrustGRPOTrainer, grpo_loss, paper
from trl_trust.settings import Fraction, setting


def cautious_loss(
    batch: PolicyBatch, *, epsilon: float = 0.2, epsilon_high: float | None = None, sure_weight: float = 0.5
) -> PolicyLoss:
    """GRPO's clipped term times `sure_weight + (1 - sure_weight) min(entropy, 1)`, (B, T)."""
    loss = grpo_loss(batch, epsilon=epsilon, epsilon_high=epsilon_high)
    weight = sure_weight + (1 - sure_weight) * batch.entropies.detach().clamp(max=1.0)  # (B, T)
    return PolicyLoss(weight * loss.per_token_loss, {**loss.metrics, "cautious/weight": weight})


@dataclass
class CautiousConfig(TrustGRPOConfig):
    """
    Configuration of [`CautiousTrainer`]: every field of [`TrustGRPOConfig`], and the weight.

    Raises:
        ValueError: at construction, naming field, value and mend.
    """

    sure_weight: Fraction = setting(0.5, "Weight of a token of which the policy is sure.")


class CautiousTrainer(TrustGRPOTrainer):
    """GRPO with cautious weights. See [`cautious_loss`]."""

    config_class = CautiousConfig
    _name = "Cautious GRPO"
    _tag_names = ["trl", "trl-trust", "cautious"]
    _paper = paper("Cautious Policy Optimization", "2602.99999", "A. Stranger")

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        return cautious_loss(batch, **self.settings(cautious_loss))
