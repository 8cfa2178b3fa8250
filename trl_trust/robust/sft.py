"""Robust SFT and reward models: TRL's trainers whose loss is weighted by group, perturbed, or blind to a nuisance.

Nearest TRL trainers: `SFTTrainer` and `RewardTrainer`. Three terms, each of the families that the survey arXiv
2307.16851 finds under many names: `reweight` raises the rows of the worst group, `worst_case` trains on embeddings
moved uphill, `invariance` takes from the features what tells the nuisance. Without terms they are TRL's to the bit.

Provenance: **inspired**; see [`trl_trust.robust.weights`] and [`trl_trust.robust.terms`].

How it hooks in: TRL 1.16's `SFTTrainer.compute_loss` calls `model(..., fused_lm_head=True)` and sums `log_probs`, so a
row's weight multiplies its log-probabilities, and everything behind (the denominator, several processes, metrics) is
the host's. No private name of TRL is touched.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR, get_last_checkpoint
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from ..anatomy import backbone, causal_lm
from ..policy.base import paper
from ..policy.checkpoint import damaged, write_whole
from ..settings import Count, Fraction, NonNegative, Positive, check, setting
from ..steps import GuardedSteps
from .adversary import SURVEY, Groups, GroupSettings, column_of, places
from .terms import Reader, ascend, chance, pool, reversal
from .weights import group_means


TERMS = ("reweight", "worst_case", "invariance")
STATE = "trl_trust_robust.pt"  # in a checkpoint's folder
GROUP, CONDITION = "robust_group", "robust_condition"  # keys of a batch


@dataclass
class RobustTermSettings(GroupSettings):
    """[`GroupSettings`] and the terms of a loss with labels. Stands before the config of the host."""

    terms: list[str] = setting(
        [], "Any of `reweight`, `worst_case`, `invariance`; empty: the host's trainer, to the bit."
    )
    group_eta: NonNegative = setting(0.1, "Step size of the adversary; 0 leaves every group an equal say.")
    radius: Positive = setting(
        0.1, "`worst_case`: L2 length of a row's perturbation, in units of the row's mean embedding norm."
    )
    ascent_steps: Count = setting(2, "`worst_case`: forward and backward passes that look for the perturbation.")
    perturb_words: list[str] | None = setting(
        None, "`worst_case`: words whose tokens alone are moved, such as those that name the nuisance; None: all."
    )
    mix: Fraction = setting(0.5, "`worst_case`: share of the clean loss that is kept.")
    invariance_weight: NonNegative = setting(1.0, "`invariance`: weight of the adversary's loss, reversed.")
    condition_on: str | None = setting(
        None, "`invariance`: column that may go with the nuisance, such as the label; None can erase the label."
    )

    def validate(self) -> None:
        check(self)
        self.check_groups()
        self.require(set(self.terms) <= set(TERMS), "terms", f"must be of {', '.join(TERMS)}")
        grouped = {"reweight", "invariance"} & set(self.terms)
        self.require(
            not grouped or self.group_column is not None,
            "group_column",
            f"must name the column of the groups: terms={list(self.terms)} read it",
        )
        self.require(
            self.perturb_words is None or (self.perturb_words and "worst_case" in self.terms),
            "perturb_words",
            "must name words, and is read by worst_case alone",
        )
        self.require(
            self.condition_on is None or "invariance" in self.terms,
            "condition_on",
            "is read by invariance, which is not in terms",
        )


class WithColumns:
    """A collator that hands on what another one makes, and the group and condition of each row beside it.

    Args:
        collate: the other one; it does not see the columns.
        columns: their names in the data.
        read: by key of the batch, what makes a whole number of each row.
    """

    def __init__(self, collate, columns: list[str], read: dict[str, Callable[[list[dict[str, Any]]], list[int]]]):
        self.collate, self.columns, self.read = collate, columns, read

    def __call__(self, rows: list[dict[str, Any]], *args) -> dict[str, Any]:
        batch = self.collate([{k: v for k, v in row.items() if k not in self.columns} for row in rows], *args)
        return batch | {key: torch.tensor(read(rows)) for key, read in self.read.items()}


class RobustState(TrainerCallback):
    """Writes the adversaries' state into every checkpoint."""

    def __init__(self, trainer):
        self.trainer = trainer

    def on_save(self, args, state, control, **kwargs):
        if args.should_save:
            path = Path(args.output_dir, f"{PREFIX_CHECKPOINT_DIR}-{state.global_step}", STATE)
            write_whole(path, lambda part: torch.save(self.trainer.robust_state(), part))


