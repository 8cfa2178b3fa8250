"""The step that AuON, Muon and FISMO share: an optimizer for matrices with AdamW for everything else inside.

A rule is one method, [`MatrixOptimizer.direction`]: it maps a batch of equal-shaped matrices (k, ..., m, n) to their
update directions. The rest is here, once: batching by shape, momentum, decay, the auxiliary AdamW, float32 state, and
sharding. Which parameter is a matrix is decided in `routing.py`.

What it is *not*: it keeps no float32 master copy of bf16 parameters (load the model in float32 and autocast, as TRL
does), and it is no FSDP1 optimizer (which flattens the matrices; refused).
"""

import logging
import math
import weakref
from collections.abc import Callable, Collection, Iterable, Mapping, MutableMapping, Sequence
from dataclasses import replace
from itertools import chain
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Partial, Placement, Replicate, Shard, distribute_tensor
from torch.optim import Optimizer
from torch.optim.adamw import adamw

from ..settings import BelowOne, NonNegative, Positive
from .options import declared_options, require_option
from .rounding import round_stochastically
from .routing import FLATTENED, Route, route, routing_table
from .zero import Layout as ZeroLayout
from .zero import Matrix, read_layouts, stack, step_matrices, whole_shape


logger = logging.getLogger(__name__)

# Upper bounds on the elements of one stacked batch. A GPU wants few launches: 256 MB in float32, a few times that
# inside Newton-Schulz. A CPU wants what its cache holds: 2 MB (AuON's step is three times slower with 256 MB).
MAX_BATCH_NUMEL = {"cpu": 2**19}
MAX_BATCH_NUMEL_ELSEWHERE = 2**26

NOT_ALL_AT_ONCE = (
    "skip_nonfinite=True cannot run under DeepSpeed ZeRO, which has the optimizer step one group after the other, "
    "before it has seen all gradients; DeepSpeed looks by itself with bf16.check_grad_overflow in its config"
)

State = MutableMapping[str, Any]
Layout = Literal["sharded", "owner", "replicated"]
ShapeScale = Literal["original", "match_rms_adamw"]
MomentumDtype = Literal["float32", "bfloat16"]
MOMENTUM_DTYPES = {"float32": None, "bfloat16": torch.bfloat16}  # None: float64 for float64 parameters


def shape_factor(shape_scale: ShapeScale | None, m: int, n: int) -> float:
    """Scale of an *orthogonal* update of an (m, n) matrix, m outputs and n inputs.

    `"original"` is sqrt(max(1, m/n)) (Muon, K. Jordan); `"match_rms_adamw"` is .2 sqrt(max(m, n)), which gives the
    update AdamW's usual root mean square of .2 (2502.16982); `None` is 1.
    """
    if shape_scale == "original":
        return math.sqrt(max(1.0, m / n))
    if shape_scale == "match_rms_adamw":
        return 0.2 * math.sqrt(max(m, n))
    return 1.0


