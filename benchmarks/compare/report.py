"""Tables and pictures of the comparison, from the records alone. See README.md beside this file.

    python benchmarks/compare/report.py

writes `tables.md` and the pictures to benchmarks/results/compare/, and the tables of docs/choosing.md and README.md
between their markers; their sentences are written by hand.
"""

import argparse
import math
import re
import sys
from collections import defaultdict
from pathlib import Path

import numpy as np


sys.path.insert(0, str(Path(__file__).parent))

import judge
from records import FIRST_TUNING_START, GRID, RESULTS, STARTS, TUNING, read, tuned_rate, tuning_scores
from work import entries, regimes


REFERENCE = "dapo"
ADAMW = (REFERENCE, "dapo_step_control")  # what the optimizers are compared with
STEERED = ("dapo_step_control", "dhpo_step_control", "etr_step_control")
OWN = "own"  # in place of a rate: the one that tuning chose for each entry
PAGES = [Path(__file__).parents[2] / name for name in ("docs/choosing.md", "README.md")]
# Of a committed page: a marker and what stands between it and its end
BLOCK = re.compile(
    r"(<!-- (?P<name>[\w .-]+): made by benchmarks/compare/report.py -->\n).*?(<!-- end -->)", re.DOTALL
)

HYPOTHESES = {
    "H1": ("ETR keeps entropy higher than clipping does", "reuse"),
    "H2": ("DISPO does not collapse where CISPO does", "reuse"),
    "H3": ("ALP is the more robust one under a sampler that differs", "mismatch_1"),
    "H4": ("DHPO lies between GRPO and GSPO", "mini_batches"),
    "H5": ("DPPO holds under stale rollouts", "lag_32"),
    "H6": ("a trust region matters once a generation is used several times", "reuse"),
    "S1": ("under step control the term hardly matters", "reuse"),
    "O1": ("Muon collapses under RL with verifiable rewards", "mini_batches"),
    "O2": ("a bounded step mends that", "mini_batches"),
}


def markdown(head: list[str], rows: list[list[str]]) -> str:
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(line)} |\n" for line in lines)


def number(value: float | None, digits: int = 3, sign: str = "") -> str:
    return "" if value is None or not math.isfinite(value) else f"{value:{sign}.{digits}f}"


def between(low: float, high: float, sign: str = "+") -> str:
    return f"[{low:{sign}.3f}, {high:{sign}.3f}]" if math.isfinite(low + high) else ""


def mean(values) -> float:
    values = [v for v in values if v is not None]
    return sum(values) / len(values) if values else math.nan


