"""TRPA: pairs of preference levels against a reference, and a small KL to the previous policy (arXiv 2504.04524).

Nearest TRL losses: online DPO for the pairwise term, GRPO for the loop. The responses to a prompt are sorted into
levels by rules; every ordered pair pays a DPO-like loss on *length-normalised* log-ratios to the reference. There is
no advantage, no importance ratio and no clip.

Provenance: **exact** for levels, pairs, loss and defaults, from the authors' code
(`XueruiSu/Trust-Region-Preference-Approximation`, `verl/trainer/ppo/core_algos.py`, `verl/workers/actor/dp_actor.py`).
`anisotropy_mode="response"` follows an outline of the paper's formula. Whole groups in a micro-batch, the mean over
prompts and leaving out prompts without pairs are decisions of this project: the released code builds its pairs within
shuffled micro-batches, where groups are in fragments.
"""

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import ClassVar, Literal

import torch
from torch import Tensor
from torch.nn.functional import softplus

from ..levels import LEVEL_RULES, load_level_rule, reward_levels
from ..settings import NonNegative, Number, Positive, Range, setting
from .base import (
    LOG_RATIO_LIMIT,
    GenerationBatch,
    PolicyBatch,
    PolicyLoss,
    TrustGRPOConfig,
    TrustGRPOTrainer,
    paper,
    sequence_mean,
)


def trust_kl(log_ratio: Tensor, kl_form: str = "k3_code") -> Tensor:
    """Estimate, per token, of a divergence between the old policy and the new one, at most 10.

    With d = logps - old_logps: `"k3_code"` exp(-d) + d - 1, whose mean under the old policy is no KL;
    `"old_new"` exp(d) - d - 1, unbiased for KL(old || new); `"new_old"` d exp(d) - exp(d) + 1, for KL(new || old).
    All are d^2 / 2 near 0. Beyond 10 there is no gradient.
    """
    d = log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT)  # or exp overflows, and its zero gradient becomes NaN
    if kl_form == "k3_code":
        kl = torch.expm1(-d) + d
    elif kl_form == "old_new":
        kl = torch.expm1(d) - d
    else:
        kl = d * d.exp() - torch.expm1(d)
    return kl.clamp(max=10.0)


