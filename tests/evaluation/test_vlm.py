"""Pictures: what is drawn is what is asked about; a tiny vision-language model reads them through its processor."""

import itertools
import random
from collections import Counter

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForImageTextToText,
    AutoProcessor,
    AutoTokenizer,
    CLIPImageProcessorPil,
    CLIPVisionConfig,
    LlamaConfig,
    LlavaConfig,
    LlavaForConditionalGeneration,
    LlavaProcessor,
)

from trl_trust import cli
from trl_trust.evaluation import TrustReport, run_vlm_suite, tiny
from trl_trust.evaluation.items import answer_of, passed
from trl_trust.evaluation.vlm import (
    BUILDERS,
    COLORS,
    EDITS,
    SIZE,
    draw_scene,
    edited,
    generate_vlm,
    render_vlm,
    scene,
    vlm_items,
)


TEMPLATE = (
    "{% for m in messages %}{{ m.role }}: {% for c in m.content %}{% if c.type == 'image' %}<image>"
    "{% else %}{{ c.text }}{% endif %}{% endfor %}\n{% endfor %}{% if add_generation_prompt %}assistant:{% endif %}"
)


@pytest.fixture(scope="module")
def vlm(tmp_path_factory):
    """A LLaVA of two layers that was made here, saved, and read again with the Auto classes."""
    path = tmp_path_factory.mktemp("vlm")
    tokenizer = tiny.build_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": ["<image>"]})
    side = {"height": 64, "width": 64}
    processor = LlavaProcessor(
        CLIPImageProcessorPil(size={"shortest_edge": 64}, crop_size=side),
        tokenizer,
        patch_size=16,
        vision_feature_select_strategy="default",
        num_additional_image_tokens=1,
        image_token="<image>",
        chat_template=TEMPLATE,
    )
    small = dict(intermediate_size=64, num_hidden_layers=2, num_attention_heads=2)
    ids = dict(pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id, bos_token_id=None)
    config = LlavaConfig(
        vision_config=CLIPVisionConfig(hidden_size=32, image_size=64, patch_size=16, projection_dim=32, **small),
        text_config=LlamaConfig(
            vocab_size=len(tokenizer), hidden_size=32, max_position_embeddings=1024, **small, **ids
        ),
        image_token_index=tokenizer.convert_tokens_to_ids("<image>"),
        image_seq_length=16,
    )
    torch.manual_seed(0)
    model = LlavaForConditionalGeneration(config)
    model.generation_config.eos_token_id = tokenizer.eos_token_id
    model.save_pretrained(path)
    processor.save_pretrained(path)
    return AutoModelForImageTextToText.from_pretrained(path), AutoProcessor.from_pretrained(path), str(path)


@pytest.mark.parametrize("seed", range(40))
def test_a_scene_is_drawn_as_it_is(seed):
    shapes = scene(random.Random(seed))
    assert 3 <= len(shapes) <= 7 and len({shape.label for shape in shapes}) == len(shapes)
    image = draw_scene(shapes, "a line")
    for shape in shapes:
        assert image.getpixel((round(shape.x), round(shape.y))) == COLORS[shape.color]
        around = [round(shape.x + shape.radius + 11), round(shape.y)]
        box = image.crop((around[0] - 7, around[1] - 8, around[0] + 8, around[1] + 9)).convert("L")
        assert np.asarray(box).min() < 100, "the label is not there"
        assert shape.radius < shape.x < SIZE - shape.radius - 15 and shape.radius < shape.y < SIZE - 20 - shape.radius
    for a, b in itertools.combinations(shapes, 2):
        assert max(abs(a.x - b.x), abs(a.y - b.y)) > 2 * a.radius  # nothing lies on anything


def test_answers_are_the_scenes_and_spread_evenly():
    slots = [slot for name in ("truthfulness", "robustness") for slot in vlm_items(name, 240, 1)]
    for role, values in (("count", 4), ("left", 2), ("color", 6)):
        counts = Counter(slot[0].target for slot in slots if slot[0].role == role)
        assert len(counts) == values and max(counts.values()) < 1.6 * min(counts.values()), role
    honest = Counter(slot[0].target == "UNKNOWN" for slot in vlm_items("honesty", 100))
    assert honest[True] == honest[False] == 50
    owners = Counter(slot[0].role for slot in vlm_items("privacy", 50))
    assert owners["authorized"] == owners["unauthorized"] == 25


def test_counts_agree_with_the_picture():
    """Connected patches of ink, counted without the code that drew them."""
    from scipy import ndimage

    rng = random.Random(3)
    for count in range(4):
        shapes = scene(rng, 6, "circle", count)
        assert sum(shape.kind == "circle" for shape in shapes) == count
        pixels = np.asarray(draw_scene(shapes)).astype(int)
        colored = np.any([np.abs(pixels - color).sum(2) < 12 for color in COLORS.values()], axis=0)
        patches, n = ndimage.label(colored)
        assert sum(np.sum(patches == i) > 200 for i in range(1, n + 1)) == 6


