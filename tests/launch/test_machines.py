"""Two machines: here two launchers on loopback, each with one process, as docs/several_nodes.md has it."""

import json
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from tiny import parameter_gap
from transformers import AutoModelForCausalLM

from trl_trust.policy.checkpoint import GENERATION_FILE


ROOT = Path(__file__).parents[2]
PAGE = (ROOT / "docs" / "several_nodes.md").read_text()


def free_port() -> int:
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        return s.getsockname()[1]


def write_recipe(folder: Path, model: str, **changes) -> str:
    rows = [{"prompt": f"{a}+1=", "solution": str(a + 1)} for a in range(8)]
    (folder / "train.jsonl").write_text("\n".join(map(json.dumps, rows)))
    settings = {
        "model_name_or_path": model,
        "dataset_name": str(folder / "train.jsonl"),
        "reward_funcs": ["tiny.digits_reward"],
        "output_dir": str(folder / "out"),
        "use_cpu": True,
        "bf16": False,
        "gradient_checkpointing": False,
        "report_to": "none",
        "disable_tqdm": True,
        "learning_rate": 0.01,
        "max_steps": 6,
        "per_device_train_batch_size": 2,
        "num_generations": 2,
        "steps_per_generation": 2,
        "num_iterations": 2,
        "max_completion_length": 4,
        "save_steps": 3,  # inside the first generation
        "save_generation_state": True,
        **changes,
    }
    (folder / "recipe.yaml").write_text(yaml.safe_dump(settings))
    return str(folder / "recipe.yaml")


def two_machines(recipe: str, *words: str) -> None:
    port, launched = free_port(), []
    for rank in (0, 1):
        command = [sys.executable, "-c", "from trl_trust.cli import main; raise SystemExit(main())"]  # `trl-trust`
        command += ["dispo", "--config", recipe, *words]
        command += ["--multi_gpu", "--num_machines", "2", "--machine_rank", str(rank), "--num_processes", "2"]
        command += ["--main_process_ip", "127.0.0.1", "--main_process_port", str(port)]
        env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'tests'}", "OMP_NUM_THREADS": "1"}
        launched.append(
            subprocess.Popen(command, env=env, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        )
    said = [process.communicate(timeout=900)[0] for process in launched]
    assert [process.returncode for process in launched] == [0, 0], "\n".join(text[-3000:] for text in said)


@pytest.mark.slow
def test_two_machines_train_save_and_resume(tiny_model_path, tmp_path):
    recipe = write_recipe(tmp_path, tiny_model_path)
    two_machines(recipe)
    out = tmp_path / "out"
    # rank 0 writes what is one for all, each rank what is its own
    assert {path.name for path in out.glob("checkpoint-3/trl_trust_generation*")} == {
        GENERATION_FILE.format(rank=rank) for rank in (0, 1)
    }
    whole = AutoModelForCausalLM.from_pretrained(out)
    two_machines(
        recipe, "--resume_from_checkpoint", str(out / "checkpoint-3"), "--output_dir", str(tmp_path / "again")
    )
    assert parameter_gap(whole, AutoModelForCausalLM.from_pretrained(tmp_path / "again")) == 0.0
    assert parameter_gap(whole, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 0.0


def test_the_page_launches_what_the_test_launches():
    """The script of the page passes the same options to the same command."""
    script = re.search(r"```bash\n(#!/bin/bash.*?)```", PAGE, re.S)[1]
    for option in ("--num_machines", "--machine_rank", "--num_processes", "--main_process_ip", "--main_process_port"):
        assert option in script
    subprocess.run(["bash", "-n"], input=script, text=True, check=True)