def trpa_loss(
    batch: PolicyBatch,
    *,
    preference_beta: float = 0.1,
    anisotropy: float = 2.5,
    anisotropy_mode: str = "pair",
    pair_norm: str = "prompt",
    no_pair_fallback: str = "skip",
    trust_coef: float = 0.001,
    kl_form: str = "k3_code",
    sqrt_kl: bool = False,
) -> PolicyLoss:
    """Mean of `-log sigmoid(h_ij)` over pairs with level_i < level_j of one prompt, plus `trust_coef` times D.

    With R the mean over a response's tokens of `logps - ref_logps`, and kappa `anisotropy` for winners on level 1 and
    1 for others, `h_ij = kappa preference_beta (R_i - R_j)`. D is [`trust_kl`], or `sqrt(D + 0.25)` with `sqrt_kl`.

    Reads `batch.group`, `batch.ref_logps` and `batch.extras["levels"]`, (B,): 1 is best, 0 has no level and stays out
    of the pairs, as does a response without tokens. `extras["prompt_weight"]`, (B,), if there, is what a prompt counts
    in place of 1 over the number of prompts in this batch; see [`TRPATrainer`].

    Args:
        anisotropy_mode: `"pair"` as above; `"response"` applies `kappa` to each response's own R, not to the pair.
        pair_norm: mean over the pairs of a prompt, then over prompts that have any (`"prompt"`), or over all pairs of
            the micro-batch (`"batch"`, the authors' code).
        no_pair_fallback: what a prompt (for `"batch"`, a micro-batch) without a pair pays: nothing (`"skip"`), or the
            mean of -log sigmoid of +R on level 1 and of -R elsewhere (`"code"`).
        sqrt_kl: D under the root is the token mean of the micro-batch; the gradient of the root is then reduced as
            that of D is.

    Returns:
        per-token loss (B, T), the trust term; `batch_loss`, the pairs; metrics
        `trpa/preference/{loss,accuracy,margin}`, `trpa/log_ratio/{winner,loser}` (means over pairs, weighted as the
        loss is), `trpa/pairs/count` (pairs a prompt), `trpa/pairs/groups_without` (fraction of prompts),
        `trpa/level/{1,2,3,4}` (fractions of responses; 4 holds what is worse too), `trpa/trust/kl` (D).
    """
    levels = batch.extras["levels"]  # (B,)
    R = sequence_mean(batch.logps - batch.ref_logps, batch.mask).squeeze(1)  # (B,)
    ranked = (levels > 0) & (batch.mask.sum(1) > 0)
    same = batch.group[:, None] == batch.group[None, :]  # (B, B)
    pair = same & (levels[:, None] < levels[None, :]) & ranked[:, None] & ranked[None, :]

    # A unit is what is averaged over first: the rows of a prompt, or all of them. Its weights sum to 1, or to 0
    unit = same if pair_norm == "prompt" else torch.ones_like(same)
    over_unit = lambda x: (unit * x).sum(1)  # (B,) to (B,): the sum over the rows of the unit that a row is in
    pairs = over_unit(pair.sum(1))
    weight = pair / pairs.clamp(min=1).to(R).unsqueeze(1)  # (B, B)

    scale = preference_beta * torch.where(levels == 1, anisotropy, 1.0).to(R)  # (B,)
    if anisotropy_mode == "pair":
        h = scale[:, None] * (R[:, None] - R[None, :])  # (B, B)
    else:
        h = (scale * R)[:, None] - (scale * R)[None, :]
    row_loss = (weight * softplus(-h)).sum(1)  # (B,)
    units = weight.sum()
    if no_pair_fallback == "code":
        lone = ranked & (pairs == 0)
        lone_weight = lone / over_unit(lone).clamp(min=1).to(R)  # (B,)
        row_loss = row_loss + lone_weight * softplus(torch.where(levels == 1, -R, R))
        units = units + lone_weight.sum()
    total = row_loss.sum()
    if pair_norm == "prompt" and "prompt_weight" in batch.extras:
        preference = total * batch.extras["prompt_weight"][0]
    else:
        preference = total / units.clamp(min=1.0)  # 0 without any, but still connected to `logps`

    kl = trust_kl(batch.logps - batch.old_logps, kl_form)  # (B, T)
    trust = trust_coef * kl
    if sqrt_kl:
        D = (kl.detach() * batch.mask).sum() / batch.mask.sum().clamp(min=1.0)
        root = (D + 0.25).sqrt()
        trust = trust / (2 * root)
        preference = preference + trust_coef * (root - D / (2 * root))  # a constant, for the value of the root

    with torch.no_grad():
        by_unit = lambda x, missing: over_unit(x).masked_fill(missing, torch.nan).unsqueeze(1)  # (B, 1)
        by_pair = lambda x: by_unit((weight * x).sum(1), pairs == 0)
        prompt_pairs = (same * pair.sum(1)).sum(1)
        share = lambda x: x.to(R).masked_fill(levels == 0, torch.nan).unsqueeze(1)  # (B, 1)
        metrics = {
            "trpa/preference/loss": by_unit(row_loss, over_unit(row_loss) == 0),
            "trpa/preference/accuracy": by_pair((R[:, None] > R[None, :]).to(R)),
            "trpa/preference/margin": by_pair(R[:, None] - R[None, :]),
            "trpa/log_ratio/winner": by_pair(R[:, None]),
            "trpa/log_ratio/loser": by_pair(R[None, :]),
            "trpa/pairs/count": prompt_pairs.unsqueeze(1),
            "trpa/pairs/groups_without": (prompt_pairs == 0).to(R).unsqueeze(1),
            **{f"trpa/level/{k}": share(levels == k) for k in (1, 2, 3)},
            "trpa/level/4": share(levels >= 4),
            "trpa/trust/kl": kl.detach(),
        }
    return PolicyLoss(trust, metrics, batch_loss=preference)


