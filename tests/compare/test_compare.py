"""The comparison: records, plan, entries, tables; the runs themselves are `run.py --smoke`."""

import json
import re
import subprocess
import sys
import time
from dataclasses import fields, replace
from pathlib import Path

import psutil
import pytest


sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks" / "compare"))

import report
import run
import work
from records import GRID, RESULTS, STARTS, TUNING, Job, close_rates, read, tuned_rate, write

from trl_trust.methods import hosted


def made(job, score=0.5, **more):
    last = {"pass@1": score, "pass@8": 0.8, "entropy": 0.1, "kl": 0.05}
    return {
        "entry": job.entry,
        "task": job.task,
        "regime": job.regime,
        "start": job.start,
        "seed": job.start,
        "learning_rate": job.learning_rate,
        "overrides": {},
        "score": score,
        "start_metrics": {"pass@1": 0.3, "pass@8": 0.75},
        "checkpoints": [{"generation": 2 * i, **last} for i in range(1, 11)],
        "worst_drop": 0.0,
        "cpu_seconds": 20.0,
        "measuring_cpu_seconds": 5.0,
    } | more


def test_a_record_is_added_once_and_whole(tmp_path):
    job = Job("addition", "reuse", "dapo", 3, 1e-4)
    path = write(tmp_path, job, made(job))
    assert path == tmp_path / "addition" / "reuse" / "dapo" / "1e-04-003.json"
    with pytest.raises(FileExistsError):
        write(tmp_path, job, made(job, score=0.9))
    with pytest.raises(ValueError, match="JSON compliant"):
        write(tmp_path, Job("addition", "reuse", "dapo", 4, 1e-4), {"score": float("nan")})
    (path.parent / ".1e-04-005.json.part").write_text('{"half')
    assert [r["score"] for r in read(tmp_path)] == [0.5]
    assert len(list(path.parent.iterdir())) == 2


def test_edges_are_extended():
    assert tuned_rate({1e-4: [0.5], 3e-4: [0.6], 1e-3: [0.1]}) == (3e-4, None)
    assert tuned_rate({1e-4: [0.5, 0.7], 3e-4: [0.5, 0.6], 1e-3: [0.1, 0.1]}) == (1e-4, 3e-5)
    assert tuned_rate({1e-4: [0.1], 3e-4: [0.5], 1e-3: [0.6]}) == (1e-3, 3e-3)
    assert tuned_rate({3e-5: [0.9], 1e-4: [0.5]}) == (3e-5, None)  # nothing lies below


def test_close_rates_are_told_apart_by_the_starts_they_share():
    few = {1e-4: [0.50, 0.50], 3e-4: [0.52, 0.52], 1e-3: [0.3, 0.3]}
    assert close_rates(few) == [1e-4, 3e-4] and tuned_rate(few)[0] == 3e-4
    assert tuned_rate(few | {1e-4: [0.50, 0.50, 0.9, 0.9]})[0] == 3e-4  # of starts that the other had not
    more = few | {1e-4: [0.50, 0.50, 0.6, 0.6], 3e-4: [0.52, 0.52, 0.5, 0.5]}
    assert tuned_rate(more) == (1e-4, 3e-5)


def test_close_rates_get_more_starts(tmp_path):
    bad = {3e-5: 0.3, 1e-3: 0.2}
    later = {1e-4: 0.05, 3e-4: -0.05}  # what tells them apart
    score = lambda job: bad.get(job.learning_rate, 0.5 + later.get(job.learning_rate, 0) * (job.start >= 102))
    jobs = drained(["--regime", "reuse", "--entry", "dapo"], tmp_path, score)
    tuning = {(job.start, job.learning_rate) for job in jobs if job.start >= 100}
    assert tuning == {(s, rate) for s in (100, 101) for rate in (*TUNING, *bad)} | {
        (s, rate) for s in (102, 103) for rate in later
    }
    assert {job.learning_rate for job in jobs if job.start < 100} == {1e-4}


def drained(words, tmp_path, score):
    """All jobs that the runner would do, with their scores by a function."""
    args = run.parse([*words, "--output", str(tmp_path)])
    plan, done = run.Plan(args), []
    while ready := plan.pending()[0]:
        job = ready[0]
        write(tmp_path, job, made(job, score(job)))
        plan.add(made(job, score(job)))
        done.append(job)
    assert run.Plan(args).pending() == ([], 0)  # a new process finds nothing to do
    return done


