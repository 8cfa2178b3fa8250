"""The one form in which this package writes down a measurement: scores with intervals, and rows of a table. No torch.

report = TrustReport("out/policy", suite="core", scores=(Score.proportion("honesty", 28, 32),))
report.save("out/report")                        # report.json, report.md, report.png
report.compare(TrustReport.load("old/report.json")).alerts
report.gate(min_honesty=0.8, baseline=old)       # raises TrustGateError
"""

import json
import math
import os
import platform
import subprocess
import warnings
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from difflib import get_close_matches
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from .stats import bootstrap, newcombe, newcombe_paired, sign_test, square_and_add, wilson, z_value


SCHEMA = 1  # of the JSON; raised when an older reader would misread a newer file
KINDS = ("proportion", "mean", "other")


class TrustGateError(Exception):
    """A report is outside the limits that [`TrustReport.gate`] was given. The message names each."""


@dataclass(frozen=True)
class Score:
    """One measured number.

    Attributes:
        name: e.g. `"honesty"`; `/` separates levels.
        value: None is "not measured". `inf` and NaN are kept.
        n: Items behind it, 0 where that means nothing.
        low, high: Limits of its interval at `confidence`; None where it has none.
        no_answer: Share of items without a readable answer; None where that means nothing.
        kind: `"proportion"` (in [0, 1], of n items), `"mean"` (of n values), `"other"` (a p-value, a ratio, a count).
        higher_is_better: None where neither direction is better.
        paired_with: Name of a score of the same report on the same items.
        unit: e.g. `"nats"`; empty for a proportion.
        confidence: Of the interval.
        outcomes: Item id -> 0, 1 or the item's value. Two scores with the same ids are compared item by item.
        extra: Fields of a file that this version does not know; written back as they were.
    """

    name: str
    value: float | None
    n: int = 0
    low: float | None = None
    high: float | None = None
    no_answer: float | None = None
    kind: str = "proportion"
    higher_is_better: bool | None = True
    paired_with: str | None = None
    unit: str = ""
    confidence: float = 0.95
    outcomes: Mapping[str, float] | None = field(default=None, repr=False)
    extra: Mapping = field(default_factory=dict, repr=False)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise ValueError(f"score {self.name!r}: kind={self.kind!r} must be one of {', '.join(KINDS)}")
        if self.kind == "proportion" and self.value is not None and not 0 <= self.value <= 1:
            raise ValueError(f"score {self.name!r}: a proportion must be in [0, 1], not {self.value}; kind='mean'?")
        if (self.low is None) != (self.high is None):
            raise ValueError(f"score {self.name!r}: give both `low` and `high`, or neither")

    @classmethod
    def proportion(cls, name: str, successes: int, n: int, *, confidence: float = 0.95, **more) -> "Score":
        """`successes / n` with Wilson's interval; "not measured" where n is 0."""
        if n == 0:
            return cls(name, None, **more)
        low, high = wilson(successes, n, confidence)
        return cls(name, successes / n, n, low, high, confidence=confidence, **more)

    @classmethod
    def mean(cls, name: str, values: Sequence[float], *, confidence: float = 0.95, seed: int = 0, **more) -> "Score":
        """The mean of `values` with its bootstrap interval; "not measured" for none of them."""
        values = [float(value) for value in values]
        if not values:
            return cls(name, None, kind="mean", **more)
        value = math.fsum(values) / len(values)
        low, high = bootstrap(values, confidence, seed=seed) if all(map(math.isfinite, values)) else (None, None)
        return cls(name, value, len(values), low, high, kind="mean", confidence=confidence, **more)

    @classmethod
    def from_outcomes(cls, name: str, outcomes: Mapping[str, float], **more) -> "Score":
        """A proportion where every outcome is 0 or 1, else a mean; the outcomes are kept for paired comparison."""
        if all(value in (0, 1) for value in outcomes.values()):
            return cls.proportion(name, int(sum(outcomes.values())), len(outcomes), outcomes=dict(outcomes), **more)
        return cls.mean(name, list(outcomes.values()), outcomes=dict(outcomes), **more)


@dataclass(frozen=True)
class Delta:
    """What became of one score.

    Attributes:
        name: Of the score.
        before, after: Its two values.
        delta: `after - before`.
        drop: By how much it became worse (negative: better); `delta` signed by `higher_is_better`, None without one.
        low, high: Interval of `delta` at the confidence of the scores; None where there is none.
        paired: Whether both were measured on the same items.
        p: One-sided exact sign test of "worse" on the items whose outcome changed; None unless paired.
        alert: Whether the drop is large enough and cannot be chance; see [`TrustReport.compare`].
    """

    name: str
    before: float | None
    after: float | None
    delta: float | None = None
    drop: float | None = None
    low: float | None = None
    high: float | None = None
    paired: bool = False
    p: float | None = None
    alert: bool = False


