r"""Which term holds at which lag? TRL's asynchronous trainer on column addition, generation k weight versions behind.

    python benchmarks/asynchronous.py run PLAN...     # appends to benchmarks/results/asynchronous.jsonl; resumes
    python benchmarks/asynchronous.py report          # table, histogram of lags and picture from that file alone

A plan is `lag,lag:variant,variant:start-start`, such as `32:stock,dppo:0-4`. A variant is `stock` (TRL's own
`AsyncGRPOTrainer`), a method, or `grpo+MODE`, stock's term under `step_control=MODE`. Rollouts come from a copy of the
policy that is `lag` versions old, in the same process, through TRL's queue and staleness check; the lags reported are
those read back there. Runs of one start share warm start, prompts and sampling seed.

Stated before the runs. The terms are compared at one learning rate, 5e-4, chosen on start 0 by stock's term alone: it
learns at lag 8, and 3 to 6 % of its tokens are cut at lag 32. No setting of any method was tuned. Claims: (1) stock's
held-out pass@1 falls with the lag; (2) at lag 32 some term ends above stock. A term's difference to stock is paired by
start; (2) is refuted for a term whose 95 % interval lies below 0, and not shown where the interval holds 0. A run has
collapsed if its pass@1 after the last update is below the start's. The regime shows nothing if less than 1 % of
stock's tokens are cut at lag 32. Score: pass@1 on the 256 held-out problems, 8 samples each.
"""

import argparse
import json
import os
import platform
import sys
import time
from collections import Counter, defaultdict
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory


RESULTS = Path(__file__).parent / "results" / "asynchronous.jsonl"
PICTURE, TABLE = RESULTS.with_suffix(".svg"), RESULTS.with_suffix(".md")
VARIANTS = ("stock", "dppo", "dispo", "etr", "dhpo", "mdpo", "grpo+ess", "grpo+kl")
LAGS = (0, 2, 8, 32)
UPDATES, ROWS, MICRO_BATCHES, LEARNING_RATE = 120, 128, 4, 5e-4
KEYS = ("lag", "variant", "start")


def plans(words):
    for word in words:
        lags, variants, starts = word.split(":")
        first, _, last = starts.partition("-")
        for start in range(int(first), int(last or first) + 1):
            for lag in map(int, lags.split(",")):
                for variant in variants.split(","):
                    yield {"lag": lag, "variant": variant, "start": start}


