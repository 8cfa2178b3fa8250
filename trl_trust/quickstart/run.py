"""`trl-trust quickstart`: warm-start a tiny model, train it with stock GRPO and a method of this package, compare.

No download and no GPU. Both runs start from the same weights and share every setting; only the trainer differs. They
run where a trust region has something to do: four mini-batches are taken from each generation, so that the ratio of
new to old policy is not identically 1.

torch and TRL are imported after the arguments are parsed, so that `--help` and a mistyped option answer at once.
"""

import argparse
import json
import logging
import os
import time
import warnings
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from trl_trust.methods import METHODS, get_method


BASELINE = "grpo"  # stock trl.GRPOTrainer

# Fields of GRPOConfig, the same for every method; nothing here was tuned for one of them.
TRAINING = {
    "per_device_train_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 4,  # mini-batches 2 to 4 of a generation see a policy that has moved: the ratio is live
    "num_generations": 8,
    "max_completion_length": 24,
    "learning_rate": 3e-4,
    "lr_scheduler_type": "constant_with_warmup",
    "warmup_steps": 5,
    "use_cpu": True,
    "bf16": False,  # about half the speed of float32 on a CPU
    "gradient_checkpointing": False,  # nothing to save on a model of this size
    "logging_steps": 1,
    "save_strategy": "no",
    "report_to": "none",
    "disable_tqdm": True,
}

# Fields that one method cannot do without (a teacher, say). Not a place for tuning.
OVERRIDES: dict[str, dict] = {}

# What `--smoke` puts in place of the real sizes: every stage runs, nothing is learnt.
SMOKE_START = {"hidden_size": 16, "num_hidden_layers": 1, "steps": 20, "batch_size": 16}
SMOKE_TRAINING = {"per_device_train_batch_size": 8, "num_generations": 4}
SMOKE_PROBLEMS = 8


def trainer_classes(method: str) -> tuple[type, type]:
    """Return the trainer and config class of `method`, a name of [`METHODS`] or `"grpo"` for the stock ones."""
    if method == BASELINE:
        from trl import GRPOConfig, GRPOTrainer

        return GRPOTrainer, GRPOConfig
    row = get_method(method)
    module = import_module(row.module)
    return getattr(module, row.trainer), getattr(module, row.config)


