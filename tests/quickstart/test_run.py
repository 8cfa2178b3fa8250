"""The command `trl-trust quickstart`, from arguments to files."""

import json
import subprocess
import sys

import pytest
from rich.console import Console
from transformers import AutoModelForCausalLM

from trl_trust.methods import hosted
from trl_trust.plot import read_run
from trl_trust.quickstart import run


PLAIN, OWN, STEERED = "GRPO lr=0.001", "GRPO lr=0.0001", "GRPO lr=0.001 step_control=kl"
SMOKE = ["--smoke", "--steps", "8", "--workers", "1"]


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run for the module: folder and report."""
    folder = tmp_path_factory.mktemp("quickstart")
    assert run.main([*SMOKE, "--seed", "1", "--output-dir", str(folder)]) == 0
    return folder, json.loads((folder / "metrics.json").read_text())


def test_all_settings_are_measured_from_one_start(smoke):
    folder, report = smoke
    assert list(report["results"]) == ["start", PLAIN, OWN, STEERED]
    assert report["results"]["start"]["1"]["kl"] == 0.0
    names = {"reward", "pass@1", "pass@8", "greedy", "entropy", "kl", "moved", "cut", "seconds", "cpu_seconds"}
    for label in (PLAIN, OWN, STEERED):
        row = report["results"][label]["1"]
        assert set(row) == names | ({"scale"} if label == STEERED else set())
        assert row["kl"] > 0, "the policy has not moved"
    # All sample their first generation from the same weights with the same seed, and log what the region did.
    histories = [read_run(folder / f"{name}-seed1").history for name in ("grpo-0.001", "grpo-0.0001", "grpo-0.001-kl")]
    assert len({history[0]["reward"] for history in histories}) == 1
    assert all([record["step"] for record in history] == list(range(1, 9)) for history in histories)
    assert all(max(record["trust/ratio/max"] for record in history) > 1.0001 for history in histories)


def test_the_step_control_acts_on_its_own_arm_alone(smoke):
    _, report = smoke
    moved = {label: report["results"][label]["1"]["moved"] for label in (PLAIN, STEERED)}
    assert moved[STEERED] < moved[PLAIN] / 2
    assert report["training"][STEERED]["step_control"] == "kl"
    assert all("step_control" not in report["training"][label] for label in (PLAIN, OWN))


def test_models_and_curves_are_where_the_report_says(smoke):
    folder, _ = smoke
    for name in ("start-seed1", "grpo-0.001-seed1"):
        assert AutoModelForCausalLM.from_pretrained(folder / name).config.model_type == "qwen2"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")
    assert "<svg" in (folder / "curves.svg").read_text()


def test_same_seed_same_bits_in_processes_of_their_own_too(smoke, tmp_path):
    folder, _ = smoke
    words = ["--regime", "reuse", "--step-control", "none", "--seed", "1", "--output-dir", str(tmp_path)]
    assert run.main([*SMOKE[:-1], "2", *words]) == 0
    for name in ("start-seed1", "grpo-0.001-seed1", "grpo-0.0001-seed1"):
        weights = "model.safetensors"
        assert (tmp_path / name / weights).read_bytes() == (folder / name / weights).read_bytes()
    assert not (tmp_path / "grpo-0.001-kl-seed1").exists()


def test_a_method_with_a_teacher_gets_one(tmp_path):
    words = ["--regime", "stale", "--method", "rlad", "--seed", "0", "--output-dir", str(tmp_path)]
    assert run.main(["--smoke", "--steps", "1", "--workers", "1", *words]) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert list(report["results"]) == ["start", "teacher", "GRPO lr=0.0003", "RLAD lr=0.0003"]
    assert report["results"]["teacher"]["0"]["kl"] > 0.01


def test_without_matplotlib_it_says_so_and_goes_on(smoke, monkeypatch, capsys):
    folder, report = smoke
    args = run.parse(["--seed", "1", "--output-dir", str(folder)])
    results = {label: {int(seed): row for seed, row in rows.items()} for label, rows in report["results"].items()}
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    run.tell(args, run.arms(args), results, Console(width=100))
    assert "not drawn: pictures need matplotlib: pip install trl-trust[plot]" in capsys.readouterr().out


def test_an_unknown_optimizer_is_one_line_before_any_work(capsys, tmp_path):
    assert run.main(["--smoke", "--optim", "nonesuch", "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("trl-trust quickstart: optim='nonesuch'")
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["--method", "nonesuch"], ["--steps", "0"], ["--workers", "0"], ["--nonesuch"]])
def test_bad_arguments_are_refused_by_the_parser(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        run.parse(argv)
    assert exit_.value.code == 2
    assert "error" in capsys.readouterr().err


def test_what_is_compared():
    def labels(*words) -> list[str]:
        return [arm.label for arm in run.arms(run.parse(list(words)))]

    assert labels() == [PLAIN, OWN, STEERED]
    assert labels("--learning-rate", "1e-4", "--step-control", "none") == [OWN]
    assert labels("--method", "dppo") == [PLAIN, OWN, "DPPO lr=0.001 step_control=kl"]
    assert labels("--optim", "muon") == [PLAIN, STEERED], "the rate of another optimizer is not known"
    assert labels("--regime", "stale") == ["GRPO lr=0.0003", "DISPO lr=0.0003"]
    for method in hosted("grpo"):
        assert labels("--regime", "stale", "--method", method.name)[1:] == [f"{method.title} lr=0.0003"]
    (arm, *_) = run.arms(run.parse(["--steps", "7"]))
    assert (arm.fields["max_steps"], arm.fields["num_iterations"]) == (7, 4)


def test_parsing_imports_nothing_heavy():
    code = (
        "import sys, trl_trust.quickstart.run as run; run.arms(run.parse([])); "
        "sys.exit(bool({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def rows(*scores: float, moved: float = 0.02) -> dict[int, dict]:
    """The results of one setting, a seed a score."""
    return {
        seed: {"pass@1": score, "pass@8": 0.9, "kl": 0.1, "cut": 0.25, "moved": moved}
        for seed, score in enumerate(scores)
    }


def test_the_table_shows_every_number():
    console = Console(width=120, record=True)
    console.print(run.results_table({"start": rows(0.3, 0.34), PLAIN: rows(0.0, 0.01)}))
    text = console.export_text()
    for cell in ("0.320", "0.30 0.34", "0.005", "0.00 0.01", "0.900", "0.100", "25.0%", "seeds 0, 1"):
        assert cell in text


def test_the_closing_words_are_computed():
    start = rows(0.3, 0.3, 0.3)
    results = {
        "start": start,
        PLAIN: rows(0.0, 0.1, 0.05, moved=0.9),
        OWN: rows(0.6, 0.5, 0.7),
        STEERED: rows(0.6, 0.6, 0.6),
    }
    said = run.closing(results)
    assert (
        "from pass@1 0.30 to 0.05; its region cut 25.0% of the tokens, and a generation moved the policy by 0.9"
        in said
    )
    assert f"{STEERED}: pass@1 0.60, 0.02 nats a token; +0.55 against {PLAIN} (+0.50 to +0.60)" in said
    assert f"+0.00 against {OWN} (-0.10 to +0.10, not told apart)" in said
    assert "lie up to 0.20 apart" in said and "Try next: `step_control: kl`" in said
    nothing = run.closing({"start": start, PLAIN: rows(0.5, 0.6, 0.4), STEERED: rows(0.54, 0.64, 0.44)})
    assert "Nothing separates these settings here" in nothing and "not told apart" in nothing  # a sign, but too small
    assert "Nothing separates" in run.closing({"start": rows(0.3), PLAIN: rows(0.0), STEERED: rows(0.9)})  # one seed
    assert "Nothing" not in run.closing({"start": rows(0.3), PLAIN: rows(0.0)})


def test_the_reward_is_that_of_the_last_generations():
    history = [{"reward": 0.0}, {"entropy": 1.0}, {"reward": 0.5}, {"entropy": 1.0}, {"reward": 1.0}]
    assert run.last_reward(history, generations=2) == 0.75
    assert run.last_reward(history) == 0.5


def test_what_the_region_did_is_taken_generation_by_generation():
    history = [
        {"reward": 0.0, "trust/kl": 0.0, "trust/cut": 0.1}, {"trust/kl": 0.5, "trust/cut": float("nan")},
        {"reward": 0.0, "trust/kl": 0.0, "trust/cut": 0.3}, {"trust/kl": 0.1, "trust/cut": 0.2},
        {"reward": 0.0, "trust/kl": 0.2, "trust/cut": 0.2, "trust/step_scale": 0.5},
    ]  # fmt: skip
    for record in history:
        record.setdefault("trust/step_scale", 0.5)
    assert run.region(history) == pytest.approx({"moved": 0.2, "cut": 0.2, "scale": 0.5})
