"""The report: files, comparison, gate, pictures."""

import json
import math
import random
import subprocess
import sys

import numpy as np
import pytest

from trl_trust.evaluation import Score, TrustGateError, TrustReport
from trl_trust.evaluation.report import environment


def outcomes(passed, n, offset=0):
    return {f"item{i + offset}": int(i < passed) for i in range(n)}


def report(subject="model", seed=0, meta=None, rows=(), **passed):
    scores = [Score.proportion(name, k, 64, no_answer=0.0) for name, k in passed.items()]
    return TrustReport(subject, "core", seed, scores, meta or {}, rows)


def test_round_trip_keeps_everything(tmp_path):
    written = TrustReport(
        "out/policy",
        "core",
        7,
        (
            Score.from_outcomes("honesty", outcomes(3, 4), no_answer=0.25),
            Score.mean("nll", [1.0, 2.0, 4.0], higher_is_better=False, unit="nats"),
            Score("kl", math.inf, kind="other", higher_is_better=None),
            Score("p", math.nan, kind="other"),
            Score("privacy", None),
        ),
        {"notes": ["read me"], "nested": {"list": [1, None, -math.inf]}},
        ({"method": "rtn4", "kl": math.inf, "verdict": "keep"},),
    )
    path = written.save(tmp_path / "report")
    read = TrustReport.load(tmp_path / "report")
    assert path == tmp_path / "report" / "report.json"
    assert read["honesty"] == written["honesty"]
    assert read["kl"].value == math.inf and math.isnan(read["p"].value) and read["privacy"].value is None
    assert read.rows == written.rows and read.meta == written.meta
    assert read.to_json() == written.to_json()
    json.loads(path.read_text(), parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))


def test_unknown_fields_survive_and_a_newer_schema_is_refused(tmp_path):
    given = json.loads(report(honesty=60).to_json())
    given["later"] = {"a": 1}
    given["scores"][0]["shade"] = "blue"
    read = TrustReport.from_json(json.dumps(given))
    again = json.loads(read.to_json())
    assert again["later"] == {"a": 1} and again["scores"][0]["shade"] == "blue"

    given["schema"] = 2
    (tmp_path / "new.json").write_text(json.dumps(given))
    with pytest.raises(ValueError, match=r"new.json has schema 2, this version reads 1 to 1: upgrade trl-trust"):
        TrustReport.load(tmp_path / "new.json")
    for text in ("{}", "[]", "no json", '{"schema": 1}'):
        with pytest.raises(ValueError, match="is not a"):
            TrustReport.from_json(text)


def test_scores_refuse_what_they_cannot_mean():
    with pytest.raises(ValueError, match=r"'kl': a proportion must be in \[0, 1\], not 3.0; kind='mean'"):
        Score("kl", 3.0)
    with pytest.raises(ValueError, match="kind='rate' must be one of"):
        Score("kl", 3.0, kind="rate")
    with pytest.raises(ValueError, match="both `low` and `high`"):
        Score("a", 0.5, low=0.1)
    with pytest.raises(ValueError, match="twice there: a"):
        TrustReport("m", "core", 0, (Score("a", 0.5), Score("a", 0.5)))
    with pytest.raises(KeyError, match="no score 'honest'; did you mean honesty"):
        report(honesty=3)["honest"]


def test_from_outcomes_picks_the_kind():
    assert Score.from_outcomes("a", {"x": 1, "y": 0}).kind == "proportion"
    assert Score.from_outcomes("a", {"x": 0.5, "y": 0}).kind == "mean"
    assert Score.from_outcomes("a", {}).value is None


# ---- comparison ----


def test_paired_comparison_lets_the_exact_test_govern():
    before = {f"i{i}": int(i < 30) for i in range(32)}
    after = {**before, **{f"i{i}": 0 for i in range(6)}, "i30": 1}  # six losses, one gain, 25 ties
    old, new = (TrustReport("m", "core", 0, (Score.from_outcomes("honesty", o),)) for o in (before, after))
    delta = new.compare(old)["honesty"]
    assert delta.paired and delta.p == 0.0625
    assert delta.delta == pytest.approx(-0.1562, abs=5e-5)
    assert delta.low < delta.delta < delta.high
    assert not delta.alert  # though a drop of .16
    after["i6"] = after["i7"] = 0  # eight losses, one gain: p = 10/512
    assert TrustReport("m", "core", 0, (Score.from_outcomes("honesty", after),)).compare(old).alerts == ("honesty",)


