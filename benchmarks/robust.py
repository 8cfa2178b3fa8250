"""Group weights on a bandit that two groups share: does the worst group rise, and where must the weight stand?

One softmax over three arms. Group A, 90 % of the prompts, is paid (1, 0, .9) and group B (0, 1, .85): the third arm is
good for both, the first best on average. 20 prompts x 8 samples a step, plain SGD at .05, eta .05, 3,000 steps; the
figures are means over the last 500 and over the seeds.

Said beforehand. Refuted: if under `scale_rewards="group"` weights on advantages lift B by less than .2 above
unweighted, or cost more than .1 of the average; or if weights on *rewards*, which TRL's normalization undoes, lift B
to .1 or more there.

    python benchmarks/robust.py            # 5 seeds
"""

import argparse
import json
from pathlib import Path

import numpy as np
import torch

from trl_trust.robust.weights import group_means, raise_groups, row_weights, shortfall


REWARDS = np.array([[1.0, 0.0, 0.9], [0.0, 1.0, 0.85]])  # (group, arm)
ROWS = [
    ("group", "unweighted", ""),
    ("group", "advantages", "frequency"),
    ("group", "advantages", "plain"),
    ("group", "rewards", "frequency"),
    ("none", "unweighted", ""),
    ("none", "advantages", "frequency"),
    ("none", "rewards", "frequency"),
]


def bandit(scale, place, weighting, seed, steps=3000, last=500, prompts=20, samples=8, lr=0.05, eta=0.05):
    """Mean reward of A and of B over the last steps, (2,), in expectation over the policy."""
    rng = np.random.default_rng(seed)
    logits, q = np.zeros(3), torch.tensor([0.5, 0.5], dtype=torch.float64)
    found = []
    for _ in range(steps):
        policy = np.exp(logits - logits.max())
        policy /= policy.sum()
        group = (rng.random(prompts) >= 0.9).astype(int)
        arms = rng.choice(3, size=(prompts, samples), p=policy)
        rewards = REWARDS[group[:, None], arms]  # (prompts, samples)
        weights = np.ones((prompts, samples))
        if place != "unweighted":
            rows = torch.from_numpy(np.repeat(group, samples))
            means, _ = group_means(torch.from_numpy(rewards.ravel()), rows, 2)
            q = raise_groups(q, shortfall(means), eta)
            weights = row_weights(q, rows, weighting).numpy().reshape(prompts, samples)
        if place == "rewards":
            rewards = rewards * weights
        advantages = rewards - rewards.mean(1, keepdims=True)
        if scale == "group":
            advantages /= rewards.std(1, ddof=1, keepdims=True) + 1e-4  # as TRL 1.16
        if place == "advantages":
            advantages = advantages * weights
        taken = np.bincount(arms.ravel(), weights=advantages.ravel(), minlength=3)
        logits += lr * (taken - advantages.sum() * policy) / advantages.size
        found.append(REWARDS @ policy)
    return np.mean(found[-last:], axis=0)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "robust")
    args = parser.parse_args()
    lines = [
        "| scale_rewards | weights on | weighting | A | B (range over seeds) | average |",
        "|---|---|---|---|---|---|",
    ]
    cells = []
    for scale, place, weighting in ROWS:
        runs = np.array([bandit(scale, place, weighting, seed) for seed in range(args.seeds)])  # (seeds, 2)
        a, b = runs.mean(0)
        cells.append(dict(scale_rewards=scale, place=place, weighting=weighting, runs=runs.round(4).tolist()))
        spread = f"{b:.3f} ({runs[:, 1].min():.3f} to {runs[:, 1].max():.3f})"
        name = place if weighting else "none"
        lines.append(f"| {scale} | {name} | {weighting} | {a:.3f} | {spread} | {0.9 * a + 0.1 * b:.3f} |")
        print(lines[-1], flush=True)
    args.out.mkdir(parents=True, exist_ok=True)
    (args.out / "bandit.md").write_text("\n".join(lines) + "\n")
    (args.out / "bandit.json").write_text(json.dumps({"seeds": args.seeds, "cells": cells}, indent=1) + "\n")


if __name__ == "__main__":
    main()
