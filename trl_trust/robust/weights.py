"""The adversary of group-robust training: how much each group of a nuisance counts, and so each row.

Group DRO by exponentiated losses, the first of the three families that the survey arXiv 2307.16851 names. Provenance:
**inspired**; the survey gives the taxonomy, these are the standard forms of the literature it covers.

Everything is a pure function of the rows of a whole batch, of all processes together, in float64. `K` counts groups,
`B` rows; `groups` (B,) holds each row's group, 0 to K - 1.
"""

import math

import torch
from torch import Tensor


TINY = torch.finfo(torch.float64).tiny  # a q of exactly 0 could never grow again, and 0/0 be the weight of its rows


def group_means(values: Tensor, groups: Tensor, num_groups: int) -> tuple[Tensor, Tensor]:
    """Mean value of every group and the rows behind it; a value that is not finite counts for none.

    Args:
        values: (B,) a loss or a reward a row.
        groups: (B,) integers in [0, num_groups).

    Returns:
        means (K,) float64, NaN for a group with no row; counts (K,) float64.
    """
    values = values.double()
    known = torch.isfinite(values)
    groups = groups[known]
    zeros = torch.zeros(num_groups, dtype=torch.float64, device=values.device)
    counts = zeros.index_add(0, groups, torch.ones_like(groups, dtype=torch.float64))  # (K,)
    return zeros.index_add(0, groups, values[known]) / counts, counts


def shortfall(mean_rewards: Tensor, reward_range: tuple[float, float] = (0.0, 1.0)) -> Tensor:
    """A mean reward (K,) as a loss in [0, 1]: `(hi - m) / (hi - lo)`, clipped. NaN stays NaN.

    Raises:
        ValueError: if the range is not two finite numbers, the lower one first.
    """
    low, high = reward_range
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ValueError(f"reward_range must be two finite numbers, the lower one first, got {reward_range}")
    return ((high - mean_rewards.double()) / (high - low)).clamp(0.0, 1.0)


def raise_groups(q: Tensor, losses: Tensor, eta: float, q_min: float = 0.0) -> Tensor:
    """One step of the adversary: `q_g exp(eta L_g)`, scaled to sum 1, held at `q_min` or more, scaled once more.

    The floor comes after the first scaling, so that it means the same at any size of the losses. The second scaling
    takes at most the factor `1 + K q_min` off it.

    Args:
        q: (K,) shares that sum to 1.
        losses: (K,) the loss of each group; a group whose loss is not finite was not seen, and counts as loss 0.
        eta: step size, 0 leaves q as it is.
        q_min: floor of a share, in [0, 1/K).

    Returns:
        (K,) float64, sum 1.
    """
    q, losses = q.double(), losses.double()
    if eta == 0:
        return q
    grown = torch.log(q) + eta * torch.where(torch.isfinite(losses), losses, 0.0)
    shares = torch.softmax(grown, dim=0).clamp(min=max(q_min, TINY))
    return shares / shares.sum()


def row_weights(q: Tensor, groups: Tensor, weighting: str = "frequency", max_weight: float = 10.0) -> Tensor:
    """The weight of every row, mean 1 over the batch: `q_c / p_c`, with `p_c` the group's share of the rows.

    Weights are scaled to mean 1, cut at `max_weight`, and scaled once more, which may take them above it again. A
    batch of one group has weights of exactly 1.

    Args:
        q: (K,) shares of the adversary.
        groups: (B,) integers in [0, K).
        weighting: "frequency", as above, under which equal q mean equal say of every *group*; or "plain", which
            leaves `p_c` out, under which equal q mean equal say of every *row*.
        max_weight: cap, at least 1; `inf` for none.

    Returns:
        (B,) float64.
    """
    counts = torch.bincount(groups, minlength=len(q)).double()  # (K,)
    shares = counts / counts.sum()
    present = counts > 0
    weights = q.double() / shares if weighting == "frequency" else q.double()
    weights = torch.where(present, weights, 0.0)  # (K,)
    # By group, not by row: n equal numbers summed and divided by n need not give the number back.
    weights = weights / (shares * weights).sum()
    weights = weights.clamp(max=max_weight)
    weights = weights / (shares * weights).sum()
    return weights[groups]


def variant_chances(failures: Tensor, floor: float = 0.05) -> Tensor:
    """Chances (V,) float64 of drawing each variant of a pair, in proportion to `floor + failure_v`.

    `failures` (V,) are averages of 1 - normalized reward, in [0, 1]; `floor` above 0 keeps every variant in play.
    """
    odds = failures.double() + floor
    return odds / odds.sum()
