"""`trl-trust quickstart`: warm-start a tiny model, train it several ways on several seeds, compare them.

No download and no GPU. By default each generation serves 4 mini-batches 4 times over, at a learning rate ten times too
high for that: a regime chosen so that a trust region has something to do. Stock GRPO's clip does not save it there;
under step control the same term learns; and stock GRPO at its own good rate stands in the same table. `--regime stale`
is a mild one, 4 mini-batches a generation once, at a good rate.

All runs of a seed start from the same weights. Jobs run side by side, one thread each, as many as there are cores.
torch and TRL are imported after the arguments are parsed, so that `--help` and a mistyped option answer at once.
"""

import argparse
import json
import logging
import multiprocessing
import os
import statistics
import sys
import threading
import time
import warnings
from collections.abc import Callable
from concurrent.futures import FIRST_COMPLETED, Executor, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TimeElapsedColumn
from rich.table import Table

from trl_trust.methods import get_method, hosted


BASELINE = "grpo"  # stock GRPO, by the trainer that equals it to the bit and logs `trust/*`

# Fields of GRPOConfig, the same for every method; nothing here was tuned for one of them.
TRAINING = {
    "per_device_train_batch_size": 128,
    "gradient_accumulation_steps": 1,
    "steps_per_generation": 4,  # mini-batches 2 to 4 of a generation see a policy that has moved: the ratio is live
    "num_generations": 8,
    "max_completion_length": 24,
    "learning_rate": 3e-4,
    "max_steps": 400,
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

# What a regime changes in it.
REGIMES = {
    "reuse": {"per_device_train_batch_size": 64, "num_iterations": 4, "learning_rate": 1e-3, "max_steps": 384},
    "stale": {},
}
# Stock GRPO's best rate of 3e-5, 1e-4, 3e-4 and 1e-3 in the regime `reuse`, on other seeds: docs/step_control.md
OWN_RATE = 1e-4

# How the teacher of a method that needs one is made: the same model, longer at a demonstrator that hardly errs.
TEACHER = {"drop_carry": 0.0, "slip": 0.02, "steps": 600}

# What `--smoke` puts in place of the real sizes: just enough warm start for a reward now and then.
SMOKE_START = {"steps": 120}  # the teacher's too
SMOKE_TRAINING = {"per_device_train_batch_size": 32, "num_generations": 4}
SMOKE_PROBLEMS = 16

APART = 0.05  # a mean difference in pass@1 below this is not called one


@dataclass(frozen=True)
class Arm:
    """One way to train: a method, the fields it is given, and how the table calls it."""

    method: str
    label: str
    fields: dict[str, Any] = field(default_factory=dict)

    @property
    def folder(self) -> str:
        """The name of its folder, up to the seed."""
        control = self.fields.get("step_control")
        return f"{self.method}-{self.fields['learning_rate']:g}" + (f"-{control}" if control else "")


def arms(args: argparse.Namespace) -> list[Arm]:
    """What `args` ask to compare: plain GRPO, plain GRPO at its own rate where that is another, and the methods."""
    rate, control = args.learning_rate, args.step_control
    common = {"optim": args.optim, "optim_args": args.optim_args, "max_steps": args.steps}
    common |= {**REGIMES[args.regime], **common, **(SMOKE_TRAINING if args.smoke else {})}

    def arm(method: str, rate: float, control: str = "none") -> Arm:
        title = "GRPO" if method == BASELINE else get_method(method).title
        steered = {} if control == "none" else {"step_control": control}
        label = f"{title} lr={rate:g}" + (f" step_control={control}" if steered else "")
        return Arm(method, label, {**common, "learning_rate": rate, **steered})

    chosen = [arm(BASELINE, rate)]
    if args.regime == "reuse" and args.optim == "adamw_torch" and rate != OWN_RATE:
        chosen.append(arm(BASELINE, OWN_RATE))
    chosen += [arm(method, rate, control) for method in dict.fromkeys(args.method)]
    return list({one.folder: one for one in chosen}.values())


# --------------------------------------------------------------------------------------------------------------------
# One run
# --------------------------------------------------------------------------------------------------------------------


def trainer_classes(method: str) -> tuple[type, type]:
    """The trainer and config class of `method`, a name of [`METHODS`] or `"grpo"`."""
    row = import_module("trl_trust.baseline").GRPO if method == BASELINE else get_method(method)
    module = import_module(row.module)
    return getattr(module, row.trainer), getattr(module, row.config)


def overrides(method: str, teacher: Path) -> dict:
    """Config fields that `method` cannot do without, given where its teacher is. Not a place for tuning."""
    name = "" if method == BASELINE else get_method(method).teacher
    return {name: str(teacher)} if name else {}


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
    """Train `method` from `start` on the addition task, and save model and log to `output_dir`.

    Args:
        method: A name of [`METHODS`], or `"grpo"` for stock GRPO.
        start: Model folder, as [`trl_trust.quickstart.model.build_start`] writes it.
        output_dir: Where the trained model is saved.
        on_step: Called after each optimizer step with steps done, steps in all and the latest reward.
        fields: Fields of the method's config, see [`build_config`].

    Returns:
        `(model, history, times)`: the trainer's log, one dict an optimizer step; `seconds` and `cpu_seconds`, of which
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
    trainer.save_state()
    return trainer.model, [record for record in trainer.state.log_history if "loss" in record], times


def last_reward(history: list[dict], generations: int = 10) -> float:
    """Mean training reward over the last generations (rewards are logged on the steps that generate)."""
    rewards = [record["reward"] for record in history if "reward" in record][-generations:]
    return sum(rewards) / len(rewards)


def region(history: list[dict]) -> dict[str, float]:
    """What the region did: the share of tokens it cut, how far a generation moved the policy, the factor on the rate.

    `moved` is the median over generations of the largest KL(old || new) in it, in nats a token.
    """
    generations: list[list[dict]] = []
    for record in history:
        if "reward" in record:
            generations.append([])
        generations[-1].append(record)
    cut = [record["trust/cut"] for record in history if record.get("trust/cut", float("nan")) >= 0]
    found = {"moved": statistics.median(max(r["trust/kl"] for r in records) for records in generations)}
    if cut:
        found["cut"] = statistics.fmean(cut)
    if "trust/step_scale" in history[-1]:
        found["scale"] = statistics.fmean(record["trust/step_scale"] for record in history)
    return found


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


# --------------------------------------------------------------------------------------------------------------------
# Jobs: what a worker process does. `report(name, done, total, note)` tells how far it is
# --------------------------------------------------------------------------------------------------------------------

report: Callable[[str, int, int, str], None] = lambda name, done, total, note: None


def connect(queue) -> None:
    """Begin a worker process: what it reports goes into `queue`."""
    global report
    report = lambda *news: queue.put(news)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")


def make_start(name: str, folder: Path, seed: int, smoke: bool, start: Path | None = None) -> dict:
    """Warm-start a model, write it to `folder`, and return what it measures; with `start`, its teacher."""
    from .model import build_start

    options = {**(TEACHER if start else {}), **(SMOKE_START if smoke else {})}
    seed += start is not None  # a teacher is no copy of the start
    with quiet():
        build_start(folder, seed=seed, on_step=lambda done, total: report(name, done, total, ""), **options)
        return measure(folder, start or folder, smoke)


def run_arm(name: str, arm: Arm, folder: Path, start: Path, teacher: Path, seed: int, smoke: bool) -> dict:
    """Train one arm on one seed, and return what it measures and what the region did."""

    def on_step(done: int, total: int, reward: float) -> None:
        report(name, done, total, f"reward {reward:.2f}")

    with quiet():
        fields = {**arm.fields, "seed": seed, **overrides(arm.method, teacher)}
        _, history, times = train(arm.method, start, folder, on_step, **fields)
        return {"reward": last_reward(history), **measure(folder, start, smoke), **region(history), **times}


def measure(folder: Path, start: Path, smoke: bool) -> dict:
    """pass@1, pass@8, greedy, entropy and KL to the start of the model in `folder`, on held-out problems."""
    from transformers import AutoModelForCausalLM

    from .task import build_tokenizer, evaluate, problems

    model, reference = (AutoModelForCausalLM.from_pretrained(path) for path in (folder, start))
    held_out = problems("test", SMOKE_PROBLEMS if smoke else None)
    return evaluate(model, build_tokenizer(), held_out, reference=reference)


class InProcess(Executor):
    """Does each job at once, in this process."""

    def submit(self, function, /, *args, **kwargs) -> Future:
        future: Future = Future()
        future.set_result(function(*args, **kwargs))
        return future


class Stages:
    """A progress bar for each job at work; where there is no terminal to redraw, a line as each ends."""

    def __init__(self, console: Console, total: int):
        self.console = console
        columns = (
            "{task.description:<44}",
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            "{task.fields[note]}",
        )
        self.bars = Progress(*columns, console=console, disable=not console.is_terminal)
        self.tasks: dict[str, Any] = {}
        self.total, self.ended, self.began = total, 0, time.perf_counter()

    def step(self, name: str, done: int, total: int, note: str) -> None:
        """A job is so far."""
        if name not in self.tasks:
            self.tasks[name] = self.bars.add_task(name, total=total, note="")
        self.bars.update(self.tasks[name], completed=done, total=total, note=note)

    def end(self, name: str, note: str) -> None:
        """A job has ended."""
        self.ended += 1
        if name in self.tasks:
            self.bars.update(self.tasks[name], note=note)
        if self.bars.disable:
            seconds = time.perf_counter() - self.began
            text = f"[{self.ended}/{self.total}, {seconds:.0f} s] {name}: {note}"
            self.console.print(text, soft_wrap=True, markup=False, highlight=False)


def compare(args: argparse.Namespace, stages: Stages) -> dict[str, dict[int, dict]]:
    """Warm-start, train and evaluate as `args` say, save the models, and return label -> seed -> what was measured."""
    global report
    out, chosen = args.output_dir, arms(args)
    results: dict[str, dict[int, dict]] = {label: {} for label in ("start", *(arm.label for arm in chosen))}
    needs_teacher = any(overrides(arm.method, out) for arm in chosen)
    if needs_teacher:
        results = {"start": {}, "teacher": {}} | results
    queue = multiprocessing.get_context("spawn").Queue() if args.workers > 1 else None
    if queue is None:
        report, pool = stages.step, InProcess()
    else:
        threading.Thread(target=lambda: [stages.step(*news) for news in iter(queue.get, None)], daemon=True).start()
        pool = ProcessPoolExecutor(args.workers, multiprocessing.get_context("spawn"), connect, (queue,))

    waiting: dict[Future, tuple[str, str, int]] = {}

    def submit(label: str, seed: int, function, **options) -> None:
        name = f"seed {seed}: {label}"
        waiting[pool.submit(function, name, seed=seed, smoke=args.smoke, **options)] = (name, label, seed)

    def submit_arms(seed: int) -> None:
        for arm in chosen:
            places = {"start": out / f"start-seed{seed}", "teacher": out / f"teacher-seed{seed}"}
            submit(arm.label, seed, run_arm, arm=arm, folder=out / f"{arm.folder}-seed{seed}", **places)

    first = "teacher" if needs_teacher else "start"  # after which the arms of a seed may begin
    with pool:
        try:
            for seed in args.seeds:
                submit("start", seed, make_start, folder=out / f"start-seed{seed}")
            while waiting:
                for future in wait(waiting, return_when=FIRST_COMPLETED).done:
                    name, label, seed = waiting.pop(future)
                    results[label][seed] = future.result()
                    stages.end(name, f"pass@1 {results[label][seed]['pass@1']:.2f}")
                    if label == "start" and needs_teacher:
                        places = {"folder": out / f"teacher-seed{seed}", "start": out / f"start-seed{seed}"}
                        submit("teacher", seed, make_start, **places)
                    elif label == first:
                        submit_arms(seed)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    if queue is not None:
        queue.put(None)
    return {label: dict(sorted(rows.items())) for label, rows in results.items()}


# --------------------------------------------------------------------------------------------------------------------
# What is told
# --------------------------------------------------------------------------------------------------------------------


def mean(rows: dict[int, dict], name: str) -> float:
    """The mean of one number over seeds."""
    return statistics.fmean(row[name] for row in rows.values())


def results_table(results: dict[str, dict[int, dict]]) -> Table:
    """Lay out one row a setting: pass@1, its mean and each seed, pass@8, KL to the start, the share of tokens cut."""
    seeds = ", ".join(map(str, next(iter(results.values()))))
    table = Table(box=None, pad_edge=False, caption=f"held-out problems; means over seeds {seeds}")
    table.add_column("", no_wrap=True)
    for name in ("pass@1", "each seed", "pass@8", "KL to start", "tokens cut"):
        table.add_column(name, justify="right", no_wrap=name == "each seed")
    for label, rows in results.items():
        each = " ".join(f"{row['pass@1']:.2f}" for row in rows.values()) if len(rows) > 1 else ""
        cut = f"{mean(rows, 'cut'):.1%}" if all("cut" in row for row in rows.values()) else ""
        numbers = {name: f"{mean(rows, name):.3f}" for name in ("pass@1", "pass@8", "kl")}
        table.add_row(label, numbers["pass@1"], each, numbers["pass@8"], numbers["kl"], cut)
    return table


def differences(a: dict[int, dict], b: dict[int, dict]) -> list[float]:
    """pass@1 of `a` minus that of `b`, on each seed that both have."""
    return [a[seed]["pass@1"] - b[seed]["pass@1"] for seed in a if seed in b]


def told_apart(pairs: list[float]) -> bool:
    """Whether paired differences say that two settings differ: two seeds or more, one sign, and a mean that counts."""
    one_sign = min(pairs) > 0 or max(pairs) < 0
    return len(pairs) > 1 and one_sign and abs(statistics.fmean(pairs)) >= APART


def closing(results: dict[str, dict[int, dict]]) -> str:
    """What this run says, from its own numbers: what the region did, how far seeds differ, what to try next."""
    plain, *others = [label for label in results if label not in ("start", "teacher")]

    def ended(label: str) -> str:
        return f"pass@1 {mean(results[label], 'pass@1'):.2f}"

    def moved(label: str) -> str:
        return f"{mean(results[label], 'moved'):.2g} nats a token"

    def versus(label: str, other: str) -> str:
        pairs = differences(results[label], results[other])
        if len(pairs) == 1:
            return f"{pairs[0]:+.2f} against {other} on the one seed, which says little"
        verdict = "" if told_apart(pairs) else ", not told apart"
        return f"{statistics.fmean(pairs):+.2f} against {other} ({min(pairs):+.2f} to {max(pairs):+.2f}{verdict})"

    cut = [row["cut"] for row in results[plain].values() if "cut" in row]
    region_cut = f"its region cut {statistics.fmean(cut):.1%} of the tokens, and " if cut else ""
    said = [
        f"{plain}: from pass@1 {mean(results['start'], 'pass@1'):.2f} to {mean(results[plain], 'pass@1'):.2f}; "
        f"{region_cut}a generation moved the policy by {moved(plain)}."
    ]
    own = next((label for label in others if label.startswith("GRPO") and "step_control" not in label), None)
    for label in others:
        against = [plain] if own in (None, label) else [plain, own]
        said.append(f"{label}: {ended(label)}, {moved(label)}; {'; '.join(versus(label, x) for x in against)}.")
    separates = [label for label in others if told_apart(differences(results[label], results[plain]))]
    if len(results["start"]) > 1:
        scores = [[row["pass@1"] for row in results[label].values()] for label in (plain, *others)]
        said.append(f"Seeds of one setting lie up to {max(max(x) - min(x) for x in scores):.2f} apart.")
    if others and not separates:
        said.append("Nothing separates these settings here: try more --seeds, a higher --learning-rate, or --steps.")
    elif any("step_control" in label for label in separates):
        said.append(
            "Try next: `step_control: kl` in a run of yours that reuses rollouts, at five to thirty times your rate."
        )
    else:
        said.append(
            "Try next: --regime reuse, where a region has more to do, or `trl-trust plot` on runs of your own."
        )
    return "\n".join(said)


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """Parse the command line. Imports nothing heavy."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    parser = argparse.ArgumentParser(
        prog="trl-trust quickstart",
        description="Train a tiny model to add, several ways on several seeds, and compare them: stock GRPO at a rate "
        "ten times too high, under step control, and at its own rate. No download, no GPU; about three minutes on two "
        "cores.",
    )
    names = [BASELINE, *(m.name for m in hosted("grpo"))]
    parser.add_argument(
        "--task",
        choices=["addition"],
        default="addition",
        help="as the first word, `--task flow` runs another: GRPO for a flow model, see `--task flow --help`",
    )
    parser.add_argument(
        "--method",
        nargs="+",
        choices=names,
        metavar="NAME",
        help=f"what to compare with plain GRPO: {', '.join(names)}; several may be given (default: grpo, under step "
        "control; with --regime stale, dispo)",
    )
    parser.add_argument(
        "--regime",
        choices=list(REGIMES),
        default="reuse",
        help="reuse: 4 mini-batches a generation, 4 times over, at a rate ten times too high; stale: 4 mini-batches "
        "once, at a good rate (default: reuse)",
    )
    parser.add_argument(
        "--step-control",
        choices=["kl", "ess", "none"],
        help="of the methods, not of the baseline (default: kl; with --regime stale, none)",
    )
    parser.add_argument("--steps", type=int, help="optimizer steps of each run (default: 384; stale: 400)")
    parser.add_argument(
        "--seeds",
        "--seed",
        type=int,
        nargs="+",
        default=list(range(3 if cores > 1 else 1)),
        help="seeds; same seed, same bits (default: 0 1 2, on one core 0)",
    )
    parser.add_argument(
        "--workers", type=int, default=cores, help="runs side by side (default: the cores, %(default)s)"
    )
    parser.add_argument(
        "--output-dir",
        type=Path,
        default=Path("quickstart-output"),
        help="where models, logs and curves are saved (default: quickstart-output)",
    )
    parser.add_argument("--optim", default="adamw_torch", help="optimizer of all runs (default: adamw_torch)")
    parser.add_argument("--optim-args", help="options of that optimizer, as TRL takes them: name=value,name=value")
    parser.add_argument("--learning-rate", type=float, help="of all runs (default: 1e-3; stale: 3e-4)")
    parser.add_argument("--smoke", action="store_true", help="toy sizes: every stage runs, little is learnt")
    args = parser.parse_args(argv)
    defaults = {**TRAINING, **REGIMES[args.regime]}
    args.steps = defaults["max_steps"] if args.steps is None else args.steps
    args.learning_rate = defaults["learning_rate"] if args.learning_rate is None else args.learning_rate
    args.step_control = args.step_control or ("kl" if args.regime == "reuse" else "none")
    args.method = args.method or ["dispo" if args.regime == "stale" else BASELINE]
    args.seeds = list(dict.fromkeys(args.seeds))
    for name in ("steps", "workers"):
        if getattr(args, name) < 1:
            parser.error(f"--{name}={getattr(args, name)} must be at least 1")
    return args