class Comparison:
    """The records, sorted: runs[task, regime, rate][entry][start]; the rate may be `OWN`.

    Args:
        records: as [`records.read`] finds them.
        whole: runs without which an entry is not judged.
        family: `optimizer` compares the entries of that kind, with AdamW and its step control, `""` all others.
    """

    def __init__(self, records: list[dict], whole: int = len(STARTS), family: str = ""):
        self.whole, self.family = whole, family
        self.entries = {
            name: entry
            for name, entry in entries().items()
            if (entry.kind == "optimizer") == bool(family) or (family and name in ADAMW)
        }
        self.records = [r for r in records if not r["overrides"] and r["entry"] in self.entries]
        self.runs = {}
        for r in self.records:
            if r["start"] < FIRST_TUNING_START:
                cell = self.runs.setdefault((r["task"], r["regime"], r["learning_rate"]), {})
                cell.setdefault(r["entry"], {})[r["start"]] = r
        self.tuning = tuning_scores(self.records)
        for (task, regime, entry), scores in self.tuning.items():
            rate, beyond = tuned_rate(scores)
            runs = self.runs.get((task, regime, rate), {}).get(entry)
            if runs and (beyond is None or beyond in scores):
                self.runs.setdefault((task, regime, OWN), {})[entry] = runs
        alone = [cell for cell, found in self.runs.items() if self.compares_nothing(cell, set(found))]
        for cell in alone:
            del self.runs[cell]

    def title(self, cell) -> str:
        task, regime, rate = cell
        at = "each entry at its own best rate" if rate == OWN else f"learning rate {rate:g} for all"
        return f"{'optimizers, ' if self.family else ''}{task}, {regime}: {at}"

    def name_of(self, cell) -> str:
        """The cell's marker on the page: `addition reuse 0.0001`."""
        parts = (*([self.family] if self.family else []), *cell)
        return " ".join(part if isinstance(part, str) else f"{part:g}" for part in parts)

    def compares_nothing(self, cell, found: set[str]) -> bool:
        """Whether a table holds the reference alone, or of a family no member."""
        return found <= set(ADAMW) if self.family else cell[2] == OWN and found == {REFERENCE}

    def cells(self) -> list[tuple[str, str, float | str]]:
        """What is shown: where the reference was run, or each entry at its own rate."""
        order = list(regimes())
        rate = lambda value: (value == OWN, 0 if value == OWN else value)
        shown = [cell for cell, found in self.runs.items() if REFERENCE in found or cell[2] == OWN]
        return sorted(shown, key=lambda cell: (cell[0], order.index(cell[1]), rate(cell[2])))

    def judged(self, cell) -> dict[str, dict]:
        """What [`judge.compare`] says in a cell; nothing while the reference is not whole there."""
        scores = {entry: {s: r["score"] for s, r in runs.items()} for entry, runs in self.runs[cell].items()}
        reference = scores.pop(REFERENCE, {})
        return judge.compare(scores, reference, self.whole) if len(reference) >= self.whole else {}

    def rows(self, cell) -> list[tuple[str, list[dict], dict]]:
        """Entry, its records, its judgement; the best mean score first, entries that are not whole at the end."""
        judged = self.judged(cell)
        runs = {entry: [found[s] for s in sorted(found)] for entry, found in self.runs[cell].items()}
        order = sorted(runs, key=lambda e: (len(runs[e]) < self.whole, -mean(r["score"] for r in runs[e])))
        return [(entry, runs[entry], judged.get(entry, {})) for entry in order]

    def table(self, cell) -> str:
        """One row an entry: score, difference to the reference and its judgement, and what training ended in."""
        from trl_trust.evaluation.stats import wilson

        head = ["entry", *(["rate"] if cell[2] == OWN else []), "n", "score", "minus the reference", "97.5 %"]
        head += ["p (Holm)", "verdict", "collapsed", "to .5", "pass@8", "worst drop", "entropy", "KL to start"]
        rows = []
        for entry, records, row in self.rows(cell):
            k, n = sum(map(judge.collapsed, records)), len(records)
            low, high = wilson(k, n)
            last = [r["checkpoints"][-1] for r in records if r["checkpoints"]]
            soon = judge.generations_to_target(records)
            verdict = "the reference" if entry == REFERENCE else row.get("verdict", f"not judged, {n} of {self.whole}")
            rates = [f"{records[0]['learning_rate']:g}"] if cell[2] == OWN else []
            cells = [entries()[entry].title, *rates, str(n), number(mean(r["score"] for r in records))]
            if "mean" in row:
                cells += [number(row["mean"], sign="+"), between(row["low"], row["high"])]
            else:
                cells += ["", ""]
            p = "" if "p" not in row else f"{row['p']:.4f}"
            cells += [p, f"**{verdict}**" if verdict in ("better", "worse") else verdict]
            cells += [f"{k} of {n}, [{low:.2f}, {high:.2f}]", f"{soon:g}" if math.isfinite(soon) else "not reached"]
            cells += [number(mean(c.get("pass@8") for c in last)), number(mean(r["worst_drop"] for r in records))]
            cells += [number(mean(c["entropy"] for c in last)), number(mean(c.get("kl") for c in last))]
            rows.append(cells)
        return markdown(head, rows)

    def short_table(self, cell) -> str:
        """The same in five columns, for the page; and the rate."""
        rows = []
        for entry, records, row in self.rows(cell):
            k, n = sum(map(judge.collapsed, records)), len(records)
            verdict = "the reference" if entry == REFERENCE else row.get("verdict", f"not judged, {n} of {self.whole}")
            change = f"{row['mean']:+.3f} {between(row['low'], row['high'])}" if "mean" in row else ""
            rates = [f"{records[0]['learning_rate']:g}"] if cell[2] == OWN else []
            cells = [entries()[entry].title, *rates, number(mean(r["score"] for r in records)), change, verdict]
            rows.append([*cells, f"{k} of {n}"])
        head = ["", *(["rate"] if cell[2] == OWN else []), "score", "minus the reference", "verdict", "collapsed"]
        return markdown(head, rows)

    def windows(self) -> list[tuple[str, str, dict[str, dict[float, float]]]]:
        """Per task and regime: entry -> rate -> mean score, of entries that are whole at two rates or more."""
        found = defaultdict(lambda: defaultdict(dict))
        order = list(regimes())
        for task, regime, rate in sorted(self.runs, key=lambda cell: (cell[0], order.index(cell[1]), str(cell[2]))):
            for entry, runs in self.runs[task, regime, rate].items():
                if rate in GRID and len(runs) >= self.whole:
                    found[task, regime][entry][rate] = mean(r["score"] for r in runs.values())
        wide = {key: {e: by for e, by in cell.items() if len(by) > 1} for key, cell in found.items()}
        return [(*key, cell) for key, cell in wide.items() if cell]

    def window_table(self, cell: dict[str, dict[float, float]]) -> str:
        rates = sorted({rate for by in cell.values() for rate in by})
        head = ["entry", *(f"{rate:g}" for rate in rates), "best", "mean", "largest rate within 90 % of the best"]
        rows = []
        for entry, by in sorted(cell.items(), key=lambda item: -max(item[1].values())):
            best, average, largest = judge.window(by)
            scores = [number(by[rate]) if rate in by else "not run" for rate in rates]
            average = number(average) if len(by) == len(rates) else ""  # of another grid, it would compare nothing
            rows.append([entries()[entry].title, *scores, number(best), average, f"{largest:g}"])
        return markdown(head, rows)

    def overall(self) -> dict[float | str, list]:
        """Rate -> the cells at it that are whole, where these are two or more."""
        found = defaultdict(list)
        for cell in self.cells():
            if self.whole_runs(cell, REFERENCE):
                found[cell[2]].append(cell)
        return {rate: cells for rate, cells in found.items() if len(cells) > 1}

    def overall_table(self, cells: list) -> str:
        """Of entries whole in all `cells`: interquartile mean, and how often one is above the reference."""
        scores = lambda cell, entry: {s: r["score"] for s, r in self.whole_runs(cell, entry).items()}
        rows = []
        for entry in self.entries:
            strata = [scores(cell, entry) for cell in cells]
            if not all(strata):
                continue
            values = [list(by.values()) for by in strata]
            middle = judge.interquartile_mean([v for by in values for v in by])
            row = [entries()[entry].title, number(middle)]
            row.append(between(*judge.stratified_interval(values, judge.interquartile_mean), sign=""))
            won = [judge.wins(by, scores(cell, REFERENCE)) for by, cell in zip(strata, cells, strict=True)]
            share = mean(w for by in won for w in by)
            limits = between(*judge.stratified_interval(won, np.mean), sign="")
            row += ["", ""] if entry == REFERENCE else [number(share, 2), limits]
            rows.append((middle, row))
        head = ["entry", "interquartile mean", "97.5 %", "share of pairs above the reference", "97.5 %"]
        return markdown(head, [row for _, row in sorted(rows, key=lambda item: -item[0])])

    def side_by_side(self, cells: list) -> str:
        """A column a regime: score, and the verdict where it is one; the best mean over the regimes first."""
        judged = {cell: self.judged(cell) for cell in cells}
        rows = []
        for entry in self.entries:
            scores = [mean(r["score"] for r in self.whole_runs(cell, entry).values()) for cell in cells]
            if not any(map(math.isfinite, scores)):
                continue
            row = []
            for cell, score in zip(cells, scores, strict=True):
                verdict = judged[cell].get(entry, {}).get("verdict")
                text = number(score) or "not run"
                row.append(f"{text}, {verdict}" if verdict in ("better", "worse") else text)
            complete = all(map(math.isfinite, scores))
            rows.append((not complete, -mean(s for s in scores if math.isfinite(s)), [entries()[entry].title, *row]))
        several = len({task for task, *_ in cells}) > 1
        head = ["", *((f"{task} " if several else "") + regime.replace("_", " ") for task, regime, _ in cells)]
        return markdown(head, [row for *_, row in sorted(rows)])

    def tuning_table(self, task: str, regime: str) -> str:
        """Mean scores over the tuning starts, by rate, and the rate that was chosen; nothing where none was."""
        found = {entry: by for (t, r, entry), by in self.tuning.items() if (t, r) == (task, regime)}
        rates = sorted({rate for by in found.values() for rate in by})
        rows = []
        for entry, by in found.items():
            rate, beyond = tuned_rate(by)
            done = beyond is None or beyond in by
            chosen = f"{rate:g}" if done and set(TUNING) <= set(by) else "not tuned to the end"
            rows.append([entries()[entry].title, *(number(mean(by[x])) if x in by else "" for x in rates), chosen])
        return markdown(["entry", *(f"{rate:g}" for rate in rates), "chosen"], rows) if rows else ""

    # ----------------------------------------------------------------------------------------------------------------

    def whole_runs(self, cell, entry: str) -> dict[int, dict]:
        runs = self.runs.get(cell, {}).get(entry, {})
        return runs if len(runs) >= self.whole else {}

    def answer(self, name: str, cell) -> str:
        """What a cell says of a hypothesis, or nothing where it is not whole."""
        from trl_trust.evaluation.stats import sign_test

        judged = self.judged(cell)
        said = lambda entry: f"{judged[entry]['mean']:+.3f} {between(judged[entry]['low'], judged[entry]['high'])}"
        if name == "H1":
            a, b = self.whole_runs(cell, "etr"), self.whole_runs(cell, REFERENCE)
            pairs = [(a[s]["checkpoints"], b[s]["checkpoints"]) for s in sorted(set(a) & set(b))]
            gaps = [x[-1]["entropy"] - y[-1]["entropy"] for x, y in pairs if x and y]
            if not gaps:
                return ""
            low, high = judge.interval(gaps)
            held = "holds" if low > 0 else "refuted" if high < 0 else "not shown"
            return f"{held}: final entropy {mean(gaps):+.4f} nats [{low:+.4f}, {high:+.4f}]"
        if name == "H2":
            runs = [self.whole_runs(cell, entry) for entry in ("dispo", "cispo")]
            if not all(runs):
                return ""
            dispo, cispo = ([judge.collapsed(found[s]) for s in sorted(found)] for found in runs)
            pairs = list(zip(dispo, cispo, strict=True))
            text = f"DISPO collapses in {sum(dispo)} of {len(dispo)}, CISPO in {sum(cispo)} of {len(cispo)}"
            p = sign_test(pairs.count((False, True)), pairs.count((True, False)))
            if not any(dispo + cispo):
                return f"not tested, nothing collapses: {text}"
            held = "refuted" if sum(dispo) >= sum(cispo) else "holds" if p <= judge.ALPHA else "not shown"
            return f"{held}: {text}, sign test p {p:.3f}"
        if name == "H4":
            scores = [mean(r["score"] for r in self.whole_runs(cell, e).values()) for e in ("grpo", "dhpo", "gspo")]
            if not all(map(math.isfinite, scores)):
                return ""
            low, high = min(scores[0], scores[2]) - judge.MARGIN, max(scores[0], scores[2]) + judge.MARGIN
            held = "holds" if low <= scores[1] <= high else "refuted"
            return f"{held}: GRPO {scores[0]:.3f}, DHPO {scores[1]:.3f}, GSPO {scores[2]:.3f}"
        if name == "S1":
            scores = {e: {s: r["score"] for s, r in self.whole_runs(cell, e).items()} for e in STEERED}
            if cell[2] == OWN or not all(scores.values()):
                return ""
            found = judge.compare(scores, scores.pop(STEERED[0]), self.whole)
            texts, held = [], "holds"
            for entry, row in found.items():
                low, high = row["low"], row["high"]
                apart = low > judge.MARGIN or high < -judge.MARGIN
                inside = low >= -judge.MARGIN and high <= judge.MARGIN
                held = "refuted" if apart else held if inside or held == "refuted" else "not shown"
                texts.append(f"{entries()[entry].title} {row['mean']:+.3f} {between(low, high)}")
            return f"{held}: minus {entries()[STEERED[0]].title}, {', '.join(texts)}"
        if name in ("O1", "O2"):
            first, second = (REFERENCE, "muon") if name == "O1" else ("muon", "muon_step_control")
            runs = [self.whole_runs(cell, entry) for entry in (first, second)]
            if not all(runs) or (cell[2] == OWN) != (name == "O1"):
                return ""
            k, m = (sum(map(judge.collapsed, found.values())) for found in runs)
            text = f"{entries()[first].title} collapses in {k} of {len(runs[0])}, {entries()[second].title} in {m}"
            if name == "O1":
                return f"{'not refuted' if m > k else 'refuted'}: {text}"
            return f"{'not tested' if k == 0 else 'holds' if m < k else 'refuted'}: {text}"
        entry, wanted = {"H3": ("alp", "better"), "H5": ("dppo", "better"), "H6": ("no_trust_region", "worse")}[name]
        if "verdict" not in judged.get(entry, {}):
            return ""
        verdict = judged[entry]["verdict"]
        held = "holds" if verdict == wanted else "not shown" if verdict == "undecided" else "refuted"
        return f"{held}: {entries()[entry].title} is {verdict}, {said(entry)}"

    def hypotheses(self) -> str:
        rows = []
        for name, (claim, regime) in HYPOTHESES.items():
            if name.startswith("O") != bool(self.family):
                continue
            cells = [cell for cell in self.cells() if cell[1] == regime]
            answers = [f"{self.name_of(cell)}: {said}" for cell in cells if (said := self.answer(name, cell))]
            rows.append([name, claim, regime, "; ".join(answers) or "not run"])
        return markdown(["", "claim", "regime", "here"], rows)

    def not_run(self) -> str:
        """Entries without a whole cell in a regime that was begun, and regimes that were not."""
        lines = []
        for task, regime, rate in self.cells():
            if rate == OWN or not self.whole_runs((task, regime, rate), REFERENCE):
                continue
            whole = [name for name in self.entries if self.whole_runs((task, regime, rate), name)]
            absent = [entry.title for name, entry in self.entries.items() if name not in whole]
            if absent:
                lines.append(f"- {task}, {regime}, rate {rate:g}: {', '.join(absent)}\n")
        begun = {(task, regime) for task, regime, _ in self.cells()}
        for task in ("addition", "sudoku"):
            absent = [regime for regime in regimes() if (task, regime) not in begun]
            if absent:
                lines.append(f"- {task}: {', '.join(absent)}\n")
        return "".join(lines)

    def sections(self) -> str:
        """All tables of the family."""
        text, prefix = [], "optimizers, " if self.family else ""
        for cell in self.cells():
            n, regime = sum(map(len, self.runs[cell].values())), regimes()[cell[1]].title
            text.append(f"\n## {self.title(cell)}\n\n{regime[0].upper()}{regime[1:]}. {n} runs.\n\n{self.table(cell)}")
        for task, regime, cell in self.windows():
            text.append(f"\n## {prefix}{task}, {regime}: the window of learning rates\n\n{self.window_table(cell)}")
        for rate, cells in self.overall().items():
            over = "; ".join(f"{task}, {regime}" for task, regime, _ in cells)
            at = "each at its own best rate" if rate == OWN else f"at {rate:g} for all"
            text.append(f"\n## {prefix}over {len(cells)} regimes, {at}\n\n{over[0].upper()}{over[1:]}.\n\n")
            text.append(self.overall_table(cells))
        for task, regime in sorted({cell[:2] for cell in self.runs if cell[2] == OWN}):
            text.append(f"\n## {prefix}{task}, {regime}: tuning, on starts of its own\n\n")
            text.append(self.tuning_table(task, regime))
        return "".join(text)

    def blocks(self) -> dict[str, str]:
        """The tables of the page, by the names of its markers."""
        prefix = f"{self.family} " if self.family else ""
        found = {self.name_of(cell): self.short_table(cell) for cell in self.cells()}
        found |= {f"{prefix}{task} {regime} window": self.window_table(cell) for task, regime, cell in self.windows()}
        at = lambda rate: rate if rate == OWN else f"{rate:g}"
        for rate, cells in self.overall().items():
            found[f"{prefix}over regimes {at(rate)}"] = self.overall_table(cells)
            found[f"{prefix}side by side {at(rate)}"] = self.side_by_side(cells)
        return found | {f"{prefix}hypotheses": self.hypotheses(), f"{prefix}not run": self.not_run()}


