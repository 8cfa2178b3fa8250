"""TRAM, trust-region aware minimisation: SAM's two passes with a measured radius (2310.03646).

SAM climbs a fixed distance rho before it takes the gradient that it descends. TRAM climbs as far as the model's own
predictions have moved away from an anchor, on the batch at hand:

    g     = grad L(theta)                              pass 1: forward, backward
    d     = mean KL(p(x; anchor), p(x; theta))         pass 2: forward of the anchor
    eps   = d * theta^2 * g / ||theta * g||            adaptive; plain: d * g / ||g||
    theta = base step with grad L(theta + eps)         pass 3: forward, backward; then theta is put back

The descent gradient is simply what is left in `p.grad`, so one wrapper serves every base optimizer. A Hugging Face
Trainer passes no closure to `step`; the passes happen inside its `training_step`, where [`TRAM.attach`] puts them.
A loop written by hand calls [`TRAM.backward`] in place of `loss.backward()`.

Each micro-batch has its own eps, from its own gradient, and the descent gradients add up as gradients do: accumulated
or spread over data-parallel ranks. Under FSDP2 gradients exist only once they are reduced, so all ranks share one eps.

What this is *not*: the authors' public code, whose ascent ignores the gradient and whose KL is divided by the batch
and the classes once too often. The paper is followed here.
"""

import warnings
from collections.abc import Callable, Collection, Iterable
from contextlib import contextmanager, nullcontext
from typing import Any, Literal

import torch
import torch.distributed as dist
from accelerate.utils import is_compiled_module
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule, FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from ..lookup import near
from ..optimizers import OPTIMIZERS, get_optimizer
from ..settings import BelowOne, Count, NonNegative, Positive
from .options import require_options
from .predictions import Call, Probe
from .replay import COMPILED, HIDDEN, attach


Variant = Literal["prev", "init", "noise", "fisher"]
Divergence = Literal["forward", "reverse", "symmetric"]
FisherPasses = Literal["shared", "separate"]
Scope = Literal["global", "local"]

ANCHOR = "tram_anchor"  # the anchor's key in the saved state of a parameter


# -------------------------------------------------------------------------------------------------------------------
# The formulas


def global_norm(tensors: Iterable[Tensor]) -> Tensor:
    """Euclidean norm of all `tensors` as one vector, 0-d and at least float32; shards are summed over their ranks."""
    norms = [torch.linalg.vector_norm(t, dtype=torch.promote_types(t.dtype, torch.float32)) for t in tensors]
    # The norm of a sharded tensor is a partial sum until it is gathered.
    norms = [norm.full_tensor() if isinstance(norm, DTensor) else norm for norm in norms]
    return torch.linalg.vector_norm(torch.stack([norm.to(norms[0].device) for norm in norms]))


def _ratio(numerator: Tensor | float, norm: Tensor) -> Tensor:
    ratio = numerator / norm
    return torch.where(torch.isfinite(ratio), ratio, 0)  # a zero gradient: stay


def ascent_(params: list[Tensor], grads: list[Tensor], distance: Tensor | float, adaptive: bool) -> list[Tensor]:
    """Turn `grads` in place into the perturbation of radius `distance` (2310.03646, section 3).

    Adaptive: `d * theta^2 * g / ||theta * g||`, so that `||eps / |theta| || = d` over the non-zero parameters.
    Plain: `d * g / ||g||`, so that `||eps|| = d`. The norms are over all tensors; if zero, so is the perturbation.
    """
    if adaptive:
        for p, g in zip(params, grads, strict=True):
            g.mul_(p)
    scale = _ratio(distance, global_norm(grads))
    for p, g in zip(params, grads, strict=True):
        g.mul_(scale.to(g.device))
        if adaptive:
            g.mul_(p)
    return grads