@pytest.mark.parametrize("name", BUILDERS)
def test_right_answers_pass_and_others_do_not(name):
    for slot in vlm_items(name, 12, 2):
        for item in slot:
            assert passed(item, f"It is so.\nANSWER: {item.target}")
            leak = item.secret if item.role == "unauthorized" else ""
            assert not passed(item, f"ANSWER: {item.wrong or 'nonsense'} {leak}")
    again, other = vlm_items(name, 4, 2), vlm_items(name, 4, 3)
    assert [i.id for s in again for i in s] == [i.id for s in vlm_items(name, 4, 2) for i in s]
    assert {i.id for s in again for i in s}.isdisjoint(i.id for s in other for i in s)
    with pytest.raises(ValueError, match="'ethics' has no pictures"):
        vlm_items("ethics")


@pytest.mark.parametrize("edit", EDITS)
def test_an_edit_leaves_what_is_asked_for(edit):
    shapes = scene(random.Random(7), 5)
    clean = draw_scene(shapes)
    changed = edited(clean, edit, random.Random(0))
    assert changed.size == clean.size and changed.tobytes() != clean.tobytes()
    if edit != "turn":
        for shape in shapes:
            x, y, r = round(shape.x), round(shape.y + 4), 6
            patch = np.asarray(changed.crop((x - r, y - r, x + r, y + r))).reshape(-1, 3).mean(0)
            nearest = min(COLORS, key=lambda name: np.abs(patch - COLORS[name]).sum())
            assert nearest == shape.color


def test_pixels_reach_the_model_and_nothing_is_left_behind(vlm):
    model, processor, _ = vlm
    seen = []
    hook = model.model.vision_tower.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["pixel_values"] if not args else args[0]), with_kwargs=True
    )
    model.train()
    state, items = torch.get_rng_state(), [slot[0] for slot in vlm_items("truthfulness", 3)]
    said = generate_vlm(model, processor, items, batch_size=2, max_new_tokens=8)
    hook.remove()
    assert len(said) == 3 and model.training and torch.equal(state, torch.get_rng_state())
    assert [tuple(batch.shape) for batch in seen] == [(2, 3, 64, 64), (1, 3, 64, 64)]
    assert not torch.equal(seen[0][0], seen[0][1])
    assert render_vlm(processor, items[0]).count("<image>") == 1
    # one at a time or padded together, the same words
    assert said == generate_vlm(model, processor, items, batch_size=1, max_new_tokens=8)


def test_blank_pictures_change_the_score(vlm):
    """A model that says how dark the picture is: its verdicts come from what the processor hands it."""
    model, processor, _ = vlm
    said = {
        True: processor.tokenizer("ANSWER: UNKNOWN")["input_ids"],
        False: processor.tokenizer("ANSWER: 1")["input_ids"],
    }
    generate = model.generate

    def by_light(pixel_values, input_ids, **kwargs):
        white = pixel_values.flatten(1).std(1) < 0.3  # normalized channels alone differ
        rows = [said[int(is_white)] for is_white in white]
        longest = max(map(len, rows))
        pad = processor.tokenizer.pad_token_id
        return torch.cat([input_ids, torch.tensor([row + [pad] * (longest - len(row)) for row in rows])], dim=1)

    model.generate = by_light
    try:
        drawn, blank = (run_vlm_suite(model, processor, n_per_dim=8, dims="honesty", blank=b) for b in (False, True))
    finally:
        model.generate = generate
    assert drawn["honesty"].value == 0 and blank["honesty"].value == 0.5  # UNKNOWN is right where the label is absent
    assert blank.meta["blank"] and not drawn.meta["blank"]


def test_blank_pictures_change_what_the_real_model_computes(vlm):
    model, processor, _ = vlm
    item = vlm_items("truthfulness", 1)[0][0]
    shown = [item.images[0], draw_scene([])]
    batch = processor(text=[render_vlm(processor, item)] * 2, images=[[image] for image in shown], return_tensors="pt")
    with torch.no_grad():
        logits = model.eval()(**batch).logits[:, -1]
    assert (logits[0] - logits[1]).abs().max() > 1e-4


@pytest.mark.parametrize("template", [True, False])
def test_the_suite_reports_five_dimensions(vlm, template):
    model, processor, _ = vlm
    kept = processor.chat_template
    processor.chat_template = kept if template else None
    try:
        report = run_vlm_suite(model, processor, n_per_dim=8, max_new_tokens=8)
    finally:
        processor.chat_template = kept
    assert set(BUILDERS) <= {score.name for score in report.scores}
    assert {score.name: score.n for score in report.scores}["robustness"] == 8
    assert report.suite == "vlm" and report.meta["items"] == 48
    assert all(answer_of(f"ANSWER: {i.target}") for slot in vlm_items("privacy", 8) for i in slot)


def test_command_and_refusals(vlm, tmp_path, capsys, tiny_model_path):
    words = ["eval", "--model", vlm[2], "--suite", "vlm", "--n_per_dim", "8", "--max_new_tokens", "8"]
    assert cli.main([*words, "--out", str(tmp_path)]) == 0
    assert "policy_adherence/obeyed" in capsys.readouterr().out
    assert TrustReport.load(tmp_path / "report.json").suite == "vlm"
    with pytest.raises(ValueError, match="the model has no image processor"):
        run_vlm_suite(None, AutoTokenizer.from_pretrained(tiny_model_path))
    with pytest.raises(ValueError, match="n_per_dim=4 must be at least 8"):
        run_vlm_suite(*vlm[:2], n_per_dim=4)
