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
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor

from .base import LOG_RATIO_LIMIT, PolicyBatch, PolicyLoss, TrustGRPOConfig, TrustGRPOTrainer, is_number, paper


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

    Parameters:
        divergence (`str`, *optional*, defaults to `"tv"`):
            Estimate of the divergence: `"tv"` (total variation) or `"kl"`, both of the two-outcome laws.
        delta_low (`float`, *optional*):
            Threshold for A < 0, >= 0. `None`: 0.15 (`tv`, in probability), 0.05 (`kl`, in nats).
        delta_high (`float`, *optional*):
            Threshold for A > 0, >= 0. `None`: as `delta_low`.
        ratio_cap (`float`, *optional*, defaults to `20.0`):
            Truncation of the detached ratio, > 0. `None`: off. With `surrogate="ratio"` only the default or `None`.
        surrogate (`str`, *optional*, defaults to `"logp"`):
            `"logp"`: detached ratio times log-probability. `"ratio"`: the live ratio.
        anchor (`str`, *optional*, defaults to `"auto"`):
            Policy that ratio and divergence are taken to. `"auto"`: the sampler where it reports log-probabilities
            (vLLM), else the old policy. `"sampling"`: the sampler, required. `"old"`: the trainer's recomputation,
            which the paper calls misspecified; then the vLLM correction is applied as usual.
        mask_mode (`str`, *optional*, defaults to `"directional"`):
            `"symmetric"` drops whatever the sign of the advantage.
        log_ratio_penalty (`float`, *optional*, defaults to `0.0`):
            Weight, >= 0, of the squared log-ratio, on every live token.

    Raises:
        ValueError: for values outside the above, `anchor="sampling"` without `use_vllm`, or `epsilon`, `epsilon_high`,
            `delta` or `importance_sampling_level` other than TRL's default.
    """

    unread_fields: ClassVar[dict[str, str]] = {
        **TrustGRPOConfig.unread_fields,
        "epsilon": "the thresholds are `delta_low` and `delta_high` (TRL's removed DPPOTrainer read `epsilon`)",
        "epsilon_high": "the thresholds are `delta_low` and `delta_high`",
        "delta": "the ratio is truncated by `ratio_cap`",
        "importance_sampling_level": "DPPO drops single tokens",
    }

    divergence: str = field(
        default="tv",
        metadata={"help": "Divergence between trained and sampling policy: binary TV or KL.", "choices": ["tv", "kl"]},
    )
    delta_low: float | None = field(
        default=None, metadata={"help": "Threshold of the divergence where A < 0. Default: 0.15 (tv), 0.05 (kl)."}
    )
    delta_high: float | None = field(
        default=None, metadata={"help": "Threshold of the divergence where A > 0. Default: 0.15 (tv), 0.05 (kl)."}
    )
    ratio_cap: float | None = field(
        default=20.0, metadata={"help": "Truncation of the detached importance ratio. None: off."}
    )
    surrogate: str = field(
        default="logp",
        metadata={
            "help": "Form of a kept token's term: detached ratio times log-probability, or the live ratio.",
            "choices": ["logp", "ratio"],
        },
    )
    anchor: str = field(
        default="auto",
        metadata={
            "help": "Policy that ratio and divergence are taken to: sampler where known, sampler, old policy.",
            "choices": ["auto", "sampling", "old"],
        },
    )
    mask_mode: str = field(
        default="directional",
        metadata={
            "help": "Drop only tokens that moved with their advantage, or whatever its sign.",
            "choices": ["directional", "symmetric"],
        },
    )
    log_ratio_penalty: float = field(
        default=0.0, metadata={"help": "Weight of the squared log-ratio (prime-rl: 1e-3)."}
    )

    @property
    def anchors_on_sampler(self) -> bool:
        return self.anchor != "old"

    def validate(self) -> None:
        super().validate()
        for name in ("divergence", "surrogate", "anchor", "mask_mode"):
            choices = self.__dataclass_fields__[name].metadata["choices"]
            self._require(getattr(self, name) in choices, name, f"must be one of {', '.join(choices)}")
        for name in ("delta_low", "delta_high"):
            value = getattr(self, name)
            self._require(value is None or is_number(value, low=0.0), name, "must be a finite number >= 0, or None")
        cap = self.ratio_cap
        self._require(cap is None or (is_number(cap) and cap > 0), "ratio_cap", "must be a number > 0, or None")
        if self.surrogate == "ratio":
            self._require(
                cap in (None, 20.0), "ratio_cap", "truncates a detached ratio: with surrogate='ratio' leave it out"
            )
        self._require(is_number(self.log_ratio_penalty, low=0.0), "log_ratio_penalty", "must be a finite number >= 0")
        if self.anchor == "sampling":
            self._require(
                self.use_vllm, "anchor", "needs the sampler's log-probabilities: set use_vllm=True or anchor='auto'"
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
