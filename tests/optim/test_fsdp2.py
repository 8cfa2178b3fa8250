"""Sharded by FSDP2 over two processes, every optimizer must do what it does in one process.

The workers assert that parameters really are sharded: a silent fall-back to plain ones would pass any comparison.
"""

import copy
import os
import socket

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from pytest import approx
from tiny import leave
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_optimizer_state_dict,
    set_optimizer_state_dict,
)
from torch.distributed.fsdp import fully_shard
from torch.distributed.tensor import DTensor

from trl_trust.optim import FISMO, AuON, HybridAuON, MatrixOptimizer, Muon


WORLD = 2


class Experts(nn.Module):
    def __init__(self, number):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(number, 6, 4))  # (experts, out, in): FSDP2 shards the experts


def build(dtype=torch.float64):
    """Even rows (6), uneven rows (5), uneven experts (3), and one row and one expert: empty shards on rank 1."""
    torch.manual_seed(0)
    layers = [nn.Linear(6, 6), nn.Linear(6, 5, bias=False), nn.Linear(5, 6, bias=False), nn.Linear(6, 1)]
    return nn.Sequential(nn.Embedding(7, 6), *layers, nn.LayerNorm(6), Experts(3), Experts(1)).to(dtype)


class Whitened(MatrixOptimizer):
    """A rule with state of its own, as FISMO's: it needs whole matrices and keeps (m, m) beside them."""

    shared_momentum = False

    def layout(self, group):
        return "replicated"

    def direction(self, updates, states, group):
        for state, update in zip(states, updates, strict=True):
            gram = update @ update.mT
            state["gram"] = gram if "gram" not in state else 0.9 * state["gram"] + 0.1 * gram
        return torch.linalg.solve(torch.stack([s["gram"] for s in states]) + torch.eye(updates.shape[-2]), updates)


class Counted(FISMO):
    """Counts the matrices that this rank works on."""

    worked = 0

    def direction(self, updates, states, group):
        self.worked += len(states)
        return super().direction(updates, states, group)


OPTIMIZERS = {
    "auon": lambda m: AuON(m, lr=0.1, weight_decay=0.1, aux_weight_decay=0.1),
    "auon_repo_rms": lambda m: AuON(m, lr=0.1, variant="repo", brake_scale="rms", shape_scale="original", gamma=0.3),
    "auon_split": lambda m: AuON(m, lr=0.1, split_sizes={"^1.weight": (2, 4)}),
    "hybrid": lambda m: HybridAuON(m, lr=0.1),
    "muon": lambda m: Muon(m, lr=0.1, weight_decay=0.1, ns_dtype="float32"),
    "auon_one_row": lambda m: AuON(m, lr=0.1, matrix_pattern="^4.weight"),
    "muon_one_row": lambda m: Muon(m, lr=0.1, matrix_pattern="^4.weight", ns_dtype="float32"),
    "muon_split": lambda m: Muon(m, lr=0.1, ns_dtype="float32", split_sizes={"^1.weight": (2, 4)}),
    "stateful": lambda m: Whitened(m, lr=0.1, matrix_defaults={"shape_scale": None}),
    "fismo": lambda m: Counted(m, lr=0.1, update_interval=2),
    "fismo_split": lambda m: FISMO(m, lr=0.1, split_sizes={"^1.weight": (2, 4)}, momentum_space="param"),
    "fismo_cholesky": lambda m: FISMO(m, lr=0.1, root="cholesky", momentum_space="param", max_factor_dim=5),
    "muon_bf16": lambda m: Muon(m, lr=0.1, ns_dtype="float32", momentum_dtype="bfloat16"),
    "guarded": lambda m: Muon(m, lr=0.1, ns_dtype="float32", skip_nonfinite=True),
}


def gradients(step):
    """Full gradients of every parameter, the same on every rank."""
    generator = torch.Generator().manual_seed(step)
    grads = [torch.randn(p.shape, dtype=torch.float64, generator=generator) for p in build().parameters()]
    if step == 1:
        grads[1][0, 0] = 3.0
    return grads


def local_part(full, p):
    return torch.distributed.tensor.distribute_tensor(full, p.device_mesh, p.placements)


def run_single(make, steps=(0, 1, 2, 3), poison=False):
    model = build()
    optimizer = make(model)
    for step in steps:
        for p, grad in zip(model.parameters(), gradients(step), strict=True):
            p.grad = grad
        if poison and step == 2:
            next(model.parameters()).grad[0, 0] = float("nan")
        optimizer.step()
    return [p.detach() for p in model.parameters()], optimizer


