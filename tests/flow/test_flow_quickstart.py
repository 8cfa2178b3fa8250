"""`trl-trust quickstart --task flow`."""

import json

import pytest

from trl_trust import cli


def test_every_stage_runs(tmp_path, capsys):
    assert cli.main(["quickstart", "--task", "flow", "--smoke", "--output-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["runs"]) == ["sage", "flow", "dance", "cps", "sage, anchor"] and "not reached" in said
    assert list(metrics["before"]) == ["ode", "sage", "flow", "dance", "cps"] and min(metrics["before"].values()) > 0
    assert all(len(run["reward"]) == 3 for run in metrics["runs"].values())
    assert (tmp_path / "ring.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        cli.main(["quickstart", "--task=flow", "--phases", "0"])
    assert "--phases=0 must be at least 1" in capsys.readouterr().err
