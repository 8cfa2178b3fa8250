"""What differs between flow transformers: how they are called, how prompts become embeddings, latents pictures.

Written against diffusers 0.42; this folder alone names diffusers, and imports it only when a model is at hand. Each
adapter's velocity equals what the pipeline of its class computes (tests/flow/test_flow_adapters.py).
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn


def import_diffusers():
    """diffusers, or an `ImportError` that names the extra."""
    try:
        import diffusers
    except ImportError as error:
        raise ImportError("training a flow model needs diffusers >= 0.42: pip install 'trl-trust[flow]'") from error
    return diffusers


class FlowAdapter:
    """
    Between the trainer and one family of transformers. Subclass it for a model of your own: [`velocity`],
    [`latent_shape`] and, unless the data set brings the embeddings, [`encode`]; [`decode`] leaves latents as they are.

    Args:
        pipeline: a diffusers pipeline, whose text encoders and VAE are used, or `None`.
        transformer: the model; that of the pipeline by default.
        guidance_scale, negative_prompt, height, width, num_frames: as in the config. Without a VAE, height, width and
            frames are those of the latents.

    Attributes:
        embeds: names of the row tensors that [`velocity`] reads, made by [`encode`] or columns of the data set.
        guides_by_embedding: the transformer takes the guidance scale as an input, in place of a second branch.
        defaults: height, width, frames of a sample, for a pipeline.
    """

    embeds: tuple[str, ...] = ("prompt_embeds",)
    guides_by_embedding = False
    defaults: tuple[int, int, int] = (512, 512, 1)

    def __init__(
        self,
        pipeline=None,
        transformer: nn.Module | None = None,
        *,
        guidance_scale: float = 1.0,
        negative_prompt: str = "",
        height: int | None = None,
        width: int | None = None,
        num_frames: int | None = None,
    ):
        self.pipeline = pipeline
        self.transformer = pipeline.transformer if transformer is None and pipeline is not None else transformer
        self.guidance_scale, self.negative_prompt = guidance_scale, negative_prompt
        self.size = (height, width, num_frames)
        self.vae = getattr(pipeline, "vae", None)
        self.dtype = next(self.transformer.parameters()).dtype  # before a LoRA in float32 comes in

    # -- what a family defines ---------------------------------------------------------------------------------------

    def call(self, model: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """(B, ...) output of the model for one branch; `x` in the model's dtype, `sigma` (B,) float32 in (0, 1]."""
        raise NotImplementedError

    def encode(self, prompts: Sequence[str]) -> dict[str, Tensor]:
        """Row tensors (n, ...) named in `embeds`. Called once, before training."""
        raise ValueError(
            f"{type(self).__name__} cannot encode prompts: give a pipeline, or the columns {', '.join(self.embeds)}."
        )

    def latent_shape(self, row: Mapping[str, Any]) -> tuple[int, ...]:
        """Shape of one sample's latents."""
        height, width, frames = self.pixels()
        channels, spatial, temporal = self.compression()
        shape = (height // spatial, width // spatial)
        return (channels, (frames - 1) // temporal + 1, *shape) if self.is_video else (channels, *shape)

    is_video = False

    def compression(self) -> tuple[int, int, int]:
        """Channels of the latents, pixels a latent is wide, frames it is long (1 without a VAE)."""
        spatial = getattr(self.pipeline, "vae_scale_factor_spatial", None) or getattr(
            self.pipeline, "vae_scale_factor", 1
        )
        temporal = getattr(self.pipeline, "vae_scale_factor_temporal", 1)
        return (self.transformer.config.in_channels, *((spatial, temporal) if self.vae is not None else (1, 1)))

    def decode(self, latents: Tensor) -> Tensor:
        """(n, 3, H, W) or (n, F, 3, H, W) in [0, 1]; the latents themselves where there is no VAE."""
        return latents

    # -- what all share ----------------------------------------------------------------------------------------------

    def pixels(self) -> tuple[int, int, int]:
        """Height, width and frames of a sample."""
        fallback = self.defaults if self.vae is not None else (None, None, 1)
        size = tuple(fallback if own is None else own for own, fallback in zip(self.size, fallback, strict=True))
        if None in size:
            raise ValueError(
                f"height={size[0]!r}, width={size[1]!r}: set both, in latents, for a model without a VAE."
            )
        return size

    @property
    def has_branches(self) -> bool:
        return self.guidance_scale > 1 and not self.guides_by_embedding

    def velocity(self, model: nn.Module, x: Tensor, sigma: Tensor, cond: Mapping[str, Tensor]) -> Tensor:
        """(B, ...) velocity `z - x0` in float32, guided as the family's pipeline guides; `sigma` (B,)."""
        dtype, sigma = self.dtype, sigma.float()
        x = x.to(dtype)
        own = {name: self._cast(cond[name], dtype) for name in self.embeds}
        if not self.has_branches:
            return self.call(model, x, sigma, own).float()
        both = {name: torch.cat([self._cast(cond[f"negative_{name}"], dtype), own[name]]) for name in self.embeds}
        without, with_prompt = self.call(model, torch.cat([x, x]), torch.cat([sigma, sigma]), both).float().chunk(2)
        return without + self.guidance_scale * (with_prompt - without)

    @staticmethod
    def _cast(value: Tensor, dtype: torch.dtype) -> Tensor:
        return value.to(dtype) if value.is_floating_point() else value

    def frozen(self) -> list[nn.Module]:
        """Modules beside the transformer that must not train."""
        parts = getattr(self.pipeline, "components", {})
        return [part for name, part in parts.items() if isinstance(part, nn.Module) and name != "transformer"]

    def to(self, device) -> None:
        if self.vae is not None:
            self.vae.to(device)

    def prepare(self, *datasets) -> "Conditions":
        """Encode every prompt of the data sets once, and free the text encoders."""
        conditions = Conditions(self)
        conditions.add(*(dataset for dataset in datasets if dataset is not None))
        for name, part in getattr(self.pipeline, "components", {}).items():
            if name.startswith("text_encoder") and part is not None:
                part.to("cpu")  # the pipeline keeps it, for whoever samples after training
        return conditions

    def save(self, transformer: nn.Module, folder: Path, peft_config=None) -> None:
        """A LoRA as `pipeline.load_lora_weights` reads it, or the transformer as its `from_pretrained` does."""
        if peft_config is None and hasattr(transformer, "save_pretrained"):
            transformer.save_pretrained(folder)
        elif peft_config is None:
            torch.save(transformer.state_dict(), folder / "model.pt")
        else:
            import_diffusers().loaders.peft  # noqa: B018  a LoRA is of a diffusers model
            transformer.save_lora_adapter(folder, adapter_name="default")
            self._prefix_lora(folder)

    @staticmethod
    def _prefix_lora(folder: Path) -> None:
        # diffusers 0.42: `save_lora_adapter` names parameters as the transformer does; a pipeline expects the prefix
        # `transformer.` in names and in the metadata, which holds the scale
        import json

        from safetensors import safe_open
        from safetensors.torch import save_file

        file = folder / "pytorch_lora_weights.safetensors"
        with safe_open(file, "pt") as opened:
            metadata, tensors = opened.metadata() or {}, {name: opened.get_tensor(name) for name in opened.keys()}  # noqa: SIM118
        tensors = {f"transformer.{name}": value for name, value in tensors.items()}
        if (packed := metadata.get("lora_adapter_metadata")) is not None:
            values = {f"transformer.{name}": value for name, value in json.loads(packed).items()}
            metadata["lora_adapter_metadata"] = json.dumps(values, sort_keys=True)
        save_file(tensors, file, metadata)


class Conditions:
    """The embeddings of prompts: from columns of the data set, or encoded once for each different prompt."""

    def __init__(self, adapter: FlowAdapter):
        self.adapter = adapter
        self.by_prompt: dict[str, dict[str, Tensor]] = {}
        self.negative: dict[str, Tensor] = {}

    @torch.no_grad()
    def add(self, *datasets, batch_size: int = 8) -> None:
        adapter, prompts = self.adapter, {}
        for dataset in datasets if adapter.embeds else ():
            if not self.in_columns(dataset[0]):
                for i in range(len(dataset)):
                    prompt = dataset[i].get("prompt")
                    if not isinstance(prompt, str):
                        raise ValueError(
                            f"prompt={prompt!r} in row {i} must be a text; or give {', '.join(adapter.embeds)}."
                        )
                    prompts[prompt] = None
        prompts = list(prompts)
        for start in range(0, len(prompts), batch_size):
            part = prompts[start : start + batch_size]
            encoded = adapter.encode(part)
            for i, prompt in enumerate(part):
                self.by_prompt[prompt] = {name: value[i].cpu() for name, value in encoded.items()}
        if adapter.has_branches and not self.negative and prompts:
            self.negative = {name: value[0].cpu() for name, value in adapter.encode([adapter.negative_prompt]).items()}

    def in_columns(self, row: Mapping[str, Any]) -> bool:
        return all(name in row for name in self.adapter.embeds)

    def rows(self, examples: Sequence[Mapping[str, Any]], device) -> dict[str, Tensor]:
        """Row tensors for [`FlowAdapter.velocity`]."""
        embeds, found = self.adapter.embeds, []
        if not embeds:
            return {}
        negatives = [f"negative_{name}" for name in embeds] if self.adapter.has_branches else []
        for example in examples:
            if self.in_columns(example):
                missing = [name for name in negatives if name not in example]
                if missing:
                    raise ValueError(f"guidance_scale={self.adapter.guidance_scale!r} needs the columns {missing}.")
                found.append({name: torch.as_tensor(example[name]) for name in (*embeds, *negatives)})
            elif example.get("prompt") in self.by_prompt:
                negative = {f"negative_{name}": value for name, value in self.negative.items()}
                found.append({**self.by_prompt[example["prompt"]], **negative})
            else:
                raise ValueError(f"prompt={example.get('prompt')!r} was not in the data sets that the trainer got.")
        return {name: torch.stack([one[name] for one in found]).to(device) for name in found[0]}


# --------------------------------------------------------------------------------------------------------------------
# Families
# --------------------------------------------------------------------------------------------------------------------


class SD3Adapter(FlowAdapter):
    """`SD3Transformer2DModel`: guidance by two branches."""

    embeds = ("prompt_embeds", "pooled_prompt_embeds")
    defaults = (512, 512, 1)

    def call(self, model, x, sigma, cond):
        return model(
            hidden_states=x,
            timestep=sigma * 1000,
            encoder_hidden_states=cond["prompt_embeds"],
            pooled_projections=cond["pooled_prompt_embeds"],
            return_dict=False,
        )[0]

    def encode(self, prompts):
        if self.pipeline is None:
            return super().encode(prompts)
        embeds, _, pooled, _ = self.pipeline.encode_prompt(
            list(prompts), None, None, do_classifier_free_guidance=False
        )
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def decode(self, latents):
        return _decode_image(self, latents)


class FluxAdapter(FlowAdapter):
    """`FluxTransformer2DModel`: 2 x 2 latents are one token, the guidance scale is an input."""

    embeds = ("prompt_embeds", "pooled_prompt_embeds")
    guides_by_embedding = True
    defaults = (512, 512, 1)

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _require_guidance_input(self)

    def compression(self):
        channels, spatial, _ = super().compression()
        return channels // 4, spatial, 1

    def call(self, model, x, sigma, cond):
        B, C, H, W = x.shape
        packed = x.view(B, C, H // 2, 2, W // 2, 2).permute(0, 2, 4, 1, 3, 5).reshape(B, H * W // 4, C * 4)
        rows, columns = torch.meshgrid(torch.arange(H // 2), torch.arange(W // 2), indexing="ij")
        places = torch.stack([torch.zeros_like(rows), rows, columns], -1).reshape(-1, 3).to(x)
        embeds, config = cond["prompt_embeds"], self.transformer.config
        out = model(
            hidden_states=packed,
            timestep=sigma.to(x),
            guidance=sigma.new_full((B,), self.guidance_scale) if config.guidance_embeds else None,
            pooled_projections=cond["pooled_prompt_embeds"],
            encoder_hidden_states=embeds,
            txt_ids=places.new_zeros(embeds.shape[1], 3),
            img_ids=places,
            return_dict=False,
        )[0]
        return out.view(B, H // 2, W // 2, C, 2, 2).permute(0, 3, 1, 4, 2, 5).reshape(B, C, H, W)

    def encode(self, prompts):
        if self.pipeline is None:
            return super().encode(prompts)
        embeds, pooled, _ = self.pipeline.encode_prompt(list(prompts), None)
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled}

    def decode(self, latents):
        return _decode_image(self, latents)


class WanAdapter(FlowAdapter):
    """`WanTransformer3DModel`, text to video: guidance by two branches."""

    defaults = (480, 832, 81)
    is_video = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        if getattr(self.pipeline, "transformer_2", None) is not None:
            raise ValueError(
                "the pipeline has a second transformer (`transformer_2`, as Wan 2.2 has), and SAGEGRPOTrainer trains "
                "one model over all noise levels; use a pipeline with one, such as Wan 2.1."
            )
        if self.pipeline is not None and self.pipeline.config.get("expand_timesteps"):
            raise ValueError("expand_timesteps=True: image-to-video models of Wan 2.2 are not supported; use Wan 2.1.")

    def call(self, model, x, sigma, cond):
        return model(
            hidden_states=x, timestep=sigma * 1000, encoder_hidden_states=cond["prompt_embeds"], return_dict=False
        )[0]

    def encode(self, prompts):
        if self.pipeline is None:
            return super().encode(prompts)
        embeds, _ = self.pipeline.encode_prompt(
            list(prompts), do_classifier_free_guidance=False, max_sequence_length=512
        )
        return {"prompt_embeds": embeds}

    def decode(self, latents):
        if self.vae is None:
            return latents
        config = self.vae.config
        stretch = lambda values: torch.tensor(values).view(1, -1, 1, 1, 1).to(self.vae.device, self.vae.dtype)
        latents = latents.to(self.vae.device, self.vae.dtype)
        return _decode_video(self, latents * stretch(config.latents_std) + stretch(config.latents_mean))


class HunyuanVideoAdapter(FlowAdapter):
    """`HunyuanVideoTransformer3DModel`: the guidance scale is an input."""

    embeds = ("prompt_embeds", "pooled_prompt_embeds", "prompt_attention_mask")
    guides_by_embedding = True
    defaults = (720, 1280, 129)
    is_video = True

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        _require_guidance_input(self)

    def call(self, model, x, sigma, cond):
        return model(
            hidden_states=x,
            timestep=sigma * 1000,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["prompt_attention_mask"].to(x.dtype),
            pooled_projections=cond["pooled_prompt_embeds"],
            guidance=x.new_full((len(x),), self.guidance_scale) * 1000.0,
            return_dict=False,
        )[0]

    def encode(self, prompts):
        if self.pipeline is None:
            return super().encode(prompts)
        embeds, pooled, mask = self.pipeline.encode_prompt(list(prompts))
        return {"prompt_embeds": embeds, "pooled_prompt_embeds": pooled, "prompt_attention_mask": mask}

    def decode(self, latents):
        if self.vae is None:
            return latents
        return _decode_video(self, latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor)


class HunyuanVideo15Adapter(FlowAdapter):
    """`HunyuanVideo15Transformer3DModel`, text to video: two encoders, guidance by two branches."""

    embeds = ("prompt_embeds", "prompt_embeds_mask", "prompt_embeds_2", "prompt_embeds_mask_2")
    defaults = (480, 832, 121)
    is_video = True
    image_tokens = 729  # of the image encoder, all zero without an image: `vision_num_semantic_tokens` of the pipeline

    def compression(self):
        _, spatial, temporal = super().compression()
        # the model takes latents, those of a first frame, and a mask: 2 C + 1 channels
        return (self.transformer.config.in_channels - 1) // 2, spatial, temporal

    def call(self, model, x, sigma, cond):
        B, C, *rest = x.shape
        return model(
            hidden_states=torch.cat([x, x.new_zeros(B, C + 1, *rest)], 1),
            image_embeds=x.new_zeros(B, self.image_tokens, self.transformer.config.image_embed_dim),
            timestep=sigma * 1000,
            encoder_hidden_states=cond["prompt_embeds"],
            encoder_attention_mask=cond["prompt_embeds_mask"],
            encoder_hidden_states_2=cond["prompt_embeds_2"],
            encoder_attention_mask_2=cond["prompt_embeds_mask_2"],
            return_dict=False,
        )[0]

    def encode(self, prompts):
        if self.pipeline is None:
            return super().encode(prompts)
        encoded = self.pipeline.encode_prompt(list(prompts), batch_size=len(prompts), dtype=self.dtype)
        return dict(zip(self.embeds, encoded, strict=True))

    def decode(self, latents):
        if self.vae is None:
            return latents
        latents = latents.to(self.vae.device, self.vae.dtype) / self.vae.config.scaling_factor
        # one by one: the mask in the attention of diffusers 0.42.1's VAE fits a single video
        return torch.cat([_decode_video(self, one) for one in latents.split(1)])


class LTXAdapter(FlowAdapter):
    """`LTXVideoTransformer3DModel`: latents are packed into tokens, guidance by two branches."""

    embeds = ("prompt_embeds", "prompt_attention_mask")
    defaults = (512, 704, 161)
    is_video = True
    frame_rate = 25  # the pipeline's default

    def compression(self):
        config, pipe = self.transformer.config, self.pipeline
        channels = config.in_channels // (config.patch_size**2 * config.patch_size_t)
        if self.vae is None:
            return channels, 1, 1
        return channels, pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio

    def call(self, model, x, sigma, cond):
        B, C, F, H, W = x.shape
        config = self.transformer.config
        p, pt = config.patch_size, config.patch_size_t
        packed = x.reshape(B, C, F // pt, pt, H // p, p, W // p, p).permute(0, 2, 4, 6, 1, 3, 5, 7)
        pipe = self.pipeline
        spatial, temporal = (
            (32, 8) if pipe is None else (pipe.vae_spatial_compression_ratio, pipe.vae_temporal_compression_ratio)
        )
        out = model(
            hidden_states=packed.flatten(4, 7).flatten(1, 3),
            encoder_hidden_states=cond["prompt_embeds"],
            timestep=sigma * 1000,
            encoder_attention_mask=cond["prompt_attention_mask"],
            num_frames=F,
            height=H,
            width=W,
            rope_interpolation_scale=(temporal / self.frame_rate, spatial, spatial),
            return_dict=False,
        )[0]
        out = out.reshape(B, F // pt, H // p, W // p, C, pt, p, p).permute(0, 4, 1, 5, 2, 6, 3, 7)
        return out.reshape(B, C, F, H, W)

    def encode(self, prompts):
        if self.pipeline is None:
            return super().encode(prompts)
        embeds, mask, _, _ = self.pipeline.encode_prompt(list(prompts), do_classifier_free_guidance=False)
        return {"prompt_embeds": embeds, "prompt_attention_mask": mask}

    def decode(self, latents):
        if self.vae is None:
            return latents
        vae = self.vae
        if vae.config.timestep_conditioning:
            raise ValueError("timestep_conditioning=True: this VAE denoises while it decodes; use LTX-Video 0.9.0's.")
        stretch = lambda values: values.view(1, -1, 1, 1, 1).to(vae.device, vae.dtype)
        latents = latents.to(vae.device, vae.dtype)
        latents = latents * stretch(vae.latents_std) / vae.config.scaling_factor + stretch(vae.latents_mean)
        return _decode_video(self, latents, None)


ADAPTERS: dict[str, type[FlowAdapter]] = {
    "SD3Transformer2DModel": SD3Adapter,
    "FluxTransformer2DModel": FluxAdapter,
    "WanTransformer3DModel": WanAdapter,
    "HunyuanVideoTransformer3DModel": HunyuanVideoAdapter,
    "HunyuanVideo15Transformer3DModel": HunyuanVideo15Adapter,
    "LTXVideoTransformer3DModel": LTXAdapter,
}


def build_adapter(model, args) -> FlowAdapter:
    """The adapter of a pipeline or a transformer, with the settings of a config.

    Raises:
        ValueError: for a model that none of [`ADAPTERS`] knows to predict a velocity.
        ImportError: without diffusers.
    """
    import_diffusers()
    pipeline = None if isinstance(model, nn.Module) else model
    transformer = model if pipeline is None else getattr(pipeline, "transformer", None)
    name = type(transformer if transformer is not None else model).__name__
    if name not in ADAPTERS:
        raise ValueError(
            f"model: no adapter knows {name!r} to predict a flow's velocity (noise minus data); known are "
            f"{', '.join(ADAPTERS)}; for another flow model pass `adapter=`."
        )
    names = ("guidance_scale", "negative_prompt", "height", "width", "num_frames")
    return ADAPTERS[name](pipeline, transformer, **{key: getattr(args, key) for key in names})


def check_scheduler(scheduler, shift: float | None) -> float:
    """The shift of the grid: as set, or that of the pipeline's scheduler.

    Raises:
        ValueError: for a scheduler of models that predict no velocity, or that puts sigmas of its own into the grid.
    """
    config = getattr(scheduler, "config", {})
    if scheduler is not None:
        flows = "FlowMatch" in type(scheduler).__name__ or config.get("use_flow_sigmas", False)
        if not flows or config.get("prediction_type", "flow_prediction") != "flow_prediction":
            raise ValueError(
                f"scheduler={type(scheduler).__name__}: its model predicts no velocity; SAGEGRPOTrainer needs a flow "
                f"model, with FlowMatchEulerDiscreteScheduler or `use_flow_sigmas`."
            )
        for name in (
            "use_karras_sigmas",
            "use_exponential_sigmas",
            "use_beta_sigmas",
            "invert_sigmas",
            "shift_terminal",
            "stochastic_sampling",
        ):
            if config.get(name):
                raise ValueError(
                    f"scheduler: {name}={config[name]!r} puts sigmas or noise of its own in place of the grid that is "
                    f"trained; make it anew with `type(scheduler).from_config(scheduler.config, {name}=None)`."
                )
    if shift is not None:
        return shift
    if scheduler is None:
        raise ValueError("shift=None takes the shift of the pipeline's scheduler, and there is none: set a number.")
    if config.get("use_dynamic_shifting"):
        raise ValueError(
            "shift=None: the pipeline's scheduler shifts by resolution (use_dynamic_shifting); set a number."
        )
    return float(config.get("flow_shift") or config.get("shift") or 1.0)


def _require_guidance_input(adapter: FlowAdapter) -> None:
    if adapter.guidance_scale > 1 and not adapter.transformer.config.guidance_embeds:
        raise ValueError(
            f"guidance_scale={adapter.guidance_scale!r}: this {type(adapter.transformer).__name__} has no guidance "
            f"input (guidance_embeds=False); leave it at 1."
        )


@torch.no_grad()
def _decode_image(adapter: FlowAdapter, latents: Tensor) -> Tensor:
    """(n, 3, H, W) in [0, 1], as the pipelines of SD3 and Flux decode."""
    vae = adapter.vae
    if vae is None:
        return latents
    latents = latents.to(vae.device, vae.dtype) / vae.config.scaling_factor + (vae.config.shift_factor or 0.0)
    image = vae.decode(latents, return_dict=False)[0]
    return adapter.pipeline.image_processor.postprocess(image, output_type="pt")


@torch.no_grad()
def _decode_video(adapter: FlowAdapter, latents: Tensor, *rest) -> Tensor:
    """(n, F, 3, H, W) in [0, 1] of latents that are scaled already."""
    video = adapter.vae.decode(latents, *rest, return_dict=False)[0]
    return adapter.pipeline.video_processor.postprocess_video(video, output_type="pt")


def export_video(frames, path: Path, fps: int) -> None:
    """Write frames, (F, H, W, 3) uint8, as MP4."""
    import_diffusers().utils.export_to_video([frame / 255.0 for frame in frames], str(path), fps=fps)
