r"""Does the step control take the learning rate out of the settings? Plain against steered runs on small tasks.

    python benchmarks/step_control.py run PLAN... [--model 64x2] [--device cpu] [--jobs 1] [--budget-minutes M]
                                                      # appends to benchmarks/results/step_control.jsonl; resumes
    python benchmarks/step_control.py cost            # time of an update with and without, alternating
    python benchmarks/step_control.py report          # table, intervals and picture from that file alone

A plan is `task:shape:method:control:rate,rate:start-start`, such as `addition:4x4:grpo:kl:1e-3,1e-2:10-15`. A shape is
mini-batches a generation x passes over it. Control is `plain`, a mode of `step_control`, or `kl10` (the factor may
reach 10). A model is its width x its layers. Runs of one start share warm start, prompts and sampling seeds, so
differences are paired by start.

Stated before the runs. Claim: with one default, every steered run whose nominal rate lies at or above plain's best
rate ends within .05 of plain at that rate. Plain's best rate was fixed on starts 0 to 3, which are not used here: 1e-4
in the shape 4 x 4. Refuted where the lower 95 % bound of the paired mean difference lies below -.05. Score: pass@1 on
the held-out problems (8 samples each) after the last update.

The larger model, `--model 256x6`, has no rate fixed beforehand: plain's best is the best of those run, on the same
starts, which favors plain.
"""

import argparse
import json
import os
import platform
import random
import statistics
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from multiprocessing import TimeoutError, get_context
from pathlib import Path
from tempfile import TemporaryDirectory


RESULTS = Path(__file__).parent / "results" / "step_control.jsonl"
PICTURE = RESULTS.with_suffix(".svg")
TABLE = RESULTS.with_suffix(".md")
# plain's best rate of GRPO's term where it was fixed beforehand, on starts 0 to 3
BEST = {("64x2", "addition", "4x4"): 1e-4}
GENERATIONS = {"4x4": 30, "4x1": 100, "8x2": 30, "4x16": 15}
ROWS = 64  # responses an update, 8 a prompt
KEYS = ("task", "shape", "method", "control", "learning_rate", "start")
SMALL = "64x2"  # the tasks' own model


def plans(words):
    for word in words:
        task, shape, method, control, rates, starts = word.split(":")
        first, _, last = starts.partition("-")
        for start in range(int(first), int(last or first) + 1):
            for rate in rates.split(","):
                yield dict(zip(KEYS, (task, shape, method, control, float(rate), start), strict=True))


def settings(control: str) -> dict:
    if control == "plain":
        return {}
    return {"step_control": "kl", "step_scale_max": 10.0} if control == "kl10" else {"step_control": control}


def start_of(task: str, start: int, model: str, device: str) -> Path:
    """The warm start of this seed, built on the first call."""
    from trl_trust.tasks.start import cached_start

    if (model, device) == (SMALL, "cpu"):
        return cached_start(task, start)
    width, layers = map(int, model.split("x"))
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": width // 32}
    return cached_start(task, start, device=device, learning_rate=0.32 / width, **sizes)


