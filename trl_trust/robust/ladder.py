"""On which rung of Pearl's ladder does a gap between groups stand? A report from a table of results. No torch.

The survey arXiv 2307.16851 takes Pearl's hierarchy as its unifying frame. Provenance: **inspired**; the three numbers
are standard: a raw gap, the gap standardized over named covariates (back-door adjustment), and the share of sibling
pairs that were answered differently.

    ladder = causal_ladder(results, outcome="correct", nuisance="dialect", covariates=("difficulty",), pair="pair_id")
    print(ladder.to_markdown())
"""

import argparse
import json
import sys
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from ..evaluation.report import Score, TrustReport


ASSUMES = {
    "association": "nothing: whatever goes with the nuisance is in it",
    "intervention": "that the covariates block every back door from nuisance to outcome; only then it is causal",
    "counterfactual": "that siblings differ in the nuisance alone and have one answer by construction",
}
BINS = 4  # of a numeric covariate with more than LEVELS values
LEVELS = 10
RESAMPLES = 2000


def causal_ladder(
    results: Sequence[dict[str, Any]],
    outcome: str,
    nuisance: str,
    covariates: Sequence[str] = (),
    pair: str | None = None,
    *,
    answer: str | None = None,
    prompt: str | None = None,
    overlap: str = "refuse",
    seed: int = 0,
    confidence: float = 0.95,
) -> TrustReport:
    """Association, intervention and counterfactual gap of `outcome` over the values of `nuisance`.

    1. `association`: largest minus smallest mean outcome of a group.
    2. `intervention`: the same of `sum_z P(z) mean(outcome | group, z)` over the cells z of the covariates.
    3. `counterfactual`: share of pairs whose members differ in `answer`.

    Intervals are percentile bootstrap over prompts (rows with one `prompt`, or one `pair`, stay together), of the
    signed difference between the two groups that are highest and lowest in the data, so that they can reach below 0.
    With many groups the two are chosen among many, and a gap is above 0 by chance alone.

    Args:
        results: rows; `outcome` is a number, such as 0 or 1.
        covariates: columns; a numeric one with more than 10 values is cut at its quartiles, and the cuts are reported.
        pair: column that siblings share; None: no third rung.
        answer: column that siblings should agree in; the outcome by default.
        prompt: column that names what is resampled; `pair` by default, else every row.
        overlap: "refuse" raises for a group without a row in a cell; "drop" leaves the cell out and reports the share
            of rows that are lost.

    Raises:
        ValueError: for a column that is missing, an outcome that is no finite number, fewer than two groups, an empty
            cell, or no cell that all groups share.
    """
    rows = list(results)
    answer = answer or outcome
    if overlap not in ("refuse", "drop"):
        raise ValueError(f"overlap={overlap!r} must be 'refuse' or 'drop'")
    for column in filter(None, (outcome, nuisance, *covariates, pair, answer, prompt)):
        lacking = next((i for i, row in enumerate(rows) if row.get(column) is None), None)
        if not rows or lacking is not None:
            raise ValueError(f"column {column!r} is missing in row {lacking or 0} of the results")
    values = _numbers(rows, outcome)
    names = sorted({str(row[nuisance]) for row in rows})
    if len(names) < 2:
        raise ValueError(f"nuisance {nuisance!r} has one value, {names[0]!r}: a gap needs two groups")
    groups = np.array([names.index(str(row[nuisance])) for row in rows])
    cells, cuts = _cells(rows, covariates)
    kept, lost = _overlap(groups, cells, names, overlap)
    pairs = _pairs(rows, pair, answer) if pair else {}

    association = lambda index: _means(values[index], groups[index], len(names))
    intervention = lambda index: _standardized(values[index], groups[index], cells[index], len(names))
    blocks = _blocks(rows, prompt or pair)
    rng = np.random.default_rng(seed)

    def score(name, means, index):
        """Blocks are drawn anew; a draw in which a group or a cell is empty tells nothing and is left out."""
        found = means(index)
        low, *_, high = found.argsort(kind="stable")  # two groups, equal or not
        usable = [block[np.isin(block, index)] for block in blocks]
        drawn = (means(np.concatenate([usable[i] for i in rng.integers(len(usable), size=len(usable))]))
                 for _ in range(RESAMPLES))  # fmt: skip
        gaps = [one[high] - one[low] for one in drawn if one is not None]
        ends = np.quantile(gaps, [(1 - confidence) / 2, (1 + confidence) / 2]) if gaps else (None, None)
        interval = {} if ends[0] is None else {"low": float(ends[0]), "high": float(ends[1])}
        return Score(name, float(found[high] - found[low]), len(index), kind="other", higher_is_better=False,
                     confidence=confidence, **interval)  # fmt: skip

    everyone = np.arange(len(rows))
    scores = [score("association", association, everyone)]
    if covariates:
        scores.append(score("intervention", intervention, kept))
    if pair:
        differs = {key: float(len(set(members)) > 1) for key, members in pairs.items()}
        if not differs:
            raise ValueError(f"pair={pair!r}: no two rows share one, so nothing can be compared")
        scores.append(Score.from_outcomes("counterfactual", differs, higher_is_better=False, confidence=confidence))
    table = [
        {"group": name, "n": int((groups == g).sum()), "mean": float(values[groups == g].mean())}
        for g, name in enumerate(names)
    ]
    meta = {
        "outcome": outcome, "nuisance": nuisance, "covariates": list(covariates), "bins": cuts, "share_lost": lost,
        "notes": [f"{s.name} assumes {ASSUMES[s.name]}" for s in scores]
        + [f"{name} is cut at {', '.join(f'{x:g}' for x in edges)}" for name, edges in cuts.items()]
        + ([f"{lost:.1%} of the rows lie in cells that a group lacks, and are left out"] if lost else []),
    }  # fmt: skip
    return TrustReport(
        f"{outcome} by {nuisance}", suite="ladder", seed=seed, scores=tuple(scores), meta=meta, rows=table
    )