def split_task(word: str) -> list[str]:
    """`--task=flow` as two words."""
    return word.split("=", 1) if word.startswith("--task=") else [word]


def main(argv: list[str] | None = None) -> int:
    """Run the quickstart with command-line arguments `argv` and return the exit status."""
    words = [part for word in (sys.argv[1:] if argv is None else argv) for part in split_task(word)]
    if words[:2] == ["--task", "flow"]:
        return import_module("trl_trust.flow.quickstart").main(words[2:])
    args = parse(argv)
    os.environ.setdefault("HF_HUB_OFFLINE", "1")  # nothing is looked up, so nothing can time out
    console, chosen = Console(), arms(args)
    with console.status("Loading torch and TRL") if console.is_terminal else nullcontext():
        import trl_trust.baseline
        import trl_trust.optim  # noqa: F401  makes this package's optimizers known by name

    try:
        with quiet():
            for arm in chosen:  # say what is wrong before the work starts, in one line
                build_config(arm.method, args.output_dir / arm.folder, **arm.fields)
    except ValueError as error:
        print(f"trl-trust quickstart: {error}", file=sys.stderr)
        return 2
    jobs = len(args.seeds) * (1 + len(chosen) + any(overrides(arm.method, Path()) for arm in chosen))
    args.workers = min(args.workers, jobs)
    shape = "4 mini-batches a generation" + (", 4 times over" if args.regime == "reuse" else "")
    console.print(f"{len(chosen)} settings x seeds {args.seeds}; {shape}; {jobs} jobs, {args.workers} at a time")
    args.output_dir.mkdir(parents=True, exist_ok=True)
    stages = Stages(console, jobs)
    try:
        with stages.bars:
            results = compare(args, stages)
    except KeyboardInterrupt:
        print("trl-trust quickstart: stopped", file=sys.stderr)
        return 130
    tell(args, chosen, results, console)
    return 0


