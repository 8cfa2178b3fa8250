"""GKDTrainer on rollouts that do not change: the host of methods that learn from them; see [`FrozenRolloutsTrainer`].

The one room that knows GKDTrainer's insides (TRL 1.16).
"""

import math
from collections.abc import Mapping
from functools import partial
from itertools import islice
from typing import Any

import torch
from accelerate.utils import gather_object
from datasets import Dataset
from torch import Tensor
from transformers import PreTrainedModel, TrainerCallback
from transformers.integrations.deepspeed import is_deepspeed_zero3_enabled
from transformers.trainer_utils import SaveStrategy
from trl.experimental.gkd import GKDConfig, GKDTrainer
from trl.trainer.utils import add_fused_lm_head, create_model_from_path, disable_dropout_in_model

from ..anatomy import causal_lm
from ..cards import TrustCard
from ..policy.telemetry import TrustTelemetry, apart, telemetry
from ..policy.terms import PolicyBatch, PolicyLoss
from ..tokens import check_token_ids
from .logps import collate_rollouts, completion_logps
from .store import max_id, prepare_rollouts


class FrozenRolloutsTrainer(TrustCard, TrustTelemetry, GKDTrainer):
    """
    [`~trl.experimental.gkd.GKDTrainer`] on rollouts that do not change, with an exchangeable term.

    GKD keeps a teacher on the device and reads whole distributions of both models at each step. Here everything but
    the policy in training is a constant of the data: its log-probabilities of the sampled tokens are columns, read
    once. So of GKDTrainer the arguments, the config and what it inherits from `SFTTrainer` remain; its teacher is let
    go after the reading, and its sampling never happens.

    A method states its config, `policy_loss`, and where it needs them `anchor`, `statistics`, `steps_per_anchor` and
    `check_rollouts`.

    Logged besides: the `trust/` metrics of every method of this package, with the ratio to base, or to the anchor
    where there is one, and `entropy`.

    Args:
        model: `base`, as an id or a model; the policy in training starts from it.
        teacher_model: the policy `teacher`; `args.teacher_model_name_or_path` by default.
        args: a `config_class`, whose `policies` are the names of the frozen policies to read.
        train_dataset, eval_dataset: rollouts, see [`~trl_trust.frozen.store.load_rollouts`]. Log-probabilities that
            are not stored with them are read at construction.
        policies: name to model, for policies that are no column.
        kwargs: as for `GKDTrainer`.

    Attributes:
        config_class: of the method.
        policies_field: the setting that decides which policies are read, for messages.
    """

    config_class: type[GKDConfig] = GKDConfig
    policies_field = "policies"
    loss_is_scaled_for_ga = True  # `compute_loss` divides by what the whole step holds, over all processes

    def __init__(
        self,
        model: str | PreTrainedModel,
        teacher_model: str | PreTrainedModel | None = None,
        args: GKDConfig | None = None,
        *,
        train_dataset: Dataset,
        eval_dataset: Dataset | None = None,
        policies: Mapping[str, str | PreTrainedModel] | None = None,
        **kwargs,
    ):
        if not isinstance(args, self.config_class):
            raise ValueError(
                f"args is a {type(args).__name__}: {type(self).__name__} takes a {self.config_class.__name__}."
            )
        policies = dict(policies or {})
        teacher_model = args.teacher_model_name_or_path if teacher_model is None else teacher_model
        if teacher_model is not None:
            policies["teacher"] = teacher_model
        if args.teacher_model_init_kwargs and not any(isinstance(policy, str) for policy in policies.values()):
            raise ValueError(
                f"teacher_model_init_kwargs={args.teacher_model_init_kwargs!r}: no policy is given as an id or a "
                f"folder, so nothing is loaded with it; leave it out."
            )
        if isinstance(eval_dataset, Mapping):
            raise ValueError(
                f"eval_dataset has {', '.join(map(str, eval_dataset))}: {type(self).__name__} evaluates on one set of "
                f"rollouts; give one."
            )
        train_dataset = self._read(train_dataset, args, policies)
        if eval_dataset is not None:
            eval_dataset = self._read(eval_dataset, args, policies)
        args.remove_unused_columns = False  # the collator reads them all
        args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}

        self._window = []  # micro-batches fetched and anchored, not yet trained on
        self._start_telemetry()
        # Past GKDTrainer's own constructor: it would put a teacher beside the policy for good, and needs one
        super(GKDTrainer, self).__init__(
            model,
            args=args,
            data_collator=kwargs.pop("data_collator", None)
            or partial(collate_rollouts, pad_to_multiple_of=args.pad_to_multiple_of),
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            **kwargs,
        )
        disable_dropout_in_model(self.model)
        add_fused_lm_head(causal_lm(self.model), temperature=args.temperature, outputs=("log_probs", "entropy"))
        self.add_callback(SaveAtAnchors(self))

        # `base` is the policy before its first update: with a new adapter, the model without it
        for name in sorted({*args.policies, *policies}):
            self._add_column(name, policies.get(name, self.model if name == "base" else None))

    def _read(self, dataset: Dataset, args: GKDConfig, policies: Mapping[str, Any]) -> Dataset:
        """Prepare rollouts; `ValueError` if they are not what the method needs."""
        if "temperature" in dataset.column_names:
            others = sorted(set(dataset["temperature"]) - {args.temperature})
            if others:
                raise ValueError(
                    f"temperature={args.temperature!r}, but the rollouts were sampled, and their log-probabilities "
                    f"taken, at {', '.join(map(str, others))}; set it to that."
                )
        dataset = prepare_rollouts(dataset)
        for name in args.policies:
            if name != "base" and name not in policies and f"{name}_logps" not in dataset.column_names:
                field, given = self.policies_field, f"`policies={{{name!r}: ...}}`"
                raise ValueError(
                    f"{field}={getattr(args, field)!r} reads the policy {name!r}, but the rollouts have no column "
                    f"{name}_logps: add it with `score_rollouts`, pass "
                    f"{'`teacher_model`' if name == 'teacher' else given}, or choose another {field}."
                )
        self.check_rollouts(dataset, args)
        return dataset

    def _add_column(self, name: str, policy: str | PreTrainedModel | None) -> None:
        """Read `NAME_logps` of both data sets under `policy`, where they lack it; this process an n-th of the rows."""
        column = f"{name}_logps"
        lacking = [
            split
            for split, data in (("train_dataset", self.train_dataset), ("eval_dataset", self.eval_dataset))
            if data is not None and column not in data.column_names
        ]
        if not lacking:
            return
        if is_deepspeed_zero3_enabled() or self.is_fsdp_enabled:
            raise ValueError(
                f"the rollouts have no column {column}, and under ZeRO-3 or FSDP no process has a whole model to read "
                f"it with: write it before, with `trl-trust rollouts` or `score_rollouts`."
            )
        if isinstance(policy, str):
            policy = create_model_from_path(
                policy, **{"device_map": None, **(self.args.teacher_model_init_kwargs or {})}
            )
        if policy is not self.model:
            columns = ["prompt_ids", "completion_ids"]
            ids = [getattr(self, split).select_columns(columns).with_format("arrow")[:] for split in lacking]
            options = {"revision": (self.args.teacher_model_init_kwargs or {}).get("revision")}
            check_token_ids(name, policy.config, self.processing_class, max(map(max_id, ids)), **options)
        device, rank, n = policy.device, self.accelerator.process_index, self.accelerator.num_processes
        policy.to(self.accelerator.device)
        for split in lacking:
            data = getattr(self, split)
            rows = data.select(range(rank, len(data), n)).select_columns(["prompt_ids", "completion_ids"]).to_list()
            batch_size = self.args.per_device_eval_batch_size
            logps = completion_logps(policy, rows, temperature=self.args.temperature, batch_size=batch_size)
            by_process = gather_object(list(zip(range(rank, len(data), n), logps, strict=True)))
            setattr(self, split, data.add_column(column, [x for _, x in sorted(by_process, key=lambda pair: pair[0])]))
        policy.to(device)

    # -- what a method is ---------------------------------------------------------------------------------------------

    def check_rollouts(self, dataset: Dataset, args: GKDConfig) -> None:
        """Raise `ValueError` for prepared rollouts that the method cannot learn from."""

    @property
    def steps_per_anchor(self) -> int:
        """Optimizer steps whose micro-batches are fetched, and anchored, together."""
        return 1

    def anchor(self, batches: list[dict[str, Tensor]]) -> None:
        """Prepare the micro-batches of a batch iteration, before its first update."""

    def statistics(self, inputs: dict[str, Tensor]) -> Tensor:
        """(K,) numbers in float64 that are summed over micro-batches and processes; their sum is `inputs["step"]`."""
        mask = inputs["labels"][:, 1:] != -100
        return torch.stack([mask.sum(), mask.new_ones(len(mask)).sum()]).double()  # tokens, responses

    def policy_loss(self, batch: PolicyBatch, inputs: dict[str, Tensor]) -> PolicyLoss:
        raise NotImplementedError

    # -- the loss -----------------------------------------------------------------------------------------------------

    def get_batch_samples(self, epoch_iterator, num_batches, device):
        if not self._window:
            self._window = list(islice(epoch_iterator, num_batches * self.steps_per_anchor))
            self.anchor(self._window)
        batches, self._window = self._window[:num_batches], self._window[num_batches:]
        return batches, self._share_statistics(batches)[0] if batches else None

    def _share_statistics(self, batches: list[dict[str, Tensor]]) -> Tensor:
        step = self.accelerator.reduce(torch.stack([self.statistics(inputs) for inputs in batches]).sum(0), "sum")
        for inputs in batches:
            inputs["step"] = step
        return step

    def training_step(self, *args, **kwargs):
        # Past GKDTrainer's own, which draws a random number to decide whether to sample
        return super(GKDTrainer, self).training_step(*args, **kwargs)

    def forward(self, model, inputs: dict[str, Tensor]):
        """The fused head's output: `log_probs` and `entropy`, (B, T), 0 outside the completion, and `aux_loss`."""
        names = ("input_ids", "attention_mask", "labels")
        router = {"output_router_logits": True} if self.aux_loss_enabled else {}
        with self.accelerator.autocast():
            return model(**{name: inputs[name] for name in names}, **router, fused_lm_head=True, use_cache=False)

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError(f"return_outputs=True: {type(self).__name__} returns the loss only; leave it False.")
        if "step" not in inputs:  # evaluation: a batch is a step of its own
            with torch.no_grad():
                self.anchor([inputs])
                self._share_statistics([inputs])
        outputs = self.forward(model, inputs)
        batch = PolicyBatch(
            logps=apart(outputs.log_probs.float()),
            old_logps=inputs.get("old_logps", inputs["logps/base"]),
            mask=(inputs["labels"][:, 1:] != -100).float(),
            advantages=inputs["advantages"],
            ref_logps=inputs["logps/base"],
            rewards=inputs["rewards"],
        )
        with torch.enable_grad():
            policy = self.policy_loss(batch, inputs)
        metrics = {**policy.metrics, **telemetry(batch, policy, batch.old_logps), "entropy": outputs.entropy}
        self._record(metrics, batch.mask)

        tokens, responses = inputs["step"][:2].float().clamp(min=1.0)
        if policy.per_token_loss.shape == batch.mask.shape:
            loss = (policy.per_token_loss * batch.mask).sum() / tokens
        else:
            loss = policy.per_token_loss.sum() / responses
        loss = loss * self.accelerator.num_processes  # over which DDP averages
        if self.aux_loss_enabled:
            accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
            loss = loss + self.router_aux_loss_coef * outputs.aux_loss / accumulation
        return loss

    # -- metrics ------------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        prefix = "" if mode == "train" else "eval_"
        for name, numbers in self._recorded(mode).items():
            numbers = [x for x in numbers if not math.isnan(x)]
            if numbers:
                logs[f"{prefix}{name}"] = sum(numbers) / len(numbers)
        super().log(logs, start_time)


class SaveAtAnchors(TrainerCallback):
    """Puts a checkpoint off to the end of the batch iteration: a run resumed there repeats the uninterrupted one.

    Where the best checkpoint counts, evaluations are put off too: else the best would be one that is never written.
    """

    def __init__(self, trainer: FrozenRolloutsTrainer):
        self.trainer, self.due = trainer, set()

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer._window = []

    def on_step_end(self, args, state, control, **kwargs):
        names = ["should_save"]
        if args.load_best_model_at_end or args.save_strategy == SaveStrategy.BEST:
            names.append("should_evaluate")
        self.due |= {name for name in names if getattr(control, name)}
        at_anchor = not self.trainer._window or control.should_training_stop
        for name in names:
            setattr(control, name, at_anchor and name in self.due)
        if at_anchor:
            self.due.clear()
