"""In pieces as DeepSpeed's ZeRO cuts them, over three processes, every optimizer must do what it does in one.

DeepSpeed itself is not needed: the stand-ins here have what `trl_trust.optim.zero` reads of its optimizers. The same
with DeepSpeed, through a Trainer, is test_optimizers_launched.py.
"""

import math
from functools import partial
from types import SimpleNamespace

import pytest
import torch
import torch.distributed as dist
from test_fsdp2 import OPTIMIZERS, build, gradients, run_single, spawn
from torch import nn

from trl_trust.optim import FISMO, Muon, matrix
from trl_trust.optim.zero import Layout, Piece, read_layouts


WORLD = 3
MAKE = {name: make for name, make in OPTIMIZERS.items() if name != "guarded"} | {
    "fismo": lambda m: FISMO(m, lr=0.1, update_interval=2),
    "fismo_split": lambda m: FISMO(m, lr=0.1, split_sizes={"^1.weight": (2, 4)}),
}


def padded(parts, multiple):
    flat = torch.cat([part.flatten() for part in parts])
    return torch.cat([flat, flat.new_zeros(-len(flat) % multiple)])


class Stage2:
    """Groups concatenated and cut into equal parts; `order` is the order within, which round-robin changes."""

    gap = 0  # elements between parameters, which `parameter_alignment` leaves

    def __init__(self, optimizer, order):
        self.optimizer, self.groups = optimizer, [list(group["params"]) for group in optimizer.param_groups]
        self.ordered = [[group[i] for i in order(len(group))] for group in self.groups]
        self.flats = [self.concatenate(group) for group in self.ordered]
        rank = dist.get_rank()
        self.vectors = [nn.Parameter(flat.chunk(WORLD)[rank].clone()) for flat in self.flats]
        for group, flat in zip(self.ordered, self.flats, strict=True):
            at = 0
            for p in group:
                p.data = flat[at : at + p.numel()].view_as(p)
                at += p.numel() + self.gap
        for group, vector in zip(optimizer.param_groups, self.vectors, strict=True):
            group["params"] = [vector]
        self.bit16_groups, self.bit16_groups_flat = self.groups, self.flats
        self.single_partition_of_fp32_groups = self.vectors
        self.real_dp_process_group = [dist.group.WORLD] * len(self.groups)

    def concatenate(self, tensors):
        return padded([torch.cat([t.detach().flatten(), t.new_zeros(self.gap)]) for t in tensors], 2 * WORLD)

    def step(self, grads):
        """One group after the other, as DeepSpeed calls the optimizer."""
        groups = self.optimizer.param_groups
        for group, ordered, flat, vector in zip(groups, self.ordered, self.flats, self.vectors, strict=True):
            vector.grad = self.concatenate([grads[p] for p in ordered]).chunk(WORLD)[dist.get_rank()]
            self.optimizer.param_groups = [group]
            self.optimizer.step()
            parts = [torch.empty_like(vector.data) for _ in range(WORLD)]
            dist.all_gather(parts, vector.data)
            flat.copy_(torch.cat(parts))
        self.optimizer.param_groups = groups

    def parameters(self):
        return [p.detach() for group in self.groups for p in group]


class Stage1InBf16(Stage2):
    """The other optimizer that DeepSpeed has for stage 1: other names."""

    def __init__(self, optimizer, order):
        super().__init__(optimizer, order)
        self.bf16_groups, self.bf16_groups_flat = self.bit16_groups, self.bit16_groups_flat
        self.fp32_groups_flat_partition = self.single_partition_of_fp32_groups
        del self.bit16_groups, self.bit16_groups_flat, self.single_partition_of_fp32_groups


class Aligned(Stage2):
    gap = 3


class Stage3:
    """Each parameter cut into equal parts, padded; groups cut into sub-groups of `size` parameters."""

    def __init__(self, optimizer, order, size=2):
        self.optimizer, self.rank = optimizer, dist.get_rank()
        self.groups = [list(group["params"]) for group in optimizer.param_groups]
        self.fp16_groups, self.fp32_partitioned_groups_flat, self.group_of = [], [], []
        for index, group in enumerate(self.groups):
            for start in range(0, len(group), size):
                part = group[start : start + size]
                self.fp16_groups.append(part)
                self.fp32_partitioned_groups_flat.append(nn.Parameter(self.own_part(p.detach() for p in part)))
                self.group_of.append(index)
        for p in (p for group in self.groups for p in group):
            p.ds_shape, p.ds_numel, p.ds_process_group = p.shape, p.numel(), dist.group.WORLD
            p.partition_numel = partial(math.ceil, p.numel() / WORLD)
            p.data = torch.empty(0, dtype=p.dtype)
        for group in optimizer.param_groups:
            group["params"] = []

    def own_part(self, tensors):
        return torch.cat([padded([t], WORLD).chunk(WORLD)[self.rank] for t in tensors])

    def step(self, grads):
        subgroups = zip(self.fp16_groups, self.fp32_partitioned_groups_flat, self.group_of, strict=True)
        for part, vector, index in subgroups:
            vector.grad = self.own_part(grads[p] for p in part)
            self.optimizer.param_groups[index]["params"] = [vector]
            self.optimizer.step()
            self.optimizer.param_groups[index]["params"] = []

    def parameters(self):
        whole = []
        for part, vector in zip(self.fp16_groups, self.fp32_partitioned_groups_flat, strict=True):
            vectors = [torch.empty_like(vector.data) for _ in range(WORLD)]
            dist.all_gather(vectors, vector.data)
            at = 0
            for p in part:
                size = p.partition_numel()
                flat = torch.cat([v[at : at + size] for v in vectors])
                whole.append(flat[: p.ds_numel].view(p.ds_shape))
                at += size
        return whole