def build_trainer(method: str, start: str | os.PathLike, output_dir: str | os.PathLike, **fields):
    """Return the trainer of `method` on the addition task.

    Args:
        method: A name of [`METHODS`], or `"grpo"`.
        start: Model folder, as [`build_start`] writes it.
        output_dir: Where the trainer may write.
        fields: Fields of the method's config, over [`TRAINING`] and [`OVERRIDES`]. `max_steps` is required.
    """
    from transformers.trainer_callback import PrinterCallback

    from .task import exact_answer_reward, problems

    trainer_class, config_class = trainer_classes(method)
    config = config_class(output_dir=str(output_dir), **{**TRAINING, **OVERRIDES.get(method, {}), **fields})
    trainer = trainer_class(
        model=str(start),
        reward_funcs=exact_answer_reward,
        args=config,
        train_dataset=problems("train", seed=config.seed),
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def train(method: str, start: str | os.PathLike, output_dir: str | os.PathLike, on_step=None, **fields):
    """Train `method` from `start`, save the model to `output_dir`, return it with its log and the seconds taken.

    Args:
        method: A name of [`METHODS`], or `"grpo"`.
        start: Model folder, as [`build_start`] writes it.
        output_dir: Where the trained model is saved.
        on_step: Called after each optimiser step with steps done, steps in all and the latest reward.
        fields: See [`build_trainer`].

    Returns:
        `(model, history, seconds)`; `history` is the trainer's log, one dict an optimiser step.
    """
    from transformers import TrainerCallback

    class Report(TrainerCallback):
        reward = 0.0

        def on_log(self, args, state, control, logs=None, **kwargs):
            self.reward = logs.get("reward", self.reward)
            if on_step is not None and state.global_step <= state.max_steps:
                on_step(state.global_step, state.max_steps, self.reward)

    trainer = build_trainer(method, start, output_dir, **fields)
    trainer.add_callback(Report())
    began = time.perf_counter()
    trainer.train()
    seconds = time.perf_counter() - began
    trainer.save_model()
    return trainer.model, [r for r in trainer.state.log_history if "loss" in r], seconds


def last_reward(history: list[dict], generations: int = 10) -> float:
    """Mean training reward over the last generations (rewards are logged on the steps that generate)."""
    rewards = [record["reward"] for record in history if "reward" in record][-generations:]
    return sum(rewards) / len(rewards)


def results_table(results: dict[str, dict], samples: int) -> Table:
    """Lay out one row a run: reward, pass@1, pass@k, entropy, KL to the start, seconds."""
    table = Table(caption="reward: last 10 generations of training. The rest: 256 held-out problems.")
    table.add_column("")
    columns = ["reward", "pass@1", f"pass@{samples}", "greedy", "entropy", "kl", "seconds"]
    for name in columns:
        table.add_column("KL to start" if name == "kl" else name, justify="right")
    for name, row in results.items():
        cells = [
            "-" if row.get(c) is None else f"{row[c]:.0f}" if c == "seconds" else f"{row[c]:.3f}" for c in columns
        ]
        table.add_row(name, *cells)
    return table


def plot_curves(histories: dict[str, list[dict]], path: Path) -> bool:
    """Plot reward and entropy over optimiser steps to `path`; False if matplotlib is not installed."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        return False
    figure = Figure(figsize=(9, 3.5), layout="constrained")
    for axes, key in zip(figure.subplots(1, 2), ("reward", "entropy"), strict=True):
        for name, history in histories.items():
            points = [(record["step"], record[key]) for record in history if key in record]
            axes.plot(*zip(*points, strict=True), label=name)
        axes.set(xlabel="optimiser step", title=f"{key} in training")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.savefig(path, dpi=150)
    return True


@contextmanager
def quiet():
    """Keep libraries from writing between our lines, and use one thread; both as before afterwards.

    One thread, because a model of this size gains nothing from two, and sums then come in one order: same seed, same
    bits.
    """
    import datasets
    import torch
    import transformers

    threads, verbosity, bars = (
        torch.get_num_threads(),
        transformers.logging.get_verbosity(),
        transformers.logging.is_progress_bar_enabled(),
    )
    dataset_bars = datasets.are_progress_bars_disabled()
    torch.set_num_threads(1)
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    datasets.disable_progress_bars()
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(logging.NOTSET)
        torch.set_num_threads(threads)
        transformers.logging.set_verbosity(verbosity)
        if bars:
            transformers.logging.enable_progress_bar()
        if not dataset_bars:
            datasets.enable_progress_bars()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="trl-trust quickstart",
        description="Train a tiny model to add, with stock GRPO and with a method of this package, and compare them. "
        "No download, no GPU, about two minutes.",
    )
    names = [BASELINE, *(m.name for m in METHODS)]
    parser.add_argument(
        "--method",
        nargs="+",
        choices=names,
        default=["dispo"],
        metavar="NAME",
        help=f"what to compare with stock GRPO: {', '.join(names)}; several may be given; `grpo` alone runs only the "
        "baseline (default: dispo)",
    )
    parser.add_argument("--steps", type=int, default=320, help="optimiser steps of each run (default: 320)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything; same seed, same bits (default: 0)")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("quickstart-output"),
        help="where models, metrics and curves are saved (default: quickstart-output)",
    )
    parser.add_argument("--optim", default="adamw_torch", help="optimizer of both runs (default: adamw_torch)")
    parser.add_argument(
        "--learning-rate", type=float, default=TRAINING["learning_rate"], help="of both runs (default: %(default)s)"
    )
    parser.add_argument(
        "--smoke", action="store_true", help="toy sizes: everything runs in seconds, nothing is learnt"
    )
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps={args.steps} must be at least 1")
    return args


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart with command-line arguments `argv` and return the exit status."""
    args = parse(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up, so nothing can time out
    console = Console()
    with console.status("Loading torch and TRL"):
        from trl import GRPOTrainer  # noqa: F401  slow to import, so do it under the spinner
    with quiet():
        _run(args, console)
    return 0


def _run(args: argparse.Namespace, console: Console) -> None:
    from importlib.metadata import version

    from transformers import AutoModelForCausalLM

    from .model import build_start
    from .task import build_tokenizer, evaluate, problems

    methods = list(dict.fromkeys([BASELINE, *args.method]))
    fields = {
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "optim": args.optim,
        "seed": args.seed,
        **(SMOKE_TRAINING if args.smoke else {}),
    }
    held_out = problems("test", SMOKE_PROBLEMS if args.smoke else None)
    samples = 8
    tokenizer = build_tokenizer()
    folder = args.output_dir
    folder.mkdir(parents=True, exist_ok=True)
    results, histories = {}, {}

    progress = Progress(
        TextColumn("{task.description:<12}"),
        BarColumn(),
        MofNCompleteColumn(),
        TimeElapsedColumn(),
        TextColumn("{task.fields[note]}"),
        console=console,
    )
    with progress:
        bar = progress.add_task("warm start", total=None, note="imitating a careless demonstrator")
        start = build_start(
            folder / "start",
            seed=args.seed,
            on_step=lambda done, total: progress.update(bar, completed=done, total=total),
            **(SMOKE_START if args.smoke else {}),
        )
        reference = AutoModelForCausalLM.from_pretrained(start)
        results["start"] = evaluate(reference, tokenizer, held_out, samples=samples, reference=reference)
        progress.update(bar, note=f"pass@1 {results['start']['pass@1']:.2f}")

        for method in methods:
            bar = progress.add_task(method, total=args.steps, note="")

            def on_step(done, total, reward, bar=bar):
                progress.update(bar, completed=done, note=f"reward {reward:.2f}")

            model, history, seconds = train(method, start, folder / method, on_step, **fields)
            metrics = evaluate(model, tokenizer, held_out, samples=samples, reference=reference)
            results[method] = {"reward": last_reward(history), **metrics, "seconds": seconds}
            histories[method] = history
            progress.update(bar, note=f"pass@1 {metrics['pass@1']:.2f}")

    console.print(results_table(results, samples))
    curves, metrics_file = folder / "curves.png", folder / "metrics.json"
    plotted = plot_curves(histories, curves)
    report = {
        "seed": args.seed,
        "training": {**TRAINING, **fields},
        "versions": {name: version(name) for name in ("trl-trust", "trl", "transformers", "torch")},
        "results": results,
        "history": histories,
    }
    metrics_file.write_text(json.dumps(report, indent=1) + "\n")
    console.print(f"Models   {', '.join(str(folder / name) for name in ['start', *methods])}", soft_wrap=True)
    console.print(f"Metrics  {metrics_file}", soft_wrap=True)
    console.print(f"Curves   {curves if plotted else 'not drawn: pip install matplotlib'}", soft_wrap=True)


if __name__ == "__main__":
    raise SystemExit(main())
