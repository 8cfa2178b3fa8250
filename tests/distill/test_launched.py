"""ERPD as a launcher starts it on two processes of a CPU, with DeepSpeed: `pytest -m slow tests/distill`."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import yaml
from test_erpd import freeze, layout_run, recipe, weights
from tiny import parameter_gap


pytestmark = pytest.mark.slow
HERE = Path(__file__).parent
STAGES = ("teacher-mse", "teacher-mse-twin", "student")


def launch(folder: Path, zero: dict, *words: str) -> subprocess.CompletedProcess:
    """What `accelerate launch` makes of `words` on two processes with a DeepSpeed config."""
    config = dict(compute_environment="LOCAL_MACHINE", distributed_type="DEEPSPEED", num_machines=1, num_processes=2)
    config |= {"use_cpu": True, "mixed_precision": "no", "deepspeed_config": zero}
    (folder / "launch.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", str(folder / "launch.yaml")]
    paths = os.pathsep.join(map(str, (HERE.parent.parent, HERE.parent, HERE)))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    return subprocess.run([*command, *words], env=env, capture_output=True, text=True, timeout=900)


def test_zero2_trains_like_one_process(tiny_model_path, tmp_path):
    pytest.importorskip("deepspeed")
    freeze(tiny_model_path, tmp_path / "rollouts")
    done = launch(tmp_path, {"zero_stage": 2}, str(HERE / "test_erpd.py"), str(tmp_path), tiny_model_path, *STAGES)
    assert done.returncode == 0, done.stderr[-4000:]
    for stage in STAGES:
        one = layout_run(stage, tiny_model_path, tmp_path / "one", tmp_path / "rollouts", 1, 2)
        ranks = [torch.load(tmp_path / f"{stage}-{rank}.pt") for rank in (0, 1)]
        for key in one:
            close = dict(rtol=1e-3, atol=1e-4) if key == "log" else dict(rtol=1e-4, atol=2e-6)
            torch.testing.assert_close(ranks[0][key], ranks[1][key], rtol=0, atol=0)
            torch.testing.assert_close(ranks[0][key], one[key], **close)


@pytest.mark.parametrize("stage", [2, 3])
def test_the_rounds_under_zero(stage, tiny_model_path, tmp_path):
    """From one model to the student, each stage a whole model on disk, as in one process."""
    pytest.importorskip("deepspeed")
    changes = dict(rounds=1, reward_funcs=["test_erpd.answer_length"])
    for name in ("one", "two"):
        (tmp_path / name).mkdir()
    words = ["-m", "trl_trust", "erpd", *recipe(tmp_path / "two", tiny_model_path, **changes)]
    zero = {"zero_stage": stage} | ({"zero3_init_flag": True, "zero3_save_16bit_model": True} if stage == 3 else {})
    # half of a batch each
    half = ["--per_device_train_batch_size", "2"]
    done = launch(tmp_path, zero, *words, *half)
    assert done.returncode == 0, done.stderr[-4000:]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(map(str, (HERE.parent.parent, HERE.parent, HERE)))}
    alone = ["-m", "trl_trust", "erpd", *recipe(tmp_path / "one", tiny_model_path, **changes)]
    subprocess.run([sys.executable, *alone], env=env, check=True, capture_output=True, timeout=900)
    for name in ("teacher", "unlearned", "student"):
        one, two = (weights(tmp_path / run / "out" / "round-1" / name) for run in ("one", "two"))
        # AdamW's first steps turn rounding of a gradient near 0 into a step of the learning rate's size
        gap, moved = parameter_gap(one, two), parameter_gap(one, weights(tiny_model_path))
        assert gap < 0.1 * moved, name
    lora = launch(tmp_path, {"zero_stage": 3}, *words, "--use_peft", "true", "--output_dir", str(tmp_path / "lora"))
    assert lora.returncode != 0
    lines = [line for line in lora.stderr.splitlines() if line.startswith("trl-trust: error")]
    assert lines and all("use_peft=True under ZeRO-3" in line for line in lines)
    assert not (tmp_path / "lora").exists()
    assert json.loads((tmp_path / "two" / "out" / "round-1" / "student" / "stage.json").read_text())
