"""SAGE-GRPO: GRPO for flow-matching image and video models (arXiv 2603.21872).

Nearest relative: Flow-GRPO, which turns the flow's ODE into an SDE and trains each denoising step with GRPO's clipped
term. SAGE-GRPO changes the variance of the steps (less noise away from the data), equalizes the gradients of the
steps, and adds two quadratic KL terms: to a moving anchor, and to the policy that sampled. The steps of Flow-GRPO,
DanceGRPO and CPS are there too (`sde_type`). Formulas are in [`~trl_trust.flow.steps`]; this module is loss, config
and trainer.

Provenance: **exact** for steps, equalizer and loss (paper and authors' code). Reconstructions: the closed form of the
KL to the old policy (`vel_kl="gaussian"`; `"k1"` is the sampled one of the code), and when the anchor is copied.
"""

import math
import os
from collections import defaultdict
from collections.abc import Callable, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import version
from pathlib import Path
from typing import Annotated, Any, Literal

import torch
from accelerate.logging import get_logger
from accelerate.utils import gather_object
from torch import Tensor, nn
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.trainer_utils import PREFIX_CHECKPOINT_DIR

from ..cards import extended, paper
from ..policy.terms import PolicyLoss, beyond, clipped_surrogate, importance_ratio
from ..settings import Count, NonNegative, Positive, Range, Settings, check, setting
from ..steps import GuardedSteps
from .rollouts import StepTable, group_advantages, ode_table, roll_out, row_noise, step_table, stream
from .steps import gaussian_kl, log_prob


logger = get_logger(__name__)

STATE_FILE = "sage_state.pt"  # in a checkpoint's folder: anchor and schedule


# --------------------------------------------------------------------------------------------------------------------
# The loss
# --------------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class StepBatch:
    """B steps of the chain, each of another sample. Only `logps`, `kl_pos` and `kl_vel` carry gradient.

    Attributes:
        logps: (B, 1) log-probability of the step under the policy being trained, a mean over the sample's dimensions.
        old_logps: (B, 1) the same under the policy that sampled.
        advantages: (B, 1).
        step_scale: (B, 1) the equalizer's factor.
        kl_pos: (B, 1) KL to the anchor's step, or `None` without anchor.
        kl_vel: (B, 1) KL to the step of the policy that sampled, or `None`.
    """

    logps: Tensor
    old_logps: Tensor
    advantages: Tensor
    step_scale: Tensor
    kl_pos: Tensor | None = None
    kl_vel: Tensor | None = None


def sage_loss(
    batch: StepBatch,
    kl_weight: float = 0.0,
    *,
    epsilon: float = 1e-4,
    kl_pos_weight: float = 1.0,
    kl_vel_weight: float = 0.1,
) -> PolicyLoss:
    """`S max(-A r, -A clip(r, 1 - epsilon, 1 + epsilon)) + lambda (w_pos D_pos + w_vel D_vel)`, eq. (8).

    The equalizer's factor S multiplies the policy term after clipping, and not the KL.

    Args:
        kl_weight: lambda, see [`KLWeight`].

    Returns:
        loss (B, 1); metrics `sage/clip_ratio` (steps whose gradient the clip removed), `sage/kl_pos`, `sage/kl_vel`,
        and `trust/ratio/{min,mean,max}`.
    """
    ratio = importance_ratio(batch.logps, batch.old_logps)  # (B, 1)
    loss = batch.step_scale * clipped_surrogate(ratio, batch.advantages, epsilon, epsilon)
    metrics = {
        "sage/clip_ratio": beyond(ratio, batch.advantages, epsilon, epsilon).float(),
        "trust/ratio/min": ratio,
        "trust/ratio/mean": ratio,
        "trust/ratio/max": ratio,
    }
    for name, kl, weight in (("pos", batch.kl_pos, kl_pos_weight), ("vel", batch.kl_vel, kl_vel_weight)):
        if kl is not None:
            loss = loss + kl_weight * weight * kl
            metrics[f"sage/kl_{name}"] = kl
    return PolicyLoss(loss, metrics)


class KLWeight:
    """lambda over the updates.

    `"linear"` rises from `beta_init` to `beta` in `beta_warmup` updates. `"controller"` rises so too, then follows the
    mean of the last ten KLs: above 1.5 `beta` the weight shrinks by .9, below .5 `beta` it grows by 1.1, between
    `beta_init` and `beta`. It is the authors' rule, and lowers the weight where the KL is high. `"constant"` is
    `beta`.
    """

    WINDOW = 10

    def __init__(self, schedule: str, beta: float, beta_init: float, beta_warmup: int):
        self.schedule, self.beta, self.beta_init, self.beta_warmup = schedule, beta, beta_init, beta_warmup
        self.calls, self.kls = 0, []
        self.value = beta if schedule == "constant" else beta_init

    def update(self, kl: float = 0.0) -> float:
        """Count one update, whose mean KL was `kl` (only the controller reads it), and return the new weight."""
        self.calls += 1
        if self.schedule == "constant":
            return self.value
        if self.schedule == "controller":
            self.kls = [*self.kls, kl][-self.WINDOW :]
        if self.schedule == "linear" or self.calls <= self.beta_warmup:
            part = min(self.calls / self.beta_warmup, 1.0)
            self.value = self.beta_init + (self.beta - self.beta_init) * part
        else:
            mean = sum(self.kls) / len(self.kls)
            factor = 0.9 if mean > 1.5 * self.beta else 1.1 if mean < 0.5 * self.beta else 1.0
            self.value = min(max(self.value * factor, self.beta_init), self.beta)
        return self.value

    def state_dict(self) -> dict[str, Any]:
        return {"calls": self.calls, "kls": self.kls, "value": self.value}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        self.calls, self.kls, self.value = state["calls"], list(state["kls"]), state["value"]


