"""What GU spares, on generated facts: each forget loss with and without it, at equal forgetting and equal compute.

    python benchmarks/unlearning.py grid --json benchmarks/results/unlearning.json     # about 10 minutes of one CPU
    python benchmarks/unlearning.py final --json benchmarks/results/unlearning.json    # about 5
    python benchmarks/unlearning.py cost --json benchmarks/results/unlearning.json     # about 2
    python benchmarks/unlearning.py show --json benchmarks/results/unlearning.json     # tables and picture again

A Llama of 90 thousand parameters knows 40 invented authors x 5 relations by heart (4 words each) and is to forget 4
authors. `grid`: every loss, without GU (`off`), with GU in Adam's and in the identity metric, at several learning
rates and weights alpha of the retain loss, over seeds, which draw facts, model and order. The NLL of **all** facts is
measured along the way and read off where the forget NLL first reaches the level of its loss. Runs without GU may take
1.5 times the steps, what a step of GU is taken to cost (`cost` measures it), so that both have the same compute. The
best cell of each arm is chosen, for each seed, by the mean of the other seeds.

`final`: the cell of each arm that was best on seed 0 is run on every seed and stopped at its level: a report beside
the model that was retrained without the forget set, a relearning attack (20 updates on a tenth of the forget set, NLL
of the rest), and 4-bit rounding.

Claimed: at equal forgetting GU keeps more. Refuted for a loss if the interval of the paired difference of the two best
cells holds 0, or lies on the other side.
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from itertools import product
from pathlib import Path

import torch
from datasets import concatenate_datasets
from transformers import PrinterCallback, TrainerCallback

from trl_trust.evaluation.compression import compressed
from trl_trust.unlearn import GUConfig, GUTrainer, load_unlearning, unlearning_report
from trl_trust.unlearn.data import encode, facts_tokenizer, pad
from trl_trust.unlearn.offline import Trajectory, build_model, knowledge, learn


LEVELS = {"graddiff": 4.0, "npo": 4.0, "simnpo": 2.0, "ga": 4.0}  # nats a token; SimNPO's loss is flat beyond
# (alpha, learning rate); slower rates do not reach the level within the steps
MIXED = ((1.0, 3e-4), (4.0, 3e-4), (16.0, 3e-4), (4.0, 1e-3))
CELLS = {"graddiff": MIXED, "npo": MIXED, "simnpo": ((1.0, 3e-4), (1.0, 1e-3)), "ga": ((0.0, 3e-4), (0.0, 1e-3))}
ARMS = {"off": {"gu_mode": "off"}, "adam": {}, "identity": {"gu_metric": "identity"}}
STEPS = {"off": 90, "adam": 60, "identity": 60}


class World:
    """Facts of a seed, the model that knows them, and the one that was never told those to forget."""

    def __init__(self, seed: int, retrained: bool = False):
        self.seed, self.data = seed, load_unlearning("facts", seed=seed)
        self.model, self.tokenizer = learn(concatenate_datasets([self.data.forget, self.data.retain]), seed=seed)
        self.retrained = learn(self.data.retain, seed=seed)[0] if retrained else None
        self.forget, self.retain = self.batch(self.data.forget), self.batch(self.data.retain)

    def batch(self, rows):
        return pad(self.tokenizer, [encode(self.tokenizer, row) for row in rows])

    def trainer(self, folder, arm, model=None, **settings):
        model = build_model(self.tokenizer) if model is None else model
        model.load_state_dict(self.model.state_dict())
        args = GUConfig(
            output_dir=folder,
            use_cpu=True,
            bf16=False,
            report_to="none",
            disable_tqdm=True,
            logging_strategy="no",
            save_strategy="no",
            per_device_train_batch_size=10,
            lr_scheduler_type="constant",
            weight_decay=0.0,
            seed=self.seed,
            **{"max_steps": STEPS[arm], **ARMS[arm], **settings},
        )
        trainer = GUTrainer(model, args, self.data.train, self.tokenizer)
        trainer.remove_callback(PrinterCallback)
        return trainer


class Enough(Trajectory):
    """A [`Trajectory`] that ends the run a quarter beyond the level."""

    def __init__(self, world, level):
        super().__init__(world.forget, world.retain, every=2)
        self.level = level

    def on_step_end(self, args, state, control, model=None, **kwargs):
        super().on_step_end(args, state, control, model=model, **kwargs)
        control.should_training_stop = control.should_training_stop or self.points[-1][1] > 1.25 * self.level


def grid(runs: list[dict], seeds: list[int], folder: str, save) -> list[dict]:
    names = ("loss", "arm", "alpha", "rate", "seed")
    done = {tuple(run[name] for name in names) for run in runs}
    for seed in seeds:
        world = World(seed)
        for loss, arm in product(CELLS, ARMS):
            for alpha, rate in CELLS[loss]:
                if (cell := (loss, arm, alpha, rate, seed)) in done:
                    continue
                trainer = world.trainer(folder, arm, forget_loss=loss, alpha=alpha, learning_rate=rate)
                path = Enough(world, LEVELS[loss])
                trainer.add_callback(path)
                trainer.train()
                points = [[round(x, 5) for x in point] for point in path.points]
                runs.append({**dict(zip(names, cell, strict=True)), "points": points})
        save(runs)
        print(f"seed {seed}: {time.process_time():.0f} CPU seconds", file=sys.stderr, flush=True)
    return runs


def read_off(points, level: float) -> float | None:
    """Retain NLL where the forget NLL first reaches `level`, or None."""
    path = Trajectory(None, None)
    path.points = points
    found = path.at(level)
    return None if found is None else found[1]


def cells(runs: list[dict], loss: str, arm: str, level: float) -> dict[tuple, dict[int, float | None]]:
    """(alpha, rate) -> seed -> retain NLL at the level."""
    found: dict[tuple, dict] = {}
    for run in runs:
        if (run["loss"], run["arm"]) == (loss, arm) and (run["alpha"], run["rate"]) in CELLS[loss]:
            found.setdefault((run["alpha"], run["rate"]), {})[run["seed"]] = read_off(run["points"], level)
    return found


def best(table: dict[tuple, dict], without: int | None = None) -> tuple | None:
    """The cell with the lowest mean over all seeds but `without`; one that misses the level there is out."""
    means = {}
    for key, values in table.items():
        kept = [value for seed, value in values.items() if seed != without]
        if kept and None not in kept:
            means[key] = statistics.mean(kept)
    return min(means, key=means.get) if means else None


def paired(differences: list[float]) -> tuple[float, float, float]:
    """Mean and its 95 % interval by Student's t."""
    from scipy.stats import t

    mean, n = statistics.mean(differences), len(differences)
    half = t.ppf(0.975, n - 1) * statistics.stdev(differences) / n**0.5
    return mean, mean - half, mean + half