class MatrixOptimizer(Optimizer):
    """Base of the matrix optimizers. A subclass gives [`direction`], and perhaps [`validate`], [`layout`], [`scale`].

    Groups carry `rule`, `"matrix"` or `"adamw"`, and hold all settings, so that schedulers and callbacks can change
    them. The state of a parameter is created at its first step, in float32 (float64 for float64 parameters; momentum
    in bfloat16 where a rule has `momentum_dtype`): `momentum_buffer` for a matrix, `step`, `exp_avg` and `exp_avg_sq`
    for the rest, whatever a rule adds.

    Args:
        params: A model, which is then routed (see [`trl_trust.optim.routing`]); or tensors, (name, tensor) pairs or
            groups, which are taken at their word: all go to the matrix rule unless a group says `"rule": "adamw"`.
            A group may set `"transposed"` for weights stored as (in, out), and `"split_sizes"` for fused weights.
        lr: Learning rate of the matrices: a number >= 0, or a tensor of one element.
        matrix_defaults: The rule's own group settings and their values (`momentum`, `nesterov`, ...).
        weight_decay: Decoupled decay of the matrices, times the group's `lr`; >= 0.
        aux_lr: Learning rate of AdamW. Default: a tenth of `lr`.
        aux_betas: AdamW's averages, each in [0, 1).
        aux_eps: AdamW's epsilon.
        aux_weight_decay: AdamW's decay of embeddings and heads; biases, norms and vectors are never decayed.
        matrix_pattern: Regular expression; parameters whose names it finds go to the matrix rule. Needs a model.
        adamw_pattern: The same for AdamW. Needs a model.
        split_sizes: `{pattern: sizes}` for weights that stack several matrices along the output dimension, or the text
            form `"c_attn:768:768:768"`. Needs a model.
        no_decay: Names of parameters without decay. Default: biases and norms. Needs a model.
        skip_nonfinite: Leave weights and state alone, and count, when any gradient holds NaN or infinity. Costs one
            host synchronisation a step; without it such a gradient spreads, as in `torch.optim`.

    Raises:
        ValueError: If a setting is out of range, no parameter goes to the matrix rule, or a parameter is complex,
            sparse, integer, empty, flattened, or has fewer than two dimensions in a matrix group.
        RuntimeError: In `step`, if a gradient is sparse or a matrix was flattened after construction, other than by
            a DeepSpeed engine that [`bind`] was given.
    """

    # False: the rule averages gradients itself, and `direction` receives the gradients. `momentum` is then its own.
    shared_momentum = True

    # Under ZeRO: what makes the engine known, and how the vectors in the groups make up matrices. Not pickled.
    _find_engine: Callable[[], Any] | None = None
    _layouts: Mapping[Tensor, ZeroLayout] = {}

    def __init__(
        self,
        params: nn.Module | Iterable,
        lr: NonNegative | Tensor,
        *,
        matrix_defaults: Mapping[str, Any],
        weight_decay: NonNegative = 0.0,
        aux_lr: NonNegative | None = None,
        aux_betas: tuple[BelowOne, BelowOne] = (0.9, 0.95),
        aux_eps: Positive = 1e-8,
        aux_weight_decay: NonNegative = 0.0,
        matrix_pattern: str | None = None,
        adamw_pattern: str | None = None,
        split_sizes: Mapping[str, Sequence[int]] | str | None = None,
        no_decay: Collection[str] | None = None,
        skip_nonfinite: bool = False,
    ):
        _require_rate("lr", lr)
        require_option("skip_nonfinite", skip_nonfinite, bool)
        aux_lr = 0.1 * lr if aux_lr is None else aux_lr
        self.rule_defaults = {
            "matrix": {
                "lr": lr,
                "weight_decay": weight_decay,
                **matrix_defaults,
                "transposed": False,
                "split_sizes": (),
                "skip_nonfinite": skip_nonfinite,
                "skipped_steps": 0,
            },
            "adamw": {"lr": aux_lr, "betas": aux_betas, "eps": aux_eps, "weight_decay": aux_weight_decay},
        }
        self.routes: list[Route] = []
        if isinstance(params, nn.Module):
            self.routes = route(
                params,
                matrix_pattern=matrix_pattern,
                adamw_pattern=adamw_pattern,
                split_sizes=split_sizes,
                no_decay=no_decay,
            )
            params = _groups(self.routes)
            # What is kept is for reports: sharding frees the parameters that it replaces, if nobody holds them.
            self.routes = [replace(r, parameter=_outline(r.parameter)) for r in self.routes]
        elif not all(option is None for option in (matrix_pattern, adamw_pattern, split_sizes, no_decay)):
            raise ValueError(
                "matrix_pattern, adamw_pattern, split_sizes and no_decay route a model: pass the model instead of its "
                "parameters, or set 'rule', 'split_sizes' and 'weight_decay' in the groups"
            )
        super().__init__(params, {"lr": lr, "weight_decay": weight_decay})
        if not any(group["rule"] == "matrix" and group["params"] for group in self.param_groups):
            raise ValueError(
                f"{type(self).__name__} got no matrix parameter; everything would go to AdamW. Set matrix_pattern, or "
                f"use torch.optim.AdamW. Routing:\n{self.routing_report()}"
            )
        logger.info("%s: %s", type(self).__name__, self.routing_summary())
        logger.debug("%s routing:\n%s", type(self).__name__, self.routing_report())

    # ---------------------------------------------------------------------------------------------------------------
    # What a rule supplies

    def direction(self, updates: Tensor, states: Sequence[State], group: dict[str, Any]) -> Tensor:
        """Return the update directions of a batch of equal-shaped matrices.

        Args:
            updates: (k, ..., m, n), float32 or float64, m outputs and n inputs, k parameters: averaged gradients, or
                the gradients themselves where `shared_momentum` is `False`. Must not be written to.
            states: k mappings, one a parameter (or block of one), where the rule may keep tensors and numbers of its
                own; they are saved and loaded. Empty for sharded matrices, save under the layout `"replicated"` and
                where `shared_momentum` is `False`.
            group: Settings.

        Returns:
            (k, ..., m, n), a new tensor. The step is `parameter -= lr * scale * direction`.
        """
        raise NotImplementedError

    def new_state(self, like: Tensor, group: dict[str, Any]) -> dict[str, Any]:
        """Return the state with which the rule begins for a matrix (or stack of experts) like `like`, (..., m, n).

        For rules without `shared_momentum`. Ranks share it: a tensor (..., a, b) is split along a and put together for
        the owner of a matrix, whose `direction` writes into the tensors and may replace numbers, but adds nothing.
        """
        return {}

    def pass_over(self, state: State) -> None:
        """Count a step of a matrix that another rank has worked on, if the rule counts steps."""

    def validate(self, group: dict[str, Any]) -> None:
        """Raise `ValueError` if a setting of a matrix group is out of range. Called for every group that is added."""

    def layout(self, group: dict[str, Any]) -> Layout:
        """How `direction` sees matrices that are sharded over ranks (DTensor).

        - `"sharded"`: DTensors; for rules made of elementwise operations and reductions. Under ZeRO stage 3 they are
          flattened, (k, 1, m n).
        - `"owner"`: an all-to-all gives each rank a share of the batch, whole, and its state, see [`new_state`].
        - `"replicated"`: every rank has every matrix and all state, and does the same work.
        """
        return "owner"

    def scale(self, group: dict[str, Any], m: int, n: int) -> float:
        """Factor on the direction of an (m, n) matrix."""
        return shape_factor(group.get("shape_scale"), m, n)

    # ---------------------------------------------------------------------------------------------------------------
    # Groups

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        """Add a group; missing settings get the defaults of its `rule`.

        Raises:
            ValueError: If the rule or a key is unknown, a setting is out of range, or a parameter cannot be optimized.
        """
        group = dict(param_group)
        rule = group.setdefault("rule", "matrix")
        if rule not in self.rule_defaults:
            raise ValueError(f"rule={rule!r} in a parameter group; must be 'matrix' or 'adamw'")
        defaults = self.rule_defaults[rule]
        unknown = group.keys() - defaults.keys() - {"rule", "params", "param_names", "initial_lr"}
        if unknown:
            raise ValueError(
                f"unknown keys {sorted(unknown)} in a group with rule {rule!r}; known: {sorted(defaults)}"
            )
        for key, value in defaults.items():
            group.setdefault(key, value)
        self._check(group)
        super().add_param_group(group)
        try:
            for index, parameter in enumerate(group["params"]):
                _validate_parameter(parameter, _name(group, index), rule)
        except ValueError:
            self.param_groups.pop()
            raise

    def _check(self, group: dict[str, Any]) -> None:
        """Raise `ValueError` for a setting that is not of its kind, or does not go with the others."""
        kinds, prefix = declared_options(type(self)), "" if group["rule"] == "matrix" else "aux_"
        for key in self.rule_defaults[group["rule"]]:
            if key == "lr":
                _require_rate(prefix + key, group[key])
            elif prefix + key in kinds and key != "split_sizes":
                require_option(prefix + key, group[key], kinds[prefix + key])
        if not isinstance(group.get("split_sizes", ()), (tuple, list)):
            raise ValueError(f"split_sizes={group['split_sizes']!r} in a group must be a tuple, as (768, 768, 768)")
        if group["rule"] == "matrix":
            self.validate(group)

    def routing_report(self) -> str:
        """Return a table of all parameters: name, shape, rule, reason, learning rate, decay, scale."""
        routes = {r.name: r for r in self.routes}
        rows = [("parameter", "shape", "rule", "reason", "lr", "weight_decay", "scale")]
        for group in self.param_groups:
            # Under ZeRO a group has a vector, and remembers the names of what it is made of.
            whole = [r.parameter for r in map(routes.get, group.get("param_names", ())) if r is not None]
            for index, parameter in enumerate(whole or group["params"]):
                name, shape, scale = _name(group, index), "x".join(map(str, parameter.shape)) or "scalar", ""
                if group["rule"] == "matrix":
                    m, n = parameter.shape[-2:][:: -1 if group["transposed"] else 1]
                    blocks = group["split_sizes"] or (m,)
                    scale = ", ".join(f"{self.scale(group, block, n):.4g}" for block in blocks)
                    shape += " transposed" if group["transposed"] else ""
                    shape += f" split {'+'.join(map(str, blocks))}" if group["split_sizes"] else ""
                lr, decay = f"{float(group['lr']):.4g}", f"{group['weight_decay']:.4g}"
                reason = routes[name].reason if name in routes else "group"
                rows.append((name, shape, group["rule"], reason, lr, decay, scale))
        return routing_table(rows)

    def routing_summary(self) -> str:
        """Return one line: how many tensors and elements each rule has, and the settings of each group."""
        parts = []
        for rule in ("matrix", "adamw"):
            groups = [group for group in self.param_groups if group["rule"] == rule]
            tensors = [parameter for group in groups for parameter in group["params"]]
            if tensors:
                hidden = {"params", "param_names", "rule", "transposed", "split_sizes", "skipped_steps"}
                settings = ", ".join(f"{key}={value}" for key, value in groups[0].items() if key not in hidden)
                parts.append(
                    f"{rule}: {len(tensors)} tensors, {sum(p.numel() for p in tensors):,} elements ({settings})"
                )
        return "; ".join(parts)

    @property
    def skipped_steps(self) -> int:
        """Steps not taken because a gradient was not finite (`skip_nonfinite`)."""
        return max((group.get("skipped_steps", 0) for group in self.param_groups), default=0)

    # ---------------------------------------------------------------------------------------------------------------
    # State

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load a state. Unlike in `torch.optim`, float32 state stays float32 under bf16 parameters."""
        super().load_state_dict(state_dict)
        saved = chain.from_iterable(group["params"] for group in state_dict["param_groups"])
        own = chain.from_iterable(group["params"] for group in self.param_groups)
        for index, parameter in zip(saved, own, strict=True):
            for key, value in state_dict["state"].get(index, {}).items():
                # torch casts to the parameter's dtype, which has lost bits by now: take the saved value again.
                if isinstance(value, Tensor) and value.dtype != self.state[parameter][key].dtype:
                    self.state[parameter][key] = value.to(device=parameter.device)

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a checkpoint from before a setting existed
            for key, value in self.rule_defaults[group["rule"]].items():
                group.setdefault(key, value)

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "rule_defaults": self.rule_defaults, "routes": self.routes}

    # ---------------------------------------------------------------------------------------------------------------
    # The step

    @torch.no_grad()
    def step(self, closure=None):
        """Take one step. `closure`, if given, is called first, with gradients enabled; its loss is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        if any(group.get("skip_nonfinite") for group in self.param_groups) and not self._all_finite():
            for group in self.param_groups:
                if group["rule"] == "matrix":
                    group["skipped_steps"] += 1
            return loss
        for group in self.param_groups:
            if group["rule"] == "matrix":
                vectors = [p for p in group["params"] if p.ndim < 2]
                for vector in vectors:
                    self._vector_step(vector, group)
                for batch in self._batches(group) if not vectors else ():
                    self._matrix_step(batch, group)
            else:
                self._adamw_step(group)
        return loss

    def _batches(self, group: dict[str, Any]) -> list[list[Tensor]]:
        """Parameters that have a gradient, in batches of one shape, dtype and placement."""
        buckets: dict[tuple, list[Tensor]] = {}
        for index, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            _validate_gradient(p, _name(group, index))
            placement = (p.device_mesh, p.placements) if isinstance(p, DTensor) else ()
            buckets.setdefault((p.shape, p.dtype, p.grad.dtype, p.device, *placement), []).append(p)
        batches = []
        for bucket in buckets.values():
            size = max(1, _batch_limit(bucket[0]) // bucket[0].numel())
            batches += [bucket[start : start + size] for start in range(0, len(bucket), size)]
        return batches

    def _matrix_step(self, batch: list[Tensor], group: dict[str, Any]) -> None:
        params = [_local(p) for p in batch]
        grads = [_local_gradient(p) for p in batch]  # float32 or float64, never written to
        if self.shared_momentum:
            grads = self._average(batch, grads, group)
        stacked = stack(grads)  # (k, ..., rows, columns)
        layout = self.layout(group)
        if layout == "sharded" and group["split_sizes"]:
            layout = "replicated"  # blocks do not follow the shard borders
        whole, shards_of = _assemble(stacked, batch[0], layout)
        if layout == "owner" and isinstance(batch[0], DTensor) and not self.shared_momentum:
            directions = self._owner_directions(whole, batch, group)
        else:
            stateful = batch if layout == "replicated" or whole is stacked else []
            directions = self._directions(whole, [self.state[p] for p in stateful], group)
        directions = shards_of(directions)
        _apply(params, list(directions.unbind(0)), group["lr"], group["weight_decay"])

    # ---------------------------------------------------------------------------------------------------------------
    # Under ZeRO

    def attach(self, trainer: Any) -> None:
        """Learn from a `transformers.Trainer` where its DeepSpeed engine will be; see [`bind`]."""
        trainer = weakref.ref(trainer)
        self._find_engine = lambda: getattr(trainer(), "deepspeed", None)

    def bind(self, engine: Any) -> None:
        """Take a `DeepSpeedEngine` whose client optimizer this is: `optimizer.bind(deepspeed.initialize(...)[0])`.

        Raises:
            ValueError: If DeepSpeed offloads the optimizer or splits matrices, or `skip_nonfinite` is set.
        """
        if any(group.get("skip_nonfinite") for group in self.param_groups):
            raise ValueError(NOT_ALL_AT_ONCE)
        self._layouts = read_layouts(engine)

    def _layout_of(self, vector: Tensor, group: dict[str, Any]) -> ZeroLayout:
        if vector not in self._layouts and self._find_engine is not None and self._find_engine() is not None:
            self.bind(self._find_engine())
        if vector not in self._layouts:
            raise RuntimeError(f"matrix {_name(group, 0)} arrives as shape {tuple(vector.shape)}: {FLATTENED}")
        return self._layouts[vector]

    def _vector_step(self, vector: Tensor, group: dict[str, Any]) -> None:
        """One step for a group's matrices that ZeRO keeps as a vector on each rank, a part of their elements."""
        layout = self._layout_of(vector, group)
        if vector.grad is None:
            return
        grad = _local_gradient(vector)
        update = self._average([vector], [grad], group)[0] if self.shared_momentum else grad
        state, limit = self.state[vector], _batch_limit(vector)
        if layout.chunked and self.layout(group) == "sharded" and not group["split_sizes"]:
            for shape, slots, stacked in layout.shards(update, limit):
                m, n = shape[-2:][:: -1 if group["transposed"] else 1]
                directions = self.direction(stacked, [], group).to_local().squeeze(1) * self.scale(group, m, n)
                _apply([vector[s] for s in slots], list(directions.unbind(0)), group["lr"], group["weight_decay"])
            return

        def work(matrices: list[Matrix], stacked: Tensor) -> Tensor:
            return self._directions(stacked, [BlockState(state, f"{m.name}:") for m in matrices], group)

        for slots, directions in step_matrices(layout, update, limit, work, target=vector):
            _apply(slots, directions, group["lr"], group["weight_decay"])

    def _average(self, batch: list[Tensor], grads: list[Tensor], group: dict[str, Any]) -> list[Tensor]:
        """Exponential average with Nesterov look-ahead, elementwise and so on the shards: torch's Muon bit for bit."""
        buffers = []
        for p in batch:
            state, dtype = self.state[p], MOMENTUM_DTYPES[group.get("momentum_dtype", "float32")] or _state_dtype(p)
            if "momentum_buffer" not in state:
                state["momentum_buffer"] = torch.zeros_like(p, dtype=dtype, requires_grad=False)
            elif state["momentum_buffer"].dtype != dtype:  # of a checkpoint from before the setting was changed
                state["momentum_buffer"] = state["momentum_buffer"].to(dtype)
            buffers.append(_local(state["momentum_buffer"]))
        if buffers[0].dtype == torch.bfloat16:
            kept, buffers = buffers, [b.to(g.dtype) for b, g in zip(buffers, grads, strict=True)]
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
            for stored, buffer, grad in zip(kept, buffers, grads, strict=True):
                stored.copy_(round_stochastically(buffer.float(), grad.float()))
        else:
            torch._foreach_lerp_(buffers, grads, 1 - group["momentum"])
        return list(torch._foreach_lerp(grads, buffers, group["momentum"])) if group["nesterov"] else buffers

    def _owner_directions(self, whole: Tensor, batch: list[DTensor], group: dict[str, Any]) -> Tensor:
        """[`_directions`] of this rank's share of a batch, with its state, of which every rank keeps a part."""
        for p in batch:
            self._start_shared(p, group)
        tensors, shards_of = {}, {}  # (share of the batch, ..., a, b), and the way back
        for key, example in self.state[batch[0]].items():
            if isinstance(example, DTensor):
                stacked = stack([_local(self.state[p][key]) for p in batch])
                tensors[key], shards_of[key] = _assemble(stacked, example, "owner")
        owned = _share(batch)
        states = [
            {key: tensors[key][i] if key in tensors else value for key, value in self.state[batch[index]].items()}
            for i, index in enumerate(owned)
        ]
        directions = self._directions(whole, states, group)
        for index, p in enumerate(batch):
            if index in owned:
                numbers = states[index - owned.start]
                self.state[p].update((key, value) for key, value in numbers.items() if key not in tensors)
            else:
                for state in self._blocks(self.state[p], group):
                    self.pass_over(state)
        for key, value in tensors.items():
            torch._foreach_copy_([_local(self.state[p][key]) for p in batch], list(shards_of[key](value).unbind(0)))
        return directions

    def _start_shared(self, p: DTensor, group: dict[str, Any]) -> None:
        state = self.state[p]
        if not state:
            like = torch.empty(p.shape, dtype=_state_dtype(p), device=_local(p).device)
            like = like.mT if group["transposed"] else like
            blocks = like.split(group["split_sizes"], dim=-2) if group["split_sizes"] else (like,)
            for block, own in zip(blocks, self._blocks(state, group), strict=True):
                own.update(self.new_state(block, group))
        for key, value in state.items():
            if isinstance(value, Tensor) and not isinstance(value, DTensor):  # whole: new, or of an old checkpoint
                state[key] = distribute_tensor(value, p.device_mesh, _state_placements(p), src_data_rank=None)

    @staticmethod
    def _blocks(state: State, group: dict[str, Any]) -> list[State]:
        """The state of each block of a parameter: its own, if it is one."""
        if not group["split_sizes"]:
            return [state]
        return [BlockState(state, f"block{index}.") for index in range(len(group["split_sizes"]))]

    def _directions(self, updates: Tensor, states: Sequence[State], group: dict[str, Any]) -> Tensor:
        """Orient, split, ask the rule, scale, and put back: (k, ..., rows, columns) as stored, before and after."""
        if updates.shape[0] == 0:  # an owner without a share of this batch
            return updates
        updates = updates.mT if group["transposed"] else updates  # (k, ..., m, n)
        blocks = updates.split(group["split_sizes"], dim=-2) if group["split_sizes"] else (updates,)
        directions = []
        for index, block in enumerate(blocks):
            own = [self._blocks(state, group)[index] for state in states]
            direction = self.direction(block, own, group)
            factor = self.scale(group, *block.shape[-2:])
            directions.append(direction if factor == 1.0 else direction * factor)
        whole = directions[0] if len(directions) == 1 else torch.cat(directions, dim=-2)
        return whole.mT if group["transposed"] else whole

    def _adamw_step(self, group: dict[str, Any]) -> None:
        params, grads, exp_avgs, exp_avg_sqs, steps = [], [], [], [], []
        for index, p in enumerate(group["params"]):
            if p.grad is None:
                continue
            _validate_gradient(p, _name(group, index))
            state = self.state[p]
            if not state:
                state["step"] = torch.tensor(0.0, dtype=torch.float32)
                state["exp_avg"] = torch.zeros_like(p, dtype=_state_dtype(p), requires_grad=False)
                state["exp_avg_sq"] = torch.zeros_like(p, dtype=_state_dtype(p), requires_grad=False)
            params.append(_local(p))
            grads.append(_local_gradient(p))
            exp_avgs.append(_local(state["exp_avg"]))
            exp_avg_sqs.append(_local(state["exp_avg_sq"]))
            steps.append(state["step"])
        if not params:
            return
        work = [p.to(m.dtype) for p, m in zip(params, exp_avgs, strict=True)]  # the parameters themselves, if float32
        beta1, beta2 = group["betas"]
        adamw(
            work,
            grads,
            exp_avgs,
            exp_avg_sqs,
            [],
            steps,
            amsgrad=False,
            beta1=beta1,
            beta2=beta2,
            lr=group["lr"],
            weight_decay=group["weight_decay"],
            eps=group["eps"],
            maximize=False,
        )
        _write_back(params, work)

    def _all_finite(self) -> bool:
        finite: dict[DeviceMesh | torch.device, list[Tensor]] = {}  # by mesh: a collective must not mix them
        for p in chain.from_iterable(group["params"] for group in self.param_groups):
            if p.grad is not None:
                place = p.device_mesh if isinstance(p, DTensor) else p.device
                finite.setdefault(place, []).append(_local(p.grad).isfinite().all())
        bad = [(~torch.stack(flags)).float().sum() for flags in finite.values()]  # counts, 0-d
        for index, place in enumerate(finite):
            if isinstance(place, DeviceMesh):  # summed over the ranks; a maximum would lose NaNs in some backends
                partial = DTensor.from_local(bad[index], place, [Partial()] * place.ndim, run_check=False)
                bad[index] = partial.full_tensor()
        return not any(count.item() for count in bad)


class BlockState(MutableMapping):
    """The part of a parameter's state that belongs to one of its blocks: a view with prefixed keys."""

    def __init__(self, state: State, prefix: str):
        self.state, self.prefix = state, prefix

    def __getitem__(self, key: str) -> Any:
        return self.state[self.prefix + key]

    def __setitem__(self, key: str, value: Any) -> None:
        self.state[self.prefix + key] = value

    def __delitem__(self, key: str) -> None:
        del self.state[self.prefix + key]

    def __iter__(self):
        return (key.removeprefix(self.prefix) for key in self.state if key.startswith(self.prefix))

    def __len__(self) -> int:
        return sum(1 for _ in self)


# -------------------------------------------------------------------------------------------------------------------
# Groups and checks


def _groups(routes: list[Route]) -> list[dict[str, Any]]:
    """Group routes by their settings, matrices first: the learning rate that a Trainer logs is group 0's."""
    groups: dict[tuple, dict[str, Any]] = {}
    for r in sorted(routes, key=lambda r: r.rule != "matrix"):
        group = groups.setdefault((r.rule, r.decay, r.transposed, r.split_sizes), {"rule": r.rule, "params": []})
        group["params"].append((r.name, r.parameter))
        if not r.decay:
            group["weight_decay"] = 0.0
        if r.rule == "matrix":
            group |= {"transposed": r.transposed, "split_sizes": r.split_sizes}
    return list(groups.values())


def _outline(parameter: Tensor) -> Tensor:
    return torch.empty(whole_shape(parameter), dtype=parameter.dtype, device="meta")


def _name(group: dict[str, Any], index: int) -> str:
    names = group.get("param_names")
    return names[index] if names else f"parameter {index}"


def _require_rate(name: str, lr: Any) -> None:
    if isinstance(lr, Tensor):
        if lr.numel() != 1:
            raise ValueError(f"{name} must be a number or a tensor of one element, got a tensor of {lr.numel()}")
        if lr.is_meta:
            return
        lr = lr.item()
    require_option(name, lr, NonNegative)


def _validate_parameter(parameter: Tensor, name: str, rule: str) -> None:
    shape = tuple(whole_shape(parameter))
    if parameter.layout != torch.strided:
        raise ValueError(f"{name} has layout {parameter.layout}; only dense parameters can be optimized")
    if not parameter.is_floating_point():
        raise ValueError(f"{name} has dtype {parameter.dtype}; only real floating-point parameters can be optimized")
    if math.prod(shape) == 0:
        raise ValueError(f"{name} is empty, shape {shape}; freeze it or leave it out")
    if rule == "matrix" and len(shape) < 2:
        raise ValueError(
            f"{name} has shape {shape}; a matrix group needs two dimensions or more. Pass the model, which is then "
            "routed, or put it into a group with 'rule': 'adamw'"
        )


def _validate_gradient(p: Tensor, name: str) -> None:
    if p.grad.is_sparse:
        raise RuntimeError(f"{name} has a sparse gradient; build its embedding with sparse=False")


# -------------------------------------------------------------------------------------------------------------------
# Tensors and shards


def _batch_limit(p: Tensor) -> int:
    return MAX_BATCH_NUMEL.get(p.device.type, MAX_BATCH_NUMEL_ELSEWHERE)


def _state_dtype(p: Tensor) -> torch.dtype:
    return p.dtype if p.dtype == torch.float64 else torch.float32


def _local(t: Tensor) -> Tensor:
    return t.to_local() if isinstance(t, DTensor) else t


def _local_gradient(p: Tensor) -> Tensor:
    grad = p.grad
    if isinstance(p, DTensor) and grad.placements != p.placements:
        grad = grad.redistribute(placements=p.placements)
    return _local(grad).to(_state_dtype(p))


def _stacked_placements(p: DTensor, layout: Layout) -> list[Placement]:
    """Placements of a stack of tensors like `p` in which the last two dimensions are as `layout` promises the rule."""
    placements: list[Placement] = []
    for placement in p.placements:
        if type(placement) not in (Shard, Replicate):
            raise NotImplementedError(f"placement {placement} is not supported; use Shard or Replicate (FSDP2)")
        if isinstance(placement, Shard):
            placement = Shard(placement.dim + 1)  # the stack has one dimension more
            if layout == "owner" and placement.dim >= p.ndim - 1:
                placement = Shard(0)
        placements.append(Replicate() if layout == "replicated" else placement)
    return placements


def _state_placements(p: DTensor) -> list[Placement]:
    """Placements of a state (..., a, b) that ranks share: with the experts of `p`, else along a."""
    return [Shard(min(s.dim, p.ndim - 2)) if isinstance(s, Shard) else s for s in p.placements]


def _share(batch: list[DTensor]) -> range:
    """Which of a batch [`_assemble`] gives to this rank as their owner: all, if it only gives a part of each."""
    mesh, indices = batch[0].device_mesh, range(len(batch))
    for dim, placement in enumerate(_stacked_placements(batch[0], "owner")):
        if placement == Shard(0):
            size = -(-len(indices) // mesh.size(dim))
            start = size * mesh.get_coordinate()[dim]
            indices = indices[start : start + size]
    return indices


def _assemble(stacked: Tensor, p: Tensor, layout: Layout) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Turn this rank's shards, (k, ..., rows, columns), into what `layout` promises; also return the way back."""
    if not isinstance(p, DTensor):
        return stacked, lambda directions: directions
    shape = torch.Size((stacked.shape[0], *p.shape))
    stride = torch.empty(shape, device="meta").stride()

    def wrap(local: Tensor, placements: list[Placement]) -> DTensor:
        # Shape and stride are given, because uneven and empty shards do not tell the whole.
        return DTensor.from_local(local, p.device_mesh, placements, run_check=False, shape=shape, stride=stride)

    shards, wanted = _stacked_placements(p, "sharded"), _stacked_placements(p, layout)
    sharded = wrap(stacked, shards)
    if layout == "sharded":
        return sharded, lambda directions: directions.redistribute(placements=shards).to_local()
    whole = sharded.redistribute(placements=wanted).to_local()
    return whole, lambda directions: wrap(directions.contiguous(), wanted).redistribute(placements=shards).to_local()


def _apply(params: list[Tensor], directions: list[Tensor], lr: float | Tensor, weight_decay: float) -> None:
    """parameter = parameter * (1 - lr * weight_decay) - lr * direction, rounded once."""
    work = [p.to(d.dtype) for p, d in zip(params, directions, strict=True)]  # the parameters themselves, if float32
    lr = lr.reshape(()) if isinstance(lr, Tensor) else lr
    if weight_decay:
        torch._foreach_mul_(work, 1 - lr * weight_decay)
    if isinstance(lr, Tensor):
        torch._foreach_sub_(work, torch._foreach_mul(directions, lr))
    else:
        torch._foreach_add_(work, directions, alpha=-lr)
    _write_back(params, work)


def _write_back(params: list[Tensor], work: list[Tensor]) -> None:
    rounded = [(p, w) for p, w in zip(params, work, strict=True) if p is not w]
    if rounded:
        torch._foreach_copy_(*(list(side) for side in zip(*rounded, strict=True)))
