"""The settings of the adversary over groups, and what it carries from batch to batch, for every host."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor

from ..settings import Count, Fraction, NonNegative, Settings, setting
from .weights import TINY, raise_groups, row_weights


SURVEY = (
    "Towards Trustworthy and Aligned Machine Learning: A Data-centric Survey with Causality Perspectives",
    "2307.16851",
    "Haoyang Liu and Maheep Chaudhary and Haohan Wang",
)


def column_of(args, field: str, data) -> str:
    """The column that a field names.

    Raises:
        ValueError: if the data have no such column, or no known length.
    """
    column, known = getattr(args, field), getattr(data, "column_names", None)
    if not hasattr(data, "__len__") or known is None:
        raise ValueError(f"{field}={column!r} needs a data set of known length: load it without streaming.")
    if column not in known:
        raise ValueError(f"{field}={column!r} is not in the data, which have {', '.join(known)}.")
    return column


def places(rows: Iterable[dict[str, Any]], column: str, index: dict[str, int]) -> list[int]:
    """The place of each row's value in `index`; -1 for one that is not there."""
    return [index.get(str(row.get(column)), -1) for row in rows]


@dataclass
class GroupSettings(Settings):
    """The fields of a config that trains with group weights. Stands before the config of the host."""

    group_column: str | None = setting(
        None, "Column of the data that names the group of a row, such as a dialect or a topic. None: all off."
    )
    group_eta: NonNegative = setting(0.05, "Step size of the adversary; 0 leaves every group an equal say.")
    weighting: Literal["frequency", "plain"] = setting(
        "frequency", "Weight of a row: q / its group's share of the batch, or q alone."
    )
    q_min: Fraction = setting(0.0, "Floor of a group's q, below 1 / the number of groups.")
    max_weight: float = setting(10.0, "Cap of a row's weight before the last scaling to mean 1, at least 1.")
    max_groups: Count = setting(64, "More groups than this raise: a column of free text names no groups.")

    def check_groups(self) -> None:
        """To be called from the host's `validate`."""
        self.require(self.max_weight >= 1, "max_weight", "must be at least 1, or `inf` for no cap")
        self.require(
            self.group_column is None or bool(self.group_column), "group_column", "must name a column, or be None"
        )


class Groups:
    """The groups of a data set and the adversary's share `q` (K,) float64 of each, equal at the start.

    Args:
        names: the value of the group column of every row.
        args: a config with the fields of [`GroupSettings`].

    Raises:
        ValueError: for more groups than `max_groups`, a missing value, or a `q_min` of 1 / K or more.
    """

    def __init__(self, names: Iterable[Any], args: GroupSettings):
        column, names = args.group_column, set(names)
        if None in names:
            raise ValueError(f"group_column={column!r} has rows without a value: name a group for them, or drop them.")
        names = sorted({str(name) for name in names})
        if len(names) > args.max_groups:
            raise ValueError(
                f"group_column={column!r} has {len(names)} different values, more than max_groups={args.max_groups}: "
                f"name a coarser column, or raise max_groups."
            )
        if args.q_min * len(names) >= 1:
            raise ValueError(f"q_min={args.q_min} must be below 1 / {len(names)}, the number of groups.")
        self.names, self.args = names, args
        self.index = {name: i for i, name in enumerate(names)}
        self.q = torch.full((len(names),), 1 / len(names), dtype=torch.float64)

    def of(self, rows: Iterable[dict[str, Any]]) -> list[int]:
        """The group of each row; -1 for one that the training data do not have."""
        return places(rows, self.args.group_column, self.index)

    def weigh(self, losses: Tensor, groups: Tensor) -> Tensor:
        """Raise the groups with large `losses` (K,), and return the weights (B,) float64 of the rows in `groups`.

        Every process calls it with the rows of all of them, and so holds the same `q`.
        """
        self.q = raise_groups(self.q, losses.cpu(), self.args.group_eta, self.args.q_min)
        return row_weights(self.q, groups.cpu(), self.args.weighting, self.args.max_weight).to(groups.device)

    def state(self) -> dict[str, Any]:
        """For JSON, to the bit."""
        return {"groups": self.names, "q": self.q.tolist()}

    def load_state(self, state: dict[str, Any]) -> None:
        """Take up what [`state`] returned.

        Raises:
            ValueError: if it is of other groups.
        """
        if state["groups"] != self.names:
            raise ValueError(
                f"the checkpoint weighs the groups {', '.join(state['groups'])}, and group_column="
                f"{self.args.group_column!r} has {', '.join(self.names)}: resume with the same data."
            )
        self.q = torch.tensor(state["q"], dtype=torch.float64).clamp(min=TINY)