class StopAt(TrainerCallback):
    """Ends a run once the forget NLL has reached the level."""

    def __init__(self, batch, level):
        self.batch, self.level, self.steps = batch, level, None

    def on_step_end(self, args, state, control, model=None, **kwargs):
        if knowledge(model, self.batch)[0] >= self.level:
            control.should_training_stop, self.steps = True, state.global_step


def relearn(model, world: World, steps: int = 20) -> tuple[float, float]:
    """NLL and greedy exact match of nine tenths of the forget set after training on the other tenth."""
    few, rest = world.batch(world.data.forget.select([0, 10])), [i for i in range(20) if i not in (0, 10)]
    attacked = build_model(world.tokenizer)
    attacked.load_state_dict(model.state_dict())
    attacked.train()
    optimizer = torch.optim.AdamW(attacked.parameters(), lr=3e-4, weight_decay=0.0)
    for _ in range(steps):
        attacked(**few).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return knowledge(attacked, {name: x[rest] for name, x in world.forget.items()})


def look(model, world: World, reference=None, subject: str = "") -> tuple[dict, object]:
    """Everything that `final` says of a model, and its report."""
    report = unlearning_report(
        model,
        world.tokenizer,
        world.data,
        retain_reference=reference,
        subject=subject,
        max_new_tokens=5,
        batch_size=64,
    )
    forget, retain = report.rows[0], report.rows[1]
    nll, match = relearn(model, world)
    with compressed(model, "rtn4", group_size=32):
        rounded = {
            "rtn4_forget_nll": knowledge(model, world.forget)[0],
            "rtn4_retain_nll": knowledge(model, world.retain)[0],
        }
    columns = ("nll", "probability", "extraction_strength", "rouge_l", "truth_ratio")
    row = {f"{side['split']}_{name}": side[name] for side in (forget, retain) for name in columns}
    row |= {name: report[name].value for name in ("forget_quality", "loss_attack_auc", "privleak")}
    row["retain_utility"] = 3 / sum(1 / max(retain[name], 1e-9) for name in ("probability", "rouge_l", "truth_ratio"))
    return {**row, **rounded, "relearned_nll": nll, "relearned_match": match}, report


