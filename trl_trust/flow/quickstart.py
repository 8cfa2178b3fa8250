"""`trl-trust quickstart --task flow`: a flow in the plane, learned here, then rewarded with each step rule.

The data are a ring of radius 2; the reward is the cosine of a sample's angle, which is silent about the radius. So it
can be seen how far each rule's roll-outs lie from the data before any training, what they earn, and what is left of
the ring when the reward is pressed on: without a region the model is bought off the ring, an anchor at the start keeps
it there. No download; a minute on one core.
"""

import argparse
import copy
import json
from pathlib import Path

from rich.console import Console
from rich.progress import Progress
from rich.table import Table


PHASES = 120
# rule -> color of its points and curves
COLORS = {"sage": "#1b6ca8", "flow": "#d1495b", "dance": "#8d6a9f", "cps": "#2e933c"}
ANCHOR = dict(beta=0.3, kl_schedule="constant", sync_ref_model=False)  # of the run beside the four


def main(argv: list[str] | None = None) -> int:
    """Run it with the words of a command line, and return the exit status."""
    args = parse(argv)
    console = Console()
    import torch

    from . import toys

    args.output_dir.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    with Progress(console=console) as bars:
        bar = bars.add_task("a flow learns the ring", total=args.steps)
        start = toys.train_ring(args.seed, args.steps, lambda done, total: bars.update(bar, completed=done))
        noise = {rule: noise_of(start, rule, args.seed) for rule in ("ode", *COLORS)}
        arms = {rule: (rule, {"beta": 0.0}) for rule in COLORS} | {"sage, anchor": ("sage", ANCHOR)}
        runs = {}
        for name, (rule, region) in arms.items():
            bar = bars.add_task(f"GRPO with {name}", total=args.phases)
            runs[name] = train(start, rule, region, args, lambda done, bar=bar: bars.update(bar, completed=done))
    table = Table("rule", "distance from the ring, before", "at reward .6", "at the end", "reward at the end")
    for name, run in runs.items():
        table.add_row(
            name,
            f"{noise[arms[name][0]]['distance']:.3f}",
            "not reached" if run["distance_at_.6"] is None else f"{run['distance_at_.6']:.3f}",
            f"{run['distance_end']:.3f}",
            f"{run['reward_end']:.3f}",
        )
    console.print(table)
    console.print(
        f"Before training, the ODE lies {noise['ode']['distance']:.3f} from the ring. `before` and `at reward .6` are "
        "of roll-outs with noise, `at the end` is of ODE samples after the reward was pressed on. One seed."
    )
    points = {"before": noise["ode"]["points"], **{name: run.pop("points") for name, run in runs.items()}}
    metrics = {"seed": args.seed, "before": {rule: found["distance"] for rule, found in noise.items()}, "runs": runs}
    (args.output_dir / "metrics.json").write_text(json.dumps(metrics, indent=1))
    try:
        draw(points, noise, runs, args.output_dir / "ring.png")
        console.print(f"Picture and numbers are in {args.output_dir}.")
    except ImportError:
        console.print(f"Numbers are in {args.output_dir}; for the picture pip install 'trl-trust[plot]'.")
    return 0


def parse(argv: list[str] | None = None) -> argparse.Namespace:
    """The arguments. Imports nothing heavy."""
    parser = argparse.ArgumentParser(prog="trl-trust quickstart --task flow", description=__doc__.partition("\n\n")[2])
    parser.add_argument("--seed", type=int, default=0, help="same seed, same bits (default: 0)")
    parser.add_argument(
        "--phases", type=int, default=PHASES, help=f"roll-outs and updates of each run (default: {PHASES})"
    )
    parser.add_argument("--smoke", action="store_true", help="toy sizes: every stage runs, little is learnt")
    parser.add_argument(
        "--output-dir", type=Path, default=Path("quickstart-output"), help="default: quickstart-output"
    )
    args = parser.parse_args(argv)
    if args.phases < 1:
        parser.error(f"--phases={args.phases} must be at least 1")
    args.steps = 50 if args.smoke else 3000
    args.phases = min(args.phases, 3) if args.smoke else args.phases
    return args


