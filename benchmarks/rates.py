"""Which rate to start from when fine-tuning: each optimizer over a grid of rates, in SFT and in GRPO, on addition.

    python benchmarks/rates.py                          # all cells that are not there yet, then the table
    python benchmarks/rates.py --stages sft --seeds 0 --optimizers adamw muon
    python benchmarks/rates.py --report

Both stages go on from the quickstart's start, a Qwen2 of 0.09M parameters that has imitated a demonstrator with
mistakes. SFT: 60 steps of 64 demonstrations without mistakes; the figure is the loss a token on held-out ones, lower
is better. GRPO: stock, 40 generations of 512 completions in 4 mini-batches; the figure is the mean reward of the last
10, higher is better. AdamW's part of a matrix optimizer runs at the rate of the matrices under `match_rms_adamw`, and
at AdamW's own good rate without it.
"""

import argparse
import math
import random
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

import cells


RESULTS = cells.RESULTS / "rates.json"
SFT_STEPS, RL_STEPS = 60, 160
MATCH = "shape_scale=match_rms_adamw,aux_lr={lr}"
PLAIN = {"sft": "aux_lr=3e-3", "grpo": "aux_lr=3e-4"}
WIDE, NARROW = {"sft": (1e-3, 3e-3, 1e-2, 3e-2), "grpo": (3e-4, 1e-3, 3e-3)}, (1e-2, 3e-2, 1e-1, 3e-1)
LIKE_ADAMW = {"sft": (3e-4, 1e-3, 3e-3, 1e-2), "grpo": (1e-4, 3e-4, 1e-3)}

# {row: (name in a recipe, its optim_args, rates by stage)}
OPTIMIZERS = {
    "adamw": ("adamw_torch", None, LIKE_ADAMW),
    "muon, match_rms_adamw": ("muon", MATCH, LIKE_ADAMW),
    "hybrid_auon repo, match_rms_adamw": ("hybrid_auon", "variant=repo," + MATCH, LIKE_ADAMW),
    "auon, match_rms_adamw": ("auon", MATCH, LIKE_ADAMW),
    "muon": ("muon", PLAIN, WIDE),
    "auon": ("auon", PLAIN, {"sft": NARROW, "grpo": NARROW[:3]}),
}
BETTER = {"sft": min, "grpo": max}


def options(row: str, stage: str, lr: float) -> dict:
    name, args, _ = OPTIMIZERS[row]
    args = args[stage] if isinstance(args, dict) else args
    return {"optim": name, "optim_args": args and args.format(lr=lr), "learning_rate": lr}


def demonstrations(split: str, n: int, seed: int):
    """Correct ones, as TRL's prompt and completion."""
    from datasets import Dataset

    from trl_trust.tasks.addition import demonstrate, pairs

    rng = random.Random(seed)
    said = lambda a, b: demonstrate(a, b, rng, drop_carry=0.0, slip=0.0)
    rows = [{"prompt": f"{a}+{b}=", "completion": said(a, b)} for a, b in pairs(split, n, seed)]
    return Dataset.from_list(rows)


def sft(row: str, lr: float, seed: int, start: Path, folder: str) -> float:
    from transformers import PrinterCallback
    from trl import SFTConfig, SFTTrainer

    import trl_trust.optim  # noqa: F401 the names

    args = SFTConfig(
        output_dir=folder,
        max_steps=SFT_STEPS,
        per_device_train_batch_size=64,
        per_device_eval_batch_size=256,
        lr_scheduler_type="cosine",
        warmup_steps=5,
        completion_only_loss=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=seed,
        **options(row, "sft", lr),
    )
    train, test = demonstrations("train", SFT_STEPS * 64, seed), demonstrations("test", 256, 0)
    trainer = SFTTrainer(str(start), args, train_dataset=train, eval_dataset=test)
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    return trainer.evaluate()["eval_loss"]


def grpo(row: str, lr: float, seed: int, start: Path, folder: str) -> float:
    from trl_trust.quickstart.run import last_reward, train

    _, history, _ = train("grpo", start, folder, seed=seed, max_steps=RL_STEPS, **options(row, "grpo", lr))
    return last_reward(history)


STAGES = {"sft": sft, "grpo": grpo}


def report(found: list[dict]) -> str:
    lines = []
    for stage in STAGES:
        lines += [
            "",
            f"| {stage}: optimizer | best rate | mean (seeds) | all rates: mean (number of seeds) |",
            "|---|---|---|---|",
        ]
        for row in OPTIMIZERS:
            rates: dict[float, list[float]] = {}
            for cell in sorted(found, key=lambda c: (c["lr"], c["seed"])):
                if (cell["stage"], cell["optimizer"]) == (stage, row):
                    rates.setdefault(cell["lr"], []).append(cell["figure"])
            if not rates:
                continue
            most = max(map(len, rates.values()))
            means = {lr: statistics.fmean(figures) for lr, figures in rates.items()}
            finite = {lr: mean for lr, mean in means.items() if math.isfinite(mean) and len(rates[lr]) == most}
            best = BETTER[stage](finite, key=finite.get)
            every = "; ".join(f"{lr:g}: {mean:.3f} ({len(rates[lr])})" for lr, mean in means.items())
            seeds = ", ".join(f"{figure:.3f}" for figure in rates[best])
            lines.append(f"| {row} | {best:g} | {means[best]:.3f} ({seeds}) | {every} |")
    return "\n".join(lines)


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--stages", nargs="+", default=list(STAGES), choices=list(STAGES))
    parser.add_argument("--optimizers", nargs="+", default=list(OPTIMIZERS), choices=list(OPTIMIZERS))
    parser.add_argument("--rates", nargs="+", type=float, help="instead of the grid, for all optimizers given")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--json", type=Path, default=RESULTS)
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    results = cells.load(args.json, settings={"sft_steps": SFT_STEPS, "grpo_steps": RL_STEPS})
    done = {(c["stage"], c["optimizer"], c["lr"], c["seed"]) for c in results["cells"]}
    wanted = [
        (stage, row, lr, seed)
        for seed in args.seeds
        for stage in args.stages
        for row in args.optimizers
        for lr in args.rates or OPTIMIZERS[row][2][stage]
    ]
    for stage, row, lr, seed in [] if args.report else [cell for cell in wanted if cell not in done]:
        import torch

        from trl_trust.tasks.start import cached_start

        torch.set_num_threads(1)
        with TemporaryDirectory() as folder:
            figure = STAGES[stage](row, lr, seed, cached_start("addition", seed), folder)
        cell = {"stage": stage, "optimizer": row, "lr": lr, "seed": seed, "figure": round(figure, 5)}
        results["cells"].append(cell | {"origin": cells.origin()})
        cells.save(args.json, results)
        print(f"{stage:5s} {row:35s} lr {lr:<8g} seed {seed}  {figure:.4f}", flush=True)
    print(report(results["cells"]))


if __name__ == "__main__":
    main()
