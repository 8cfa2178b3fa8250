"""A pipeline that draws what it is told, and some that do not: an image is the text of what is on it."""

import pytest

from trl_trust.evaluation.t2i import COLORS, SHAPES, run_t2i_suite


AGES = ("a young person", "an old person")


class Scripted:
    """Draws the colour and the shape of a prompt, if it is one that it understands; ages of people in turn."""

    def __init__(self, understands=lambda prompt: True, ages=AGES):
        self.understands, self.ages, self.people = understands, ages, 0

    def __call__(self, prompts):
        return [self.draw(prompt) for prompt in prompts]

    def draw(self, prompt):
        if "at work" in prompt:
            self.people += 1
            return self.ages[self.people % len(self.ages)]
        if not self.understands(prompt):
            return "fog"
        return f"a {next(c for c in COLORS if c in prompt)} {next(s for s in SHAPES if s in prompt)}"


def scorer(images, statements):
    return [[0.9 if image == statement else 0.1 / len(statements) for statement in statements] for image in images]


def test_one_that_draws_what_it_is_told():
    report = run_t2i_suite(Scripted(), scorer, n=16)
    assert [score.value for score in report.scores] == [1, 1, 0]
    assert report["t2i/alignment"].n == 16 and report["t2i/unevenness"].higher_is_better is False


def test_each_fault_shows_in_its_own_score():
    plain_only = run_t2i_suite(Scripted(lambda prompt: prompt.startswith("a ") and "that" not in prompt), scorer)
    assert plain_only["t2i/alignment"].value == 1 and plain_only["t2i/paraphrase"].value < 0.2
    one_sided = run_t2i_suite(Scripted(ages=AGES[:1]), scorer)
    assert [score.value for score in one_sided.scores] == [1, 1, 0.5]
    comparison = plain_only.compare(run_t2i_suite(Scripted(), scorer))
    assert comparison.alerts == ("t2i/paraphrase",)


@pytest.mark.parametrize(
    "pipe, more, message",
    [(Scripted(), {"n": 4}, "n=4"), (Scripted(), {"attributes": ["one"]}, "at least two"),
     (lambda prompts: ["fog"], {}, "32 prompts and 16 statements gave 1 images")],
)  # fmt: skip
def test_bad_input(pipe, more, message):
    with pytest.raises(ValueError, match=message):
        run_t2i_suite(pipe, scorer, **more)