def final(runs: list[dict], rows: list[dict], seeds: list[int], folder: str, save) -> list[dict]:
    first = [run for run in runs if run["seed"] == 0]
    chosen = {(loss, arm): best(cells(first, loss, arm, level)) for loss, level in LEVELS.items() for arm in ARMS}
    for seed in seeds:
        world = World(seed, retrained=True)
        row, reference = look(world.retrained, world, subject="retrained")
        row |= {"forget_quality": 1.0, "privleak": 0.0}  # against itself
        rows.append({"loss": "retrained", "arm": "", "seed": seed, **row})
        rows.append({"loss": "before", "arm": "", "seed": seed, **look(world.model, world, reference, "before")[0]})
        for (loss, arm), cell in chosen.items():
            if cell is None:
                continue
            trainer = world.trainer(folder, arm, forget_loss=loss, alpha=cell[0], learning_rate=cell[1])
            stop = StopAt(world.forget, LEVELS[loss])
            trainer.add_callback(stop)
            trainer.train()
            row = look(trainer.model, world, reference, f"{loss} {arm}")[0]
            rows.append({"loss": loss, "arm": arm, "seed": seed, "cell": cell, "steps": stop.steps, **row})
        save(rows)
        print(f"seed {seed}: {time.process_time():.0f} CPU seconds", file=sys.stderr, flush=True)
    return rows


def untrained(**size) -> World:
    """A world whose model knows nothing, which makes no difference to what a step costs."""
    world = World.__new__(World)
    world.seed, world.data, world.tokenizer = 0, load_unlearning("facts"), facts_tokenizer()
    world.model = build_model(world.tokenizer, **size)
    return world


def cost(folder: str) -> dict:
    """CPU time a step against the plain procedure, in turns; and the peak of memory by rank, a process each."""
    world, times = untrained(), {}
    arms = {"off": {}, "rank 0": {"gu_rank": 0}, "rank 8": {}, "rank 8, identity": {}, "cone": {"gu_mode": "cone"}}
    for turn in range(5):
        for name, settings in arms.items():
            arm = "off" if name == "off" else "identity" if "identity" in name else "adam"
            trainer = world.trainer(folder, arm, learning_rate=1e-5, **{**settings, "max_steps": 15})
            start = time.process_time()
            trainer.train()
            if turn:  # the first warms up
                times.setdefault(name, []).append(time.process_time() - start)
    ratios = {name: [x / y for x, y in zip(found, times["off"], strict=True)] for name, found in times.items()}
    memory = {}
    for rank in (None, 0, 8):
        command = [sys.executable, __file__, "memory", "--rank", str(-1 if rank is None else rank)]
        said = subprocess.check_output(command, text=True).splitlines()[-1]  # above it, the trainer's own lines
        memory["off" if rank is None else f"rank {rank}"] = json.loads(said)
    return {"ratio": ratios, "memory": memory}


def memory(rank: int) -> dict:
    """Peak resident bytes above those before training, in copies of the parameters in float32, of a larger model."""
    import resource

    world = untrained(hidden_size=768)
    d = sum(p.numel() for p in world.model.parameters())
    with tempfile.TemporaryDirectory() as folder:
        settings = {"gu_mode": "off"} if rank < 0 else {"gu_rank": rank}
        trainer = world.trainer(
            folder,
            "adam",
            build_model(world.tokenizer, hidden_size=768),
            learning_rate=1e-5,
            **{**settings, "max_steps": 10},
        )
        del world.model
        before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        trainer.train()
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"parameters": d, "copies": (peak - before) * 1024 / (4 * d)}


# ---- what is shown ----


def interval(values, digits=3) -> str:
    mean, low, high = values
    return f"{mean:.{digits}f} [{low:.{digits}f}, {high:.{digits}f}]"