def test_tuning_comes_first_and_decides_the_rate(tmp_path):
    jobs = drained(
        ["--regime", "reuse", "--entry", "dapo"], tmp_path, lambda job: 1 - 1e3 * abs(job.learning_rate - 3e-4)
    )
    tuning, main = jobs[: 2 * len(TUNING)], jobs[2 * len(TUNING) :]
    assert {(job.start, job.learning_rate) for job in tuning} == {(s, rate) for s in (100, 101) for rate in TUNING}
    assert [(job.start, job.learning_rate) for job in main] == [(s, 3e-4) for s in STARTS]


def test_stated_rates_tune_nothing_and_fill_one_table_after_the_other(tmp_path):
    words = ["--regime", "reuse", "--entry", "dapo", "dppo", "--learning-rate", "1e-4", "1e-3", "--seeds", "2"]
    jobs = drained(words, tmp_path, lambda job: 0.5)
    assert [job.learning_rate for job in jobs] == [1e-4] * 4 + [1e-3] * 4
    assert {job.start for job in jobs} == {0, 1}
    window = ["--regime", "reuse", "--entry", "dapo", "--learning-rate", *map(str, GRID)]
    assert len(drained(window, tmp_path, lambda job: 0.5)) == len(GRID) * len(STARTS) - 4


@pytest.mark.parametrize(
    "words, said", [(["--regime", "reus"], "unknown regime 'reus'"), (["--jobs", "0"], "--jobs=0")]
)
def test_wrong_words_are_refused(words, said, capsys):
    with pytest.raises(SystemExit):
        run.parse(words)
    assert said in capsys.readouterr().err


def test_every_entry_and_regime_is_stated_rightly():
    from trl import GRPOConfig

    known = {f.name for f in fields(GRPOConfig)}
    for regime in work.regimes().values():
        assert set(regime.fields) <= known
        assert regime.generations % work.CHECKPOINTS == 0
        batch = regime.fields["per_device_train_batch_size"] * regime.fields["steps_per_generation"]
        assert batch == 256
    for entry in work.entries().values():
        assert not work.missing_fields(entry), entry.name
        assert entry.kind in ("stock", "control", "ours", "teacher", "extra", "optimizer")
    assert set(run.ORDER) | set(run.OPTIMIZERS) | {"dapo_here"} == set(work.entries())


def test_every_method_of_the_table_is_an_entry(tmp_path):
    # Robust GRPO needs a column of groups, which the tasks have not: benchmarks/robust.py compares it
    for method in hosted("grpo"):
        if method.name in ("grpo", "robust-grpo"):
            continue
        assert any(entry.trainer.endswith(f".{method.trainer}") for entry in work.entries().values()), method.name


def test_the_committed_tables_are_those_of_the_records():
    records = read(RESULTS)
    assert records
    whole = report.Report(records)
    assert (RESULTS / "tables.md").read_text() == whole.markdown()
    for path, least in zip(report.PAGES, (8, 1), strict=True):
        page = path.read_text()
        assert len(list(report.BLOCK.finditer(page))) >= least
        assert report.fill(page, whole.blocks()) == page


def test_the_table_changes_with_the_records(tmp_path):
    for entry, score in (("dapo", 0.6), ("dppo", 0.2), ("gspo", 0.61)):
        for start in STARTS[: 11 if entry == "gspo" else 12]:
            job = Job("addition", "reuse", entry, start, 1e-4)
            write(tmp_path, job, made(job, score + start / 100 + (0.001 * start if entry == "dppo" else 0)))
    comparison = report.Comparison(read(tmp_path))
    cell = ("addition", "reuse", 1e-4)
    assert [entry for entry, _, _ in comparison.rows(cell)] == ["dapo", "dppo", "gspo"]  # not whole: last
    table = comparison.table(cell)
    assert "**worse**" in table
    assert "not judged, 11 of 12" in table
    assert comparison.answer("H6", cell) == ""
    assert report.Comparison(read(tmp_path), whole=13).judged(cell) == {}  # the reference is not whole
    page = "a\n<!-- addition reuse 0.0001: made by benchmarks/compare/report.py -->\nold\n<!-- end -->\nb\n"
    filled = report.fill(page, comparison.blocks())
    assert "old" not in filled
    assert filled.startswith("a\n<!-- addition") and filled.endswith("<!-- end -->\nb\n")
    assert report.main(["--input", str(tmp_path)]) == 0
    assert (tmp_path / "tables.md").read_text() == report.Report(read(tmp_path)).markdown()
    assert (tmp_path / "addition-reuse-0.0001-forest.svg").stat().st_size > 1000


