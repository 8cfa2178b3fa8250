"""The Gram form of Newton-Schulz: how far it drifts, and what a whole step takes on the shapes of real models.

    python benchmarks/gram.py drift speed [--models qwen3-0.6b lora] [--rounds 9] [--device cpu]
                                          [--json benchmarks/results/gram.json]

`drift`: distance to the plain form in float64, for spectra from kind to unkind, in bf16 and float32, over schedules of
restarts (a schedule lists the steps between two computations of the Gram matrix; 1+1+1+1+1 is the plain form).

`speed`: CPU time of a whole step of `trl_trust.optim.Muon` (momentum and write-back included) over one of
`torch.optim.Muon`, both in bf16, one matrix of each distinct shape, interleaved, one thread; a model's figure weighs
the times of its shapes by their number. Larger shapes take fewer rounds, and the 8B model's tall one stands for its
transpose. `whole`: all matrices of a model at once, as a GPU can hold them (of the 8B model every eighth): what is of
one shape
is one batch in ours.
"""

import argparse
from pathlib import Path

import cells
import torch
from optimizers import adapters, compare, parameters

from trl_trust.optim import Muon, muon


def decoder(width, queries, keys, inner, layers, both=True):
    """{shape: number} of a decoder's matrices; one of gate, up and down stands for all unless `both`."""
    squares = {(queries, width): layers, (width, queries): layers}
    if queries == width:
        squares = {(width, width): 2 * layers}
    wide = {(inner, width): 2 * layers, (width, inner): layers} if both else {(inner, width): 3 * layers}
    return squares | {(keys, width): 2 * layers} | wide


MODELS = {
    "qwen3-0.6b": decoder(1024, 2048, 1024, 3072, 28),
    "qwen3-1.7b": decoder(2048, 2048, 1024, 6144, 28),
    "llama-3-8b": decoder(4096, 4096, 1024, 14336, 32, both=False),
}
SCHEDULES = ((1, 1, 1, 1, 1), (2, 2, 1), (3, 1, 1), (3, 2), (2, 3), (1, 4), (4, 1), (5,))


def spectrum(values, n):
    m = len(values)
    left = torch.linalg.qr(torch.randn(m, m, dtype=torch.float64))[0]
    right = torch.linalg.qr(torch.randn(n, m, dtype=torch.float64))[0]
    return (left * values) @ right.T


def matrices(m=256, n=768):
    torch.manual_seed(0)
    i = torch.arange(m, dtype=torch.float64)
    noise = torch.randn(m, n, dtype=torch.float64)
    return {
        "Gaussian": noise,
        "all equal": spectrum(torch.ones_like(i), n),
        "1/i": spectrum(1 / (1 + i), n),
        "1 to 1e-4": spectrum(10 ** (-4 * i / m), n),
        "rank 8 + noise 6e-5": spectrum((i < 8).double(), n) + 6.25e-5 * noise,
    }


def drift():
    rows = []
    for dtype in (torch.bfloat16, torch.float32):
        for schedule in SCHEDULES:
            row = {"dtype": str(dtype).removeprefix("torch."), "schedule": "+".join(map(str, schedule))}
            for name, x in matrices().items():
                x = x / x.norm()
                exact = muon.newton_schulz(x, form="plain")
                found = muon.newton_schulz(x.to(dtype), form="gram", schedule=schedule).double()
                error = ((found - exact).norm() / exact.norm()).item()
                row[name] = [float(f"{error:.2g}"), round(torch.linalg.matrix_norm(found, 2).item(), 2)]
            rows.append(row)
            print(row, flush=True)
    return rows


def pair(shapes, rounds, ns_form, device):
    ours = lambda d: Muon(parameters(shapes, d), lr=0.02, ns_form=ns_form)
    theirs = lambda d: torch.optim.Muon(parameters(shapes, d), lr=0.02, weight_decay=0.0)
    return compare(ours, theirs, rounds, device)


def speed(names, rounds, ns_form, device):
    measured, rows = {}, {}
    for name in names:
        if name == "lora":
            row = pair(adapters(1024, 28), rounds, ns_form, device)
            rows[name] = {"what": "rank 16 on all projections, 28 layers of width 1024", "rounds": rounds, **row}
            print(name, rows[name], flush=True)
            continue
        for shape in MODELS[name]:
            if shape not in measured:
                size = shape[0] * shape[1]
                number = (
                    rounds if size < 3e6 or device != "cpu" else min(rounds, 3) if size < 1.5e7 else min(rounds, 2)
                )
                measured[shape] = {"rounds": number, **pair([shape], number, ns_form, device)}
                print(shape, measured[shape], flush=True)
        total = lambda side, name=name: sum(count * measured[s][side] for s, count in MODELS[name].items())
        rows[name] = {
            "ratio": round(total("ours_ms") / total("theirs_ms"), 3),
            "shapes": {"x".join(map(str, s)): {"number": k, **measured[s]} for s, k in MODELS[name].items()},
        }
        print(name, rows[name]["ratio"], flush=True)
    return rows


def whole(name, rounds, ns_form, device):
    share = 8 if name == "llama-3-8b" else 1
    shapes = [shape for shape, number in MODELS[name].items() for _ in range(number // share)]
    row = {"matrices": len(shapes), "share": f"1/{share}", "rounds": rounds, **pair(shapes, rounds, ns_form, device)}
    print(name, row, flush=True)
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("parts", nargs="+", choices=("drift", "speed", "whole"))
    parser.add_argument("--models", nargs="+", default=["lora", *MODELS], choices=["lora", *MODELS])
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--ns-form", default="auto", choices=("auto", "plain", "gram"))
    parser.add_argument("--device", default="cpu", help="on a GPU the time is the clock's, between synchronisations")
    parser.add_argument("--json", type=Path, help="file for the results; parts and models of earlier runs stay")
    args = parser.parse_args()
    torch.set_num_threads(1)
    torch.ones(7_900_000)  # see optimizers.py
    results = cells.load(args.json) if args.json and args.json.exists() else {}
    origin = {"machine": cells.machine(args.device), "command": cells.command()}
    if "drift" in args.parts:
        results["drift"] = {"rows": drift(), **origin}
    for name in args.models if "speed" in args.parts else ():
        (row,) = speed([name], args.rounds, args.ns_form, args.device).values()
        part = f"speed {args.ns_form}" + (f" {args.device}" if args.device != "cpu" else "")
        results.setdefault(part, {})[name] = row | origin
        if args.json:
            cells.save(args.json, results)
    for name in args.models if "whole" in args.parts else ():
        if name in MODELS:
            part = f"whole {args.ns_form} {args.device}"
            row = whole(name, args.rounds, args.ns_form, args.device)
            results.setdefault(part, {})[name] = row | origin
    if args.json:
        cells.save(args.json, results)


if __name__ == "__main__":
    main()
