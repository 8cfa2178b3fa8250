"""DHPO: token and sequence ratios in one clipped surrogate (arXiv 2601.05607).

Nearest TRL losses: the clipped `grpo`/`dapo` term with `importance_sampling_level="token"` (GRPO) and `"sequence"`
(GSPO). DHPO mixes the two ratios with a weight per token, after each was clipped in a band of its own.

Provenance: **structure confirmed**. The abstract confirms the weighted mix inside one clipped surrogate, the two
weightings (averaged, entropy-guided) and that each ratio is limited in its own region before mixing. That the entropy
is a constant comes from a third-party note. The place of the minimum, the map from entropy to weight and its
direction, the gradient of the sequence branch and all widths are reconstructions, hence switches; the sequence widths
are GSPO's.
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..settings import Fraction, Width, require, setting
from .base import (
    PolicyBatch,
    PolicyLoss,
    TrustGRPOConfig,
    TrustGRPOTrainer,
    clipped_surrogate,
    paper,
    sequence_mean,
)


def entropy_weight(entropies: Tensor, mask: Tensor, normalizer: str, vocab_size: int | None = None) -> Tensor:
    """(B, T) entropies as constants in [0, 1]; 0 outside the mask, which has no say in the normaliser either.

    Args:
        normalizer: `"response_max"` and `"batch_max"` divide by the largest entropy of the response or the
            micro-batch, `"min_max"` stretches the micro-batch's range to [0, 1], `"log_vocab"` divides by
            log(`vocab_size`).
    """
    entropies, live = entropies.detach(), mask > 0
    low, high = 0.0, entropies.masked_fill(~live, 0.0)  # an entropy is never negative
    if normalizer == "response_max":
        high = high.amax(1, keepdim=True)  # (B, 1)
    elif normalizer == "log_vocab":
        high = math.log(vocab_size)
    else:
        high = high.max()
        low = entropies.masked_fill(~live, math.inf).min() if normalizer == "min_max" else low
    return torch.where(live, (entropies - low) / (high - low + 1e-8), 0.0)


def dhpo_loss(
    batch: PolicyBatch,
    vocab_size: int | None = None,
    *,
    mixing: str = "average",
    token_weight: float = 0.5,
    entropy_to: str = "token",
    entropy_normalizer: str = "response_max",
    variant: str = "joint_min",
    sequence_gradient: str = "token",
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    epsilon_sequence_low: float = 3e-4,
    epsilon_sequence_high: float = 4e-4,
) -> PolicyLoss:
    """`-min(m A, m_bar A)`, m and m_bar the mixes `w token + (1 - w) sequence` of the ratios and the clipped ratios.

    Args:
        vocab_size: needed for `entropy_normalizer="log_vocab"`.
        mixing: w is `token_weight` (`"average"`) or follows [`entropy_weight`] (`"entropy"`, needs `batch.entropies`),
            up with entropy (`entropy_to="token"`) or down (`"sequence"`).
        variant: `"joint_min"` as above; `"per_branch_min"`, the mix of each ratio's own minimum, an objective that is
            never larger; `"clip_only"`, `-m_bar A`.
        sequence_gradient: the gradient of the sequence ratio goes to the token whose loss it is in (`"token"`) or to
            all tokens of the response (`"direct"`); its value is the same.

    Returns:
        per-token loss (B, T); metrics `dhpo/weight/mean` (and `std` over the micro-batch, for entropy mixing),
        `dhpo/clip_ratio/token` and `dhpo/clip_ratio/sequence` (tokens and responses whose branch is beyond its band on
        the side that cuts the gradient), `dhpo/clip_ratio/both` (tokens that lost both branches),
        `dhpo/ratio/{token,sequence}_mean`.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    advantages = batch.advantages  # (B, 1) or (B, T)
    log_ratio = batch.logps - batch.old_logps
    ratio = torch.exp(log_ratio)  # (B, T)
    sequence_ratio = torch.exp(sequence_mean(log_ratio, batch.mask))  # (B, 1)
    if sequence_gradient == "token":
        s = sequence_ratio.detach() * torch.exp(batch.logps - batch.logps.detach())  # (B, T)
    else:
        s = sequence_ratio.expand_as(ratio)

    if mixing == "average":
        w = torch.full_like(ratio, token_weight)
    else:
        w = entropy_weight(batch.entropies, batch.mask, entropy_normalizer, vocab_size)
        w = w if entropy_to == "token" else 1 - w
    mix = lambda token, sequence: w * token + (1 - w) * sequence  # (B, T)

    if variant == "per_branch_min":
        token_loss = clipped_surrogate(ratio, advantages, epsilon, epsilon_high)
        sequence_loss = clipped_surrogate(s, advantages, epsilon_sequence_low, epsilon_sequence_high)
        per_token_loss = mix(token_loss, sequence_loss)
    else:
        clipped = mix(
            torch.clamp(ratio, 1 - epsilon, 1 + epsilon_high),
            torch.clamp(s, 1 - epsilon_sequence_low, 1 + epsilon_sequence_high),
        )
        objective = clipped * advantages
        if variant == "joint_min":
            objective = torch.min(mix(ratio, s) * advantages, objective)
        per_token_loss = -objective

    beyond = lambda r, low, high: ((r > 1 + high) & (advantages > 0)) | ((r < 1 - low) & (advantages < 0))
    token_cut = beyond(ratio, epsilon, epsilon_high)
    sequence_cut = beyond(sequence_ratio, epsilon_sequence_low, epsilon_sequence_high)
    metrics = {
        "dhpo/weight/mean": w,
        "dhpo/clip_ratio/token": token_cut.float(),
        "dhpo/clip_ratio/sequence": sequence_cut.float(),
        "dhpo/clip_ratio/both": (token_cut & sequence_cut).float(),
        "dhpo/ratio/token_mean": ratio,
        "dhpo/ratio/sequence_mean": sequence_ratio,
    }
    if mixing == "entropy":
        live = batch.mask.sum()  # NaN, i.e. not counted, without live tokens
        mean = (w * batch.mask).sum() / live
        metrics["dhpo/weight/std"] = ((w - mean).square() * batch.mask).sum().div(live).sqrt()  # 0-d
    return PolicyLoss(per_token_loss, metrics)


