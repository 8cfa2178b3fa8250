"""Tiny pipelines with random weights, built from configs, with tokenizers built here.

For tests, and for recipes that download nothing (`model_name_or_path: tiny-wan` or `tiny-sd3`).
"""

import torch

from . import import_diffusers


WORDS = ("<pad>", "</s>", "<unk>", "a", "the", "red", "green", "blue", "ball", "cat", "at", "night", "runs", "bright")


def tiny_tokenizer(length: int = 16):
    """One token a word; whatever is not in [`WORDS`] is one token too."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    words = Tokenizer(models.WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token="<pad>",
        eos_token="</s>",
        bos_token="</s>",
        unk_token="<unk>",
        model_max_length=length,
    )


def tiny_t5(umt5: bool = False):
    """A T5 encoder of width 16."""
    from transformers import T5Config, T5EncoderModel, UMT5Config, UMT5EncoderModel

    config, model = (UMT5Config, UMT5EncoderModel) if umt5 else (T5Config, T5EncoderModel)
    return model(config(vocab_size=len(WORDS), d_model=16, d_kv=8, d_ff=32, num_layers=1, num_heads=2)).eval()


def tiny_clip(projection: bool = True, length: int = 16):
    """A CLIP text model of width 16."""
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        vocab_size=len(WORDS),
        hidden_size=16,
        intermediate_size=32,
        num_hidden_layers=2,
        num_attention_heads=2,
        projection_dim=16,
        max_position_embeddings=length,
        bos_token_id=1,
        eos_token_id=1,
        pad_token_id=0,
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config).eval()


def tiny_vae(latent_channels: int):
    """An image VAE that halves the sides."""
    return _vivid(
        import_diffusers().AutoencoderKL(
            down_block_types=("DownEncoderBlock2D",) * 2,
            up_block_types=("UpDecoderBlock2D",) * 2,
            block_out_channels=(8, 8),
            layers_per_block=1,
            latent_channels=latent_channels,
            norm_num_groups=1,  # more would take the color out of a picture
            scaling_factor=1.0,
            shift_factor=0.0,
            use_quant_conv=False,
            use_post_quant_conv=False,
        )
    )


@torch.no_grad()
def _vivid(vae):
    """A random decoder draws much the same gray for all latents: its biases outweigh them. So they are amplified."""
    vae.decoder.conv_in.weight.mul_(8.0)
    vae.decoder.conv_out.weight.mul_(3.0)
    return vae.eval()


def tiny_sd3_transformer(
    seed: int = 0,
    *,
    sample_size: int = 8,
    in_channels: int = 4,
    joint_attention_dim: int = 32,
    pooled_projection_dim: int = 32,
    patch_size: int = 2,
    num_layers: int = 2,
    heads: int = 2,
):
    """An SD3 transformer with random weights."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return import_diffusers().SD3Transformer2DModel(
            sample_size=sample_size,
            patch_size=patch_size,
            in_channels=in_channels,
            out_channels=in_channels,
            num_layers=num_layers,
            attention_head_dim=16,
            num_attention_heads=heads,
            joint_attention_dim=joint_attention_dim,
            caption_projection_dim=16 * heads,
            pooled_projection_dim=pooled_projection_dim,
            pos_embed_max_size=sample_size,
        )


def tiny_sd3_pipeline(seed: int = 0):
    """Stable Diffusion 3 for pictures of 16 x 16."""
    diffusers = import_diffusers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.StableDiffusion3Pipeline(
            transformer=tiny_sd3_transformer(seed),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=tiny_vae(4),
            text_encoder=tiny_clip(),
            tokenizer=tiny_tokenizer(),
            text_encoder_2=tiny_clip(),
            tokenizer_2=tiny_tokenizer(),
            text_encoder_3=None,
            tokenizer_3=None,
        )


def tiny_wan_pipeline(seed: int = 0):
    """Wan 2.1 for videos of 16 x 16 and 5 frames."""
    diffusers = import_diffusers()
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return diffusers.WanPipeline(
            transformer=diffusers.WanTransformer3DModel(
                num_attention_heads=2,
                attention_head_dim=12,
                in_channels=4,
                out_channels=4,
                text_dim=16,
                freq_dim=32,
                ffn_dim=32,
                num_layers=1,
                rope_max_seq_len=32,
            ),
            scheduler=diffusers.FlowMatchEulerDiscreteScheduler(shift=3.0),
            vae=_vivid(
                diffusers.AutoencoderKLWan(
                    base_dim=4,
                    z_dim=4,
                    dim_mult=[1, 1],
                    num_res_blocks=1,
                    temperal_downsample=[True],
                    latents_mean=[0.0] * 4,
                    latents_std=[1.0] * 4,
                    scale_factor_temporal=2,
                    scale_factor_spatial=2,
                )
            ),
            text_encoder=tiny_t5(umt5=True),
            tokenizer=tiny_tokenizer(),
        )


TINY = {"tiny-sd3": tiny_sd3_pipeline, "tiny-wan": tiny_wan_pipeline}
