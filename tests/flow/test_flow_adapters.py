"""Adapters against diffusers' own pipelines: what a pipeline hands its scheduler is the adapter's velocity."""

import diffusers
import pytest
import torch
from transformers import LlamaConfig, LlamaModel, Qwen2_5_VLTextConfig, Qwen2_5_VLTextModel

from trl_trust.flow import FlowAdapter, SAGEGRPOConfig
from trl_trust.flow.adapters import ADAPTERS, build_adapter, check_scheduler
from trl_trust.flow.adapters.tiny import (
    WORDS,
    tiny_clip,
    tiny_sd3_pipeline,
    tiny_t5,
    tiny_tokenizer,
    tiny_vae,
    tiny_wan_pipeline,
)


scheduler = lambda: diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0)
language = dict(
    vocab_size=len(WORDS),
    hidden_size=16,
    intermediate_size=32,
    num_hidden_layers=3,
    num_attention_heads=2,
    num_key_value_heads=2,
    pad_token_id=0,
)


def flux():
    transformer = diffusers.FluxTransformer2DModel(
        in_channels=16,
        num_layers=1,
        num_single_layers=1,
        attention_head_dim=16,
        num_attention_heads=2,
        joint_attention_dim=16,
        pooled_projection_dim=16,
        guidance_embeds=True,
        axes_dims_rope=(4, 4, 8),
    )
    text = dict(
        text_encoder=tiny_clip(projection=False),
        tokenizer=tiny_tokenizer(),
        text_encoder_2=tiny_t5(),
        tokenizer_2=tiny_tokenizer(),
    )
    return diffusers.FluxPipeline(scheduler=scheduler(), vae=tiny_vae(4), transformer=transformer, **text)


def hunyuan():
    transformer = diffusers.HunyuanVideoTransformer3DModel(
        in_channels=4,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=10,
        num_layers=1,
        num_single_layers=1,
        num_refiner_layers=1,
        patch_size=1,
        text_embed_dim=16,
        pooled_projection_dim=16,
        rope_axes_dim=(2, 4, 4),
    )
    blocks = dict(down_block_types=("HunyuanVideoDownBlock3D",) * 4, up_block_types=("HunyuanVideoUpBlock3D",) * 4)
    vae = diffusers.AutoencoderKLHunyuanVideo(
        latent_channels=4, block_out_channels=(8,) * 4, layers_per_block=1, norm_num_groups=4, **blocks
    )
    return diffusers.HunyuanVideoPipeline(
        text_encoder=LlamaModel(LlamaConfig(**language)).eval(),
        tokenizer=tiny_tokenizer(512),
        transformer=transformer,
        vae=vae.eval(),
        scheduler=scheduler(),
        text_encoder_2=tiny_clip(projection=False, length=77),
        tokenizer_2=tiny_tokenizer(),
    )


def hunyuan15():
    transformer = diffusers.HunyuanVideo15Transformer3DModel(
        in_channels=9,
        out_channels=4,
        num_attention_heads=2,
        attention_head_dim=16,
        num_layers=1,
        num_refiner_layers=1,
        text_embed_dim=16,
        text_embed_2_dim=16,
        image_embed_dim=16,
        rope_axes_dim=(4, 6, 6),
        task_type="t2v",
    )
    vae = diffusers.AutoencoderKLHunyuanVideo15(
        latent_channels=4, block_out_channels=(8,) * 5, layers_per_block=1, spatial_compression_ratio=16
    )
    tokenizer = tiny_tokenizer(2048)
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }} {% endfor %}"
    rope = {"rope_type": "default", "mrope_section": [2, 1, 1]}
    return diffusers.HunyuanVideo15Pipeline(
        text_encoder=Qwen2_5_VLTextModel(Qwen2_5_VLTextConfig(**language, rope_scaling=rope)).eval(),
        tokenizer=tokenizer,
        transformer=transformer,
        vae=vae.eval(),
        scheduler=scheduler(),
        text_encoder_2=tiny_t5(),
        tokenizer_2=tiny_tokenizer(256),
        guider=diffusers.ClassifierFreeGuidance(guidance_scale=2.5),
    )