class RobustLossMixin:
    """Before an `SFTTrainer` or `RewardTrainer` whose config has [`RobustTermSettings`].

    Every micro-batch, over all processes: the forward, one step of the adversary over groups, weights. Evaluation is
    the host's. Logged: `robust/<group>/{loss,q}`, `robust/worst` (the highest mean loss of a group),
    `robust/weight_max`, `robust/delta_norm` (mean L2 length of the perturbations), `robust/adversary_accuracy` and
    `robust/adversary_chance`, what guessing would read right. State goes into checkpoints.

    Raises:
        ValueError: for data without the columns, streamed data, a checkpoint of other groups, a model or layout that a
            term cannot work with, and what [`Groups`] raises.
    """

    groups: Groups | None = None
    reader: Reader | None = None

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._delta: Tensor | None = None  # (B, T, d), added to the embeddings where set
        self._hidden: Tensor | None = None  # the last forward's states, where they are read
        self._logs: dict[str, list[float | Tensor]] = defaultdict(list)  # tensors are read when they are logged
        if not self.args.terms:
            return
        self._refuse()
        columns, read, conditions = [], {}, {}
        if self.args.group_column is not None:
            columns.append(column_of(self.args, "group_column", self.train_dataset))
            self.groups = Groups(self.train_dataset.unique(columns[-1]), self.args)
            read[GROUP] = self.groups.of
        if self.args.condition_on is not None:
            column = column_of(self.args, "condition_on", self.train_dataset)
            columns.append(column)
            conditions = {name: i for i, name in enumerate(sorted(set(map(str, self.train_dataset.unique(column)))))}
            read[CONDITION] = partial(places, column=column, index=conditions)
        if columns:
            self.args.remove_unused_columns = False  # the collator drops what the host does not read
            self.data_collator = WithColumns(self.data_collator, columns, read)
        if "worst_case" in self.args.terms:
            self.model.get_input_embeddings().register_forward_hook(self._perturb)
            self._moving = self._tokens_of(self.args.perturb_words)
        if "invariance" in self.args.terms:
            inner = backbone(self.model) or causal_lm(self.model)
            inner.register_forward_hook(self._read)
            width = causal_lm(self.model).config.get_text_config().hidden_size
            self.reader = Reader(width, len(self.groups.names), len(conditions))
            self.reader.head.to(self.args.device)
        self.add_callback(RobustState(self))

    def _refuse(self) -> None:
        sharded = self.is_deepspeed_enabled or self.is_fsdp_enabled
        for term in ("worst_case", "invariance"):
            if term in self.args.terms and sharded:
                raise ValueError(
                    f"terms={list(self.args.terms)}: {term} reads inside the model and is not tried under DeepSpeed "
                    f"or FSDP; train with DDP or one process, or leave it out."
                )
        if getattr(self, "compute_loss_func", None) is not None:
            raise ValueError(f"terms={list(self.args.terms)} and compute_loss_func: one loss can be used, not both.")

    def _tokens_of(self, words: list[str] | None) -> Tensor | None:
        """Token ids of the words, at the start of a text and after a blank; None for None."""
        if words is None:
            return None
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        ids = lambda text: set(tokenizer(text, add_special_tokens=False)["input_ids"])
        found = {i for word in words for i in ids(word) | ids(f" {word}")} - ids(" ") - {tokenizer.unk_token_id}
        if not found:
            raise ValueError(f"perturb_words={words}: the tokenizer knows none of them.")
        return torch.tensor(sorted(found), device=self.args.device)

    # -- inside the model --------------------------------------------------------------------------------------------

    def _perturb(self, module, args, output):
        return output if self._delta is None else output + self._delta.to(output.dtype)

    def _read(self, module, args, output):
        self._hidden = output[0] if isinstance(output, tuple) else output.last_hidden_state

    @contextmanager
    def _moved(self, delta: Tensor | None) -> Iterator[None]:
        self._delta = delta
        try:
            yield
        finally:
            self._delta = None

    def _worst_case(self, model: nn.Module, inputs: dict[str, Any]) -> Tensor:
        """The perturbation (B, T, d) of the embeddings of live tokens, or of some words, without gradient."""
        plain = self.accelerator.unwrap_model(model)  # DDP would await a backward for each of these forwards
        live = inputs["attention_mask"]
        with torch.no_grad():
            embedded = plain.get_input_embeddings()(inputs["input_ids"])  # (B, T, d)
        moving = live if self._moving is None else live * torch.isin(inputs["input_ids"], self._moving)  # (B, T)
        size = self.args.radius * (embedded.float().norm(dim=-1) * live).sum(1) / live.sum(1).clamp(min=1)  # (B,)
        delta = torch.zeros_like(embedded, dtype=torch.float32)
        for _ in range(self.args.ascent_steps):
            delta.requires_grad_()
            with self._moved(delta):
                loss = self.row_losses(self.forward_rows(plain, inputs)).sum()
            (grad,) = torch.autograd.grad(loss, delta)
            delta = ascend(delta.detach(), grad * moving.unsqueeze(-1), size / self.args.ascent_steps)
        self._logs["robust/delta_norm"].append(delta.flatten(1).norm(dim=1).mean())
        return delta

    def robust_forward(self, model: nn.Module, inputs: dict[str, Any]):
        """What [`forward_rows`] returns, and under `worst_case` that of the perturbed rows too, from one forward."""
        if "worst_case" not in self.args.terms:
            return self.forward_rows(model, inputs), None
        delta = self._worst_case(model, inputs)
        rows = len(inputs["input_ids"])
        twice = {k: torch.cat([v, v]) if isinstance(v, Tensor) and v.ndim and len(v) == rows else v
                 for k, v in inputs.items()}  # fmt: skip
        with self._moved(torch.cat([torch.zeros_like(delta), delta])):
            both = self.forward_rows(model, twice)
        if self._hidden is not None:
            self._hidden = self._hidden[:rows]
        half = lambda value, part: value.chunk(2)[part] if isinstance(value, Tensor) and value.ndim else value
        return tuple(SimpleNamespace(**{k: half(v, part) for k, v in vars(both).items()}) for part in (0, 1))

    # -- over all processes ------------------------------------------------------------------------------------------

    def _weigh(self, losses: Tensor, groups: Tensor) -> Tensor:
        """Weights (B,) of this process's rows, from their losses (B,); steps the adversary."""
        both = self.accelerator.gather(torch.stack([losses.detach().float(), groups.float()], dim=1))  # (N, 2)
        both = both.cpu()  # the one look at the device: the adversary lives on the CPU
        everyone = both[:, 1].long()
        means, _ = group_means(both[:, 0], everyone, len(self.groups.names))
        weights = self.groups.weigh(means, everyone)  # (N,)
        for name, mean, q in zip(self.groups.names, means.tolist(), self.groups.q.tolist(), strict=True):
            if mean == mean:
                self._logs[f"robust/{name}/loss"].append(mean)
            self._logs[f"robust/{name}/q"].append(q)
        self._logs["robust/worst"].append(means.nan_to_num(nan=-torch.inf).max().item())
        self._logs["robust/weight_max"].append(weights.max().item())
        start = self.accelerator.process_index * len(losses)
        return weights[start : start + len(losses)].to(losses)

    def _invariance(self, inputs: dict[str, Any], groups: Tensor, conditions: Tensor) -> Tensor:
        """0-d: minus the reader's cross-entropy, as far as the run has come."""
        features = self.features(self._hidden, inputs)  # (B, d)
        self._hidden = None
        everyone = [self.accelerator.gather(x) for x in (features.detach(), conditions, groups)]
        self._logs["robust/adversary_accuracy"].append(self.reader.fit(*everyone))
        self._logs["robust/adversary_chance"].append(
            chance(everyone[2], everyone[1], len(self.groups.names), max(1, self.reader.num_conditions))
        )
        progress = self.state.global_step / max(self.state.max_steps, 1)
        factor = reversal(progress) * self.args.invariance_weight
        return -factor * self.reader.loss(features, conditions, groups)

    def _taken(self, inputs: dict[str, Any]) -> tuple[Tensor | None, Tensor | None]:
        groups, conditions = inputs.pop(GROUP, None), inputs.pop(CONDITION, None)
        if groups is not None and conditions is None:
            conditions = torch.zeros_like(groups)
        return groups, conditions

    # -- log and state -----------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        if self._logs and not any(name.startswith("eval_") for name in logs):
            logs = logs | {name: float(sum(values) / len(values)) for name, values in self._logs.items()}
            self._logs.clear()
        super().log(logs, start_time)

    def robust_state(self) -> dict[str, Any]:
        state = {"terms": list(self.args.terms)}
        if self.groups is not None:
            state["groups"] = self.groups.state()
        if self.reader is not None:
            state["reader"] = self.reader.state()
        return state

    def train(self, resume_from_checkpoint: str | bool | None = None, *args, **kwargs):
        """As the host's; a resumed run takes up the adversaries too.

        Raises:
            ValueError: if the checkpoint has no such state, or that of other terms or groups.
        """
        folder = (
            get_last_checkpoint(self.args.output_dir) if resume_from_checkpoint is True else resume_from_checkpoint
        )
        if folder and self.args.terms:
            path = Path(folder, STATE)
            if not path.is_file():
                raise ValueError(f"{path} is missing, which robust terms keep with each checkpoint: start anew.")
            state = damaged(path, lambda: torch.load(path, map_location=self.args.device, weights_only=True))
            if state.get("terms") != list(self.args.terms):
                raise ValueError(f"{path} is of terms={state.get('terms')}, and this run has {list(self.args.terms)}.")
            if self.groups is not None:
                damaged(path, lambda: self.groups.load_state(state["groups"]))
            if self.reader is not None:
                damaged(path, lambda: self.reader.load_state(state["reader"]))
        return super().train(resume_from_checkpoint, *args, **kwargs)


