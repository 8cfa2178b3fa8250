"""ETR-style elastic trust regions: clip widths that depend on the response (arXiv 2601.03723).

Nearest TRL losses: the clipped `grpo`/`dapo` term, which gives every response the same band. ETR keeps that term and
makes its widths elastic: wider where the advantage is large (micro level) and, as a second reading, where the outcomes
within a group vary most (macro level).

Provenance: **reconstruction**. The abstract confirms that the clip bounds depend on the sample, that they grow with
the magnitude of the advantage, and that tasks of middle difficulty implicitly get more budget. No equation,
coefficient, table or code of ETR has been seen by us: every formula and every number here is a reading of that
abstract.
"""

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..settings import NonNegative, Number, OpenFraction, Positive, Range, require, setting
from .base import (
    GenerationBatch,
    PolicyBatch,
    PolicyLoss,
    TrustGRPOConfig,
    TrustGRPOTrainer,
    clipped_surrogate,
    paper,
    sequence_mean,
)


LARGEST_LOW_WIDTH = 0.999  # a lower bound of 0 or less could never act


def outcome_variance(rewards: Tensor, reward_range: Sequence[float] = (0.0, 1.0)) -> Tensor:
    """(groups, G) rewards to (groups, 1) variance of a group's outcomes, in [0, 1/4]: p(1 - p) for rewards 0 and 1.

    In general the population variance over the squared length of `reward_range`, limited to 1/4. NaN rewards do not
    count; a group without any reward has variance 0.
    """
    low, high = reward_range
    deviation = rewards - rewards.nanmean(dim=1, keepdim=True)
    variance = deviation.square().nanmean(dim=1, keepdim=True) / (high - low) ** 2
    return variance.clamp(max=0.25).nan_to_num(0.0)


