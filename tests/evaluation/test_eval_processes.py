"""The callback on two gloo processes: one process's report, on each of them, and training untouched."""

import json

import eval_processes
import pytest
import torch
from tiny import on_two_processes


def told(text: str) -> dict:
    """A report without what is the machine's, not the model's: seconds, versions."""
    return {key: value for key, value in json.loads(text).items() if key != "meta"}


@pytest.mark.slow
def test_two_processes_report_what_one_does_and_train_as_without(tmp_path):
    on_two_processes(eval_processes.__file__, tmp_path)
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    trainer, reports = eval_processes.run(tmp_path / "one", 1)

    alone = [told(report.to_json()) for report in reports]
    assert len(alone) == 3
    values = [score["value"] for report in alone for score in report["scores"]]
    assert all(0 < value < 1 for value in values)  # or every way of sharing the items would agree
    for found in ranks:
        assert [told(text) for text in found["reports"]] == alone
        for key, parameter in found["watched"].items():
            assert torch.equal(parameter, found["plain"][key]), key
    assert {path.name for path in (tmp_path / "watched" / "trusteval").iterdir()} == {
        "start.json", "step-1.json", "step-2.json"
    }  # fmt: skip
    for key, parameter in eval_processes.parameters(trainer).items():
        torch.testing.assert_close(ranks[0]["watched"][key], parameter, rtol=1e-3, atol=1e-4)