@dataclass
class RobustSFTConfig(RobustTermSettings, SFTConfig):
    r"""
    Configuration of [`RobustSFTTrainer`]: every field of [`trl.SFTConfig`], and the terms.

    Raises:
        ValueError: for values outside the above, or options of SFT under which rows cannot be told apart.
    """

    def __post_init__(self):
        self.validate()
        super().__post_init__()

    def validate(self) -> None:
        super().validate()
        if not self.terms:
            return
        for name in ("packing", "padding_free"):
            self.require(not getattr(self, name), name, f"mixes rows, and terms={list(self.terms)} weigh them: False")
        self.require(self.loss_type == "nll", "loss_type", f"must be 'nll' with terms={list(self.terms)}")
        self.require(
            self.label_smoothing_factor == 0, "label_smoothing_factor", "must be 0: it has no loss a row here"
        )


class RobustSFTTrainer(RobustLossMixin, GuardedSteps, SFTTrainer):
    """
    [`trl.SFTTrainer`] with the terms of [`RobustSFTConfig`]. See [`RobustLossMixin`].

    A row's loss is its mean over tokens that have a label where groups are compared, and their *sum*, over the host's
    own denominator, where it is trained on: so a weight of 1 is the host.
    """

    _name = "Robust SFT"
    _tag_names = ["trl", "trl-trust", "robust-sft"]
    _paper = paper(*SURVEY)

    def forward_rows(self, model: nn.Module, inputs: dict[str, Any]) -> SimpleNamespace:
        outputs = model(**{**inputs, "use_cache": False, "fused_lm_head": True})
        names = ("log_probs", "label_mask", "entropy", "is_top1", "aux_loss")
        return SimpleNamespace(**{name: getattr(outputs, name) for name in names})

    def row_losses(self, outputs: SimpleNamespace) -> Tensor:
        return -outputs.log_probs.sum(1) / outputs.label_mask.sum(1).clamp(min=1)  # (B,)

    def features(self, hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        return pool(hidden[:, :-1], inputs["labels"][:, 1:] != -100)  # the states that predict something

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        groups, conditions = self._taken(inputs)
        if not self.args.terms or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)

        def robust(**inputs):
            inputs.pop("fused_lm_head")
            clean, moved = self.robust_forward(model, inputs)
            if moved is not None:
                clean.log_probs = self.args.mix * clean.log_probs + (1 - self.args.mix) * moved.log_probs
            if "reweight" in self.args.terms:
                clean.log_probs = clean.log_probs * self._weigh(self.row_losses(clean), groups).unsqueeze(1)
            return clean

        loss = super().compute_loss(robust, inputs, False, num_items_in_batch)
        if self.reader is not None:
            # the host's loss is already a share of the accumulation, this one is a mean of the micro-batch
            steps = self.current_gradient_accumulation_steps if num_items_in_batch is not None else 1
            loss = loss + self._invariance(inputs, groups, conditions) / steps
        return loss


