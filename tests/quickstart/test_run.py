"""The command `trl-trust quickstart`, from arguments to files."""

import json
import subprocess
import sys

import pytest
from transformers import AutoModelForCausalLM

from trl_trust.methods import hosted
from trl_trust.quickstart import run


@pytest.fixture(scope="module")
def smoke(tmp_path_factory):
    """One run for the module: folder and report."""
    folder = tmp_path_factory.mktemp("quickstart")
    assert run.main(["--smoke", "--steps", "4", "--seed", "1", "--output-dir", str(folder)]) == 0
    return folder, json.loads((folder / "metrics.json").read_text())


def test_both_runs_are_measured_from_one_start(smoke):
    _, report = smoke
    assert list(report["results"]) == ["start", "grpo", "dispo"]
    assert report["results"]["start"]["kl"] == 0.0
    for name in ("grpo", "dispo"):
        row = report["results"][name]
        assert set(row) == {"reward", "pass@1", "pass@8", "greedy", "entropy", "kl", "seconds", "cpu_seconds"}
        assert row["kl"] > 0, "the policy has not moved"
        assert [record["step"] for record in report["history"][name]] == [1, 2, 3, 4]
    # Both sample their first generation from the same weights with the same seed.
    first = [report["history"][name][0]["reward"] for name in ("grpo", "dispo")]
    assert first[0] == first[1]


def test_the_ratio_is_live(smoke):
    _, report = smoke
    ratios = [record["trust/ratio/max"] for record in report["history"]["dispo"]]
    assert ratios[0] == pytest.approx(1.0, abs=1e-5)
    assert max(ratios) > 1.0001


def test_models_and_curves_are_where_the_report_says(smoke):
    folder, _ = smoke
    for name in ("start", "grpo", "dispo"):
        assert AutoModelForCausalLM.from_pretrained(folder / name).config.model_type == "qwen2"
    assert (folder / "curves.png").read_bytes().startswith(b"\x89PNG")


def test_same_seed_same_bits(smoke, tmp_path):
    folder, _ = smoke
    assert run.main(["--smoke", "--steps", "4", "--seed", "1", "--method", "grpo", "--output-dir", str(tmp_path)]) == 0
    for name in ("start", "grpo"):
        weights = "model.safetensors"
        assert (tmp_path / name / weights).read_bytes() == (folder / name / weights).read_bytes()
    assert not (tmp_path / "dispo").exists()


def test_a_method_with_a_teacher_gets_one(smoke, tmp_path):
    folder, _ = smoke
    assert run.main(["--smoke", "--steps", "1", "--method", "rlad", "--output-dir", str(tmp_path)]) == 0
    report = json.loads((tmp_path / "metrics.json").read_text())
    assert list(report["results"]) == ["start", "teacher", "grpo", "rlad"]
    assert report["results"]["teacher"]["kl"] > 0.01
    assert not (folder / "teacher").exists()


def test_without_matplotlib_it_says_so_and_goes_on(monkeypatch, tmp_path):
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    assert run.plot_curves({"grpo": [{"step": 1, "reward": 0.5, "entropy": 0.1}]}, tmp_path / "curves.png") is False
    assert not (tmp_path / "curves.png").exists()


def test_an_unknown_optimizer_is_one_line_before_any_work(capsys, tmp_path):
    assert run.main(["--smoke", "--optim", "nonesuch", "--output-dir", str(tmp_path / "out")]) == 2
    error = capsys.readouterr().err.strip()
    assert error.startswith("trl-trust quickstart: optim='nonesuch'")
    assert "\n" not in error
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("argv", [["--method", "nonesuch"], ["--steps", "0"], ["--nonesuch"]])
def test_bad_arguments_are_refused_by_the_parser(argv, capsys):
    with pytest.raises(SystemExit) as exit_:
        run.parse(argv)
    assert exit_.value.code == 2
    assert "error" in capsys.readouterr().err


def test_every_method_may_be_named():
    for method in hosted("grpo"):
        assert run.parse(["--method", method.name]).method == [method.name]


def test_parsing_imports_nothing_heavy():
    code = (
        "import sys, trl_trust.quickstart.run as run; run.parse([]); "
        "sys.exit(bool({'torch', 'transformers', 'trl', 'datasets'} & set(sys.modules)))"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_the_table_shows_every_number(capsys):
    from rich.console import Console

    results = {
        "start": {"pass@1": 0.301, "pass@8": 0.802, "greedy": 0.503, "entropy": 0.164, "kl": 0.0},
        "grpo": {"reward": 0.715, "pass@1": 0.726, "pass@8": 0.937, "greedy": 0.848, "entropy": 0.059, "kl": 0.07,
                 "seconds": 31.4},
    }  # fmt: skip
    console = Console(width=120, record=True)
    console.print(run.results_table(results))
    text = console.export_text()
    for number in ("0.301", "0.802", "0.503", "0.164", "0.715", "0.726", "0.937", "0.848", "0.059", "0.070", "31"):
        assert number in text


def test_the_reward_is_that_of_the_last_generations():
    history = [{"reward": 0.0}, {"entropy": 1.0}, {"reward": 0.5}, {"entropy": 1.0}, {"reward": 1.0}]
    assert run.last_reward(history, generations=2) == 0.75
    assert run.last_reward(history) == 0.5
