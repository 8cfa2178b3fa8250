"""RLAD and VPD on the quickstart task: what a step costs, what it holds, and whether a teacher helps.

    OMP_NUM_THREADS=1 python benchmarks/distill.py [--only rlad/learn vpd/cost ...] [--seeds 0 1 2] [--smoke]

Each cell is appended to `benchmarks/results/distill.json` as soon as it is there; cells that are there are not run
again. `--smoke` runs every cell in toy sizes and writes nothing.

- `rlad/cost`: rollout and update of RLAD over the same of stock GRPO plus one forward of the teacher, interleaved.
- `rlad/memory`: what scoring a rollout with a teacher adds to the peak of a process, by size of the vocabulary,
  through the fused head and, for comparison, through plain logits.
- `vpd/cost`: optimizer steps of VPD, five M-steps to an E-step, over as many of stock GRPO.
- `rlad/learn`: stock GRPO, RLAD with a teacher of the same family that was trained longer on cleaner demonstrations,
  and RLAD at alpha=1, which is GRPO with RLAD's clip widths and aggregation. Settings are the quickstart's, untuned.
- `vpd/learn`: stock GRPO and VPD from a weak start that has learnt to read feedback, namely which column of an attempt
  was wrong. Learning rates, schedule and length were chosen on seed 100, which is not reported.

Times are of the process, not of the clock, so that other jobs disturb them little.
"""

import argparse
import os
import random
import resource
import statistics
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

import cells


os.environ.setdefault("HF_HUB_OFFLINE", "1")

import torch
from transformers import AutoModelForCausalLM, PrinterCallback, Qwen2Config, Qwen2ForCausalLM
from trl import GRPOConfig, GRPOTrainer

from trl_trust import RLADConfig, RLADTrainer, VPDConfig, VPDTrainer
from trl_trust.quickstart.model import build_model, build_start
from trl_trust.quickstart.run import TRAINING, last_reward, quiet
from trl_trust.quickstart.task import build_tokenizer, demonstrate, evaluate, exact_answer_reward, pairs, problems


RESULTS = cells.RESULTS / "distill.json"
CLASSES = {"grpo": (GRPOTrainer, GRPOConfig), "rlad": (RLADTrainer, RLADConfig), "vpd": (VPDTrainer, VPDConfig)}

# A weak start can be told which column was wrong; the teacher's prompt is the prompt behind it.
READER = dict(steps=1500, slip=0.95, drop_carry=0.95)
# From such a start nearly all prompts have no right response, which the paper leaves out: they count here.
READING = dict(
    teacher_template="{feedback}\n{prompt}",
    use_successful_as_teacher=False,
    all_wrong="use",
    distillation_is_clip=2.0,
)
ADAPTED = dict(learning_rate=2e-4, lr_scheduler_type="linear", **READING)
# name -> method, fields; `grpo` appears at two rates, since VPD's was chosen too
RLAD_RUNS = {"grpo": ("grpo", {}), "rlad": ("rlad", {}), "rlad alpha=1": ("rlad", {"alpha": 1.0})}
VPD_RUNS = {
    "grpo": ("grpo", {}),
    "grpo 6e-4": ("grpo", {"learning_rate": 6e-4}),
    "vpd": ("vpd", {"e_step_every": 1, "e_step_mode": "extra", **ADAPTED}),
    "vpd 5 M-steps an E-step": ("vpd", {"e_step_every": 5, "e_step_mode": "replace", **ADAPTED}),
    "vpd no E-steps": ("vpd", {"e_step_every": 0, **ADAPTED}),
    "vpd constant rate, twice as long": (
        "vpd",
        {"e_step_every": 1, "e_step_mode": "extra", **ADAPTED, "lr_scheduler_type": "constant_with_warmup"},
    ),
    "grpo twice as long": ("grpo", {}),
}
SIZES = dict(
    rlad_steps=160, vpd_steps=60, teacher_steps=900, reader=READER, rounds=12, vocabularies=(4096, 32768, 131072)
)
SMOKE = dict(
    rlad_steps=8, vpd_steps=8, teacher_steps=20, reader={**READER, "steps": 20}, rounds=2, vocabularies=(1024, 4096)
)


# -- feedback ---------------------------------------------------------------------------------------------------------


def verdict(a: int, b: int, text: str) -> str:
    """What a teacher would say about a scratchpad: the first column that is wrong, and nothing on how to mend it."""
    if text.partition("#")[1:] == ("#", str(a + b)):
        return "right"
    columns = lambda scratchpad: scratchpad.split("#")[0].split(",")
    right = demonstrate(a, b, random.Random(0), drop_carry=0.0, slip=0.0)
    for name, got, expected in zip(("ones", "tens"), columns(text), columns(right)):  # noqa: B905  may be cut short
        if got != expected:
            return f"{name} wrong"
    return "sum wrong" if len(columns(text)) == 2 else "steps wrong"


