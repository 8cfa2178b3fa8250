"""The `trust/` metrics: what the region did, gathered once an update and read once a log."""

import inspect
import math
from collections import defaultdict
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from .terms import LOG_RATIO_LIMIT, PolicyBatch, PolicyLoss, k3


class TrustTelemetry:
    """Mixin of a trainer with a policy term: its metrics, and the settings that its loss reads."""

    def __init__(self, *args, **kwargs):
        self._start_telemetry()
        super().__init__(*args, **kwargs)

    def _start_telemetry(self) -> None:
        # (names, (K, 2) statistics) of the micro-batches since the last optimizer step, evaluation's apart
        self._trust_window = {"train": [], "eval": []}
        self._trust_gathered = {"train": [], "eval": []}  # (names, (processes, K, 2)) of the steps since the last log

    def settings(self, loss: Callable[..., PolicyLoss]) -> dict[str, Any]:
        """The keyword arguments of a pure loss, read from the config's fields of the same names."""
        parameters = inspect.signature(loss).parameters.values()
        return {p.name: getattr(self.args, p.name) for p in parameters if p.kind is p.KEYWORD_ONLY}

    @torch.no_grad()
    def _record(self, metrics: Mapping[str, Tensor], mask: Tensor) -> None:
        mode = "train" if self.model.training else "eval"
        window = self._trust_window[mode]
        window.append(local_statistics(metrics, mask))
        if self.model.training and not self.accelerator.sync_gradients:
            return
        names = [name for names, _ in window for name in names]
        stats = torch.cat([stats for _, stats in window])  # (K, 2), of all micro-batches of the step
        self._trust_window[mode] = []
        self._trust_gathered[mode].append((names, self.accelerator.gather(stats[None])))  # (processes, K, 2)

    def _recorded(self, mode: str) -> dict[str, list[float]]:
        """What was recorded since the last call, see [`read_gathered`]."""
        gathered, self._trust_gathered[mode] = self._trust_gathered[mode], []
        return read_gathered(gathered)


def apart(logps: Tensor) -> Tensor:
    """`logps` as a tensor of its own, at which the gradient of [`telemetry`] ends.

    Never the tensor that the model returned: DeepSpeed 0.19 hooks the gradient of what its engine returns, and starts
    its own backward where one arrives. Without a graph a leaf, so that the policy gradient is seen in evaluation too.
    """
    return logps.view_as(logps) if torch.is_grad_enabled() else logps.detach().requires_grad_()


def telemetry(batch: PolicyBatch, policy: PolicyLoss, anchor_logps: Tensor) -> dict[str, Tensor]:
    """The `trust/` metrics that every method logs; see [`TrustGRPOTrainer`]."""
    gradient = None
    if policy.per_token_loss.requires_grad or (policy.batch_loss is not None and policy.batch_loss.requires_grad):
        # The graph between `logps` and the term is elementwise: this never reaches the model
        with torch.enable_grad():
            total = (policy.per_token_loss * batch.mask).sum()
            total = total if policy.batch_loss is None else total + policy.batch_loss
            (gradient,) = torch.autograd.grad(total, batch.logps, retain_graph=True, allow_unused=True)
    with torch.no_grad():
        live = batch.mask > 0
        logps = batch.logps.detach()
        log_ratio = (logps - anchor_logps).clamp(-LOG_RATIO_LIMIT, LOG_RATIO_LIMIT).masked_fill(~live, 0.0)  # (B, T)
        ratio = torch.exp(log_ratio)
        p01, p99 = masked_quantiles(ratio, live, (0.01, 0.99))
        weight = ratio * batch.mask
        ess = weight.sum().square() / (weight.square().sum() * batch.mask.sum())  # NaN without live tokens
        zero = torch.ones_like(ratio) if gradient is None else (gradient == 0).float()
        cut = torch.full_like(ratio, torch.nan) if gradient is None else zero * (batch.advantages != 0)
        return {
            "trust/ratio/min": ratio,
            "trust/ratio/p01": p01,
            "trust/ratio/mean": ratio,
            "trust/ratio/p99": p99,
            "trust/ratio/max": ratio,
            "trust/ess": ess,
            "trust/kl": k3(log_ratio),
            "trust/tv": (logps.exp() - anchor_logps.exp()).abs(),
            "trust/zero_grad": zero,
            "trust/cut": cut,
        }


