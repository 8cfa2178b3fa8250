r"""SAGE-GRPO measured: noise and training on a ring, a tiny Wan, and pictures of shapes.

    OMP_NUM_THREADS=1 python benchmarks/sage.py ring --seeds 0 1 2 3 4       # about 12 CPU minutes
    OMP_NUM_THREADS=1 python benchmarks/sage.py wan --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/sage.py cost --seeds 0 1 2 3 4 5 6 7
    OMP_NUM_THREADS=1 python benchmarks/sage.py shapes --seeds 0 1 2
    python benchmarks/sage.py plot                                           # the pictures of docs/sage.md

Each cell is written to `benchmarks/results/sage_NAME.json` as soon as it is measured; cells that are there already are
passed over.

`ring` asks whether the paper's first claim holds, that its steps leave the data manifold less than those of Flow-GRPO
and DanceGRPO. It is refuted if before training roll-outs do not lie in the order sage < flow < dance from the ring
(the script raises), and for training if the order is another when the mean reward has reached .6. It also asks whether
the two KL terms hold the model nearer to the ring at the same reward (an anchor that is fixed, or moves), and whether
the equalizer changes either. No setting was tuned per rule.
"""

import argparse
import copy
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from trl_trust.flow import toys
from trl_trust.flow.rewards import picture_grid
from trl_trust.flow.rollouts import ode_table, roll_out, step_table


