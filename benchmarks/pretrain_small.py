"""Pre-train a small character-level language model with each optimizer: equal steps, swept rates, three seeds.

    python benchmarks/pretrain_small.py                       # all cells that are not there yet, then the report
    python benchmarks/pretrain_small.py --methods muon auon --seeds 0
    python benchmarks/pretrain_small.py --methods muon --lrs 3e-3 1e-2 3e-2 --seeds 1 2
    python benchmarks/pretrain_small.py --steps 160 --methods muon muon:momentum_dtype=bfloat16 --lrs 1e-2 \
        --seeds 0 1 2 3 4 --json benchmarks/results/momentum_bf16.json      # is half of the state as good?
    python benchmarks/pretrain_small.py --report              # table and plot from what is there
    python benchmarks/pretrain_small.py --smoke               # a minute's check that everything runs

A cell is (method, learning rate, seed); its result is appended to the JSON file as soon as it is there, and cells that
are there are not run again. The model is a Llama of about 1.1M parameters, the text comes from the generator below,
and every method sees the same batches in the same order. The best learning rate of a method is that with the lowest
mean validation loss over seeds; a best one at the edge of its sweep is marked, because the sweep then proves little.
The committed results have the whole sweep for seed 0; for seeds 1 and 2 the best rate of seed 0 and its neighbours.
"""

import argparse
import math
import random
import statistics
import time
from pathlib import Path

import cells
import torch


RESULTS = cells.RESULTS / "pretrain_small.json"

# Learning rates of the matrices. The matrix optimizers share a fixed rate of AdamW for the rest, so that a sweep is
# about the matrices alone. FISMO refreshes its factors every tenth step, as Mousse does.
AUX = {"aux_lr": 3e-3}
METHODS = {
    "adamw": ((3e-4, 1e-3, 3e-3, 1e-2, 3e-2), {}),
    "muon": ((3e-3, 1e-2, 3e-2, 1e-1, 3e-1), AUX),
    "auon": ((3e-3, 1e-2, 3e-2, 1e-1, 3e-1, 1.0), AUX),
    "hybrid_auon": ((1e-2, 3e-2, 1e-1, 3e-1, 1.0), AUX),
    "fismo": ((1e-3, 3e-3, 1e-2, 3e-2, 1e-1), {**AUX, "update_interval": 10}),
    "tram_adamw": ((3e-4, 1e-3, 3e-3, 1e-2, 3e-2), {}),
    # "optimizer:what is different": is AuON's last place its rule, its rate or its auxiliary AdamW?
    "auon:aux_lr=1e-3": ((3e-2,), {"aux_lr": 1e-3}),
    "auon:aux_lr=1e-2": ((3e-2,), {"aux_lr": 1e-2}),
    "auon:aux_lr=3e-2": ((3e-2,), {"aux_lr": 3e-2}),
    "muon:aux_lr=1e-2": ((1e-2,), {"aux_lr": 1e-2}),
    "auon:match_rms_adamw": ((3e-4, 1e-3, 3e-3), {**AUX, "shape_scale": "match_rms_adamw"}),
    "hybrid_auon:variant=repo": ((1e-2, 3e-2), {**AUX, "variant": "repo"}),
    "muon:momentum_dtype=bfloat16": ((1e-2,), {**AUX, "momentum_dtype": "bfloat16"}),
    "auon:momentum_dtype=bfloat16": ((3e-2,), {**AUX, "momentum_dtype": "bfloat16"}),
    # what refreshing the factors every step, or every hundredth, changes
    "fismo:update_interval=1": ((1e-2,), {**AUX, "update_interval": 1}),
    "fismo:update_interval=100": ((1e-2,), {**AUX, "update_interval": 100}),
    "muon:match_rms_adamw": ((1e-3, 3e-3, 1e-2), {**AUX, "shape_scale": "match_rms_adamw"}),
}
FULL = {
    "hidden_size": 128,
    "layers": 4,
    "context": 128,
    "batch": 16,
    "steps": 400,
    "evaluate_every": 50,
    "chars": 1_000_000,
}
SMOKE = {"hidden_size": 32, "layers": 1, "context": 32, "batch": 4, "steps": 6, "evaluate_every": 3, "chars": 20_000}

ALPHABET = "\n abcdefghijklmnopqrstuvwxyz0123456789+-=.,()[]>"


