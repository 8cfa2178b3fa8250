"""`python async_processes.py MODEL_PATH OUTPUT_DIR` under torchrun: see test_base.py."""

import sys
from pathlib import Path

import torch
import torch.distributed as dist
from given_rows import GivenRows, async_config, async_run, history, rows
from tiny import leave
from trl.experimental.async_grpo import AsyncGRPOTrainer

from trl_trust.asynchronous.base import AsyncTrustGRPOTrainer


if __name__ == "__main__":
    path, folder = sys.argv[1], Path(sys.argv[2])
    torch.set_num_threads(1)
    layouts = {"fixed count": {"gradient_accumulation_steps": 2}, "token budget": {"token_budget": 40}}
    found = {}
    for name, layout in layouts.items():
        found[name] = []
        for trainer_class in (AsyncGRPOTrainer, AsyncTrustGRPOTrainer):
            args = async_config(output_dir=folder, **layout)
            trainer = async_run(trainer_class, path, args, GivenRows(rows(120)))
            model = trainer.accelerator.unwrap_model(trainer.model)
            parameters = [p.detach().clone() for p in model.parameters()]
            found[name].append({"parameters": parameters, "history": history(trainer)})
    found["died"] = []
    for layout in layouts.values():
        try:
            worker = GivenRows(rows(20), RuntimeError("the worker is dead"))
            async_run(AsyncTrustGRPOTrainer, path, async_config(output_dir=folder, max_steps=50, **layout), worker)
        except RuntimeError as error:
            found["died"].append(str(error))
    torch.save(found, folder / f"{dist.get_rank()}.pt")
    leave()