RESULTS = Path(__file__).parent / "results"
PICTURES = Path(tempfile.gettempdir()) / "sage-pictures"  # samples of seed 0, for the plot
RULES = ("sage", "flow", "dance", "cps")
# The KL weight of the ring is large since a point has two dimensions and the loss is of order 1
REGIONS = {
    "none": {"beta": 0.0},
    "fixed": {"beta": 0.3, "kl_schedule": "constant", "sync_ref_model": False},
    "moving": {"beta": 0.3, "kl_schedule": "constant", "sync_ref_model": True, "ref_model_sync_steps": 10},
}
PHASES = 180


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("name", choices=["ring", "wan", "cost", "shapes", "plot"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--noise-only", action="store_true", help="of `shapes`: no training")
    args = parser.parse_args()
    torch.set_num_threads(1)
    PICTURES.mkdir(exist_ok=True)
    if args.name == "plot":
        for draw in (plot_ring, plot_shapes):
            draw()
        return
    book = Book(RESULTS / f"sage_{args.name}.json")
    for seed in args.seeds:
        globals()[args.name](seed, book, *([args.noise_only] if args.name == "shapes" else []))


class Book:
    """A file of cells, each written when it is measured."""

    def __init__(self, path: Path):
        self.path = path
        self.content = json.loads(path.read_text()) if path.exists() else {"cells": []}
        self.content |= {
            "command": shlex.join(["python", "benchmarks/sage.py", *sys.argv[1:]]),
            "machine": f"{platform.machine()}, {os.cpu_count()} cores, one thread",
            "versions": {name: version(name) for name in ("torch", "transformers", "diffusers")},
        }

    def has(self, **key) -> bool:
        return any(all(cell.get(k) == v for k, v in key.items()) for cell in self.content["cells"])

    def add(self, **cell) -> None:
        if self.path.exists():  # seeds may run side by side
            self.content["cells"] = json.loads(self.path.read_text())["cells"]
        self.content["cells"].append(cell)
        cells = ",\n  ".join(json.dumps(cell) for cell in self.content["cells"])
        rest = {name: value for name, value in self.content.items() if name != "cells"}
        text = json.dumps(rest, indent=1)[:-2] + f',\n "cells": [\n  {cells}\n ]\n}}\n'
        self.path.parent.mkdir(parents=True, exist_ok=True)
        partial = self.path.with_suffix(".partial")
        partial.write_text(text)
        os.replace(partial, self.path)
        print(self.path.name, {k: v for k, v in cell.items() if not isinstance(v, list)}, flush=True)


# -- the ring --------------------------------------------------------------------------------------------------------


def ring(seed: int, book: Book) -> None:
    start = toys.train_ring(seed)
    if not book.has(part="noise", seed=seed):
        noise(start, seed, book)
    for region, fields in REGIONS.items():
        for equalizer in (True, False):
            for rule in RULES:
                key = dict(part="training", rule=rule, equalizer=equalizer, region=region, seed=seed)
                if not book.has(**key):
                    book.add(**key, **train_on_ring(copy.deepcopy(start), rule, equalizer, fields, seed))


def noise(start, seed: int, book: Book) -> None:
    """Mean distance of 4,000 roll-outs from the ring, by rule, before any training."""
    for steps, shift in ((10, 1.0), (20, 1.0), (20, 5.0)):
        for eta in (0.5, 1.0):
            found = {}
            for rule in ("ode", *RULES):
                table = ode_table(steps, shift) if rule == "ode" else step_table(steps, shift, eta, rule)
                g = torch.Generator().manual_seed(seed)
                draw = lambda i, g=g: torch.randn(4000, 2, generator=g)
                move = lambda x, s, table=table: start(x, table.sigmas[s].float())
                latents, _ = roll_out(move, draw(-1), table, draw)
                found[rule] = round(toys.ring_distance(latents[:, -1]).mean().item(), 4)
            if not found["sage"] < found["flow"] < found["dance"]:
                raise AssertionError(
                    f"the order is another at T={steps}, shift={shift}, eta={eta}, seed={seed}: {found}"
                )
            book.add(part="noise", steps=steps, shift=shift, eta=eta, seed=seed, **found)


def train_on_ring(model, rule: str, equalizer: bool, region: dict, seed: int) -> dict:
    from datasets import Dataset

    with TemporaryDirectory() as folder:
        trainer = toys.ring_trainer(
            model, folder, PHASES, sde_type=rule, grad_equalizer=equalizer, seed=seed, **region
        )
        begin = time.process_time()
        trainer.train()
        seconds = time.process_time() - begin
        log = [entry for entry in trainer.state.log_history if "reward" in entry]
        rewards = [round(entry["reward"], 4) for entry in log]
        distances = [round(entry["rewards/ring_distance_reward"], 4) for entry in log]
        final = trainer.sample(Dataset.from_list([{"prompt": "a point of the ring"}] * 1024))
    passed = next((i for i, value in enumerate(rewards) if value > 0.6), None)
    return {
        "phases_to_.6": passed,
        "distance_at_.6": None if passed is None else round(sum(distances[passed : passed + 3]) / 3, 4),
        "reward_end": round(sum(toys.ring_reward(final, None)) / len(final), 4),
        "distance_end": round(toys.ring_distance(final).mean().item(), 4),
        "seconds": round(seconds, 2),
        "reward": rewards[::3],
        "distance": distances[::3],
        "samples": [[round(c, 2) for c in point] for point in final[:200].tolist()] if seed == 0 else [],
    }


# -- a tiny Wan ------------------------------------------------------------------------------------------------------


def wan(seed: int, book: Book) -> None:
    """A Wan of 20,000 parameters with random weights, from a pipeline object, rewarded for brightness: 40 phases
    of two updates. It shows what trains, and ranks nothing: there is no quality to lose."""
    for region in ("none", "moving"):
        for equalizer in (True, False):
            for rule in RULES:
                key = dict(part="training", rule=rule, equalizer=equalizer, region=region, seed=seed)
                if not book.has(**key):
                    book.add(**key, **train_wan(rule, equalizer, REGIONS[region], seed))


WAN = dict(
    height=16, width=16, num_frames=5, num_inference_steps=5, shift=3.0, eta=0.7, num_generations=8,
    per_device_train_batch_size=16, gradient_accumulation_steps=2, timestep_fraction=0.8, epsilon=1e-2,
    learning_rate=3e-2, lr_scheduler_type="constant", max_steps=80, logging_steps=2, use_cpu=True, bf16=False,
    report_to="none", disable_tqdm=True, save_strategy="no", log_level="error",
)  # fmt: skip


def train_wan(rule: str, equalizer: bool, region: dict, seed: int) -> dict:
    from datasets import Dataset
    from transformers import PrinterCallback

    from trl_trust.flow import SAGEGRPOConfig, SAGEGRPOTrainer, brightness_reward
    from trl_trust.flow.adapters.tiny import tiny_wan_pipeline

    prompts = Dataset.from_list([{"prompt": "a red ball"}, {"prompt": "a blue cat"}])
    own = dict(sde_type=rule, grad_equalizer=equalizer, seed=seed, **region)
    if rule == "cps":  # its last step has no noise: all four others are trained, as four of five are elsewhere
        own["timestep_fraction"] = 1.0
    with TemporaryDirectory() as folder:
        trainer = SAGEGRPOTrainer(
            tiny_wan_pipeline(seed), SAGEGRPOConfig(output_dir=folder, **{**WAN, **own}), brightness_reward, prompts
        )
        trainer.remove_callback(PrinterCallback)
        score = lambda: sum(brightness_reward(trainer.sample(prompts.select([0, 1] * 8)), None)) / 16
        first, begin = score(), time.process_time()
        trainer.train()
        seconds = time.process_time() - begin
        log = [entry for entry in trainer.state.log_history if "reward" in entry]
    return {
        "reward_start": round(first, 4),
        "reward_end": round(score(), 4),
        "clip_ratio": round(sum(entry["sage/clip_ratio"] for entry in log) / len(log), 4),
        "grad_norm": round(sum(entry["grad_norm"] for entry in log) / len(log), 4),
        "seconds": round(seconds, 2),
        "reward": [round(entry["reward"], 4) for entry in log[::3]],
    }


# -- cost ------------------------------------------------------------------------------------------------------------


def cost(seed: int, book: Book) -> None:
    """CPU seconds of four phases with and without equalizer, anchor and KL to the old policy, in turns."""
    from datasets import Dataset
    from transformers import PrinterCallback

    from trl_trust.flow import SAGEGRPOConfig, SAGEGRPOTrainer, brightness_reward
    from trl_trust.flow.adapters.tiny import tiny_sd3_pipeline

    arms = {
        "plain": dict(grad_equalizer=False, beta=0.0),
        "equalizer": dict(grad_equalizer=True, beta=0.0),
        "old KL": dict(grad_equalizer=False, beta=1e-5, kl_pos_weight=0.0),
        "anchor": dict(grad_equalizer=False, beta=1e-5, kl_vel_weight=0.0),
        "all": dict(grad_equalizer=True, beta=1e-5),
    }
    prompts = Dataset.from_list([{"prompt": "a red ball"}, {"prompt": "a blue cat"}])
    fields = {
        **WAN,
        "max_steps": 8,
        "num_inference_steps": 6,
        "timestep_fraction": 1.0,
        "gradient_accumulation_steps": 3,
    }
    for name, own in arms.items():
        with TemporaryDirectory() as folder:
            config = SAGEGRPOConfig(output_dir=folder, **{**fields, "seed": seed, **own})
            trainer = SAGEGRPOTrainer(tiny_sd3_pipeline(), config, brightness_reward, prompts)
            trainer.remove_callback(PrinterCallback)
            begin = time.process_time()
            trainer.train()
            book.add(part="cost", arm=name, seed=seed, seconds=round(time.process_time() - begin, 3))


# -- pictures of shapes ----------------------------------------------------------------------------------------------

SHAPES = dict(
    height=12, width=12, num_inference_steps=8, shift=3.0, eta=0.7, num_generations=8, per_device_train_batch_size=64,
    per_device_eval_batch_size=64, gradient_accumulation_steps=3, timestep_fraction=6 / 8,
    epsilon=1e-2, learning_rate=2e-4,
    lr_scheduler_type="constant", logging_steps=2, use_cpu=True, bf16=False, report_to="none", disable_tqdm=True,
    save_strategy="no", log_level="error", reward_weights=[1.0, 0.0],
)  # fmt: skip
SHAPE_PHASES = 80


def shapes(seed: int, book: Book, noise_only: bool = False) -> None:
    """A text-conditioned flow that was pre-trained here, and asked for squares of a number, color and place."""
    start = pretrained()
    if not book.has(part="noise", seed=seed):
        book.add(part="noise", seed=seed, **shapes_noise(start, seed))
    arms = [("sage", True, "none"), ("flow", True, "none"), ("sage", True, "fixed"), ("dance", True, "none")]
    arms += [("cps", True, "none"), ("sage", False, "none"), ("flow", True, "fixed"), ("cps", True, "fixed")]
    for rule, equalizer, region in () if noise_only else arms:
        key = dict(part="training", rule=rule, equalizer=equalizer, region=region, seed=seed)
        if not book.has(**key):
            book.add(**key, **train_on_shapes(copy.deepcopy(start), rule, equalizer, region, seed))


def shapes_noise(model, seed: int) -> dict:
    """Mean distance of 192 roll-outs from the data and their reward, by rule, before any training."""
    prompts, found = 4 * toys.shape_prompts(), {}
    adapter = toys.ShapesAdapter(transformer=model, height=12, width=12)
    condition = adapter.encode(prompts)
    for rule in ("ode", *RULES):
        table = ode_table(8, 3.0) if rule == "ode" else step_table(8, 3.0, 0.7, rule)
        g = torch.Generator().manual_seed(seed)
        draw = lambda i, g=g: torch.randn(len(prompts), 3, 12, 12, generator=g)
        move = lambda x, at, table=table: adapter.velocity(model, x, table.sigmas[at].float(), condition)
        pictures = adapter.decode(roll_out(move, draw(-1), table, draw)[0][:, -1])
        found[rule] = round(toys.shape_distance(pictures).mean().item(), 4)
        found[f"{rule}_reward"] = round(mean(toys.shape_reward(pictures, prompts)), 4)
        if seed == 0:
            torch.save(picture_grid(pictures[:48:2], 4), PICTURES / f"rollout_{rule}.pt")
    return found


def pretrained():
    """One flow for all seeds and rules, kept beside the other caches of this machine."""
    path = Path.home() / ".cache" / "trl-trust" / "flow-shapes.pt"
    if not path.exists():
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(toys.train_shapes().state_dict(), path)
    model = toys.build_shapes()
    model.load_state_dict(torch.load(path))
    return model


def train_on_shapes(model, rule: str, equalizer: bool, region: str, seed: int) -> dict:
    from datasets import Dataset
    from transformers import PrinterCallback

    from trl_trust.flow import SAGEGRPOConfig, SAGEGRPOTrainer

    prompts = Dataset.from_list([{"prompt": prompt} for prompt in toys.shape_prompts()[::6]])  # eight
    own = dict(sde_type=rule, grad_equalizer=equalizer, seed=seed, max_steps=2 * SHAPE_PHASES, **REGIONS[region])
    if rule == "cps":  # seven of its eight steps have noise; six are trained, as elsewhere
        own["timestep_fraction"] = 6 / 7
    with TemporaryDirectory() as folder:
        trainer = SAGEGRPOTrainer(
            model,
            SAGEGRPOConfig(output_dir=folder, **{**SHAPES, **own}),
            [toys.shape_reward, toys.shape_distance_reward],
            prompts,
            adapter=toys.ShapesAdapter(transformer=model, height=12, width=12),
        )
        trainer.remove_callback(PrinterCallback)

        def drawn() -> tuple[dict, torch.Tensor]:  # by the ODE, 16 pictures a prompt, from fixed noise
            asked = prompts.select(list(range(len(prompts))) * 16)
            found = trainer.sample(asked, seed=1000)
            reward, distance = toys.shape_reward(found, asked["prompt"][:]), toys.shape_distance(found)
            return {"reward": round(mean(reward), 4), "distance": round(distance.mean().item(), 4)}, found

        before, first = drawn()
        begin = time.process_time()
        trainer.train()
        seconds = time.process_time() - begin
        after, last = drawn()
        log = [entry for entry in trainer.state.log_history if "reward" in entry]
    if seed == 0 and equalizer:
        for name, found in (("before", first), (f"{rule}_{region}", last)):
            torch.save(picture_grid(found[:24], 4), PICTURES / f"{name}.pt")
    return {
        "before": before,
        "after": after,
        "seconds": round(seconds, 2),
        "reward": [round(entry["reward"], 4) for entry in log[::2]],
        "distance": [round(entry["rewards/shape_distance_reward"], 4) for entry in log[::2]],
    }


# -- pictures --------------------------------------------------------------------------------------------------------

COLORS = {"sage": "#1b6ca8", "flow": "#d1495b", "dance": "#8d6a9f", "cps": "#2e933c"}


def cells_of(name: str) -> list[dict]:
    path = RESULTS / f"sage_{name}.json"
    return json.loads(path.read_text())["cells"] if path.exists() else []


def mean(values: list[float]) -> float:
    return sum(values) / len(values)


def curve(cells: list[dict], name: str, width: int = 3) -> list[float]:
    """Mean over the seeds, then over `width` neighbors in time."""
    values = [mean(column) for column in zip(*(cell[name] for cell in cells), strict=True)]
    return [mean(values[max(0, i - width + 1) : i + 1]) for i in range(len(values))]


def plot_ring() -> None:
    """Noise by rule, reward, what it is paid with, and the samples that are left."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    cells = cells_of("ring")
    noise = [cell for cell in cells if cell["part"] == "noise"]
    runs = lambda **key: [cell for cell in cells if cell["part"] == "training" and key.items() <= cell.items()]
    figure = Figure(figsize=(13, 7), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1.25, 1))
    left, middle, right = top.subplots(1, 3)
    grids = sorted({(cell["steps"], cell["shift"], cell["eta"]) for cell in noise})
    for k, rule in enumerate(("ode", *RULES)):
        heights = [
            mean([cell[rule] for cell in noise if (cell["steps"], cell["shift"], cell["eta"]) == grid])
            for grid in grids
        ]
        places = [i + (k - 2) * 0.17 for i in range(len(grids))]
        left.bar(places, heights, width=0.16, label=rule, color=COLORS.get(rule, "0.6"))
    left.set_xticks(range(len(grids)), [f"T {t}\nshift {shift:g}\neta {eta:g}" for t, shift, eta in grids], fontsize=7)
    left.set(title="roll-outs before training", ylabel="mean distance from the ring", yscale="log", ylim=(8e-3, 4))
    left.legend(fontsize=7, ncols=5)
    for rule in RULES:
        for region, style in (("none", "-"), ("fixed", "--")):
            found = runs(rule=rule, equalizer=True, region=region)
            label = f"{rule}, anchor at the start" if region == "fixed" else rule
            middle.plot(
                [3 * i for i in range(PHASES // 3)], curve(found, "reward"), style, color=COLORS[rule], label=label
            )
            right.plot(curve(found, "reward"), curve(found, "distance"), style, color=COLORS[rule])
    middle.set(title="training, mean of 5 seeds", xlabel="phase", ylabel="reward of roll-outs")
    middle.legend(fontsize=7)
    right.set(title="what the reward is paid with", xlabel="reward of roll-outs", ylabel="distance", yscale="log")
    shown = [(rule, "none") for rule in RULES] + [("sage", "moving"), ("sage", "fixed")]
    for axis, (rule, region) in zip(bottom.subplots(1, len(shown)), shown, strict=True):
        (cell,) = runs(rule=rule, equalizer=True, region=region, seed=0)
        axis.add_patch(Circle((0, 0), 2, fill=False, color="0.75"))
        axis.scatter(*zip(*cell["samples"], strict=True), s=3, color=COLORS[rule])
        axis.set(xlim=(-5, 12), ylim=(-8.5, 8.5), aspect="equal", xticks=[], yticks=[])
        axis.set_title(f"{rule}, {'no anchor' if region == 'none' else f'{region} anchor'}", fontsize=9)
    figure.savefig(RESULTS / "sage_ring.png", dpi=100)


def plot_shapes() -> None:
    """Roll-outs of seed 0 by rule before training, samples after it, and what the reward is paid with."""
    from matplotlib.figure import Figure

    cells = cells_of("shapes")
    if not cells:
        return
    shapes_noise(pretrained(), 0)
    drawn = {path.stem: torch.load(path) for path in sorted(PICTURES.glob("*.pt"))}
    names = [f"rollout_{rule}" for rule in ("ode", *RULES)]
    names += [name for name in (f"{rule}_{region}" for region in ("none", "fixed") for rule in RULES) if name in drawn]
    figure = Figure(figsize=(13, 9.4), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.4))
    left, middle, right = top.subplots(1, 3)
    noise = [cell for cell in cells if cell["part"] == "noise"]
    heights = [mean([cell[rule] for cell in noise]) for rule in ("ode", *RULES)]
    left.bar(["ode", *RULES], heights, color=["0.6", *COLORS.values()])
    left.set(title="roll-outs before training", ylabel="mean distance from the data")
    for cell in (cell for cell in cells if cell["part"] == "training" and cell["seed"] == 0):
        label = cell["rule"] + (", anchor at the start" if cell["region"] == "fixed" else "")
        label += "" if cell["equalizer"] else ", no equalizer"
        style = dict(
            color=COLORS[cell["rule"]], ls="--" if cell["region"] == "fixed" else "-" if cell["equalizer"] else ":"
        )
        reward, distance = curve([cell], "reward", 8), curve([cell], "distance", 8)
        middle.plot([2 * i for i in range(len(reward))], reward, label=label, **style)
        right.plot(reward, distance, **style)
    middle.set(title="training, one seed", xlabel="phase", ylabel="reward of roll-outs, mean of 8 logs")
    middle.legend(fontsize=7)
    right.set(title="what the reward is paid with", xlabel="reward of roll-outs", ylabel="distance", yscale="log")
    axes = bottom.subplots(2, -(-len(names) // 2)).flatten()
    for axis in axes:
        axis.set_axis_off()
    for axis, name in zip(axes, names, strict=False):
        axis.imshow(drawn[name].permute(1, 2, 0).clamp(0, 1).numpy(), interpolation="nearest")
        rule, _, region = name.partition("_")
        after = f"after: {rule}{', anchor' if region == 'fixed' else ''}"
        axis.set_title(f"before: {region}" if rule == "rollout" else after, fontsize=9)
    figure.savefig(RESULTS / "sage_shapes.png", dpi=100)


if __name__ == "__main__":
    main()