def tables(result: dict) -> str:
    runs, seeds = result.get("grid", []), sorted({run["seed"] for run in result.get("grid", [])})
    parts = [f"# Unlearning on generated facts, with and without GU\n\n{result['machine']}; seeds {seeds}.\n"]
    parts.append(
        "## At equal forgetting and equal compute\n\nRetain NLL (nats a token, all retain facts) where the forget NLL "
        "first reaches the level; each arm at its best learning rate and alpha, chosen for a seed by the other seeds. "
        "Runs without GU have 90 steps, those with it 60. Difference: with minus without, paired over seeds, 95 % "
        "interval of Student's t.\n"
    )
    lines = ["| loss | level | without | GU, Adam's metric | difference | GU, identity | difference | best cells |"]
    lines.append("|---|---|---|---|---|---|---|---|")
    for loss, level in LEVELS.items():
        values, chosen = {}, {}
        for arm in ARMS:
            table = cells(runs, loss, arm, level)
            picks = {seed: best(table, without=seed) for seed in seeds}
            values[arm] = {s: None if key is None else table[key][s] for s, key in picks.items()}
            chosen[arm] = best(table)
        row = [loss, f"{level:g}"]
        for arm in ARMS:
            reached = [v for v in values[arm].values() if v is not None]
            missed = "" if len(reached) == len(seeds) else f" ({len(seeds) - len(reached)} missed the level)"
            row.append((f"{statistics.mean(reached):.3f}" if reached else "not reached") + missed)
            if arm != "off":
                both = [s for s in seeds if None not in (values["off"][s], values[arm][s])]
                gaps = [values[arm][s] - values["off"][s] for s in both]
                row.append(interval(paired(gaps)) if len(gaps) > 1 else "")
        row.append(
            "; ".join(
                f"{arm} " + ("none" if c is None else f"alpha {c[0]:g}, lr {c[1]:g}") for arm, c in chosen.items()
            )
        )
        lines.append("| " + " | ".join(row) + " |")
    parts.append("\n".join(lines) + "\n")

    parts.append(
        "## Cell by cell\n\nThe same reading for each cell, mean over seeds; `-`: the level was not reached on every "
        "seed.\n"
    )
    lines = [
        "| loss | alpha | lr | without | GU, Adam's metric | ratio, seeds | GU, identity | ratio, seeds |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for loss, level in LEVELS.items():
        for alpha, rate in CELLS[loss]:
            found = {arm: cells(runs, loss, arm, level).get((alpha, rate), {}) for arm in ARMS}
            row = [loss, f"{alpha:g}", f"{rate:g}"]
            for arm in ARMS:
                whole = list(found[arm].values())
                row.append(f"{statistics.mean(whole):.3f}" if whole and None not in whole else "-")
                if arm != "off":
                    ratios = [
                        found[arm][s] / found["off"][s]
                        for s in seeds
                        if None not in (found[arm].get(s), found["off"].get(s))
                    ]
                    row.append(f"{min(ratios):.2f} to {max(ratios):.2f}" if ratios else "-")
            lines.append("| " + " | ".join(row) + " |")
    parts.append("\n".join(lines) + "\n")

    if rows := result.get("final"):
        parts.append(
            "## The cells that were best on seed 0, stopped at the level\n\nMeans over seeds "
            f"{sorted({row['seed'] for row in rows})}. "
            "`relearned`: NLL of "
            "nine tenths of the forget set after 20 updates on the other tenth. `rtn4`: rounded to 4 bit (groups of "
            "32). `forget quality`: p-value against the retrained model, geometric mean; `privleak`: 0 is its own.\n"
        )
        names = (
            "forget_nll",
            "forget_extraction_strength",
            "retain_nll",
            "retain_extraction_strength",
            "retain_utility",
            "forget_quality",
            "privleak",
            "relearned_nll",
            "relearned_match",
            "rtn4_forget_nll",
            "rtn4_retain_nll",
        )
        lines = [
            "| loss | arm | steps | " + " | ".join(name.replace("_", " ") for name in names) + " |",
            "|---" * (len(names) + 3) + "|",
        ]
        groups = {}
        for row in rows:
            groups.setdefault((row["loss"], row["arm"]), []).append(row)
        for (loss, arm), group in groups.items():
            steps = [row["steps"] for row in group if row.get("steps")]
            missed = sum("steps" in row and row["steps"] is None for row in group)
            row = [
                loss,
                arm,
                (f"{statistics.mean(steps):.0f}" if steps else "") + (f" ({missed} missed)" if missed else ""),
            ]
            for name in names:
                values = [r[name] for r in group]
                if name == "forget_quality":
                    row.append(f"{statistics.geometric_mean([max(v, 1e-300) for v in values]):.2g}")
                else:
                    row.append(f"{statistics.mean(values):.3g}")
            lines.append("| " + " | ".join(row) + " |")
        parts.append("\n".join(lines) + "\n")
    if "cost" in result:
        ratios = {
            name: statistics.quantiles(found, n=4) for name, found in result["cost"]["ratio"].items() if name != "off"
        }
        parts.append(
            "## Cost\n\nCPU time of a step over the plain procedure's, in turns, median and quartiles of "
            "4; 90 thousand parameters.\n"
        )
        parts.append(
            "\n".join(
                [
                    "| | ratio |",
                    "|---|---|",
                    *(f"| {name} | {q[1]:.2f} [{q[0]:.2f}, {q[2]:.2f}] |" for name, q in ratios.items()),
                ]
            )
            + "\n"
        )
        memory = result["cost"]["memory"]
        d = next(iter(memory.values()))["parameters"]
        parts.append(
            f"Peak of memory in training, above that before it, in float32 copies of the {d / 1e6:.1f} M trained "
            "parameters (a process each):\n"
        )
        parts.append(
            "\n".join(
                [
                    "| | copies |",
                    "|---|---|",
                    *(f"| {name} | {found['copies']:.1f} |" for name, found in memory.items()),
                ]
            )
            + "\n"
        )
    else:
        parts.append("## Cost\n\nNot run.\n")
    return "\n".join(parts)


def picture(result: dict, path: Path) -> None:
    """Forget NLL against retain NLL, mean over seeds: each cell thin, the front of each arm thick."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(11, 3.4), layout="constrained")
    axes = figure.subplots(1, len(LEVELS), sharey=True)
    colors = {"off": "#777777", "adam": "#1f77b4", "identity": "#d95f02"}
    labels = {"off": "without GU", "adam": "GU, Adam's metric", "identity": "GU, identity metric"}
    for ax, (loss, level) in zip(axes, LEVELS.items(), strict=True):
        levels = [level * i / 20 for i in range(1, 25)]
        for arm in ARMS:
            curves = {}
            for x in levels:
                for key, values in cells(result["grid"], loss, arm, x).items():
                    if None not in values.values():
                        curves.setdefault(key, []).append((x, statistics.mean(values.values())))
            for curve in curves.values():
                ax.plot(*zip(*curve, strict=True), color=colors[arm], linewidth=0.6, alpha=0.45)
            front = [(x, min(y)) for x in levels if (y := [v for c in curves.values() for u, v in c if u == x])]
            if front:
                ax.plot(*zip(*front, strict=True), color=colors[arm], linewidth=2.2, label=labels[arm])
        ax.axvline(level, color="black", linewidth=0.5, linestyle=":")
        ax.set(title=loss, xlabel="forget NLL", yscale="log")
    axes[0].set_ylabel("retain NLL, all retain facts")
    axes[0].legend(fontsize=8, loc="lower right")
    figure.savefig(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", choices=("grid", "final", "cost", "show", "memory"))
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(5)))
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--json", type=Path, default=Path("unlearning.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.part == "memory":
        print(json.dumps(memory(args.rank)))
        return
    result = json.loads(args.json.read_text()) if args.json.exists() else {}
    result["machine"] = f"{platform.machine()}, one thread, torch {torch.__version__}"

    def save(found):  # after each seed, so that a run that is cut leaves what it has
        result[args.part] = found
        result.setdefault("cpu_seconds", {})[args.part] = round(time.process_time())
        args.json.parent.mkdir(parents=True, exist_ok=True)
        args.json.write_text(json.dumps(result, separators=(",", ":")) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        if args.part == "grid":
            grid(result.get("grid", []), args.seeds, folder, save)
        elif args.part == "final":
            final(result["grid"], result.get("final", []), args.seeds, folder, save)
        elif args.part == "cost":
            save(cost(folder))
    args.json.with_suffix(".md").write_text(tables(result))
    if "grid" in result:
        picture(result, args.json.with_suffix(".svg"))


if __name__ == "__main__":
    main()