def ltx():
    transformer = diffusers.LTXVideoTransformer3DModel(
        in_channels=8,
        out_channels=8,
        num_attention_heads=2,
        attention_head_dim=8,
        cross_attention_dim=16,
        num_layers=1,
        caption_channels=16,
    )
    vae = diffusers.AutoencoderKLLTXVideo(
        latent_channels=8,
        block_out_channels=(8,) * 4,
        decoder_block_out_channels=(8,) * 4,
        layers_per_block=(1,) * 5,
        decoder_layers_per_block=(1,) * 5,
    )
    return diffusers.LTXPipeline(
        scheduler=scheduler(),
        vae=vae.eval(),
        text_encoder=tiny_t5(),
        tokenizer=tiny_tokenizer(128),
        transformer=transformer,
    )


PIPELINES = {
    "sd3": (tiny_sd3_pipeline, dict(height=16, width=16)),
    "flux": (flux, dict(height=16, width=16)),
    "wan": (tiny_wan_pipeline, dict(height=16, width=16, num_frames=5)),
    "hunyuan": (hunyuan, dict(height=16, width=16, num_frames=5)),
    "hunyuan15": (hunyuan15, dict(height=32, width=32, num_frames=5)),
    "ltx": (ltx, dict(height=64, width=64, num_frames=9)),
}


def build(name):
    torch.manual_seed(0)
    build_pipeline, size = PIPELINES[name]
    pipeline = build_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    with torch.no_grad():  # some start with an output layer of zeros
        for parameter in pipeline.transformer.parameters():
            if parameter.abs().max() == 0:
                parameter.normal_(std=0.1)
    return pipeline, size


def test_every_family_is_here():
    assert {type(build(name)[0].transformer).__name__ for name in PIPELINES} == set(ADAPTERS)


@pytest.mark.parametrize("scale", [1.0, 2.5])
@pytest.mark.parametrize("name", PIPELINES)
def test_velocity_is_what_the_pipeline_denoises_with(name, scale):
    pipeline, size = build(name)
    settings = SAGEGRPOConfig(output_dir="unused", use_cpu=True, bf16=False, guidance_scale=scale, **size)
    adapter = build_adapter(pipeline, settings)
    # diffusers 0.42.1 decodes HunyuanVideo-1.5 one video at a time only
    prompts = ["a red ball", "the cat runs at night"][: 1 if name == "hunyuan15" else 2]
    condition = adapter.encode(prompts)
    if adapter.has_branches:
        negative = adapter.encode([""])
        condition |= {
            f"negative_{key}": value.expand(len(prompts), *value.shape[1:]) for key, value in negative.items()
        }

    seen, step = [], pipeline.scheduler.step

    def watch(v, t, x, *args, **kwargs):
        seen.append((v, t, x))
        return step(v, t, x, *args, **kwargs)

    pipeline.scheduler.step = watch
    arguments = dict(prompt=prompts, num_inference_steps=2, output_type="pt", **size)
    if name == "hunyuan15":  # which has the scale in its guider, and takes no None for the negative prompt
        pipeline.guider = diffusers.ClassifierFreeGuidance(guidance_scale=scale)
        arguments["negative_prompt"] = [""]
    else:
        arguments["guidance_scale"] = scale
    if name in ("sd3", "wan", "ltx"):
        arguments["negative_prompt"] = ["", ""]
    picture = pipeline(**arguments)[0]

    shape = (len(prompts), *adapter.latent_shape({}))
    assert len(seen) == 2
    for v, t, x in seen:
        if name == "flux":
            x, v = (pipeline._unpack_latents(part, 16, 16, pipeline.vae_scale_factor) for part in (x, v))
        elif name == "ltx":
            x, v = (pipeline._unpack_latents(part, *shape[2:], 1, 1) for part in (x, v))
        assert x.shape == shape
        with torch.no_grad():
            own = adapter.velocity(pipeline.transformer, x, t.expand(len(x)) / 1000, condition)
        torch.testing.assert_close(own, v.float(), rtol=1e-5, atol=1e-5)
    assert seen[0][0].std() > 1e-3

    x = x + (pipeline.scheduler.sigmas[-1] - pipeline.scheduler.sigmas[-2]) * v  # the last Euler step
    decoded = adapter.decode(x)
    torch.testing.assert_close(decoded, torch.as_tensor(picture), rtol=1e-4, atol=1e-4)
    assert decoded.std() > 1e-3
    torch.testing.assert_close(adapter.decode(torch.cat([x, x]))[-len(x) :], decoded, rtol=1e-4, atol=1e-4)


