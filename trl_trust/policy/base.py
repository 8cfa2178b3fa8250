"""The seam: GRPO with an exchangeable policy term.

`GRPOTrainer` computes its loss in one method in which some thirty lines are the policy term and the rest is plumbing:
fused log-probabilities, tool masks, importance correction, reference KL, entropy bonus, aggregation, metrics. Here the
plumbing is written once, and a method is what remains: a pure function of tensors

    dispo_loss(batch: PolicyBatch, *, epsilon_pos_low, ...) -> PolicyLoss

and a trainer whose `policy_loss` calls it. This is the only module that knows the insides of `GRPOTrainer`. Each
private name it touches was read in TRL 1.16; tests/test_trl_contract.py fails when the installed TRL differs.
"""

import inspect
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, ClassVar

import torch
from accelerate.logging import get_logger
from torch import Tensor
from transformers import PreTrainedModel
from trl import GRPOConfig, GRPOTrainer
from trl.extras.profiling import profiling_decorator
from trl.models import prepare_deepspeed, prepare_fsdp
from trl.models.utils import disable_gradient_checkpointing
from trl.trainer.utils import (  # module-level helpers of TRL 1.16: how it loads, scores and splits
    add_fused_lm_head,
    create_model_from_path,
    get_config_model_id,
    pad,
    split_pixel_values_by_grid,
    split_tensor_dict,
    unsplit_pixel_values_by_grid,
)

from ..anatomy import causal_lm
from ..cards import TrustCard, paper
from .checkpoint import METHOD_STATE_FILE, KeptState
from .config import AGGREGATIONS, TrustGRPOConfig, is_number
from .control import SteeredSteps
from .telemetry import (
    TrustTelemetry,
    apart,
    local_statistics,
    masked_quantiles,
    read_gathered,
    telemetry,
)
from .terms import (
    LOG_RATIO_LIMIT,
    PolicyBatch,
    PolicyLoss,
    beyond,
    clip_ratios,
    clipped_surrogate,
    grpo_loss,
    importance_ratio,
    k3,
    sequence_mean,
)


if TYPE_CHECKING:
    from collections.abc import Callable

    from datasets import Dataset, IterableDataset
    from peft import PeftConfig, PeftModel
    from transformers import BitsAndBytesConfig, PreTrainedTokenizerBase, ProcessorMixin, TrainerCallback
    from trl.trainer.grpo_trainer import EnvironmentFactory, RewardFunc, RolloutFunc


# what a method module needs is found here too, and always was
__all__ = [
    "AGGREGATIONS",
    "LOG_RATIO_LIMIT",
    "METHOD_STATE_FILE",
    "MULTIMODAL_INPUTS",
    "GenerationBatch",
    "PolicyBatch",
    "PolicyLoss",
    "Rollouts",
    "TrustGRPOConfig",
    "TrustGRPOTrainer",
    "apart",
    "beyond",
    "clip_ratios",
    "clipped_surrogate",
    "extras_of",
    "grpo_loss",
    "importance_ratio",
    "is_number",
    "k3",
    "local_statistics",
    "masked_quantiles",
    "paper",
    "read_gathered",
    "sequence_mean",
    "telemetry",
]

logger = get_logger(__name__)

# Inputs that a multimodal model reads besides token ids; the names `GRPOTrainer` gives them.
MULTIMODAL_INPUTS = (
    "pixel_values",
    "image_grid_thw",
    "num_images",
    "pixel_attention_mask",
    "spatial_shapes",
    "num_tiles",
    "image_sizes",
    "token_type_ids",
    "mm_token_type_ids",
    "image_position_ids",
)


# What a method returns from `extend_rollouts` under one of these names takes the place of what TRL 1.16 made.
RESERVED = {"advantages": "advantages", "old_logps": "old_per_token_logps", "mask": "tool_mask"}
_EXTRA = "extras/"  # what stands before the other names among TRL's row tensors, so that it never meets one of those


def extras_of(inputs: Mapping[str, Any]) -> dict[str, Tensor]:
    """Row tensors that [`TrustGRPOTrainer.extend_rollouts`] attached to the rows of a micro-batch, by name."""
    return {key.removeprefix(_EXTRA): x for key, x in inputs.items() if key.startswith(_EXTRA)}


