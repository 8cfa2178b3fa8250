"""Rewards of pictures and videos, and how samples are written.

A reward is a callable `(samples, prompts, **columns) -> list[float | None]`; `samples` is a float tensor in [0, 1] on
the CPU, (n, 3, H, W) for images and (n, F, 3, H, W) for videos. `None` leaves a sample unscored.
"""

import importlib.util
import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from torch import Tensor


def brightness_reward(samples: Tensor, prompts: Sequence[str], **columns) -> list[float]:
    """Mean value of all pixels: for tests and first steps. Works on latents too."""
    return samples.flatten(1).mean(1).tolist()


def clip_score_reward(model: str = "openai/clip-vit-large-patch14", batch_size: int = 32) -> Callable:
    """Cosine of CLIP's embeddings of picture and prompt; of a video the mean over its frames."""
    return _CLIPReward("clip_score_reward", model, batch_size, scaled=False)


def pick_score_reward(model: str = "yuvalkirstain/PickScore_v1", batch_size: int = 32) -> Callable:
    """PickScore: the same cosine times the model's logit scale, of a CLIP that was trained on preferences."""
    return _CLIPReward("pick_score_reward", model, batch_size, scaled=True)


class _CLIPReward:
    def __init__(self, name: str, model: str, batch_size: int, scaled: bool):
        from transformers import CLIPModel, CLIPProcessor

        self.__name__, self.batch_size, self.scaled = name, batch_size, scaled
        try:
            self.model = CLIPModel.from_pretrained(model).eval().requires_grad_(False)
        except OSError as error:
            raise ValueError(f"{name}: model={model!r} cannot be had: {error}") from error
        # PickScore's repository has no processor; it uses that of its CLIP
        processors = [model, "laion/CLIP-ViT-H-14-laion2B-s32B-b79K"] if scaled else [model]
        for place in processors:
            try:
                self.processor = CLIPProcessor.from_pretrained(place)
                break
            except OSError as error:
                if place == processors[-1]:
                    raise ValueError(f"{name}: the processor of {place!r} cannot be had: {error}") from error

    @torch.no_grad()
    def __call__(self, samples: Tensor, prompts: Sequence[str], **columns) -> list[float]:
        frames = samples if samples.dim() == 5 else samples.unsqueeze(1)  # (n, F, 3, H, W)
        n, F = frames.shape[:2]
        if frames.shape[2] != 3:
            raise ValueError(f"{self.__name__} needs pictures, (n, 3, H, W); it got {tuple(samples.shape)}: no VAE?")
        device = "cuda" if torch.cuda.is_available() else "cpu"
        self.model.to(device)
        text = self.processor(text=list(prompts), padding=True, truncation=True, return_tensors="pt").to(device)
        text = _embedding(self.model.get_text_features(**text))
        pictures = [_picture(frame, least=1) for frame in frames.flatten(0, 1)]
        found = []
        for start in range(0, len(pictures), self.batch_size):
            part = self.processor(images=pictures[start : start + self.batch_size], return_tensors="pt").to(device)
            found.append(_embedding(self.model.get_image_features(**part)))
        cosine = (torch.cat(found).view(n, F, -1) * text.unsqueeze(1)).sum(-1).mean(1)  # (n,)
        return (cosine * self.model.logit_scale.exp() if self.scaled else cosine).tolist()


def _embedding(x) -> Tensor:
    x = x if isinstance(x, Tensor) else x.pooler_output  # transformers 5 returns an output object
    return x / x.norm(dim=-1, keepdim=True)


