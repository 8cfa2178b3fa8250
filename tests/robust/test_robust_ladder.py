"""The ladder: the worked table, what it cannot tell, and the command."""

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from trl_trust import cli
from trl_trust.evaluation.report import TrustReport
from trl_trust.robust import ladder
from trl_trust.robust.ladder import causal_ladder


def confounded():
    """Group B has the hard questions; given the difficulty the groups are alike."""
    counts = {"A": {"easy": 80, "hard": 20}, "B": {"easy": 20, "hard": 80}}
    right = {"easy": 0.9, "hard": 0.5}
    return [
        {"group": g, "level": z, "correct": int(i < round(n * right[z]))}
        for g, levels in counts.items()
        for z, n in levels.items()
        for i in range(n)
    ]


def siblings(differing=3, total=20):
    return [
        {"pair": i, "group": "ab"[v], "correct": 1, "said": int(v == 1 and i < differing)}
        for i in range(total)
        for v in (0, 1)
    ]


def test_worked_table():
    report = causal_ladder(confounded(), "correct", "group", ("level",))
    assert report["association"].value == pytest.approx(0.24)
    assert report["intervention"].value == pytest.approx(0, abs=1e-12)
    assert report["association"].low > 0 > report["intervention"].low
    assert report["intervention"].high > 0
    assert [row["mean"] for row in report.rows] == pytest.approx([0.82, 0.58])
    report = causal_ladder(siblings(), "correct", "group", pair="pair", answer="said")
    assert report["counterfactual"].value == 0.15 and report["counterfactual"].n == 20
    assert "association assumes nothing" in report.to_markdown()


@settings(max_examples=25, deadline=None)
@given(st.integers(2, 4), st.integers(1, 3), st.sampled_from([0.0, 1.0]))
def test_an_outcome_that_is_always_the_same_has_no_gap(groups, levels, outcome):
    rows = [{"g": g, "z": z, "y": outcome, "p": z} for g in range(groups) for z in range(levels)]
    report = causal_ladder(rows, "y", "g", ("z",), pair="p")
    assert [score.value for score in report.scores] == [0, 0, 0]


def test_the_interval_of_no_gap_covers_zero(monkeypatch):
    monkeypatch.setattr(ladder, "RESAMPLES", 200)
    covered = 0
    for seed in range(40):
        rng = np.random.default_rng(seed)
        rows = [{"g": int(g), "z": int(z), "y": int(y)} for g, z, y in rng.integers(0, 2, (120, 3))]
        found = causal_ladder(rows, "y", "g", ("z",), seed=seed)["intervention"]
        covered += found.low <= 0 <= found.high
    assert covered >= 34  # nominal 38; 34 or fewer has a chance of .03


def test_siblings_are_drawn_together():
    """Twenty copies of each prompt are no more evidence than one of them."""
    once = [{"g": i % 2, "y": int(i % 5 < 2), "q": i} for i in range(40)]
    narrow = causal_ladder(once * 20, "y", "g")["association"]
    wide = causal_ladder(once * 20, "y", "g", prompt="q")["association"]
    assert wide.high - wide.low > 3 * (narrow.high - narrow.low)


def test_numbers_are_cut_at_quartiles_and_said():
    rows = [{"g": i % 2, "y": int(i % 7 < 3), "length": i // 2} for i in range(100)]
    report = causal_ladder(rows, "y", "g", ("length",))
    assert report.meta["bins"]["length"] == [12.0, 24.5, 37.0]
    assert "length is cut at 12, 24.5, 37" in report.to_markdown()


def test_a_cell_that_a_group_lacks():
    rows = [*confounded(), *({"group": "A", "level": "absurd", "correct": 0} for _ in range(50))]
    with pytest.raises(ValueError, match="group 'B' has no row where the covariates are absurd"):
        causal_ladder(rows, "correct", "group", ("level",))
    report = causal_ladder(rows, "correct", "group", ("level",), overlap="drop")
    assert report["intervention"].value == pytest.approx(0, abs=1e-12) and report["intervention"].n == 200
    assert "20.0% of the rows lie in cells" in report.to_markdown()
    with pytest.raises(ValueError, match="no combination of covariates"):
        lone = [{"g": i % 2, "z": i, "y": 1} for i in range(4)]
        causal_ladder(lone, "y", "g", ("z",), overlap="drop")


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (dict(outcome="korrect"), "column 'korrect' is missing in row 0"),
        (dict(outcome="group"), "outcome 'group' must be a finite number"),
        (dict(nuisance="correct"), "nuisance 'correct' has one value"),
        (dict(overlap="ignore"), "overlap='ignore' must be"),
        (dict(pair="said", nuisance="pair"), None),
    ],
)
def test_bad_tables_are_a_line(change, says):
    given = dict(outcome="correct", nuisance="group") | change
    if says is None:
        assert causal_ladder(siblings(), **given)["counterfactual"].n == 2
        return
    with pytest.raises(ValueError, match=says) as error:
        causal_ladder(siblings(), **given)
    assert "\n" not in str(error.value)


def test_command(tmp_path, capsys):
    path = tmp_path / "results.jsonl"
    path.write_text("\n".join(map(json.dumps, confounded())))
    words = ["ladder", str(path), "--outcome", "correct", "--nuisance", "group", "--covariates", "level"]
    assert cli.main([*words, "--out", str(tmp_path / "report")], launch=False) == 0
    assert "| association | 0.240" in capsys.readouterr().out
    assert TrustReport.load(tmp_path / "report" / "report.json")["association"].value == pytest.approx(0.24)
    path.write_text('{"group": "A"}\nnonsense')
    with pytest.raises(SystemExit) as left:
        cli.main(words, launch=False)
    assert left.value.code == 2
    assert "line 2: no JSON object" in capsys.readouterr().err
