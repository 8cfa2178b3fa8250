"""A disk that fills: what was cut off is never read as if it were whole. On a file system of 256 KiB where one can be
mounted; with a write that fails halfway everywhere."""

import errno
import json
import subprocess
from pathlib import Path

import pyarrow.parquet as pq
import pytest
import torch

from trl_trust.evaluation.report import Score, TrustReport
from trl_trust.frozen import store
from trl_trust.policy.checkpoint import write_whole


@pytest.fixture
def small_disk(tmp_path):
    folder = tmp_path / "disk"
    folder.mkdir()
    made = subprocess.run(["mount", "-t", "tmpfs", "-o", "size=256k", "tmpfs", folder], capture_output=True, text=True)
    if made.returncode != 0:
        pytest.skip(f"mount of a small tmpfs needs root: {made.stderr.strip()}")
    yield folder
    subprocess.run(["umount", folder], check=True)


def fill(folder: Path, leave: int) -> None:
    """Leave about `leave` bytes free."""
    left = subprocess.run(["df", "--output=avail", "-B1", folder], capture_output=True, text=True).stdout.split()[-1]
    (folder / "other").write_bytes(b"x" * (int(left) - leave))


def write_rollouts(folder: Path, rows: int) -> None:
    store.write_parts(folder, "rollouts", 2, lambda: lambda part: {"text": [f"{part} {i} " * 9 for i in range(rows)]})


def test_a_state_file_on_a_full_disk_leaves_the_one_before(small_disk):
    path = small_disk / "state.pt"
    write_whole(path, lambda part: torch.save(torch.zeros(4), part))
    fill(small_disk, leave=16 * 1024)
    with pytest.raises((OSError, RuntimeError)):  # torch.save says RuntimeError of the writes that its archive lost
        write_whole(path, lambda part: torch.save(torch.ones(20_000), part))
    assert torch.equal(torch.load(path), torch.zeros(4))


def test_rollouts_on_a_full_disk_are_refused_and_finished_later(small_disk):
    (small_disk / "settings.json").write_text(json.dumps({"num_prompts": 2, "prompts_per_part": 1}))
    fill(small_disk, leave=8 * 1024)
    with pytest.raises(OSError, match="No space"):
        write_rollouts(small_disk, 20_000)
    with pytest.raises(ValueError, match=r"2 of 2 files rollouts-\*.parquet are missing"):
        store.finished_parts(small_disk, "rollouts")
    (small_disk / "other").unlink()
    write_rollouts(small_disk, 20)
    files, _ = store.finished_parts(small_disk, "rollouts")
    assert [pq.read_table(file).num_rows for file in files] == [20, 20]


def test_a_report_on_a_full_disk_leaves_the_one_before(small_disk):
    report = TrustReport("first", "core", 0, (Score("a", 0.5),))
    report.save(small_disk / "report.json")
    fill(small_disk, leave=8 * 1024)
    rows = [{"answer": f"{i} " * 9} for i in range(5_000)]
    with pytest.raises(OSError, match="No space"):
        TrustReport("second", "core", 0, (Score("a", 0.5),), {}, rows).save(small_disk / "report.json")
    assert TrustReport.load(small_disk / "report.json").subject == "first"


def test_a_write_that_fails_halfway_leaves_no_file_of_that_name(tmp_path):
    def cut_off(part):
        part.write_text('{"k": ')
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match="No space"):
        write_whole(tmp_path / "state.json", cut_off)
    assert not (tmp_path / "state.json").exists()