# --------------------------------------------------------------------------------------------------------------------
# Config
# --------------------------------------------------------------------------------------------------------------------

AtLeastTwo = Annotated[int, Range(2, whole=True)]


@dataclass
class SAGEGRPOConfig(Settings, TrainingArguments):
    r"""
    Configuration of [`SAGEGRPOTrainer`]: every field of [`transformers.TrainingArguments`], and these.

    A *phase* samples `per_device_train_batch_size` x processes x `steps_per_generation` images or videos, then trains
    on each of their random denoising steps `num_iterations` times. A micro-batch is one step of each of
    `per_device_train_batch_size` samples; `gradient_accumulation_steps` micro-batches make an update.

    Raises:
        ValueError: for a value outside its range, or values that do not fit each other.
    """

    unread_fields = {
        "label_smoothing_factor": "there are no labels",
        "deepspeed": "it trains on one device or with DDP, since the anchor takes the place of whole parameters",
        "fsdp": "it trains on one device or with DDP, since the anchor takes the place of whole parameters",
    }

    learning_rate: NonNegative = setting(1e-5, "Learning rate; the authors' for LoRA.")
    weight_decay: NonNegative = setting(0.01, "Weight decay; the authors'.")

    sde_type: Literal["sage", "flow", "dance", "cps"] = setting("sage", "Rule that gives a denoising step its noise.")
    eta: Annotated[float, Range(0, 2, above=True)] = setting(0.5, "Strength of the noise; at most 1 for `cps`.")
    sigma_clamp: Annotated[float, Range(0, 0.5, above=True, below=True)] = setting(
        3e-3, "`sage` takes no noise level above 1 minus this into its logarithm."
    )
    first_step: Literal["clamp", "ode", "flow_cap"] = setting(
        "clamp", "Noise of the first step: the rule's own substitute, none, or at most that of `flow`."
    )
    deterministic_steps: list[int] = setting([], "Indices of steps without noise, which are not trained.")
    num_inference_steps: AtLeastTwo = setting(20, "Denoising steps of a roll-out and of an evaluation.")
    shift: Positive | None = setting(5.0, "Shift of the noise levels; None: that of the pipeline's scheduler.")
    guidance_scale: Annotated[float, Range(1)] = setting(
        1.0, "Guidance as the pipeline applies it, in roll-outs, training and evaluation alike."
    )
    negative_prompt: str = setting("", "Prompt of the unconditional branch, where guidance has one.")
    height: Count | None = setting(None, "Height of a sample in pixels; None: the model's default.")
    width: Count | None = setting(None, "Width of a sample in pixels; None: the model's default.")
    num_frames: Count | None = setting(None, "Frames of a video; None: the model's default.")

    num_generations: AtLeastTwo = setting(4, "Samples a prompt, which are compared with each other.")
    steps_per_generation: Count | None = setting(
        None, "Mini-batches of samples a phase and process; None: the fewest that hold whole groups."
    )
    num_iterations: Count = setting(1, "Passes over the steps of a phase.")
    timestep_fraction: Annotated[float, Range(0, 1, above=True)] = setting(
        1.0, "Share of a sample's random steps that is trained, drawn anew for each sample."
    )
    reward_weights: list[float] | None = setting(None, "Weights of the reward functions; None: 1 each.")
    scale_rewards: Literal["group", "group_trl", "batch", "none"] = setting(
        "group",
        "What the advantage is divided by: the group's population deviation, TRL's sample deviation + 1e-4, the "
        "deviation of the whole phase, or nothing.",
    )
    adv_clip: Positive = setting(5.0, "Bound of the absolute advantage.")

    epsilon: Positive = setting(1e-4, "Clip width of the ratio. Log-probabilities are means, so it is small.")
    logprob_reduction: Literal["mean", "sum"] = setting(
        "mean", "Log-probability and KL of a step: mean or sum over the dimensions of a sample."
    )
    cps_logprob: Literal["gaussian", "published"] = setting(
        "gaussian", "Density of `cps`: the Gaussian, or the published square without variance."
    )
    grad_equalizer: bool = setting(True, "Scale the policy loss of each step so that all steps move the model alike.")

    beta: NonNegative = setting(1e-5, "Weight of the two KL terms at its highest; 0: none, and no anchor.")
    beta_init: NonNegative = setting(1e-7, "Weight of the KL terms at the start.")
    beta_warmup: Count = setting(100, "Updates in which the weight rises.")
    kl_schedule: Literal["linear", "controller", "constant"] = setting("linear", "How the weight of the KL moves.")
    kl_pos_weight: NonNegative = setting(1.0, "Weight of the KL to the anchor.")
    kl_vel_weight: NonNegative = setting(0.1, "Weight of the KL to the policy that sampled.")
    vel_kl: Literal["gaussian", "k1"] = setting(
        "gaussian", "KL to the policy that sampled: in closed form, or as the authors' code samples it."
    )
    sync_ref_model: bool = setting(True, "Move the anchor during training; False: it stays at the start.")
    ref_model_sync_steps: Count = setting(10, "Updates between two moves of the anchor.")
    ref_model_mixup_alpha: Annotated[float, Range(0, 1, above=True)] = setting(
        1.0, "Share of the policy in a moved anchor; 1 is a copy."
    )
    fps: Count = setting(16, "Frames a second of the videos that an evaluation writes.")

    def __post_init__(self):
        super().__post_init__()
        check(self)
        T = self.num_inference_steps
        self.require(self.sde_type != "cps" or self.eta <= 1, "eta", "must be at most 1 for sde_type='cps'")
        self.require(
            self.first_step != "flow_cap" or self.sde_type == "sage",
            "first_step",
            f"does nothing for sde_type={self.sde_type!r}; it is for 'sage'",
        )
        steps = self.deterministic_steps
        self.require(
            isinstance(steps, (list, tuple)) and all(i in Range(0, T - 1, whole=True) for i in steps),
            "deterministic_steps",
            f"must be a list of step indices in [0, {T - 1}]",
        )
        if self.beta > 0 and self.kl_schedule != "constant":
            self.require(self.beta_init <= self.beta, "beta_init", f"must be at most beta={self.beta!r}")
        if self.cps_logprob == "published":
            self.require(self.sde_type == "cps", "cps_logprob", "is for sde_type='cps'")
        for weight in self.reward_weights or ():
            self.require(weight in Range(), "reward_weights", "must be finite numbers")
        if self.shift is not None:
            self.table(self.shift)

    @property
    def uses_anchor(self) -> bool:
        return self.beta > 0 and self.kl_pos_weight > 0

    @property
    def uses_old_kl(self) -> bool:
        return self.beta > 0 and self.kl_vel_weight > 0

    def table(self, shift: float) -> StepTable:
        """The steps of a roll-out on the grid with this shift."""
        return step_table(
            self.num_inference_steps,
            shift,
            self.eta,
            self.sde_type,
            self.sigma_clamp,
            self.first_step,
            self.deterministic_steps,
            self.grad_equalizer,
        )