def name_the_column(prompts, completions, **kwargs) -> list[str]:
    numbers = [map(int, prompt.rstrip("=").split("+")) for prompt in prompts]
    return [verdict(*pair, text) for pair, text in zip(numbers, completions, strict=True)]


def write_reader(path, *, seed: int, steps: int, slip: float, drop_carry: float) -> str:
    """Write a policy that imitates bad demonstrations; and, where a verdict precedes the prompt, has the column right
    that it names."""
    tokenizer, rng, train = build_tokenizer(), random.Random(seed), pairs("train")
    model = build_model(tokenizer, seed=seed)
    optimizer = torch.optim.AdamW(model.parameters(), lr=5e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=5e-3, total_steps=steps + 1)
    attempt = lambda a, b: demonstrate(a, b, rng, drop_carry=drop_carry, slip=slip)
    for _ in range(steps):
        texts, starts = [], []
        for _ in range(64):
            a, b = rng.choice(train)
            prompt, text = f"{a}+{b}=", attempt(a, b)
            if rng.random() < 0.5:
                said = verdict(a, b, text)
                prompt = READING["teacher_template"].format(feedback=said, prompt=prompt)
                column = {"ones wrong": 0, "tens wrong": 1}.get(said)
                right = demonstrate(a, b, rng, drop_carry=0.0, slip=0.0).split("#")[0].split(",")
                tries = (attempt(a, b) for _ in range(200))
                if column is not None:
                    text = next((t for t in tries if t.split("#")[0].split(",")[column] == right[column]), text)
            texts.append(prompt + text + tokenizer.eos_token), starts.append(len(prompt))
        inputs = tokenizer(texts, return_tensors="pt", padding=True, padding_side="right")
        labels = inputs["input_ids"].masked_fill(inputs["attention_mask"] == 0, -100)  # (B, P+T)
        for row, start in zip(labels, starts, strict=True):
            row[:start] = -100
        model(**inputs, labels=labels).loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step(), schedule.step(), optimizer.zero_grad()
    model.eval().save_pretrained(path)
    tokenizer.save_pretrained(path)
    return str(path)


# -- learning ---------------------------------------------------------------------------------------------------------


def build(method: str, start: str, folder: str, **fields):
    """A trainer on the task. The tokenizer is built anew: AutoTokenizer turns a saved one into one without spaces."""
    trainer_class, config_class = CLASSES[method]
    extra = {"feedback_func": name_the_column} if method == "vpd" else {}
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(start, dtype=torch.float32),
        reward_funcs=exact_answer_reward,
        args=config_class(output_dir=folder, **{**TRAINING, **fields}),
        train_dataset=problems("train", seed=fields.get("seed", 42)),
        processing_class=build_tokenizer(),
        **extra,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def learn(method: str, start: str, folder: str, **fields) -> dict:
    trainer = build(method, start, folder, **fields)
    began = time.process_time()
    trainer.train()
    seconds = time.process_time() - began
    history = [entry for entry in trainer.state.log_history if "loss" in entry]
    last = {k: v for k, v in history[-1].items() if k.startswith(("rlad/", "vpd/", "trust/kl", "entropy"))}
    rewards = [round(entry["reward"], 4) for entry in history if "reward" in entry]
    found = evaluate(trainer.model, build_tokenizer(), problems("test"))
    return {
        "rewards": rewards,  # of each rollout, before the updates on it
        "last": last_reward(history, 5),
        **found,
        "cpu_seconds": round(seconds, 1),
        "steps": fields["max_steps"],
        "log": last,
    }


def rlad_learn(seed: int, folder: str, sizes: dict) -> dict:
    start = str(build_start(Path(folder, "start"), seed=seed))
    options = dict(drop_carry=0.0, slip=0.02, steps=sizes["teacher_steps"])
    teacher = str(build_start(Path(folder, "teacher"), seed=seed + 1000, **options))
    score = lambda path: evaluate(AutoModelForCausalLM.from_pretrained(path), build_tokenizer(), problems("test"))
    results = {"start": score(start), "teacher": score(teacher)}
    for name, (method, fields) in RLAD_RUNS.items():
        own = {"teacher_model_name_or_path": teacher} if fields.get("alpha", 0.5) < 1 and method == "rlad" else {}
        results[name] = learn(method, start, folder, seed=seed, max_steps=sizes["rlad_steps"], **own, **fields)
    goal = results["grpo"]["last"]
    for name in ("rlad", "rlad alpha=1", "grpo"):
        results[name]["rollouts_to_grpos_last"] = first_to_reach(results[name]["rewards"], goal)
    return results


