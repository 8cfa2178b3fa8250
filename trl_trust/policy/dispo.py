"""DISPO: four separate clips on a REINFORCE weight (arXiv 2602.00983).

Nearest TRL loss: `loss_type="cispo"`, which caps the detached importance weight from above with one number. DISPO
clips it from both sides, with one band for correct responses and another for incorrect ones. Clipping changes how much
a token counts; no token loses its gradient.

Provenance: **structure confirmed, defaults third-party**. The four clips, {up, down} x {correct, incorrect}, and the
REINFORCE form are confirmed by the abstract. The formula and the choice of band by the sign of the advantage come from
third-party code (`orangeaico/slime`, `slime/utils/ppo_utils.py`), the default widths from that repository's scripts.
The choice by a verifier (`select="correct"`) is a reconstruction.
"""

from dataclasses import dataclass
from typing import ClassVar, Literal

import torch

from ..settings import NonNegative, Number, Width, setting
from .base import LOG_RATIO_LIMIT, PolicyBatch, PolicyLoss, TrustGRPOConfig, TrustGRPOTrainer, paper


def dispo_loss(
    batch: PolicyBatch,
    *,
    epsilon_pos_low: float = 0.2,
    epsilon_pos_high: float = 10.0,
    epsilon_neg_low: float = 1.0,
    epsilon_neg_high: float = 100.0,
    select: str = "advantage",
    correct_threshold: float = 1.0,
) -> PolicyLoss:
    """`-sg[clip(ratio, lo, hi)] A logps`, with `lo = max(0, 1 - low)` and `hi = 1 + high` of the response's regime.

    The regime is "pos" where A > 0 (`select="advantage"`) or where the reward is at least `correct_threshold`
    (`select="correct"`, which needs `batch.rewards`), and "neg" elsewhere. Gradient per token: `-w A`, through `logps`
    alone.

    Returns:
        per-token loss (B, T); metrics `dispo/clip_ratio/{pos,neg}_{low,high}`, fractions of all live tokens whose
        weight was clipped, tokens with A = 0 left out, and `dispo/weight/{mean,max}`.
    """
    advantages = batch.advantages  # (B, 1) or (B, T)
    if select == "advantage":
        positive = advantages > 0
    else:
        positive = (batch.rewards >= correct_threshold).unsqueeze(1)  # (B, 1)
    log_ratio = (batch.logps - batch.old_logps).detach()
    ratio = torch.exp(log_ratio.clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT))  # (B, T)

    number = lambda x: torch.full((), x, dtype=ratio.dtype, device=ratio.device)  # `where` makes floats float32
    low = torch.where(positive, number(max(0.0, 1 - epsilon_pos_low)), number(max(0.0, 1 - epsilon_neg_low)))
    high = torch.where(positive, number(1 + epsilon_pos_high), number(1 + epsilon_neg_high))
    weight = torch.clamp(ratio, low, high)

    below, above = (ratio < low).float(), (ratio > high).float()
    pos = (positive & (advantages != 0)).float()
    neg = (~positive & (advantages != 0)).float()
    return PolicyLoss(
        -weight * advantages * batch.logps,
        {
            "dispo/clip_ratio/pos_low": below * pos,
            "dispo/clip_ratio/pos_high": above * pos,
            "dispo/clip_ratio/neg_low": below * neg,
            "dispo/clip_ratio/neg_high": above * neg,
            "dispo/weight/mean": weight,
            "dispo/weight/max": weight,
        },
    )


@dataclass
class DISPOConfig(TrustGRPOConfig):
    r"""
    Configuration of [`DISPOTrainer`]: every field of [`TrustGRPOConfig`], and the widths of the four clips.

    Widths are relative to 1: an absolute cap c, as in TRL's `cispo`, is a `*_high` of c - 1.

    Raises:
        ValueError: for a width that is negative or NaN, an unknown `select`, a `correct_threshold` that is not finite,
            or `epsilon`, `epsilon_high`, `delta` or `importance_sampling_level` other than TRL's default.
    """

    unread_fields: ClassVar[dict[str, str]] = {
        "epsilon": "use `epsilon_pos_low` and `epsilon_neg_low`",
        "epsilon_high": "use `epsilon_pos_high` and `epsilon_neg_high`",
        "delta": "use `epsilon_neg_high`, which caps the weight of incorrect responses",
        "importance_sampling_level": "DISPO weights single tokens",
    }

    epsilon_pos_low: NonNegative = setting(
        0.2, "Down-clip width of the weight where A > 0. 1 or more: no lower bound."
    )
    epsilon_pos_high: Width = setting(
        10.0, "Up-clip width of the weight where A > 0: the cap is 1 + this. `inf`: no cap."
    )
    epsilon_neg_low: NonNegative = setting(
        1.0, "Down-clip width of the weight where A <= 0. 1 or more: no lower bound."
    )
    epsilon_neg_high: Width = setting(
        100.0, "Up-clip width of the weight where A <= 0: the cap is 1 + this. `inf`: no cap."
    )
    select: Literal["advantage", "correct"] = setting(
        "advantage", "What chooses the band of a response: its advantage's sign, or its reward (a reconstruction)."
    )
    correct_threshold: Number = setting(1.0, "Reward from which a response is correct, with `select='correct'`.")


class DISPOTrainer(TrustGRPOTrainer):
    """
    GRPO with DISPO's policy term (arXiv 2602.00983): four clips on a REINFORCE weight. See [`dispo_loss`].

    Takes the arguments of [`trl.GRPOTrainer`]; `args` is a [`DISPOConfig`], or a `GRPOConfig` for the defaults.
    """

    config_class = DISPOConfig
    _name = "DISPO"
    _tag_names = ["trl", "trl-trust", "dispo"]
    _paper = paper(
        "DISPO: Enhancing Training Efficiency and Stability in Reinforcement Learning for Large Language Model "
        "Mathematical Reasoning",
        "2602.00983",
        "Batuhan K. Karaman and Aditya Rawal and Suhaila Shakiah and Mohammad Ghavamzadeh and "
        "Mingyi Hong and Arijit Biswas and Ruida Zhou",
    )

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        return dispo_loss(batch, **self.settings(dispo_loss))