@dataclass(frozen=True)
class Comparison:
    """Two reports side by side.

    Attributes:
        deltas: One a score that both have, in the order of the newer report.
        missing: Names that only one of the two has.
    """

    deltas: tuple[Delta, ...]
    missing: tuple[str, ...] = ()

    @property
    def alerts(self) -> tuple[str, ...]:
        """Names of the scores that became worse beyond chance."""
        return tuple(delta.name for delta in self.deltas if delta.alert)

    @property
    def worst(self) -> Delta | None:
        """The largest drop, alert or not; None where nothing has a direction."""
        return max((d for d in self.deltas if d.drop is not None), key=lambda d: d.drop, default=None)

    def __getitem__(self, name: str) -> Delta:
        return _named(self.deltas, name, "delta")

    def to_markdown(self) -> str:
        rows = [
            (
                delta.name,
                _number(delta.before),
                _number(delta.after),
                _with_limits(delta.delta, delta.low, delta.high, sign=True),
                ("same items" + ("" if delta.p is None else f", p {delta.p:.2g}")) if delta.paired else "fresh items",
                "**worse**" if delta.alert else "",
            )
            for delta in self.deltas
        ]
        text = _table(("score", "before", "after", "change", "compared on", "alert"), rows)
        return text + (f"\nOnly in one of the two: {', '.join(self.missing)}.\n" if self.missing else "")


