"""Group-robust training: a bandit, a toy of siblings, three terms on a small network and on a language model.

Each part says beforehand what it claims. Parts, and what they cost on one core:

- `bandit`, 20 CPU seconds: does the worst of two groups that share a policy rise, and where must the weight stand?
- `siblings`, 20 CPU seconds: does a reward for equal answers to siblings help where only one of them is labeled?
- `families`, 30 CPU seconds: do reweighting, the worst case and invariance lead to one result?
- `text`, 3 CPU minutes: do they so in `RobustSFTTrainer`, on a transformer, where a token gives the label away?

    python benchmarks/robust.py bandit siblings families text
"""

import argparse
import json
import tempfile
import time
from pathlib import Path

import numpy as np
import torch
from torch import nn

from trl_trust.robust.consistency import SiblingAnswers
from trl_trust.robust.terms import Reader, ascend, reversal
from trl_trust.robust.weights import group_means, raise_groups, row_weights, shortfall


# --------------------------------------------------------------------------------------------------------------------
# Bandit. One softmax over three arms. Group A, 90 % of the prompts, is paid (1, 0, .9) and group B (0, 1, .85): the
# third arm is good for both, the first best on average. 20 prompts x 8 samples a step, plain SGD at .05, eta .05,
# 3,000 steps; the figures are means over the last 500 and over the seeds. Refuted: if under `scale_rewards="group"`
# weights on advantages lift B by less than .2 above unweighted, or cost more than .1 of the average; or if weights on
# *rewards*, which TRL's normalization undoes, lift B to .1 or more there.
# --------------------------------------------------------------------------------------------------------------------

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


def bandit_part(seeds: int):
    head = "| scale_rewards | weights on | weighting | A | B (range over seeds) | average |"
    lines, cells = [head, "|---|---|---|---|---|---|"], []
    for scale, place, weighting in ROWS:
        runs = np.array([bandit(scale, place, weighting, seed) for seed in range(seeds)])  # (seeds, 2)
        a, b = runs.mean(0)
        cells.append(dict(scale_rewards=scale, place=place, weighting=weighting, runs=runs.round(4).tolist()))
        name = place if weighting else "none"
        lines.append(f"| {scale} | {name} | {weighting} | {a:.3f} | {ranged(runs[:, 1])} | {0.9 * a + 0.1 * b:.3f} |")
    return lines, cells


# --------------------------------------------------------------------------------------------------------------------
# Siblings. A logistic policy on a core feature, which is the label, and a shortcut that agrees 95 times in 100, starts
# at (.3, 1.5), on the shortcut. Half of the prompts are labeled, half are unlabeled siblings of them with the
# shortcut turned over. 10 + 10 prompts x 8 samples a step, group-normalized advantages, SGD at .05, 2,000 steps.
# Refuted: if a consistency reward does not halve the disagreement of siblings that is left without it, or costs any
# accuracy on labeled prompts.
# --------------------------------------------------------------------------------------------------------------------


def siblings(weight, seed, steps=2000, prompts=10, samples=8, lr=0.05):
    """Disagreement of siblings, accuracy where the shortcut agrees 95 in 100, and where it does in half: (3,)."""
    rng = np.random.default_rng(seed)
    w, answers = np.array([0.3, 1.5]), SiblingAnswers(0.1)
    chance = lambda x: 1 / (1 + np.exp(-x @ w))
    for _ in range(steps):
        core = rng.choice([-1, 1], prompts)
        short = np.where(rng.random(prompts) < 0.95, core, -core)
        x = np.concatenate([np.stack([core, short], 1), np.stack([core, -short], 1)]).astype(float)  # (2 prompts, 2)
        given = (rng.random((len(x), samples)) < chance(x)[:, None]).astype(int)
        rows = [[(f"{c:+.0f}", f"{s:+.0f}", str(y)) for y in ys] for (c, s), ys in zip(x, given, strict=True)]
        agree = np.array([[r or 0.0 for r in answers.rewards(row)] for row in rows])
        right = given == (x[:, :1] > 0)
        rewards = np.where(np.arange(len(x))[:, None] < prompts, right, 0.0) + weight * agree
        answers.update(row for one in rows for row in one)
        advantages = (rewards - rewards.mean(1, keepdims=True)) / (rewards.std(1, ddof=1, keepdims=True) + 1e-4)
        slope = (advantages * (given - chance(x)[:, None])).mean(1)  # (2 prompts,)
        w += lr * (slope @ x) / len(x)
    p, q = chance(np.array([[1.0, 1.0]]))[0], chance(np.array([[1.0, -1.0]]))[0]  # core +: shortcut agrees, or not
    return p * (1 - q) + q * (1 - p), 0.95 * p + 0.05 * q, (p + q) / 2


def siblings_part(seeds: int):
    lines = ["| weight of the consistency reward | disagreement | accuracy | balanced |", "|---|---|---|---|"]
    cells = []
    for weight in (0.0, 0.1, 0.25, 1.0):
        runs = np.array([siblings(weight, seed) for seed in range(seeds)])
        cells.append(dict(weight=weight, runs=runs.round(4).tolist()))
        lines.append(f"| {weight:g} | {' | '.join(f'{x:.3f}' for x in runs.mean(0))} |")
    return lines, cells


