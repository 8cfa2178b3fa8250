"""`trl-trust quickstart --task flow`, and the pictures of the benchmark."""

import json

import pytest
import torch

from trl_trust import cli
from trl_trust.flow.toys import draw_shapes, find_squares, read_prompt, shape_distance, shape_prompts, shape_reward


def test_every_stage_runs(tmp_path, capsys):
    assert cli.main(["quickstart", "--task", "flow", "--smoke", "--output-dir", str(tmp_path)]) == 0
    said = capsys.readouterr().out
    metrics = json.loads((tmp_path / "metrics.json").read_text())
    assert list(metrics["runs"]) == ["sage", "flow", "dance", "cps", "sage, anchor"] and "not reached" in said
    assert list(metrics["before"]) == ["ode", "sage", "flow", "dance", "cps"] and min(metrics["before"].values()) > 0
    assert all(len(run["reward"]) == 3 for run in metrics["runs"].values())
    assert (tmp_path / "ring.png").stat().st_size > 10_000
    with pytest.raises(SystemExit):
        cli.main(["quickstart", "--task=flow", "--phases", "0"])
    assert "--phases=0 must be at least 1" in capsys.readouterr().err


def test_the_pictures_of_squares_are_what_their_prompts_say():
    g = torch.Generator().manual_seed(0)
    prompts = shape_prompts()
    assert len(set(prompts)) == 48
    pictures = torch.stack([draw_shapes(prompt, g) for prompt in prompts])
    assert shape_reward(pictures, prompts) == [1.0] * 48 and shape_distance(pictures).max() < 1e-6
    there, _ = find_squares(pictures)
    assert there.flatten(1).sum(1).tolist() == [read_prompt(prompt)[0] for prompt in prompts]
    # another color and the other half: the number alone is right
    place = {"left": "right", "right": "left", "top": "bottom", "bottom": "top"}
    color = {"red": "blue", "blue": "red", "green": "yellow", "yellow": "green"}
    other = [" ".join({**place, **color}.get(word, word) for word in prompt.split()) for prompt in prompts]
    assert shape_reward(pictures, other) == pytest.approx([1 / 3] * 48)
    assert shape_reward(torch.zeros_like(pictures), prompts) == [0.0] * 48
    noisy = pictures + 0.1 * torch.randn(pictures.shape, generator=g)
    assert shape_distance(noisy).mean() == pytest.approx(0.1, rel=0.1)