def masked_quantiles(x: Tensor, live: Tensor, qs: tuple[float, ...]) -> list[Tensor]:
    """Nearest-rank quantiles of `x` over `live`, or NaN. No boolean indexing, which would wait for the device."""
    ordered = x.masked_fill(~live, torch.nan).flatten().sort().values  # NaN comes last
    last = (live.sum() - 1).clamp(min=0)
    return [ordered[(last * q).round().long()] for q in qs]


def local_statistics(metrics: Mapping[str, Tensor], mask: Tensor) -> tuple[tuple[str, ...], Tensor]:
    """Names of K metrics, and (K, 2): their values and weights on this process. NaN entries do not count.

    Nor do rows without a live token; a micro-batch of such rows alone has no value, NaN. Only where TRL 1.16 logs the
    same metric it is kept as TRL has it: the mean of no token is 0, and a sequence counts with or without live tokens.
    """
    groups = defaultdict(list)  # what has one shape and one reduction is reduced at once: a few kernels for them all
    for name, x in metrics.items():
        if x.shape not in (mask.shape, (len(mask), 1), ()):
            expected = f"(), ({len(mask)}, 1) or {tuple(mask.shape)}"
            raise ValueError(f"metric {name!r} has shape {tuple(x.shape)}, expected {expected}.")
        groups[x.shape, _extremum(name), _is_stock(name)].append(name)
    stats = []
    rows = (mask > 0).any(1)  # (B,)
    for (shape, extremum, stock), names in groups.items():
        x = torch.stack([metrics[name].detach().float().flatten() for name in names])  # (k, numel)
        if shape == mask.shape:
            live = (mask > 0).flatten()
        else:
            live = rows if shape and not stock else torch.ones_like(x[0], dtype=torch.bool)
        keep = live & ~x.isnan()
        weight = keep.sum(1)
        if extremum is None:
            nothing = (weight == 0) & live.any() if stock else weight == 0
            value = x.masked_fill(~keep, 0.0).sum(1).masked_fill(nothing, torch.nan)
        elif extremum is min:
            value = x.masked_fill(~keep, math.inf).amin(1)
        else:
            value = x.masked_fill(~keep, -math.inf).amax(1)
        stats.append(torch.stack([value, weight.float()], dim=1))
    return tuple(name for names in groups.values() for name in names), torch.cat(stats)


def read_gathered(gathered: list[tuple[list[str], Tensor]]) -> dict[str, list[float]]:
    """Metrics by name of (names, (processes, K, 2) statistics): a value for each micro-batch, to be averaged.

    Extrema have one value, over all there is. Only those that TRL 1.16 logs too are, as TRL has it, one a micro-batch.
    """
    found = defaultdict(list)
    if gathered:
        names = [name for names, _ in gathered for name in names]
        stats = torch.cat([stats for _, stats in gathered], dim=1).tolist()  # the one wait for the device
        for name, *by_process in zip(names, *stats, strict=True):
            found[name].append(_join_processes(name, by_process))
    for name, values in found.items():
        if (extremum := _extremum(name)) is not None and not _is_stock(name):
            found[name] = [extremum((x for x in values if not math.isnan(x)), default=math.nan)]
    return found


def _is_stock(name: str) -> bool:
    """Whether TRL 1.16 logs a metric of this name."""
    return name in ("entropy", "kl") or name.startswith("clip_ratio/")


def _extremum(name: str):
    """`min`, `max`, or `None` for a mean, by how the name of a metric ends."""
    return min if name.endswith("min") else max if name.endswith("max") else None


def _join_processes(name: str, stats: list[list[float]]) -> float:
    """Join the (value, weight) of each process: weighted mean, or the extremum if the name says so."""
    values, weights = zip(*stats, strict=True)
    if (extremum := _extremum(name)) is not None:
        return extremum(values) if any(weights) else math.nan
    if not any(weights):
        return sum(values)
    return sum(value for value, weight in zip(values, weights, strict=True) if weight) / sum(weights)