# --------------------------------------------------------------------------------------------------------------------
# Families. The label in four noisy features (sd 1.2), a shortcut in two clean ones that agrees 95 times in 100 in
# training and in half of the tests; an MLP 6-32-2, 4,000 rows, 400 full-batch steps of Adam at 3e-3. Four groups:
# label and shortcut. Rows, rate, weight 4 and no clean loss in the worst case were chosen on seeds 0 to 2. Refuted:
# if a term lifts the worst group by less than .05.
# --------------------------------------------------------------------------------------------------------------------

FAMILIES = ("nothing", "reweight", "worst_case", "invariance", "invariance, marginal")


def families(term, seed, steps=400, n=4000, lr=3e-3, eta=0.1, radius=2.5, ascents=2, weight=4.0):
    """Accuracy of the worst group, of all with an idle shortcut, and of all where it agrees 95 in 100: (3,)."""
    torch.manual_seed(seed)
    rng = np.random.default_rng(seed)

    def draw(n, agreement):
        y = rng.integers(0, 2, n)
        s = np.where(rng.random(n) < agreement, y, 1 - y)
        x = np.concatenate([(2 * y - 1)[:, None] + 1.2 * rng.standard_normal((n, 4)), np.tile(2 * s - 1, (2, 1)).T], 1)
        return torch.tensor(x, dtype=torch.float32), torch.tensor(y), torch.tensor(s)

    x, y, s = draw(n, 0.95)
    body, head = nn.Sequential(nn.Linear(6, 32), nn.ReLU()), nn.Linear(32, 2)
    loss_of = lambda x: nn.functional.cross_entropy(head(body(x)), y, reduction="none")  # (n,)
    optimizer = torch.optim.Adam([*body.parameters(), *head.parameters()], lr=lr)
    groups, q = 2 * y + s, torch.full((4,), 0.25, dtype=torch.float64)
    reader = Reader(32, 2, 2 if term == "invariance" else 0, steps=3) if term.startswith("invariance") else None
    for step in range(steps):
        hidden = body(x)
        losses = nn.functional.cross_entropy(head(hidden), y, reduction="none")
        if term == "reweight":
            q = raise_groups(q, group_means(losses.detach().double(), groups, 4)[0], eta)
            losses = losses * row_weights(q, groups, "frequency").float()
        if term == "worst_case":
            delta = torch.zeros_like(x)
            for _ in range(ascents):
                delta.requires_grad_()
                (grad,) = torch.autograd.grad(loss_of(x + delta).sum(), delta)
                grad[:, :4] = 0  # the shortcut alone is moved
                delta = ascend(delta.detach(), grad, torch.full((n,), radius / ascents))
            losses = loss_of(x + delta)
        loss = losses.mean()
        if reader is not None:
            features = hidden / (hidden.square().mean(1, keepdim=True) + 1e-6).sqrt()
            reader.fit(features, y, s)
            loss = loss - weight * reversal(step / steps) * reader.loss(features, y, s)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    with torch.no_grad():
        right = lambda x, y: (head(body(x)).argmax(1) == y).float()
        tx, ty, ts = draw(10_000, 0.5)
        found = right(tx, ty)
        worst = min(found[2 * ty + ts == g].mean().item() for g in range(4))
        return worst, found.mean().item(), right(*draw(10_000, 0.95)[:2]).mean().item()


def families_part(seeds: int):
    lines = ["| term | worst group (range over seeds) | balanced | in distribution |", "|---|---|---|---|"]
    cells = []
    for term in FAMILIES:
        runs = np.array([families(term, seed) for seed in range(seeds)])
        cells.append(dict(term=term, runs=runs.round(4).tolist()))
        lines.append(f"| {term} | {ranged(runs[:, 0])} | {' | '.join(f'{x:.3f}' for x in runs.mean(0)[1:])} |")
    return lines, cells


# --------------------------------------------------------------------------------------------------------------------
# Text. Nine words, each for the label 7 times in 10, behind a token for the site, which agrees with the label 95 times
# in 100 in training. A Llama of 1 layer and 32 dimensions, 300 updates of 64 rows, completion-only SFT. What the best
# reader of the training distribution does: it follows the site against up to three words. Settings were chosen on seed
# 100. Claim: each term lifts the worst group (label and site; balanced test) by .05 or more, mean of three seeds.
# Expected not to: the worst case over *all* tokens, which on seed 100 made things worse.
# --------------------------------------------------------------------------------------------------------------------

SITES = ["site0", "site1"]
TEXT = {
    "nothing": {},
    "reweight": dict(terms=["reweight"], group_column="group"),
    "worst_case, the site's tokens, mix 0": dict(terms=["worst_case"], radius=4.0, mix=0.0, perturb_words=SITES),
    "worst_case, the site's tokens, mix .5": dict(terms=["worst_case"], radius=4.0, perturb_words=SITES),
    "worst_case, all tokens": dict(terms=["worst_case"], radius=0.5),
    "invariance": dict(terms=["invariance"], group_column="site", condition_on="label", invariance_weight=3.0),
    "invariance, marginal": dict(terms=["invariance"], group_column="site", invariance_weight=3.0),
}


