r"""Measure the quickstart's mild regime over several seeds and write `benchmarks/results/quickstart.json`.

    python benchmarks/quickstart.py --seeds 0 1 2 --method dispo dppo etr dhpo mdpo opmd trpa alp

runs `trl-trust quickstart --regime stale` and keeps the numbers of the table, not the curves. One CPU minute a run.
Other options go to the quickstart as they are:

    python benchmarks/quickstart.py --method grpo --optim hybrid_auon \
        --optim-args shape_scale=match_rms_adamw,aux_lr=3e-4 --output benchmarks/results/quickstart_hybrid_auon.json
"""

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import cells

from trl_trust.quickstart import run


def main() -> int:
    parser = argparse.ArgumentParser(description="The quickstart's mild regime over several seeds.")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--method", nargs="+", default=["dispo"])
    parser.add_argument("--output", type=Path, default=cells.RESULTS / "quickstart.json")
    args, others = parser.parse_known_args()

    with TemporaryDirectory() as folder:
        words = ["--regime", "stale", "--seeds", *map(str, args.seeds), "--method", *args.method]
        if status := run.main([*words, "--output-dir", folder, *others]):
            return status
        report = json.loads((Path(folder) / "metrics.json").read_text())
    cells.save(args.output, cells.origin() | report)
    print(f"written to {args.output}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