def run_one(lag: int, variant: str, start: int) -> dict:
    """Train once and return the row: score, curves, what was cut, lags as read from the queue, CPU seconds."""
    from transformers import AutoModelForCausalLM, PrinterCallback
    from trl.experimental.async_grpo import AsyncGRPOConfig, AsyncGRPOTrainer

    import trl_trust
    from trl_trust.asynchronous.local import LocalRolloutWorker, LocalWeightTransfer, on_a_cpu
    from trl_trust.methods import get_method
    from trl_trust.quickstart.run import quiet
    from trl_trust.tasks import get_task
    from trl_trust.tasks.start import cached_start

    task = get_task("addition")
    name, _, control = variant.partition("+")
    if name == "stock":
        trainer_class, config_class = AsyncGRPOTrainer, AsyncGRPOConfig
    elif name == "grpo":
        trainer_class, config_class = trl_trust.AsyncTrustGRPOTrainer, trl_trust.AsyncTrustGRPOConfig
    else:
        row = get_method(f"async-{name}")
        trainer_class, config_class = getattr(trl_trust, row.trainer), getattr(trl_trust, row.config)
    with quiet(), TemporaryDirectory() as folder, on_a_cpu():
        path = str(cached_start(task, start))
        problems = task.problems("train", seed=start)
        config = config_class(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            gradient_checkpointing=False,
            report_to="none",
            disable_tqdm=True,
            save_strategy="no",
            max_steps=UPDATES,
            warmup_steps=5,
            lr_scheduler_type="constant_with_warmup",
            learning_rate=LEARNING_RATE,
            per_device_train_batch_size=ROWS // MICRO_BATCHES,
            gradient_accumulation_steps=MICRO_BATCHES,
            token_budget=0,
            max_staleness=lag,
            seed=start,
            **({"step_control": control} if control else {}),
        )
        worker = LocalRolloutWorker(
            path,
            problems,
            [task.reward],
            rows=ROWS,
            ahead=ROWS // MICRO_BATCHES,
            lag=lag,
            max_completion_length=task.max_completion_length,
            seed=start,
        )
        trainer = trainer_class(
            path,
            args=config,
            train_dataset=problems,
            rollout_worker=worker,
            weight_transfer=LocalWeightTransfer(worker),
        )
        trainer.remove_callback(PrinterCallback)
        began = time.process_time()
        trainer.train()
        seconds = time.process_time() - began
        tokenizer, held_out = task.build_tokenizer(), task.problems("test")
        trainer.save_model(folder)  # and from there, since the trainer's own model has TRL's tree attention
        trained = AutoModelForCausalLM.from_pretrained(folder)
        measured = task.evaluate(trained, tokenizer, held_out, greedy=False)
        at_start = task.evaluate(AutoModelForCausalLM.from_pretrained(path), tokenizer, held_out, greedy=False)
        history = [record for record in trainer.state.log_history if "loss" in record]
    late = history[UPDATES // 2 :]
    cut = "clip_ratio/region_mean" if name == "stock" else "trust/cut"
    mean = lambda key: sum(record[key] for record in late) / len(late)
    row = {"lag": lag, "variant": variant, "start": start, "score": measured["pass@1"], "entropy": measured["entropy"]}
    row |= {"score_at_start": at_start["pass@1"], "cut": mean(cut), "kl_to_sampler": mean("kl")}
    row |= {"rewards": [round(record["reward"], 4) for record in history]}
    row |= {"lags": dict(sorted(trainer.lags.items())) if name != "stock" else staleness(history)}
    if control:
        row |= {"mean_scale": mean("trust/step_scale")}
    row |= {"cpu_seconds": round(seconds, 1), "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread"}
    return row | {"versions": {name: version(name) for name in ("trl-trust", "trl", "transformers", "torch")}}


def staleness(history: list[dict]) -> dict[int, int]:
    """Stock logs the mean and the largest lag of an update's rows; where they agree the rows have one lag."""
    found = Counter()
    for record in history:
        found[round(record["sample/staleness_mean"])] += ROWS
    return dict(sorted(found.items()))


def read() -> list[dict]:
    return [json.loads(line) for line in RESULTS.read_text().splitlines()] if RESULTS.exists() else []


def run(words) -> None:
    done = {tuple(row[name] for name in KEYS) for row in read()}
    todo = [plan for plan in plans(words) if tuple(plan.values()) not in done]
    for i, plan in enumerate(todo):
        row = run_one(**plan) | {"command": " ".join(["python", *sys.argv])}
        with RESULTS.open("a") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{i + 1}/{len(todo)} {plan} score {row['score']:.3f} cut {row['cut']:.3f}", flush=True)


def report() -> None:
    from matplotlib.figure import Figure

    from trl_trust.evaluation.stats import bootstrap

    cells = defaultdict(dict)
    for row in read():
        cells[row["lag"], row["variant"]][row["start"]] = row
    mean = lambda values: sum(values) / len(values)
    head = [
        "lag",
        "variant",
        "starts",
        "pass@1",
        "95 %",
        "minus stock",
        "95 %",
        "collapsed",
        "cut",
        "KL to the sampler",
    ]
    lines = [f"| {' | '.join(head)} |", "|---" * len(head) + "|"]
    drawn = defaultdict(list)
    for lag in LAGS:
        for variant in VARIANTS:
            runs = cells.get((lag, variant), {})
            if not runs:
                lines.append(f"| {lag} | {variant} | not run |" + " |" * (len(head) - 3))
                continue
            scores = [runs[start]["score"] for start in sorted(runs)]
            interval = lambda values: "[{:.3f}, {:.3f}]".format(*bootstrap(values)) if len(values) > 2 else ""
            stock = cells.get((lag, "stock"), {})
            pairs = [runs[start]["score"] - stock[start]["score"] for start in sorted(set(runs) & set(stock))]
            against = ["", ""] if variant == "stock" or not pairs else [f"{mean(pairs):+.3f}", interval(pairs)]
            collapsed = sum(row["score"] < row["score_at_start"] for row in runs.values())
            cut, kl = (mean([row[name] for row in runs.values()]) for name in ("cut", "kl_to_sampler"))
            row = [lag, variant, len(scores), f"{mean(scores):.3f}", interval(scores), *against]
            row += [f"{collapsed} of {len(scores)}", f"{cut:.1%}", f"{kl:.4f}"]
            lines.append(f"| {' | '.join(map(str, row))} |")
            drawn[variant].append(
                (lag, mean(scores), *(bootstrap(scores) if len(scores) > 2 else (mean(scores),) * 2))
            )
    lines += ["", "Rows by lag when they were pulled from TRL's queue, in % of a run's rows:", ""]
    lines += ["| worker's lag | " + " | ".join(BINS) + " |", "|---" * (len(BINS) + 1) + "|"]
    for lag in LAGS:
        runs = [
            row for (of, variant), rows in cells.items() if of == lag and variant != "stock" for row in rows.values()
        ]
        counts = Counter()
        for row in runs:
            counts.update({name: n for k, n in row["lags"].items() for name, holds in BINS.items() if int(k) in holds})
        total = sum(counts.values())
        lines.append(
            f"| {lag} | " + " | ".join(f"{100 * counts[b] / total:.0f}" if total else "" for b in BINS) + " |"
        )
    starts = sorted({row["start"]: row["score_at_start"] for row in read()}.items())
    lines += [
        "",
        f"pass@1 before training: {', '.join(f'{score:.3f}' for _, score in starts)} (starts 0 to {len(starts) - 1}).",
    ]
    TABLE.write_text("\n".join(lines) + "\n")
    print("\n".join(lines))

    figure = Figure(figsize=(8, 4.2), layout="constrained")
    axes = figure.subplots()
    for i, variant in enumerate(v for v in VARIANTS if v in drawn):
        color = "black" if variant == "stock" else f"C{i}"
        for k, (lag, value, low, high) in enumerate(drawn[variant]):
            few = low == high  # less than three starts: hollow, no interval
            at, errors = LAGS.index(lag) + 0.09 * (i - 3.5), [[value - low], [high - value]]
            style = {"color": color, "mfc": "white" if few else color, "label": None if k else variant}
            axes.errorbar([at], [value], yerr=None if few else errors, fmt="o", markersize=5, capsize=3, **style)
    axes.axhline(mean([score for _, score in starts]), color="gray", linestyle=":", label="before training")
    axes.set(xticks=range(len(LAGS)), xticklabels=LAGS, xlabel="lag of the worker, weight versions", xlim=(-0.5, 3.5))
    axes.set(ylabel="held-out pass@1", ylim=(0, None), title="mean over starts, 95 %; hollow: one or two starts")
    axes.grid(axis="y", alpha=0.3)
    handles = {label: handle for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside right center", fontsize="small")
    figure.savefig(PICTURE)


BINS = {"0": range(1), "1-2": range(1, 3), "3-8": range(3, 9), "9-31": range(9, 32), "32": range(32, 33)}


def main() -> int:
    parser = argparse.ArgumentParser(description="Terms over lags in TRL's asynchronous trainer.")
    parser.add_argument("what", choices=["run", "report"])
    parser.add_argument("plan", nargs="*")
    args = parser.parse_args()
    report() if args.what == "report" else run(args.plan)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