class Report:
    """Everything that is made from `records`: the entries, and the optimizers apart from them."""

    def __init__(self, records: list[dict], whole: int = len(STARTS)):
        self.records, self.entries = records, Comparison(records, whole)
        self.families = [self.entries, Comparison(records, whole, "optimizer")]

    def markdown(self) -> str:
        """All tables."""
        text = [
            "# The comparison: all tables\n\n"
            "Made by `python benchmarks/compare/report.py` from the records beside this file; the rules are in\n"
            "[benchmarks/compare/README.md](../../compare/README.md). Score: mean held-out pass@1 of the last five\n"
            "of ten checkpoints. Differences are paired by start. `to .5`: generations to pass@1 of .5, median.\n"
        ]
        text += [family.sections() for family in self.families]
        text.append(f"\n## Hypotheses\n\n{self.entries.hypotheses()}")
        if self.families[1].runs:
            text.append(f"\n{self.families[1].hypotheses()}")
        text.append(f"\n## Not run\n\n{self.entries.not_run()}")
        seconds = [r["cpu_seconds"] + r["measuring_cpu_seconds"] for r in self.records if not r["overrides"]]
        text.append(f"\n{len(seconds)} runs, {sum(seconds) / 3600:.1f} CPU hours, {mean(seconds):.0f} CPU s a run.\n")
        return "".join(text)

    def blocks(self) -> dict[str, str]:
        return {name: table for family in self.families for name, table in family.blocks().items()}


