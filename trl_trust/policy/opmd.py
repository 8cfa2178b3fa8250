"""OPMD: regression of the log-ratio of whole responses on their advantage (arXiv 2501.12599, 2507.20534).

Nearest TRL loss: the clipped `grpo` term. OPMD has no ratio and no clip: a response is one action, and
tau log(new / old) is regressed on its reward minus a baseline (Kimi k1.5 and K2). It is mirror descent, as is
[`trl_trust.policy.mdpo`], solved by least squares.

Provenance: **exact in formula** (2501.12599, eq. 3), with the mean-reward baseline and the optimizer reset of the
reports, whose tau is not published; length normalisation, leave-one-out baselines and tau = 0.01 are from
`horizon-rl/OpenKimi` (`openkimi/pmd/core_algos.py`).
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch
from torch import Tensor

from ..settings import Positive, setting
from .base import GenerationBatch, PolicyBatch, PolicyLoss, TrustGRPOConfig, TrustGRPOTrainer, paper
from .config import NO_CLIP, require_whole_responses


def opmd_advantages(rewards: Tensor, *, tau: float = 0.01, baseline: str = "mean") -> Tensor:
    """(P, G) rewards minus their baseline, for P prompts with G responses each; never divided by a deviation.

    The baseline is the group's `"mean"`, its `"log_mean_exp"`, `tau log mean exp(r / tau)`, or either over the other
    responses only (`"leave_one_out"`, `"log_mean_exp_leave_one_out"`). NaN rewards (unscored) are left out of it, and
    get 0, as does a response without any other to be compared with.
    """
    scored = ~rewards.isnan()
    count = scored.sum(-1, keepdim=True)  # (P, 1)
    if baseline in ("mean", "leave_one_out"):
        advantages = rewards - rewards.nanmean(-1, keepdim=True)
        if baseline == "leave_one_out":
            advantages = advantages * (count / (count - 1).clamp(min=1))
    else:
        scaled = torch.where(scored, rewards / tau, -torch.inf)  # (P, G)
        if baseline == "log_mean_exp_leave_one_out":
            itself = torch.eye(rewards.size(-1), dtype=torch.bool, device=rewards.device)
            scaled, count = scaled.unsqueeze(-2).masked_fill(itself, -torch.inf), count - 1  # (P, G, G)
            log_sum_exp = torch.logsumexp(scaled, -1)  # (P, G)
        else:
            log_sum_exp = torch.logsumexp(scaled, -1, keepdim=True)  # (P, 1)
        advantages = rewards - tau * (log_sum_exp - count.to(rewards).log())
    return torch.nan_to_num(advantages, nan=0.0)


def opmd_loss(
    batch: PolicyBatch,
    *,
    tau: float = 0.01,
    norm: str = "length",
    recenter: bool = False,
    max_completion_length: int = 512,
) -> PolicyLoss:
    """`(A - tau s)^2 / (2 tau norm)` per response, s the sum of its live log-ratios (2501.12599, eq. 3).

    Gradient by a token's log-probability: `-(A - tau s) / norm`; at s = 0 this is REINFORCE with the baseline in A,
    whatever tau. A must be a reward minus a baseline ([`opmd_advantages`]), not a standardised advantage.

    Args:
        tau: strength of the regularisation, in units of the reward, > 0.
        norm: 1 for `"none"`, the number of live tokens for `"length"`, `max_completion_length` for `"max_length"`.
        recenter: subtract from each residual the mean over the live, scored responses of its group (`batch.group`,
            whole groups needed), which carries gradient. The loss is then the same for `"mean"` and `"log_mean_exp"`,
            whose baseline is one number a group; a leave-one-out baseline differs between responses and stays.

    Returns:
        loss (B, 1); metrics `opmd/residual/mean_abs` (|A - tau s|), `opmd/log_ratio/mean` and `opmd/log_ratio/std` (s;
        the deviation is within a micro-batch), `opmd/pull` (mean |tau s|), `opmd/baseline` (mean r - A, with rewards).
    """
    length = batch.mask.sum(-1, keepdim=True)  # (B, 1)
    log_ratio = ((batch.logps - batch.old_logps) * batch.mask).sum(-1, keepdim=True)  # (B, 1)
    residual = batch.advantages - tau * log_ratio
    if recenter:
        counts = length > 0  # (B, 1)
        if batch.rewards is not None:
            counts = counts & ~batch.rewards.isnan().unsqueeze(1)
        same = (batch.group.unsqueeze(1) == batch.group.unsqueeze(0)) & counts.T  # (B, B)
        same = same.to(residual.dtype)
        mean = same @ residual / same.sum(-1, keepdim=True).clamp(min=1.0)
        residual = residual - torch.where(counts, mean, 0.0)
    divisor = {"none": 1.0, "length": length.clamp(min=1.0), "max_length": max_completion_length}[norm]

    detached = log_ratio.detach()
    metrics = {
        "opmd/residual/mean_abs": residual.abs(),
        "opmd/log_ratio/mean": detached,
        "opmd/log_ratio/std": detached.std(correction=0),
        "opmd/pull": (tau * detached).abs(),
    }
    if batch.rewards is not None:
        metrics["opmd/baseline"] = batch.rewards.unsqueeze(1) - batch.advantages
    return PolicyLoss(residual.square() / (2 * tau) / divisor, metrics)


@dataclass
class OPMDConfig(TrustGRPOConfig):
    r"""
    Configuration of [`OPMDTrainer`]: every field of [`TrustGRPOConfig`], and the regression.

    Two defaults of TRL's fields differ, and no other value is allowed: `loss_type="grpo"` (one loss a response,
    averaged over responses) and `scale_rewards="none"` (standardised advantages would break the regression).

    Raises:
        ValueError: for values outside the above, `loss_type` or `scale_rewards` other than the defaults, a vLLM
            correction per token, or `top_entropy_quantile`, `epsilon`, `epsilon_high`, `delta`,
            `importance_sampling_level` or `multi_objective_aggregation` other than TRL's default.
    """

    unread_fields: ClassVar[dict[str, str]] = {
        **NO_CLIP,
        "importance_sampling_level": "a response is one action, and there is no ratio",
        "multi_objective_aggregation": "it standardises rewards, which breaks the regression",
    }

    loss_type: str = setting("grpo", "Aggregation: one loss a response, averaged over responses. Only 'grpo'.")
    scale_rewards: str = setting("none", "Rewards are never standardised here. Only 'none'.")
    tau: Positive = setting(
        0.01, "Strength of the regularisation, in units of the reward: 0.01 suits rewards of 0/1 or +-1."
    )
    baseline: Literal["mean", "leave_one_out", "log_mean_exp", "log_mean_exp_leave_one_out"] = setting(
        "mean", "What is subtracted from a reward, over its group."
    )
    norm: Literal["none", "length", "max_length"] = setting(
        "length", "Divisor of a response's loss; `none` is the reports' formula."
    )
    recenter: bool = setting(
        False, "Subtract the group's mean residual: the pairwise form. A micro-batch must hold whole groups."
    )
    reset_optimizer: bool = setting(False, "Clear the optimizer's state at each new generation batch (Kimi k1.5).")
    recentre: bool | None = setting(None, "Older spelling of `recenter`.")

    old_names: ClassVar[dict[str, str]] = {"recentre": "recenter"}

    @property
    def needs_whole_groups(self) -> bool:
        return self.recenter

    def validate(self) -> None:
        super().validate()
        self._require(self.loss_type == "grpo", "loss_type", "must be 'grpo': a response has one loss")
        self._require(
            self.scale_rewards == "none", "scale_rewards", "must be 'none': tau log(new / old) has units of the reward"
        )
        require_whole_responses(self)


class OPMDTrainer(TrustGRPOTrainer):
    """
    GRPO with the squared regression of Kimi k1.5 and K2 (arXiv 2501.12599, 2507.20534). See [`opmd_loss`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is an [`OPMDConfig`], or a `GRPOConfig` for the defaults.

    Raises:
        ValueError: for `reset_optimizer=True` under DeepSpeed, whose optimizer keeps its state elsewhere.
    """

    config_class = OPMDConfig
    replaces_advantages = "its advantage is the target of a regression"
    _name = "OPMD"
    _tag_names = ["trl", "trl-trust", "opmd"]
    _paper = paper("Kimi k1.5: Scaling Reinforcement Learning with LLMs", "2501.12599", "{Kimi Team}")

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if self.args.reset_optimizer and self.is_deepspeed_enabled:
            raise ValueError("reset_optimizer=True cannot reach the optimizer of DeepSpeed: use DDP or FSDP2.")

    def extend_rollouts(self, rollouts: GenerationBatch) -> dict[str, Tensor]:
        by_group = rollouts.rewards.view(-1, rollouts.num_generations)
        advantages = opmd_advantages(by_group, tau=self.args.tau, baseline=self.args.baseline)
        if self.args.reset_optimizer and self.model.training:
            self.optimizer.state.clear()  # torch's optimizers make their state anew in the next step
        return {"advantages": advantages.flatten()[rollouts.rows]}

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        return opmd_loss(batch, **self.settings(opmd_loss))
