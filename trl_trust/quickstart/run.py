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
import sys
import time
import warnings
from collections.abc import Callable
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from trl_trust.methods import get_method, hosted


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

# How the teacher of a method that needs one is made: the same model, longer at a demonstrator that hardly errs.
TEACHER = {"drop_carry": 0.0, "slip": 0.02, "steps": 600}

# What `--smoke` puts in place of the real sizes: just enough warm start for a reward now and then.
SMOKE_START = {"steps": 120}  # the teacher's too
SMOKE_TRAINING = {"per_device_train_batch_size": 32, "num_generations": 4}
SMOKE_PROBLEMS = 16


def trainer_classes(method: str) -> tuple[type, type]:
    """Return the trainer and config class of `method`, a name of [`METHODS`] or `"grpo"` for the stock ones."""
    if method == BASELINE:
        from trl import GRPOConfig, GRPOTrainer

        return GRPOTrainer, GRPOConfig
    row = get_method(method)
    module = import_module(row.module)
    return getattr(module, row.trainer), getattr(module, row.config)


def overrides(method: str, teacher: Path) -> dict:
    """Config fields that `method` cannot do without, given where its teacher is. Not a place for tuning."""
    field = "" if method == BASELINE else get_method(method).teacher
    return {field: str(teacher)} if field else {}


def build_config(method: str, output_dir: str | os.PathLike, **fields):
    """Return the config of `method` with [`TRAINING`] and, over it, `fields`."""
    _, config_class = trainer_classes(method)
    return config_class(output_dir=str(output_dir), **{**TRAINING, **fields})


def train(
    method: str,
    start: str | os.PathLike,
    output_dir: str | os.PathLike,
    on_step: Callable[[int, int, float], None] = lambda done, total, reward: None,
    **fields,
):
    """Train `method` from `start` on the addition task and save the model to `output_dir`.

    Args:
        method: A name of [`METHODS`], or `"grpo"` for stock GRPO.
        start: Model folder, as [`trl_trust.quickstart.model.build_start`] writes it.
        output_dir: Where the trained model is saved.
        on_step: Called after each optimiser step with steps done, steps in all and the latest reward.
        fields: Fields of the method's config, see [`build_config`].

    Returns:
        `(model, history, times)`: the trainer's log, one dict an optimiser step; `seconds` and `cpu_seconds`, of which
        the second hardly depends on what else the machine is doing.
    """
    from transformers import TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from .task import exact_answer_reward, problems

    class Report(TrainerCallback):
        reward = 0.0

        def on_log(self, args, state, control, logs, **kwargs):
            if "loss" in logs:  # the summary at the end has none
                self.reward = logs.get("reward", self.reward)
                on_step(state.global_step, state.max_steps, self.reward)

    config = build_config(method, output_dir, **fields)
    trainer_class, _ = trainer_classes(method)
    trainer = trainer_class(
        model=str(start),
        reward_funcs=exact_answer_reward,
        args=config,
        train_dataset=problems("train", seed=config.seed),
        callbacks=[Report()],
    )
    trainer.remove_callback(PrinterCallback)
    began, cpu_began = time.perf_counter(), time.process_time()
    trainer.train()
    times = {"seconds": time.perf_counter() - began, "cpu_seconds": time.process_time() - cpu_began}
    trainer.save_model()
    return trainer.model, [record for record in trainer.state.log_history if "loss" in record], times


def last_reward(history: list[dict], generations: int = 10) -> float:
    """Mean training reward over the last generations (rewards are logged on the steps that generate)."""
    rewards = [record["reward"] for record in history if "reward" in record][-generations:]
    return sum(rewards) / len(rewards)