def fill(page: str, blocks: dict[str, str]) -> str:
    """The page with its blocks anew. Raises KeyError for a marker whose table there is no more."""
    return BLOCK.sub(lambda m: f"{m[1]}{blocks[m['name']]}{m[3]}", page)


# --------------------------------------------------------------------------------------------------------------------
# Pictures
# --------------------------------------------------------------------------------------------------------------------

INK, FAINT, BLUE, RED, GREEN = "#222222", "#bbbbbb", "#3b6ea5", "#b3392f", "#3c8d4f"
COLORS = {"better": GREEN, "worse": RED, "equivalent": BLUE, "undecided": INK}


def _figure(rows: int, columns: int, width: float, height: float):
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "svg.hashsalt": "compare"}
    )
    return plt.subplots(rows, columns, figsize=(width, height), squeeze=False, layout="constrained")


def _save(figure, path: Path) -> Path:
    import matplotlib.pyplot as plt

    figure.savefig(path, metadata={"Date": None})
    plt.close(figure)
    return path


def draw_forest(comparison: Comparison, cell, path: Path) -> Path | None:
    """Paired differences to the reference with their intervals, the margin shaded."""
    rows = [(e, row) for e, _, row in comparison.rows(cell) if "low" in row and math.isfinite(row["low"])]
    if not rows:
        return None
    figure, axes = _figure(1, 1, 7, 1.2 + 0.32 * len(rows))
    ax = axes[0][0]
    ax.axvspan(-judge.MARGIN, judge.MARGIN, color="#eeeeee", zorder=0)
    ax.axvline(0, color=INK, linewidth=0.8)
    for i, (_, row) in enumerate(reversed(rows)):
        color = COLORS.get(row.get("verdict"), FAINT)
        ax.plot([row["low"], row["high"]], [i, i], color=color, linewidth=2)
        ax.plot(row["mean"], i, "o", color=color, markersize=5)
        ax.annotate(
            row.get("verdict", "not judged"), (1.01, i), xycoords=("axes fraction", "data"), va="center", color=color
        )
    ax.set_yticks(range(len(rows)), [entries()[e].title for e, _ in reversed(rows)])
    ax.set_xlabel(f"score minus the reference's, paired by start, with 97.5 % intervals; margin {judge.MARGIN} shaded")
    ax.set_title(comparison.title(cell), loc="left")
    return _save(figure, path)