def text(chars: int, seed: int) -> str:
    """Lines that a model can learn to different depths: spelling, copying backwards, counting, sums, brackets."""
    rng = random.Random(seed)
    names, things = ("ana", "ben", "cleo", "dan", "eva", "finn"), ("pens", "figs", "coins", "books", "keys")

    def gift():
        (a, b), thing = rng.sample(names, 2), rng.choice(things)
        has, gives = rng.randint(2, 20), rng.randint(1, 9)
        gives = min(gives, has)
        return f"{a} has {has} {thing} and gives {gives} to {b}. {a} has {has - gives}, {b} has {gives}."

    def mirrored():
        word = "".join(rng.choice("abcdefgh") for _ in range(rng.randint(3, 7)))
        return f"{word}>{word[::-1]}"

    def arithmetic():
        x, y = rng.randint(0, 99), rng.randint(0, 99)
        return f"{x}+{y}={x + y}" if rng.random() < 0.5 else f"{x + y}-{y}={x}"

    def brackets(depth=0):
        inner = "".join(brackets(depth + 1) for _ in range(rng.randint(0, 2))) if depth < 4 else ""
        left, right = rng.choice(("()", "[]"))
        return f"{left}{inner}{right}"

    lines, size = [], 0
    while size < chars:
        lines.append(rng.choice((gift, mirrored, arithmetic, brackets))())
        size += len(lines[-1]) + 1
    return "\n".join(lines)[:chars]


def encode(s: str) -> torch.Tensor:
    return torch.tensor([ALPHABET.index(c) for c in s])


