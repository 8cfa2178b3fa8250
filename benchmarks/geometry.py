"""The geometry room measured: is anything wrong, how fast is it, and does a policy learn from its rewards?

    python benchmarks/geometry.py scenes            # 1,000 scenes: every determined goal against its diagram
    python benchmarks/geometry.py speed             # verified problems a CPU second, text and checker included
    python benchmarks/geometry.py pictures          # a contact sheet
    python benchmarks/geometry.py train             # 3 seeds x 3 arms, about 1.5 CPU minutes a run
    python benchmarks/geometry.py --report

`train`: a Qwen2 of 0.2M parameters reads questions of one to three steps in the terse form, `AC=BC ABC=65 ACB?`. It
has imitated demonstrations whose answer is wrong four times in ten, and goes on by GRPO: TRL's GRPOTrainer with
`geometry_reward` (`grpo`), the same with `geometry_step_reward` at half its weight (`grpo_steps`), and this package's
DPPO with the answer alone (`dppo`). 4 mini-batches a generation.

Stated beforehand: pass@1 on 100 questions whose canonical forms (premises, numbers and goal, whatever the names) were
never trained on rises by at least .2 in every run, and ends above the baseline that answers each pattern, the question
without its numbers, with its most frequent answer in the training set. If it does not, the reward does not train, or
the policy learned its answers by heart. The step reward is expected to raise the share of proofs whose steps are
all good; that the answers gain by it is not expected.
"""

import argparse
import collections
import random
import re
import statistics
import tempfile
import time
from pathlib import Path

import cells


OUT = cells.RESULTS / "geometry.json"
SETTINGS = {
    "train_rows": 700,
    "test_rows": 100,
    "imitation_steps": 500,
    "wrong": 0.4,
    "generations": 60,
    "batch": 128,
    "num_generations": 8,
    "steps_per_generation": 4,
    "learning_rate": 3e-4,
}
ARMS = ("grpo", "grpo_steps", "dppo")
CHARACTERS = "0123456789ABCDEFGHIJKL=|_+-*/~;?\\{}() abcdefghijklmnopqrstuvwxyz"
TERSE = dict(style="terse", min_steps=1, max_steps=3, kinds=("angle",), clauses=(0, 1), min_premise_ratio=0.3)
WORD = 48  # tokens of a completion


def scenes(n: int) -> dict:
    from trl_trust.tasks.geometry import Closure, draw
    from trl_trust.tasks.geometry.facts import holds
    from trl_trust.tasks.geometry.problems import goals

    began, found, deep, wrong, steps = time.process_time(), 0, 0, 0, 0
    for seed in range(n):
        scene = draw(seed, (3, 3))
        closure = Closure(scene.points, scene.premises)
        for fact, length, _ in goals(closure, ("angle", "length")):
            found, deep, wrong = found + 1, deep + (length >= 3), wrong + (not holds(fact, scene.points))
        wrong += sum(not holds(derived.fact, scene.points) for derived in closure.derived)
        steps += len(closure.derived)
    seconds = time.process_time() - began
    return {
        "cell": "scenes",
        "scenes": n,
        "goals": found,
        "of_3_steps": deep,
        "facts": steps,
        "wrong": wrong,
        "cpu_s": seconds,
    }


def speed(n: int) -> dict:
    from trl_trust.tasks.geometry.data import Settings, rows

    began = time.process_time()
    made = list(rows(n, 0, Settings(max_steps=30)))
    seconds = time.process_time() - began
    lengths = [row["proof_length"] for row in made]
    return {
        "cell": "speed",
        "rows": n,
        "cpu_s": round(seconds, 1),
        "rows_a_cpu_s": round(n / seconds, 2),
        "mean_length": round(statistics.fmean(lengths), 2),
        "longest": max(lengths),
        "premise_ratio": round(statistics.fmean(row["premise_ratio"] for row in made), 3),
        "tiers": dict(sorted(collections.Counter(row["tier"] for row in made).items())),
    }


