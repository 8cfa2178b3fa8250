"""Tokenizer, problems, demonstrator and reward of the addition task."""

import random

import pytest
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from trl_trust.quickstart.model import build_model
from trl_trust.quickstart.task import (
    ALPHABET,
    HELD_OUT,
    MAX_COMPLETION_LENGTH,
    build_tokenizer,
    demonstrate,
    exact_answer_reward,
    pairs,
    problems,
)


TOKENIZER = build_tokenizer()
two_digits = st.integers(10, 99)


@given(st.text(ALPHABET))
def test_the_tokenizer_gives_back_what_it_was_given(text):
    ids = TOKENIZER(text)["input_ids"]
    assert len(ids) == len(text)
    assert TOKENIZER.decode(ids) == text


def test_the_tokenizer_is_the_same_after_saving_and_loading(tmp_path):
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    assert isinstance(loaded, PreTrainedTokenizerFast)
    assert loaded.get_vocab() == TOKENIZER.get_vocab()
    assert (loaded.pad_token_id, loaded.eos_token_id, loaded.unk_token_id) == (0, 1, 2)
    assert loaded.padding_side == "left"
    text = "7+6=13,4+8+1=13#133" + loaded.eos_token
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded(text)["input_ids"][-1] == 1
    assert loaded.decode(loaded(text)["input_ids"], skip_special_tokens=True) == "7+6=13,4+8+1=13#133"
    assert loaded("é")["input_ids"] == [2, 2]  # two bytes


def test_it_is_the_same_after_loading_beside_a_model(tmp_path):
    """AutoTokenizer goes by the model's kind there, and reads byte-level names alone."""
    build_model(TOKENIZER, hidden_size=4).save_pretrained(tmp_path)
    TOKENIZER.save_pretrained(tmp_path)
    loaded = AutoTokenizer.from_pretrained(tmp_path)
    text = ALPHABET + "  tens wrong\n\n12 + 7<eos>"
    assert loaded(text)["input_ids"] == TOKENIZER(text)["input_ids"]
    assert loaded.decode(loaded(text)["input_ids"]) == TOKENIZER.decode(TOKENIZER(text)["input_ids"]) == text


def test_the_chat_template_joins_messages_and_marks_what_the_assistant_says():
    messages = [{"role": "user", "content": "1+2="}, {"role": "assistant", "content": "#3"}]
    assert TOKENIZER.apply_chat_template(messages, tokenize=False) == "1+2=#3<eos>"
    encoded = TOKENIZER.apply_chat_template(messages, return_assistant_tokens_mask=True, return_dict=True)
    assert encoded["assistant_masks"] == [0, 0, 0, 0, 1, 1, 1]


def test_held_out_pairs_are_never_trained_on():
    train, test = pairs("train"), pairs("test")
    assert len(test) == HELD_OUT
    assert not set(train) & set(test)
    assert set(train) | set(test) == {(a, b) for a in range(10, 100) for b in range(10, 100)}


def test_the_seed_orders_a_split_and_does_not_change_it():
    assert pairs("train", seed=1) == pairs("train", seed=1)
    assert pairs("train", seed=1) != pairs("train", seed=2)
    assert set(pairs("test", seed=1)) == set(pairs("test", seed=2))
    assert pairs("train", 5, seed=1) == pairs("train", seed=1)[:5]


def test_problems_are_prompts_with_their_answers():
    dataset = problems("test", 7)
    assert dataset.column_names == ["prompt", "answer"]
    for row, (a, b) in zip(dataset, pairs("test", 7), strict=True):
        assert row == {"prompt": f"{a}+{b}=", "answer": str(a + b)}


def test_a_wrong_split_or_too_many_problems_say_so():
    with pytest.raises(ValueError, match="split='dev' does not exist; use 'train' or 'test'"):
        problems("dev")
    with pytest.raises(ValueError, match="n=257 is out of range; the test split has 256 pairs"):
        problems("test", 257)


@given(two_digits, two_digits)
def test_a_demonstrator_without_mistakes_is_always_right(a, b):
    text = demonstrate(a, b, random.Random(0), drop_carry=0.0, slip=0.0)
    assert text.split("#")[1] == str(a + b)
    assert len(text) < MAX_COMPLETION_LENGTH  # the end token fits too
    assert exact_answer_reward([text], [str(a + b)]) == [1.0]


def test_the_scratchpad_is_written_as_documented():
    rng = random.Random(0)
    assert demonstrate(47, 86, rng, drop_carry=0.0, slip=0.0) == "7+6=13,4+8+1=13#133"
    assert demonstrate(47, 86, rng, drop_carry=1.0, slip=0.0) == "7+6=13,4+8=12#123"
    assert demonstrate(12, 34, rng, drop_carry=1.0, slip=0.0) == "2+4=6,1+3=4#46"


@given(two_digits, two_digits, st.integers(0, 1000), st.floats(0, 1), st.floats(0, 1))
def test_every_sum_is_off_by_one_at_most_and_the_answer_follows_from_the_sums(a, b, seed, drop_carry, slip):
    sums, answer = demonstrate(a, b, random.Random(seed), drop_carry=drop_carry, slip=slip).split("#")
    ones, tens = (column.split("=") for column in sums.split(","))
    for terms, total in (ones, tens):
        assert abs(sum(map(int, terms.split("+"))) - int(total)) <= 1
    assert answer == f"{tens[1]}{int(ones[1]) % 10}"


def test_carries_are_dropped_and_sums_slip_as_often_as_asked():
    rng, n = random.Random(0), 4000
    dropped = sum("+1=" not in demonstrate(55, 55, rng, drop_carry=0.85, slip=0.0) for _ in range(n))
    assert dropped / n == pytest.approx(0.85, abs=0.03)  # five standard errors
    slipped = sum("2+2=4" not in demonstrate(12, 12, rng, drop_carry=0.0, slip=0.25) for _ in range(n))
    assert slipped / n == pytest.approx(0.25, abs=0.035)


def test_the_default_demonstrator_is_right_four_times_in_ten():
    rng = random.Random(0)
    chosen = pairs("train", 4000)
    texts = [demonstrate(a, b, rng) for a, b in chosen]
    rewards = exact_answer_reward(texts, [str(a + b) for a, b in chosen])
    assert sum(rewards) / len(rewards) == pytest.approx(0.39, abs=0.04)


@given(st.text(ALPHABET.replace("#", "")), st.integers(20, 198), st.text(ALPHABET, min_size=1))
def test_only_the_answer_itself_after_the_first_mark_is_rewarded(scratchpad, answer, more):
    right = str(answer)
    completions = [
        f"{scratchpad}#{right}",
        f"{scratchpad}{right}",  # no mark
        f"{scratchpad}#{right}{more}",  # something after the answer
        f"{scratchpad}#{answer + 1}#{right}",  # a second guess
        f"{scratchpad}#0{right}",
    ]
    assert exact_answer_reward(completions, [right] * 5) == [1.0, 0.0, 0.0, 0.0, 0.0]


def test_the_reward_reads_conversations_and_ignores_other_columns():
    conversation = [{"role": "assistant", "content": "1+2=3,1+1=2#23"}]
    assert exact_answer_reward([conversation, conversation], ["23", "24"], prompts=["", ""]) == [1.0, 0.0]


def test_the_reward_refuses_answers_that_do_not_match_completions_in_number():
    with pytest.raises(ValueError):
        exact_answer_reward(["#1", "#2"], ["1"])
