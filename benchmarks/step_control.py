r"""Does the step control take the learning rate out of the settings? Plain against steered runs on small tasks.

    python benchmarks/step_control.py run PLAN...     # appends to benchmarks/results/step_control.jsonl; resumes
    python benchmarks/step_control.py report          # table, intervals and picture from that file alone

A plan is `task:shape:method:control:rate,rate:start-start`, such as `addition:4x4:grpo:kl:1e-3,1e-2:10-15`. A shape is
mini-batches a generation x passes over it. Control is `plain`, a mode of `step_control`, or `kl10` (the factor may
reach 10). Runs of one start share warm start, prompts and sampling seeds, so differences are paired by start.

Stated before the runs. Claim: with one default, every steered run whose nominal rate lies at or above plain's best
rate ends within .05 of plain at that rate. Plain's best rate was fixed on starts 0 to 3, which are not used here: 1e-4
in the shape 4 x 4. Refuted where the lower 95 % bound of the paired mean difference lies below -.05. Score: pass@1 on
the held-out problems (8 samples each) after the last update.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections import defaultdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory


RESULTS = Path(__file__).parent / "results" / "step_control.jsonl"
PICTURE = RESULTS.with_suffix(".svg")
TABLE = RESULTS.with_suffix(".md")
BEST = {("addition", "4x4"): 1e-4}  # plain's best rate of GRPO's term, fixed on starts 0 to 3
GENERATIONS = {"4x4": 30, "4x1": 100, "8x2": 30, "4x16": 15}
ROWS = 64  # responses an update, 8 a prompt
KEYS = ("task", "shape", "method", "control", "learning_rate", "start")


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


def run_one(task, shape, method, control, learning_rate, start, rate_times=None) -> dict:
    """Train once and return the row: score, curves, what the control did, CPU seconds.

    `rate_times=(update, factor)` multiplies the nominal rate from that update on, a fault.
    """
    from transformers import AutoModelForCausalLM, TrainerCallback
    from transformers.trainer_callback import PrinterCallback

    from trl_trust.policy.base import TrustGRPOTrainer
    from trl_trust.quickstart.run import TRAINING, quiet, trainer_classes
    from trl_trust.tasks import get_task
    from trl_trust.tasks.start import cached_start

    class Fault(TrainerCallback):
        def on_step_begin(self, args, state, control, lr_scheduler=None, **kwargs):
            if rate_times and state.global_step == rate_times[0]:
                lr_scheduler.base_lrs = [rate * rate_times[1] for rate in lr_scheduler.base_lrs]
                for group, rate in zip(lr_scheduler.optimizer.param_groups, lr_scheduler.base_lrs, strict=True):
                    group["lr"] = group["initial_lr"] = rate

    parts, passes = map(int, shape.split("x"))
    world = get_task(task)
    with quiet(), TemporaryDirectory() as folder:
        path = cached_start(task, start)
        trainer_class = TrustGRPOTrainer if method == "grpo" else trainer_classes(method)[0]
        changes = {
            "per_device_train_batch_size": ROWS,
            "steps_per_generation": parts,
            "num_iterations": passes,
            "max_steps": GENERATIONS[shape] * parts * passes,
            "max_completion_length": world.max_completion_length,
            "learning_rate": learning_rate,
            "seed": start,
        }
        config = trainer_class.config_class(output_dir=folder, **TRAINING | changes | settings(control))
        trainer = trainer_class(
            model=str(path),
            reward_funcs=world.reward,
            args=config,
            train_dataset=world.problems("train", seed=start),
            callbacks=[Fault()],
        )
        trainer.remove_callback(PrinterCallback)
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
        reference = AutoModelForCausalLM.from_pretrained(path)
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
    row |= {"cpu_seconds": round(seconds, 1), "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread"}
    return row | {"versions": {name: version(name) for name in ("trl-trust", "trl", "transformers", "torch")}}


def read() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def key(row: dict) -> tuple:
    return (*(row[name] for name in KEYS), tuple(row.get("rate_times") or ()))


def run(words, rate_times) -> None:
    done = {key(row) for row in read()}
    todo = [plan for plan in plans(words) if key(plan | {"rate_times": rate_times}) not in done]
    for i, plan in enumerate(todo):
        row = run_one(**plan, rate_times=rate_times) | {"command": " ".join(["python", *sys.argv])}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{i + 1}/{len(todo)} {plan} score {row['score']:.3f}", flush=True)


def report() -> None:
    from matplotlib.figure import Figure

    from trl_trust.evaluation.stats import bootstrap

    rows = [row for row in read() if not row["rate_times"]]
    cells = defaultdict(dict)
    for row in rows:
        cells[tuple(row[name] for name in KEYS[:-1])][row["start"]] = row
    lines = [
        "| task | shape | term | control | nominal rate | starts | pass@1 | minus plain at its best rate | 95 % | "
        "largest K after the first generation |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    drawn = defaultdict(list)
    for cell, runs in sorted(cells.items()):
        task, shape, method, control, rate = cell
        scores = [runs[start]["score"] for start in sorted(runs)]
        mean = sum(scores) / len(scores)
        drawn[task, shape, method, control].append((rate, mean, min(scores), max(scores)))
        best = cells.get((task, shape, "grpo", "plain", BEST.get((task, shape))), {})
        pairs = [runs[start]["score"] - best[start]["score"] for start in sorted(set(runs) & set(best))]
        text = ["", ""]
        if len(pairs) > 2 and best is not runs:
            low, high = bootstrap(pairs)
            text = [f"{sum(pairs) / len(pairs):+.3f}", f"[{low:+.3f}, {high:+.3f}]"]
        largest = [r["max_kl_after_first"] for r in runs.values() if "max_kl_after_first" in r]
        last = f"{max(largest):.3f}" if largest else ""
        row = [task, shape, method, control, f"{rate:g}", str(len(scores)), f"{mean:.3f}", *text, last]
        lines.append(f"| {' | '.join(row)} |")
    TABLE.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    panels = sorted({name[:3] for name, points in drawn.items() if len(points) > 2})
    colors = {"plain": "tab:orange", "kl": "tab:blue", "kl10": "tab:green"}
    figure = Figure(figsize=(6 * len(panels), 3.8), layout="constrained")
    for axes, panel in zip(figure.subplots(1, len(panels), squeeze=False, sharey=True)[0], panels, strict=True):
        for name, points in sorted(drawn.items()):
            if name[:3] == panel:
                rates, means, low, high = zip(*sorted(points), strict=True)
                label = {"plain": "plain", "kl": "step_control=kl", "kl10": "kl, factor up to 10"}.get(
                    name[3], name[3]
                )
                axes.plot(rates, means, marker="o", label=label, color=colors[name[3]])
                axes.fill_between(rates, low, high, alpha=0.15, color=colors[name[3]], linewidth=0)
        axes.set(xscale="log", xlabel="nominal learning rate", title=f"{panel[2]} on {panel[0]}, {panel[1]}")
        axes.grid(alpha=0.3)
        axes.legend()
    figure.axes[0].set_ylabel("held-out pass@1 (mean and range over starts)")
    figure.savefig(PICTURE)


def main() -> int:
    parser = argparse.ArgumentParser(description="Plain and steered runs over learning rates.")
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("plan", nargs="*")
    parser.add_argument("--rate-times", metavar="UPDATE,FACTOR", help="a fault, see run_one")
    args = parser.parse_args()
    fault = [int(x) for x in args.rate_times.split(",")] if args.rate_times else None
    report() if args.what == "report" else run(args.plan, fault)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
