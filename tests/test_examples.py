"""Every example runs: two steps, with tiny local models and data (see `snippets`)."""

import shutil

import pytest
from snippets import ROOT, run_code, shrink, tiny_model

from trl_trust import cli


EXAMPLES = sorted((ROOT / "examples").glob("*.py"))


@pytest.mark.parametrize("path", EXAMPLES, ids=lambda path: path.stem)
def test_an_example_runs(path, tmp_path, monkeypatch, capsys):
    shrink(monkeypatch)
    monkeypatch.chdir(tmp_path)
    source = path.read_text()
    needs = {"tools": path.stem == "environment", "letters": path.stem == "evaluation_callback"}
    namespace = run_code(source, tiny_model(tmp_path / "model", **needs), {"__name__": "x"})
    namespace["main"]()
    if "save_model()" in source:
        assert (tmp_path / path.stem / "config.json").exists() or (
            tmp_path / path.stem / "adapter_config.json"
        ).exists()
    out = capsys.readouterr().out
    if path.stem == "monitor":
        assert "out of bounds: nothing" in out
    if path.stem == "evaluation_callback":
        assert "| honesty |" in out and "worse beyond chance: nothing" in out
        assert (tmp_path / path.stem / "trusteval" / "step-2.json").exists()


def test_own_data_by_recipe(tmp_path, monkeypatch, capsys):
    folder = shutil.copytree(ROOT / "examples" / "own_data", tmp_path / "own_data")
    monkeypatch.chdir(folder)
    shrink(monkeypatch)
    model = tiny_model(tmp_path / "model")
    for command, out in (("dppo", "own_data"), ("grpo", "own_data_grpo")):
        words = ["--config", "recipe.yaml", "--model_name_or_path", model, "--output_dir", out]
        assert cli.main([command, *words], launch=False) == 0
    assert cli.main(["plot", "own_data", "own_data_grpo"]) == 0
    assert "dppo" in capsys.readouterr().out
    assert (folder / "plot.png").exists()


def test_examples_are_short_and_listed():
    listed = (ROOT / "examples" / "README.md").read_text()
    for path in EXAMPLES:
        assert len(path.read_text().splitlines()) < 80, path
        assert f"({path.name})" in listed
