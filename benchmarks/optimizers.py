"""Time of an optimizer step against PyTorch's own, pairs interleaved in one run, and state kept per parameter.

    python benchmarks/optimizers.py [--rounds 9] [--threads 1] [--device cpu] [--rows auon fismo]
                                    [--json benchmarks/results/optimizers.json]

In each round both of a pair take one step, in turns first; the figure is the median over rounds of the ratio of the
two times in the same round, with quartiles. On a CPU the time is that of the process, not of the clock, so that other
jobs on the machine disturb it little (with one thread; they still share its memory bandwidth). On a GPU it is the
clock, between synchronisations.
"""

import argparse
import statistics
import time
from pathlib import Path

import cells
import torch


# The matrices of GPT-2 small, a model of 124M parameters: 85M of them.
GPT2_SMALL = ([(768, 768)] * 4 + [(3072, 768), (768, 3072)]) * 12


def layers(width, depth):
    """Matrices of a model with many equal shapes: `depth` layers of 4 squares and an MLP of 4 times the width."""
    return ([(width, width)] * 4 + [(4 * width, width), (width, 4 * width)]) * depth


def adapters(width, depth, rank=16):
    """LoRA's A and B on all seven projections of `depth` layers: many equal shapes, as people train them."""
    squares, wide = [(rank, width), (width, rank)], [(rank, 4 * width), (4 * width, rank)]
    return (squares * 4 + [squares[0], wide[1]] * 2 + [wide[0], squares[1]]) * depth


def parameters(shapes, device, dtype=torch.float32):
    generator = torch.Generator(device).manual_seed(0)
    normal = lambda shape, scale: (torch.randn(shape, generator=generator, device=device) * scale).to(dtype)
    params = [torch.nn.Parameter(normal(shape, 0.02)) for shape in shapes]
    for p in params:
        p.grad = normal(p.shape, 1e-3)
    return params


def pairs():
    """{row: (what it shows, bound on the ratio or None, ours, theirs)}; the last two build an optimizer."""
    from trl_trust.optim import FISMO, AuON, HybridAuON, Muon

    adamw = lambda p: torch.optim.AdamW(p, lr=1e-3, weight_decay=0.01, foreach=True)
    torch_muon = lambda p: torch.optim.Muon(p, lr=0.02, weight_decay=0.0)
    fismo = lambda root: lambda p: FISMO(p, lr=0.02, root=root, momentum_space="param")
    rows = {
        "auon": (
            "AuON / AdamW(foreach=True), the 85M matrix elements of GPT-2 small",
            1.1,
            lambda d: AuON(parameters(GPT2_SMALL, d), lr=0.1, weight_decay=0.01),
            lambda d: adamw(parameters(GPT2_SMALL, d)),
        )
    }
    models = {
        **{str(width): (f"24 layers of width {width}", layers(width, 24)) for width in (64, 128)},
        **{str(width): (f"4 layers of width {width}", layers(width, 4)) for width in (256, 512)},
        "lora": ("LoRA of rank 16 on 24 layers of width 1024", adapters(1024, 24)),
    }
    for label, (model, shapes) in models.items():
        bound = 0.5 if label == "64" else None
        for name, ours in (
            ("muon", lambda p: Muon(p, lr=0.02)),
            ("hybrid_auon_repo", lambda p: HybridAuON(p, lr=0.02, variant="repo", ns_dtype="bfloat16")),
            ("hybrid_auon_paper", lambda p: HybridAuON(p, lr=0.02, ns_dtype="bfloat16")),
        ):
            steps = 1 if "paper" in name else 5
            rows[f"{name}_{label}"] = (
                f"{name} ({steps} Newton-Schulz steps, bf16) / torch.optim.Muon (5), {model}",
                bound,
                lambda d, ours=ours, shapes=shapes: ours(parameters(shapes, d)),
                lambda d, shapes=shapes: torch_muon(parameters(shapes, d)),
            )
    rows["fismo"] = (
        "FISMO root=cholesky / root=eigh, one 2048 x 2048 matrix, whole step",
        1 / 20,
        lambda d: fismo("cholesky")(parameters([(2048, 2048)], d)),
        lambda d: fismo("eigh")(parameters([(2048, 2048)], d)),
    )
    rows["fismo_root"] = (
        "root of one factor of 2048: Cholesky / eigh",
        1 / 20,
        lambda d: Root("cholesky", d),
        lambda d: Root("eigh", d),
    )
    rows["fismo_whitening"] = (
        "the same and a gradient whitened, there and back: two triangular solves / two products",
        1 / 20,
        lambda d: Root("cholesky", d, use=True),
        lambda d: Root("eigh", d, use=True),
    )
    return rows


class Root:
    """What FISMO does with one factor: find a root at a refresh and, if `use`, whiten a gradient at a step."""

    def __init__(self, kind, device, use=False):
        x = parameters([(2048, 2048)], device)[0].grad
        self.kind, self.grad, self.use = kind, x, use
        self.factor = x @ x.T * (2048 / x.square().sum()) + 1e-2 * torch.eye(2048, device=device)

    def step(self):
        from trl_trust.optim.fismo import inverse_root, unwhiten, whiten

        root, _ = inverse_root(self.factor, self.kind, 1e-8)
        if self.use:
            unwhiten(root, whiten(root, self.grad, self.kind), self.kind)


def timer(device):
    if device == "cpu":
        return time.process_time

    def synchronised():
        torch.cuda.synchronize()
        return time.perf_counter()

    return synchronised


