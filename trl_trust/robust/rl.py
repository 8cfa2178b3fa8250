"""Group-robust GRPO: advantages weighted so that the worst group of a named nuisance is kept up.

Nearest TRL trainer: `GRPOTrainer`, from which it differs by one factor a response, `A <- w A`, behind TRL's
normalization. Weights on *rewards* would do nothing there: `(r - mean) / (std + 1e-4)` undoes any scale of one
prompt's rewards. With `group_column=None`, or one group, it is `GRPOTrainer` to the bit.

With `pair_column` the answers to one wording of a question are rewarded by those to its other wordings:
[`trl_trust.robust.consistency`].

Provenance: **inspired**. Group DRO in the frame of the survey arXiv 2307.16851; no experiment of it is reproduced.
"""

import math
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor

from ..policy.base import GenerationBatch, TrustGRPOConfig, TrustGRPOTrainer, paper
from ..settings import NonNegative, setting
from .adversary import SURVEY, Groups, GroupSettings, column_of
from .consistency import SiblingReward, consistency_reward, flip_rate
from .weights import group_means, shortfall


logger = get_logger(__name__)


@dataclass
class GroupRLSettings(GroupSettings):
    """[`GroupSettings`] where a group is judged by its rewards."""

    reward_range: list[float] = setting(
        [0.0, 1.0], "Least and largest total reward: a group's loss is the share of it that is missing."
    )
    pair_column: str | None = setting(
        None, "Column whose value the wordings of one question share: each is rewarded by the answers to the others."
    )
    variant_column: str | None = setting(None, "Column that tells the wordings of one question apart.")
    consistency_rate: float = setting(0.1, "Weight of a new visit in the history of answers, in (0, 1].")
    consistency_weight: NonNegative = setting(0.25, "Weight of the consistency reward beside the other rewards.")

    def validate(self) -> None:
        super().validate()
        self.check_groups()
        low_high = self.reward_range
        ordered = len(low_high) == 2 and all(map(math.isfinite, low_high)) and low_high[0] < low_high[1]
        self.require(ordered, "reward_range", "must be two finite numbers, the lower one first")
        for one, other in (("pair_column", "variant_column"), ("variant_column", "pair_column")):
            lonely = getattr(self, one) is not None and getattr(self, other) is None
            self.require(not lonely, one, f"needs {other} beside it: the two name what siblings share and differ in")
        self.require(0 < self.consistency_rate <= 1, "consistency_rate", "must be in (0, 1]")


class GroupRobustMixin:
    """Before a trainer on the GRPO host, whose config has [`GroupRLSettings`]: weights the advantages by group.

    Once a generation batch, on every process: rewards, advantages of the host or the method, one step of the
    adversary, weights. Evaluation neither steps nor weights. Logged: `robust/<group>/{reward,q}`, `robust/worst` (the
    lowest mean reward of a group) and `robust/weight_max`; with `pair_column`, or a [`consistency_reward`] among the
    reward functions, `robust/flip_rate`: the share of siblings in the batch that answer differently. `q` and the
    history of answers go into checkpoints.

    Raises:
        TypeError: where it stands before a trainer that does not use the host's advantages.
        ValueError: for data without the columns, streamed data, two consistency rewards, and what [`Groups`] raises.
    """

    groups: Groups | None = None
    siblings: SiblingReward | None = None
    _warned_of_range = False

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if cls.replaces_advantages:
            raise TypeError(
                f"{cls.__name__}: {cls._name} cannot weigh advantages by group, {cls.replaces_advantages}."
            )

    def _check_dataset(self) -> None:
        super()._check_dataset()
        if self.args.pair_column is not None:
            self._add_reward()
        siblings = [func for func in self.reward_funcs if isinstance(func, SiblingReward)]
        if len(siblings) > 1:
            raise ValueError("there are two consistency rewards: leave out pair_column, or the one in reward_funcs.")
        self.siblings = siblings[0] if siblings else None
        if self.args.group_column is not None:
            column = column_of(self.args, "group_column", self.train_dataset)
            self.groups = Groups(self.train_dataset.unique(column), self.args)

    def _add_reward(self) -> None:
        args = self.args
        columns = [column_of(args, field, self.train_dataset) for field in ("pair_column", "variant_column")]
        reward = consistency_reward(*columns, rate=args.consistency_rate)
        weight = self.reward_weights.new_tensor([args.consistency_weight])
        # TRL 1.16 zips these three; lists of its own, not the caller's
        self.reward_funcs = [*self.reward_funcs, reward]
        self.reward_func_names = [*self.reward_func_names, reward.__name__]
        self.reward_processing_classes = [*self.reward_processing_classes, None]
        self.reward_weights = torch.cat([self.reward_weights, weight])

    def _take_answers(self) -> None:
        rows = gather_object(self.siblings.fresh)  # of all processes, so that each holds the same history
        rate = flip_rate(rows)
        if rate is not None:
            self.log_value("robust/flip_rate", rate)
        self.siblings.settle(rows if self.model.training else [])

    def extend_rollouts(self, rollouts: GenerationBatch) -> dict[str, Tensor]:
        extras = super().extend_rollouts(rollouts)
        if self.siblings is not None:
            self._take_answers()
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
        state = super().method_state()
        if self.groups is not None:
            state["robust"] = self.groups.state()
        if self.siblings is not None:
            state["siblings"] = self.siblings.answers.state_dict()
        return state

    def load_method_state(self, state: dict[str, Any]) -> None:
        own = {"robust": self.groups, "siblings": self.siblings}
        super().load_method_state({name: value for name, value in state.items() if name not in own})
        if "robust" in state and self.groups is None:
            raise ValueError("the checkpoint weighs groups, and group_column is None: set it as it was.")
        if "siblings" in state and self.siblings is None:
            raise ValueError("the checkpoint has answers of siblings, and pair_column is None: set it as it was.")
        if self.groups is not None:
            self.groups.load_state(state["robust"])
        if self.siblings is not None:
            self.siblings.answers.load_state_dict(state["siblings"])


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
    _paper = paper(*SURVEY)
