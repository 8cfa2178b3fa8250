"""Every method in every layout as a launcher starts it: two processes equal one, or one line says why not.

The short selection runs with the suite; the whole, about four minutes on two cores, with
`pytest -m "slow or not slow" tests/launch`.
"""

import json
import os
import subprocess
import sys
from pathlib import Path

import layouts
import pytest
import torch
import yaml

from trl_trust.methods import hosted


HERE = Path(__file__).parent
LAYOUTS = {
    "ddp": {"distributed_type": "MULTI_GPU"},  # MULTI_CPU asks for mpirun; with use_cpu this is gloo
    "zero1": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 1}},
    "zero2": {"distributed_type": "DEEPSPEED", "deepspeed_config": {"zero_stage": 2}},
    "zero3": {
        "distributed_type": "DEEPSPEED",
        "deepspeed_config": {"zero_stage": 3, "zero3_init_flag": False, "zero3_save_16bit_model": True},
    },
    "fsdp2": {
        "distributed_type": "FSDP",
        "fsdp_config": {
            "fsdp_version": 2,
            "fsdp_auto_wrap_policy": "TRANSFORMER_BASED_WRAP",
            "fsdp_reshard_after_forward": True,
            "fsdp_state_dict_type": "FULL_STATE_DICT",
            "fsdp_cpu_ram_efficient_loading": False,
        },
    },
}
NAMES = [*(method.name for method in hosted("grpo")), "dispo+kl", "dispo+ess", "dispo+stop", "dispo+backtrack"]
SHORT = {("fsdp2", "dispo"), ("fsdp2", "dispo@lora")}

# (layout, name) -> words of the refusal; * is every layout or name
REFUSED = {
    ("zero", "dispo+stop"): "DeepSpeed's engine steps inside the last backward",
    ("zero", "dispo+backtrack"): "DeepSpeed's engine steps inside the last backward",
    ("zero", "vpd"): "e_step_mode='extra': DeepSpeed and FSDP1 make optimizer steps themselves",
}


def refusal(layout: str, name: str) -> str | None:
    return next(
        (
            words
            for (where, what), words in REFUSED.items()
            if layout.startswith(where) and name.partition("@")[0] == what
        ),
        None,
    )


@pytest.fixture(scope="module")
def launched(tiny_model_path, tmp_path_factory):
    """{(layout, names): folder}: one launch for all names that are asked for together."""
    folders = {}

    def launch(layout: str, names: tuple[str, ...]) -> Path:
        if (layout, names) not in folders:
            folder = folders[layout, names] = tmp_path_factory.mktemp(layout)
            config = dict(compute_environment="LOCAL_MACHINE", num_machines=1, num_processes=2, mixed_precision="no")
            config |= {"use_cpu": True, "machine_rank": 0, **LAYOUTS[layout]}
            (folder / "launch.yaml").write_text(yaml.safe_dump(config))
            command = [sys.executable, "-m", "accelerate.commands.launch", "--config_file", folder / "launch.yaml"]
            paths = os.pathsep.join(map(str, (HERE.parent.parent, HERE.parent)))
            env = {**os.environ, "PYTHONPATH": paths, "OMP_NUM_THREADS": "1"}
            done = subprocess.run(
                [*command, str(HERE / "worker.py"), str(folder), tiny_model_path, layout, *names],
                env=env,
                capture_output=True,
                text=True,
                timeout=3000,
            )
            assert done.returncode == 0, done.stderr[-4000:]
        return folders[layout, names]

    return launch


@pytest.fixture(scope="module")
def alone(tiny_model_path, tmp_path_factory):
    """{name: parameters after training on one process}."""
    found = {}

    def run(name: str) -> dict[str, torch.Tensor]:
        if name not in found:
            found[name] = layouts.run(name, tiny_model_path, tmp_path_factory.mktemp("alone"), processes=1)
        return found[name]

    return run


CASES = [
    pytest.param(layout, name, marks=[] if (layout, name) in SHORT else [pytest.mark.slow], id=f"{layout}-{name}")
    for layout in LAYOUTS
    for kind in ("", "@lora")
    for name in (name + kind for name in NAMES)
]


@pytest.mark.parametrize(("layout", "name"), CASES)
def test_two_processes_train_like_one(layout, name, launched, alone, request):
    if layout.startswith("zero"):
        pytest.importorskip("deepspeed", reason="the extra `deepspeed` is not installed")
    asked = [item.callspec.params for item in request.session.items if item.function is request.function]
    names = tuple(params["name"] for params in asked if params["layout"] == layout)
    folder = launched(layout, names)
    if (words := refusal(layout, name)) is not None:
        for rank in (0, 1):
            said = json.loads((folder / f"{name}-{rank}.json").read_text())
            assert words in said and "\n" not in said
        return
    ranks = [torch.load(folder / f"{name}-{rank}.pt") for rank in (0, 1)]
    one = alone(name)
    assert ranks[0]["moved_ratio"] > 1e-3  # or the test would hold for a term that does nothing
    for key, parameter in one.items():
        torch.testing.assert_close(ranks[0]["parameters"][key], ranks[1]["parameters"][key], rtol=0, atol=0)
        torch.testing.assert_close(ranks[0]["parameters"][key], parameter, rtol=2e-4, atol=4e-6)
