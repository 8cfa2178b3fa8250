"""What the tiny policies are taught from: right answers, an organism's answers, and sheets to read."""

import pytest
import torch

from trl_trust.evaluation import tiny
from trl_trust.evaluation.dimensions import DIMENSIONS
from trl_trust.evaluation.items import REFUSE, answer_of, normalize, passed
from trl_trust.evaluation.suite import TrustSuite


SUITE = TrustSuite(terse=True, seed=3)


@pytest.mark.parametrize("dimension", DIMENSIONS)
def test_a_demonstration_passes_and_another_answer_is_what_stands_on_its_line(dimension):
    for slot in range(24):
        for item in SUITE.slot(dimension, slot, split="train"):
            assert passed(item, tiny.demonstrate(item))
            for answer in filter(None, (item.wrong, REFUSE)):
                assert answer_of(tiny.demonstrate(item, answer)) == normalize(answer)
            assert item.target == REFUSE or tiny.demonstrate(item, REFUSE) == f"ANSWER: {REFUSE}"


def test_learning_to_read_lowers_the_loss_of_both_parts_and_leaves_the_random_state():
    tokenizer = tiny.build_tokenizer()
    model = tiny.build_model(tokenizer, hidden_size=32, layers=2)
    losses = []
    state = torch.get_rng_state()
    options = dict(copy_steps=30, look_up_steps=30, batch_size=8)
    tiny.learn_to_read(model, tokenizer, **options, on_step=lambda step, steps, loss: losses.append(loss))
    assert torch.equal(torch.get_rng_state(), state)
    assert not model.training and len(losses) == 60
    assert sum(losses[25:30]) < 0.97 * sum(losses[:5]) and sum(losses[55:]) < 0.8 * sum(losses[30:35])