def test_an_unchanged_policy_on_fixed_items_has_delta_zero():
    one = TrustReport("m", "core", 0, (Score.from_outcomes("honesty", outcomes(50, 64)),))
    delta = one.compare(one)["honesty"]
    assert (delta.delta, delta.drop, delta.p, delta.alert) == (0.0, 0.0, 1.0, False)


def test_other_items_are_not_paired():
    old = TrustReport("m", "core", 0, (Score.from_outcomes("honesty", outcomes(64, 64)),))
    new = TrustReport("m", "core", 1, (Score.from_outcomes("honesty", outcomes(30, 64, offset=1)),))
    delta = new.compare(old)["honesty"]
    assert not delta.paired and delta.p is None and delta.alert


NAMES = [f"d{i}" for i in range(9)]


def alarm_rate(n, p, fall=0.0, runs=4000):
    """Share of comparisons in which one given dimension of nine alarms; the other eight stay as they are."""
    rng = np.random.default_rng(0)
    tables = {}
    hits = 0
    for before, after in zip(rng.binomial(n, p, runs), rng.binomial(n, p - fall, runs), strict=True):
        key = (int(before), int(after))
        if key not in tables:
            old, new = (
                TrustReport(
                    "m",
                    "core",
                    0,
                    [Score.proportion(NAMES[0], k, n)] + [Score.proportion(name, n, n) for name in NAMES[1:]],
                )
                for k in key
            )
            tables[key] = NAMES[0] in new.compare(old).alerts
        hits += tables[key]
    return hits / runs


@pytest.mark.parametrize("n, p, most", [(32, 0.5, 0.0059), (64, 0.8, 0.0051), (64, 0.9, 0.0028)])
def test_gate_seldom_alarms_without_change(n, p, most):
    assert alarm_rate(n, p) <= most + 3 * math.sqrt(most / 4000)


@pytest.mark.parametrize("n, fall, power", [(64, 0.2, 0.626), (64, 0.3, 0.939), (32, 0.3, 0.593)])
def test_gate_has_the_power_it_should(n, fall, power):
    assert alarm_rate(n, 0.9, fall) == pytest.approx(power, abs=0.03)


def test_an_alert_in_at_most_six_percent_of_evaluations_of_an_unchanged_policy():
    rng, n, p, alarms = random.Random(1), 64, [0.3, 0.5, 0.7, 0.8, 0.9, 0.95, 0.98, 0.6, 0.4], 0
    draw = lambda: report(**{name: sum(rng.random() < q for _ in range(n)) for name, q in zip(NAMES, p, strict=True)})
    for _ in range(1000):
        alarms += bool(draw().compare(draw()).alerts)
    assert alarms <= 60


def test_means_where_lower_is_better_and_kinds_without_direction():
    score = lambda value: Score("nll", value, 40, value - 0.1, value + 0.1, kind="mean", higher_is_better=False)
    old, new = (TrustReport("m", "s", 0, (score(v), Score("ratio", v, kind="other"))) for v in (1.0, 2.0))
    comparison = new.compare(old)
    assert comparison["nll"].drop == pytest.approx(1.0) and comparison.alerts == ("nll",)
    assert comparison["nll"].low == pytest.approx(1 - math.sqrt(0.02))
    assert comparison["ratio"].delta == 1.0 and comparison["ratio"].low is None
    assert old.compare(new).alerts == () and comparison.worst.name == "nll"
    with pytest.raises(ValueError, match="was a other and is a mean"):
        TrustReport("m", "s", 0, (Score("ratio", 1.0, kind="mean"),)).compare(old)


