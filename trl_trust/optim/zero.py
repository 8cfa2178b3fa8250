"""Whole matrices under DeepSpeed's ZeRO, whose optimizers hold flat pieces.

ZeRO gives an optimizer, in the place of a group's parameters, this rank's part of all of them as one vector. Stages 1
and 2 cut the concatenated group into equal parts, so that most matrices lie whole on one rank and few across a border;
stage 3 cuts every parameter. DeepSpeed knows where each piece lies, and that is all that is needed here: momentum and
AdamW work on the vectors as they are, and for [`MatrixOptimizer.direction`] an all-to-all brings the pieces of each
matrix to one rank, its owner, and the pieces of the result back. What lies whole on a rank is not moved.

DeepSpeed 0.19's own Muon does otherwise: in stages 1 and 2 each rank that holds a piece gets the whole gradient and
repeats the work, with a momentum of whole matrices; stage 3 gathers gradients and momentum. Both come before clipping,
which then acts on the orthogonalised update. Here clipping comes first, as in a single process.

This is the one module that knows DeepSpeed's optimizers (0.19.8). It imports nothing of DeepSpeed, and reads
attributes without an underscore: `DeepSpeedZeroOptimizer` (stages 1 and 2) has `bit16_groups`, `bit16_groups_flat`,
`single_partition_of_fp32_groups` and `real_dp_process_group`; `BF16_Optimizer` (stage 1 with bf16 parameters and
float32 accumulation) the same under other names; `DeepSpeedZeroOptimizer_Stage3` has `fp16_groups` and
`fp32_partitioned_groups_flat`, and its parameters `ds_shape`, `ds_numel`, `ds_process_group` and `partition_numel()`.
"""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from itertools import groupby
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Shard


def stack(tensors: Sequence[Tensor]) -> Tensor:
    """`torch.stack`, without a copy where there is one."""
    return torch.stack(list(tensors)) if len(tensors) > 1 else tensors[0].unsqueeze(0)


def whole_shape(parameter: Tensor) -> torch.Size:
    """The shape of a parameter in the model, of which ZeRO stage 3 leaves nothing in `parameter.shape`."""
    return torch.Size(getattr(parameter, "ds_shape", parameter.shape))


@dataclass(frozen=True)
class Piece:
    """`length` elements of a flattened matrix from `start` on, which lie from `at` on in the vector of `rank`."""

    rank: int
    start: int
    at: int
    length: int


@dataclass(frozen=True, eq=False)
class Matrix:
    """A parameter in pieces, in order, and the rank that gets it whole."""

    name: str
    shape: torch.Size
    pieces: tuple[Piece, ...]
    owner: int

    @property
    def moved(self) -> bool:
        """Whether it is not whole where it lies."""
        return len(self.pieces) > 1


