"""`python async_processes.py MODEL_PATH OUTPUT_DIR ddp|fsdp2` under torchrun: see test_base.py."""

import os
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import DistributedType
from given_rows import GivenRows, async_config, async_run, history, rows
from tiny import leave
from torch.distributed.tensor import DTensor
from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

from trl_trust import AsyncTrustGRPOConfig, AsyncTrustGRPOTrainer


LAYOUTS = {"fixed count": {"gradient_accumulation_steps": 2}, "token budget": {"token_budget": 40}}
CONTROLS = {"ess": {}, "kl": {"target_kl": 1e-4}, "backtrack": {"target_kl": 1e-4}}
FSDP2 = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_TRANSFORMER_CLS_TO_WRAP": "Qwen2DecoderLayer",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
    "FSDP_STATE_DICT_TYPE": "FULL_STATE_DICT",
}


def train(trainer_class, config_class, health=None, given=120, **changes):
    args = async_config(config_class, folder, **changes)
    if sharded:
        # accelerate 1.15 makes FSDP of several GPUs, and not of several CPUs
        assert args.distributed_state.num_processes == 2
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    trainer = async_run(trainer_class, path, args, GivenRows(rows(given), health))
    parameters = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
    assert all(isinstance(p, DTensor) == sharded for p in parameters), "not sharded, or a layer left gathered"
    whole = [(p.full_tensor() if sharded else p).detach().clone() for p in parameters]
    return {"parameters": whole, "history": history(trainer)}


if __name__ == "__main__":
    path, folder, sharded = sys.argv[1], Path(sys.argv[2]), sys.argv[3] == "fsdp2"
    if sharded:
        os.environ.update(FSDP2)
    torch.set_num_threads(1)
    found = {}
    for name, layout in LAYOUTS.items():
        both = (AsyncGRPOTrainer, AsyncGRPOConfig), (AsyncTrustGRPOTrainer, AsyncTrustGRPOConfig)
        found[name] = [train(*classes, **layout) for classes in both]
    for mode, settings in CONTROLS.items():
        found[mode] = train(AsyncTrustGRPOTrainer, AsyncTrustGRPOConfig, step_control=mode, **settings)
    found["died"] = []
    for layout in LAYOUTS.values():
        try:
            dead = RuntimeError("the worker is dead")
            train(AsyncTrustGRPOTrainer, AsyncTrustGRPOConfig, dead, given=20, max_steps=50, **layout)
        except RuntimeError as error:
            found["died"].append(str(error))
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    leave()