def text_rows(n, agreement, seed):
    rng, rows = np.random.default_rng(seed), []
    for _ in range(n):
        y = int(rng.integers(2))
        s = y if rng.random() < agreement else 1 - y
        words = [f"{'bg'[y if rng.random() < 0.7 else 1 - y]}{rng.integers(20)}" for _ in range(9)]
        prompt, label = " ".join([SITES[s], *words, "?"]), ("bad", "good")[y]
        rows.append({"prompt": prompt, "completion": f" {label}", "label": y, "site": s, "group": f"{y}{s}"})
    return rows


def text_tokenizer():
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = ["<pad>", "<eos>", "<unk>", *(f"{c}{i}" for c in "gb" for i in range(20)), *SITES, "?", "bad", "good"]
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>")


def text(settings, seed, steps=300):
    """Accuracy of the worst group, balanced, in distribution, and CPU seconds of training: (4,)."""
    from datasets import Dataset
    from transformers import LlamaConfig, LlamaForCausalLM

    from trl_trust import RobustSFTConfig, RobustSFTTrainer

    torch.manual_seed(seed)
    tokenizer = text_tokenizer()
    size = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=1, num_attention_heads=2)
    special = dict(pad_token_id=0, eos_token_id=1, bos_token_id=1, max_position_embeddings=32)
    model = LlamaForCausalLM(LlamaConfig(vocab_size=len(tokenizer), **size, **special))
    with tempfile.TemporaryDirectory() as folder:
        args = RobustSFTConfig(
            output_dir=folder, max_steps=steps, learning_rate=3e-3, lr_scheduler_type="constant", seed=seed,
            per_device_train_batch_size=64, use_cpu=True, bf16=False, gradient_checkpointing=False,
            report_to="none", save_strategy="no", logging_strategy="no", disable_tqdm=True, **settings,
        )  # fmt: skip
        data = Dataset.from_list(text_rows(8000, 0.95, seed))
        trainer = RobustSFTTrainer(model, args, train_dataset=data, processing_class=tokenizer)
        seconds = time.process_time()
        trainer.train()
        seconds = time.process_time() - seconds
    model.eval()
    bad, good = tokenizer.convert_tokens_to_ids(["bad", "good"])

    def right(rows):
        ids = torch.tensor([tokenizer(row["prompt"])["input_ids"] for row in rows])  # (n, 11)
        with torch.no_grad():
            logits = model(ids).logits[:, -1]
        return ((logits[:, good] > logits[:, bad]).long() == torch.tensor([row["label"] for row in rows])).float()

    rows = text_rows(4000, 0.5, 10_000 + seed)
    found, of = right(rows), np.array([row["group"] for row in rows])
    worst = min(found[of == group].mean().item() for group in ("00", "01", "10", "11"))
    return worst, found.mean().item(), right(text_rows(2000, 0.95, 20_000 + seed)).mean().item(), seconds


def text_part(seeds: int):
    head = "| term | worst group (range over seeds) | above nothing, each seed | balanced | in distribution | CPU s |"
    lines, cells = [head, "|---|---|---|---|---|---|"], []
    for term, settings in TEXT.items():
        runs = np.array([text(settings, seed) for seed in range(seeds)])
        cells.append(dict(term=term, settings=settings, runs=runs.round(4).tolist()))
        gain = runs[:, 0] - np.array(cells[0]["runs"])[:, 0]
        each = ", ".join(f"{x:+.3f}" for x in gain) if settings else ""
        rest = " | ".join(f"{x:.3f}" for x in runs.mean(0)[1:3])
        lines.append(f"| {term} | {ranged(runs[:, 0])} | {each} | {rest} | {runs[:, 3].mean():.1f} |")
        print(lines[-1], flush=True)
    return lines, cells


def ranged(values: np.ndarray) -> str:
    return f"{values.mean():.3f} ({values.min():.3f} to {values.max():.3f})"


PARTS = {
    "bandit": (bandit_part, 5),
    "siblings": (siblings_part, 5),
    "families": (families_part, 5),
    "text": (text_part, 3),
}


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="*", choices=[*PARTS, []], default=["bandit", "siblings", "families"])
    parser.add_argument("--seeds", type=int, help="default: 5, and 3 for text")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results" / "robust")
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    torch.set_num_threads(1)
    for name in args.parts:
        part, seeds = PARTS[name]
        seconds = time.process_time()
        lines, cells = part(args.seeds or seeds)
        print(f"{name}, {time.process_time() - seconds:.0f} CPU s", *lines, sep="\n", flush=True)
        (args.out / f"{name}.md").write_text("\n".join(lines) + "\n")
        record = {"seeds": args.seeds or seeds, "cells": cells}
        (args.out / f"{name}.json").write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    main()
