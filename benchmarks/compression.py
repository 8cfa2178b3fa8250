"""What each compression method does to a small trained policy: KL, TV, ratios, and the suite's scores.

    python benchmarks/compression.py --seed 0 1 2        # about 2.5 CPU minutes a seed, one thread

The policy is the tiny one of `trl-trust eval --model tiny` (0.14M parameters, warmed on the suite's train split in
terse wording), one a seed. Group size 32, calibration on the suite's train split, 64 slots a dimension, the same items
for every method. What the paper found on 7B to 13B models, stated before the run: 4 bit keeps every dimension and 50 %
pruning does not; quantization loses less than pruning; the divergence moves before accuracy does; GPTQ beats
round-to-nearest, and SparseGPT beats Wanda beats magnitude, in KL. Writes results/compression.json, .md and .png.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from trl_trust.evaluation import TrustReport
from trl_trust.evaluation.compression import compression_report
from trl_trust.evaluation.report import environment
from trl_trust.evaluation.suite import TrustSuite
from trl_trust.evaluation.tiny import cached_tiny


METHODS = (
    "rtn8", "rtn4", "gptq4", "awq4", "rtn3", "gptq3", "awq3", "rtn2", "gptq2", "mag2:4", "wanda2:4", "sparsegpt2:4",
)  # fmt: skip
RESULTS = Path(__file__).parent / "results"


def one_seed(seed: int, n_per_dim: int, n_tokens: int) -> TrustReport:
    path = cached_tiny(seed)
    model, tokenizer = AutoModelForCausalLM.from_pretrained(path), AutoTokenizer.from_pretrained(path)
    suite = TrustSuite(seed=seed, n_per_dim=n_per_dim, terse=True, max_new_tokens=32, batch_size=64)
    calibration = [
        list(item.messages) for name in suite.dims for slots in suite.items(name, 16, split="train") for item in slots
    ]
    return compression_report(
        model,
        tokenizer,
        suite,
        methods=METHODS,
        calibration=calibration,
        group_size=32,
        n_tokens=n_tokens,
        seed=seed,
        subject=f"tiny policy, seed {seed}",
        on_method=lambda name, row: print(seed, name, f"{row['kl']:.2e}", row["worst"], row["verdict"], flush=True),
    )


def across(reports: list[TrustReport]) -> TrustReport:
    """One row a method: means over the seeds, ranges as limits, the verdicts in seed order."""
    rows = []
    for parts in zip(*(report.rows for report in reports), strict=True):
        row = {"method": parts[0]["method"], "verdicts": " ".join(part["verdict"] for part in parts)}
        row["worst"] = " ".join(part["worst"] for part in parts)
        for key in ("bytes", "kl", "kl_max", "tv", "tv_max", "clipped", "loss", "mean", "no_answer"):
            values = [part[key] for part in parts]
            row |= {key: statistics.fmean(values), f"{key}_low": min(values), f"{key}_high": max(values)}
        rows.append(row)
    notes = ["Limits are the least and the largest of the seeds. Loss: of the worst dimension. KL in nats a token."]
    meta = {
        **environment("tiny, 0.14M parameters", "cpu"),
        "notes": notes,
        "plot": ["kl", "tv_max", "loss", "clipped"],
    }
    seeds = ", ".join(report.subject.split()[-1] for report in reports)
    return TrustReport(f"tiny policy, seeds {seeds}", "compression, core", rows=rows, meta=meta)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seed", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--n_per_dim", type=int, default=64)
    parser.add_argument("--n_tokens", type=int, default=1024)
    parser.add_argument("--output", type=Path, default=RESULTS)
    given = parser.parse_args()
    torch.set_num_threads(1)
    started, reports = time.process_time(), []
    for seed in given.seed:
        reports.append(one_seed(seed, given.n_per_dim, given.n_tokens))
        table = across(reports)
        table.meta["cpu_seconds"] = round(time.process_time() - started)
        dense = ["", "Dense, by seed:", "", *(f"- {r.subject}: " + ", ".join(
            f"{s.name} {s.value:.2f}" for s in r.scores if "/" not in s.name) for r in reports)]  # fmt: skip
        given.output.mkdir(parents=True, exist_ok=True)
        text = {"summary": json.loads(table.to_json()), "seeds": [json.loads(r.to_json()) for r in reports]}
        for report in text["seeds"]:
            for score in report["scores"]:
                score.pop("outcomes", None)
        (given.output / "compression.json").write_text(json.dumps(text, indent=1) + "\n")
        (given.output / "compression.md").write_text(table.to_markdown() + "\n".join(dense) + "\n")
        table.plot(given.output / "compression.png")
    print(table.to_markdown())


if __name__ == "__main__":
    main()
