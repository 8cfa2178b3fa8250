"""Recipes for several GPUs as they are shipped, with the launcher config that they name, on two processes.

Only what makes them small is changed, as in tests/test_recipes.py, which runs every recipe on one process.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from test_recipes import ON_A_CPU, RECIPES, SMALL, settings, some_reward, tiny, write  # noqa: F401  `tiny` is a fixture


pytestmark = pytest.mark.slow

TESTS = Path(__file__).parents[1]
LAUNCHED = [name for name in RECIPES if "accelerate_config" in settings(name)]


def reward_under_deepspeed(completions, **kwargs):
    """Ends a run that quietly fell back to one process, or to whole copies."""
    assert (os.environ["WORLD_SIZE"], os.environ["ACCELERATE_USE_DEEPSPEED"]) == ("2", "true")
    return some_reward(completions)


@pytest.mark.parametrize("name", LAUNCHED)
def test_it_trains_as_shipped(name, tiny, tmp_path):  # noqa: F811
    pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    recipe = settings(name)
    small = {**recipe, **ON_A_CPU, **SMALL, "num_processes": 2, "mixed_precision": "no", "dataset_name": tiny["data"]}
    small |= {key: tiny["model"] for key in recipe if key.endswith("model_name_or_path")}
    small |= {"max_steps": 2, "output_dir": str(tmp_path / "out")}
    small["reward_funcs"] = [*recipe["reward_funcs"], "test_shipped.reward_under_deepspeed"]
    if "reward_weights" in recipe:
        small["reward_weights"] = [*recipe["reward_weights"], 1.0]
    main = "from trl_trust.cli import main; raise SystemExit(main())"  # `trl-trust`
    command = [sys.executable, "-c", main, name.split("/")[0], "--config", write(tmp_path / "r.yaml", **small)]
    paths = os.pathsep.join(map(str, (TESTS.parent, TESTS, TESTS / "launch")))
    env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-4000:]

    log = json.loads((tmp_path / "out" / "trainer_state.json").read_text())["log_history"]
    assert [entry["step"] for entry in log if "loss" in entry] == [1, 2]
    assert all(entry["grad_norm"] > 0 for entry in log if "loss" in entry)
    saved = "adapter_model.safetensors" if recipe.get("use_peft") else "model.safetensors"
    assert (tmp_path / "out" / saved).stat().st_size > 0
