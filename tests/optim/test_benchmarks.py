"""The benchmarks in miniature: the pre-training one stores its cells one by one and runs none twice; the one of
optimizer steps keeps each row with the machine and the command that it came from."""

import importlib.util
import json
import math
from pathlib import Path

import pytest
import torch


ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def beside_the_scripts(monkeypatch):
    monkeypatch.syspath_prepend(ROOT / "benchmarks")  # where a script's own neighbours are found


def load_script(name):
    spec = importlib.util.spec_from_file_location(name, ROOT / "benchmarks" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_pretraining_resumes_cell_by_cell(tmp_path, monkeypatch, capsys):
    script, path = load_script("pretrain_small"), tmp_path / "results.json"
    ran = []
    run_cell = script.run_cell
    monkeypatch.setattr(script, "run_cell", lambda *args: ran.append(args[:3]) or run_cell(*args))

    def call(*words):
        monkeypatch.setattr("sys.argv", ["pretrain_small.py", "--smoke", "--json", str(path), *words])
        script.main()

    call("--methods", "adamw", "auon")
    call("--methods", "adamw", "auon", "hybrid_auon")
    assert [method for method, _, _ in ran] == ["adamw", "auon", "hybrid_auon"]
    cells = json.loads(path.read_text())["cells"]
    assert len(cells) == 3 and all(math.isfinite(cell["val_loss"]) and len(cell["curve"]) == 2 for cell in cells)
    assert path.with_suffix(".svg").stat().st_size > 0
    assert path.with_suffix(".md").read_text().count("\n| ") == 4
    assert f"{cells[1]['val_loss']:.4f}" in capsys.readouterr().out


def test_results_of_other_settings_are_not_mixed(tmp_path):
    script, path = load_script("pretrain_small"), tmp_path / "results.json"
    path.write_text(json.dumps({"settings": script.FULL, "cells": []}))
    with pytest.raises(SystemExit, match="other settings"):
        script.cells.load(path, settings=script.SMOKE)


def test_cells_are_added_replaced_and_say_where_they_were_made(tmp_path, monkeypatch):
    cells, path = load_script("cells"), tmp_path / "folder" / "results.json"
    monkeypatch.setattr("sys.argv", [str(ROOT / "benchmarks" / "some.py"), "--name", "two words"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    for value in (1, 2):
        cells.add(path, {"cell": "a", "seed": 0, "value": value})
    cells.add(path, {"cell": "a", "seed": 1, "value": 3})
    found = cells.load(path)["cells"]
    assert [(cell["seed"], cell["value"]) for cell in found] == [(0, 2), (1, 3)]
    origin = found[0]["origin"]
    assert origin["command"] == "OMP_NUM_THREADS=1 python benchmarks/some.py --name 'two words'"
    assert origin["versions"]["torch"] == torch.__version__ and origin["machine"]["device"]
    with pytest.raises(TypeError):  # a run that breaks off in the middle leaves the file whole
        cells.add(path, {"cell": "b", "seed": 0, "value": object()})
    assert len(json.loads(path.read_text())["cells"]) == 2
    assert [p.name for p in path.parent.iterdir()] == ["results.json"]


def test_a_cell_is_reproducible_and_its_text_too():
    script = load_script("pretrain_small")
    first, second = (script.run_cell("hybrid_auon", 0.1, 3, script.SMOKE) for _ in range(2))
    assert first["curve"] == second["curve"]
    assert script.text(500, 1) == script.text(500, 1) != script.text(500, 2)
    assert set(script.text(50_000, 1)) <= set(script.ALPHABET)


def test_a_diverged_cell_is_kept_and_never_best():
    script = load_script("pretrain_small")
    cell = script.run_cell("adamw", 1e30, 0, script.SMOKE)
    assert cell["val_loss"] == math.inf and cell["diverged"] > 1
    rates = {1e30: [cell], 0.1: [{"val_loss": 2.0}]}
    assert script.best_rate(rates) == 0.1


def test_a_row_keeps_its_own_machine_and_command(tmp_path, monkeypatch, capsys):
    script, path = load_script("optimizers"), tmp_path / "results.json"
    monkeypatch.setattr(torch, "set_num_threads", lambda number: None)  # the other tests' too
    step = lambda device: torch.optim.SGD(script.parameters([(4, 4)], device), lr=0.1)
    monkeypatch.setattr(script, "pairs", lambda: {name: (name, None, step, step) for name in ("one", "two")})
    old = {"rows": {"one": {"ratio": 0.5}, "two": {"ratio": 0.6}}, "machine": {"device": "Old"}, "command": "old"}
    path.write_text(json.dumps(old))

    def call(*words):
        monkeypatch.setattr("sys.argv", ["optimizers.py", "--rounds", "1", "--json", str(path), *words])
        script.main()
        return json.loads(path.read_text())

    results = call("--rows", "two")
    # An older file has one machine and one command, those of its last run: they stay while a row is left from it.
    assert results["rows"]["one"] == {"ratio": 0.5} and results["machine"] == {"device": "Old"}
    assert results["rows"]["two"]["command"].endswith("--rows two")
    results = call("--threads", "2", "--rows", "one")
    assert results["rows"]["one"]["machine"]["threads"] == 2 and results["rows"]["two"]["machine"]["threads"] == 1
    assert results["rows"]["two"]["command"].endswith("--rows two")
    assert results.keys() == {"rows"}
