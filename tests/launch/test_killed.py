"""SIGKILL inside a generation, through the command line: resumed, the run is the one that was not killed."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_machines import write_recipe
from tiny import parameter_gap
from transformers import AutoModelForCausalLM

from trl_trust.policy.checkpoint import GENERATION_FILE


ROOT = Path(__file__).parents[2]
# A module of rewards, as a user's would be, that ends its process at the start of an update
KILLS = """
import os, signal
from tiny import digits_reward
from transformers import Trainer

step = Trainer.training_step

def training_step(self, *args, **kwargs):
    if self.state.global_step == int(os.environ.get("KILL_AT", -1)):
        os.kill(os.getpid(), signal.SIGKILL)
    return step(self, *args, **kwargs)

Trainer.training_step = training_step
"""


def trl_trust(folder: Path, recipe: str, *words: str, **env: str) -> subprocess.CompletedProcess:
    command = [sys.executable, "-c", "from trl_trust.cli import main; raise SystemExit(main())", "dispo"]
    paths = os.pathsep.join(map(str, (ROOT, ROOT / "tests", folder)))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1", **env}
    return subprocess.run([*command, "--config", recipe, *words], env=env, capture_output=True, text=True, timeout=600)


@pytest.mark.slow
def test_a_killed_run_resumed_is_the_run_that_was_not_killed(tiny_model_path, tmp_path):
    (tmp_path / "kills.py").write_text(KILLS)
    # 4 updates a generation: both the checkpoint, at 5, and the kill, at 6, are inside the second
    changes = {"reward_funcs": ["kills.digits_reward"], "save_steps": 5, "max_steps": 10}
    recipe = write_recipe(tmp_path, tiny_model_path, **changes)
    whole, killed = tmp_path / "whole", tmp_path / "killed"
    done = trl_trust(tmp_path, recipe, "--output_dir", str(whole))
    assert done.returncode == 0, done.stderr[-3000:]
    done = trl_trust(tmp_path, recipe, "--output_dir", str(killed), KILL_AT="6")
    assert done.returncode != 0 and not (killed / "model.safetensors").exists()
    assert (killed / "checkpoint-5" / GENERATION_FILE.format(rank=0)).exists()
    words = ("--output_dir", str(killed), "--resume_from_checkpoint", str(killed / "checkpoint-5"))
    done = trl_trust(tmp_path, recipe, *words)
    assert done.returncode == 0, done.stderr[-3000:]
    one, other = (AutoModelForCausalLM.from_pretrained(folder) for folder in (whole, killed))
    assert parameter_gap(one, other) == 0.0
    assert parameter_gap(one, AutoModelForCausalLM.from_pretrained(tiny_model_path)) > 0.0
