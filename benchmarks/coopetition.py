"""Does a policy learn to invest through real tool calls? TRL's GRPOTrainer and DISPO in the coopetition environment.

    python benchmarks/coopetition.py                # 3 seeds x 5 cells, half a CPU minute a run
    python benchmarks/coopetition.py --plot         # the picture from what is there

A tiny Qwen2 (0.1M parameters) whose tokenizer is built locally, with TRL's Qwen3 chat template and the call's fixed
strings as single tokens, imitates legal calls with amounts drawn at random, and then plays 8 rounds against
`trust_responsive`, 32 episodes a generation in 2 groups, 2 updates a generation.

Stated beforehand: the normalized reward (0: the myopic player, 1: the best plan known) rises by at least .5 from the
first two generations to the last ten in every run; otherwise the environment does not train. Investing the norm, 5, in
every round earns .393; the signal of trust is 0 exactly there, so that a plateau at the norm is likely, and getting
past it is a matter of exploration. Not calling the tool at all earns -1.338 in every episode: a policy that has come
to that has no variance left to learn from. The two trainers are not compared: three seeds, not tuned.

That claim failed at a rate of 2e-3: on two seeds of three GRPO stopped calling. Stated before the second round: at a
quarter of the rate, and at the same rate under `step_control="kl"`, no run stops calling, and each rises by .5;
otherwise the rate is not what broke them.
"""

import argparse
import json
import os
import tempfile
import time
from pathlib import Path

import cells


OUT = cells.RESULTS / "coopetition.json"
SETTINGS = {
    "rounds": 8,
    "partner": "trust_responsive",
    "generations": 40,
    "batch": 32,
    "num_generations": 16,
    "steps_per_generation": 2,
}
# cell -> trainer, learning rate, further settings
CELLS = {
    "grpo": ("grpo", 2e-3, {}),
    "dispo": ("dispo", 2e-3, {}),
    "grpo, 5e-4": ("grpo", 5e-4, {}),
    "dispo, 5e-4": ("dispo", 5e-4, {}),
    "dispo, step control": ("dispo", 2e-3, {"step_control": "kl"}),
}
COLORS = dict(zip(CELLS, ("#4c72b0", "#dd8452", "#55a868", "#c44e52", "#8172b3"), strict=True))
LAST = 10  # generations that count as the end


def run(cell: str, start: str, seed: int) -> dict:
    from trl import GRPOConfig, GRPOTrainer

    from trl_trust import DISPOConfig, DISPOTrainer
    from trl_trust.tasks.coopetition import coopetition_dataset, coopetition_env_factory, coopetition_metrics
    from trl_trust.tasks.coopetition.game import scale
    from trl_trust.tasks.coopetition.start import build_tokenizer

    trainer, learning_rate, further = CELLS[cell]
    kind, config = {"grpo": (GRPOTrainer, GRPOConfig), "dispo": (DISPOTrainer, DISPOConfig)}[trainer]
    env = coopetition_env_factory(rounds=SETTINGS["rounds"], partner=SETTINGS["partner"])
    reuse = SETTINGS["steps_per_generation"]
    args = config(
        output_dir=tempfile.mkdtemp(),
        **env.grpo_kwargs(tokenizer=build_tokenizer(env.game)),
        per_device_train_batch_size=SETTINGS["batch"] // reuse,
        num_generations=SETTINGS["num_generations"],
        steps_per_generation=reuse,
        gradient_accumulation_steps=1,
        max_steps=SETTINGS["generations"] * reuse,
        learning_rate=learning_rate,
        lr_scheduler_type="constant",
        beta=0.0,
        seed=seed,
        logging_steps=1,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        **further,
    )
    data = coopetition_dataset(512, partners=(SETTINGS["partner"],), seed=seed)
    began = time.process_time()
    learner = kind(start, coopetition_metrics, args, data, environment_factory=env)
    learner.train()
    key = "rewards/CoopetitionEnv/mean"
    log = [record for record in learner.state.log_history if key in record]

    def curve(name: str) -> list[float]:
        return [round(float(record.get(name, 0.0)), 4) for record in log]  # no amounts where nobody called the tool

    reward, amount = curve(key), curve("coopetition/amount")
    ends = {
        name: sum(curve(f"coopetition/{name}")[-LAST:]) / LAST
        for name in ("amount", "final_trust", "rounds_played", "violation_rate")
    }
    first, last = sum(reward[:2]) / 2, sum(reward[-LAST:]) / LAST
    zero, one = scale(env.game)
    return {
        "cell": cell,
        "learning_rate": learning_rate,
        "seed": seed,
        "first": round(first, 4),
        "last": round(last, 4),
        "rise": round(last - first, 4),
        "ends": {name: round(value, 4) for name, value in ends.items()},
        "past_the_norm": ends["amount"] > 5,
        "scale": [zero, one],
        "tool_failures": round(sum(curve("tools/failure_frequency")) / len(log), 5),
        "cpu_seconds": round(time.process_time() - began, 1),
        "reward": reward,
        "amount": amount,
    }


def draw(path: Path) -> Path:
    from matplotlib.figure import Figure

    results = json.loads(path.read_text())
    figure = Figure(figsize=(9, 3.6), layout="constrained")
    for axes, name, lines in zip(
        figure.subplots(1, 2),
        ("reward", "amount"),
        (((0.0, "myopic"), (0.393, "5 in every round"), (1.0, "best plan known")), ((5.0, "what is expected"),)),
        strict=True,
    ):
        for height, label in lines:
            axes.axhline(height, color="gray", linewidth=0.8, linestyle=":")
            axes.annotate(label, (0, height), fontsize=7, color="gray", va="bottom")
        seen = set()
        for cell in results["cells"]:
            label = None if cell["cell"] in seen else cell["cell"]
            seen.add(cell["cell"])
            axes.plot(cell[name], color=COLORS[cell["cell"]], linewidth=1, label=label)
        title = {"reward": "normalized reward", "amount": "mean amount invested"}[name]
        axes.set(xlabel="generation (32 episodes)", title=title)
    axes.legend(fontsize=8)
    target = path.with_suffix(".png")
    figure.savefig(target, dpi=120)
    return target


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2])
    parser.add_argument("--cells", nargs="*", default=list(CELLS), choices=CELLS)
    parser.add_argument("--out", type=Path, default=OUT)
    parser.add_argument("--plot", action="store_true", help="only draw what is in the file")
    args = parser.parse_args()
    if args.plot:
        print(draw(args.out))
        return

    from trl_trust.tasks.coopetition.game import Game
    from trl_trust.tasks.coopetition.start import build_start

    os.environ.setdefault("TRL_EXPERIMENTAL_SILENCE", "1")
    cells.load(args.out, settings=SETTINGS)
    for seed in args.seeds:
        with tempfile.TemporaryDirectory() as folder:
            start = str(build_start(folder, Game(rounds=SETTINGS["rounds"]), seed=seed))
            for name in args.cells:
                cell = run(name, start, seed)
                cells.add(args.out, cell, settings=SETTINGS)
                print({name: value for name, value in cell.items() if not isinstance(value, list)}, flush=True)
    print(draw(args.out))


if __name__ == "__main__":
    main()