def build_tokenizer():
    from trl_trust.tasks.base import character_tokenizer

    return character_tokenizer(CHARACTERS)


def imitate(rows: list[dict], tokenizer, seed: int):
    """A policy that proves as the rows do, and is wrong about the number as often as the settings say."""
    import torch

    from trl_trust.tasks.start import build_model

    rng = random.Random(seed)
    model = build_model(tokenizer, hidden_size=96, num_hidden_layers=2, num_attention_heads=3, seed=seed)
    steps = SETTINGS["imitation_steps"]
    optimizer = torch.optim.AdamW(model.parameters(), lr=3e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=3e-3, total_steps=steps + 1)
    for _ in range(steps):
        texts, asked = [], []
        for row in rng.choices(rows, k=64):
            said = row["trace"]
            if rng.random() < SETTINGS["wrong"]:
                wrong, right = str(5 * rng.randint(1, 34)), row["answer"]
                said = said.replace(f"={right};\\", f"={wrong};\\").replace(f"{{{right}}}", f"{{{wrong}}}")
            texts.append(f"{row['prompt']}{said}{tokenizer.eos_token}")
            asked.append(len(row["prompt"]))
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)
        for i, length in enumerate(asked):
            labels[i, :length] = -100
        model(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
    return model


def measure(model, tokenizer, rows: list[dict], samples: int = 8) -> dict:
    """pass@1 and the mean step reward of samples, and how many proofs have every step right."""
    import torch

    from trl_trust.tasks.geometry import geometry_reward, geometry_step_reward
    from trl_trust.tasks.sampling import sample

    model.eval()
    prompts = tokenizer([row["prompt"] for row in rows], return_tensors="pt", padding=True)
    with torch.no_grad():
        drawn = sample(
            model, **prompts, samples=samples, max_new_tokens=WORD, generator=torch.Generator().manual_seed(0)
        )
    texts = tokenizer.batch_decode(drawn.ids, skip_special_tokens=True)
    spread = [row for row in rows for _ in range(samples)]
    columns = {key: [row[key] for row in spread] for key in ("answer", "goal", "points", "premises", "solutions")}
    answers, steps = geometry_reward(texts, **columns), geometry_step_reward(texts, **columns)
    return {
        "pass@1": round(statistics.fmean(answers), 4),
        "step_reward": round(statistics.fmean(steps), 4),
        "whole_proofs": round(statistics.fmean(step == 1 for step in steps), 4),
        "false_claims": round(statistics.fmean(step < 0 for step in steps), 4),
    }


def majority(train: list[dict], test: list[dict]) -> float:
    """pass@1 of the most frequent answer of each pattern, the question without its numbers."""
    pattern = lambda row: re.sub(r"\d+(/\d+)?", "#", row["prompt"])
    answers = collections.defaultdict(collections.Counter)
    for row in train:
        answers[pattern(row)][row["answer"]] += 1
    right = [answers[pattern(r)].most_common(1)[0][0] == r["answer"] if answers[pattern(r)] else False for r in test]
    return round(statistics.fmean(right), 4)


def train(arm: str, start, tokenizer, rows: list[dict], test: list[dict], seed: int) -> dict:
    import copy

    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    from trl_trust import DPPOConfig, DPPOTrainer
    from trl_trust.tasks.geometry import geometry_reward, geometry_step_reward

    kind, config = (DPPOTrainer, DPPOConfig) if arm == "dppo" else (GRPOTrainer, GRPOConfig)
    rewards = [geometry_reward, geometry_step_reward] if arm == "grpo_steps" else [geometry_reward]
    reuse = SETTINGS["steps_per_generation"]
    args = config(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=SETTINGS["batch"] // reuse,
        num_generations=SETTINGS["num_generations"],
        steps_per_generation=reuse,
        gradient_accumulation_steps=1,
        max_steps=SETTINGS["generations"] * reuse,
        learning_rate=SETTINGS["learning_rate"],
        lr_scheduler_type="constant",
        max_completion_length=WORD,
        reward_weights=[1.0, 0.5][: len(rewards)],
        beta=0.0,
        seed=seed,
        logging_steps=reuse,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
    )
    began, model = time.process_time(), copy.deepcopy(start)
    before = measure(model, tokenizer, test)
    learner = kind(model, rewards, args, Dataset.from_list(rows), processing_class=tokenizer)
    learner.train()
    key = "rewards/geometry_reward/mean"
    after = measure(learner.model, tokenizer, test)
    return {
        "cell": arm,
        "seed": seed,
        "before": before,
        "after": after,
        "rise": round(after["pass@1"] - before["pass@1"], 4),
        "majority": majority(rows, test),
        "reward": [round(float(record[key]), 4) for record in learner.state.log_history if key in record],
        "cpu_s": round(time.process_time() - began, 1),
    }


def report(found: list[dict]) -> str:
    names = "arm", "seed", "pass@1 before", "after", "rise", "majority", "all steps right", "false claims"
    lines = [f"| {' | '.join(names)} |", f"|{'---|' * len(names)}"]
    for cell in (cell for cell in found if cell["cell"] in ARMS):
        one, two = cell["before"], cell["after"]
        lines.append(
            f"| {cell['cell']} | {cell['seed']} | {one['pass@1']:.3f} | {two['pass@1']:.3f} | {cell['rise']:+.3f} | "
            f"{cell['majority']:.3f} | {one['whole_proofs']:.3f} to {two['whole_proofs']:.3f} | "
            f"{one['false_claims']:.3f} to {two['false_claims']:.3f} |"
        )
    return "\n".join(lines)


def pictures(path: Path) -> Path:
    """The pictures of twelve problems, four in a row."""
    import json

    from PIL import Image

    from trl_trust.tasks.geometry import draw_picture, parse_fact
    from trl_trust.tasks.geometry.data import Settings
    from trl_trust.tasks.geometry.data import rows as make

    sheet = Image.new("RGB", (4 * 336, 3 * 336), "white")
    for i, row in enumerate(make(12, 5, Settings(kinds=("angle", "length", "area")))):
        facts = [parse_fact(fact) for fact in row["premises"]]
        drawn = draw_picture(json.loads(row["points"]), facts, parse_fact(row["goal"]))
        sheet.paste(drawn, (336 * (i % 4), 336 * (i // 4)))
    sheet.quantize(32).save(path, optimize=True)
    return path


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("part", nargs="?", default="train", choices=("scenes", "speed", "pictures", "train"))
    parser.add_argument("--n", type=int, help="scenes, or rows")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--arms", nargs="+", default=ARMS, choices=ARMS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--report", action="store_true", help="run nothing")
    args = parser.parse_args()
    if args.part == "pictures":
        print(pictures(cells.RESULTS / "geometry_pictures.png"))
        return
    cells.load(args.out, settings=SETTINGS)
    if args.report:
        print(report(cells.load(args.out, settings=SETTINGS)["cells"]))
        return
    if args.part != "train":
        cell = scenes(args.n or 1000) if args.part == "scenes" else speed(args.n or 300)
        cells.add(args.out, {"seed": 0, **cell}, settings=SETTINGS)
        print(cell)
        return
    from trl_trust.tasks.geometry.data import Settings
    from trl_trust.tasks.geometry.data import rows as make

    tokenizer, settings = build_tokenizer(), Settings(**TERSE, max_attempts=500)
    for seed in args.seeds:
        rows = list(make(SETTINGS["train_rows"], seed, settings))
        test = list(make(SETTINGS["test_rows"], 10_000, settings, split="test"))
        start = imitate(rows, tokenizer, seed)
        for arm in args.arms:
            cell = train(arm, start, tokenizer, rows, test, seed)
            cells.add(args.out, cell, settings=SETTINGS)
            print({key: value for key, value in cell.items() if key != "reward"}, flush=True)
    print(report(cells.load(args.out, settings=SETTINGS)["cells"]))


if __name__ == "__main__":
    main()