@dataclass(frozen=True)
class GenerationBatch:
    """One generation batch before it is shuffled and split. n rows here, N over all processes.

    Attributes:
        examples: n rows of the data set, one a response.
        prompts: n prompts, text or messages.
        completions: n completions, text or messages.
        completion_ids: n lists of token ids.
        rewards: (N,) weighted sum of the rewards over *all* processes, whole groups in order; NaN where unscored.
        num_generations: responses a prompt; `rewards.view(-1, num_generations)` has one group a row.
        rows: the slice of the N rows that this process holds.
        tensors: what `GRPOTrainer` made of them: padded ids and masks, `advantages` (n,), log-probabilities. To read;
            `extend_rollouts` returns what is to take their place.
    """

    examples: list[dict[str, Any]]
    prompts: list
    completions: list
    completion_ids: list[list[int]]
    rewards: Tensor
    num_generations: int
    rows: slice
    tensors: Mapping[str, Any]


Rollouts = GenerationBatch  # its name until 0.1


class TrustGRPOTrainer(TrustCard, TrustTelemetry, KeptState, SteeredSteps, GRPOTrainer):
    """
    [`trl.GRPOTrainer`] with an exchangeable policy term; on its own, GRPO or GSPO with the `trust/` telemetry.

    It takes the arguments of `GRPOTrainer`. `args` may be a plain [`trl.GRPOConfig`]: it is converted with
    [`TrustGRPOConfig.from_grpo_config`]. A method subclasses it, sets `config_class`, and overrides `policy_loss`; see
    CONTRIBUTING.md.

    With `step_control` the learning rate follows how far updates move the policy; see [`trl_trust.policy.control`].

    Beside the metrics of `GRPOTrainer` it logs, over the live tokens of each micro-batch:

    - `trust/ratio/{min,p01,mean,p99,max}`: the importance ratio of the sampled tokens, to the anchor of the method.
      Every `min` and `max`, of methods too, is over all micro-batches and processes since the last log;
    - `trust/ess`: effective sample size of the ratios, `(sum w)^2 / (n sum w^2)`;
    - `trust/kl`: KL(old || new) by the k3 estimator; `trust/tv`: mean of |new - old| over the sampled tokens'
      probabilities;
    - `trust/zero_grad`: fraction of tokens whose policy gradient is exactly zero; `trust/cut`: the part of it that has
      a non-zero advantage, i.e. what the trust region cut (without any policy gradient it is not logged);
    - `trust/rewards/infinite`: rewards of a generation batch that were infinite, and so count as not given.

    Raises:
        ValueError: for settings the method cannot honour (see [`TrustGRPOConfig`]).
    """

    config_class: ClassVar[type[TrustGRPOConfig]] = TrustGRPOConfig
    # Why a method has no use for advantages that somebody weighted, as what follows "because"; empty where it has
    replaces_advantages: ClassVar[str] = ""

    # The parameters of TRL 1.16's trainer, written out: editors, and tools that filter by signature, look here
    def __init__(
        self,
        model: "str | PreTrainedModel | PeftModel",
        reward_funcs: "RewardFunc | list[RewardFunc] | None" = None,
        args: GRPOConfig | None = None,
        train_dataset: "Dataset | IterableDataset | None" = None,
        eval_dataset: "Dataset | IterableDataset | dict[str, Dataset | IterableDataset] | None" = None,
        processing_class: "PreTrainedTokenizerBase | ProcessorMixin | None" = None,
        reward_processing_classes: "PreTrainedTokenizerBase | list[PreTrainedTokenizerBase] | None" = None,
        callbacks: "list[TrainerCallback] | None" = None,
        optimizers: "tuple[torch.optim.Optimizer | None, torch.optim.lr_scheduler.LambdaLR | None]" = (None, None),
        quantization_config: "BitsAndBytesConfig | None" = None,
        peft_config: "PeftConfig | None" = None,
        tools: "list[Callable] | None" = None,
        rollout_func: "RolloutFunc | None" = None,
        environment_factory: "EnvironmentFactory | dict[str, EnvironmentFactory] | None" = None,
    ):
        if args is None:
            model_id = model if isinstance(model, str) else get_config_model_id(model.config)
            args = self.config_class(f"{model_id.split('/')[-1]}-{self._name}")
        elif not isinstance(args, self.config_class):
            args = self.config_class.from_grpo_config(args)
        self._trust_rollouts = None  # arguments and result of the last `_calculate_rewards`
        self._warned_of_rewards = False
        self._rewards_differed = self._said_anything = False  # in any group, in any completion, so far
        beta = args.beta
        if args.needs_reference and beta == 0.0:
            # TRL 1.16 loads, spreads and scores a reference (a copy, or the model without its adapter) unless `beta`
            # is 0. With the least positive number in its place the KL is logged; `compute_loss` does not add it.
            args.beta = math.ulp(0.0)
        try:
            super().__init__(
                model=model,
                reward_funcs=reward_funcs,
                args=args,
                train_dataset=train_dataset,
                eval_dataset=eval_dataset,
                processing_class=processing_class,
                reward_processing_classes=reward_processing_classes,
                callbacks=callbacks,
                optimizers=optimizers,
                quantization_config=quantization_config,
                peft_config=peft_config,
                tools=tools,
                rollout_func=rollout_func,
                environment_factory=environment_factory,
            )
        finally:
            args.beta = beta  # the caller's, who may try again with the same `args`
        self._check_dataset()
        factories = environment_factory if isinstance(environment_factory, dict) else {None: environment_factory}
        for factory in factories.values():
            if hasattr(factory, "check_args"):  # an environment of ours, which knows how long its episodes are
                factory.check_args(args, self.processing_class)
        for warning in self._warnings():
            logger.warning(warning)
        self._start_control()

    def __init_subclass__(cls, **kwargs):
        super().__init_subclass__(**kwargs)
        if "__init__" in vars(cls):  # it adds keywords and passes the rest on: its signature is both
            inherited = inspect.signature(super(cls, cls).__init__).parameters.values()
            own = inspect.signature(cls.__init__).parameters.values()
            added = [p for p in own if p.kind is p.KEYWORD_ONLY]
            if any(p.kind is p.VAR_KEYWORD for p in own):
                cls.__init__.__signature__ = inspect.Signature([*inherited, *added])

    def _check_dataset(self) -> None:
        prompts = self.args.generation_batch_size // self.num_generations
        rows = len(self.train_dataset) if hasattr(self.train_dataset, "__len__") else prompts
        if rows < prompts:  # TRL 1.16 trains no step and overwrites output_dir with the model that it was given
            raise ValueError(
                f"train_dataset has {rows} rows, and a generation batch takes {prompts} prompts "
                f"(generation_batch_size={self.args.generation_batch_size} / num_generations={self.num_generations}): "
                f"lower per_device_train_batch_size or steps_per_generation, or give more rows."
            )

    def why_no_gradient(self) -> str:
        if not self._said_anything:
            return (
                f"every completion was masked; with mask_truncated_completions=True they have to end within "
                f"max_completion_length={self.args.max_completion_length}"
            )
        if not self._rewards_differed:
            return (
                "in no group did the rewards differ; take prompts that are neither too hard nor too easy, a reward "
                "with more grades, or a larger num_generations"
            )
        return "the trust region cut every token, or every parameter is frozen"

    def _updates_are_on_policy(self) -> bool:
        return self.args.gradient_accumulation_steps % (self.args.steps_per_generation * self.num_iterations) == 0

    def _start_control(self) -> None:
        args = self.args
        if args.step_control in ("kl", "ess", "stop") and self._updates_are_on_policy():
            raise ValueError(
                f"step_control={args.step_control!r} measures nothing with gradient_accumulation_steps="
                f"{args.gradient_accumulation_steps}, steps_per_generation={args.steps_per_generation} and "
                f"num_iterations={args.num_iterations}: every update uses fresh rollouts. Set steps_per_generation to "
                f"2 or more times gradient_accumulation_steps, or num_iterations above 1, or use 'backtrack'."
            )
        if args.step_control in ("stop", "backtrack") and self.is_deepspeed_enabled:
            raise ValueError(
                f"step_control={args.step_control!r} leaves a step out or takes it back, but DeepSpeed's engine steps "
                f"inside the last backward; use 'kl' or 'ess', or another launcher than DeepSpeed."
            )
        if args.step_control == "backtrack" and self.accelerator.scaler is not None:
            raise ValueError("step_control='backtrack' takes steps back, which fp16's scaler may skip; use bf16=True.")
        self.start_control(args.steps_per_generation * self.num_iterations // args.gradient_accumulation_steps)

    def _warnings(self) -> Iterator[str]:
        """What is legal and makes the trust region do nothing, or act on noise."""
        args = self.args
        if args.needs_stale_rollouts and self._updates_are_on_policy():
            yield (
                f"With gradient_accumulation_steps={args.gradient_accumulation_steps}, "
                f"steps_per_generation={args.steps_per_generation} and num_iterations={args.num_iterations}, every "
                f"update uses fresh rollouts: the importance ratio is identically 1 and the trust region of "
                f"{self._name} does nothing. Set steps_per_generation to a multiple of gradient_accumulation_steps "
                f"(2 or more times it), or num_iterations above 1."
            )
        if (found := active_dropout(self.model)) is not None:
            name, rate = found
            yield (
                f"{name}={rate}: the policy is trained with dropout and scored without, so the importance ratio of "
                f"fresh rollouts is not 1 but noise, and the trust region acts on it. Set {name} to 0, or "
                f"disable_dropout=True."
            )
        # TRL 1.16 asks vLLM for the log-probabilities of what it samples from
        sampling = {name: getattr(args, name) for name in ("top_p", "top_k", "min_p")} | (args.generation_kwargs or {})
        cuts = {
            "top_p": (sampling["top_p"] or 1) < 1,
            "top_k": (sampling["top_k"] or 0) > 0,
            "min_p": (sampling["min_p"] or 0) > 0,
        }
        if args.use_vllm and args.anchors_on_sampler and any(cuts.values()):
            given = ", ".join(f"{name}={sampling[name]}" for name, cut in cuts.items() if cut)
            yield (
                f"{given}: the sampler renormalises its log-probabilities over the tokens that it keeps, so the ratio "
                f"of {self._name}, which is to the sampler, is biased below 1. Leave top_p at 1, top_k at 0 and min_p "
                f"unset."
            )

    # -- what a method overrides -------------------------------------------------------------------------------------

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        """The policy term. Called once a micro-batch, in training and evaluation, on every process."""
        return grpo_loss(batch, **self.settings(grpo_loss))

    def extend_rollouts(self, rollouts: GenerationBatch) -> dict[str, Tensor]:
        """Row tensors, (n, ...), to attach to a generation batch; they reach `PolicyBatch.extras` through the shuffle.

        Called once a generation batch, on every process: the place for teacher log-probabilities and group statistics.
        Three names are reserved, and replace what is there: `advantages`, (n,) or (n, T); `old_logps`, (n, T); `mask`,
        (n, T), 1 where a token of the completion counts, after which the tokens of all processes are counted anew.
        Every process has to return the same names.

        Raises:
            ValueError: from the caller, for a tensor of another number of rows, or of a reserved name and another
                shape.
        """
        return {}

    def begin_step(self, micro_batches: list[dict[str, Any]]) -> None:
        """Called in training before an optimizer step, with its micro-batches as far as they are generated.

        They are all there when `steps_per_generation` is a multiple of `gradient_accumulation_steps`. Only then is
        this reliable: otherwise the last, shorter accumulation of an epoch shifts the count.
        """

    @property
    def rollout_batch(self) -> list[dict[str, Any]]:
        """The micro-batches of the last generation, as this process trains on them."""
        return self._buffered_inputs  # TRL 1.16

    @property
    def rollout_step(self) -> int:
        """How many micro-batches the last generation has served; 0 before the first and again after the last."""
        # TRL 1.16: `_step` counts micro-batches from the start of the process
        return self._step % (self.args.steps_per_generation * self.num_iterations)

    # -- rollouts: carry rewards, groups and extras along ------------------------------------------------------------

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        # TRL 1.16: called once by `_generate_and_score_completions`; returns (N, functions), gathered over processes
        rewards_per_func = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        # An infinite reward counts as none: TRL would make its advantage NaN, or the largest number there is. NaN is
        # what TRL makes of `None` itself.
        infinite = rewards_per_func.isinf()
        count = int(infinite.sum())
        self.log_value("trust/rewards/infinite", count)
        if count and not self._warned_of_rewards:
            self._warned_of_rewards = True
            names = [name for name, bad in zip(self.reward_func_names, infinite.any(0).tolist(), strict=True) if bad]
            logger.warning(
                f"{count} rewards of {', '.join(names)} are infinite and count as not given, as `None` does; "
                f"trust/rewards/infinite goes on counting them. Let the function return finite numbers or `None`."
            )
        rewards_per_func = rewards_per_func.masked_fill(infinite, torch.nan)
        self._trust_rollouts = (inputs, prompts, completions, completion_ids_list, rewards_per_func)
        return rewards_per_func

    def _generate_and_score_completions(self, inputs):
        # TRL 1.16: returns the dict of row tensors that `_prepare_inputs` shuffles and splits; keys added here survive
        output = super()._generate_and_score_completions(inputs)
        if self.step_control is not None and self.model.training:
            self.step_control.generated()
        examples, prompts, completions, completion_ids, rewards_per_func = self._trust_rollouts
        self._trust_rollouts = None
        rewards = (rewards_per_func * self.reward_weights.to(rewards_per_func.device)).nansum(dim=1)  # (N,)
        rewards = rewards.masked_fill(rewards_per_func.isnan().all(dim=1), torch.nan)
        num_generations = self.num_generations if self.model.training else self.num_generations_eval
        n, start = len(prompts), self.accelerator.process_index * len(prompts)
        rows = slice(start, start + n)

        if self.model.training and not (self._rewards_differed and self._said_anything):
            groups = rewards.view(-1, num_generations).nan_to_num()
            said = self.accelerator.reduce(output["completion_mask"].sum().float())
            differed = (groups != groups[:, :1]).any().float()
            self._rewards_differed, self._said_anything = (torch.stack([differed, said]) > 0).tolist()

        output["rewards"] = rewards[rows]  # (n,)
        output["group"] = torch.arange(start, start + n, device=rewards.device) // num_generations  # (n,)
        extras = self.extend_rollouts(
            GenerationBatch(
                examples,
                prompts,
                completions,
                completion_ids,
                rewards,
                num_generations,
                rows,
                MappingProxyType(output),
            )
        )
        tokens = output["completion_mask"]  # (n, T)
        for name, tensor in extras.items():
            if len(tensor) != n:
                raise ValueError(f"extend_rollouts: {name!r} has {len(tensor)} rows, but the batch has {n}.")
            if name in RESERVED and tensor.shape != tokens.shape and (name != "advantages" or tensor.ndim != 1):
                raise ValueError(
                    f"extend_rollouts: {name!r} has shape {tuple(tensor.shape)}; expected {tuple(tokens.shape)}"
                    f"{f' or ({n},)' if name == 'advantages' else ''}."
                )
            output[RESERVED.get(name, f"{_EXTRA}{name}")] = tensor
        if "mask" in extras:
            output["num_items_in_batch"] = self.accelerator.gather((tokens * extras["mask"]).sum()).sum()
        return output

    def _prepare_inputs(self, generation_batch):
        # TRL 1.16 shuffles single rows here. Where a method compares responses to one prompt, whole groups are
        # shuffled instead; the rest of the schedule (`_step`, `_buffered_inputs`) is TRL's own.
        if not self.model.training:
            return super()._prepare_inputs(generation_batch)
        inputs = self._next_micro_batch(generation_batch)
        first, accumulation = self._step % self.args.steps_per_generation, self.args.gradient_accumulation_steps
        if self._step % accumulation == 0:
            self.begin_step(self._buffered_inputs[first : first + accumulation])
        return inputs

    def _next_micro_batch(self, generation_batch) -> dict[str, Any]:
        if not self.args.needs_whole_groups:
            return super()._prepare_inputs(generation_batch)
        steps = self.args.steps_per_generation
        if self._buffered_inputs is None or self._step % (steps * self.num_iterations) == 0:
            rollouts = split_pixel_values_by_grid(self._generate_and_score_completions(generation_batch))
            parts = split_tensor_dict(_shuffle_groups(rollouts, self.num_generations), steps)
            self._buffered_inputs = [unsplit_pixel_values_by_grid(part) for part in parts]
        return self._buffered_inputs[self._step % steps]

    # -- the loss ----------------------------------------------------------------------------------------------------

    @profiling_decorator
    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        if return_outputs:
            raise ValueError(f"return_outputs=True: {type(self).__name__} returns the loss only; leave it False.")
        logps, entropies, aux_loss, *left = self.score_completions(model, inputs)
        batch = self._policy_batch(inputs, apart(logps), entropies, *left)
        if self.model.training:
            self.measure_step(batch, inputs)
        anchor_logps = batch.sampler_logps if self.args.anchors_on_sampler else batch.old_logps
        with torch.enable_grad():
            policy = self.policy_loss(batch)

        metrics = dict(policy.metrics)
        metrics.update(telemetry(batch, policy, anchor_logps))
        metrics["entropy"] = entropies

        entropy_mask = self._entropy_mask(entropies, batch.mask)
        per_token_loss = self._reweight(policy.per_token_loss, batch, entropy_mask, inputs)
        if self.beta != 0.0:
            kl = self._reference_kl(batch, anchor_logps)
            metrics["kl"] = kl
            if self.args.beta != 0.0:  # else it is only looked at: times 0 it could still be NaN
                per_token_loss = per_token_loss + self.beta * kl

        accumulation = self.current_gradient_accumulation_steps if self.model.training else 1
        loss, policy_loss = self._aggregate(per_token_loss, batch.mask, inputs["num_items_in_batch"], accumulation)
        if policy.batch_loss is not None:
            loss = loss + policy.batch_loss / accumulation
            policy_loss = policy_loss + policy.batch_loss.detach()
        if self._entropy_bonus_enabled:
            bonus_mask = batch.mask if entropy_mask is None else batch.mask * entropy_mask
            loss = loss - self._entropy_bonus(entropies, bonus_mask) / accumulation
            metrics["policy_loss"] = policy_loss
        if self.aux_loss_enabled:
            loss = loss + self.router_aux_loss_coef * aux_loss / accumulation
            metrics["aux_loss"] = aux_loss
        self._record(metrics, batch.mask)
        return loss

    def score_completions(self, model, inputs, batch_size: int | None = None) -> tuple:
        """Log-probabilities (B, T) and entropies (B, T) of the completion tokens, and the MoE auxiliary loss (0-d).

        One forward, or one for every `batch_size` rows. A method that reads more in its forward returns a fourth
        thing, a mapping of row tensors with their gradient, which reach `PolicyBatch.extras`; see [`extras_of`] for
        those that `inputs` brings.
        """
        return self._score(model, inputs, batch_size, compute_entropy=True, compute_aux_loss=self.aux_loss_enabled)

    def _score(self, model, inputs, batch_size: int | None, **compute):
        # TRL 1.16: goes through the fused head, so logits are never held
        return self._get_per_token_logps_and_entropies(
            model,
            torch.cat([inputs["prompt_ids"], inputs["completion_ids"]], dim=1),
            torch.cat([inputs["prompt_mask"], inputs["completion_mask"]], dim=1),
            inputs["completion_ids"].size(1),
            batch_size,
            **compute,
            **{name: inputs.get(name) for name in MULTIMODAL_INPUTS},
        )

    def rollout_logps(self, tensors: dict[str, Any], model: PreTrainedModel | None = None) -> Tensor:
        """(n, T) log-probabilities of a generation batch under `model`, or the policy as it is, without gradient.

        For [`extend_rollouts`]: one micro-batch at a time, as TRL computes `old_per_token_logps`. `model` comes from
        [`add_frozen_model`].
        """
        args = self.args
        size = args.per_device_train_batch_size if self.model.training else args.per_device_eval_batch_size
        with torch.no_grad(), disable_gradient_checkpointing(self.model, args.gradient_checkpointing_kwargs):
            return self._score(self.model if model is None else model, tensors, size)[0]

    def add_frozen_model(
        self,
        model: str | PreTrainedModel,
        init_kwargs: dict[str, Any] | None = None,
        temperature: float | None = None,
    ) -> PreTrainedModel:
        """Make `model`, loaded where it is an id, one that [`rollout_logps`] can score completions with.

        It is frozen, in evaluation mode, and spread over processes as TRL 1.16 spreads its reference model.

        Args:
            init_kwargs: for loading; `dtype` defaults to float32, as TRL's do.
            temperature: divides the logits; `None` for the sampling temperature.
        """
        if isinstance(model, str):
            init_kwargs = {"trust_remote_code": self.args.trust_remote_code, **(init_kwargs or {})}
            if self.args.distributed_state.distributed_type in ("MULTI_GPU", "DEEPSPEED"):
                init_kwargs["device_map"] = None  # "auto" would spread it over devices that belong to others
            model = create_model_from_path(model, **init_kwargs)
        model.requires_grad_(False).eval()
        add_fused_lm_head(
            causal_lm(model),
            temperature=self.temperature if temperature is None else temperature,
            cast_lm_head_to_fp32=self.args.cast_lm_head_to_fp32,
        )
        if self.is_deepspeed_enabled:
            return prepare_deepspeed(model, self.accelerator)
        if self.is_fsdp_enabled:
            return prepare_fsdp(model, self.accelerator)
        return self.accelerator.prepare_model(model, evaluation_mode=True)

    def prompt_tensors(self, prompts: list) -> tuple[Tensor, Tensor]:
        """Ids and mask (n, P), padded on the left, of prompts (text or messages), tokenized as TRL does the data's."""
        tokenizer = getattr(self.processing_class, "tokenizer", self.processing_class)
        ids = [torch.tensor(row) for row in self._tokenize_prompts(prompts)[0]]  # TRL 1.16: ids, images, their fields
        pad_rows = partial(pad, padding_side="left", pad_to_multiple_of=self.pad_to_multiple_of)
        padded = pad_rows(ids, padding_value=tokenizer.pad_token_id), pad_rows([torch.ones_like(row) for row in ids])
        return tuple(x.to(self.accelerator.device) for x in padded)

    @contextmanager
    def update_of_its_own(self, model) -> Iterator[None]:
        """Within it, any backward of `model`, as the trainer wrapped it, is reduced, and the optimizer steps.

        For an update between two micro-batches of an optimizer step, where accelerate 1.15 and DDP hold both back. Not
        for DeepSpeed and FSDP1, which keep that to themselves.
        """
        state, synced = self.accelerator.gradient_state, self.accelerator.sync_gradients
        is_ddp, is_fsdp2 = hasattr(model, "require_backward_grad_sync"), hasattr(model, "set_requires_gradient_sync")
        reduced = model.require_backward_grad_sync if is_ddp else None
        state._set_sync_gradients(True)
        if is_ddp:
            model.require_backward_grad_sync = True
        if is_fsdp2:
            model.set_requires_gradient_sync(True)
        try:
            yield
        finally:
            state._set_sync_gradients(synced)
            if is_ddp:
                model.require_backward_grad_sync = reduced
            if is_fsdp2:
                model.set_requires_gradient_sync(synced)

    def log_value(self, name: str, value: float) -> None:
        """Log a number that the host knows, such as seconds; for tensors there are [`PolicyLoss.metrics`]."""
        # TRL 1.16: `_metrics` maps a name to the values since the last log, of which the main process logs the mean
        self._metrics["train" if self.model.training else "eval"][name].append(value)

    def _policy_batch(self, inputs, logps: Tensor, entropies: Tensor, left: Mapping = MappingProxyType({})):
        mask, advantages = inputs["completion_mask"], inputs["advantages"]
        if "tool_mask" in inputs:
            mask = mask * inputs["tool_mask"]
        old_logps = inputs.get("old_per_token_logps")  # TRL leaves it out when updates and generations are aligned
        return PolicyBatch(
            logps=logps,
            old_logps=logps.detach() if old_logps is None else old_logps,
            mask=mask.float(),
            advantages=advantages.unsqueeze(1) if advantages.dim() == 1 else advantages,
            entropies=entropies,
            ref_logps=inputs.get("ref_per_token_logps"),
            sampling_logps=inputs.get("sampling_per_token_logps"),
            rewards=inputs.get("rewards"),
            group=inputs.get("group"),
            extras={**extras_of(inputs), **left},
        )

    def _entropy_mask(self, entropies: Tensor, mask: Tensor) -> Tensor | None:
        if self.top_entropy_quantile >= 1.0:
            return None
        return self.get_high_entropy_mask(entropies, mask, 1 - self.top_entropy_quantile)  # (B, T), bool

    def _reweight(self, per_token_loss: Tensor, batch: PolicyBatch, entropy_mask: Tensor | None, inputs) -> Tensor:
        """Apply what drops or reweights tokens whatever the policy term is."""
        if self.off_policy_mask_threshold is not None:
            sampling = batch.old_logps if batch.sampling_logps is None else batch.sampling_logps
            per_token_loss = per_token_loss * self.get_off_policy_mask(
                batch.advantages, batch.logps, sampling, batch.mask, self.off_policy_mask_threshold
            )
        if entropy_mask is not None:
            per_token_loss = per_token_loss * entropy_mask
        if self.use_vllm and self.vllm_importance_sampling_correction and not self.args.anchors_on_sampler:
            per_token_loss = per_token_loss * inputs["importance_sampling_ratio"]  # (B, T) or (B, 1)
        return per_token_loss

    def _reference_kl(self, batch: PolicyBatch, anchor_logps: Tensor) -> Tensor:
        """(B, T) KL(policy || reference) by the k3 estimator, importance-weighted with `use_bias_correction_kl`."""
        log_ratio = batch.ref_logps - batch.logps
        kl = torch.exp(log_ratio) - log_ratio - 1  # (B, T)
        if self.args.use_bias_correction_kl:
            log_weight = batch.logps - anchor_logps
            if self.args.importance_sampling_level == "sequence":
                log_weight = sequence_mean(log_weight, batch.mask)
            kl = kl * torch.exp(log_weight)
        return kl

    def _aggregate(self, per_token_loss: Tensor, mask: Tensor, num_items: Tensor, accumulation: int):
        """Reduce (B, T) or (B, 1) to the loss of this micro-batch, and its detached value before accumulation."""
        masked = per_token_loss * mask
        loss_type = self.args.loss_type
        if loss_type == "dapo":
            # `num_items` counts the live tokens of the whole generation batch over all processes: scale it to one
            # accumulation window of this process. It holds the division by `accumulation` already.
            normalizer = num_items.clamp(min=1.0) / self.accelerator.num_processes
            if self.model.training:
                normalizer = normalizer * accumulation / self.args.steps_per_generation
            loss = masked.sum() / normalizer
            return loss, loss.detach()
        if loss_type == "grpo":
            loss = (masked.sum(-1) / mask.sum(-1).clamp(min=1.0)).mean()
        elif loss_type == "bnpo":
            loss = masked.sum() / mask.sum().clamp(min=1.0)
        else:  # dr_grpo
            loss = masked.sum() / (masked.size(0) * self.max_completion_length)
        return loss / accumulation, loss.detach()

    def _entropy_bonus(self, entropies: Tensor, mask: Tensor) -> Tensor:
        """Coefficient times the mean entropy over `mask`; moves the coefficient at the end of an adaptive step."""
        total, count = (entropies * mask).sum(), mask.sum()
        coef = self.entropy_coef
        if self.use_adaptive_entropy and self._last_world_entropy > self.args.entropy_target:
            coef = 0.0  # the gate of the previous step, so that every micro-batch of a step applies the same one
        if self.model.training:
            if self.use_adaptive_entropy:
                self._adapt_entropy_coef(torch.stack([total, count]).detach())
            if self.accelerator.sync_gradients:
                self._metrics["train"]["entropy_coef"].append(self.entropy_coef)
        return coef * (total / count.clamp(min=1.0))

    def _adapt_entropy_coef(self, stats: Tensor) -> None:
        # TRL 1.16 saves and restores `entropy_coef` and `_last_world_entropy` with the checkpoint: its names are kept
        window = stats if self._entropy_window_stats is None else self._entropy_window_stats + stats
        self._entropy_window_stats = window
        if not self.accelerator.sync_gradients:
            return
        total, count = self.accelerator.reduce(window, reduction="sum")
        entropy = (total / count.clamp(min=1.0)).item()
        if entropy <= self.args.entropy_target:
            self.entropy_coef = min(self.entropy_coef + self.args.entropy_coef_delta, self.args.entropy_coef_max)
        else:
            self.entropy_coef = max(self.entropy_coef - self.args.entropy_coef_delta, self.args.entropy_coef_min)
        self._last_world_entropy = entropy
        self._entropy_window_stats = None

    # -- metrics: one gather a step, one host synchronisation a log --------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        mode = "train" if self.model.training else "eval"
        # TRL 1.16: `_metrics` maps a name to the values since the last log, which it averages, NaN left out
        for name, values in self._recorded(mode).items():
            self._metrics[mode][name] += values
        super().log(logs, start_time)


def active_dropout(model: torch.nn.Module) -> tuple[str, float] | None:
    """Name and rate of the first dropout module that drops something, a LoRA adapter's under `lora_dropout`."""
    for path, module in model.named_modules():
        if isinstance(module, torch.nn.Dropout) and module.p > 0:
            # PEFT keeps an adapter's at `...lora_dropout.ADAPTER`
            return "lora_dropout" if "lora_dropout" in path else path.rpartition(".")[2], module.p
    return None


def _shuffle_groups(rollouts: dict[str, Any], group_size: int) -> dict[str, Any]:
    """Permute the groups of a generation batch, in unison over all row-like values."""
    n = len(rollouts["prompt_ids"])
    order = (torch.randperm(n // group_size)[:, None] * group_size + torch.arange(group_size)).flatten()

    def permute(value):
        if value is None or (isinstance(value, Tensor) and value.ndim == 0):
            return value
        return value[order] if isinstance(value, Tensor) else [value[i] for i in order.tolist()]

    return {name: permute(value) for name, value in rollouts.items()}