@dataclass
class RobustRewardConfig(RobustTermSettings, RewardConfig):
    r"""
    Configuration of [`RobustRewardTrainer`]: every field of [`trl.RewardConfig`], and the terms.

    Raises:
        ValueError: for values outside the above.
    """

    def __post_init__(self):
        self.validate()
        super().__post_init__()


class RobustRewardTrainer(RobustLossMixin, GuardedSteps, RewardTrainer):
    """
    [`trl.RewardTrainer`] with the terms of [`RobustRewardConfig`]; a row is a pair. See [`RobustLossMixin`].
    """

    _name = "Robust reward model"
    _tag_names = ["trl", "trl-trust", "robust-reward"]
    _paper = paper(*SURVEY)

    def forward_rows(self, model: nn.Module, inputs: dict[str, Any]) -> SimpleNamespace:
        margin = inputs.get("margin")
        rows = {k: v for k, v in inputs.items() if k != "margin"}
        return SimpleNamespace(logits=model(**rows, use_cache=False).logits, margin=margin)

    def row_losses(self, outputs: SimpleNamespace) -> Tensor:
        chosen, rejected = outputs.logits.squeeze(-1).chunk(2)
        gap = chosen - rejected - (0.0 if outputs.margin is None else outputs.margin)
        return -nn.functional.logsigmoid(gap)  # (pairs,)

    def features(self, hidden: Tensor, inputs: dict[str, Any]) -> Tensor:
        chosen, rejected = pool(hidden, inputs["attention_mask"]).chunk(2)
        return (chosen + rejected) / 2

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        groups, conditions = self._taken(inputs)
        if not self.args.terms or not self.model.training:
            return super().compute_loss(model, inputs, return_outputs, num_items_in_batch)
        clean, moved = self.robust_forward(model, inputs)
        # for the host's metrics; its loss is replaced
        super().compute_loss(lambda **_: SimpleNamespace(logits=clean.logits.detach()), inputs)
        losses = self.row_losses(clean)
        if moved is not None:
            losses = self.args.mix * losses + (1 - self.args.mix) * self.row_losses(moved)
        if "reweight" in self.args.terms:
            losses = losses * self._weigh(losses, groups)
        loss = losses.mean()
        if self.args.center_rewards_coefficient is not None:
            chosen, rejected = clean.logits.squeeze(-1).chunk(2)
            loss = loss + self.args.center_rewards_coefficient * torch.mean((chosen + rejected) ** 2)
        if self.reader is not None:
            loss = loss + self._invariance(inputs, groups, conditions)
        return (loss, SimpleNamespace(logits=clean.logits)) if return_outputs else loss
