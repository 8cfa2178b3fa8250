"""Sibling consistency: what the policy answers to one wording, rewarded by what it answers to the others.

The counterfactual rung of group-robust training (on the taxonomy of the survey arXiv 2307.16851; **inspired**). Rows
of one *pair* ask the same in several *variants* that leave the label alone. An answer to one variant is rewarded by
how often its siblings were lately answered so. Without a correctness signal beside it, the reward is highest for a
constant answer: use it as a term, not alone.

Plain Python, no tensors: the state is a small table that goes into checkpoints as JSON.
"""

from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from ..rewards import completion_text, last_box


Row = tuple[str, str, str | None]  # pair, variant, parsed answer; None: the answer could not be read


class SiblingAnswers:
    """The answer distribution of every (pair, variant), an exponential average over visits.

    Args:
        rate: weight of a new visit, in (0, 1]; the first visit is stored whole.

    Raises:
        ValueError: for a rate outside (0, 1].
    """

    def __init__(self, rate: float = 0.1):
        if not 0 < rate <= 1:
            raise ValueError(f"rate must be in (0, 1], got {rate}")
        self.rate = rate
        self._shares: dict[str, dict[str, dict[str, float]]] = {}  # pair -> variant -> answer -> share

    def share(self, pair: str, variant: str, answer: str) -> float | None:
        """The share of `answer` among those of a variant; None before its first visit."""
        shares = self._shares.get(pair, {}).get(variant)
        return None if shares is None else shares.get(answer, 0.0)

    def reward(self, row: Row) -> float | None:
        """Mean share of the row's answer over the siblings with history, in [0, 1].

        None (TRL's "no reward") where no sibling has history; 0 for an answer that could not be read where one has.
        """
        pair, variant, answer = row
        siblings = [shares for other, shares in self._shares.get(pair, {}).items() if other != variant]
        if not siblings:
            return None
        if answer is None:
            return 0.0
        return sum(shares.get(answer, 0.0) for shares in siblings) / len(siblings)

    def rewards(self, rows: Sequence[Row]) -> list[float | None]:
        """[`reward`] of each row, all against the state as it is: the order of rows changes nothing."""
        return [self.reward(row) for row in rows]

    def update(self, rows: Iterable[Row]) -> None:
        """`P <- (1 - rate) P + rate * empirical` for every (pair, variant) among the rows.

        Give it the rows of all processes together. An answer that could not be read counts as an answer that no
        sibling can share, so that shares of read answers sum to less than 1.
        """
        seen: dict[tuple[str, str], Counter] = defaultdict(Counter)
        for pair, variant, answer in rows:
            seen[pair, variant][answer] += 1
        # Sorted, so that the state is the same to the bit in whatever order the rows came.
        for (pair, variant), counts in sorted(seen.items()):
            total = counts.total()
            new = {answer: counts[answer] / total for answer in sorted(a for a in counts if a is not None)}
            variants = self._shares.setdefault(pair, {})
            old = variants.get(variant)
            if old is not None:
                answers = sorted(old.keys() | new.keys())
                new = {a: (1 - self.rate) * old.get(a, 0.0) + self.rate * new.get(a, 0.0) for a in answers}
            variants[variant] = new

    def state_dict(self) -> dict:
        """The table, in JSON's types."""
        return {pair: {v: dict(shares) for v, shares in variants.items()} for pair, variants in self._shares.items()}

    def load_state_dict(self, state: dict) -> None:
        self._shares = {pair: {v: dict(shares) for v, shares in variants.items()} for pair, variants in state.items()}


def flip_rate(rows: Iterable[Row]) -> float | None:
    """Share of sibling rows, over all pairs, that answer differently; None where no pair has two variants.

    Every two rows of one pair with different variants are compared; each *pair* counts once, by its own share. An
    answer that could not be read differs from every other.
    """
    pairs: dict[str, list[tuple[str, str | None]]] = defaultdict(list)
    for pair, variant, answer in rows:
        pairs[pair].append((variant, answer))
    rates = []
    for members in pairs.values():
        total, variants, answers, both = len(members), Counter(), Counter(), Counter()
        for variant, answer in members:
            variants[variant] += 1
            if answer is not None:
                answers[answer] += 1
                both[variant, answer] += 1
        squares = lambda counts: sum(n * n for n in counts.values())
        across = total * total - squares(variants)  # ordered couples of different variants
        if across:
            rates.append(1 - (squares(answers) - squares(both)) / across)
    return sum(rates) / len(rates) if rates else None


def final_answer(text: str) -> str | None:
    r"""What a completion answers: the content of its last `\boxed{...}`, else its last line; None for blank text."""
    boxed = last_box(text)
    if boxed is not None:
        return boxed
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    return lines[-1] if lines else None


class SiblingReward:
    """A reward function of TRL: [`SiblingAnswers`] over the rows of a data set. Made by [`consistency_reward`].

    Rewards come from the history before the batch, which takes up the batch's answers afterwards: a group-robust
    trainer gathers them over all processes and calls [`settle`]; under another trainer the next call does it, with the
    rows of its own process, evaluation included.

    Attributes:
        answers: the history.
        fresh: rows that were rewarded and are not yet in the history.
    """

    __name__ = "consistency"

    def __init__(self, pair_column: str, variant_column: str, parse: Callable[[str], Any], rate: float):
        self.pair_column, self.variant_column, self.parse = pair_column, variant_column, parse
        self.answers = SiblingAnswers(rate)
        self.fresh: list[Row] = []

    def __call__(self, completions: list, **columns: Any) -> list[float | None]:
        lacking = [name for name in (self.pair_column, self.variant_column) if name not in columns]
        if lacking:
            raise ValueError(f"the data have no column {lacking[0]!r}, which the consistency reward reads.")
        self.settle(self.fresh)
        pairs, variants = columns[self.pair_column], columns[self.variant_column]
        self.fresh = [
            (str(pair), str(variant), self._answer(completion))
            for pair, variant, completion in zip(pairs, variants, completions, strict=True)
        ]
        return self.answers.rewards(self.fresh)

    def _answer(self, completion: Any) -> str | None:
        answer = self.parse(completion_text(completion))
        return None if answer is None else str(answer)

    def settle(self, rows: Iterable[Row]) -> None:
        """Take `rows` into the history; none is fresh afterwards."""
        self.answers.update(rows)
        self.fresh = []


def consistency_reward(
    pair_column: str, variant_column: str, parse: Callable[[str], Any] = final_answer, rate: float = 0.1
) -> SiblingReward:
    """A reward function for TRL: how often the siblings of a row were lately answered as this completion answers.

    Rows with one value of `pair_column` ask the same thing in several wordings, which `variant_column` tells apart.
    In [0, 1]; None, TRL's "no reward", until a sibling was answered; 0 for what `parse` cannot read. It needs a reward
    for being right beside it: alone it is highest for a constant answer.

    Args:
        pair_column: column whose value the siblings share.
        variant_column: column that tells siblings apart.
        parse: takes the text of a completion, returns its answer, or None where there is none.
        rate: weight of a new visit in the history, in (0, 1].

    Raises:
        ValueError: for a rate outside (0, 1], and at the first call for data without the columns.
    """
    return SiblingReward(pair_column, variant_column, parse, rate)
