"""What a model was asked while a loss was computed, and what it predicted: how TRAM measures its distance.

A loss is a black box that calls the model. `Probe` listens to those calls, can make them again with other parameters,
and compares the predictive distributions of the two. It uses hooks and public methods of transformers only.
"""

from collections.abc import Callable
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule

from ..anatomy import backbone, causal_lm, logit_transform, output_head, whole


def kl_rows(anchor_logits: Tensor, logits: Tensor, divergence: str = "forward") -> Tensor:
    """Divergence of each row's two predictive distributions, in at least float32.

    Summed as `b - a - a log(b / a)` over the tokens, which equals the usual `- a log(b / a)` because both sum to 1.
    Its terms are never negative, so that the distance of one optimizer step, 1e-10 and less at a learning rate of
    1e-6, does not drown in a round-off of 1e-8.

    Args:
        anchor_logits, logits: (N, V), of the anchor and of the model now.
        divergence: `forward` is KL(anchor, now), the paper's; `reverse` is KL(now, anchor); `symmetric` their mean.

    Returns:
        (N,), in nats. Infinite where the second distribution excludes what the first allows.
    """
    dtype = torch.promote_types(logits.dtype, torch.float32)
    log_p = F.log_softmax(anchor_logits.to(dtype), dim=-1)  # (N, V)
    log_q = F.log_softmax(logits.to(dtype), dim=-1)  # (N, V)

    def kl(log_a, log_b):
        a, b = log_a.exp(), log_b.exp()
        r = torch.where(a == 0, 1, log_b - log_a)  # where a is 0 only b is left, whatever r
        near = a * r.square() * (1 / 2 + r / 6 + r.square() / 24)  # a (e^r - 1 - r)
        return torch.where(r.abs() < 1e-2, near, b - a - a * r).sum(-1)

    if divergence == "forward":
        return kl(log_p, log_q)
    if divergence == "reverse":
        return kl(log_q, log_p)
    return (kl(log_p, log_q) + kl(log_q, log_p)) / 2


@dataclass
class Call:
    """One forward of the model inside a loss: how to make it again, and its predictive distributions."""

    args: tuple
    kwargs: dict[str, Any]
    autocast: tuple[bool, torch.dtype]
    forward: Callable  # what stood in `model.forward`
    redirected: bool = False  # that was the loss itself; `args`, `kwargs` and `autocast` are those of the backbone
    labels: Tensor | None = None
    shifted: bool = False  # the labels are already aligned with the positions that predict them
    logits: Tensor | None = None  # (B, T, V) or (B, V)
    hidden: Tensor | None = None  # (B, T, H), what the output head reads: kept only where there are no logits

    @property
    def predictions(self) -> Tensor:
        return self.hidden if self.logits is None else self.logits


