"""One small run, alone or under torchrun: `python two_processes.py OUTPUT_DIR`."""

import os
import sys
from pathlib import Path

import torch
from datasets import Dataset
from transformers import PrinterCallback

from trl_trust.flow import SAGEGRPOConfig, SAGEGRPOTrainer
from trl_trust.flow.adapters.tiny import tiny_sd3_pipeline


SAMPLES = 16  # of a phase, over all processes: 4 prompts x 4


def redness(samples, prompts, **columns):
    return (samples[:, 0] - samples[:, 2]).flatten(1).mean(1).tolist()


def run(folder: Path, processes: int):
    """Train two phases of two updates each, and return the trainer."""
    prompts = Dataset.from_list([{"prompt": text} for text in ("a red ball", "a blue cat", "the ball", "a cat runs")])
    trainer = SAGEGRPOTrainer(
        tiny_sd3_pipeline(),
        SAGEGRPOConfig(
            output_dir=str(folder),
            height=16,
            width=16,
            num_inference_steps=3,
            shift=3.0,
            num_generations=4,
            per_device_train_batch_size=SAMPLES // 2 // processes,
            steps_per_generation=2,
            gradient_accumulation_steps=6,
            num_iterations=2,
            optim="sgd",
            learning_rate=0.5,
            lr_scheduler_type="constant",
            max_grad_norm=0.0,
            epsilon=1e-3,
            beta=0.1,
            kl_schedule="controller",
            beta_warmup=2,
            ref_model_sync_steps=3,
            max_steps=4,
            logging_steps=1,
            eval_strategy="steps",
            eval_steps=4,
            use_cpu=True,
            bf16=False,
            report_to="none",
            save_strategy="no",
            disable_tqdm=True,
        ),
        redness,
        prompts,
        eval_dataset=prompts.select(range(3)),
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    trainer.save_model()
    return trainer


if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parent.parent))
    from tiny import leave

    torch.set_num_threads(1)
    folder = Path(sys.argv[1])
    trainer = run(folder, int(os.environ["WORLD_SIZE"]))
    state = {"log": trainer.state.log_history, "anchor": trainer.anchor, "weight": trainer.kl_weight.state_dict()}
    state["parameters"] = {name: p.detach() for name, p in trainer.model.named_parameters()}
    torch.save(state, folder / f"rank-{os.environ['RANK']}.pt")
    leave()