def _numbers(rows: list[dict], column: str) -> np.ndarray:
    try:
        values = np.array([float(row[column]) for row in rows])
    except (TypeError, ValueError):
        values = np.array([np.nan])
    if not np.isfinite(values).all():
        raise ValueError(f"outcome {column!r} must be a finite number in every row, such as 0 or 1")
    return values


def _cells(rows: list[dict], covariates: Sequence[str]) -> tuple[np.ndarray, dict[str, list[float]]]:
    """The cell of every row, as a tuple of levels, and the cuts of binned covariates."""
    columns, cuts = [], {}
    for name in covariates:
        found = [row[name] for row in rows]
        numeric = all(isinstance(x, int | float) and not isinstance(x, bool) for x in found)
        if numeric and len(set(found)) > LEVELS:
            edges = np.unique(np.quantile(found, np.linspace(0, 1, BINS + 1)[1:-1]))
            cuts[name] = edges.tolist()
            columns.append([f"bin {i}" for i in np.searchsorted(edges, found, side="right")])
        else:
            columns.append([str(x) for x in found])
    cells = np.empty(len(rows), dtype=object)
    cells[:] = list(zip(*columns, strict=True)) if columns else [()] * len(rows)
    return cells, cuts


def _overlap(groups: np.ndarray, cells: np.ndarray, names: list[str], overlap: str) -> tuple[np.ndarray, float]:
    """Rows whose cell every group has, and the share of the others."""
    present = set(zip(cells, groups, strict=True))
    empty = [(cell, names[g]) for cell in sorted(set(cells)) for g in range(len(names)) if (cell, g) not in present]
    if empty and overlap == "refuse":
        cell, group = empty[0]
        raise ValueError(
            f"group {group!r} has no row where the covariates are {', '.join(map(str, cell))}: name a coarser "
            f"covariate, or set overlap='drop'"
        )
    without = {cell for cell, _ in empty}
    kept = np.array([i for i, cell in enumerate(cells) if cell not in without], dtype=int)
    if len(kept) == 0:
        raise ValueError("no combination of covariates has rows of every group: name fewer or coarser covariates")
    return kept, 1 - len(kept) / len(cells)


def _means(values: np.ndarray, groups: np.ndarray, count: int) -> np.ndarray | None:
    """(K,) mean of each group; None where one is empty."""
    sizes = np.bincount(groups, minlength=count)
    return None if (sizes == 0).any() else np.bincount(groups, weights=values, minlength=count) / sizes


def _standardized(values: np.ndarray, groups: np.ndarray, cells: np.ndarray, count: int) -> np.ndarray | None:
    """(K,) mean of each group, were the cells shared out alike in all; None where one lacks a cell."""
    levels = {cell: i for i, cell in enumerate(dict.fromkeys(cells))}
    index = np.array([levels[cell] for cell in cells])
    sizes, sums = np.zeros((count, len(levels))), np.zeros((count, len(levels)))
    np.add.at(sizes, (groups, index), 1)
    np.add.at(sums, (groups, index), values)
    if (sizes == 0).any():
        return None
    return (sums / sizes) @ (sizes.sum(0) / sizes.sum())


def _pairs(rows: list[dict], pair: str, answer: str) -> dict[str, list[str]]:
    found = defaultdict(list)
    for row in rows:
        found[str(row[pair])].append(str(row[answer]))
    return {key: members for key, members in found.items() if len(members) > 1}


def _blocks(rows: list[dict], column: str | None) -> list[np.ndarray]:
    found = defaultdict(list)
    for i, row in enumerate(rows):
        found[str(row[column]) if column else i].append(i)
    return [np.array(block) for block in found.values()]


def main(words: list[str]) -> int:
    """`trl-trust ladder`: read lines of JSON, write the report, print it.

    Raises:
        ValueError, OSError: in one line.
    """
    parser = argparse.ArgumentParser(prog="trl-trust ladder", description=__doc__.splitlines()[0])
    parser.add_argument("results", help="lines of JSON, one result a line")
    parser.add_argument("--outcome", required=True, help="column with a number, such as 0 or 1")
    parser.add_argument("--nuisance", required=True, help="column that names the group of a row")
    parser.add_argument("--covariates", nargs="+", default=[], help="columns that the gap is adjusted for")
    parser.add_argument("--pair", help="column that siblings share")
    parser.add_argument("--answer", help="column that siblings should agree in (default: the outcome)")
    parser.add_argument("--prompt", help="column that names what is resampled (default: --pair, else the row)")
    parser.add_argument("--overlap", choices=["refuse", "drop"], default="refuse", help="for cells that a group lacks")
    parser.add_argument("--seed", type=int, default=0, help="of the bootstrap (default 0)")
    parser.add_argument("--out", help="folder of report.json, .md and .png")
    args = parser.parse_args(words)
    rows = []
    for number, line in enumerate(Path(args.results).read_text("utf-8").splitlines(), 1):
        if line.strip():
            try:
                rows.append(dict(json.loads(line)))
            except (ValueError, TypeError) as error:
                raise ValueError(f"{args.results}, line {number}: no JSON object ({error})") from None
    report = causal_ladder(
        rows, args.outcome, args.nuisance, args.covariates, args.pair,
        answer=args.answer, prompt=args.prompt, overlap=args.overlap, seed=args.seed,
    )  # fmt: skip
    if args.out:
        report.save(args.out)
    sys.stdout.write(report.to_markdown() + "\n")
    return 0