def results_table(results: dict[str, dict]) -> Table:
    """Lay out one row a run: reward, pass@1, pass@8, greedy, entropy, KL to the start, seconds."""
    table = Table(caption="reward: last 10 generations of training; the rest: held-out problems")
    table.add_column("")
    columns = ["reward", "pass@1", "pass@8", "greedy", "entropy", "kl", "seconds"]
    for name in columns:
        table.add_column("KL to start" if name == "kl" else name, justify="right")
    for name, row in results.items():
        cells = ["-" if c not in row else f"{row[c]:.0f}" if c == "seconds" else f"{row[c]:.3f}" for c in columns]
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
    """Use one thread, and keep libraries from writing between our lines; both as before afterwards.

    One thread, so that sums come in one order (same seed, same bits), and because a model of this size loses by two:
    on a busy machine of two cores a run took ten times as long.
    """
    import datasets
    import torch
    import transformers

    threads = torch.get_num_threads()
    model_bars, dataset_bars = transformers.logging.is_progress_bar_enabled(), datasets.are_progress_bars_disabled()
    torch.set_num_threads(1)
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
        if model_bars:
            transformers.logging.enable_progress_bar()
        if not dataset_bars:
            datasets.enable_progress_bars()


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Imports nothing heavy."""
    parser = argparse.ArgumentParser(
        prog="trl-trust quickstart",
        description="Train a tiny model to add, with stock GRPO and with a method of this package, and compare them. "
        "No download, no GPU, two to three minutes.",
    )
    names = [BASELINE, *(m.name for m in hosted("grpo"))]
    parser.add_argument(
        "--method",
        nargs="+",
        choices=names,
        default=["dispo"],
        metavar="NAME",
        help=f"what to compare with stock GRPO: {', '.join(names)}; several may be given; `grpo` alone runs only the "
        "baseline (default: dispo)",
    )
    parser.add_argument("--steps", type=int, default=400, help="optimiser steps of each run (default: 400)")
    parser.add_argument("--seed", type=int, default=0, help="seed of everything; same seed, same bits (default: 0)")
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("quickstart-output"),
        help="where models, metrics and curves are saved (default: quickstart-output)",
    )
    parser.add_argument("--optim", default="adamw_torch", help="optimizer of both runs (default: adamw_torch)")
    parser.add_argument("--optim-args", help="options of that optimizer, as TRL takes them: name=value,name=value")
    parser.add_argument(
        "--learning-rate", type=float, default=TRAINING["learning_rate"], help="of both runs (default: %(default)s)"
    )
    parser.add_argument("--smoke", action="store_true", help="toy sizes: every stage runs, little is learnt")
    args = parser.parse_args(argv)
    if args.steps < 1:
        parser.error(f"--steps={args.steps} must be at least 1")
    return args


class Stages:
    """One progress bar a stage; where there is no terminal to redraw, a line each quarter of a stage instead."""

    def __init__(self, console: Console):
        self.console = console
        columns = (
            "{task.description:<10}",
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            "{task.fields[note]}",
        )
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal)

    def start(self, name: str, total: int | None = None, note: str = "") -> None:
        self.name, self.task = name, self.bars.add_task(name, total=total, note=note)

    def step(self, done: int, total: int, note: str | None = None) -> None:
        self.bars.update(self.task, completed=done, total=total, **({} if note is None else {"note": note}))
        if self.bars.disable and done % -(-total // 4) == 0:
            self.say(f"step {done} of {total}{f', {note}' if note else ''}")

    def finish(self, note: str) -> None:
        self.bars.update(self.task, note=note)
        if self.bars.disable:
            self.say(note)

    def say(self, text: str) -> None:
        self.console.print(f"{self.name}: {text}", soft_wrap=True, highlight=False)


def compare(args: argparse.Namespace, stages: Stages) -> dict:
    """Warm-start, train and evaluate as `args` say, save the models, and return what goes into `metrics.json`."""
    from importlib.metadata import version

    from transformers import AutoModelForCausalLM

    from .model import build_start
    from .task import build_tokenizer, evaluate, problems

    methods, fields = runs(args)
    tokenizer = build_tokenizer()
    held_out = problems("test", SMOKE_PROBLEMS if args.smoke else None)
    results, histories = {}, {}

    stages.start("warm start")
    start = build_start(
        args.output_dir / "start", seed=args.seed, on_step=stages.step, **(SMOKE_START if args.smoke else {})
    )
    reference = AutoModelForCausalLM.from_pretrained(start)
    results["start"] = evaluate(reference, tokenizer, held_out, reference=reference)
    stages.finish(f"pass@1 {results['start']['pass@1']:.2f}")

    teacher = args.output_dir / "teacher"
    if any(overrides(method, teacher) for method in methods):
        stages.start("teacher")
        options = {**TEACHER, **(SMOKE_START if args.smoke else {})}
        build_start(teacher, seed=args.seed + 1, on_step=stages.step, **options)
        model = AutoModelForCausalLM.from_pretrained(teacher)
        results["teacher"] = evaluate(model, tokenizer, held_out, reference=reference)
        stages.finish(f"pass@1 {results['teacher']['pass@1']:.2f}")

    for method in methods:
        stages.start(method, total=args.steps)
        model, history, times = train(
            method,
            start,
            args.output_dir / method,
            on_step=lambda done, total, reward: stages.step(done, total, f"reward {reward:.2f}"),
            **fields,
            **overrides(method, teacher),
        )
        metrics = evaluate(model, tokenizer, held_out, reference=reference)
        stages.finish(f"pass@1 {metrics['pass@1']:.2f}")
        results[method] = {"reward": last_reward(history), **metrics, **times}
        histories[method] = history

    return {
        "seed": args.seed,
        "training": {**TRAINING, **fields},
        "versions": {name: version(name) for name in ("trl-trust", "trl", "transformers", "torch")},
        "results": results,
        "history": histories,
    }


def runs(args: argparse.Namespace) -> tuple[list[str], dict]:
    """Return the methods to train, the baseline first, and the config fields that `args` give all of them."""
    fields = {
        "max_steps": args.steps,
        "learning_rate": args.learning_rate,
        "optim": args.optim,
        "optim_args": args.optim_args,
        "seed": args.seed,
        **(SMOKE_TRAINING if args.smoke else {}),
    }
    return list(dict.fromkeys([BASELINE, *args.method])), fields


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart with command-line arguments `argv` and return the exit status."""
    args = parse(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up, so nothing can time out
    console = Console()
    with console.status("Loading torch and TRL"):
        from trl import GRPOTrainer  # noqa: F401  slow to import, so do it under the spinner

        import trl_trust.optim  # noqa: F401  makes this package's optimizers known by name

    with quiet():
        methods, fields = runs(args)
        try:
            for method in methods:
                build_config(method, args.output_dir / method, **fields)
        except ValueError as error:  # say so before the work starts, in one line
            print(f"trl-trust quickstart: {error}", file=sys.stderr)
            return 2
        args.output_dir.mkdir(parents=True, exist_ok=True)
        stages = Stages(console)
        with stages.bars:
            report = compare(args, stages)

    console.print(results_table(report["results"]))
    curves, metrics = args.output_dir / "curves.png", args.output_dir / "metrics.json"
    metrics.write_text(json.dumps(report, indent=1) + "\n")
    plotted = plot_curves(report["history"], curves)
    for label, text in {
        "models": ", ".join(str(args.output_dir / name) for name in report["results"]),
        "metrics": metrics,
        "curves": curves if plotted else "not drawn, since matplotlib is not installed: pip install trl-trust[plot]",
    }.items():
        console.print(f"{label:<8} {text}", soft_wrap=True, markup=False, highlight=False)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