@dataclass
class TRPAConfig(TrustGRPOConfig):
    r"""
    Configuration of [`TRPATrainer`]: every field of [`TrustGRPOConfig`], levels, pairs and the trust term.

    `preference_beta` scales the pairs, `trust_coef` the divergence to the previous policy, and TRL's `beta` adds TRL's
    own KL to the reference, which the paper does not have. A reference is needed in any case.

    Raises:
        ValueError: for values outside the above, a batch that does not hold whole groups, or a field that belongs to
            advantages or ratios, which TRPA does not have.
    """

    unread_fields: ClassVar[dict[str, str]] = {
        "epsilon": "TRPA has no ratio to clip; the trust region is `trust_coef`",
        "epsilon_high": "TRPA has no ratio to clip; the trust region is `trust_coef`",
        "delta": "TRPA has no ratio to clip; the trust region is `trust_coef`",
        "importance_sampling_level": "TRPA has no ratio",
        "off_policy_mask_threshold": "it reads advantages, and TRPA has none",
        "top_entropy_quantile": "the pairs compare whole responses",
        "scale_rewards": "TRPA has no advantages; levels come from `level_rule`",
        "multi_objective_aggregation": "TRPA has no advantages; levels come from `level_rule`",
    }

    preference_beta: Positive = setting(0.1, "Scale of the log-ratios in the pairwise loss (not TRL's `beta`).")
    anisotropy: Positive = setting(2.5, "Factor for winners on level 1.")
    anisotropy_mode: Literal["pair", "response"] = setting(
        "pair", "Apply the factor to a pair whose winner is on level 1, or to each response on level 1."
    )
    pair_norm: Literal["prompt", "batch"] = setting(
        "prompt",
        "Mean over a prompt's pairs, then over prompts; or over all pairs of a micro-batch, which depends on how rows "
        "are split into micro-batches.",
    )
    no_pair_fallback: Literal["skip", "code"] = setting(
        "skip", "Leave out prompts on one level, or let each response pay alone, as the authors' code does."
    )
    trust_coef: NonNegative = setting(0.001, "Weight of the divergence to the previous policy.")
    kl_form: Literal["k3_code", "old_new", "new_old"] = setting(
        "k3_code", "Estimator of the divergence to the old policy: the authors', KL(old || new) or KL(new || old)."
    )
    sqrt_kl: bool = setting(False, "Use sqrt(D + 0.25) in place of D.")
    level_rule: str = setting(
        "reward", "Source of the levels: `reward`, `math`, `knights_and_knaves`, or a dotted path to a function."
    )
    level_one_reward: Number = setting(1.0, "Reward from which a response is on level 1, with `level_rule='reward'`.")
    level_thresholds: list[float] | None = setting(
        None, "Strictly descending rewards that part the levels below 1. Default: each distinct reward is a level."
    )

    @property
    def needs_whole_groups(self) -> bool:
        return True

    @property
    def needs_reference(self) -> bool:
        return True

    def validate(self) -> None:
        super().validate()
        rules = ("reward", *LEVEL_RULES)
        known = self.level_rule in rules or "." in self.level_rule
        self.require(known, "level_rule", f"must be one of {', '.join(rules)}, or a dotted import path")
        edges = self.level_thresholds or []
        in_order = all(edge in Range() for edge in edges) and all(a > b for a, b in pairwise(edges))
        self.require(in_order, "level_thresholds", "must be finite numbers in strictly descending order")