def run_one(
    task,
    shape,
    method,
    control,
    learning_rate,
    start,
    model=SMALL,
    device="cpu",
    rate_times=None,
    generations=None,
    callbacks=(),
) -> dict:
    """Train once and return the row: score, curves, what the control did, CPU seconds.

    `rate_times=(update, factor)` multiplies the nominal rate from that update on, a fault.
    """
    from transformers import AutoModelForCausalLM, TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from trl_trust.policy.base import TrustGRPOTrainer
    from trl_trust.quickstart.run import TRAINING, quiet, trainer_classes
    from trl_trust.tasks import get_task

    class Fault(TrainerCallback):
        def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
            if rate_times and state.global_step == rate_times[0]:
                lr_scheduler.base_lrs = [rate * rate_times[1] for rate in lr_scheduler.base_lrs]
                for group, rate in zip(lr_scheduler.optimizer.param_groups, lr_scheduler.base_lrs, strict=True):
                    group["lr"] = group["initial_lr"] = rate

    parts, passes = map(int, shape.split("x"))
    world = get_task(task)
    with quiet(), TemporaryDirectory() as folder:
        path = start_of(task, start, model, device)
        trainer_class = TrustGRPOTrainer if method == "grpo" else trainer_classes(method)[0]
        changes = {
            "per_device_train_batch_size": ROWS,
            "steps_per_generation": parts,
            "num_iterations": passes,
            "max_steps": (generations or GENERATIONS[shape]) * parts * passes,
            "max_completion_length": world.max_completion_length,
            "learning_rate": learning_rate,
            "seed": start,
            "use_cpu": device == "cpu",
        }
        config = trainer_class.config_class(output_dir=folder, **TRAINING | changes | settings(control))
        trainer = trainer_class(
            model=str(path),
            reward_funcs=world.reward,
            args=config,
            train_dataset=world.problems("train", seed=start),
            callbacks=[Fault(), *callbacks],
        )
        trainer.remove_callback(PrinterCallback)
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
        reference = AutoModelForCausalLM.from_pretrained(path).to(device)
        metrics = world.evaluate(trainer.model, world.build_tokenizer(), world.problems("test"), reference=reference)
        history = [record for record in trainer.state.log_history if "loss" in record]
    rewards = [record["reward"] for record in history if "reward" in record]
    row = dict(zip(KEYS, (task, shape, method, control, learning_rate, start), strict=True))
    row |= {"rate_times": rate_times, "score": metrics["pass@1"], "pass@8": metrics["pass@8"]}
    row |= {"entropy": metrics["entropy"], "kl_to_start": metrics["kl"], "rewards": [round(x, 4) for x in rewards]}
    if control != "plain":
        kl = [record["trust/step_kl"] for record in history]
        rates = [record["trust/step_lr"] for record in history]
        row |= {"max_kl_after_first": max(kl[parts * passes :]), "mean_rate": sum(rates) / len(rates)}
    machine = f"{platform.machine()}, {os.cpu_count()} cores, one thread"
    if device != "cpu":
        import torch

        machine = torch.cuda.get_device_name()
    row |= {"model": model, "cpu_seconds": round(seconds, 1), "machine": machine}
    return row | {"versions": {name: version(name) for name in ("trl-trust", "trl", "transformers", "torch")}}


