"""DPPO: a divergence ball instead of a ratio clip (arXiv 2602.04879).

Nearest TRL losses: the clipped `dapo`/`grpo` term for the rule that drops tokens, `cispo` for the form of the
gradient. DPPO drops a token when an estimate of the *divergence* between the trained and the sampling policy exceeds a
threshold in the direction the advantage pushes, instead of when the *ratio* leaves a band: rare tokens are freed,
frequent ones held.

Provenance: **exact** for Binary-TV and Binary-KL, from the authors' code (`sail-sg/Stable-RL`, and
`verl-project/verl`: `dppo_tv`, `dppo_kl`); thresholds and ratio cap from the verl example and TRL's removed trainer
(paper, Section 5.4 and Appendix F). `surrogate="ratio"`, `mask_mode="symmetric"` and `log_ratio_penalty` come from
other codebases (SkyRL, prime-rl).
"""

import math
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..settings import NonNegative, Positive, setting
from .base import LOG_RATIO_LIMIT, PolicyBatch, PolicyLoss, TrustGRPOConfig, TrustGRPOTrainer, paper


DEFAULT_DELTA = {"tv": 0.15, "kl": 0.05}  # in probability, in nats


def binary_divergence(logps: Tensor, mu_logps: Tensor, divergence: str) -> Tensor:
    """(B, T) divergence of the two-outcome laws "this token" and "any other": |pi - mu|, or KL(mu || pi)."""
    if divergence == "tv":
        return (logps.exp() - mu_logps.exp()).abs()
    # 1 - p as -expm1(log p): near p = 1 the plain difference has no correct digit
    other_pi, other_mu = -torch.expm1(logps), -torch.expm1(mu_logps)
    return mu_logps.exp() * (mu_logps - logps) + other_mu * torch.log((other_mu + 1e-8) / (other_pi + 1e-8))


def dppo_loss(
    batch: PolicyBatch,
    *,
    divergence: str = "tv",
    delta_low: float | None = None,
    delta_high: float | None = None,
    ratio_cap: float | None = 20.0,
    surrogate: str = "logp",
    anchor: str = "auto",
    mask_mode: str = "directional",
    log_ratio_penalty: float = 0.0,
) -> PolicyLoss:
    """`-keep A sg[min(ratio, cap)] logps` (`surrogate="logp"`) or `-keep A ratio` (`"ratio"`).

    With mu the anchor (the sampler where it reported log-probabilities, else the old policy) and D the binary
    divergence, a token is dropped when it moved with its advantage and too far: A > 0, pi > mu, D > `delta_high`, or
    A < 0, pi < mu, D > `delta_low`. The comparisons are strict. Dropped tokens have exactly zero gradient, save for
    the penalty `log_ratio_penalty (logps - mu_logps)^2`, which all live tokens pay.

    Args:
        delta_low, delta_high: thresholds; `None` is 0.15 for TV and 0.05 for KL.
        anchor: `"auto"`, `"sampling"` (the same here: the config refuses it without a sampler) or `"old"`.
        mask_mode: `"symmetric"` ignores the sign of A: `delta_high` for pi > mu, `delta_low` for pi < mu.

    Returns:
        per-token loss (B, T); metrics `dppo/mask_ratio/{pos,neg,all}` (dropped over live tokens),
        `dppo/divergence/{mean,max}`, `dppo/prob_diff/{min,max}` (pi - mu), `dppo/ratio/capped` (kept, beyond the cap).
    """
    delta_low = DEFAULT_DELTA[divergence] if delta_low is None else delta_low
    delta_high = DEFAULT_DELTA[divergence] if delta_high is None else delta_high
    advantages = batch.advantages  # (B, 1) or (B, T)
    mu_logps = batch.old_logps if anchor == "old" else batch.sampler_logps  # (B, T)
    pi_logps = batch.logps.detach()

    prob_diff = pi_logps.exp() - mu_logps.exp()
    distance = binary_divergence(pi_logps, mu_logps, divergence)
    too_high, too_low = (prob_diff > 0) & (distance > delta_high), (prob_diff < 0) & (distance > delta_low)
    if mask_mode == "directional":
        drop = (too_high & (advantages > 0)) | (too_low & (advantages < 0))
    else:
        drop = too_high | too_low
    keep = (~drop).to(pi_logps.dtype)  # (B, T)

    log_ratio = batch.logps - mu_logps
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))  # (B, T)
    cap = math.inf if ratio_cap is None else ratio_cap
    capped = ratio.detach() > cap
    if surrogate == "logp":
        weight = ratio.detach().clamp(max=cap)
        per_token_loss = -keep * advantages * weight * batch.logps
    else:
        per_token_loss = -keep * advantages * ratio
    if log_ratio_penalty:
        per_token_loss = per_token_loss + log_ratio_penalty * log_ratio.square()

    return PolicyLoss(
        per_token_loss,
        {
            "dppo/mask_ratio/pos": (drop & (advantages > 0)).float(),
            "dppo/mask_ratio/neg": (drop & (advantages < 0)).float(),
            "dppo/mask_ratio/all": drop.float(),
            "dppo/divergence/mean": distance,
            "dppo/divergence/max": distance,
            "dppo/prob_diff/min": prob_diff,
            "dppo/prob_diff/max": prob_diff,
            "dppo/ratio/capped": (capped & ~drop).float(),
        },
    )