def etr_bounds(
    advantages: Tensor,
    variance: Tensor | None = None,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    lambda_micro: float = 0.5,
    lambda_macro: float = 0.0,
    phi: str = "linear",
    macro: str = "variance",
    scale_min: float = 0.5,
    scale_max: float = 3.0,
) -> tuple[Tensor, Tensor, Tensor]:
    """The elastic widths of each response, `min(epsilon k, 0.999)` and `epsilon_high k`, and their scale k.

    `k = clip((1 + lambda_micro phi(|A|)) (1 + lambda_macro g(v)), scale_min, scale_max)`, a constant to autograd.

    Args:
        advantages: (B, 1) or (B, T), the ones that multiply the ratio.
        variance: (B, 1) in [0, 1/4], see [`outcome_variance`]; needed for `lambda_macro > 0`.
        phi: |A| (`"linear"`), tanh |A| (`"tanh"`) or |A| - 1 (`"centered"`).
        macro: g is 4 v (`"variance"`) or 2 sqrt(v) (`"std"`).

    Returns:
        low, high, k, each shaped as `advantages`.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    size = advantages.detach().abs()
    scale = 1 + lambda_micro * {"linear": size, "tanh": size.tanh(), "centered": size - 1}[phi]
    if lambda_macro > 0:
        scale = scale * (1 + lambda_macro * (4 * variance if macro == "variance" else 2 * variance.sqrt()))
    scale = scale.clamp(scale_min, scale_max)
    return (epsilon * scale).clamp(max=LARGEST_LOW_WIDTH), epsilon_high * scale, scale


def etr_loss(
    batch: PolicyBatch,
    *,
    epsilon: float = 0.2,
    epsilon_high: float | None = None,
    lambda_micro: float = 0.5,
    lambda_macro: float = 0.0,
    phi: str = "linear",
    macro: str = "variance",
    scale_min: float = 0.5,
    scale_max: float = 3.0,
    delta: float | None = None,
    importance_sampling_level: str = "token",
) -> PolicyLoss:
    """`-min(ratio A, clip(ratio, 1 - low, 1 + high) A)` with the widths of [`etr_bounds`] in place of `epsilon`.

    `lambda_macro > 0` reads `batch.extras["outcome_variance"]`, (B,). `delta` (cap of the unclipped branch) and
    `importance_sampling_level` (`"sequence"`: one ratio a response, not the paper's) are TRL's.

    Returns:
        per-token loss (B, T), or (B, 1) at the sequence level; metrics `etr/scale/{mean,min,max}` and
        `etr/epsilon/{low_mean,high_mean}`, over responses with A != 0; `etr/clip_ratio/{low,high}`, fractions of live
        tokens that their own lower or upper bound cut off from the gradient, and `etr/clip_ratio/base`, those that
        plain `epsilon` would have cut off.
    """
    epsilon_high = epsilon if epsilon_high is None else epsilon_high
    advantages = batch.advantages  # (B, 1) or (B, T)
    low, high, scale = etr_bounds(
        advantages,
        batch.extras["outcome_variance"].unsqueeze(1) if lambda_macro > 0 else None,
        epsilon=epsilon,
        epsilon_high=epsilon_high,
        lambda_micro=lambda_micro,
        lambda_macro=lambda_macro,
        phi=phi,
        macro=macro,
        scale_min=scale_min,
        scale_max=scale_max,
    )
    log_ratio = batch.logps - batch.old_logps  # (B, T)
    if importance_sampling_level == "sequence":
        log_ratio = sequence_mean(log_ratio, batch.mask)  # (B, 1)
    ratio = torch.exp(log_ratio)

    below, above = (ratio < 1 - low) & (advantages < 0), (ratio > 1 + high) & (advantages > 0)
    base = ((ratio < 1 - epsilon) & (advantages < 0)) | ((ratio > 1 + epsilon_high) & (advantages > 0))
    by_token = lambda x: x.float().expand_as(batch.logps)  # so that long responses count more, at either level
    with_advantage = lambda x: x.masked_fill(advantages == 0, torch.nan)
    return PolicyLoss(
        clipped_surrogate(ratio, advantages, low, high, delta),
        {
            "etr/scale/mean": with_advantage(scale),
            "etr/scale/min": with_advantage(scale),
            "etr/scale/max": with_advantage(scale),
            "etr/epsilon/low_mean": with_advantage(low),
            "etr/epsilon/high_mean": with_advantage(high),
            "etr/clip_ratio/low": by_token(below),
            "etr/clip_ratio/high": by_token(above),
            "etr/clip_ratio/base": by_token(base),
        },
    )


@dataclass
class ETRConfig(TrustGRPOConfig):
    r"""
    Configuration of [`ETRTrainer`]: every field of [`TrustGRPOConfig`], and the elasticity of the clip widths.

    `epsilon` and `epsilon_high` are the base widths. None of the numbers below is the paper's, which are not known.

    Raises:
        ValueError: for values outside the above, `epsilon` outside (0, 1), or `epsilon_high` not above 0.
    """

    lambda_micro: NonNegative = setting(
        0.5, "Strength of the advantage rule. A guess: the paper's value is not known."
    )
    lambda_macro: NonNegative = setting(
        0.0,
        "Strength of the explicit rule on the group's variance. A guess. At 0 its effect is implicit: the mean of |A| "
        "over a group is largest at a pass rate of one half.",
    )
    phi: Literal["linear", "tanh", "centered"] = setting(
        "linear", "Shape of the advantage rule: |A|, tanh |A| or |A| - 1. A reconstruction."
    )
    macro: Literal["variance", "std"] = setting(
        "variance", "Signal of the explicit rule: 4 p(1-p) of the group, or its root. A reconstruction."
    )
    scale_min: Positive = setting(0.5, "Lower limit of the scale of the widths. A guess.")
    scale_max: Number = setting(3.0, "Upper limit of the scale of the widths, at least `scale_min`. A guess.")
    reward_range: list[float] = setting([0.0, 1.0], "Least and largest reward, which normalise the group's variance.")

    old_values: ClassVar[dict[str, dict[str, str]]] = {"phi": {"centred": "centered"}}

    def validate(self) -> None:
        super().validate()
        in_order = self.scale_min <= self.scale_max
        self.require(in_order, "scale_min", f"must be a number > 0 and at most scale_max={self.scale_max!r}")
        ends = self.reward_range
        in_order = len(ends) == 2 and all(end in Range() for end in ends) and ends[0] < ends[1]
        self.require(in_order, "reward_range", "must be two finite numbers, the lower one first")
        require("epsilon", self.epsilon, OpenFraction)
        require("epsilon_high", self.epsilon_high, Positive | None)
        if self.scale_rewards in ("none", False) and self.lambda_micro > 0:
            warnings.warn(
                f"scale_rewards={self.scale_rewards!r} with lambda_micro={self.lambda_micro!r}: |A| is in units of "
                "the reward, and so are the widths. Use scale_rewards='group', or lambda_micro per unit of reward.",
                stacklevel=2,
            )


class ETRTrainer(TrustGRPOTrainer):
    """
    GRPO with ETR-style clip widths (arXiv 2601.03723, a reconstruction): wider for large advantages. See [`etr_loss`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is an [`ETRConfig`], or a `GRPOConfig` for the defaults.
    """

    config_class = ETRConfig
    _name = "ETR-style"
    _tag_names = ["trl", "trl-trust", "etr"]
    _paper = paper(
        "ETR: Outcome-Guided Elastic Trust Regions for Policy Optimization",
        "2601.03723",
        "Shijie Zhang and Kevin Zhang and Zheyuan Gu and Xiang Guo and Rujun Guo and Shaoyu Liu and"
        " Guanjun Jiang and Xiaozhao Wang",
    )

    def extend_rollouts(self, rollouts: GenerationBatch) -> dict[str, Tensor]:
        # a micro-batch holds fragments of groups, so the variance is taken here, where whole groups are known
        if self.args.lambda_macro == 0:
            return {}
        groups = rollouts.rewards.view(-1, rollouts.num_generations)
        variance = outcome_variance(groups, self.args.reward_range).expand_as(groups).flatten()  # (N,)
        return {"outcome_variance": variance[rollouts.rows]}

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        return etr_loss(batch, **self.settings(etr_loss))
