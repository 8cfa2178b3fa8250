"""GU: forget updates without the part that would move the retain loss to first order (arXiv 2511.17100).

Grade: exact for the projections (the authors' corrected derivation, [`trl_trust.unlearn.projection`]); what is kept as
history, and the defaults, are a reconstruction. The property is of first order and holds for the gradient that is
handed to the optimizer (`gu_stage="grad"`); momentum and weight decay are bound only by `gu_stage="delta"`.
"""

import copy
import os
import re
from collections.abc import Callable
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Any, ClassVar, Literal

import torch
import torch.distributed as dist
from safetensors.torch import load_file, save_file
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, AutoTokenizer, Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from .. import optim  # noqa: F401  makes `optim="auon"` known to transformers
from ..cards import TrustCard, paper
from ..settings import BelowOne, Count, NonNegative, Number, Positive, Settings, Whole, check, setting
from ..steps import GuardedSteps
from . import losses as L
from .data import ForgetRetainDataset, PairCollator, require_columns
from .projection import adam_metric, cone_project, norm, null_project, sign_project, tangent_step


HISTORY = "gu_history.safetensors"  # in every checkpoint
ADAM = ("adamw_torch", "adamw_torch_fused")  # optimizers whose state holds a float `exp_avg_sq`


@dataclass
class GUConfig(Settings, TrainingArguments):
    """
    Configuration of [`GUTrainer`]: `transformers.TrainingArguments` and what GU adds.

    Raises:
        ValueError: for a value outside its range, or settings that do not fit each other.
    """

    forget_loss: Literal["ga", "graddiff", "npo", "simnpo", "dpo", "wga", "satimp", "undial", "ceu", "rmu"] = setting(
        "graddiff", "The loss that forgets; a callable is given to the trainer instead."
    )
    gamma: NonNegative | None = setting(None, "Weight of the forget loss; None: the loss's own default, mostly 1.")
    alpha: NonNegative | None = setting(None, "Weight of the retain loss; None: the loss's own default, mostly 1.")
    beta: Positive | None = setting(None, "Of npo, simnpo, dpo, wga, undial; None: the loss's own default.")
    beta1: NonNegative | None = setting(None, "Exponent of p in satimp; None: 5.")
    beta2: NonNegative | None = setting(None, "Exponent of 1 - p in satimp; None: 1.")
    delta: Number | None = setting(None, "Margin of simnpo in nats a token; None: 0.")
    rmu_layer: Whole = setting(7, "Decoder layer whose output rmu steers.")
    rmu_scale: Positive = setting(2.0, "Length of the vector that rmu steers it to.")
    gu_mode: Literal["null", "sign", "cone", "off"] = setting(
        "null", "null: remove what moves the retain loss; sign, cone: keep what lowers it; off: the plain procedure."
    )
    gu_stage: Literal["grad", "delta"] = setting(
        "grad", "Project the gradient before the optimizer, or correct the step that it made."
    )
    gu_metric: Literal["adam", "identity"] = setting("adam", "The metric: Adam's second moment, or the identity.")
    gu_scope: Literal["global", "per_tensor"] = setting("global", "Project all tensors as one vector, or each alone.")
    gu_rank: Whole = setting(8, "Past retain gradients that protect, beside the current one; at most 8.")
    gu_refresh_every: Count = setting(1, "Optimizer steps between two retain gradients that enter the history.")
    gu_retain_signal: Literal["nll", "kl_ref_theta", "kl_theta_ref"] = setting(
        "nll", "The retain loss: of the answers, or a KL to the model before unlearning."
    )
    gu_params: list[str] | None = setting(None, "Regular expressions of the parameters to project; None: all trained.")
    gu_freeze_others: bool = setting(True, "With gu_params: train nothing else, since nothing else is protected.")
    gu_tau: NonNegative = setting(0.0, "Threshold of the sign mode on a_i b_i.")
    gu_kappa: NonNegative = setting(0.5, "Cap of the sign mode on what is kept, relative to the orthogonal part.")
    gu_eps: Positive | None = setting(None, "Added to the root of the second moment; None: the optimizer's own.")
    gu_residual_tol: BelowOne = setting(
        1e-3, "A projected gradient that is less orthogonal than this cosine is not used, and counted."
    )
    gu_finite_budget: NonNegative | None = setting(
        None, "With gu_stage=delta: halve a step until the retain loss of its batches rises by no more than this."
    )
    max_length: Count = setting(512, "Tokens of a row at most.")
    remove_unused_columns: bool = setting(False, "The rows are pairs, whose columns the trainer reads itself.")

    def __post_init__(self):
        if isinstance(self.gu_params, str):
            self.gu_params = [self.gu_params]
        check(self)
        self.require(self.gu_rank <= 8, "gu_rank", "must be at most 8; more protected nothing further when measured")
        self.require(not self.remove_unused_columns, "remove_unused_columns", "must be False: rows are pairs")
        loss = L.FORGET_LOSSES[self.forget_loss]
        for name in ("beta", "beta1", "beta2", "delta"):
            unread = getattr(self, name) is not None and name not in loss.reads
            self.require(not unread, name, f"is not read by forget_loss={self.forget_loss!r}; leave it at None")
        defaults = {"gamma": 1.0, "alpha": 1.0, **dict(loss.defaults)}
        self.weights = {k: v if getattr(self, k) is None else getattr(self, k) for k, v in defaults.items()}
        both = self.weights["gamma"] == self.weights["alpha"] == 0
        self.require(not both, "gamma", "and alpha=0 leave nothing to train; set one of them above 0")
        delta = self.gu_stage == "delta"
        self.require(not (delta and self.gu_mode == "sign"), "gu_mode", "works on gradients; set gu_stage='grad'")
        self.require(
            not (delta and self.gu_mode == "null" and self.weights["alpha"] > 0),
            "gu_mode",
            "with gu_stage='delta' would remove the retain descent too; set gu_mode='cone', or alpha=0",
        )
        self.require(
            self.gu_finite_budget is None or delta, "gu_finite_budget", "corrects steps; set gu_stage='delta'"
        )
        self.require(not self.fp16, "fp16", "scales the loss, which the projection would see; set bf16=True")
        self.require(not self.deepspeed, "deepspeed", "shards the gradients that GU projects; run GU with plain DDP")
        self.require(not self.fsdp, "fsdp", "shards the gradients that GU projects; run GU with plain DDP")
        super().__post_init__()
        kwargs = self.gradient_checkpointing_kwargs or {}
        reentrant = self.gradient_checkpointing and kwargs.get("use_reentrant", False)
        self.require(
            not reentrant, "gradient_checkpointing_kwargs", "must have use_reentrant=False: GU calls autograd.grad"
        )
        if self.gradient_checkpointing:
            self.gradient_checkpointing_kwargs = {**kwargs, "use_reentrant": False}


