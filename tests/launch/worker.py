"""What a launcher starts in test_launch.py: `accelerate launch worker.py OUTPUT_DIR MODEL_PATH LAYOUT NAME...`.

Trains every name as tests/layouts.py does, and leaves for each rank its parameters, or the words of the refusal.
"""

import json
import os
import sys
from pathlib import Path

import layouts
import torch
from accelerate.state import DistributedType, PartialState
from tiny import leave


def assert_sharded(trainer, layout: str) -> None:
    """A layout that quietly fell back to whole copies would prove nothing."""
    if layout.startswith("zero"):
        assert trainer.model_wrapped.zero_optimization_stage() == int(layout[-1])
    if layout == "zero3":
        assert all(hasattr(p, "ds_tensor") and p.ds_tensor.numel() < p.ds_numel for p in trainer.model.parameters())
    if layout == "fsdp2":
        parameters = list(trainer.accelerator.unwrap_model(trainer.model).parameters())
        sharded = [p for p in parameters if hasattr(p, "to_local") and p.to_local().numel() < p.numel()]
        assert len(sharded) > len(parameters) / 2
    if layout == "ddp":
        assert hasattr(trainer.model_wrapped, "require_backward_grad_sync")


def as_if_on_gpus() -> None:
    """accelerate 1.15 shards nothing on CPUs: it never makes FSDP of MULTI_CPU. Under the other name it does."""
    initialise = PartialState.__init__

    def relabelled(self, *args, **kwargs):
        initialise(self, *args, **kwargs)
        if self.distributed_type == DistributedType.MULTI_CPU:
            self.distributed_type = DistributedType.MULTI_GPU

    PartialState.__init__ = relabelled


def main() -> None:
    output_dir, model_path, layout, names = Path(sys.argv[1]), sys.argv[2], sys.argv[3], sys.argv[4:]
    torch.set_num_threads(1)
    rank = os.environ["RANK"]
    if layout == "fsdp2":
        as_if_on_gpus()
    for name in names:
        try:
            trainer = layouts.train(name, model_path, output_dir / name, processes=int(os.environ["WORLD_SIZE"]))
        except ValueError as error:  # at construction, on every rank alike
            (output_dir / f"{name}-{rank}.json").write_text(json.dumps(str(error)))
            continue
        assert_sharded(trainer, layout)
        logged = [r[f"trust/ratio/{end}"] for r in trainer.state.log_history[:-1] for end in ("min", "max")]
        ratios = [abs(ratio - 1) for ratio in logged if ratio is not None]  # None: no token was live
        cut = max(record.get("trust/cut") or 0.0 for record in trainer.state.log_history[:-1])
        found = {"parameters": layouts.whole_parameters(trainer), "moved_ratio": max(ratios, default=0.0), "cut": cut}
        torch.save(found, output_dir / f"{name}-{rank}.pt")
    leave()


if __name__ == "__main__":
    main()