class Probe:
    """Listens to `model` (unwrapped from data parallelism) and repeats what it heard.

    Predictions are read from the logits where the forward builds them. TRL's fused heads do not; then the head's input
    is kept, which is smaller by the vocabulary over the width, and projected again in chunks.

    TRL's distillation trainers run their loss in the place of `model.forward`, for one call, and call the backbone in
    it (`_ForwardRedirection`, TRL 1.16). Of such a call only the backbone's is repeated, in the same place, so that
    the model's own hooks run around it.
    """

    def __init__(self, model: nn.Module):
        self.model = model
        self.lm = causal_lm(model)
        self.backbone = backbone(model) or self.lm
        self.device_type = next(model.parameters()).device.type
        config = getattr(self.lm, "config", None)
        generates = hasattr(self.lm, "can_generate") and self.lm.can_generate()
        self.causal = generates and not getattr(config, "is_encoder_decoder", False)

    @contextmanager
    def listen(self, calls: list[Call]):
        """Append an entry to `calls` for each forward in the block, without those made with the gradient switched."""
        wants_grad = torch.is_grad_enabled()  # a reference pass inside the loss, on the same model, wants none
        running: list[Call] = []

        def wanted():
            return torch.is_grad_enabled() == wants_grad

        def before(module, args, kwargs):
            if wanted():
                running.append(Call(args, kwargs, self._autocast_state(), module.forward))

        def before_lm(module, args, kwargs):
            if running and wanted():  # below PEFT, whose prompt learning lengthens the labels with the output
                shifted = kwargs.get("shift_labels")
                running[-1].shifted = shifted is not None
                running[-1].labels = kwargs.get("labels") if shifted is None else shifted

        def before_backbone(module, args, kwargs):
            # A redirection puts the model's own forward back before it runs the loss; an ordinary call leaves it.
            if running and wanted() and running[-1].forward != self.model.forward:
                call = running[-1]
                call.args, call.kwargs, call.autocast, call.redirected = args, kwargs, self._autocast_state(), True

        def after_backbone(module, args, output):
            if running and wanted() and getattr(output, "last_hidden_state", None) is not None:
                running[-1].hidden = output.last_hidden_state.detach()

        def after(module, args, output):
            if running and wanted():  # a reference pass may also come inside a redirected loss
                call = running.pop()
                if not call.redirected and call.forward != module.forward:
                    return  # a redirection that called the model itself, which is in `calls` already
                logits = output.get("logits") if isinstance(output, dict) else getattr(output, "logits", None)
                if logits is not None:
                    call.logits, call.hidden = logits.detach(), None
                calls.append(call)

        with ExitStack() as stack:
            for handle in (
                self.model.register_forward_pre_hook(before, with_kwargs=True),
                self.lm.register_forward_pre_hook(before_lm, with_kwargs=True),
                self.backbone.register_forward_pre_hook(before_backbone, with_kwargs=True),
                self.backbone.register_forward_hook(after_backbone),
                self.model.register_forward_hook(after),
            ):
                stack.callback(handle.remove)
            yield

    @torch.no_grad()
    def repeat(self, calls: list[Call]) -> list[Call]:
        """Make the same forwards again, without gradient, with whatever the parameters are by now."""
        again: list[Call] = []
        with self.listen(again):
            for call in calls:
                with self._autocast(call), self._redirection(call):
                    self.model(*call.args, **call.kwargs)
        # FSDP2 leaves its root gathered after a forward without a backward, and the next forward would reuse that.
        for module in self.model.modules():
            if isinstance(module, FSDPModule):
                module.reshard()
        return again

    @torch.no_grad()
    def divergence(
        self,
        now: list[Call],
        anchor: list[Call],
        stored: dict[Tensor, Tensor],
        labels: Tensor | None,
        kind: str,
        chunk: int,
    ) -> Tensor:
        """Sum of the divergences at the positions the loss is about, and their number: (2,).

        Args:
            now, anchor: The calls, and the same calls made by the anchor.
            stored: The anchor's values of parameters that differ from the model's.
            labels: Labels for calls that were given none.
            kind: As [`kl_rows`].
            chunk: Positions whose logits exist at one time.

        Raises:
            ValueError: If a call's predictions cannot be read, or have one output only.
        """
        total = None
        for a, b in zip(now, anchor, strict=True):
            # Each call has its own: a forward may build logits in evaluation mode only, in which the anchor runs.
            heads = self._head(a, {}), self._head(b, stored)
            mask = self.positions(a, labels)
            rows = [call.predictions[mask].split(chunk) for call in (a, b)]  # (n, V) or (n, H)
            with self._autocast(a):
                sums = [kl_rows(heads[1](y), heads[0](x), kind).sum() for x, y in zip(*rows, strict=True)]
            pair = torch.stack([torch.stack(sums).sum(), mask.sum().to(sums[0].dtype)])
            total = pair if total is None else total + pair
        return total

    def positions(self, call: Call, labels: Tensor | None) -> Tensor:
        """Positions whose target is a label other than -100, or is no padding where there are no labels.

        Returns:
            bool, of the shape of the predictions without their last dimension: (B, T) or (B,).
        """
        shape, device = call.predictions.shape[:-1], call.predictions.device
        attention_mask = call.kwargs.get("attention_mask")
        if call.labels is not None:
            valid = call.labels != -100
        elif labels is not None and labels.size(0) == shape[0]:
            valid = labels != -100
        elif attention_mask is not None:
            valid = attention_mask != 0
        else:
            return torch.ones(shape, dtype=torch.bool, device=device)
        if len(shape) != 2 or valid.dim() != 2:  # one prediction a row, whose label may be anything
            every = torch.ones(shape, dtype=torch.bool, device=device)
            return valid if valid.shape == shape else every
        if self.causal and not call.shifted:
            valid = F.pad(valid[:, 1:], (0, 1))  # position t predicts token t + 1
        return F.pad(valid, (shape[1] - valid.size(1), 0)).to(device)  # aligned right: virtual tokens, logits_to_keep

    @contextmanager
    def _redirection(self, call: Call):
        """Within the block, `model` runs its backbone alone if `call` was redirected."""
        if not call.redirected:
            yield
            return
        forward = self.model.forward
        self.model.forward = lambda *args, **kwargs: self.backbone(*args, **kwargs)
        try:
            yield
        finally:
            self.model.forward = forward

    def _autocast_state(self) -> tuple[bool, torch.dtype]:
        return torch.is_autocast_enabled(self.device_type), torch.get_autocast_dtype(self.device_type)

    def _autocast(self, call: Call):
        enabled, dtype = call.autocast
        return torch.autocast(self.device_type, dtype=dtype, enabled=enabled)

    def _head(self, call: Call, stored: dict[Tensor, Tensor]) -> Callable[[Tensor], Tensor]:
        """The map from rows of `call.predictions`, (n, V) or (n, H), to logits (n, V).

        The head's parameters in `stored` are exchanged for the values there.
        """
        name = type(self.lm).__name__
        if call.logits is not None:
            if call.logits.size(-1) == 1:
                raise ValueError(
                    f"{name} has one output, a score and no distribution (softmax of one logit is 1), so TRAM's "
                    "distance would always be 0; use tram_variant='fisher', which measures none"
                )
            return lambda logits: logits
        head = None if call.hidden is None else output_head(self.lm)
        if head is None:
            raise ValueError(
                f"TRAM cannot read the predictions of {name}: its forward returns no `logits`, and it has no backbone "
                "with a `last_hidden_state` and a head; use tram_variant='fisher', which needs neither"
            )
        values = {name: stored.get(p, p) for name, p in head.named_parameters()}
        values = {name: whole(v) for name, v in values.items()}
        scale, cap = logit_transform(self.lm.config.get_text_config())

        def project(hidden):
            logits = torch.func.functional_call(head, values, (hidden,)) * scale
            return logits if cap is None else cap * torch.tanh(logits / cap)

        return project