def noise_of(model, rule: str, seed: int, steps: int = 10, shift: float = 3.0, eta: float = 0.7) -> dict:
    """Mean distance from the ring of 2,000 roll-outs, and 300 of their points. `rule` may be `"ode"`."""
    import torch

    from . import toys
    from .rollouts import ode_table, roll_out, step_table

    table = ode_table(steps, shift) if rule == "ode" else step_table(steps, shift, eta, rule)
    g = torch.Generator().manual_seed(seed)
    draw_noise = lambda i: torch.randn(2000, 2, generator=g)
    move = lambda x, at: model(x, table.sigmas[at].float())
    latents, _ = roll_out(move, draw_noise(-1), table, draw_noise)
    end = latents[:, -1]
    return {"distance": toys.ring_distance(end).mean().item(), "points": end[:300].tolist()}


def train(start, rule: str, region: dict, args, on_phase) -> dict:
    """Reward a copy of the flow; its curves, and what its ODE draws in the end."""
    from datasets import Dataset
    from transformers import TrainerCallback

    from . import toys

    class Tick(TrainerCallback):
        def on_log(self, args, state, control, **kwargs):
            on_phase(state.global_step // 2)

    trainer = toys.ring_trainer(
        copy.deepcopy(start), str(args.output_dir), args.phases, sde_type=rule, seed=args.seed, **region
    )
    trainer.add_callback(Tick())
    trainer.train()
    log = [entry for entry in trainer.state.log_history if "reward" in entry]
    rewards = [entry["reward"] for entry in log]
    distances = [entry["rewards/ring_distance_reward"] for entry in log]
    final = trainer.sample(Dataset.from_list([{"prompt": "a point of the ring"}] * 512))
    passed = next((i for i, value in enumerate(rewards) if value > 0.6), None)
    return {
        "reward": rewards,
        "distance": distances,
        "distance_at_.6": None if passed is None else distances[passed],
        "reward_end": sum(toys.ring_reward(final, None)) / len(final),
        "distance_end": toys.ring_distance(final).mean().item(),
        "points": final[:300].tolist(),
    }


def draw(points: dict, noise: dict, runs: dict, path: Path) -> None:
    """Samples before and after each run; distance of roll-outs by rule; reward; distance against reward."""
    from matplotlib.figure import Figure
    from matplotlib.patches import Circle

    def smooth(values: list[float], width: int = 5) -> list[float]:
        return [sum(part) / len(part) for part in (values[max(0, i - width) : i + 1] for i in range(len(values)))]

    figure = Figure(figsize=(13, 6.2), layout="constrained")
    top, bottom = figure.subfigures(2, 1, height_ratios=(1, 1.25))
    for axis, (name, drawn) in zip(top.subplots(1, len(points)), points.items(), strict=True):
        axis.add_patch(Circle((0, 0), 2, fill=False, color="0.75"))
        axis.scatter(*zip(*drawn, strict=True), s=3, color=COLORS.get(name.split(",")[0], "0.3"))
        axis.set(
            title=name if name == "before" else f"after: {name}", xlim=(-4.5, 4.5), ylim=(-4.5, 4.5), aspect="equal"
        )
        axis.set(xticks=[], yticks=[])
    left, middle, right = bottom.subplots(1, 3)
    left.bar(list(noise), [noise[rule]["distance"] for rule in noise], color=["0.6", *COLORS.values()])
    left.set(title="roll-outs before training", ylabel="mean distance from the ring")
    for name, run in runs.items():
        style = dict(color=COLORS[name.split(",")[0]], ls="--" if "," in name else "-", label=name)
        middle.plot(smooth(run["reward"]), **style)
        right.plot(smooth(run["reward"]), smooth(run["distance"]), **style)
    middle.set(title="training", xlabel="phase", ylabel="reward of roll-outs, mean of 6 phases")
    middle.legend()
    right.set(title="what the reward is paid with", xlabel="reward of roll-outs", ylabel="distance", yscale="log")
    figure.savefig(path, dpi=110)