# -- what is refused -------------------------------------------------------------------------------------------------


def config(**settings):
    return SAGEGRPOConfig(output_dir="unused", use_cpu=True, bf16=False, **settings)


def test_a_second_transformer_is_refused():
    pipeline = tiny_wan_pipeline()
    pipeline.register_modules(transformer_2=tiny_wan_pipeline(1).transformer)
    with pytest.raises(ValueError, match=r"second transformer \(`transformer_2`, as Wan 2.2 has\)"):
        build_adapter(pipeline, config())


def test_models_that_predict_no_velocity_are_refused():
    unet = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 8), norm_num_groups=4, down_block_types=("DownBlock2D",) * 2,
        up_block_types=("UpBlock2D",) * 2,
    )  # fmt: skip
    with pytest.raises(ValueError, match="no adapter knows 'UNet2DModel' to predict a flow's velocity"):
        build_adapter(unet, config())
    with pytest.raises(ValueError, match="scheduler=DDPMScheduler: its model predicts no velocity"):
        check_scheduler(diffusers.DDPMScheduler(), 3.0)
    with pytest.raises(ValueError, match="scheduler=UniPCMultistepScheduler: its model predicts no velocity"):
        check_scheduler(diffusers.UniPCMultistepScheduler(use_flow_sigmas=True, prediction_type="epsilon"), 3.0)


@pytest.mark.parametrize(
    "setting",
    [
        {"use_karras_sigmas": True},
        {"use_exponential_sigmas": True},
        {"invert_sigmas": True},
        {"shift_terminal": 0.1},
        {"stochastic_sampling": True},
    ],
)
def test_schedulers_with_sigmas_of_their_own_are_refused(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"scheduler: {name}="):
        check_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(**setting), 3.0)


def test_the_shift_of_a_scheduler():
    assert check_scheduler(scheduler(), None) == 3.0 and check_scheduler(scheduler(), 5.0) == 5.0
    unipc = diffusers.UniPCMultistepScheduler(prediction_type="flow_prediction", use_flow_sigmas=True, flow_shift=4.0)
    assert check_scheduler(unipc, None) == 4.0
    with pytest.raises(ValueError, match="shifts by resolution"):
        check_scheduler(diffusers.FlowMatchEulerDiscreteScheduler(use_dynamic_shifting=True), None)
    with pytest.raises(ValueError, match="there is none: set a number"):
        check_scheduler(None, None)


def test_guidance_and_sizes_that_a_model_lacks():
    pipeline = flux()
    pipeline.transformer.register_to_config(guidance_embeds=False)
    with pytest.raises(ValueError, match=r"guidance_scale=2.5: this FluxTransformer2DModel has no guidance input"):
        build_adapter(pipeline, config(guidance_scale=2.5))
    with pytest.raises(ValueError, match=r"height=None, width=None: set both, in latents"):
        build_adapter(tiny_sd3_pipeline().transformer, config()).latent_shape({})
    with pytest.raises(ValueError, match="cannot encode prompts: give a pipeline, or the columns prompt_embeds, pool"):
        build_adapter(tiny_sd3_pipeline().transformer, config()).encode(["x"])


def test_diffusers_is_named_where_it_is_missing(monkeypatch):
    import sys

    monkeypatch.setitem(sys.modules, "diffusers", None)
    with pytest.raises(ImportError, match=r"needs diffusers >= 0.42: pip install 'trl-trust\[flow\]'"):
        build_adapter(torch.nn.Linear(1, 1), config())
    assert FlowAdapter.__name__ == "FlowAdapter"  # the package itself imports without it