def tell(args: argparse.Namespace, chosen: list[Arm], results: dict[str, dict[int, dict]], console: Console) -> None:
    """Print table and closing words, and write `metrics.json` and the curves."""
    from importlib.metadata import version

    from trl_trust.plot import draw, read_run

    metrics = args.output_dir / "metrics.json"
    contents = {
        "regime": args.regime,
        "seeds": args.seeds,
        "training": {arm.label: {**TRAINING, **arm.fields} for arm in chosen},
        "versions": {name: version(name) for name in ("trl-trust", "trl", "transformers", "torch")},
        "results": results,
        "closing": closing(results),
    }
    metrics.write_text(json.dumps(contents, indent=1) + "\n")
    curves = [args.output_dir / "curves.png", args.output_dir / "curves.svg"]
    groups = {
        arm.label: [read_run(args.output_dir / f"{arm.folder}-seed{seed}").history for seed in args.seeds]
        for arm in chosen
    }
    try:
        draw(groups, curves)
        drawn = f"{curves[0]}, {curves[1].name}"
    except ImportError as error:
        drawn = f"not drawn: {error}"
    console.print(results_table(results))
    console.print(closing(results), highlight=False)
    for name, text in {"models": args.output_dir, "metrics": metrics, "curves": drawn}.items():
        console.print(f"{name:<8} {text}", soft_wrap=True, markup=False, highlight=False)


if __name__ == "__main__":
    raise SystemExit(main())