class TRPATrainer(TrustGRPOTrainer):
    """
    GRPO's loop with TRPA's loss (arXiv 2504.04524): pairs of preference levels, no advantages. See [`trpa_loss`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is a [`TRPAConfig`], or a `GRPOConfig` for the defaults. Levels
    come from `level_fn`, called like the rules of `trl_trust.levels`, or from `level_rule` of the config.

    With `pair_norm="prompt"` all prompts of a generation batch that have pairs, over all processes, weigh the same, as
    all tokens do with TRL's `loss_type="dapo"`: how they are split into micro-batches and processes does not matter.

    Raises:
        ValueError: for a level rule that cannot be imported, or both `level_fn` and a `level_rule`.
    """

    config_class = TRPAConfig
    replaces_advantages = "it compares responses in pairs"
    _name = "TRPA"
    _tag_names = ["trl", "trl-trust", "trpa"]
    _paper = paper(
        "Trust Region Preference Approximation: A simple and stable reinforcement learning algorithm for LLM "
        "reasoning",
        "2504.04524",
        "Xuerui Su and Shufang Xie and Guoqing Liu and Yingce Xia and Renqian Luo and Peiran Jin "
        "and Zhiming Ma and Yue Wang and Zun Wang and Yuting Liu",
    )

    def __init__(self, *args, level_fn: Callable[..., list[int | None]] | None = None, **kwargs):
        super().__init__(*args, **kwargs)
        rule = self.args.level_rule
        if level_fn is not None and rule != "reward":
            raise ValueError(f"level_rule={rule!r}: the trainer was given a `level_fn` as well; keep one of the two.")
        self.level_fn = level_fn if rule == "reward" else load_level_rule(rule)

    def extend_rollouts(self, rollouts: GenerationBatch) -> dict[str, Tensor]:
        levels = self._levels(rollouts)  # (n,)
        tensors = rollouts.tensors
        mask = tensors["completion_mask"] * tensors.get("tool_mask", 1)
        ranked = (levels > 0) & (mask.sum(1) > 0)
        # prompts that have something to pay: a pair, or with the fallback any response at all. Groups are whole here
        by_prompt = lambda x: x.view(-1, rollouts.num_generations)
        best = by_prompt(levels.masked_fill(~ranked, torch.iinfo(levels.dtype).max)).amin(1)
        worst = by_prompt(levels.masked_fill(~ranked, 0)).amax(1)
        counts = best < worst if self.args.no_pair_fallback == "skip" else worst > 0
        prompts = self.accelerator.reduce(counts.sum().float(), reduction="sum").clamp(min=1.0)
        # The trainer averages over processes and over the micro-batches of an update. Scaled by both, the sum over
        # prompts becomes their mean over the generation batch, times the share of it that an update sees.
        micro_batches = self.args.steps_per_generation if self.model.training else 1
        weight = self.accelerator.num_processes * micro_batches / prompts
        return {"levels": levels, "prompt_weight": weight.expand(len(levels))}

    def _levels(self, rollouts: GenerationBatch) -> Tensor:
        """(n,) levels of this process's responses; 0 for those without one."""
        rewards = rollouts.rewards
        if self.level_fn is None:
            levels = reward_levels(rewards, self.args.level_one_reward, self.args.level_thresholds)
            return levels[rollouts.rows]
        passed = ("prompt", "completion", "completion_ids")
        columns = {key: [x[key] for x in rollouts.examples] for key in rollouts.examples[0] if key not in passed}
        levels = self.level_fn(
            prompts=rollouts.prompts,
            completions=rollouts.completions,
            completion_ids=rollouts.completion_ids,
            **{**columns, "rewards": rewards[rollouts.rows].tolist()},
        )
        levels = [0 if level is None else level for level in levels]
        if len(levels) != len(rollouts.prompts) or not all(isinstance(x, int) and x >= 0 for x in levels):
            name = getattr(self.level_fn, "__name__", self.level_fn)
            raise ValueError(
                f"{name} returned {levels}: a level rule returns one integer a completion, here "
                f"{len(rollouts.prompts)}, from 1 (best) on, or None for one to leave out."
            )
        return torch.tensor(levels, device=rewards.device)

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        return trpa_loss(batch, **self.settings(trpa_loss))