@dataclass(frozen=True)
class TrustReport:
    """What was measured of one subject.

    Attributes:
        subject: A model id, a folder, a file.
        suite: What measured it.
        seed: Of the items; None where nothing is drawn.
        scores: Numbers of the subject.
        rows: A table, one dict a row with the same keys (a compression method, a tier, a rung). The first key names
            the row. Beside `x`, the keys `x_low` and `x_high` are its interval.
        meta: Anything else that JSON can hold. `not_measured` (list) and `notes` (list) are printed.
        extra: Fields of a file that this version does not know; written back as they were.
    """

    subject: str
    suite: str
    seed: int | None = None
    scores: tuple[Score, ...] = ()
    meta: dict = field(default_factory=dict)
    rows: tuple[dict, ...] = ()
    extra: Mapping = field(default_factory=dict, repr=False)

    def __post_init__(self):
        object.__setattr__(self, "scores", tuple(self.scores))
        object.__setattr__(self, "rows", tuple(self.rows))
        names = [score.name for score in self.scores]
        if twice := {name for name in names if names.count(name) > 1}:
            raise ValueError(f"a report holds each score once; twice there: {', '.join(sorted(twice))}")

    def __getitem__(self, name: str) -> Score:
        return _named(self.scores, name, "score")

    # ---- files ----

    def to_json(self) -> str:
        """Strict JSON: what is not finite becomes the strings `"inf"`, `"-inf"`, `"nan"`."""
        as_dict = {
            "schema": SCHEMA,
            "subject": self.subject,
            "suite": self.suite,
            "seed": self.seed,
            "scores": [_to_dict(score) for score in self.scores],
            "rows": list(self.rows),
            "meta": self.meta,
            **self.extra,
        }
        return json.dumps(_encode(as_dict), indent=1, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, source: str = "the report") -> "TrustReport":
        """The report in `text`; `source` is what an error calls it.

        Raises:
            ValueError: if it is none, or one of a newer schema.
        """
        try:
            given = json.loads(text)
            schema = given.pop("schema")
        except (json.JSONDecodeError, AttributeError, KeyError, TypeError):
            raise ValueError(f"{source} is not a report of trl-trust: no JSON with a field 'schema'") from None
        if not isinstance(schema, int) or not 1 <= schema <= SCHEMA:
            raise ValueError(f"{source} has schema {schema}, this version reads 1 to {SCHEMA}: upgrade trl-trust")
        try:
            given = _decode(given)
            given["scores"] = tuple(_from_dict(Score, score) for score in given.get("scores", ()))
            return _from_dict(cls, given)
        except TypeError as error:
            raise ValueError(f"{source} is not a whole report of trl-trust: {error}") from None

    def save(self, path: str | os.PathLike) -> Path:
        """Write `path` if it ends in `.json`, else `report.json`, `report.md` and `report.png` in the folder `path`.

        Each text is there whole or not at all, and a disk that fills leaves the report before it. Without matplotlib
        there is no picture and one warning. Returns the JSON's path.
        """
        path = Path(path)
        if path.suffix == ".json":
            path.parent.mkdir(parents=True, exist_ok=True)
            _write_whole(path, self.to_json())
            return path
        path.mkdir(parents=True, exist_ok=True)
        _write_whole(path / "report.json", self.to_json())
        _write_whole(path / "report.md", self.to_markdown())
        try:
            self.plot(path / "report.png")
        except ImportError:
            warnings.warn(
                "no report.png, since matplotlib is not installed: pip install trl-trust[plot]", stacklevel=2
            )
        return path / "report.json"

    @classmethod
    def load(cls, path: str | os.PathLike) -> "TrustReport":
        """Read a report's JSON, or the folder that [`save`] wrote. Raises ValueError as [`from_json`], and OSError."""
        path = Path(path)
        path = path / "report.json" if path.is_dir() else path
        return cls.from_json(path.read_text("utf-8"), source=str(path))

    # ---- reading it ----

    def to_markdown(self) -> str:
        """The report as text: scores with interval and no-answer share, the rows, what was not measured."""
        parts = [f"# Trust report: {self.subject}\n", f"Suite {self.suite}, seed {self.seed}.\n"]
        if self.scores:
            rows = [
                (
                    score.name,
                    _with_limits(score.value, score.low, score.high) + (f" {score.unit}" if score.unit else ""),
                    str(score.n or ""),
                    "" if score.no_answer is None else _number(score.no_answer),
                    {True: "higher", False: "lower", None: ""}[score.higher_is_better],
                )
                for score in self.scores
            ]
            parts.append(_table(("score", "value [interval]", "n", "no answer", "better"), rows))
        if self.rows:
            names = [key for key in self.rows[0] if not _is_limit(key, self.rows[0])]
            rows = [[_cell(row, name) for name in names] for row in self.rows]
            parts.append(_table(names, rows))
        if self.meta.get("not_measured"):
            parts.append("Not measured: " + "; ".join(self.meta["not_measured"]) + ".\n")
        parts += [f"{note}\n" for note in self.meta.get("notes", ())]
        return "\n".join(parts)

    def plot(self, path: str | os.PathLike) -> Path:
        """Draw to `path`: a radar of three proportions or more, else bars; of the rows where there are no scores.

        Raises:
            ImportError: without matplotlib.
            ValueError: if there is nothing to draw.
        """
        from .plots import draw

        return draw([self], path)

    def compare(self, before: "TrustReport", *, alert_drop: float = 0.05, alpha: float = 0.05) -> Comparison:
        """Compare with an earlier report, score by score.

        An alert is a drop of at least `alert_drop` that chance does not explain at level `alpha / K`, K the number of
        scores that can be tested. On the same items (equal `outcomes` ids): the exact one-sided sign test on those
        whose outcome changed. On fresh items: the one-sided upper limit of the change (Newcombe's for proportions, the
        square-and-add rule on the two intervals for means) is below 0. A plain threshold on the drop alarms in a third
        of evaluations of an unchanged policy. Scores of kind `"other"`, and those without interval, raise no alert.

        Raises:
            ValueError: for an `alert_drop` or `alpha` outside (0, 1), or a score whose kind changed.
        """
        for name, value in (("alert_drop", alert_drop), ("alpha", alpha)):
            if not 0 < value < 1:
                raise ValueError(f"{name}={value} must be in (0, 1), such as 0.05")
        old = {score.name: score for score in before.scores}
        pairs = [(old[score.name], score) for score in self.scores if score.name in old]
        level = alpha / max(1, sum(_testable(*pair) for pair in pairs))
        own = {score.name for score in self.scores}
        return Comparison(
            tuple(_delta(*pair, alert_drop, level) for pair in pairs), tuple(sorted(own.symmetric_difference(old)))
        )

    def gate(
        self, limits: Mapping[str, float] | None = None, *, baseline: "TrustReport | None" = None, **more
    ) -> None:
        """Raise unless the report is within limits; for release scripts.

        Args:
            limits, more: `max_NAME` or `min_NAME` -> number, NAME a score or a column of the rows (each row must hold
                it). A value that was not measured or is NaN is outside every limit.
            baseline: An earlier report; an alert of [`compare`] is outside too.

        Raises:
            TrustGateError: naming each score or row that is outside.
            ValueError: for a limit on a name that the report does not have.
        """
        broken = []
        for key, limit in {**(limits or {}), **more}.items():
            side, _, name = key.partition("_")
            found = [("", score.value) for score in self.scores if score.name == name]
            found += [(f"{next(iter(row.values()))}: ", row[name]) for row in self.rows if name in row]
            if side not in ("max", "min") or not found:
                known = [f"{s}_{n}" for n in self._names() for s in ("max", "min")]
                raise ValueError(f"gate: there is nothing for {key!r}; {_near(key, known)}")
            for where, value in found:
                measured = isinstance(value, (int, float)) and not math.isnan(value)
                if not (measured and (value <= limit if side == "max" else value >= limit)):
                    sign = "above" if side == "max" else "below"
                    broken.append(
                        f"{where}{name} {_number(value)} is {sign} {limit}"
                        if measured
                        else f"{where}{name} not measured"
                    )
        if baseline is not None:
            comparison = self.compare(baseline)
            for name in comparison.alerts:
                delta = comparison[name]
                broken.append(f"{name} fell from {_number(delta.before)} to {_number(delta.after)}")
        if broken:
            raise TrustGateError(f"{self.subject}: {'; '.join(broken)}")

    def merge(self, other: "TrustReport") -> "TrustReport":
        """This report with the other's scores, rows and meta added; ValueError unless the subject is the same."""
        if self.subject != other.subject:
            raise ValueError(f"cannot merge reports of {self.subject!r} and {other.subject!r}")
        listed = {key: [*self.meta.get(key, ()), *other.meta.get(key, ())] for key in ("not_measured", "notes")}
        return replace(
            self,
            suite=self.suite if self.suite == other.suite else f"{self.suite}, {other.suite}",
            scores=self.scores + other.scores,
            rows=self.rows + other.rows,
            meta={**other.meta, **self.meta, **{key: list(dict.fromkeys(v)) for key, v in listed.items() if v}},
            extra={**other.extra, **self.extra},
        )

    def _names(self) -> list[str]:
        return [*(score.name for score in self.scores), *dict.fromkeys(key for row in self.rows for key in row)]