def videoalign_reward(path: str, weights: Sequence[float] = (0.5, 0.5, 1.0), fps: int = 16) -> Callable:
    """VideoAlign's scores of a video, `w_VQ VQ + w_MQ MQ + w_TA TA`, by a checkout of its repository that you name.

    Args:
        path: a folder with VideoAlign's `inference.py` and `checkpoints/`.
        weights: of visual quality, motion quality and text alignment.

    Raises:
        ImportError: if `path` holds no such checkout, or its dependencies are missing.
    """
    file = Path(path, "inference.py")
    if not file.is_file():
        raise ImportError(
            f"videoalign_reward: path={str(path)!r} is no checkout of VideoAlign (no inference.py in it)."
        )
    spec = importlib.util.spec_from_file_location("videoalign_inference", file)
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ImportError as error:
        raise ImportError(f"videoalign_reward: {file} needs a package that is missing: {error}") from error
    device = "cuda" if torch.cuda.is_available() else "cpu"
    scorer = module.VideoVLMRewardInference(str(Path(path, "checkpoints")), device=device, dtype=torch.bfloat16)

    def videoalign(samples: Tensor, prompts: Sequence[str], **columns) -> list[float]:
        with TemporaryDirectory() as folder:
            paths = [str(_write_video(video, Path(folder, f"{i}.mp4"), fps)) for i, video in enumerate(samples)]
            scores = scorer.reward(paths, list(prompts), use_norm=True)
        return [sum(w * score[key] for w, key in zip(weights, ("VQ", "MQ", "TA"), strict=True)) for score in scores]

    videoalign.__name__ = "videoalign_reward"
    return videoalign


# What a recipe may name; a colon gives the argument, as in `clip_score_reward:path/to/a/clip`.
BY_NAME = {
    "brightness_reward": None,
    "clip_score_reward": clip_score_reward,
    "pick_score_reward": pick_score_reward,
    "videoalign_reward": videoalign_reward,
}


def load_reward(reward: Callable | str) -> Callable:
    """A reward by name, by dotted path, or as it is.

    Raises:
        ValueError: for an unknown name.
    """
    if callable(reward):
        return reward
    name, _, argument = reward.partition(":")
    if name == "brightness_reward":
        return brightness_reward
    if name in BY_NAME:
        if name == "videoalign_reward" and not argument:
            raise ValueError("reward_funcs='videoalign_reward' needs a checkout: write videoalign_reward:/path/to/it.")
        return BY_NAME[name](argument) if argument else BY_NAME[name]()
    from ..rewards import load_reward_func

    if "." not in name:
        raise ValueError(f"reward_funcs={reward!r} is unknown; there are {', '.join(BY_NAME)}, or a dotted path.")
    return load_reward_func(name, None)


# --------------------------------------------------------------------------------------------------------------------
# Files
# --------------------------------------------------------------------------------------------------------------------


def picture_grid(samples: Tensor, columns: int | None = None) -> Tensor:
    """(3, H, W) of samples (n, 3, h, w) side by side, with a white line between them."""
    n, _, h, w = samples.shape
    columns = columns or math.ceil(math.sqrt(n))
    rows = -(-n // columns)
    grid = torch.ones(3, rows * (h + 1) + 1, columns * (w + 1) + 1)
    for i, sample in enumerate(samples):
        top, left = (i // columns) * (h + 1) + 1, (i % columns) * (w + 1) + 1
        grid[:, top : top + h, left : left + w] = sample
    return grid


def write_samples(samples: Tensor, path: Path, fps: int = 16) -> Path | None:
    """Write pictures as a PNG grid, or videos side by side as MP4; latents are not written.

    Returns:
        The file, or `None`.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    if samples.dim() == 5 and samples.shape[2] == 3:
        if samples.shape[1] > 1:
            frames = torch.stack([picture_grid(frame) for frame in samples.transpose(0, 1)])
            return _write_video(frames, path.with_suffix(".mp4"), fps)
        samples = samples[:, 0]
    if samples.dim() != 4 or samples.shape[1] != 3:
        return None
    _picture(picture_grid(samples.clamp(0, 1))).save(path.with_suffix(".png"))
    return path.with_suffix(".png")


def _picture(sample: Tensor, least: int = 256):
    """A PIL image, whole times enlarged if it is tiny."""
    from PIL import Image

    array = (sample.clamp(0, 1) * 255).round().byte().permute(1, 2, 0).numpy()
    times = max(1, least // min(array.shape[:2]))
    image = Image.fromarray(array)
    return image.resize((image.width * times, image.height * times), Image.Resampling.NEAREST)


def _write_video(frames: Tensor, path: Path, fps: int) -> Path:
    import numpy as np

    from .adapters import export_video

    pictures = np.stack([np.asarray(_picture(frame)) for frame in frames])  # (F, H, W, 3)
    missing = [(0, -side % 16) for side in pictures.shape[1:3]]  # to whole blocks of a codec
    pictures = np.pad(pictures, [(0, 0), *missing, (0, 0)], constant_values=255)
    os.makedirs(path.parent, exist_ok=True)
    export_video(pictures, path, fps)
    return path