# --------------------------------------------------------------------------------------------------------------------
# Trainer
# --------------------------------------------------------------------------------------------------------------------


class FlowPolicy(nn.Module):
    """A transformer behind its adapter: `v = policy(x, s, condition)`. It is what the Trainer wraps."""

    def __init__(self, transformer: nn.Module, adapter):
        super().__init__()
        self.transformer = transformer
        self.adapter = adapter

    def forward(self, x: Tensor, s: Tensor, condition: Mapping[str, Tensor]) -> Tensor:
        """(B, ...) velocity in float32 of latents (B, ...) at noise levels (B,); `condition` has tensors (B, ...)."""
        v = self.adapter.velocity(self.transformer, x, s, condition)
        if v.shape != x.shape:
            raise ValueError(
                f"{type(self.adapter).__name__}.velocity returned {tuple(v.shape)} for latents {tuple(x.shape)}; it "
                f"must predict noise minus data, of their shape."
            )
        return v.float()

    def activation_checkpointing_enable(self, **kwargs) -> None:
        self.transformer.enable_gradient_checkpointing()  # diffusers has one kind


class SAGEGRPOTrainer(GuardedSteps, Trainer):
    """
    Group-relative training of a flow-matching transformer with SAGE-GRPO (arXiv 2603.21872). See [`sage_loss`].

    Args:
        model: a diffusers pipeline, from which transformer, VAE, text encoders and scheduler shift are taken, or a
            transformer alone; then the data set needs the columns of embeddings that its adapter names, and rewards
            see latents.
        args: a [`SAGEGRPOConfig`].
        reward_funcs: one or a list of `(samples, prompts, **columns) -> list[float | None]`. `samples` is a float
            tensor on the CPU: (n, 3, H, W) in [0, 1], (n, F, 3, H, W) for video, or latents where nothing decodes
            them. `None` or NaN: unscored. Names are looked up in [`~trl_trust.flow.rewards`].
        train_dataset: rows with `prompt`, or with embeddings; other columns reach the rewards.
        adapter: a [`~trl_trust.flow.adapters.FlowAdapter`]; by default chosen by the transformer's class.
        peft_config: trains a LoRA in place of the model.
        eval_dataset: rows for [`evaluate`](#evaluate): one sample a row from fixed noise, by the ODE.

    Logs, beside the Trainer's own: `reward`, `reward_std`, `rewards/NAME`, `sage/clip_ratio`, `sage/kl_pos`,
    `sage/kl_vel`, `sage/kl_weight`, `sage/reward_std` (within groups), `sage/zero_std_groups`, `sage/unscored`,
    `sage/step_scale/{min,max}`, `trust/ratio/{min,mean,max}`.

    Raises:
        ValueError: for a model, a data set or settings that do not fit each other.
        ImportError: without diffusers, naming the extra.
    """

    _name = "SAGE-GRPO"
    _tag_names = ["trl", "trl-trust", "sage"]
    _paper = paper(
        "Manifold-Aware Exploration for Reinforcement Learning in Video Generation",
        "2603.21872",
        "Mingzhe Zheng and Weijie Kong and Yue Wu and Dengyang Jiang and Yue Ma and Xuanhua He and Bin Lin and "
        "Kaixiong Gong and Zhao Zhong and Liefeng Bo and Qifeng Chen and Harry Yang",
    )

    def __init__(
        self,
        model,
        args: SAGEGRPOConfig | None = None,
        reward_funcs: Callable | str | Sequence[Callable | str] = (),
        train_dataset=None,
        adapter=None,
        peft_config=None,
        eval_dataset=None,
        callbacks: list[TrainerCallback] | None = None,
        optimizers: tuple = (None, None),
    ):
        from .adapters import build_adapter, check_scheduler
        from .rewards import load_reward

        args = SAGEGRPOConfig(f"{type(model).__name__}-SAGE") if args is None else args
        if not isinstance(args, SAGEGRPOConfig):
            raise ValueError(f"args is a {type(args).__name__}; it must be a SAGEGRPOConfig.")
        if train_dataset is None:
            raise ValueError("train_dataset=None: give rows with a `prompt`, or with embeddings.")
        adapter = build_adapter(model, args) if adapter is None else adapter
        pipeline = None if isinstance(model, nn.Module) else model
        self.pipeline_scheduler = getattr(pipeline, "scheduler", None)
        transformer = model if pipeline is None else model.transformer
        shift = check_scheduler(self.pipeline_scheduler, args.shift)
        self.table = args.table(shift)
        self.ode = ode_table(args.num_inference_steps, shift)

        rewards = [reward_funcs] if callable(reward_funcs) or isinstance(reward_funcs, str) else list(reward_funcs)
        if not rewards:
            raise ValueError("reward_funcs=(): give at least one reward function.")
        self.reward_funcs = [load_reward(reward) for reward in rewards]
        self.reward_names = [_name_of(reward) for reward in self.reward_funcs]
        weights = args.reward_weights or [1.0] * len(rewards)
        if len(weights) != len(rewards):
            raise ValueError(f"reward_weights={weights!r} must have one weight for each of {len(rewards)} rewards.")
        self.reward_weights = torch.tensor(weights, dtype=torch.float64)

        for part in adapter.frozen():
            part.requires_grad_(False).eval()
        self.peft_config = peft_config
        if peft_config is not None:
            if getattr(peft_config, "lora_dropout", 0.0):
                raise ValueError(
                    f"lora_dropout={peft_config.lora_dropout!r}: with dropout the ratio of fresh roll-outs is not 1; "
                    f"set it to 0."
                )
            transformer.requires_grad_(False)
            transformer.add_adapter(peft_config)
            for parameter in transformer.parameters():
                if parameter.requires_grad:  # an update of 1e-5 is lost in bfloat16
                    parameter.data = parameter.data.float()
        # a dropout of the model's own would do the same
        for module in transformer.modules():
            if isinstance(module, nn.Dropout):
                module.p = 0.0

        self.conditions = adapter.prepare(train_dataset, eval_dataset)
        self._metrics = defaultdict(list)  # since the last log
        self._phase, self._phase_number = None, None
        args.remove_unused_columns = False
        super().__init__(
            model=FlowPolicy(transformer, adapter),
            args=args,
            data_collator=lambda rows: rows[0],
            train_dataset=train_dataset,
            eval_dataset=eval_dataset,
            callbacks=callbacks,
            optimizers=optimizers,
        )
        self.model_accepts_loss_kwargs = False  # each micro-batch is a mean: the Trainer divides by their number
        self.adapter = adapter
        self.adapter.to(self.args.device)
        self._plan()
        self.kl_weight = KLWeight(args.kl_schedule, args.beta, args.beta_init, args.beta_warmup)
        self.anchor = [p.detach().clone() for p in self._trained()] if args.uses_anchor else []
        self.add_callback(_PhaseCallback(self))
        if args.kl_schedule == "controller" and not (args.uses_anchor or args.uses_old_kl):
            raise ValueError("kl_schedule='controller' needs a KL to follow; set beta above 0.")

    # -- the plan of a run -------------------------------------------------------------------------------------------

    def _plan(self) -> None:
        """How samples, steps and micro-batches of a phase fit together, over all processes."""
        args, G = self.args, self.args.num_generations
        per_step = args.per_device_train_batch_size * args.world_size
        if args.steps_per_generation is None:
            args.steps_per_generation = G // math.gcd(G, per_step)
        samples = per_step * args.steps_per_generation
        if samples % G:
            raise ValueError(
                f"steps_per_generation={args.steps_per_generation}: a phase has {samples} samples "
                f"(per_device_train_batch_size={args.per_device_train_batch_size} x processes={args.world_size} x "
                f"steps_per_generation), which must be a multiple of num_generations={G}."
            )
        self.prompts_per_phase = samples // G
        self.trained_steps = max(1, round(args.timestep_fraction * len(self.table.random)))
        pass_length = args.steps_per_generation * self.trained_steps
        if pass_length % args.gradient_accumulation_steps:
            raise ValueError(
                f"gradient_accumulation_steps={args.gradient_accumulation_steps} must divide the {pass_length} "
                f"micro-batches of a pass (steps_per_generation={args.steps_per_generation} x {self.trained_steps} "
                f"trained steps), so that no update mixes two phases."
            )
        self.phase_length = pass_length * args.num_iterations
        if len(self.train_dataset) < self.prompts_per_phase:
            raise ValueError(
                f"train_dataset has {len(self.train_dataset)} prompts, but a phase takes {self.prompts_per_phase} "
                f"({samples} samples / num_generations={G}); give more prompts, or a smaller batch."
            )

    def get_train_dataloader(self) -> DataLoader:
        # One item a micro-batch of an epoch. What it holds follows from `state.global_step`, so a resumed run needs
        # no more than that; it is not sharded, since the phases are.
        phases = len(self.train_dataset) // self.prompts_per_phase
        return DataLoader(range(phases * self.phase_length), batch_size=1, collate_fn=lambda x: {"micro_batch": x[0]})

    def _rows(self, phase: int) -> list[int]:
        """Rows of the data set that a phase samples for, over all processes, each `num_generations` times."""
        phases = len(self.train_dataset) // self.prompts_per_phase
        epoch, place = divmod(phase, phases)
        g = torch.Generator().manual_seed(stream(self.args.data_seed or self.args.seed, epoch))
        order = torch.randperm(len(self.train_dataset), generator=g).tolist()
        rows = order[place * self.prompts_per_phase : (place + 1) * self.prompts_per_phase]
        return [row for row in rows for _ in range(self.args.num_generations)]

    def _trained(self) -> list[nn.Parameter]:
        return [p for p in self.model.parameters() if p.requires_grad]

    def velocity(
        self, x: Tensor, steps: Tensor, condition: Mapping, table: StepTable | None = None, model=None
    ) -> Tensor:
        """(B, ...) velocity at steps (B,) of a table."""
        sigmas = (self.table if table is None else table).sigmas
        return (self.model if model is None else model)(x, sigmas[steps.cpu()].to(x), condition)

    # -- the anchor --------------------------------------------------------------------------------------------------

    @contextmanager
    def at_anchor(self):
        """The model with the anchor's parameters. Only what is trained is copied: under LoRA the adapter."""
        trained = self._trained()
        own = [p.data for p in trained]
        for p, anchor in zip(trained, self.anchor, strict=True):
            p.data = anchor
        try:
            yield
        finally:
            for p, data in zip(trained, own, strict=True):
                p.data = data

    @torch.no_grad()
    def sync_anchor(self) -> None:
        """Move the anchor to the policy, by `ref_model_mixup_alpha` of the way."""
        alpha = self.args.ref_model_mixup_alpha
        for anchor, p in zip(self.anchor, self._trained(), strict=True):
            anchor.mul_(1.0 - alpha).add_(p.data, alpha=alpha)  # a copy for 1, never an alias

    # -- roll-outs ---------------------------------------------------------------------------------------------------

    def _sample(self, number: int) -> dict[str, Any]:
        """One phase: sample, score, and note under the policy as it is what training compares with. Rows are local."""
        args, table, device = self.args, self.table, self.args.device
        everywhere = self._rows(number)
        n = len(everywhere) // args.world_size
        ids = list(
            range(args.process_index * n, (args.process_index + 1) * n)
        )  # rows of the phase, over all processes
        examples = [self.train_dataset[everywhere[i]] for i in ids]
        size = args.per_device_train_batch_size
        batches = [range(start, min(start + size, n)) for start in range(0, n, size)]
        chosen = torch.stack([self._steps_of(number, i) for i in ids])  # (n, K)
        shape = self.adapter.latent_shape(examples[0])
        parts = defaultdict(list)
        self.model.train()
        for batch in batches:
            rows = [ids[i] for i in batch]
            condition = self.conditions.rows([examples[i] for i in batch], device)
            draw = lambda what, rows=rows: row_noise(shape, args.seed, number, rows, what).to(device)
            move = lambda x, steps, condition=condition: self.velocity(x, steps, condition)
            latents, means = roll_out(move, draw(-1), table, draw)  # (B, T + 1, ...), (B, T, ...)
            mine = chosen[list(batch)]  # (B, K)
            take = lambda x, index, mine=mine: torch.stack([x[torch.arange(len(mine)), step] for step in index.T], 1)
            parts["latents"].append(latents[:, -1].cpu())
            parts["x"].append(take(latents, mine).cpu())
            parts["x_next"].append(take(latents, mine + 1).cpu())
            parts["old_mu"].append(take(means, mine).cpu())
        phase = {name: torch.cat(values) for name, values in parts.items()}  # kept on the CPU: K latents a sample
        latents = phase.pop("latents")
        samples = torch.cat([self.adapter.decode(latents[list(batch)]).float().cpu() for batch in batches])
        rewards = self._rewards(samples, examples)
        total = self._total(rewards)
        self._log_rewards(rewards, total)
        advantages = group_advantages(total, args.num_generations, args.scale_rewards, args.adv_clip)
        phase["advantages"] = advantages[ids].unsqueeze(1).float()
        phase["steps"], phase["examples"], phase["ids"] = chosen, examples, ids
        phase["old_logps"] = torch.cat([self._old_logps(phase, batch) for batch in batches])
        if self.anchor:
            with self.at_anchor():
                phase["anchor_mu"] = torch.cat([self._means(phase, batch) for batch in batches])
        return phase

    def _steps_of(self, phase: int, row: int) -> Tensor:
        """(K,) random steps of a sample that are trained in a phase, in the order of the first pass."""
        g = torch.Generator().manual_seed(stream(self.args.seed, phase, row, -2))
        random = torch.tensor(self.table.random)
        return random[torch.randperm(len(random), generator=g)][: self.trained_steps]

    def _old_logps(self, phase: Mapping[str, Tensor], batch: Sequence[int]) -> Tensor:
        """(B, K) log-probabilities of the steps that were taken, from the means that were sampled around."""
        batch, found = list(batch), []
        for j in range(self.trained_steps):
            mu, x_next = phase["old_mu"][batch, j], phase["x_next"][batch, j]
            sigma = self.table.variances[phase["steps"][batch, j]].to(mu).reshape(-1, *[1] * (mu.dim() - 1))
            found.append(self._log_prob(x_next, mu, sigma))
        return torch.stack(found, 1)

    @torch.no_grad()
    def _means(self, phase: Mapping[str, Tensor], batch: Sequence[int]) -> Tensor:
        """(B, K, ...) means of the steps of a phase under the model as it is."""
        batch, found = list(batch), []
        condition = self.conditions.rows([phase["examples"][i] for i in batch], self.args.device)
        for j in range(self.trained_steps):
            x, steps = phase["x"][batch, j].to(self.args.device), phase["steps"][batch, j]
            found.append(self.table.mean(self.velocity(x, steps, condition), x, steps)[0].cpu())
        return torch.stack(found, 1)

    def _log_prob(self, x_next: Tensor, mu: Tensor, sigma: Tensor) -> Tensor:
        return log_prob(x_next, mu, sigma, self.args.logprob_reduction, self.args.cps_logprob)

    def _rewards(self, samples: Tensor, examples: Sequence[Mapping[str, Any]]) -> Tensor:
        """(N, R) float64 rewards over all processes in order, NaN where a function did not score."""
        prompts = [example.get("prompt") for example in examples]
        columns = {key: [example[key] for example in examples] for key in (examples or [{}])[0] if key != "prompt"}
        table = []
        for name, reward in zip(self.reward_names, self.reward_funcs, strict=True):
            values = list(reward(samples, prompts, **columns)) if examples else []
            if len(values) != len(examples):
                raise ValueError(f"{name} returned {len(values)} rewards for {len(examples)} samples.")
            table.append([math.nan if value is None else float(value) for value in values])
        rows = gather_object([list(row) for row in zip(*table, strict=True)])
        rewards = torch.tensor(rows, dtype=torch.float64).view(-1, len(self.reward_funcs))
        broken = rewards.isinf()
        for name, column in zip(self.reward_names, broken.T, strict=True):
            if column.any():
                logger.warning(f"{name} gave {int(column.sum())} infinite rewards: they count as unscored.")
        return rewards.masked_fill(broken, math.nan)

    def _total(self, rewards: Tensor) -> Tensor:
        """(N,) weighted sum of rewards (N, R), NaN where no function scored a sample."""
        total = (rewards.nan_to_num(0.0) * self.reward_weights).sum(1)
        return total.masked_fill(rewards.isnan().all(1), math.nan)

    def _log_rewards(self, rewards: Tensor, total: Tensor) -> None:
        log, live = self._metrics, total[~total.isnan()]
        for name, column in zip(self.reward_names, rewards.T, strict=True):
            log[f"rewards/{name}"].append(column.nanmean())
        groups = [group[~group.isnan()] for group in total.view(-1, self.args.num_generations)]
        stds = torch.stack([group.std(correction=0) if len(group) else live.new_tensor(math.nan) for group in groups])
        log["reward"].append(live.mean())
        log["reward_std"].append(live.std(correction=0) if len(live) else live.new_tensor(math.nan))
        log["sage/reward_std"].append(stds.nanmean())
        log["sage/zero_std_groups"].append((stds < 1e-12).double().mean())
        log["sage/unscored"].append(total.isnan().double().mean())
        if not len(live):
            logger.warning("No sample of this phase was scored: its updates have no policy gradient.")

    # -- training ----------------------------------------------------------------------------------------------------

    def _prepare_inputs(self, inputs):
        # transformers 5.23 moves a batch of the loader to the device here; ours is a number
        place = self.state.global_step * self.args.gradient_accumulation_steps
        place += int(inputs["micro_batch"]) % self.args.gradient_accumulation_steps
        number, index = divmod(place, self.phase_length)
        if number != self._phase_number:
            self._phase, self._phase_number = None, number  # free the last one first
            self._phase = self._sample(number)
        return self._micro_batch(number, index)

    def _micro_batch(self, number: int, index: int) -> dict[str, Any]:
        args, phase, device = self.args, self._phase, self.args.device
        n, K = len(phase["steps"]), self.trained_steps
        iteration, index = divmod(index, args.steps_per_generation * K)
        mini_batch, position = divmod(index, K)
        g = torch.Generator().manual_seed(stream(args.seed, number, iteration, args.process_index, -3))
        rows = torch.randperm(n, generator=g)[
            mini_batch * args.per_device_train_batch_size : (mini_batch + 1) * args.per_device_train_batch_size
        ]
        # each sample passes its steps in an order of its own, a new one in each pass
        order = [
            torch.randperm(
                K, generator=torch.Generator().manual_seed(stream(args.seed, number, iteration, phase["ids"][row], -4))
            )[position]
            for row in rows.tolist()
        ]
        j = torch.stack(order)
        names = ("x", "x_next", "old_mu", "anchor_mu", "old_logps")
        batch = {name: phase[name][rows, j].to(device) for name in names if name in phase}
        batch["steps"], batch["advantages"] = phase["steps"][rows, j], phase["advantages"][rows].to(device)
        batch["condition"] = self.conditions.rows([phase["examples"][i] for i in rows.tolist()], device)
        return batch

    def compute_loss(self, model, inputs, return_outputs=False, num_items_in_batch=None):
        args, steps = self.args, inputs["steps"]
        v = self.velocity(inputs["x"], steps, inputs["condition"], model=model)
        mu, sigma = self.table.mean(v, inputs["x"], steps)
        logps = self._log_prob(inputs["x_next"], mu, sigma).unsqueeze(1)  # (B, 1)
        old_logps = inputs["old_logps"].unsqueeze(1)
        kl_pos = kl_vel = None
        if "anchor_mu" in inputs:
            kl_pos = gaussian_kl(mu, inputs["anchor_mu"], sigma, args.logprob_reduction).unsqueeze(1)
        if args.uses_old_kl:
            closed = args.vel_kl == "gaussian"
            kl_vel = gaussian_kl(mu, inputs["old_mu"], sigma, args.logprob_reduction).unsqueeze(1) if closed else None
            kl_vel = old_logps - logps if kl_vel is None else kl_vel
        scale = self.table.scale[steps].to(logps).unsqueeze(1)
        batch = StepBatch(logps, old_logps, inputs["advantages"], scale, kl_pos, kl_vel)
        loss = sage_loss(
            batch,
            self.kl_weight.value,
            epsilon=args.epsilon,
            kl_pos_weight=args.kl_pos_weight,
            kl_vel_weight=args.kl_vel_weight,
        )
        metrics = dict(loss.metrics)
        metrics |= {"sage/step_scale/min": scale, "sage/step_scale/max": scale}
        for name, value in metrics.items():
            value = value.detach()
            value = value.amin() if name.endswith("min") else value.amax() if name.endswith("max") else value.mean()
            self._metrics[name].append(value)
        return loss.per_token_loss.mean()

    def prediction_step(self, *args, **kwargs):
        raise ValueError("SAGEGRPOTrainer.predict: call `evaluate`, which samples.")

    # -- evaluation --------------------------------------------------------------------------------------------------

    @torch.no_grad()
    def sample(self, dataset, seed: int | None = None) -> Tensor:
        """Samples for the rows of a data set by the ODE: (n, ...) decoded, on the CPU.

        The noise depends on the seed and the row alone. Every process may call it, and then samples all rows.
        """
        args, found = self.args, []
        seed = args.seed if seed is None else seed
        for start in range(0, len(dataset), args.per_device_eval_batch_size):
            rows = list(range(start, min(start + args.per_device_eval_batch_size, len(dataset))))
            condition = self.conditions.rows([dataset[i] for i in rows], args.device)
            move = lambda x, steps, condition=condition: self.velocity(x, steps, condition, self.ode)
            noise = row_noise(self.adapter.latent_shape(dataset[rows[0]]), seed, -1, rows, -1).to(args.device)
            latents, _ = roll_out(move, noise, self.ode, lambda i: None)
            found.append(self.adapter.decode(latents[:, -1].cpu()).float().cpu())
        return torch.cat(found)

    def evaluate(self, eval_dataset=None, ignore_keys=None, metric_key_prefix: str = "eval") -> dict[str, float]:
        """Sample the rows of the data set from fixed noise, score them, and write the samples to `output_dir/samples`.

        Returns:
            `{prefix}_reward` and `{prefix}_rewards/NAME`, logged too.
        """
        dataset = self.eval_dataset if eval_dataset is None else eval_dataset
        if dataset is None:
            raise ValueError("eval_dataset=None: an evaluation needs rows to sample for.")
        samples = self.sample(dataset)
        examples = [dataset[i] for i in range(len(dataset))]
        # every process has all samples: it scores a share of them
        mine = list(range(len(examples)))[self.args.process_index :: self.args.world_size]
        rewards = self._rewards(samples[mine], [examples[i] for i in mine])
        metrics = {f"{metric_key_prefix}_reward": float(self._total(rewards).nanmean())}
        for name, column in zip(self.reward_names, rewards.T, strict=True):
            metrics[f"{metric_key_prefix}_rewards/{name}"] = float(column.nanmean())
        if self.accelerator.is_main_process:
            from .rewards import write_samples

            path = Path(self.args.output_dir, "samples", f"step-{self.state.global_step:06d}")
            written = write_samples(samples, path, self.args.fps)
            if written and "wandb" in (self.args.report_to or ()):
                import wandb

                if wandb.run is not None:
                    picture = wandb.Video if written.suffix == ".mp4" else wandb.Image
                    wandb.log({"samples": picture(str(written))}, commit=False)
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(self.args, self.state, self.control, metrics)
        return metrics

    # -- records -----------------------------------------------------------------------------------------------------

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        evaluates = any(key.startswith("eval_") for key in logs)
        window = self._metrics
        if not evaluates and window:
            names = list(window)
            values = torch.stack([_reduce(name, window[name]).to(self.args.device) for name in names])
            values = self.accelerator.gather(values[None]).cpu()  # (processes, metrics): one wait for the device
            logs = {
                **logs,
                **{name: float(_reduce(name, list(column))) for name, column in zip(names, values.T, strict=True)},
            }
            logs["sage/kl_weight"] = self.kl_weight.value
            window.clear()
        super().log(logs, start_time)

    def _end_of_update(self) -> None:
        args = self.args
        if self.anchor and args.sync_ref_model and self.state.global_step % args.ref_model_sync_steps == 0:
            self.sync_anchor()
        if args.beta > 0:
            self.kl_weight.update(self._mean_kl() if args.kl_schedule == "controller" else 0.0)

    def _mean_kl(self) -> float:
        """The weighted KL of the update that has just ended, over all processes."""
        args, window = self.args, self._metrics
        kl = torch.zeros((), device=args.device)
        for name, weight in (("sage/kl_pos", args.kl_pos_weight), ("sage/kl_vel", args.kl_vel_weight)):
            if window.get(name):
                kl = kl + weight * torch.stack(window[name][-args.gradient_accumulation_steps :]).mean()
        return self.accelerator.reduce(kl, reduction="mean").item()

    # -- files -------------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        # transformers 5.23 writes the model here, on the main process; a FlowPolicy is no PreTrainedModel
        folder = Path(self.args.output_dir if output_dir is None else output_dir)
        folder.mkdir(parents=True, exist_ok=True)
        self.adapter.save(self.model.transformer, folder, self.peft_config)
        torch.save(self.args, folder / "training_args.bin")
        (folder / "README.md").write_text(self._card(), "utf-8")

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model=None) -> None:
        # transformers 5.23 reads weights here; what is trained, its anchor and the schedule are in a file of ours
        if not Path(resume_from_checkpoint, STATE_FILE).exists():
            raise ValueError(f"resume_from_checkpoint={resume_from_checkpoint!r} is no checkpoint of SAGEGRPOTrainer.")
        state = torch.load(Path(resume_from_checkpoint, STATE_FILE), map_location="cpu", weights_only=True)
        trained = dict((self.model if model is None else model).named_parameters())
        for name, value in state["trained"].items():
            trained[name].data.copy_(value)
        for anchor, value in zip(self.anchor, state["anchor"], strict=True):
            anchor.copy_(value)
        self.kl_weight.load_state_dict(state["kl_weight"])

    def _save_checkpoint(self, model, trial) -> None:
        # transformers 5.23: what it writes, and before it the state that is ours
        if self.args.should_save:
            folder = Path(self._get_output_dir(trial=trial), f"{PREFIX_CHECKPOINT_DIR}-{self.state.global_step}")
            folder.mkdir(parents=True, exist_ok=True)
            named = {name: p.detach().cpu() for name, p in self.model.named_parameters() if p.requires_grad}
            anchor = [value.cpu() for value in self.anchor]
            state = {"trained": named, "anchor": anchor, "kl_weight": self.kl_weight.state_dict()}
            partial = folder / f"{STATE_FILE}.partial"
            torch.save(state, partial)
            os.replace(partial, folder / STATE_FILE)
        super()._save_checkpoint(model, trial)

    def create_model_card(self, *args, **kwargs) -> None:
        """Write `README.md` to `output_dir`. The Trainer's own card is for language models."""
        if self.is_world_process_zero():
            Path(self.args.output_dir, "README.md").write_text(self._card(), "utf-8")

    def _card(self) -> str:
        base = getattr(self.model.transformer, "config", {}).get("_name_or_path") or ""
        name = (self.args.hub_model_id or Path(self.args.output_dir).resolve().name).split("/")[-1]
        tags = "".join(f"- {tag}\n" for tag in (*self._tag_names, *(["lora"] if self.peft_config else [])))
        kind = "LoRA" if self.peft_config else type(self.model.transformer).__name__
        libraries = "".join(f"- {library}: {version(library)}\n" for library in ("trl-trust", "diffusers", "torch"))
        text = (
            f"---\nlibrary_name: diffusers\ntags:\n{tags}---\n\n# Model Card for {name}\n\n"
            f"A {kind}{f' of {base}' if base else ''}, trained with {self._name} "
            f"([arXiv {self._paper['id']}](https://arxiv.org/abs/{self._paper['id']})) on the rewards "
            f"{', '.join(self.reward_names)}.\n\n### Framework versions\n\n{libraries}\n### Citation\n\n"
            f"```bibtex\n{self._paper['citation']}\n```\n"
        )
        return extended(text, self)


class _PhaseCallback(TrainerCallback):
    """What happens after an update; and checkpoints wait for the end of a phase, whose roll-outs are not saved."""

    def __init__(self, trainer: SAGEGRPOTrainer):
        self.trainer, self.waiting = trainer, False

    def on_step_end(self, args, state, control, **kwargs):
        self.trainer._end_of_update()
        micro_batches = state.global_step * args.gradient_accumulation_steps
        wants = control.should_save or self.waiting
        ends = micro_batches % self.trainer.phase_length == 0 or state.global_step >= state.max_steps
        control.should_save, self.waiting = wants and ends, wants and not ends
        return control


def _reduce(name: str, values: list[Tensor]) -> Tensor:
    """Mean of a metric, or the extremum that its name ends in; NaN left out of means."""
    x = torch.stack(list(values)).float()
    return x.amin() if name.endswith("min") else x.amax() if name.endswith("max") else x.nanmean()


def _name_of(reward: Callable) -> str:
    return getattr(reward, "__name__", type(reward).__name__)