def name_of(model) -> str:
    """Where a model came from; its class where it was built on the spot."""
    return getattr(getattr(model, "config", None), "_name_or_path", "") or type(model).__name__


def environment(model_id: str | None = None, device: str | None = None) -> dict:
    """What a report's `meta` says of where it comes from: model, versions, machine, git commit of this package."""
    versions = {}
    for package in ("trl-trust", "torch", "transformers", "trl"):
        try:
            versions[package] = version(package)
        except PackageNotFoundError:
            continue
    found = {"model": model_id, "device": device, "python": platform.python_version(), "versions": versions}
    root = Path(__file__).resolve().parents[2]
    if (root / ".git").exists():  # a checkout, not an installed wheel
        git = subprocess.run(["git", "-C", str(root), "rev-parse", "HEAD"], capture_output=True, text=True)
        found["commit"] = git.stdout.strip() or None
    return {key: value for key, value in found.items() if value is not None}


# --------------------------------------------------------------------------------------------------------------------
# One change
# --------------------------------------------------------------------------------------------------------------------


def _same_items(before: Score, after: Score) -> bool:
    return bool(before.outcomes) and bool(after.outcomes) and before.outcomes.keys() == after.outcomes.keys()


def _testable(before: Score, after: Score) -> bool:
    measured = before.value is not None and after.value is not None and after.higher_is_better is not None
    limits = before.low is not None and after.low is not None
    return measured and (_same_items(before, after) or (after.kind != "other" and limits))


def _delta(before: Score, after: Score, alert_drop: float, level: float) -> Delta:
    if before.kind != after.kind:
        raise ValueError(f"score {after.name!r} was a {before.kind} and is a {after.kind}: they cannot be compared")
    if before.value is None or after.value is None:
        return Delta(after.name, before.value, after.value)
    change = after.value - before.value
    worse = -1 if after.higher_is_better else 1
    drop = None if after.higher_is_better is None else worse * change
    paired, p, confidence = _same_items(before, after), None, after.confidence
    low = high = None
    beyond_chance = False
    if paired:
        differences = [after.outcomes[key] - before.outcomes[key] for key in after.outcomes]
        if after.kind == "proportion":
            counts = [0, 0, 0, 0]  # both, gained, lost, neither
            for key, now in after.outcomes.items():
                then = before.outcomes[key]
                counts[0 if now and then else 1 if now else 2 if then else 3] += 1
            low, high = newcombe_paired(*counts, confidence)
        elif all(map(math.isfinite, differences)):
            low, high = bootstrap(differences, confidence)
        if after.higher_is_better is not None:
            p = sign_test(sum(worse * d > 0 for d in differences), sum(worse * d < 0 for d in differences))
            beyond_chance = p <= level
    elif _testable(before, after):
        low, high = _unpaired_interval(before, after, confidence)
        strict = _unpaired_interval(before, after, 1 - 2 * level)  # its one limit is at level 1 - level
        beyond_chance = strict[1] < 0 if after.higher_is_better else strict[0] > 0
    # the drop is rounded, so that .95 -> .90 is a drop of .05
    alert = beyond_chance and drop is not None and round(drop, 12) >= alert_drop
    return Delta(after.name, before.value, after.value, change, drop, low, high, paired, p, alert)