def read() -> list[dict]:
    rows = [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []
    return [{"model": SMALL} | row for row in rows]


def key(row: dict) -> tuple:
    return (*(row[name] for name in KEYS), row["model"], tuple(row.get("rate_times") or ()))


def job(plan: dict) -> dict:
    import torch

    torch.set_num_threads(1)
    if plan.get("only_start"):
        start_of(plan["task"], plan["start"], plan["model"], plan["device"])
        return plan
    try:
        return run_one(**plan)
    except Exception as error:  # one bad run must not cost the others
        return plan | {"error": f"{type(error).__name__}: {error}"}


def run(words, output, jobs, minutes, **settings) -> None:
    ends = time.monotonic() + 60 * minutes
    done = {key(row) for row in read()}
    todo = [row for plan in plans(words) if key(row := plan | settings) not in done]
    command = " ".join(["python", *sys.argv])
    with get_context("spawn").Pool(jobs) as pool:
        starts = {(row["task"], row["start"]): row | {"only_start": True} for row in todo}
        for _ in pool.imap_unordered(job, starts.values()):
            pass
        print(f"{len(starts)} starts, {len(todo)} runs", flush=True)
        results = pool.imap_unordered(job, todo)
        for i in range(len(todo)):
            try:
                row = results.next(timeout=max(ends - time.monotonic(), 0))
            except TimeoutError:
                print(f"out of time: {len(todo) - i} not run")
                break
            if "error" in row:
                print(f"{i + 1}/{len(todo)} {row}", flush=True)
                continue
            with output.open("a") as file:
                file.write(json.dumps(row | {"command": command}) + "\n")
            print(f"{i + 1}/{len(todo)} {[row[name] for name in KEYS]} score {row['score']:.3f}", flush=True)


def cost(rounds: int, device: str, model: str) -> None:
    """Print the time of an update under `kl` over that of one without: the median over rounds of a round's medians."""
    import torch
    from transformers import TrainerCallback

    clock = time.perf_counter if device != "cpu" else time.process_time

    class Clock(TrainerCallback):
        def on_step_begin(self, args, state, control, **kwargs):
            self.began = self.now()

        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step % 16 != 1:  # that one generates
                self.times.append(self.now() - self.began)

        def now(self):
            if device != "cpu":
                torch.cuda.synchronize()
            return clock()

    torch.set_num_threads(1)
    ratios, times = [], {}
    for _ in range(rounds):
        for control in sorted(("plain", "kl"), key=lambda _: random.random()):
            watch = Clock()
            watch.times = []
            # so small a rate that both do the same work on the same rollouts
            run_one("addition", "4x4", "grpo", control, 1e-12, 0, model, device, generations=4, callbacks=[watch])
            times[control] = statistics.median(watch.times)
        ratios.append(times["kl"] / times["plain"])
        print(
            f"{1000 * times['plain']:.2f} ms plain, {1000 * times['kl']:.2f} ms kl, ratio {ratios[-1]:.4f}", flush=True
        )
    print(f"median ratio of {rounds} rounds {statistics.median(ratios):.4f}")


def best_rate(cells, *setting) -> float | None:
    """Plain's best rate of GRPO's term: the one fixed beforehand, or else the best of those run."""
    if setting in BEST:
        return BEST[setting]
    mean = lambda runs: sum(row["score"] for row in runs.values()) / len(runs)
    plain = {cell[-1]: mean(runs) for cell, runs in cells.items() if cell[:-1] == (*setting, "grpo", "plain")}
    return max(plain, key=plain.get) if plain else None


def report() -> None:
    from matplotlib.figure import Figure

    from trl_trust.evaluation.stats import bootstrap

    rows = [row for row in read() if not row["rate_times"]]
    cells = defaultdict(dict)
    for row in rows:
        cells[tuple(row[name] for name in ("model", *KEYS[:-1]))][row["start"]] = row
    lines = [
        "| model | task | shape | term | control | nominal rate | starts | pass@1 "
        "| minus plain at its best rate | 95 % | largest K after the first generation |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    drawn = defaultdict(list)
    for cell, runs in sorted(cells.items()):
        model, task, shape, method, control, rate = cell
        scores = [runs[start]["score"] for start in sorted(runs)]
        mean = sum(scores) / len(scores)
        drawn[model, task, shape, method, control].append((rate, mean, min(scores), max(scores)))
        best = cells.get((model, task, shape, "grpo", "plain", best_rate(cells, model, task, shape)), {})
        pairs = [runs[start]["score"] - best[start]["score"] for start in sorted(set(runs) & set(best))]
        text = ["", ""]
        if len(pairs) > 2 and best is not runs:
            low, high = bootstrap(pairs)
            text = [f"{sum(pairs) / len(pairs):+.3f}", f"[{low:+.3f}, {high:+.3f}]"]
        largest = [r["max_kl_after_first"] for r in runs.values() if "max_kl_after_first" in r]
        last = f"{max(largest):.3f}" if largest else ""
        row = [model, task, shape, method, control, f"{rate:g}", str(len(scores)), f"{mean:.3f}", *text, last]
        lines.append(f"| {' | '.join(row)} |")
    TABLE.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    panels = sorted({name[:4] for name, points in drawn.items() if len(points) > 2})
    colors = {"plain": "tab:orange", "kl": "tab:blue", "kl10": "tab:green"}
    figure = Figure(figsize=(6 * len(panels), 3.8), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        for name, points in sorted(drawn.items()):
            if name[:4] == panel:
                rates, means, low, high = zip(*sorted(points), strict=True)
                label = {"plain": "plain", "kl": "step_control=kl", "kl10": "kl, factor up to 10"}.get(
                    name[4], name[4]
                )
                axes.plot(rates, means, marker="o", label=label, color=colors[name[4]])
                axes.fill_between(rates, low, high, alpha=0.15, color=colors[name[4]], linewidth=0)
        axes.set(
            xscale="log", xlabel="nominal learning rate", title=f"{panel[3]} on {panel[1]}, {panel[2]}, {panel[0]}"
        )
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("held-out pass@1 (mean and range over starts)")
    figure.savefig(PICTURE)


def main() -> int:
    parser = argparse.ArgumentParser(description="Plain and steered runs over learning rates.")
    parser.add_argument("what", choices=["run", "cost", "report"])
    parser.add_argument("plan", nargs="*")
    parser.add_argument("--rate-times", metavar="UPDATE,FACTOR", help="a fault, see run_one")
    parser.add_argument("--model", default=SMALL, help="width x layers")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--generations", type=int, help="in place of the shape's own")
    parser.add_argument("--rounds", type=int, default=7, help="of `cost`")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side")
    parser.add_argument("--budget-minutes", type=float, default=1e6, help="start nothing that would end later")
    parser.add_argument("--output", type=Path, default=RESULTS, help="file that rows are appended to")
    args = parser.parse_args()
    fault = [int(x) for x in args.rate_times.split(",")] if args.rate_times else None
    if args.what == "report":
        report()
    elif args.what == "cost":
        cost(args.rounds, args.device, args.model)
    else:
        settings = {"model": args.model, "device": args.device, "rate_times": fault, "generations": args.generations}
        run(args.plan, args.output, args.jobs, args.budget_minutes, **settings)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
