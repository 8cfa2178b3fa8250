r"""SAGE-GRPO measured: noise and training on a ring, a tiny Wan, and pictures of shapes.

    OMP_NUM_THREADS=1 python benchmarks/sage.py ring --seeds 0 1 2 3 4       # about 12 CPU minutes
    OMP_NUM_THREADS=1 python benchmarks/sage.py wan --seeds 0 1 2
    OMP_NUM_THREADS=1 python benchmarks/sage.py shapes --seeds 0 1 2 3 4
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
import time
from importlib.metadata import version
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from trl_trust.flow import toys
from trl_trust.flow.rollouts import ode_table, roll_out, step_table


RESULTS = Path(__file__).parent / "results"
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
    parser.add_argument("name", choices=["ring", "wan", "shapes", "plot"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    args = parser.parse_args()
    torch.set_num_threads(1)
    if args.name == "plot":
        from sage_plots import plot  # beside this file

        plot(RESULTS)
        return
    book = Book(RESULTS / f"sage_{args.name}.json")
    for seed in args.seeds:
        globals()[args.name](seed, book)


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


if __name__ == "__main__":
    main()