def shard(make, dtype=torch.float64):
    """As accelerate does it: built from plain parameters, which are then swapped for DTensors in the groups."""
    model = build(dtype)
    optimizer = make(model)
    before = list(model.parameters())
    for layer in list(model)[1:3]:
        fully_shard(layer)
    fully_shard(model)
    swap = dict(zip(before, model.parameters(), strict=True))
    for group in optimizer.param_groups:
        group["params"] = [swap[p] for p in group["params"]]
    params = list(model.parameters())
    assert all(isinstance(p, DTensor) for p in params)
    assert sum(p.to_local().numel() for p in params) < sum(p.numel() for p in params)
    return model, optimizer


def train_sharded(model, optimizer, steps, poison=False):
    for step in steps:
        for p, grad in zip(model.parameters(), gradients(step), strict=True):
            p.grad = local_part(grad.to(p.dtype), p)
        if poison and step == 2 and dist.get_rank() == 1:  # on one rank only: all must skip
            next(model.parameters()).grad.to_local()[0, 0] = float("nan")
        optimizer.step()


def full(tensors):
    return [t.full_tensor() if isinstance(t, DTensor) else t for t in tensors]


def worker(rank, port, world, body, *args):
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "WORLD_SIZE": str(world)}
    torch.set_num_threads(1)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    torch.distributed.device_mesh.init_device_mesh("cpu", (world,))
    body(*args)  # an exception travels to the test
    leave()


def spawn(body, *args, world=WORLD):
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    mp.spawn(worker, args=(port, world, body, *args), nprocs=world)


def check_equal_to_one_process():
    for name, make in OPTIMIZERS.items():
        poison = name == "guarded"
        expected, one = run_single(make, poison=poison)
        model, optimizer = shard(make)
        train_sharded(model, optimizer, (0, 1), poison)
        if name == "fismo_split":  # as a checkpoint from before ranks shared it has it
            for state in optimizer.state.values():
                shared = {k: v for k, v in state.items() if k.startswith("block") and isinstance(v, DTensor)}
                state.update((k, v.full_tensor()) for k, v in shared.items())
        train_sharded(model, optimizer, (2, 3), poison)
        for (parameter, p), q in zip(model.named_parameters(), expected, strict=True):
            assert torch.allclose(p.detach().full_tensor(), q, rtol=1e-9, atol=1e-11), f"{name}, {parameter}"
        assert optimizer.skipped_steps == (1 if poison else 0)
        for p in model.parameters():
            state = optimizer.state[p]
            for key, value in state.items():
                if "momentum_buffer" in key or "_factor" in key or "_root" in key:
                    assert isinstance(value, DTensor) and value.placements == p.placements, (name, key)
        if name == "fismo":
            # Of 4 steps with 3 matrices and 2 stacks of experts: of the stacks each rank has its own experts.
            worked = torch.tensor([optimizer.worked])
            dist.all_reduce(worked)
            assert one.worked == 4 * 5 and worked.item() == 4 * (3 + 2 * WORLD)
            assert optimizer.condition_numbers() == {n: approx(sides) for n, sides in one.condition_numbers().items()}


def check_distributed_checkpoint(dtype, full_state):
    options = StateDictOptions(full_state_dict=full_state)
    for name in ("auon", "hybrid", "stateful", "fismo"):
        make = OPTIMIZERS[name]
        model, optimizer = shard(make, dtype)
        train_sharded(model, optimizer, (0, 1))
        saved = copy.deepcopy(get_optimizer_state_dict(model, optimizer, options=options))  # else it goes on training
        resumed_model, resumed = shard(make, dtype)
        with torch.no_grad():
            for p, q in zip(resumed_model.parameters(), model.parameters(), strict=True):
                p.copy_(q)
        # Creates its state by a step with zero gradients and lr 0, which must not move the weights, and then loads.
        before = full(p.detach() for p in resumed_model.parameters())
        template = get_optimizer_state_dict(resumed_model, resumed, options=options)
        assert template["state"].keys() == saved["state"].keys(), name
        after = full(p.detach() for p in resumed_model.parameters())
        assert all(torch.equal(a, b) for a, b in zip(before, after, strict=True)), name
        set_optimizer_state_dict(resumed_model, resumed, saved, options=options)
        for p in resumed_model.parameters():
            for key, value in resumed.state[p].items():
                plain = key.rpartition(".")[2] in ("step", "failures")
                assert plain or value.dtype == (torch.float32 if dtype == torch.bfloat16 else torch.float64)
        train_sharded(model, optimizer, (2, 3))
        train_sharded(resumed_model, resumed, (2, 3))
        for (parameter, p), q in zip(model.named_parameters(), resumed_model.parameters(), strict=True):
            assert torch.equal(p.full_tensor(), q.full_tensor()), f"{name} {parameter}"


def test_sharded_equals_one_process():
    spawn(check_equal_to_one_process)


def check_distributed_checkpoints():
    for dtype in (torch.float64, torch.bfloat16):
        for full_state in (False, True):
            check_distributed_checkpoint(dtype, full_state)


def test_distributed_checkpoint_resumes_exactly():
    spawn(check_distributed_checkpoints)