def compare(ours, theirs, rounds, device):
    """Median and quartiles of the ratio of step times, and the median of each."""
    clock, both = timer(device), (ours(device), theirs(device))
    times = ([], [])
    for optimizer in both:  # creates the state, compiles what is compiled
        optimizer.step()
    for r in range(rounds):
        for i in (0, 1) if r % 2 else (1, 0):
            start = clock()
            both[i].step()
            times[i].append(clock() - start)
    ratios = [a / b for a, b in zip(*times, strict=True)]
    low, middle, high = statistics.quantiles(ratios, n=4) if rounds > 1 else ratios * 3
    ours_ms, theirs_ms = (round(1e3 * statistics.median(t), 3) for t in times)
    return {
        "ratio": round(middle, 3),
        "quartiles": [round(low, 3), round(high, 3)],
        "ours_ms": ours_ms,
        "theirs_ms": theirs_ms,
    }


def memory(shape=(1024, 1024)):
    """Bytes of state per matrix element, for float32 and for bfloat16 parameters, and per parameter of Qwen3-0.6B.

    There each optimizer for matrices has AdamW's 8 bytes for the embedding, save torch's Muon, which takes none.
    """
    from gram import MODELS
    from torchao.optim import AdamW8bit

    from trl_trust.optim import FISMO, AuON, HybridAuON, Muon

    table = {
        "adamw (torch)": lambda p: torch.optim.AdamW(p, lr=1e-3),
        "adamw 8-bit (torchao)": lambda p: AdamW8bit(p, lr=1e-3),
        "auon, momentum in bf16": lambda p: AuON(p, lr=0.1, momentum_dtype="bfloat16"),
        "muon, momentum in bf16": lambda p: Muon(p, lr=0.02, momentum_dtype="bfloat16"),
        "muon (torch)": lambda p: torch.optim.Muon(p, lr=0.02),
        "auon": lambda p: AuON(p, lr=0.1),
        "hybrid_auon": lambda p: HybridAuON(p, lr=0.02),
        "muon": lambda p: Muon(p, lr=0.02),
        "fismo": lambda p: FISMO(p, lr=0.02),
    }
    result = {}
    for name, build in table.items():
        result[name] = {}
        for dtype in (torch.float32, torch.bfloat16):
            (p,) = parameters([shape], "cpu", dtype)
            optimizer = build([p])
            optimizer.step()
            result[name][str(dtype).removeprefix("torch.")] = round(held(optimizer.state[p]) / p.numel(), 2)
        shapes, embedding = MODELS["qwen3-0.6b"], 151936 * 1024
        matrices = sum(m * n * count for (m, n), count in shapes.items())
        if name == "fismo":  # whose state goes by the sides
            likes = {torch.empty(m, n, device="meta"): count for (m, n), count in shapes.items()}
            group = optimizer.param_groups[0]
            state = sum(held(optimizer.new_state(like, group)) * count for like, count in likes.items())
        else:
            state = matrices * result[name]["float32"]
        whole = "adamw" in name
        state += embedding * (result[name]["float32"] if whole else 8)
        result[name]["qwen3-0.6b"] = (
            None if "(torch)" in name and not whole else round(state / (matrices + embedding), 2)
        )
    return result


def held(state):
    """Bytes of the tensors in a state; a quantized one is counted with its scales."""
    found = 0
    for value in state.values():
        if isinstance(value, torch.Tensor):
            inner = (
                [getattr(value, name) for name in value.__tensor_flatten__()[0]]
                if hasattr(value, "codes")
                else [value]
            )
            found += sum(t.numel() * t.element_size() for t in inner)
    return found


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--rows", nargs="+", help="rows to run, by the beginning of their names; all by default")
    parser.add_argument(
        "--json", type=Path, help="file for the results; rows that it has and this run leaves out stay"
    )
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    # A training process has freed large blocks before its first step, after which glibc's allocator keeps memory
    # instead of returning it to the system at every turn. Without this line the first pair alone would pay for that.
    torch.ones(7_900_000)

    results = cells.load(args.json) if args.json and args.json.exists() else {"rows": {}}
    machine = cells.machine(args.device, args.threads) | {"clock": "process" if args.device == "cpu" else "wall"}
    for name, (what, bound, ours, theirs) in pairs().items():
        if args.rows and not any(name.startswith(row) for row in args.rows):
            continue
        rounds = args.rounds if not name.startswith("fismo") else min(args.rounds, 3)  # eigh takes many seconds
        row = {"what": what, "bound": bound, "rounds": rounds, **compare(ours, theirs, rounds, args.device)}
        results["rows"][name] = {**row, "machine": machine, "command": cells.command()}
        if all("command" in kept for kept in results["rows"].values()):
            # Older files have one of each for all rows, those of the last run, which may have been a partial one.
            results = {key: value for key, value in results.items() if key not in ("machine", "command")}
        verdict = "" if bound is None else f"  bound {bound:.3g}: {'met' if row['ratio'] <= bound else 'MISSED'}"
        print(f"{name:22s} {row['ratio']:7.3f} {row['quartiles']}  {row['ours_ms']} / {row['theirs_ms']} ms{verdict}")
        if args.json:
            cells.save(args.json, results)
    if not args.rows or "memory" in args.rows:
        results["state_bytes_per_element"] = memory()
        for name, bytes_per_element in results["state_bytes_per_element"].items():
            print(f"{name:22s} {bytes_per_element} bytes of state per matrix element")
        if args.json:
            cells.save(args.json, results)


if __name__ == "__main__":
    main()