def fisher_ascent_(grads: list[Tensor], noised: list[Tensor], gamma: float, eta: float) -> list[Tensor]:
    """Turn `grads` in place into `gamma * F^-1 g / sqrt(g^T F^-1 g)` with `F^-1 = 1 / (1 + eta * noised^2)`.

    Then `eps^T (I + eta F) eps = gamma^2`. `noised` is the gradient at the noised input, and may be `grads` itself.
    """
    pairs = list(zip(grads, noised, strict=True))
    scale = _ratio(gamma, global_norm(g / (1 + eta * n.square()).sqrt() for g, n in pairs))
    for g, n in pairs:
        g.div_(1 + eta * n.square()).mul_(scale.to(g.device))
    return grads


# -------------------------------------------------------------------------------------------------------------------
# The optimizer


class TRAM(Optimizer):
    """Trust-region aware minimisation around `base`, which takes the step.

    Groups, learning rates and state are the base's own; its attributes are reachable through this object.

    Args:
        base: Any optimizer.
        tram_variant: The anchor. `prev`: the parameters before the last step. `init`: those before the first. `noise`:
            those of now, with Gaussian noise on the word embeddings. `fisher`: no anchor, but an ellipse given by the
            squared gradient at noised embeddings.
        tram_adaptive: ASAM's metric, the paper's: a parameter moves in proportion to its size, and zero stays zero.
            False: the Euclidean one. `fisher` has its own.
        tram_noise_std: Standard deviation of the noise of `noise` and `fisher`. Default: .1 (ours; R3F's value).
        tram_divergence: `forward` is KL(anchor, now), the paper's; `reverse`; `symmetric`, the mean of the two.
        tram_max_distance: Cap on the distance, in nats; `None` for none.
        tram_fisher_gamma: Radius of the ellipse (ours; Fisher SAM's value).
        tram_fisher_eta: Weight of the Fisher matrix (ours; Fisher SAM's value).
        tram_fisher_passes: `shared`: pass 1 sees noised embeddings, and its gradient is both g and the square root of
            the Fisher diagonal. `separate`: one more forward and backward for the latter.
        tram_anchor_eval: Run the anchor in evaluation mode. False: in training mode, with pass 1's random state, so
            that under dropout the distance is still 0 when nothing has moved.
        tram_every: Climb in one step out of so many; the others are plain.
        tram_distance_scope: `global`: mean over the positions of all ranks. `local`: each rank its own.
        tram_chunk_size: Positions whose logits are built at one time.

    Raises:
        ValueError: If a setting is out of range, or is given to a variant that does not use it.
    """

    def __init__(
        self,
        base: Optimizer,
        *,
        tram_variant: Variant = "prev",
        tram_adaptive: bool = True,
        tram_noise_std: Positive | None = None,
        tram_divergence: Divergence = "forward",
        tram_max_distance: Positive | None = None,
        tram_fisher_gamma: Positive = 0.1,
        tram_fisher_eta: NonNegative = 0.1,
        tram_fisher_passes: FisherPasses = "shared",
        tram_anchor_eval: bool = True,
        tram_every: Count = 1,
        tram_distance_scope: Scope = "global",
        tram_chunk_size: Count = 1024,
    ):
        require_options(TRAM, locals())
        fisher, measured = ("fisher",), ("prev", "init", "noise")
        for name, value, default, users in (
            ("tram_noise_std", tram_noise_std, None, ("noise", "fisher")),
            ("tram_fisher_gamma", tram_fisher_gamma, 0.1, fisher),
            ("tram_fisher_eta", tram_fisher_eta, 0.1, fisher),
            ("tram_fisher_passes", tram_fisher_passes, "shared", fisher),
            ("tram_adaptive", tram_adaptive, True, measured),
            ("tram_divergence", tram_divergence, "forward", measured),
            ("tram_max_distance", tram_max_distance, None, measured),
            ("tram_anchor_eval", tram_anchor_eval, True, measured),
            ("tram_distance_scope", tram_distance_scope, "global", measured),
            ("tram_chunk_size", tram_chunk_size, 1024, measured),
        ):
            if value != default and tram_variant not in users:
                raise ValueError(
                    f"{name}={value!r} does nothing with tram_variant={tram_variant!r}; leave it out, or use "
                    f"tram_variant={' or '.join(map(repr, users))}"
                )
        # Optimizer.__init__ is not called: it would make groups and state of its own.
        self.base = base
        self.noisy = tram_variant in ("noise", "fisher")
        self.variant, self.adaptive, self.divergence = tram_variant, tram_adaptive, tram_divergence
        self.noise_std = 0.1 if tram_noise_std is None else tram_noise_std
        self.max_distance = tram_max_distance
        self.gamma, self.eta, self.fisher_passes = tram_fisher_gamma, tram_fisher_eta, tram_fisher_passes
        self.anchor_eval, self.every = tram_anchor_eval, tram_every
        self.scope, self.chunk_size = tram_distance_scope, tram_chunk_size

        self.steps = 0  # taken by the base
        self.draws = 0  # of noise; each has a seed of its own
        self.seed = torch.initial_seed()
        # By parameter, and filled at the first step: FSDP2 exchanges the parameters after construction.
        self.anchor: dict[Tensor, Tensor] = {}
        self._undo: list[tuple[Tensor, Tensor]] | None = None  # what `restore` copies back: (target, value)
        self._sums: dict[str, Tensor] = {}  # of each metric since it was last read
        self._counts: dict[str, int] = {}
        self._aside: tuple[Tensor, ...] = ()  # what an attached trainer trains by itself
        self._climbed = False  # since the last step
        self._warned: set[str] = set()

    # ---------------------------------------------------------------------------------------------------------------
    # The face of an optimizer, all the base's

    param_groups = property(lambda self: self.base.param_groups, lambda self, v: setattr(self.base, "param_groups", v))
    state = property(lambda self: self.base.state, lambda self, v: setattr(self.base, "state", v))
    defaults = property(lambda self: self.base.defaults, lambda self, v: setattr(self.base, "defaults", v))

    def __getattr__(self, name: str) -> Any:  # hooks, routing_report, train() and eval() of schedule-free optimizers
        if name == "base":  # not there yet while unpickling
            raise AttributeError(name)
        return getattr(self.base, name)

    def __getstate__(self) -> dict[str, Any]:
        # torch's schedulers put a `step` of their own into the instance: it cannot be pickled, and steps this object
        # from any copy.
        return {name: value for name, value in vars(self).items() if name != "step"}

    def __setstate__(self, state: dict[str, Any]) -> None:
        vars(self).update(state)

    def __repr__(self) -> str:
        return f"TRAM(tram_variant={self.variant!r}, tram_adaptive={self.adaptive}, base={self.base!r})"

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        self.base.add_param_group(param_group)

    def zero_grad(self, set_to_none: bool = True) -> None:
        self.base.zero_grad(set_to_none=set_to_none)

    def step(self, closure=None):
        """Take the base's step with the gradients at hand. A closure goes to the base, and makes no second pass.

        Warns once if this step should have climbed and did not, so that it is the base's own.
        """
        # At learning rate 0 torch's distributed checkpoint makes an empty step, to create the state.
        if self.climbs and not self._climbed and any(group.get("lr", 1) > 0 for group in self.param_groups):
            self._warn_of_no_ascent()
        self._climbed = False
        self._keep_anchor()
        loss = self.base.step(closure)
        self.steps += 1
        return loss

    def state_dict(self) -> dict[str, Any]:
        """The base's state dict, with the anchor in each parameter's state and TRAM's counters in every group."""
        packed = self.base.state_dict()
        own = {f"tram_{name}": getattr(self, name) for name in ("variant", "steps", "draws", "seed")}
        state = dict(packed["state"])
        for group, indices in zip(self.param_groups, packed["param_groups"], strict=True):
            for p, index in zip(group["params"], indices["params"], strict=True):
                if p in self.anchor:
                    state[index] = {**state.get(index, {}), ANCHOR: self.anchor[p]}
        return {**packed, "state": state, "param_groups": [{**group, **own} for group in packed["param_groups"]]}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Load what [`state_dict`] gave, or the state dict of a bare base, which has no anchor.

        Raises:
            ValueError: If it was written with another `tram_variant`.
        """
        groups = [{k: v for k, v in g.items() if not k.startswith("tram_")} for g in state_dict["param_groups"]]
        own = {k: v for group in state_dict["param_groups"] for k, v in group.items() if k.startswith("tram_")}
        if own and own["tram_variant"] != self.variant:
            raise ValueError(
                f"tram_variant={self.variant!r}, but the checkpoint was written with {own['tram_variant']!r}; resume "
                "with that"
            )
        state = {i: {k: v for k, v in entry.items() if k != ANCHOR} for i, entry in state_dict["state"].items()}
        state = {i: entry for i, entry in state.items() if entry}  # a base without state has none, not an empty one
        self.base.load_state_dict({**state_dict, "state": state, "param_groups": groups})
        self.anchor = {}
        for group, saved in zip(self.param_groups, groups, strict=True):
            for p, index in zip(group["params"], saved["params"], strict=True):
                value = state_dict["state"].get(index, {}).get(ANCHOR)
                if value is not None:
                    self.anchor[p] = torch.empty_like(p, requires_grad=False).copy_(value)
        if own:
            self.steps, self.draws, self.seed = own["tram_steps"], own["tram_draws"], own["tram_seed"]

    # ---------------------------------------------------------------------------------------------------------------
    # The passes

    @property
    def params(self) -> list[Tensor]:
        return [p for group in self.param_groups for p in group["params"] if p.requires_grad]

    @property
    def climbs(self) -> bool:
        """Whether the coming step does. The first of `prev` and `init` is plain: the anchor is the model, so d = 0."""
        return self.steps % self.every == 0 and (self.noisy or bool(self.anchor))

    def backward(
        self, model: nn.Module, loss_fn: Callable[[], Tensor], *, labels: Tensor | None = None, last: bool = True
    ) -> Tensor:
        """All passes of one micro-batch, in place of `loss_fn().backward()` in a loop written by hand.

        Args:
            model: The model that `loss_fn` calls, wrapped for data parallelism or not.
            loss_fn: Computes the loss of this micro-batch, 0-d; called two or three times, it must draw no new data.
            labels: -100 where a prediction does not count in the distance. Needed only where `loss_fn` gives the model
                neither labels nor an attention mask.
            last: Whether [`step`] follows. Must be `False` for the earlier micro-batches of an accumulated step:
                `prev` gives its anchor up in the last one.

        Returns:
            The loss at theta, 0-d, detached.
        """
        if not self.climbs:
            loss = loss_fn()
            loss.backward()
            return loss.detach()
        try:
            loss = self.ascend(model, loss_fn, labels=labels, last=last)
            perturbed = loss_fn()
            perturbed.backward()
            self.record(last, loss_perturbed=perturbed)
        finally:
            self.restore()
        return loss

    def ascend(
        self,
        model: nn.Module,
        loss_fn: Callable[[], Tensor],
        replay_fn: Callable[[], Tensor] | None = None,
        *,
        labels: Tensor | None = None,
        last: bool = True,
    ) -> Tensor:
        """Passes 1 and 2 and the climb: theta + eps is left in the parameters, `p.grad` and the random state as found.

        Then come the caller's own forward and backward, and [`restore`]. Arguments and result as in [`backward`];
        `replay_fn` stands in for `loss_fn` where the same loss is computed once more (`fisher`, separate passes).
        """
        inner = _unwrapped(model)
        _prepare(model, inner)
        self._climbed = True
        probe, params, random_state = Probe(inner), self.params, _random_state(self.params[0].device)
        noise = self._noise(inner) if self.noisy else nullcontext
        fisher = self.variant == "fisher"
        shared = fisher and self.fisher_passes == "shared"

        calls: list[Call] = []
        self._undo = []
        with nullcontext() if fisher else probe.listen(calls), noise() if shared else nullcontext():
            loss, grads = _gradient(model, params, self._aside, loss_fn)
        # BatchNorm and its like count this batch in pass 1 only.
        self._undo += [(buffer, buffer.clone()) for buffer in inner.buffers()]
        moved = [i for i, grad in enumerate(grads) if grad is not None]  # the others had no part in the loss
        if not moved:
            return loss
        params, grads = [params[i] for i in moved], [grads[i] for i in moved]
        self.record(grad_norm_ascent=global_norm(grads))

        if fisher and not shared:
            _set_random_state(random_state)
            with noise():
                _, noised = _gradient(model, params, self._aside, replay_fn or loss_fn)
        elif not fisher:
            distance = self._distance(probe, calls, labels, random_state, noise)
        with torch.no_grad():
            if fisher:
                eps = fisher_ascent_(grads, grads if shared else noised, self.gamma, self.eta)
            else:
                eps = ascent_(params, grads, distance, self.adaptive)
            self._climb(params, eps, last)
        _set_random_state(random_state)  # pass 3 drops the units that pass 1 dropped
        return loss

    @torch.no_grad()
    def restore(self) -> None:
        """Put parameters and buffers back, bit for bit. Does nothing where nothing was moved."""
        for target, value in self._undo or ():
            target.copy_(value)
        self._undo = None
        torch.clear_autocast_cache()

    @torch.no_grad()
    def _climb(self, params: list[Tensor], eps: list[Tensor], last: bool) -> None:
        """theta += eps, with theta kept in memory that is there already.

        In the last micro-batch `prev` has done its work, and the anchor takes theta, which it must hold for the next
        step in any case. Otherwise the memory of eps takes it.
        """
        self.record(eps_norm=global_norm(eps))
        for p, e in zip(params, eps, strict=True):
            kept = self.anchor.get(p, e) if self.variant == "prev" and last else e
            shifted = p + e
            kept.copy_(p)
            p.copy_(shifted)
            self._undo.append((p, kept))
        torch.clear_autocast_cache()  # or the next forward would read low-precision copies of theta

    @torch.no_grad()
    def _keep_anchor(self) -> None:
        """Before a step: `prev` takes the parameters, `init` those before the first step."""
        if self.variant == "prev" or (self.variant == "init" and not self.anchor):
            for p in self.params:
                if p in self.anchor:
                    self.anchor[p].copy_(p)
                else:
                    self.anchor[p] = p.detach().clone()

    @contextmanager
    def _at_anchor(self):
        """Within the block, parameters and anchor have exchanged their values."""
        self._exchange()
        try:
            yield
        finally:
            self._exchange()

    @torch.no_grad()
    def _exchange(self) -> None:
        for p, anchor in self.anchor.items():
            value = p.clone()
            p.copy_(anchor)
            anchor.copy_(value)
        torch.clear_autocast_cache()

    def _distance(self, probe: Probe, calls: list[Call], labels, random_state, noise) -> Tensor:
        """Pass 2. Returns d, 0-d, finite; zero where it could not be measured."""
        if not calls:
            raise RuntimeError(
                f"TRAM saw no forward of {type(probe.model).__name__} inside the loss, so it has no distance to "
                "measure; the loss must call the model that is trained"
            )
        anchored = self.variant in ("prev", "init")
        modes = [(module, module.training) for module in probe.model.modules()]
        if self.anchor_eval:
            self._warn_of_dropout(probe.model)
            for module, _ in modes:
                module.training = False
        else:
            _set_random_state(random_state)
        try:
            with self._at_anchor() if anchored else noise():
                again = probe.repeat(calls)
        finally:
            for module, training in modes:
                module.training = training
            with torch.no_grad():  # only buffers are in here yet
                for buffer, value in self._undo:
                    buffer.copy_(value)
        stored = self.anchor if anchored else {}
        total = probe.divergence(calls, again, stored, labels, self.divergence, self.chunk_size)
        if self.scope == "global" and _world_size() > 1:
            dist.all_reduce(total)
        distance = total[0] / total[1].clamp(min=1)
        finite = torch.isfinite(distance)
        distance = torch.where(finite, distance, 0)
        capped = torch.zeros_like(finite) if self.max_distance is None else distance > self.max_distance
        distance = distance.clamp(max=self.max_distance) if self.max_distance is not None else distance
        self.record(distance=distance, distance_capped=capped, skipped=~finite)
        return distance

    def _noise(self, model: nn.Module) -> Callable:
        """A context in which the word embeddings of `model` have Gaussian noise, the same each time it is entered."""
        embeddings = model.get_input_embeddings() if hasattr(model, "get_input_embeddings") else None
        if embeddings is None:
            raise ValueError(
                f"tram_variant={self.variant!r} puts noise on the input embeddings, and {type(model).__name__} has no "
                "get_input_embeddings(); use tram_variant='prev' or 'init'"
            )
        # Seeded from counters that are saved, not from the global generator, whose draws are the training's own.
        rank = dist.get_rank() if _world_size() > 1 else 0
        seed = (self.seed + 1_000_003 * self.draws + 7_368_787 * rank) % 2**63
        self.draws += 1

        @contextmanager
        def noise():
            generators: dict[torch.device, torch.Generator] = {}

            def add(module, args, output):
                if output.device not in generators:
                    generators[output.device] = torch.Generator(output.device).manual_seed(seed)
                z = torch.empty_like(output, dtype=torch.promote_types(output.dtype, torch.float32))
                return output + z.normal_(std=self.noise_std, generator=generators[output.device]).to(output.dtype)

            handle = embeddings.register_forward_hook(add)
            try:
                yield
            finally:
                handle.remove()

        return noise

    def _warn_of_no_ascent(self) -> None:
        if "ascent" not in self._warned:
            self._warned.add("ascent")
            warnings.warn(
                f"TRAM has not climbed before this step, which is therefore plain {type(self.base).__name__}: in a "
                "loop call TRAM.backward in place of loss.backward(); a trainer that overrides create_optimizer must "
                "call TRAM.attach(trainer) in it",
                stacklevel=3,
            )

    def _warn_of_dropout(self, model: nn.Module) -> None:
        if "dropout" in self._warned:
            return
        self._warned.add("dropout")
        modules = [module for module in model.modules() if module.training]
        rates = [getattr(module, "p", 0) for module in modules if "Dropout" in type(module).__name__]
        rates += [getattr(module, "attention_dropout", 0) for module in modules]
        if any(isinstance(rate, (int, float)) and rate > 0 for rate in rates):
            warnings.warn(
                "the model trains with dropout and TRAM's anchor runs without, so the distance is above 0 even where "
                "nothing has moved; set dropout to 0, or tram_anchor_eval=False to drop the same units in both",
                stacklevel=2,
            )

    # ---------------------------------------------------------------------------------------------------------------
    # Metrics

    def record(self, last: bool = True, **values: Tensor) -> None:
        """Add up 0-d tensors until they are asked for: no host synchronisation in a step."""
        for name, value in values.items():
            value = value.detach().to(torch.promote_types(value.dtype, torch.float32))
            self._sums[name] = self._sums[name] + value if name in self._sums else value
            self._counts[name] = self._counts.get(name, 0) + last

    def metrics(self) -> dict[str, float]:
        """Metrics since the last call, mean over ranks; empties the record. Every rank must call it.

        `tram/distance` (nats), `tram/distance_capped` (share), `tram/eps_norm` and `tram/grad_norm_ascent` are means
        over micro-batches; `tram/loss_perturbed` is a step's, as the Trainer's `loss`; `tram/skipped` counts
        micro-batches whose distance was not finite.
        """
        sums, counts, self._sums, self._counts = self._sums, self._counts, {}, {}
        if not sums:
            return {}
        counts["skipped"] = 1
        means = [(value / max(counts[name], 1)).to(self.params[0].device) for name, value in sums.items()]
        values = torch.stack(means)
        if _world_size() > 1:
            dist.all_reduce(values)
            values = values / _world_size()
        return {f"tram/{name}": value for name, value in zip(sums, values.tolist(), strict=True)}

    def attach(self, trainer) -> None:
        """Make `trainer` climb; see [`trl_trust.optim.replay.attach`]. Called after `Trainer.create_optimizer`."""
        self._aside = tuple(getattr(trainer, "tensors_aside", ()))
        attach(self, trainer)


class TRAMAdamW(TRAM):
    """TRAM around an optimizer built by name; what `optim="tram_adamw"` builds.

    Args:
        model: The model to train.
        lr: Learning rate of the base.
        base: `adamw` (torch's), or another name in [`trl_trust.optimizers.OPTIMIZERS`].
        weight_decay: Decoupled; a matrix optimizer decays its embeddings and heads alike.
        no_decay: Names of parameters without decay.
        aux_betas: AdamW's averages. Default: (.9, .999), or those of the base named.
        aux_eps: AdamW's epsilon. Default: 1e-8.
        options: Settings of [`TRAM`], by their `tram_`; the others are the base's own, as `variant` of `hybrid_auon`.

    Raises:
        ValueError: If `base` is unknown, or a setting is out of range.
    """

    def __init__(
        self,
        model: nn.Module,
        lr: NonNegative,
        *,
        base: str = "adamw",
        weight_decay: NonNegative = 0.0,
        no_decay: Collection[str] = (),
        aux_betas: tuple[BelowOne, BelowOne] | None = None,
        aux_eps: Positive = 1e-8,
        **options,
    ):
        require_options(TRAMAdamW, locals())
        tram = {name: value for name, value in options.items() if name.startswith("tram_")}
        own = {name: value for name, value in options.items() if name not in tram}
        names = [row.name for row in OPTIMIZERS if not row.name.startswith("tram")]
        if base == "adamw":
            groups = [{"params": [], "weight_decay": weight_decay}, {"params": [], "weight_decay": 0.0}]
            for name, p in model.named_parameters():
                if p.requires_grad:
                    groups[name in no_decay]["params"].append(p)
            groups = [group for group in groups if group["params"]]
            optimizer = torch.optim.AdamW(groups, lr=lr, betas=aux_betas or (0.9, 0.999), eps=aux_eps, **own)
        elif base in names:
            own = {"aux_weight_decay": weight_decay, "no_decay": no_decay, "aux_eps": aux_eps, **own}
            if aux_betas is not None:
                own["aux_betas"] = aux_betas
            optimizer = get_optimizer(base).load()(model, lr=lr, weight_decay=weight_decay, **own)
        else:
            known = ("adamw", *names)
            raise ValueError(f"base={base!r} is no optimizer; {near(str(base), known)}")
        super().__init__(optimizer, **tram)


# -------------------------------------------------------------------------------------------------------------------
# Helpers


def _gradient(
    model: nn.Module, params: list[Tensor], aside: Iterable[Tensor], loss_fn
) -> tuple[Tensor, list[Tensor | None]]:
    """Loss and gradients of this rank by `params`, while `p.grad` stays as it was.

    Also that of the model's other parameters and of `aside`: whoever trains them wants pass 3's gradient only.
    """
    accumulated = {p: p.grad for p in (*params, *model.parameters(), *aside)}
    for p in accumulated:
        p.grad = None
    try:
        with model.no_sync() if isinstance(model, DistributedDataParallel) else nullcontext():
            loss = loss_fn()
            with torch.autocast(loss.device.type, enabled=False):
                loss.backward()
        return loss.detach(), [p.grad for p in params]
    finally:
        for p, grad in accumulated.items():
            p.grad = grad


def _unwrapped(model: nn.Module) -> nn.Module:
    return model.module if isinstance(model, DistributedDataParallel) else model


def _prepare(model: nn.Module, inner: nn.Module) -> None:
    if isinstance(model, (nn.DataParallel, FullyShardedDataParallel)):
        raise ValueError(HIDDEN.format(type(model).__name__))
    if is_compiled_module(model) or is_compiled_module(inner):
        raise ValueError(COMPILED)
    for module in inner.modules():
        if isinstance(module, FSDPModule):
            # Gradients that are not reduced never reach sharded parameters, so accumulation reduces every time.
            module.set_requires_gradient_sync(True, recurse=False)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_initialized() else 1


def _random_state(device: torch.device) -> list[tuple[Any, Tensor]]:
    """States of the CPU's generator and of the current accelerator's."""
    modules = [torch] if device.type == "cpu" else [torch, torch.get_device_module(device)]
    return [(module, module.get_rng_state()) for module in modules]


def _set_random_state(states: list[tuple[Any, Tensor]]) -> None:
    for module, state in states:
        module.set_rng_state(state)