def draw_curves(comparison: Comparison, cell, path: Path) -> Path | None:
    """Held-out pass@1 over generations: mean and range over starts, the reference in gray."""
    import numpy as np

    def curves(records):
        good = [r["checkpoints"] for r in records if "error" not in r]
        x = [c["generation"] for c in good[0]] if good else []
        return [0, *x], np.array([[r["start_metrics"]["pass@1"], *(c["pass@1"] for c in r["checkpoints"])]
                                  for r in records if "error" not in r])  # fmt: skip

    rows = [row for row in comparison.rows(cell) if any("error" not in r for r in row[1])]
    if not rows:
        return None
    columns = min(5, len(rows))
    lines = math.ceil(len(rows) / columns)
    figure, axes = _figure(lines, columns, 2.2 * columns + 0.4, 1.9 * lines + 0.5)
    reference = next((records for entry, records, _ in rows if entry == REFERENCE), None)
    for ax, (entry, records, _) in zip(axes.flat, rows, strict=False):
        if reference is not None and entry != REFERENCE:
            x, y = curves(reference)
            ax.plot(x, y.mean(0), color=FAINT, linewidth=1.5)
        x, y = curves(records)
        ax.fill_between(x, y.min(0), y.max(0), color=BLUE, alpha=0.2, linewidth=0)
        ax.plot(x, y.mean(0), color=BLUE, linewidth=1.5)
        ax.set_title(f"{entries()[entry].title}, {len(records)}", fontsize=8, loc="left")
        ax.set_ylim(0, 1)
    for ax in list(axes.flat)[len(rows) :]:
        ax.axis("off")
    figure.supxlabel("generations", fontsize=9)
    figure.supylabel("held-out pass@1", fontsize=9)
    return _save(figure, path)


