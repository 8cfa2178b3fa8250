"""Group-robust GRPO: advantages weighted so that the worst group of a named nuisance is kept up.

Nearest TRL trainer: `GRPOTrainer`, from which it differs by one factor a response, `A <- w A`, behind TRL's
normalization. Weights on *rewards* would do nothing there: `(r - mean) / (std + 1e-4)` undoes any scale of one
prompt's rewards. With `group_column=None`, or one group, it is `GRPOTrainer` to the bit.

Provenance: **inspired**. Group DRO in the frame of the survey arXiv 2307.16851; no experiment of it is reproduced.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from torch import Tensor

from ..policy.base import GenerationBatch, TrustGRPOConfig, TrustGRPOTrainer, paper
from ..settings import setting
from .adversary import Groups, GroupSettings
from .weights import group_means, shortfall


logger = get_logger(__name__)


@dataclass
class GroupRLSettings(GroupSettings):
    """[`GroupSettings`] where a group is judged by its rewards."""

    reward_range: list[float] = setting(
        [0.0, 1.0], "Least and largest total reward: a group's loss is the share of it that is missing."
    )

    def validate(self) -> None:
        super().validate()
        self.check_groups()
        low_high = self.reward_range
        ordered = len(low_high) == 2 and all(map(math.isfinite, low_high)) and low_high[0] < low_high[1]
        self.require(ordered, "reward_range", "must be two finite numbers, the lower one first")


class GroupRobustMixin:
    """Before a trainer on the GRPO host, whose config has [`GroupRLSettings`]: weights the advantages by group.

    Once a generation batch, on every process: rewards, advantages of the host or the method, one step of the
    adversary, weights. Evaluation neither steps nor weights. Logged: `robust/<group>/{reward,q}`, `robust/worst` (the
    lowest mean reward of a group) and `robust/weight_max`. `q` goes into checkpoints.

    Raises:
        ValueError: for a data set without the column, a streamed one, and what [`Groups`] raises.
    """

    groups: Groups | None = None
    _warned_of_range = False

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        column = self.args.group_column
        if column is None:
            return
        known = getattr(self.train_dataset, "column_names", None)
        if not hasattr(self.train_dataset, "__len__") or known is None:
            raise ValueError(f"group_column={column!r} needs a data set of known length: load it without streaming.")
        if column not in known:
            raise ValueError(f"group_column={column!r} is not in the data, which have {', '.join(known)}.")
        self.groups = Groups(self.train_dataset.unique(column), self.args)

    def extend_rollouts(self, rollouts: GenerationBatch) -> dict[str, Tensor]:
        extras = super().extend_rollouts(rollouts)
        if self.groups is None or not self.model.training:
            return extras
        rewards = rollouts.rewards  # (N,)
        local = torch.tensor(self.groups.of(rollouts.examples), device=rewards.device)
        groups = self.accelerator.gather(local)  # (N,)
        means, _ = group_means(rewards, groups, len(self.groups.names))  # (K,)
        low, high = self.args.reward_range
        weights = self.groups.weigh(shortfall(means, (low, high)), groups)[rollouts.rows]  # (n,)
        self._log_groups(means.tolist(), weights.max().item(), rewards[(rewards < low) | (rewards > high)].tolist())
        advantages = extras.get("advantages", rollouts.tensors["advantages"])  # (n,) or (n, T)
        weights = weights.to(advantages.dtype)
        return extras | {"advantages": advantages * (weights if advantages.ndim == 1 else weights.unsqueeze(1))}

    def _log_groups(self, means: list[float], weight_max: float, outside: list[float]) -> None:
        seen = {name: mean for name, mean in zip(self.groups.names, means, strict=True) if not math.isnan(mean)}
        for name, mean in seen.items():
            self.log_value(f"robust/{name}/reward", mean)
        for name, q in zip(self.groups.names, self.groups.q.tolist(), strict=True):
            self.log_value(f"robust/{name}/q", q)
        if seen:
            self.log_value("robust/worst", min(seen.values()))
        self.log_value("robust/weight_max", weight_max)
        if outside and not self._warned_of_range:
            self._warned_of_range = True
            logger.warning(
                f"A reward of {outside[0]:g} lies outside reward_range={list(self.args.reward_range)}: the loss of a "
                f"group is clipped to the range. Set reward_range to what the reward functions return in total."
            )

    def method_state(self) -> dict[str, Any]:
        return super().method_state() | ({} if self.groups is None else {"robust": self.groups.state()})

    def load_method_state(self, state: dict[str, Any]) -> None:
        super().load_method_state({name: value for name, value in state.items() if name != "robust"})
        if self.groups is not None:
            self.groups.load_state(state["robust"])
        elif "robust" in state:
            raise ValueError("the checkpoint weighs groups, and group_column is None: set it as it was.")


@dataclass
class RobustGRPOConfig(GroupRLSettings, TrustGRPOConfig):
    r"""
    Configuration of [`RobustGRPOTrainer`]: every field of [`TrustGRPOConfig`], and the adversary over groups.

    Raises:
        ValueError: for values outside the above.
    """


class RobustGRPOTrainer(GroupRobustMixin, TrustGRPOTrainer):
    """
    GRPO whose advantages are weighted for the worst group (on arXiv 2307.16851). See [`GroupRobustMixin`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is a [`RobustGRPOConfig`], or a `GRPOConfig` for the defaults,
    under which it is GRPO.
    """

    config_class = RobustGRPOConfig
    _name = "Robust GRPO"
    _tag_names = ["trl", "trl-trust", "robust-grpo"]
    _paper = paper(
        "Towards Trustworthy and Aligned Machine Learning: A Data-centric Survey with Causality Perspectives",
        "2307.16851",
        "Haoyang Liu and Maheep Chaudhary and Haohan Wang",
    )