def first_to_reach(rewards: list[float], goal: float, window: int = 5) -> int | None:
    """Rollouts after which the mean of the last `window` rewards is at least `goal`."""
    means = [sum(rewards[i - window : i]) / window for i in range(window, len(rewards) + 1)]
    return next((i + window for i, mean in enumerate(means) if mean >= goal), None)


def vpd_learn(seed: int, folder: str, sizes: dict) -> dict:
    start = write_reader(Path(folder, "start"), seed=seed, **sizes["reader"])
    results = {"start": evaluate(AutoModelForCausalLM.from_pretrained(start), build_tokenizer(), problems("test"))}
    for name, (method, fields) in VPD_RUNS.items():
        steps = sizes["vpd_steps"] * (2 if "twice as long" in name else 1)
        results[name] = learn(method, start, folder, seed=seed, max_steps=steps, **fields)
    return results


# -- cost -------------------------------------------------------------------------------------------------------------


class Cycle:
    """Rollouts and updates of one trainer, by hand, so that two of them can be interleaved."""

    def __init__(self, method: str, start: str, folder: str, **fields):
        fixed = dict(max_steps=10**6, logging_steps=10**9, seed=0, generation_kwargs={"min_new_tokens": 24})
        self.trainer = build(method, start, folder, **fixed, **fields)
        self.trainer.model.train()
        self.trainer.current_gradient_accumulation_steps = 1
        self.trainer.create_optimizer_and_scheduler(10**6)
        self.batches = iter(self.trainer.get_train_dataloader())
        self.generating = 0.0
        generate = self.trainer._generate

        def timed(prompts):
            began = time.process_time()
            out = generate(prompts)
            self.generating += time.process_time() - began
            return out

        self.trainer._generate = timed

    def steps(self, n: int) -> tuple[float, float]:
        """Seconds of `n` optimizer steps in all, and without sampling."""
        self.generating, began = 0.0, time.process_time()
        for _ in range(n):
            self.trainer.training_step(self.trainer.model, next(self.batches), None)
            self.trainer.optimizer.step()
            self.trainer.optimizer.zero_grad()
            self.trainer.state.global_step += 1
        total = time.process_time() - began
        return total, total - self.generating


def quartiles(ratios: list[float]) -> dict:
    low, middle, high = statistics.quantiles(ratios, n=4)
    return {"median": round(middle, 4), "quartiles": [round(low, 4), round(high, 4)], "rounds": len(ratios)}


def rlad_cost(seed: int, folder: str, sizes: dict) -> dict:
    start = str(build_start(Path(folder, "start"), seed=0, steps=20))
    teacher = str(build_start(Path(folder, "teacher"), seed=1, steps=20, hidden_size=128))
    fields = dict(steps_per_generation=2)
    stock = Cycle("grpo", start, folder, **fields)
    ours = Cycle("rlad", start, folder, teacher_model_name_or_path=teacher, **fields)
    model = ours.trainer.teacher_model

    def forward():
        parts = ours.trainer._buffered_inputs
        began = time.process_time()
        for part in parts:
            ours.trainer.rollout_logps(part, model)
        return time.process_time() - began

    stock.steps(2), ours.steps(2), forward()
    totals, updates = [], []
    for _ in range(sizes["rounds"]):
        grpo, rlad, teacher = stock.steps(2), ours.steps(2), forward()
        totals.append(rlad[0] / (grpo[0] + teacher))
        updates.append(rlad[1] / (grpo[1] + teacher))
    return {"total": quartiles(totals), "without_sampling": quartiles(updates)}