def as_it_is(n):
    return range(n)


def round_robin(n):
    return [*range(0, n, 2), *range(1, n, 2)]


STAGES = {
    "stage 2": lambda o: Stage2(o, as_it_is),
    "stage 2, round robin": lambda o: Stage2(o, round_robin),
    "stage 2, aligned": lambda o: Aligned(o, as_it_is),
    "stage 1 in bf16": lambda o: Stage1InBf16(o, as_it_is),
    "stage 3": lambda o: Stage3(o, as_it_is),
}


def check_equal_to_one_process():
    moved = set()
    for limit, some in ((2**19, MAKE), (30, ("auon", "muon_split", "fismo"))):  # one round, and many
        matrix.MAX_BATCH_NUMEL["cpu"] = limit
        for name, make in ((name, MAKE[name]) for name in some):
            expected, one = run_single(make)
            # in the order of the groups
            by_name = dict(zip([n for n, _ in build().named_parameters()], expected, strict=True))
            expected = [by_name[n] for group in one.param_groups for n in group["param_names"]]
            for stage, take in STAGES.items():
                model = build()
                optimizer = make(model)
                report = optimizer.routing_report()
                zero = take(optimizer)
                optimizer.bind(SimpleNamespace(optimizer=zero, module=model))
                assert optimizer.routing_report() == report
                for step in range(4):
                    zero.step(dict(zip(model.parameters(), gradients(step), strict=True)))
                for p, q in zip(zero.parameters(), expected, strict=True):
                    assert torch.allclose(p, q, rtol=1e-9, atol=1e-11), f"{name}, {stage}, {limit}"
                for layout in optimizer._layouts.values():
                    rounds = layout.rounds(limit)
                    moved |= {(stage, m.moved) for r in rounds for m in r.matrices if len(m.shape) > 1}
                    for r in rounds:
                        for rank in range(WORLD):
                            mine = [m.shape.numel() for m in r.matrices if m.owner == rank]
                            assert sum(mine) <= max([limit, *mine])
                if name == "fismo":  # each rank has the factors of its own matrices only
                    names = {key.partition(":")[0] for s in optimizer.state.values() for key in s if ":" in key}
                    assert set(optimizer.condition_numbers()) == names
                    held = [None] * WORLD
                    dist.all_gather_object(held, sorted(names))
                    every = sum(held, [])
                    matrices = [n for g in one.param_groups if g["rule"] == "matrix" for n in g["param_names"]]
                    assert sorted(every) == sorted(matrices) and max(map(len, held)) < len(every)
    # nothing that was not tried: whole on a rank and across a border, each stage as it has them
    assert moved >= {("stage 2", True), ("stage 2", False), ("stage 3", True)}


def test_pieces_equal_one_process():
    spawn(check_equal_to_one_process, world=WORLD)


def test_owners_share_the_work():
    """Whole matrices stay where they are; the others go to the holder with least to do, never to a rank without."""
    square = torch.Size((4, 4))
    pieces = [(Piece(0, 0, 0, 16),), (Piece(0, 0, 16, 8), Piece(1, 8, 0, 8)), (Piece(1, 0, 8, 4), Piece(2, 4, 0, 12))]
    layout = Layout([(f"w{i}", square, p) for i, p in enumerate(pieces)], 0, None)
    (only,) = layout.rounds(1000)
    assert {m.name: m.owner for m in only.matrices} == {"w0": 0, "w1": 1, "w2": 2}
    sixteen = tuple(Piece(rank, 4 * rank, 0, 4) for rank in range(4))
    layout = Layout([(f"w{i}", square, sixteen) for i in range(8)], 0, None)
    (only,) = layout.rounds(1000)
    owners = [m.owner for m in only.matrices]
    assert sorted(owners) == [0, 0, 1, 1, 2, 2, 3, 3]
    assert [len(r.matrices) for r in layout.rounds(16)] == [4, 4]


def test_what_cannot_be_put_together_is_refused():
    model = build()
    zero = SimpleNamespace(cpu_offload=True)
    engine = SimpleNamespace(optimizer=zero, module=model)
    with pytest.raises(ValueError, match="offload_optimizer.* set its device to none"):
        read_layouts(engine)
    zero.cpu_offload, zero.model_parallel_world_size = False, 2
    with pytest.raises(ValueError, match="autotp_size"):
        read_layouts(engine)
    zero.model_parallel_world_size = 1
    with pytest.raises(ValueError, match="skip_nonfinite=True cannot run under DeepSpeed ZeRO"):
        Muon(model, skip_nonfinite=True).bind(engine)