class _PlainCard:
    """The model card that [`TrustCard`] extends; that of transformers' Trainer knows nothing of unlearning."""

    def create_model_card(self, model_name: str | None = None, **kwargs) -> None:
        if not self.is_world_process_zero():
            return
        packages = {"TRL": "trl", "Transformers": "transformers", "Pytorch": "torch"}
        versions = "\n".join(f"- {title}: {version(package)}" for title, package in packages.items())
        tags = "".join(f"- {tag}\n" for tag in self._tag_names)
        text = (
            f"---\nlibrary_name: transformers\ntags:\n{tags}---\n\n# Model Card for {model_name}\n\n"
            f"{self._base_name or 'A model'} after unlearning with [{self._name}](https://arxiv.org/abs/"
            f"{self._paper['id']}) around the forget loss `{self.args.forget_loss}`.\n\n"
            f"### Framework versions\n\n{versions}\n\n## Citation\n\n```bibtex\n{self._paper['citation']}\n```\n"
        )
        os.makedirs(self.args.output_dir, exist_ok=True)
        Path(self.args.output_dir, "README.md").write_text(text, "utf-8")


class GUTrainer(TrustCard, GuardedSteps, _PlainCard, Trainer):
    """`transformers.Trainer` that forgets one split and keeps another, each update projected by GU.

    Args:
        model: a causal language model, or its name; by name it is loaded in float32, as TRL does.
        args: the [`GUConfig`].
        train_dataset: pairs, [`~trl_trust.unlearn.data.ForgetRetainDataset`].
        processing_class: the tokenizer; that of the model by default.
        ref_model: the frozen model before unlearning; by default a copy of `model`, or with an adapter the model
            without it, and only where the losses read it.
        peft_config: wraps the model in an adapter.
        forget_loss: `loss(model, ref_model, inputs) -> scalar`, in place of `args.forget_loss`; `inputs` holds the
            batches `forget` and `retain`. It is minimized.

    Raises:
        ValueError: in one line, before the first step, for what cannot be trained as asked.
    """

    _name = "GU"
    _tag_names: ClassVar = ["trl-trust", "gu"]
    _paper = paper(
        "Geometric-disentangelment Unlearning",
        "2511.17100",
        "Duo Zhou and Yuji Zhang and Tianxin Wei and Ruizhong Qiu and Ke Yang and Xiao Lin and Cheng Qian and "
        "Jingrui He and Hanghang Tong and Chengxiang Zhai and Heng Ji and Huan Zhang",
    )

    def __init__(
        self,
        model: nn.Module | str,
        args: GUConfig | None = None,
        train_dataset: ForgetRetainDataset | None = None,
        processing_class: Any = None,
        ref_model: nn.Module | None = None,
        peft_config: Any = None,
        forget_loss: Callable[..., Tensor] | None = None,
        **kwargs,
    ):
        args = GUConfig(output_dir="gu_output") if args is None else args
        name = model if isinstance(model, str) else model.config._name_or_path
        self._base_name = name
        if isinstance(model, str):
            model = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32)
        processing_class = AutoTokenizer.from_pretrained(name) if processing_class is None else processing_class
        if not isinstance(train_dataset, ForgetRetainDataset):
            raise ValueError(f"train_dataset must be a ForgetRetainDataset, not {type(train_dataset).__name__}")
        loss = L.FORGET_LOSSES[args.forget_loss] if forget_loss is None else L.ForgetLoss(reference=True)
        if loss.alternate:
            require_columns(train_dataset.forget, ["alternate"], "forget")
        optimizer = (kwargs.get("optimizers") or (None,))[0]
        known = args.optim in ADAM if optimizer is None else isinstance(optimizer, torch.optim.Adam)
        if args.gu_metric == "adam" and args.gu_mode != "off" and not known:
            name = getattr(args.optim, "value", args.optim)
            mend = "set 'adamw_torch', or gu_metric='identity'"
            raise ValueError(f"optim={name!r} keeps no float second moment; {mend}.")
        if peft_config is not None:
            from peft import get_peft_model

            model = get_peft_model(model, peft_config)
        if args.forget_loss == "rmu" and forget_loss is None and args.rmu_layer >= model.config.num_hidden_layers:
            raise ValueError(
                f"rmu_layer={args.rmu_layer!r} must be below the {model.config.num_hidden_layers} layers."
            )
        chosen = [
            (key, p)
            for key, p in model.named_parameters()
            if p.requires_grad and (args.gu_params is None or any(re.search(x, key) for x in args.gu_params))
        ]
        for pattern in args.gu_params or ():
            if not any(re.search(pattern, key) for key, _ in chosen):
                raise ValueError(f"gu_params={pattern!r} matches no trainable parameter")
        if not chosen:
            raise ValueError("the model has no trainable parameter that GU could project")
        if args.gu_params is not None and args.gu_freeze_others:
            keys = {key for key, _ in chosen}
            for key, p in model.named_parameters():
                p.requires_grad_(key in keys)
        self._switch_adapter = ref_model is None and hasattr(model, "disable_adapter")
        if ref_model is None and not self._switch_adapter and (loss.reference or args.gu_retain_signal != "nll"):
            ref_model = copy.deepcopy(model)
        self.ref_model = None if ref_model is None else ref_model.requires_grad_(False).eval()
        self.forget_loss = forget_loss
        self._covectors: Tensor | None = None  # (1 + gu_rank, d) float32: the current retain gradient, then past ones
        self.projections = 0  # optimizer steps whose retain gradient was seen
        self.pushed = 0  # of them, those that entered the history; number n is in row 1 + n % gu_rank
        self._sums: dict[str, list[Tensor]] = {}
        super().__init__(
            model=model,
            args=args,
            train_dataset=train_dataset,
            processing_class=processing_class,
            data_collator=kwargs.pop("data_collator", None)
            or PairCollator(processing_class, args.max_length, alternate=loss.alternate),
            **kwargs,
        )
        if self.is_deepspeed_enabled or self.is_fsdp_enabled:
            raise ValueError("GU does not run under DeepSpeed or FSDP, which shard the gradients; use plain DDP")
        if self.ref_model is not None:
            self.ref_model.to(self.args.device)
        self.add_callback(Epochs(train_dataset))
        self.chosen = [p for _, p in chosen]
        ids = {id(p) for p in self.chosen}
        self.others = [p for p in self.model.parameters() if p.requires_grad and id(p) not in ids]
        self._clear()
        self.model_accepts_loss_kwargs = False  # means over a micro-batch, which the Trainer divides by their number
        if args.forget_loss == "rmu":
            hidden, g = self.model.config.hidden_size, torch.Generator().manual_seed(args.seed)
            u = torch.rand(hidden, generator=g)
            self._rmu_target = (args.rmu_scale * u / u.norm()).to(self.args.device)

    # ---- losses ----

    @contextmanager
    def reference(self):
        """The frozen model before unlearning, without gradient."""
        with torch.no_grad():
            if self._switch_adapter:
                training = self.model.training
                self.model.eval()
                with self.model.disable_adapter():
                    yield self.model
                self.model.train(training)
            else:
                yield self.ref_model

    def _run(self, model: nn.Module, batch: dict[str, Tensor], **more):
        return model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], **more)

    def _reference_logits(self, batch: dict[str, Tensor]) -> Tensor:
        with self.reference() as model:
            return self._run(model, batch).logits

    def _activation(self, model: nn.Module, batch: dict[str, Tensor]) -> Tensor:
        out = self._run(model, batch, output_hidden_states=True)
        return out.hidden_states[self.args.rmu_layer + 1].float()

    def forget_term(self, model: nn.Module, inputs: dict[str, dict[str, Tensor]]) -> Tensor:
        """The forget loss, 0-d, to be minimized; not yet weighted by gamma."""
        if self.forget_loss is not None:
            if self._switch_adapter:
                return self.forget_loss(model, _Reference(self), inputs)
            return self.forget_loss(model, self.ref_model, inputs)
        batch, kind = inputs["forget"], self.args.forget_loss
        weights = {k: v for k, v in self.args.weights.items() if k not in ("gamma", "alpha")}
        if kind == "rmu":
            mask = (batch["labels"] != -100).float()
            return L.activation_loss(self._activation(model, batch), self._rmu_target, mask)
        logits, labels = self._run(model, batch).logits.float(), batch["labels"]
        if kind == "undial":
            return L.undial_loss(logits, self._reference_logits(batch).float(), labels, **weights)
        if kind == "ceu":
            return L.ceu_loss(logits, labels)
        logps, mask = L.answer_logps(logits, labels)
        if kind in ("npo", "dpo"):
            ref_logps = L.answer_logps(self._reference_logits(batch), labels)[0]
            if kind == "npo":
                return L.npo_loss(logps, ref_logps, mask, **weights)
            win = inputs["alternate"]
            win_logps, win_mask = L.answer_logps(self._run(model, win).logits, win["labels"])
            win_ref = L.answer_logps(self._reference_logits(win), win["labels"])[0]
            return L.dpo_loss(win_logps, win_ref, win_mask, logps, ref_logps, mask, **weights)
        return {"simnpo": L.simnpo_loss, "wga": L.wga_loss, "satimp": L.satimp_loss}.get(kind, L.ga_loss)(
            logps, mask, **weights
        )

    def retain_term(self, model: nn.Module, inputs: dict[str, dict[str, Tensor]]) -> Tensor:
        """The retain loss, 0-d; not yet weighted by alpha."""
        batch, signal = inputs["retain"], self.args.gu_retain_signal
        if self.args.forget_loss == "rmu" and self.forget_loss is None and signal == "nll":
            with self.reference() as ref:
                target = self._activation(ref, batch)
            return L.activation_loss(self._activation(model, batch), target, (batch["labels"] != -100).float())
        logits = self._run(model, batch).logits.float()
        if signal == "nll":
            return L.nll_loss(*L.answer_logps(logits, batch["labels"]))
        ref = self._reference_logits(batch).float()
        return L.kl_loss(*((ref, logits) if signal == "kl_ref_theta" else (logits, ref)), batch["labels"])

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        """`gamma * forget + alpha * retain`, 0-d: the plain procedure's loss."""
        loss = self._weighted(self.forget_term(model, inputs), self.retain_term(model, inputs))
        return (loss, {}) if return_outputs else loss

    def _weighted(self, forget: Tensor, retain: Tensor) -> Tensor:
        self._note("forget/loss", forget)
        self._note("retain/loss", retain)
        return self.args.weights["gamma"] * forget + self.args.weights["alpha"] * retain

    # ---- the step ----

    def training_step(self, model, inputs, num_items_in_batch=None):
        """Accumulate both gradients; at the end of the window project and write `p.grad`.

        `autograd.grad` passes by DDP's hooks, so the model under DDP is called itself and the two vectors are averaged
        over processes here. With `gu_mode="off"` the step is `transformers.Trainer`'s own.
        """
        if self.args.gu_mode == "off":
            return super().training_step(model, inputs, num_items_in_batch)
        self.model.train()
        inputs, count = self._prepare_inputs(inputs), self.current_gradient_accumulation_steps
        with self.compute_loss_context_manager():
            forget = self.forget_term(self.model, inputs)
            self._add("forget", forget / count)
            retain = self.retain_term(self.model, inputs)
            self._add("retain", retain / count)
        loss = self._weighted(forget.detach(), retain.detach()) / count
        if self.args.gu_finite_budget is not None:
            self._window.append(inputs)
        if self.accelerator.gradient_state.sync_gradients:
            self._finish_window()
        return self._watch(loss)

    def _add(self, side: str, loss: Tensor) -> None:
        """Add the gradient of `loss` to a float32 buffer, selected parameters first."""
        parameters = [*self.chosen, *self.others]
        grads = torch.autograd.grad(loss, parameters, allow_unused=True)
        pairs = zip(parameters, grads, strict=True)
        flat = torch.cat([(torch.zeros_like(p) if g is None else g).float().flatten() for p, g in pairs])
        self._buffers[side] = flat if side not in self._buffers else self._buffers[side].add_(flat)

    def _clear(self) -> None:
        self._buffers: dict[str, Tensor] = {}
        self._window: list = []
        self._pending: tuple | None = None  # stage delta: covectors and batches of the step that is being made
        self._before: Tensor | None = None  # the selected parameters before it

    def _finish_window(self) -> None:
        for flat in self._buffers.values():
            if dist.is_initialized() and self.args.world_size > 1:
                dist.all_reduce(flat)
                flat /= self.args.world_size
        forget, d = self._buffers["forget"], sum(p.numel() for p in self.chosen)
        finite = all(bool(flat.isfinite().all()) for flat in self._buffers.values())
        if not finite:  # GuardedSteps leaves out a step with such gradients; the history does without it too
            self._write(forget + self._buffers["retain"])
        else:
            weights, retain = self.args.weights, self._buffers["retain"]
            if self._covectors is None:
                self._covectors = retain.new_empty(1 + self.args.gu_rank, d)
            self._covectors[0] = retain[:d]
            covectors = self._covectors[: 1 + self.history.shape[0]].T  # (d, 1 + k), column by column in memory
            if self.args.gu_stage == "grad":
                forget = torch.cat([self._project(forget[:d], retain[:d], covectors), forget[d:]])
            else:
                self._pending = (covectors, self._window)
            self._write(weights["gamma"] * forget + weights["alpha"] * retain)
            self._remember(retain[:d])
        self._buffers, self._window = {}, []

    def _write(self, flat: Tensor) -> None:
        start = 0
        for p in (*self.chosen, *self.others):
            p.grad = flat[start : start + p.numel()].view_as(p).to(p.dtype)
            start += p.numel()

    def _remember(self, retain: Tensor) -> None:
        """Put the unit-normalized raw retain gradient in the place of the oldest; it is whitened anew at each step."""
        length = norm(retain)
        due = self.projections % self.args.gu_refresh_every == 0
        self.projections += 1
        if due and self.args.gu_rank and length > 0:
            self._covectors[1 + self.pushed % self.args.gu_rank] = retain / length
            self.pushed += 1

    @property
    def history(self) -> Tensor:
        """Past retain gradients of unit length (k, d), k <= gu_rank, in no particular order."""
        filled = min(self.pushed, self.args.gu_rank)
        return torch.empty(0, 0) if self._covectors is None else self._covectors[1 : 1 + filled]

    def metric(self) -> Tensor:
        """P (d,) float32 of the selected parameters: Adam's where it has state, ones elsewhere."""
        parts, fresh = [], 0
        groups = {id(p): group for group in self.optimizer.param_groups for p in group["params"]}
        for p in self.chosen:
            state = self.optimizer.state.get(p, {})
            if self.args.gu_metric == "identity" or "exp_avg_sq" not in state:
                parts.append(torch.ones(p.numel(), device=p.device))
                fresh += p.numel()
                continue
            group = groups[id(p)]
            eps = group["eps"] if self.args.gu_eps is None else self.args.gu_eps
            correction = 1 - group["betas"][1] ** float(state["step"])
            parts.append(adam_metric(state["exp_avg_sq"].float(), eps, correction).flatten())
        metric = torch.cat(parts)
        self._note("gu/identity_params", torch.tensor(fresh / metric.numel()))
        return metric

    def _spans(self) -> list[slice]:
        """What is projected together: everything, or each tensor."""
        sizes = [p.numel() for p in self.chosen]
        if self.args.gu_scope == "global":
            return [slice(0, sum(sizes))]
        ends = torch.tensor(sizes).cumsum(0).tolist()
        return [slice(end - size, end) for end, size in zip(ends, sizes, strict=True)]

    def _project(self, forget: Tensor, retain: Tensor, covectors: Tensor) -> Tensor:
        """The forget gradient (d,) after the projection of stage `grad`."""
        metric, args, out = self.metric(), self.args, torch.empty_like(forget)
        active = torch.zeros((), dtype=torch.float64)
        for span in self._spans():
            g, P, G = forget[span], metric[span], covectors[span]
            if args.gu_mode == "cone":  # the cone is one of steps: -P g is the step, its weight 1 / P
                step, lam = cone_project(-P * g, G, 1 / P)
                out[span] = g if not lam.any() else -step / P
                active += (lam > 0).sum().cpu()
                whole = (P * g.double() ** 2).sum().sqrt()
                kept = (P * out[span].double() ** 2).sum().sqrt()
                self._note("gu/forget_kept", kept / whole.clamp(min=1e-300))
                self._note("gu/step_norm", kept)
                continue
            if args.gu_mode == "null":
                done = null_project(g, G, P)
                exact = done.residual <= args.gu_residual_tol
                out[span] = torch.where(exact, done.grad, torch.zeros_like(done.grad))
                self._note("gu/residual", done.residual)
                active += exact.double().cpu()
            else:
                done = sign_project(g, retain[span], G, P, tau=args.gu_tau, kappa=args.gu_kappa)
                out[span] = done.grad
                active += 1
            self._note("gu/coverage", done.coverage)
            self._note("gu/forget_kept", done.kept)
            self._note("gu/step_norm", done.step_norm)
        self._note("gu/active", active / len(self._spans()))
        return out

    def _flat(self) -> Tensor:
        return torch.cat([p.detach().float().flatten() for p in self.chosen])

    def _set(self, flat: Tensor) -> None:
        start = 0
        for p in self.chosen:
            p.data.copy_(flat[start : start + p.numel()].view_as(p))
            start += p.numel()

    def before_step(self) -> bool:
        left_out = super().before_step()
        if left_out:
            self._pending = None
        self._before = None if self._pending is None else self._flat()
        return left_out

    def after_step(self) -> None:
        super().after_step()
        if self._before is not None:
            with torch.no_grad():
                self._correct(self._before)
            self._before = None

    def _correct(self, before: Tensor) -> None:
        """Stage `delta`: replace the step that the optimizer made, `now - before` (d,), by its projection."""
        covectors, window = self._pending
        self._pending = None
        now, metric = self._flat(), self.metric()
        step, out = now - before, torch.empty_like(before)
        for span in self._spans():
            if self.args.gu_mode == "cone":
                out[span], _ = cone_project(step[span], covectors[span], 1 / metric[span])
            else:
                out[span] = tangent_step(step[span], covectors[span], 1 / metric[span])
        self._note("gu/correction_ratio", (out - step).norm() / step.norm().clamp(min=1e-30))
        self._note("gu/step_norm", (out.double() ** 2 / metric).sum().sqrt())
        scale = 1.0
        if self.args.gu_finite_budget is not None:
            self._set(before)
            limit = self._window_retain(window) + self.args.gu_finite_budget
            while True:
                self._set(before + scale * out)
                if self._window_retain(window) <= limit:
                    break
                scale = scale / 2 if scale > 1 / 64 else 0.0
                if scale == 0.0:
                    break
            self._note("gu/active", torch.tensor(scale))
        self._set(before + scale * out)

    def _window_retain(self, window: list) -> float:
        """The retain loss of the window's batches, over all processes."""
        with torch.no_grad(), self.compute_loss_context_manager():
            total = torch.stack([self.retain_term(self.model, inputs) for inputs in window]).mean()
        if dist.is_initialized() and self.args.world_size > 1:
            dist.all_reduce(total)
            total /= self.args.world_size
        return total.item()

    # ---- records ----

    def floating_point_ops(self, inputs):
        return sum(super(GUTrainer, self).floating_point_ops(part) for part in inputs.values())

    def prediction_step(self, model, inputs, prediction_loss_only, ignore_keys=None):
        """The plain procedure's loss on pairs that are held out; no logits."""
        with torch.no_grad(), self.compute_loss_context_manager():
            loss = self.compute_loss(model, self._prepare_inputs(inputs))
        return loss.detach(), None, None

    def _note(self, name: str, value: Tensor) -> None:
        """Keep a 0-d tensor for the next log, of training or of an evaluation; no synchronization."""
        name = name if self.model.training else f"eval_{name}"
        self._sums.setdefault(name, []).append(value.detach().double())

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """Add the means of GU's metrics since the last log."""
        evaluates = any(name.startswith("eval_") for name in logs)
        names = [name for name in self._sums if name.startswith("eval_") == evaluates]
        means = {name: torch.stack(self._sums.pop(name)).mean().item() for name in names}
        super().log({**logs, **means}, start_time)

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """The model, and in a checkpoint the history, which is what protects after a resume."""
        super().save_model(output_dir, _internal_call)
        if _internal_call and self.args.should_save and self.args.gu_mode != "off":
            rank, first = self.args.gu_rank, self.pushed - len(self.history)
            state = {str(n): self._covectors[1 + n % rank].cpu() for n in range(first, self.pushed)}
            state["projections"] = torch.tensor(self.projections)
            save_file(state, os.path.join(output_dir or self.args.output_dir, HISTORY))

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As `Trainer.train`; a resumed run takes up the history too.

        Raises:
            ValueError: if the checkpoint holds no history, or one of other parameters.
        """
        folder = resume_from_checkpoint
        if folder is True:
            folder = get_last_checkpoint(self.args.output_dir)
        self._covectors, self.projections, self.pushed = None, 0, 0
        self._clear()
        if folder and self.args.gu_mode != "off":
            path = os.path.join(folder, HISTORY)
            if not os.path.isfile(path):
                raise ValueError(f"{folder} holds no {HISTORY}: it is no checkpoint of GU; start anew")
            self._take_up(path)
        return super().train(resume_from_checkpoint, *args, **kwargs)

    def _take_up(self, path: str) -> None:
        state, d, rank = load_file(path), sum(p.numel() for p in self.chosen), self.args.gu_rank
        self.projections = int(state.pop("projections"))
        self._covectors = torch.empty(1 + rank, d, device=self.args.device)
        numbers = sorted(map(int, state))
        wider = numbers and len(numbers) < min(numbers[-1] + 1, rank)  # the rank has grown: what is there comes first
        for number in numbers:
            column = state[str(number)]
            if column.numel() != d:
                raise ValueError(f"{path} is of {column.numel()} parameters, gu_params now selects {d}")
            place = number - numbers[0] if wider else number
            if rank:
                self._covectors[1 + place % rank] = column
            self.pushed = place + 1


class Epochs(TrainerCallback):
    """Tells the pairs which epoch it is."""

    def __init__(self, pairs: ForgetRetainDataset):
        self.pairs = pairs

    def on_epoch_begin(self, args, state, control, **kwargs):
        self.pairs.epoch = int(state.epoch)  # a fraction where a run is resumed within an epoch


class _Reference:
    """What a callable forget loss gets as `ref_model` under an adapter: the model with the adapter switched off."""

    def __init__(self, trainer: GUTrainer):
        self.trainer = trainer

    def __call__(self, *args, **kwargs):
        with self.trainer.reference() as model:
            return model(*args, **kwargs)