@dataclass
class DHPOConfig(TrustGRPOConfig):
    r"""
    Configuration of [`DHPOTrainer`]: every field of [`TrustGRPOConfig`], the mix of the two ratios and their bands.

    `epsilon` and `epsilon_high` are the band of the token ratio.

    Raises:
        ValueError: for values outside the above, `epsilon` outside [0, 1], `epsilon_high` below 0, or `delta` or
            `importance_sampling_level` other than TRL's default.
    """

    unread_fields: ClassVar[dict[str, str]] = {
        "delta": "each branch has its own band, `epsilon_high` and `epsilon_sequence_high`",
        "importance_sampling_level": "DHPO contains both levels, mixed by `token_weight`",
    }

    mixing: Literal["average", "entropy"] = setting(
        "average", "Source of the token branch's weight: `token_weight`, or the entropy."
    )
    token_weight: Fraction = setting(0.5, "Weight of the token branch with `mixing='average'`. 1: GRPO, 0: GSPO.")
    entropy_to: Literal["token", "sequence"] = setting(
        "token", "Branch that gains where the policy is uncertain. The direction is a guess."
    )
    entropy_normalizer: Literal["response_max", "batch_max", "min_max", "log_vocab"] = setting(
        "response_max",
        "What entropies are divided by: the largest of the response or of the micro-batch, the micro-batch's range, "
        "or log of the vocabulary. `batch_max` and `min_max` depend on how rows are split into micro-batches and "
        "processes; `log_vocab` gives weights near 0 for language models.",
    )
    variant: Literal["joint_min", "per_branch_min", "clip_only"] = setting(
        "joint_min", "Minimum of the mixes, mix of the minima, or the clipped mix alone."
    )
    sequence_gradient: Literal["token", "direct"] = setting(
        "token", "Gradient of the sequence ratio: to each loss's own token, or to all tokens of the response."
    )
    epsilon_sequence_low: Fraction = setting(
        3e-4, "Width of the sequence band below 1. GSPO's published value, not DHPO's."
    )
    epsilon_sequence_high: Width = setting(
        4e-4, "Width of the sequence band above 1; `inf`: none. GSPO's published value, not DHPO's."
    )
    entropy_normaliser: str | None = setting(None, "Older spelling of `entropy_normalizer`.")

    old_names: ClassVar[dict[str, str]] = {"entropy_normaliser": "entropy_normalizer"}

    def validate(self) -> None:
        super().validate()
        require("epsilon", self.epsilon, Fraction)


class DHPOTrainer(TrustGRPOTrainer):
    """
    GRPO with DHPO's policy term (arXiv 2601.05607): token and sequence ratios, each in its band. See [`dhpo_loss`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is a [`DHPOConfig`], or a `GRPOConfig` for the defaults.
    """

    config_class = DHPOConfig
    _name = "DHPO"
    _tag_names = ["trl", "trl-trust", "dhpo"]
    _paper = paper(
        "Orchestrating Tokens and Sequences: Dynamic Hybrid Policy Optimization for RLVR",
        "2601.05607",
        "Zijun Min and Bingshuai Liu and Ante Wang and Long Zhang and Anxiang Zeng and Haibo Zhang and Jinsong Su",
    )

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        vocab_size = self.model.config.get_text_config().vocab_size
        return dhpo_loss(batch, vocab_size, **self.settings(dhpo_loss))