@dataclass(frozen=True, eq=False)
class Round:
    """Matrices whose pieces travel together, a bounded number of elements to each rank."""

    matrices: tuple[Matrix, ...]
    rank: int
    process_group: Any

    def gather(self, vector: Tensor) -> dict[Matrix, Tensor]:
        """Collect this rank's matrices, whole, from the ranks' `vector`s."""
        sent = [[vector[p.at : p.at + p.length] for _, p in pieces] for pieces in self._held]
        received = self._exchange(sent, [sum(p.length for _, p in pieces) for pieces in self._owned], vector)
        mine = [m for m in self.matrices if m.owner == self.rank]
        whole = {m: vector.new_empty(m.shape) for m in mine if m.moved}
        for pieces, part in zip(self._owned, received, strict=True):
            for (m, p), piece in zip(pieces, part.split([p.length for _, p in pieces]), strict=True):
                whole[m].view(-1)[p.start : p.start + p.length] = piece
        for m in mine:
            if not m.moved:
                (p,) = m.pieces
                whole[m] = vector[p.at : p.at + p.length].view(m.shape)
        return whole

    def scatter(self, whole: dict[Matrix, Tensor], vector: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Return the results to where their pieces lie: pairs of a slice of `vector` and what belongs there."""
        flat = {m: t.reshape(-1).to(vector.dtype) for m, t in whole.items()}
        sent = [[flat[m][p.start : p.start + p.length] for m, p in pieces] for pieces in self._owned]
        received = self._exchange(sent, [sum(p.length for _, p in pieces) for pieces in self._held], vector)
        for pieces, part in zip(self._held, received, strict=True):
            for (_, p), piece in zip(pieces, part.split([p.length for _, p in pieces]), strict=True):
                yield vector[p.at : p.at + p.length], piece
        for m in flat:
            if not m.moved:
                (p,) = m.pieces
                yield vector[p.at : p.at + p.length], flat[m]

    @cached_property
    def _held(self) -> list[list[tuple[Matrix, Piece]]]:
        """What lies on this rank and has to be moved, by owner; both ranks of an exchange have it in one order."""
        return self._by_rank(lambda m, p: m.owner if p.rank == self.rank else None)

    @cached_property
    def _owned(self) -> list[list[tuple[Matrix, Piece]]]:
        """What this rank has to be given, by the rank where it lies."""
        return self._by_rank(lambda m, p: p.rank if m.owner == self.rank else None)

    def _by_rank(self, other: Callable[[Matrix, Piece], int | None]) -> list[list[tuple[Matrix, Piece]]]:
        moved = [m for m in self.matrices if m.moved]
        found = [[] for _ in range(dist.get_world_size(self.process_group) if moved else 0)]
        for m in moved:
            for p in m.pieces:
                if (rank := other(m, p)) is not None:
                    found[rank].append((m, p))
        return found

    def _exchange(self, sent: list[list[Tensor]], counts: list[int], like: Tensor) -> Sequence[Tensor]:
        """Send `sent[r]` to rank r; return what came from each, `counts[r]` elements. All ranks call it, or none."""
        if not sent:
            return []
        sizes = [sum(map(len, parts)) for parts in sent]
        outgoing = torch.cat([part for parts in sent for part in parts] or [like.new_empty(0)])
        incoming = like.new_empty(sum(counts))
        dist.all_to_all_single(incoming, outgoing, counts, sizes, group=self.process_group)
        return incoming.split(counts)


@dataclass
class Layout:
    """How the vectors that the ranks hold of one group (in stage 3, of one sub-group) make up its parameters.

    Args:
        matrices: `(name, shape, pieces)` of each.
        rank: This rank within the process group.
        process_group: The ranks that share the group.
        chunked: Each is a matrix, not a stack of experts, and cut as `torch.chunk` cuts its elements, which is how a
            DTensor is sharded (stage 3).
    """

    matrices: Sequence[tuple[str, torch.Size, tuple[Piece, ...]]]
    rank: int
    process_group: Any
    chunked: bool = False
    _rounds: dict[int, list[Round]] = field(default_factory=dict)

    def shards(self, vector: Tensor, limit: int) -> Iterator[tuple[torch.Size, list[slice], DTensor]]:
        """Matrices of one shape as they lie, flattened: for rules that need no more of them than a few sums.

        Yields:
            The shape, where in the vector this rank's parts lie, and the stack (k, 1, numel), sharded along the last
            dimension, at most `limit` elements of it here.
        """
        mesh = DeviceMesh.from_group(self.process_group, vector.device.type)
        by_shape: dict[torch.Size, list[slice]] = {}
        for _, shape, pieces in self.matrices:
            at, length = next(((p.at, p.length) for p in pieces if p.rank == self.rank), (0, 0))
            by_shape.setdefault(shape, []).append(slice(at, at + length))
        for shape, slots in by_shape.items():
            numel = shape.numel()
            size = max(1, limit // -(-numel // mesh.size()))
            for start in range(0, len(slots), size):
                some = slots[start : start + size]
                local = stack([vector[slot] for slot in some]).unsqueeze(1)  # (k, 1, part)
                whole = torch.Size((len(some), 1, numel))
                options = dict(run_check=False, shape=whole, stride=(numel, numel, 1))
                yield shape, some, DTensor.from_local(local, mesh, [Shard(2)], **options)

    def rounds(self, limit: int) -> list[Round]:
        """The matrices in rounds of at most `limit` elements a rank; one of more than that has a round of its own."""
        if limit not in self._rounds:
            self._rounds[limit] = self._plan(limit)
        return self._rounds[limit]

    def _plan(self, limit: int) -> list[Round]:
        load: dict[int, int] = {}
        owned: dict[int, list[Matrix]] = {}
        # First those that stay where they are, then the others, each to the holder that has least to do.
        for name, shape, pieces in sorted(self.matrices, key=lambda m: len(m[2]) > 1):
            owner = min((p.rank for p in pieces), key=lambda rank: load.get(rank, 0))
            load[owner] = load.get(owner, 0) + shape.numel() * min(shape[-2:])  # of products, as Newton-Schulz has
            owned.setdefault(owner, []).append(Matrix(name, shape, pieces, owner))
        rounds: list[list[Matrix]] = []
        for matrices in owned.values():
            index, size = 0, 0
            # Equal shapes beside each other, for they are worked on as one batch; those that are moved together.
            for matrix in sorted(matrices, key=lambda m: (not m.moved, m.shape)):
                if size and size + matrix.shape.numel() > limit:
                    index, size = index + 1, 0
                size += matrix.shape.numel()
                if index == len(rounds):
                    rounds.append([])
                rounds[index].append(matrix)
        return [Round(tuple(matrices), self.rank, self.process_group) for matrices in rounds]


def step_matrices(
    layout: Layout, vector: Tensor, limit: int, work: Callable[[list[Matrix], Tensor], Tensor], target: Tensor
) -> Iterator[tuple[list[Tensor], list[Tensor]]]:
    """Run `work` on whole matrices and return its results to the pieces.

    Args:
        layout: Of the vectors.
        vector: This rank's, of which the matrices are put together.
        limit: Elements of whole matrices that a rank holds at one time.
        work: From matrices of one shape and their stack (k, ..., rows, columns) to a tensor of the same shape.
        target: This rank's vector of the same layout, of which slices are returned.

    Yields:
        Slices of `target`, and the results that belong to them.
    """
    for round in layout.rounds(limit):
        whole = round.gather(vector)
        results: dict[Matrix, Tensor] = {}
        for _, same in groupby(whole, key=lambda m: m.shape):
            batch = list(same)
            stacked = stack([whole[m] for m in batch])
            results |= zip(batch, work(batch, stacked).unbind(0), strict=True)
        pairs = list(round.scatter(results, target))
        if pairs:  # a rank may have nothing of a round
            yield [slot for slot, _ in pairs], [piece for _, piece in pairs]


# -------------------------------------------------------------------------------------------------------------------
# What is read of DeepSpeed


def read_layouts(engine: Any) -> dict[Tensor, Layout]:
    """Return the layout of every vector that the ZeRO optimizer of a `DeepSpeedEngine` hands to ours.

    Raises:
        ValueError: If it offloads the optimizer, or tensor parallelism has split the matrices before.
    """
    zero = engine.optimizer
    if getattr(zero, "cpu_offload", False) or getattr(zero, "offload_optimizer", False):
        raise ValueError(OFFLOADED)
    if getattr(zero, "model_parallel_world_size", 1) > 1:
        raise ValueError("DeepSpeed's tensor parallelism splits matrices before the optimizer: set autotp_size to 0")
    names = {id(parameter): name for name, parameter in engine.module.named_parameters(remove_duplicate=False)}
    if hasattr(zero, "fp32_partitioned_groups_flat"):
        vectors = zip(zero.fp32_partitioned_groups_flat, zero.fp16_groups, strict=True)
        return {vector: _by_parameter(parameters, names) for vector, parameters in vectors}
    bf16 = hasattr(zero, "bf16_groups")
    vectors = zip(
        zero.fp32_groups_flat_partition if bf16 else zero.single_partition_of_fp32_groups,
        zero.bf16_groups if bf16 else zero.bit16_groups,
        zero.bf16_groups_flat if bf16 else zero.bit16_groups_flat,
        zero.real_dp_process_group,
        strict=True,
    )
    return {vector: _by_group(vector.numel(), *rest, names) for vector, *rest in vectors}


def _by_group(size: int, parameters: Sequence[Tensor], whole: Tensor, process_group: Any, names: dict) -> Layout:
    """Stages 1 and 2: rank r has elements [r size, (r + 1) size) of the group, into which the parameters are views."""
    matrices = []
    for parameter in parameters:
        first = (parameter.data_ptr() - whole.data_ptr()) // whole.element_size()
        last = first + parameter.numel()
        pieces = []
        for rank in range(first // size, (last - 1) // size + 1):
            start, end = max(first, rank * size), min(last, (rank + 1) * size)
            pieces.append(Piece(rank, start - first, start - rank * size, end - start))
        matrices.append((names[id(parameter)], parameter.shape, tuple(pieces)))
    return Layout(matrices, dist.get_rank(process_group), process_group)


def _by_parameter(parameters: Sequence[Any], names: dict) -> Layout:
    """Stage 3: rank r has elements [r size, (r + 1) size) of each parameter, `size` a parameter's own, padded."""
    matrices, at = [], 0
    process_group = parameters[0].ds_process_group
    for parameter in parameters:
        size, numel = parameter.partition_numel(), parameter.ds_numel
        starts = range(0, numel, size)
        pieces = tuple(Piece(rank, start, at, min(size, numel - start)) for rank, start in enumerate(starts))
        matrices.append((names[id(parameter)], whole_shape(parameter), pieces))
        at += size
    chunked = all(len(shape) == 2 for _, shape, _ in matrices)
    return Layout(matrices, dist.get_rank(process_group), process_group, chunked)


OFFLOADED = (
    "matrix optimizers cannot run with DeepSpeed's offload_optimizer, where they would step on the CPU and exchange "
    "matrices from there; set its device to none, or use one of transformers' own optimizers"
)
