"""GRPO on one dimension of the suite, and what became of all nine.

    python benchmarks/trusteval.py --seed 0        # about 5 CPU minutes a seed, one thread

The start is the tiny policy of `trl-trust eval --model tiny`. Stock GRPO trains it on the train split of `honesty`
(say the value, or UNKNOWN where the sheet is silent), with the suite's own verdict as the reward. Before and after: 64
slots a dimension, the same evaluation items, which share no name with training. Claim, stated before the run: honesty
rises by at least .2; of the other eight nothing is claimed. Beside it the cost of `TrustEvalCallback` with 32 slots a
dimension every 100 steps. Writes results/trusteval.json, .md and .png.
"""

import argparse
import json
import time
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, PrinterCallback, TrainerCallback
from trl import GRPOConfig, GRPOTrainer

from trl_trust.evaluation import TrustEvalCallback, run_trust_suite
from trl_trust.evaluation.plots import draw
from trl_trust.evaluation.suite import TrustSuite
from trl_trust.evaluation.tiny import cached_tiny


RESULTS = Path(__file__).parent / "results"


class Timed(TrustEvalCallback):
    """The callback, with the CPU seconds that it took."""

    spent = 0.0

    def _measure(self, *args, **kwargs):
        start = time.process_time()
        try:
            return super()._measure(*args, **kwargs)
        finally:
            self.spent += time.process_time() - start


class Curve(TrainerCallback):
    def on_log(self, args, state, control, logs=None, **kwargs):
        if "reward" in (logs or {}):
            print(state.global_step, f"reward {logs['reward']:.3f}", flush=True)


def one_seed(seed: int, steps: int) -> dict:
    path = cached_tiny(seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    options = dict(terse=True, max_new_tokens=32, batch_size=64)
    suite, train = TrustSuite(seed=seed, **options), TrustSuite(seed=100 + seed, **options)
    before = run_trust_suite(model, tokenizer, suite, subject=f"before, seed {seed}")
    with TemporaryDirectory() as folder:
        args = GRPOConfig(
            folder, max_steps=steps, learning_rate=3e-4, per_device_train_batch_size=64, num_generations=8,
            steps_per_generation=2, max_completion_length=32, beta=0.0, use_cpu=True, bf16=False, report_to="none",
            gradient_checkpointing=False, save_strategy="no", logging_steps=10, disable_tqdm=True, seed=seed,
        )  # fmt: skip
        trainer = GRPOTrainer(
            model, reward_funcs=[train.reward_func("honesty")], args=args, processing_class=tokenizer,
            train_dataset=train.dataset("honesty", n=2000),
        )  # fmt: skip
        trainer.remove_callback(PrinterCallback)
        watch = Timed(trainer, TrustSuite(seed=seed + 1, n_per_dim=32, **options), every_n_steps=100)
        trainer.add_callback(watch)
        trainer.add_callback(Curve())
        start = time.process_time()
        trainer.train()
        spent = time.process_time() - start - watch.spent
    after = run_trust_suite(model, tokenizer, suite, subject=f"after, seed {seed}")
    evaluations = 1 + len(watch.reports)  # the baseline at the start too
    share = (watch.spent / evaluations) / (spent * 100 / steps)
    return {"before": before, "after": after, "share": share, "seconds_an_evaluation": watch.spent / evaluations,
            "items": before.meta["items"] // 2, "train_seconds_100_steps": spent * 100 / steps}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    given.output.mkdir(parents=True, exist_ok=True)
    parts, results = [], {}
    for seed in given.seed:
        result = one_seed(seed, given.steps)
        before, after = result["before"], result["after"]
        comparison = after.compare(before)
        alerts = ", ".join(comparison.alerts) or "none"
        parts.append(
            f"# GRPO on honesty, {given.steps} steps, seed {seed}\n\n{comparison.to_markdown()}\nAlerts: {alerts}.\n\n"
            f"An evaluation of 9 x 32 slots took {result['seconds_an_evaluation']:.2f} CPU seconds, "
            f"{result['share']:.1%} of the {result['train_seconds_100_steps']:.0f} of 100 training steps; "
            f"{1000 * result['seconds_an_evaluation'] / result['items']:.1f} ms an item.\n"
        )
        results[str(seed)] = {k: json.loads(v.to_json()) if k in ("before", "after") else v for k, v in result.items()}
        for report in (results[str(seed)]["before"], results[str(seed)]["after"]):
            for score in report["scores"]:
                score.pop("outcomes", None)
        (given.output / "trusteval.md").write_text("\n".join(parts))
        (given.output / "trusteval.json").write_text(json.dumps(results, indent=1) + "\n")
        if seed == given.seed[0]:
            draw([before, after], given.output / "trusteval.png")
        print(parts[-1], flush=True)


if __name__ == "__main__":
    main()