def vpd_cost(seed: int, folder: str, sizes: dict) -> dict:
    start = write_reader(Path(folder, "start"), seed=0, **{**sizes["reader"], "steps": 20})
    results = {}
    for name in ("replace", "extra"):
        fields = dict(steps_per_generation=2, max_grad_norm=0.0)
        stock = Cycle("grpo", start, folder, **fields)
        ours = Cycle("vpd", start, folder, e_step_every=5, e_step_mode=name, **READING, **fields)
        n = 6 if name == "replace" else 10  # whole cycles, whole rollouts
        # an untrained start has no success: half of the outcomes are made ones, so that E-steps are made
        for cycle in (stock, ours):
            cycle.trainer.reward_funcs = [
                lambda completions, **kwargs: [float(i % 2) for i in range(len(completions))]
            ]
        stock.steps(n), ours.steps(n)
        totals, updates = [], []
        for _ in range(max(2, sizes["rounds"] // 2)):
            grpo, vpd = stock.steps(n), ours.steps(n)
            totals.append(vpd[0] / grpo[0])
            updates.append(vpd[1] / grpo[1])
        skipped = ours.trainer._metrics["train"]["vpd/e_skipped"]
        results[name] = {
            "total": quartiles(totals),
            "without_sampling": quartiles(updates),
            "e_steps": len(skipped),
            "skipped": sum(skipped),
        }
    return results


def rlad_memory(seed: int, folder: str, sizes: dict) -> dict:
    """MiB by which the peak of a fresh process grows."""
    results = {}
    for vocabulary in sizes["vocabularies"]:
        command = [sys.executable, __file__, "--memory-of"]
        measure = lambda how, c=command, v=vocabulary: subprocess.run(
            [*c, how, str(v), folder], capture_output=True, text=True, check=True
        )
        results[vocabulary] = {how: float(measure(how).stdout.split()[-1]) for how in ("fused", "logits")}
    return results


def memory_of(how: str, vocabulary: int, folder: str) -> float:
    """Score 64 x 32 tokens with a teacher of this vocabulary, whose weights are small beside its logits."""
    tokenizer = build_tokenizer()
    start = str(build_start(Path(folder, "student"), steps=1, hidden_size=64))
    config = dict(hidden_size=8, intermediate_size=16, num_hidden_layers=1, num_attention_heads=1)
    teacher = Qwen2ForCausalLM(Qwen2Config(vocab_size=vocabulary, num_key_value_heads=1, **config))
    fields = dict(per_device_train_batch_size=64, steps_per_generation=1, max_steps=1)
    ids = torch.randint(3, len(tokenizer), (64, 32))
    ones = torch.ones_like(ids)
    tensors = dict(
        prompt_ids=ids[:, :8], prompt_mask=ones[:, :8], completion_ids=ids[:, 8:], completion_mask=ones[:, 8:]
    )
    trainer_class, config_class = CLASSES["rlad"]
    trainer = trainer_class(
        model=AutoModelForCausalLM.from_pretrained(start),
        reward_funcs=exact_answer_reward,
        args=config_class(output_dir=folder, **{**TRAINING, **fields}),
        train_dataset=problems("train", 64),
        processing_class=tokenizer,
        teacher_model=teacher,
    )
    trainer.model.train()
    with torch.no_grad():
        teacher.model(ids[:, :4])  # the first forward of a process allocates for itself
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if how == "fused":
        trainer.rollout_logps(tensors, trainer.teacher_model)
    else:
        with torch.no_grad():
            teacher(ids, attention_mask=ones).logits[:, 7:-1].log_softmax(-1).gather(2, ids[:, 8:, None])
    return (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before) / 1024


# -- cells ------------------------------------------------------------------------------------------------------------

CELLS = {
    "rlad/cost": (rlad_cost, False),  # the second: whether a seed makes a difference
    "rlad/memory": (rlad_memory, False),
    "vpd/cost": (vpd_cost, False),
    "rlad/learn": (rlad_learn, True),
    "vpd/learn": (vpd_learn, True),
}


def show(cell: dict) -> None:
    print(f"\n{cell['cell']}" + (f", seed {cell['seed']}" if cell["seed"] is not None else ""))
    for name, values in cell["results"].items():
        kept = {k: v for k, v in values.items() if k not in ("rewards", "log")}
        print(f"  {name:34}", {k: round(v, 3) if isinstance(v, float) else v for k, v in kept.items()})


@contextmanager
def scratch_folder():
    with TemporaryDirectory() as folder, quiet():
        yield folder


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", nargs="+", choices=CELLS, default=list(CELLS))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--smoke", action="store_true", help="toy sizes, nothing written")
    parser.add_argument("--report", action="store_true", help="print what is there and run nothing")
    parser.add_argument("--memory-of", nargs=3, metavar=("HOW", "VOCABULARY", "FOLDER"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.memory_of:
        how, vocabulary, folder = args.memory_of
        with quiet():
            print(memory_of(how, int(vocabulary), folder))
        return
    for name in args.only:
        run, by_seed = CELLS[name]
        for seed in args.seeds if by_seed else [None]:
            found = next((c for c in cells.load(RESULTS)["cells"] if (c["cell"], c["seed"]) == (name, seed)), None)
            if args.report:
                if found:
                    show(found)
                continue
            if found is None or args.smoke:
                with scratch_folder() as folder:
                    results = run(seed or 0, folder, SMOKE if args.smoke else SIZES)
                found = {"cell": name, "seed": seed, "results": results}
                if not args.smoke:
                    cells.add(RESULTS, found)
            show(found)
            if args.smoke:
                break


if __name__ == "__main__":
    main()
