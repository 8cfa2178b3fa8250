"""ERPD on the quickstart task: is the student nearer to its start than its teacher, at no lower reward?

    OMP_NUM_THREADS=1 python benchmarks/erpd.py --seeds 0 1 2

For each seed: a warm start (`base`), one frozen set of its rollouts, then teachers by each loss of stage 1 and
students by several signals of stage 2, each measured on 256 held-out problems: reward (pass@1), greedy reward,
entropy, and KL to base on the policy's own samples over the whole vocabulary. Each cell is appended to
`benchmarks/results/erpd.json` as soon as it is measured; students that are there already are passed over. Learning
rates and epochs were chosen on seed 100, which is not reported.
"""

import argparse
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import cells
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback

from trl_trust.distill.erpd import ERPDConfig, ERPDTeacherTrainer, ERPDTrainer
from trl_trust.frozen.logps import completion_logps
from trl_trust.frozen.sampling import RolloutsConfig, write_rollouts
from trl_trust.frozen.store import load_rollouts
from trl_trust.quickstart.model import build_start
from trl_trust.quickstart.run import quiet
from trl_trust.quickstart.task import evaluate, exact_answer_reward, problems


ROLLOUTS = dict(
    num_prompts=512, num_generations=8, max_completion_length=24, prompts_per_part=64, logps_batch_size=256
)
TRAINING = dict(
    per_device_train_batch_size=256,
    lr_scheduler_type="constant_with_warmup",
    warmup_steps=5,
    use_cpu=True,
    bf16=False,
    gradient_checkpointing=False,
    save_strategy="no",
    report_to="none",
    disable_tqdm=True,
)
TEACHER = dict(num_train_epochs=8)
STUDENT = dict(num_train_epochs=8, learning_rate=3e-4)
# name -> what is added to TEACHER; `unlearned` is the twin of `mse`
TEACHERS = {
    "mse": {"learning_rate": 1e-3},
    "unlearned": {"learning_rate": 1e-3, "unlearn": True},
    "ce": {"learning_rate": 1e-3, "teacher_loss": "ce", "teacher_beta": 0.5},
    "sapo": {"learning_rate": 3e-4, "teacher_loss": "sapo"},
}
# name -> its teacher, and what is added to STUDENT
STUDENTS = {
    "mse/weak": ("mse", {"signal": "weak", "staleness_clip": 2.0, "beta": 0.3}),
    "mse/weak, longer": ("mse", {"signal": "weak", "staleness_clip": 2.0, "beta": 0.5, "num_train_epochs": 16}),
    "mse/weak, no staleness weight": ("mse", {"signal": "weak", "staleness_clip": None, "beta": 0.3}),
    "mse/strong": ("mse", {"signal": "strong", "staleness_clip": 2.0}),
    "ce/strong": ("ce", {"signal": "strong", "staleness_clip": 2.0}),
    "sapo/strong": ("sapo", {"signal": "strong", "staleness_clip": 2.0}),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--students", nargs="+", default=list(STUDENTS))
    parser.add_argument("--output", type=Path, default=cells.RESULTS / "erpd.json")
    args = parser.parse_args()
    for seed in args.seeds:
        with TemporaryDirectory() as folder, quiet():
            run_seed(seed, Path(folder), args.students, args.output)
    table(args.output)


def run_seed(seed: int, folder: Path, students: list[str], output: Path) -> None:
    there = {c["cell"] for c in cells.load(output)["cells"] if c["seed"] == seed}
    students = [name for name in students if f"student {name}" not in there]
    if not students:
        return
    needed = {STUDENTS[name][0] for name in students} | {"unlearned"}
    start = str(build_start(folder / "base", seed=seed))
    base, tokenizer = AutoModelForCausalLM.from_pretrained(start), AutoTokenizer.from_pretrained(start)
    config = RolloutsConfig(output_dir=str(folder / "rollouts"), seed=seed, use_cpu=True, **ROLLOUTS)
    began = time.perf_counter()
    data = load_rollouts(write_rollouts(start, problems("train"), exact_answer_reward, config))
    held_out = problems("test")

    def measure(cell, model, settings, seconds, history=()):
        metrics = evaluate(model, tokenizer, held_out, reference=base)
        last = {k: v for k, v in (history[-1] if history else {}).items() if k.startswith(("erpd/", "trust/", "clip"))}
        cells.add(
            output, {"seed": seed, "cell": cell, **metrics, "seconds": seconds, "settings": settings, "log": last}
        )

    def train(trainer_class, cell, data, settings):
        config = ERPDConfig(
            str(folder / "out"), stage=trainer_class.stage, seed=seed, logging_steps=1, **TRAINING, **settings
        )
        trainer = trainer_class(start, args=config, train_dataset=data)
        trainer.remove_callback(PrinterCallback)
        began = time.perf_counter()
        trainer.train()
        history = [entry for entry in trainer.state.log_history if "loss" in entry]
        measure(cell, trainer.model, settings, time.perf_counter() - began, history)
        return completion_logps(trainer.model, rows, batch_size=256)

    measure("base", base, {"rollouts": ROLLOUTS, "training": TRAINING}, time.perf_counter() - began)
    rows = data.select_columns(["prompt_ids", "completion_ids"]).to_list()
    logps = {
        name: train(ERPDTeacherTrainer, f"teacher {name}", data, {**TEACHER, **TEACHERS[name]})
        for name in TEACHERS
        if name in needed
    }
    data = data.add_column("unlearned_logps", logps["unlearned"])
    for name in students:
        own, settings = STUDENTS[name]
        train(ERPDTrainer, f"student {name}", data.add_column("teacher_logps", logps[own]), {**STUDENT, **settings})


def table(output: Path) -> None:
    """Print a row a cell, a column a seed: reward, greedy reward, KL to base, entropy."""
    rows = cells.load(output)["cells"]
    seeds = sorted({c["seed"] for c in rows})
    for name in dict.fromkeys(c["cell"] for c in rows):
        row = {c["seed"]: c for c in rows if c["cell"] == name}
        values = [row[s] for s in seeds if s in row]
        text = "   ".join(f"{c['pass@1']:.3f} {c['greedy']:.3f} {c['kl']:7.3f} {c['entropy']:.3f}" for c in values)
        print(f"{name:<40}{text}")


if __name__ == "__main__":
    main()