def test_each_at_its_own_rate(tmp_path):
    best = {"dapo": 3e-4, "dppo": 1e-3}
    score = lambda job: 0.6 - abs(job.learning_rate - best[job.entry]) * 200 - job.start / 1000
    drained(["--regime", "reuse", "--entry", *best], tmp_path, score)
    comparison = report.Comparison(read(tmp_path))
    cell = ("addition", "reuse", report.OWN)
    assert comparison.cells() == [("addition", "reuse", 3e-4), cell]  # the reference was not run at 1e-3
    assert comparison.judged(cell)["dppo"]["mean"] == pytest.approx(0)
    text = report.Report(read(tmp_path)).markdown()
    assert re.search(r"DPPO \(TV\) \| (0\.\d+ \| ){4}0.001 \|", text)  # four rates were tuned over
    assert "## addition, reuse: each entry at its own best rate" in text
    assert "| DPPO (TV) | 0.001 | 12 |" in text
    assert comparison.windows() == []
    assert f"{12 + 12 + 2 * 3 + 2 * 4} runs" in text


def test_over_regimes_only_what_is_whole_in_each(tmp_path):
    cells = [(regime, entry) for regime in ("reuse", "lag_32") for entry in ("dapo", "dppo", "gspo")]
    for regime, entry in cells[:-1]:  # GSPO in one of the two
        for start in STARTS:
            job = Job("addition", regime, entry, start, 1e-4)
            write(tmp_path, job, made(job, (0.4 if regime == "lag_32" else 0.6) + 0.05 * (entry == "dppo")))
    comparison = report.Comparison(read(tmp_path))
    ((rate, found),) = comparison.overall().items()
    assert rate == 1e-4 and [cell[1] for cell in found] == ["reuse", "lag_32"]
    table = comparison.overall_table(found)
    assert "| DPPO (TV) | 0.550 | [0.550, 0.550] | 1.00 | [1.000, 1.000] |" in table
    assert "| DAPO (TRL's default) | 0.500 | [0.500, 0.500] |  |  |" in table
    assert "GSPO" not in table
    assert comparison.blocks()["over regimes 0.0001"] == table
    assert comparison.blocks()["side by side 0.0001"].splitlines()[2:] == [
        "| DPPO (TV) | 0.650, better | 0.450, better |",
        "| DAPO (TRL's default) | 0.600 | 0.400 |",
        "| GSPO (TRL) | 0.600 | not run |",
    ]
    text = report.Report(read(tmp_path)).markdown()
    assert "## over 2 regimes, at 0.0001 for all\n\nAddition, reuse; addition, lag_32." in text


@pytest.mark.parametrize("gap, said", [(0.0, "holds"), (-0.05, "refuted"), (-0.032, "not shown")])
def test_whether_the_term_matters_under_step_control(tmp_path, gap, said):
    added = {"dapo": -0.4, "dapo_step_control": 0.0, "dhpo_step_control": 0.001, "etr_step_control": gap}
    for entry, more in added.items():
        for start in STARTS:
            job = Job("addition", "reuse", entry, start, 1e-3)
            write(tmp_path, job, made(job, 0.5 + more + (0.002 * (start % 3) if entry == "etr_step_control" else 0)))
    answer = report.Comparison(read(tmp_path)).answer("S1", ("addition", "reuse", 1e-3))
    assert answer.startswith(f"{said}: minus DAPO with step control, DHPO with step control +0.001 [")


def test_optimizers_are_a_family_of_their_own(tmp_path):
    last = {"pass@8": 0.1, "entropy": 0.1, "kl": 3.0}
    fallen = [{"generation": 4 * i, "pass@1": 0.01 if i > 5 else 0.5, **last} for i in range(1, 11)]
    for entry, bad in (("dapo", False), ("muon", True), ("muon_step_control", False), ("dppo", False)):
        for start in STARTS:
            job = Job("addition", "mini_batches", entry, start, 3e-3)
            write(tmp_path, job, made(job, 0.5 + 0.01 * start, **({"checkpoints": fallen} if bad else {})))
    both = report.Report(read(tmp_path))
    cell = ("addition", "mini_batches", 3e-3)
    assert [set(family.runs[cell]) for family in both.families] == [
        {"dapo", "dppo"},
        {"dapo", "muon", "muon_step_control"},
    ]
    assert (
        both.families[1]
        .answer("O2", cell)
        .startswith("holds: Muon collapses in 12 of 12, Muon with step control in 0")
    )
    assert both.families[1].answer("O1", cell) == ""  # asked at each one's own rate
    assert "optimizer addition mini_batches 0.003" in both.blocks()
    text = both.markdown()
    assert text.index("## addition, mini_batches") < text.index("## optimizers, addition, mini_batches")
    assert "Muon" not in text.partition("## Not run")[2]