def _unpaired_interval(before: Score, after: Score, confidence: float) -> tuple[float, float]:
    """Interval of after - before, from samples that have nothing in common."""
    if after.kind == "proportion":
        return newcombe(after.value * after.n, after.n, before.value * before.n, before.n, confidence)

    def limits(score: Score) -> tuple[float, float]:  # of a mean, widened to the confidence asked for
        scale = z_value(confidence) / z_value(score.confidence)
        return score.value - scale * (score.value - score.low), score.value + scale * (score.high - score.value)

    return square_and_add(after.value, limits(after), before.value, limits(before))


# --------------------------------------------------------------------------------------------------------------------
# Text
# --------------------------------------------------------------------------------------------------------------------


def _number(value: object, sign: bool = False) -> str:
    """A cell: numbers to three decimals, or to three digits where that would be 0."""
    if value is None:
        return "not measured"
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    if isinstance(value, int):
        return f"{value:+d}" if sign else str(value)
    small = math.isfinite(value) and value != 0 and (abs(value) < 5e-4 or abs(value) >= 1e5)
    return f"{value:{'+' if sign else ''}{'.2e' if small else '.3f'}}"


def _with_limits(value: object, low: object, high: object, sign: bool = False) -> str:
    limits = "" if low is None or high is None else f" [{_number(low, sign)}, {_number(high, sign)}]"
    return _number(value, sign) + limits


def _is_limit(key: str, row: Mapping) -> bool:
    return any(key.endswith(end) and key.removesuffix(end) in row for end in ("_low", "_high"))


def _write_whole(path: Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, "utf-8")
    os.replace(part, path)


def _cell(row: Mapping, name: str) -> str:
    return _with_limits(row.get(name), row.get(f"{name}_low"), row.get(f"{name}_high"))


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    escape = lambda cell: str(cell).replace("|", "\\|").replace("\n", " ")
    lines = [head, ["---"] * len(head), *rows]
    return "".join(f"| {' | '.join(map(escape, line))} |\n" for line in lines)


def _near(name: str, known: Sequence[str]) -> str:
    matches = get_close_matches(name, known, n=3)
    return f"did you mean {' or '.join(matches)}?" if matches else f"there are: {', '.join(known)}"


def _named(entries: Sequence, name: str, what: str):
    for entry in entries:
        if entry.name == name:
            return entry
    raise KeyError(f"no {what} {name!r}; {_near(name, [entry.name for entry in entries])}")


# --------------------------------------------------------------------------------------------------------------------
# JSON
# --------------------------------------------------------------------------------------------------------------------

_NOT_FINITE = {"inf": math.inf, "-inf": -math.inf, "nan": math.nan}


def _to_dict(score: Score) -> dict:
    known = {f.name: getattr(score, f.name) for f in fields(score) if f.name not in ("extra", "outcomes")}
    if score.outcomes is not None:
        known["outcomes"] = dict(score.outcomes)
    return {**known, **score.extra}


def _from_dict(cls, given: Mapping):
    names = {f.name for f in fields(cls)} - {"extra"}
    return cls(
        **{key: value for key, value in given.items() if key in names},
        extra={key: value for key, value in given.items() if key not in names},
    )


def _encode(value):
    if isinstance(value, float) and not math.isfinite(value):
        return str(value)
    if isinstance(value, Mapping):
        return {str(key): _encode(entry) for key, entry in value.items()}
    if isinstance(value, (list, tuple)):
        return [_encode(entry) for entry in value]
    return value


def _decode(value):
    if isinstance(value, str):
        return _NOT_FINITE.get(value, value)
    if isinstance(value, dict):
        return {key: _decode(entry) for key, entry in value.items()}
    if isinstance(value, list):
        return [_decode(entry) for entry in value]
    return value