def draw_window(title: str, cell: dict[str, dict[float, float]], path: Path) -> Path:
    """Mean score by learning rate, a line an entry, named at its end."""
    import matplotlib

    figure, axes = _figure(1, 1, 7, 4)
    ax = axes[0][0]
    marks, hues = "os^Dv<>Pp*Xh", matplotlib.colormaps["tab20"].colors
    for i, (entry, by) in enumerate(sorted(cell.items(), key=lambda item: -mean(item[1].values()))):
        rates = sorted(by)
        style = dict(color=INK, linewidth=2) if entry == REFERENCE else dict(color=hues[i % 20], linewidth=1.2)
        ax.plot(rates, [by[r] for r in rates], marker=marks[i % len(marks)], label=entries()[entry].title, **style)
    ax.set_xscale("log")
    ax.set_ylim(0, None)
    ax.set_xlabel("learning rate")
    ax.set_ylabel("score")
    ax.set_title(title, loc="left")
    ax.legend(fontsize=8, frameon=False, loc="center left", bbox_to_anchor=(1, 0.5))
    return _save(figure, path)


def draw(comparison: Comparison, folder: Path) -> list[Path]:
    """All pictures, SVG."""
    made = []
    for cell in comparison.cells():
        stem = comparison.name_of(cell).replace(" ", "-")
        made.append(draw_forest(comparison, cell, folder / f"{stem}-forest.svg"))
        made.append(draw_curves(comparison, cell, folder / f"{stem}-curves.svg"))
    prefix = f"{comparison.family}-" if comparison.family else ""
    for task, regime, cell in comparison.windows():
        made.append(draw_window(f"{task}, {regime}", cell, folder / f"{prefix}{task}-{regime}-window.svg"))
    return [path for path in made if path]


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--input", type=Path, default=RESULTS, help="folder of the records; tables go there too")
    parser.add_argument("--starts", type=int, default=len(STARTS), help="runs without which an entry is not judged")
    args = parser.parse_args(argv)
    report = Report(read(args.input), args.starts)
    if not report.entries.runs:
        parser.error(f"--input={args.input} holds no run of a start below {FIRST_TUNING_START}; run.py makes them")
    made = [args.input / "tables.md", *(path for family in report.families for path in draw(family, args.input))]
    made[0].write_text(report.markdown())
    if args.input == RESULTS:
        blocks = report.blocks()
        for page in PAGES:
            page.write_text(fill(page.read_text(), blocks))
        made += PAGES
    print("\n".join(map(str, made)))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
