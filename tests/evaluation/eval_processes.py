"""One small run with the callback and one without, alone or under torchrun: `python eval_processes.py OUTPUT_DIR`."""

import sys
from binascii import crc32
from pathlib import Path

import torch
from tiny import leave
from transformers import PrinterCallback
from trl import SFTConfig, SFTTrainer

from trl_trust.evaluation import TrustEvalCallback, tiny
from trl_trust.evaluation.suite import TrustSuite


def by_lot(item, output):
    """A verdict that hangs on which output came to which item: no two ways of sharing items agree by chance."""
    return crc32(f"{item.id} {output}".encode()) % 2 == 0


# 25 items: the two processes' shares differ in size
SUITE = TrustSuite(
    dims=("honesty", "fairness"), n_per_dim=10, terse=True, max_new_tokens=8, fresh_per_eval=True, batch_size=4,
    judge={"honesty": by_lot, "fairness": by_lot},
)  # fmt: skip


def run(folder: Path, processes: int, watched: bool = True):
    """Two steps of SFT over eight rows each; the trainer, and the reports at the start and after each step."""
    tokenizer = tiny.build_tokenizer()
    args = SFTConfig(
        str(folder), max_steps=2, per_device_train_batch_size=8 // processes, use_cpu=True, bf16=False,
        report_to="none", save_strategy="no", learning_rate=1e-2, gradient_checkpointing=False, disable_tqdm=True,
    )  # fmt: skip
    trainer = SFTTrainer(
        tiny.build_model(tokenizer, hidden_size=16, layers=1, heads=2), args, processing_class=tokenizer,
        train_dataset=SUITE.dataset("honesty", n=16, demonstrate=True).select_columns(["prompt", "completion"]),
    )  # fmt: skip
    trainer.remove_callback(PrinterCallback)
    callback = TrustEvalCallback(trainer, SUITE, every_n_steps=1)
    if watched:
        trainer.add_callback(callback)
    trainer.train()
    return trainer, [callback.baseline, *callback.reports]


def parameters(trainer) -> dict:
    return {key: p.detach().clone() for key, p in trainer.accelerator.unwrap_model(trainer.model).named_parameters()}


if __name__ == "__main__":
    out = Path(sys.argv[1])
    plain, _ = run(out / "plain", 2, watched=False)
    trainer, reports = run(out / "watched", 2)
    rank = trainer.accelerator.process_index
    found = {"plain": parameters(plain), "watched": parameters(trainer), "reports": [r.to_json() for r in reports]}
    torch.save(found, out / f"rank-{rank}.pt")
    leave()