def batches(data: torch.Tensor, settings: dict, seed: int):
    """(batch, context) windows, in an order that depends on the seed alone."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        starts = torch.randint(len(data) - settings["context"], (settings["batch"],), generator=generator)
        yield torch.stack([data[s : s + settings["context"]] for s in starts])


def build_model(settings: dict, seed: int):
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(seed)
    width = settings["hidden_size"]
    config = LlamaConfig(
        vocab_size=len(ALPHABET),
        hidden_size=width,
        intermediate_size=4 * width,
        num_hidden_layers=settings["layers"],
        num_attention_heads=4,
        max_position_embeddings=settings["context"],
        tie_word_embeddings=False,
        bos_token_id=None,
        eos_token_id=None,
    )
    return LlamaForCausalLM(config)


def build_optimizer(method: str, model, lr: float):
    from trl_trust.optimizers import get_optimizer

    if method == "adamw":
        return torch.optim.AdamW(model.parameters(), lr=lr, betas=(0.9, 0.95), weight_decay=0.0)
    options = METHODS[method][1]
    if method == "tram_adamw":
        options = {**options, "aux_betas": (0.9, 0.95)}
    return get_optimizer(method.partition(":")[0]).load()(model, lr=lr, **options)


@torch.no_grad()
def evaluate(model, windows) -> float:
    model.eval()
    losses = [model(input_ids=w, labels=w).loss.item() for w in windows]
    model.train()
    return statistics.fmean(losses)


def run_cell(method: str, lr: float, seed: int, settings: dict) -> dict:
    """Train one model; a loss that is no longer a number ends it, with an infinite validation loss."""
    from itertools import islice

    train, held_out = encode(text(settings["chars"], seed=1)), encode(text(settings["chars"] // 8, seed=2))
    windows = list(islice(batches(held_out, settings, seed=0), 8))
    stream = batches(train, settings, seed=100 + seed)
    model = build_model(settings, seed)
    optimizer = build_optimizer(method, model, lr)
    steps, warm_up = settings["steps"], max(1, settings["steps"] // 20)
    shape = lambda t: min(1.0, (t + 1) / warm_up) * (1 - 0.9 * max(0, t - warm_up) / (steps - warm_up))
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, shape)
    curve, start = [], time.process_time()
    for step in range(1, steps + 1):
        batch = next(stream)
        optimizer.zero_grad()
        if method == "tram_adamw":
            loss = optimizer.backward(model, lambda batch=batch: model(input_ids=batch, labels=batch).loss)
        else:
            loss = model(input_ids=batch, labels=batch).loss
            loss.backward()
        if not math.isfinite(loss.item()):
            return {"val_loss": math.inf, "curve": curve, "seconds": time.process_time() - start, "diverged": step}
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % settings["evaluate_every"] == 0 or step == steps:
            curve.append([step, round(evaluate(model, windows), 5)])
    return {
        "val_loss": curve[-1][1],
        "curve": curve,
        "seconds": round(time.process_time() - start, 1),
        "parameters": sum(p.numel() for p in model.parameters()),
    }


def by_method(results: dict) -> dict[str, dict[float, list[dict]]]:
    table: dict[str, dict[float, list[dict]]] = {}
    for cell in sorted(results["cells"], key=lambda c: (list(METHODS).index(c["method"]), c["lr"], c["seed"])):
        table.setdefault(cell["method"], {}).setdefault(cell["lr"], []).append(cell)
    return table


def mean_loss(found: list[dict]) -> float:
    return statistics.fmean(cell["val_loss"] for cell in found)


def best_rate(rates: dict[float, list[dict]]) -> float:
    """The rate of lowest mean loss, among those that were run with as many seeds as any."""
    seeds = max(len(found) for found in rates.values())
    return min((lr for lr, found in rates.items() if len(found) == seeds), key=lambda lr: mean_loss(rates[lr]))


def report(results: dict, path: Path) -> str:
    """Write the table beside the JSON file and, with matplotlib, the plot."""
    table = by_method(results)
    lines = [
        "| method | best learning rate | validation loss, mean (seeds) | CPU seconds a step | all rates: mean loss |",
        "|---|---|---|---|---|",
    ]
    for method, rates in table.items():
        best, swept = best_rate(rates), METHODS[method][0]
        edge = " (edge of the sweep)" if best in (swept[0], swept[-1]) else ""
        edge = " (the only one)" if len(swept) == 1 else edge
        seeds = ", ".join(f"{cell['val_loss']:.4f}" for cell in rates[best])
        steps = results["settings"]["steps"]
        seconds = statistics.fmean(cell["seconds"] for cell in rates[best]) / steps
        every = "; ".join(f"{lr:g}: {mean_loss(found):.4f} ({len(found)})" for lr, found in rates.items())
        lines.append(
            f"| {method} | {best:g}{edge} | {mean_loss(rates[best]):.4f} ({seeds}) | {seconds:.3f} | {every} |"
        )
    written = "\n".join(lines) + "\n"
    path.with_suffix(".md").write_text(f"Settings: {results['settings']}\n\n{written}")
    try:
        import matplotlib
    except ImportError:
        print("matplotlib is not installed: no plot")
        return written
    matplotlib.use("svg")
    import matplotlib.pyplot as plt

    figure, (curves, sweeps) = plt.subplots(1, 2, figsize=(11, 4))
    for method, rates in table.items():
        best = best_rate(rates)
        steps = [step for step, _ in rates[best][0]["curve"]]
        runs = [[loss for _, loss in cell["curve"]] for cell in rates[best] if len(cell["curve"]) == len(steps)]
        (line,) = curves.plot(
            steps, [statistics.fmean(at) for at in zip(*runs, strict=True)], label=f"{method} {best:g}"
        )
        curves.fill_between(steps, *([f(at) for at in zip(*runs, strict=True)] for f in (min, max)), alpha=0.2)
        finite = {lr: mean_loss(found) for lr, found in rates.items() if math.isfinite(mean_loss(found))}
        sweeps.plot([lr / best for lr in finite], finite.values(), "o-", color=line.get_color(), label=method)
    curves.set(xlabel="step", ylabel="validation loss, mean and range over seeds", yscale="log")
    sweeps.set(xlabel="learning rate over the best one", ylabel="final validation loss", xscale="log", yscale="log")
    curves.legend()
    figure.tight_layout()
    figure.savefig(path.with_suffix(".svg"))
    plt.close(figure)
    return written


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=list(METHODS), choices=list(METHODS))
    parser.add_argument(
        "--lrs", nargs="+", type=float, help="learning rates instead of the sweep, for all methods given"
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--steps", type=int, help="fewer steps, into a file of its own (--json)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path, help="default: pretrain_small.json in benchmarks/results")
    parser.add_argument("--report", action="store_true", help="run nothing")
    parser.add_argument(
        "--smoke", action="store_true", help="a tiny model, one rate, one seed, into a file of its own"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.steps and not args.json:
        parser.error("--steps needs --json: a cell of another length does not belong into the table")
    settings = SMOKE if args.smoke else FULL
    if args.steps:
        settings = {**settings, "steps": args.steps, "evaluate_every": max(1, args.steps // 8)}
    path = args.json or (RESULTS.with_name("pretrain_small_smoke.json") if args.smoke else RESULTS)
    results = cells.load(path, settings=settings)
    done = {(cell["method"], cell["lr"], cell["seed"]) for cell in results["cells"]}
    for seed in [] if args.report else args.seeds[:1] if args.smoke else args.seeds:
        for method in args.methods:
            rates = args.lrs or METHODS[method][0]
            for lr in rates[len(rates) // 2 :][:1] if args.smoke else rates:
                if (method, lr, seed) in done:
                    continue
                cell = {"method": method, "lr": lr, "seed": seed, **run_cell(method, lr, seed, settings)}
                results["cells"].append(cell | {"origin": cells.origin(threads=args.threads)})
                cells.save(path, results)
                print(
                    f"{method:12s} lr {lr:<8g} seed {seed}  loss {cell['val_loss']:.4f}  {cell['seconds']:.0f} s",
                    flush=True,
                )
    if results["cells"]:
        print(report(results, path))


if __name__ == "__main__":
    main()