def test_comparison_names_what_only_one_has_and_what_was_not_measured():
    old, new = report(honesty=60, privacy=10), report(honesty=60, fairness=3)
    comparison = new.compare(old)
    assert comparison.missing == ("fairness", "privacy")
    assert "Only in one of the two: fairness, privacy" in comparison.to_markdown()
    nothing = TrustReport("m", "core", 0, (Score("honesty", None),)).compare(old)["honesty"]
    assert nothing.delta is None and not nothing.alert


# ---- gate ----


def test_gate_names_what_is_outside():
    rows = ({"method": "rtn8", "kl": 0.01, "loss": 0.0}, {"method": "rtn3", "kl": 0.2, "loss": math.nan})
    now = report(honesty=30, privacy=60, rows=rows)
    now.gate(min_privacy=0.9)
    with pytest.raises(TrustGateError, match=r"model: honesty 0.469 is below 0.8; rtn3: kl 0.200 is above 0.05"):
        now.gate(min_honesty=0.8, max_kl=0.05)
    with pytest.raises(TrustGateError, match="rtn3: loss not measured"):
        now.gate({"max_loss": 1.0})
    with pytest.raises(TrustGateError, match=r"honesty fell from 1.000 to 0.469"):
        now.gate(baseline=report(honesty=64))
    with pytest.raises(ValueError, match="nothing for 'min_honest'; did you mean min_honesty"):
        now.gate(min_honest=0.5)
    with pytest.raises(ValueError, match="nothing for 'honesty'"):
        now.gate(honesty=0.5)


def test_merge():
    other = TrustReport("model", "lm_eval", None, (Score("mmlu", 0.5, kind="other"),), {"notes": ["b"]})
    both = report(honesty=3, meta={"notes": ["a"]}).merge(other)
    assert [s.name for s in both.scores] == ["honesty", "mmlu"] and both.suite == "core, lm_eval"
    assert both.meta["notes"] == ["a", "b"]
    with pytest.raises(ValueError, match="cannot merge reports of 'model' and 'other'"):
        both.merge(report(subject="other"))
    with pytest.raises(ValueError, match="twice there: honesty"):
        both.merge(report(honesty=4))


# ---- text and pictures ----


def test_markdown_shows_intervals_no_answers_and_what_was_not_measured():
    rows = ({"method": "rtn4", "kl": 2.2e-6, "loss": 0.1, "loss_low": 0.0, "loss_high": 0.2},)
    text = report(honesty=30, meta={"not_measured": ["toxicity"], "notes": ["n.b."]}, rows=rows).to_markdown()
    assert "| honesty | 0.469 [0.352, 0.589] | 64 | 0.000 | higher |" in text
    assert "| rtn4 | 2.20e-06 | 0.100 [0.000, 0.200] |" in text
    assert "Not measured: toxicity." in text and "n.b." in text
    assert "not measured" in TrustReport("m", "s", 0, (Score("a", None),)).to_markdown()


@pytest.mark.parametrize(
    "made",
    [
        report(honesty=30, privacy=60, fairness=3),
        TrustReport("m", "s", 0, (Score("kl", 0.1, kind="mean", unit="nats"), Score("x", math.inf, kind="other"))),
        TrustReport("m", "s", 0, rows=({"rung": "a", "kl": 1e-5, "hit": 0.5}, {"rung": "b", "kl": 0.1, "hit": None})),
    ],
    ids=["radar", "bars", "rows"],
)
def test_pictures(made, tmp_path):
    made.save(tmp_path / "out")
    assert (tmp_path / "out" / "report.png").read_bytes().startswith(b"\x89PNG")


def test_nothing_to_draw():
    with pytest.raises(ValueError, match="nothing to draw"):
        TrustReport("m", "s", 0).plot("unused.png")


def test_a_report_needs_no_torch():
    code = "import sys, trl_trust.evaluation as e; e.TrustReport('m', 's').to_json(); print('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout.strip() == "False"


def test_environment_names_versions():
    found = environment("out/policy", "cpu")
    assert found["model"] == "out/policy" and "torch" in found["versions"]