@dataclass
class DPPOConfig(TrustGRPOConfig):
    r"""
    Configuration of [`DPPOTrainer`]: every field of [`TrustGRPOConfig`], and the divergence ball.

    Raises:
        ValueError: for values outside the above, `anchor="sampling"` without `use_vllm`, or `epsilon`, `epsilon_high`,
            `delta` or `importance_sampling_level` other than TRL's default.
    """

    unread_fields: ClassVar[dict[str, str]] = {
        "epsilon": "the thresholds are `delta_low` and `delta_high` (TRL's removed DPPOTrainer read `epsilon`)",
        "epsilon_high": "the thresholds are `delta_low` and `delta_high`",
        "delta": "the ratio is truncated by `ratio_cap`",
        "importance_sampling_level": "DPPO drops single tokens",
    }

    divergence: Literal["tv", "kl"] = setting(
        "tv", "Divergence between trained and sampling policy: total variation or KL, both of the two-outcome laws."
    )
    delta_low: NonNegative | None = setting(
        None, "Threshold of the divergence where A < 0. Default: 0.15 (tv, in probability), 0.05 (kl, in nats)."
    )
    delta_high: NonNegative | None = setting(
        None, "Threshold of the divergence where A > 0. Default: 0.15 (tv, in probability), 0.05 (kl, in nats)."
    )
    ratio_cap: Positive | None = setting(
        20.0, "Truncation of the detached importance ratio. None: off. Leave it out with `surrogate='ratio'`."
    )
    surrogate: Literal["logp", "ratio"] = setting(
        "logp", "Form of a kept token's term: detached ratio times log-probability, or the live ratio."
    )
    anchor: Literal["auto", "sampling", "old"] = setting(
        "auto",
        "Policy that ratio and divergence are taken to: the sampler where it reports log-probabilities (vLLM), else "
        "the old policy; the sampler, required; or the trainer's recomputation, which the paper calls misspecified.",
    )
    mask_mode: Literal["directional", "symmetric"] = setting(
        "directional", "Drop only tokens that moved with their advantage, or whatever its sign."
    )
    log_ratio_penalty: NonNegative = setting(
        0.0, "Weight of the squared log-ratio on every live token (prime-rl: 1e-3)."
    )

    @property
    def anchors_on_sampler(self) -> bool:
        return self.anchor != "old"

    def validate(self) -> None:
        super().validate()
        self.require(
            self.surrogate == "logp" or self.ratio_cap in (None, 20.0),
            "ratio_cap",
            "truncates a detached ratio: with surrogate='ratio' leave it out",
        )
        self.require(
            self.anchor != "sampling" or self.use_vllm,
            "anchor",
            "needs the sampler's log-probabilities: set use_vllm=True or anchor='auto'",
        )


class DPPOTrainer(TrustGRPOTrainer):
    """
    GRPO with DPPO's policy term (arXiv 2602.04879): a divergence ball instead of a ratio clip. See [`dppo_loss`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is a [`DPPOConfig`], or a `GRPOConfig` for the defaults.
    """

    config_class = DPPOConfig
    _name = "DPPO"
    _tag_names = ["trl", "trl-trust", "dppo"]
    _paper = paper(
        "Rethinking the Trust Region in LLM Reinforcement Learning",
        "2602.04879",
        "Penghui Qi and Xiangxin Zhou and Zichen Liu and Tianyu Pang and Chao Du and Min Lin and Wee Sun Lee",
    )

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        return dppo_loss(batch, **self.settings(dppo_loss))
