"""Where the time of a FISMO step goes, and what refreshing the factors less often leaves of it.

    python benchmarks/fismo_parts.py [--sizes 1024 2048] [--json benchmarks/results/fismo_parts.json]

CPU time of one step of one square matrix after a first one, one thread, by the functions of `trl_trust/optim/fismo.py`
(timers around them; what is left are the two products that make the factors' data, momentum and copies), and the mean
over 10 steps with `update_interval=10`, of which one refreshes. What an interval costs in loss is a row of
`benchmarks/pretrain_small.py`.
"""

import argparse
import functools
import time
from collections import Counter
from pathlib import Path

import cells
import torch


PARTS = {
    "root": "inverse_root",
    "whitening, there": "whiten",
    "whitening, back": "unwhiten",
    "Newton-Schulz": "muon_direction",
    "averaging the factors": "blend_factor",
}
CONFIGS = {
    "eigh": {},
    "cholesky": {"root": "cholesky", "momentum_space": "param"},
    "cholesky, Newton-Schulz in bf16": {"root": "cholesky", "momentum_space": "param", "ns_dtype": "bfloat16"},
}


def timed(module, name: str, clock: Counter) -> None:
    inner = getattr(module, name)

    @functools.wraps(inner)
    def wrapper(*args):
        start = time.process_time()
        result = inner(*args)
        clock[name] += time.process_time() - start
        return result

    setattr(module, name, wrapper)


def main():
    from trl_trust.optim import FISMO, fismo

    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", type=int, nargs="+", default=[1024, 2048])
    parser.add_argument("--json", type=Path, default=cells.RESULTS / "fismo_parts.json")
    args = parser.parse_args()
    torch.set_num_threads(1)
    clock: Counter = Counter()
    for name in PARTS.values():
        timed(fismo, name, clock)
    rows = []
    for size in args.sizes:
        for name, options in CONFIGS.items():
            row = {"size": size, "config": name}
            for interval in (1, 10):
                torch.manual_seed(0)
                p = torch.nn.Parameter(0.02 * torch.randn(size, size))
                p.grad = 1e-3 * torch.randn(size, size)
                optimizer = FISMO([p], lr=0.02, update_interval=interval, **options)
                if interval == 1:
                    optimizer.step()  # makes the state, and warms up
                clock.clear()
                start = time.process_time()
                for _ in range(interval):
                    optimizer.step()
                seconds = (time.process_time() - start) / interval
                if interval == 1:
                    row["seconds"] = round(seconds, 3)
                    row["shares"] = {part: round(clock[f] / seconds, 3) for part, f in PARTS.items()}
                    row["shares"]["the rest"] = round(1 - sum(clock.values()) / seconds, 3)
                else:
                    row["seconds_interval_10"] = round(seconds, 3)
            rows.append(row)
            print(row, flush=True)
            cells.save(args.json, cells.origin() | {"rows": rows})


if __name__ == "__main__":
    main()