def test_a_run_is_watched_and_repeats_itself():
    """One real run, in toy sizes: the same numbers twice, but for the time."""
    from trl_trust.quickstart.run import quiet

    with quiet():
        first, second = (work.run_one("addition", "flipped", "dppo", 0, 1e-3, smoke=True) for _ in range(2))
    for name in ("score", "checkpoints", "curves", "tokens", "updates"):
        assert first[name] == second[name], name
    assert first["updates"] == 40
    assert len(first["checkpoints"]) == 10
    assert first["checkpoints"][-1]["kl"] > 0
    assert all(len(curve) == 10 for curve in first["curves"].values())
    json.dumps(first, allow_nan=False)
    with pytest.raises(ValueError, match="no field epsilon_lo"):
        work.run_one("addition", "flipped", "dapo", 0, 1e-3, {"epsilon_lo": 1.0}, smoke=True)


def test_what_a_regime_does_to_the_sampler(monkeypatch):
    """Ratios to the policy that drew the tokens; half of the rewards are flipped, so that all runs move."""
    from trl_trust.quickstart.run import quiet

    updates = []
    monkeypatch.setattr(work.Watch, "by_generation", lambda self, n: updates.append(self.updates) or {})
    names = ("mini_batches", "lag_8", "mismatch_1", "mismatch_int8")
    flipped = {name: replace(work.regimes()[name], flip=0.5) for name in names}
    monkeypatch.setattr(work, "regimes", lambda: flipped)
    with quiet():
        for name in names:
            record = work.run_one("addition", name, "dapo", 0, 1e-3, smoke=True)
            assert "error" not in record and record["updates"] == 40
            assert record["checkpoints"][-1]["kl"] > 1e-4  # it trains
    fresh, lagged, noisy, rounded = (found["ratio_max"] for found in updates)
    assert all(ratio == pytest.approx(1, abs=1e-4) for ratio in fresh[::4])  # the first update of a generation
    assert fresh[5] > 1.001
    assert lagged[0] == pytest.approx(1, abs=1e-4)  # nothing is older yet
    assert min(lagged[4::4]) > 1.01
    assert min(noisy[::4]) > 1.1
    assert 1.0005 < min(rounded[::4]) < min(noisy[::4])


def test_the_runner_goes_on_after_kill_9_and_reports(tmp_path):
    """`run.py --smoke` as a user starts it, killed after its first record and started again."""
    command = [sys.executable, run.__file__, "--smoke", "--output", str(tmp_path)]
    runner = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    try:
        end = time.monotonic() + 600
        while not (found := list(tmp_path.glob("*/*/*/[!.]*.json"))) and time.monotonic() < end:
            assert runner.poll() is None
            time.sleep(0.2)
        assert found
        workers = psutil.Process(runner.pid).children(recursive=True)
        assert workers
    finally:
        runner.kill()
        runner.wait()
    assert psutil.wait_procs(workers, timeout=120)[1] == []  # nobody goes on training for nobody
    before = {path: path.stat().st_mtime_ns for path in tmp_path.glob("*/*/*/[!.]*.json")}
    again = subprocess.run(command, capture_output=True, text=True, timeout=1200)
    assert again.returncode == 0, again.stderr[-2000:]
    assert all(path.stat().st_mtime_ns == at for path, at in before.items())
    records = read(tmp_path)
    assert not [r["error"] for r in records if "error" in r]
    whole = {(r["entry"], r["start"]) for r in records if r["start"] < 100}
    assert whole == {(entry, start) for entry in ("dapo", "dppo") for start in (0, 1)}
    assert f"{len(records) - len(before)} runs added; about 0 left" in again.stdout
    assert any(max(r["curves"]["grad_norm"]) > 0 for r in records)
    tables = (tmp_path / "tables.md").read_text()
    assert "the reference" in tables and "DPPO (TV)" in tables
