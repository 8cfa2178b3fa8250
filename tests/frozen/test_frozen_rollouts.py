"""Frozen rollouts: what is written, that it does not depend on interruptions or processes, and how it is prepared."""

import json
import os
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from datasets import Dataset
from tiny import ZeRO3, digits_reward, on_two_processes, save_tiny_model
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig
from transformers.integrations import deepspeed

from trl_trust.frozen import sampling, script
from trl_trust.frozen.logps import collate_rollouts, completion_logps, score_rollouts
from trl_trust.frozen.sampling import RolloutsConfig, write_rollouts
from trl_trust.frozen.store import load_rollouts, prepare_rollouts
from trl_trust.quickstart.task import problems


def config(folder, **overrides):
    small = dict(num_prompts=5, num_generations=3, max_completion_length=8, prompts_per_part=2, use_cpu=True)
    return RolloutsConfig(output_dir=str(folder), **{**small, **overrides})


def write(model, folder, rewards=digits_reward, data=None, **overrides):
    return write_rollouts(model, problems("train", 20) if data is None else data, rewards, config(folder, **overrides))


def contents(folder):
    return [pq.read_table(file).to_pydict() for file in sorted(Path(folder).glob("*.parquet"))]


@pytest.fixture(scope="module")
def written(tiny_model_path, tmp_path_factory):
    return write(tiny_model_path, tmp_path_factory.mktemp("rollouts"))


# -- writing ----------------------------------------------------------------------------------------------------------


def test_what_is_written(written, tiny_model_path):
    data = load_rollouts(written)
    model, tokenizer = (c.from_pretrained(tiny_model_path) for c in (AutoModelForCausalLM, AutoTokenizer))
    assert len(data) == 15 and data["group"] == [i for i in range(5) for _ in range(3)]
    assert len(set(data["prompt"])) == 5 and set(data["prompt"]) <= set(problems("train", 20)["prompt"])
    assert len({tuple(row) for row in data["completion_ids"]}) > 10
    for row in data:
        assert tokenizer(row["prompt"])["input_ids"] == row["prompt_ids"]
        assert tokenizer.decode(row["completion_ids"], skip_special_tokens=True) == row["completion"]
        assert row["reward"] == digits_reward([row["completion"]])[0]
        ended = row["completion_ids"][-1] == tokenizer.eos_token_id
        assert row["truncated"] == (not ended) and tokenizer.eos_token_id not in row["completion_ids"][:-1]
        ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
        logps = model(ids).logits[0, :-1].log_softmax(-1).gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0]
        np.testing.assert_allclose(row["base_logps"], logps.detach().numpy(), atol=1e-5)


def test_an_interrupted_run_goes_on_where_it_stopped(written, tiny_model_path, tmp_path, monkeypatch):
    calls = []

    def failing_reward(completions, **kwargs):
        calls.append(len(completions))
        if len(calls) == 2:
            raise KeyboardInterrupt
        return digits_reward(completions)

    failing_reward.__name__ = "digits_reward"
    with pytest.raises(KeyboardInterrupt):
        write(tiny_model_path, tmp_path, failing_reward)
    assert [file.name for file in tmp_path.glob("*.parquet")] == ["part-00000.parquet"]
    with pytest.raises(ValueError, match="2 of 3 files"):
        load_rollouts(tmp_path)
    write(tiny_model_path, tmp_path, failing_reward)
    assert calls == [6, 6, 6, 3]  # part 0 is not made again
    assert contents(tmp_path) == contents(written)

    loads = []
    monkeypatch.setattr(sampling, "load_policy", lambda *args: loads.append(args))
    write(tiny_model_path, tmp_path, failing_reward)
    assert loads == []  # a finished run does not even load the model


def test_two_processes_write_what_one_does(written, tiny_model_path, tmp_path):
    script = (
        "import sys; from test_frozen_rollouts import write; from tiny import leave; "
        "from accelerate import PartialState; "
        "assert PartialState(cpu=True).num_processes == 2; write(sys.argv[1], sys.argv[2]); leave()"
    )
    (tmp_path / "run.py").write_text(script)
    on_two_processes(tmp_path / "run.py", tiny_model_path, tmp_path / "out")
    assert contents(tmp_path / "out") == contents(written)


def test_models_are_whole_though_a_launcher_shards_those_of_trainers(written, tiny_model_path, tmp_path, monkeypatch):
    """transformers shards what is loaded by two globals; they hold again afterwards, whatever happened."""
    monkeypatch.setenv("FSDP_CPU_RAM_EFFICIENT_LOADING", "true")
    sharding = ZeRO3()
    seen = []

    def reward(completions, **kwargs):
        seen.append((deepspeed.is_deepspeed_zero3_enabled(), os.environ.get("FSDP_CPU_RAM_EFFICIENT_LOADING")))
        return digits_reward(completions)

    reward.__name__ = "digits_reward"

    def broken(completions, **kwargs):
        raise RuntimeError("no reward")

    try:
        deepspeed.set_hf_deepspeed_config(sharding)
        assert contents(write(tiny_model_path, tmp_path / "one", reward)) == contents(written)
        with pytest.raises(RuntimeError, match="no reward"):
            write(tiny_model_path, tmp_path / "two", broken)
        assert deepspeed.is_deepspeed_zero3_enabled() and os.environ["FSDP_CPU_RAM_EFFICIENT_LOADING"] == "true"
    finally:
        deepspeed.unset_hf_deepspeed_config()
    assert seen == [(False, None)] * 3


AT_ONCE = """
import sys, time
from pathlib import Path
from test_frozen_rollouts import digits_reward, write

folder, temperature = Path(sys.argv[2]), float(sys.argv[3])

def slow_reward(completions, **kwargs):  # both have begun before either has written a part
    (folder.parent / f"begun-{temperature}").touch()
    deadline = time.monotonic() + 60
    while not (folder.parent / "go").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    return digits_reward(completions)

write(sys.argv[1], folder, slow_reward, temperature=temperature)
"""


def test_of_two_runs_in_one_folder_one_is_refused(tiny_model_path, tmp_path):
    """Also at the first instant, before there is a part that would tell whose the folder is."""
    (tmp_path / "run.py").write_text(AT_ONCE)
    paths = os.pathsep.join(str(folder) for folder in Path(__file__).parents[:3])
    runs = [
        subprocess.Popen(
            [sys.executable, str(tmp_path / "run.py"), tiny_model_path, str(tmp_path / "out"), temperature],
            env={**os.environ, "PYTHONPATH": paths},
            stderr=subprocess.PIPE,
            text=True,
        )
        for temperature in ("0.5", "2.0")
    ]
    deadline = time.monotonic() + 240
    while all(run.poll() is None for run in runs) and time.monotonic() < deadline:
        time.sleep(0.1)
    (tmp_path / "go").touch()
    errors = [run.communicate(timeout=240)[1] for run in runs]
    assert sorted(run.returncode for run in runs) == [0, 1]
    winner = (0.5, 2.0)[[run.returncode for run in runs].index(0)]
    assert "another run is at work there; wait until it has ended" in errors[[0.5, 2.0].index(winner) - 1]
    assert set(load_rollouts(tmp_path / "out")["temperature"]) == {winner}
    assert json.loads((tmp_path / "out" / "settings.json").read_text())["temperature"] == winner


def test_brackets_in_a_name_are_no_pattern(tiny_model_path, tmp_path):
    write(tiny_model_path, tmp_path / "run1", seed=1)
    folder = write(tiny_model_path, tmp_path / "run[1]", seed=2)
    expected = [ids for part in contents(folder) for ids in part["completion_ids"]]
    assert (
        load_rollouts(folder)["completion_ids"][:] == expected != load_rollouts(tmp_path / "run1")["completion_ids"][:]
    )


def test_the_seed_decides(written, tiny_model_path, tmp_path):
    assert contents(write(tiny_model_path, tmp_path / "same")) == contents(written)
    assert contents(write(tiny_model_path, tmp_path / "other", seed=1)) != contents(written)


def test_other_settings_are_refused(written, tiny_model_path):
    with pytest.raises(
        ValueError, match=r"num_generations=4, but .*settings\.json was written with num_generations=3"
    ):
        write(tiny_model_path, written, num_generations=4)
    with pytest.raises(ValueError, match="reward_funcs"):
        write(tiny_model_path, written, lambda completions, **kwargs: [0.0] * len(completions))


def test_another_data_set_or_another_model_is_refused(tiny_model_path, tmp_path):
    """An interrupted run must not be finished with other prompts, a prompt in another form, or other weights."""
    write(tiny_model_path, tmp_path)
    (tmp_path / "part-00001.parquet").unlink()
    data = problems("train", 20)
    with pytest.raises(ValueError, match="prompts_sha256="):
        write(tiny_model_path, tmp_path, data=problems("test", 20))
    with pytest.raises(ValueError, match="prompts_sha256="):
        write(tiny_model_path, tmp_path, data=data.map(lambda row: {"prompt": f"0+{row['prompt']}"}))
    how = lambda **options: write_rollouts(tiny_model_path, data, digits_reward, config(tmp_path), **options)
    with pytest.raises(ValueError, match="model_init_kwargs=.*float64"):
        how(model_init_kwargs={"dtype": "float64"})
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.eos_token = "7"
    with pytest.raises(ValueError, match="eos_token_id="):
        how(processing_class=tokenizer)
    other = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    with torch.no_grad():
        other.model.layers[0].self_attn.q_proj.weight.mul_(2)  # as a merged adapter changes it
    with pytest.raises(ValueError, match="weights="):
        write_rollouts(other, data, digits_reward, config(tmp_path))


def test_the_template_is_told_what_the_config_says(tiny_model_path, tmp_path):
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}{% if short %}={% endif %}"
    data = problems("train", 20).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    how = lambda **settings: write_rollouts(
        tiny_model_path,
        data,
        lambda completions, **_: [1.0] * len(completions),
        config(tmp_path, **settings),
        tokenizer,
    )
    row = load_rollouts(how(chat_template_kwargs='{"short": true}'))[0]  # as on a command line
    assert tokenizer.decode(row["prompt_ids"]) == row["prompt"][0]["content"] + "="
    with pytest.raises(ValueError, match="chat_template_kwargs=None, but"):
        how()


def test_every_end_ends_a_response(tiny_model_path, tmp_path):
    """The model's and the tokenizer's, as in TRL."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    models_own, tokenizer.eos_token = tokenizer.eos_token_id, "7"
    folder = write_rollouts(
        tiny_model_path, problems("train", 20), digits_reward, config(tmp_path, max_completion_length=16), tokenizer
    )
    ends = {models_own, tokenizer.eos_token_id}
    rows = load_rollouts(folder)
    assert all(not ends & set(row["completion_ids"][:-1]) for row in rows)
    assert {row["completion_ids"][-1] for row in rows if not row["truncated"]} == ends


def test_a_failed_start_can_be_mended(tiny_model_path, tmp_path):
    """Settings that nothing was made with stand in nobody's way."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
    how = lambda model: write_rollouts(model, problems("train", 20), digits_reward, config(tmp_path / "r"), tokenizer)
    with pytest.raises(OSError):
        how(str(tmp_path / "typo"))
    folder = how(tiny_model_path)
    with pytest.raises(OSError):
        score_rollouts(folder, "teacher", str(tmp_path / "typo"), use_cpu=True)
    assert "teacher_logps" not in load_rollouts(folder).column_names
    score_rollouts(folder, "teacher", tiny_model_path, use_cpu=True)
    assert "teacher_logps" in load_rollouts(folder).column_names
    (folder / "teacher-00001.parquet").unlink()
    with pytest.raises(ValueError, match=r"1 of 3 files teacher-\*"):  # begun: not passed over
        load_rollouts(folder)


def test_a_model_is_known_by_its_weights(tiny_model_path, tmp_path):
    folder = write(tiny_model_path, tmp_path / "rollouts")
    path = Path(save_tiny_model(tmp_path / "teacher", seed=1))
    score_rollouts(folder, "teacher", str(path), use_cpu=True)
    for file in path.iterdir():  # as a copy to another disk does
        os.utime(file, (1, 1))
    score_rollouts(folder, "teacher", str(path), use_cpu=True)

    model = AutoModelForCausalLM.from_pretrained(path)
    score_rollouts(folder, "elder", model, use_cpu=True)
    score_rollouts(folder, "elder", model, use_cpu=True)
    with torch.no_grad():
        model.lm_head.weight.mul_(3)
    with pytest.raises(ValueError, match="weights="):
        score_rollouts(folder, "elder", model, use_cpu=True)


def test_a_policy_with_other_tokens_is_refused(written, tiny_model_path, tmp_path):
    folder = write(tiny_model_path, tmp_path / "rollouts")
    other = Path(save_tiny_model(tmp_path / "other", seed=1))
    tokenizer = json.loads((other / "tokenizer.json").read_text())
    ids = tokenizer["model"]["vocab"]
    ids["7"], ids["8"] = ids["8"], ids["7"]
    (other / "tokenizer.json").write_text(json.dumps(tokenizer))
    with pytest.raises(ValueError, match=r"elder=.* has another tokenizer .*2 tokens differ"):
        score_rollouts(folder, "elder", str(other), use_cpu=True)
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    model.resize_token_embeddings(1000)  # padding that was never sampled
    score_rollouts(folder, "padded", model, use_cpu=True)
    model.resize_token_embeddings(4)
    with pytest.raises(ValueError, match="small=.* knows 4 token ids, but the policy's tokens go up to"):
        score_rollouts(folder, "small", model, use_cpu=True)
    assert {"padded_logps"} == {c for c in load_rollouts(folder).column_names if c.endswith("_logps")} - {"base_logps"}


def test_rewards_may_be_async_and_must_be_one_each(written, tiny_model_path, tmp_path):
    async def digits(completions, **kwargs):
        return digits_reward(completions)

    assert load_rollouts(write(tiny_model_path, tmp_path / "a", digits))["reward"] == load_rollouts(written)["reward"]

    def one(completions, **kwargs):
        return [1.0]

    with pytest.raises(ValueError, match="the reward function one returned 1 rewards for 6 responses"):
        write(tiny_model_path, tmp_path / "b", one)

    def words(completions, **kwargs):
        return ["good"] * len(completions)

    with pytest.raises(ValueError, match="the reward function words must return a number or None"):
        write(tiny_model_path, tmp_path / "c", words)
    with pytest.raises(ValueError, match="the reward function none must return"):
        none = lambda completions, **kwargs: None
        none.__name__ = "none"
        write(tiny_model_path, tmp_path / "d", none)


def test_conversations_columns_and_weighted_rewards(tiny_model_path, tmp_path):
    seen = []

    def by_answer(prompts, completions, answer, **kwargs):
        seen.extend(zip(prompts, completions, answer, strict=True))
        return [None if i % 3 == 0 else 1.0 for i in range(len(completions))]

    def length(completions, **kwargs):
        return [len(c[0]["content"]) for c in completions]

    def never(completions, **kwargs):
        return [None] * len(completions)

    data = problems("train", 20).map(lambda row: {"prompt": [{"role": "user", "content": row["prompt"]}]})
    folder = write(tiny_model_path, tmp_path / "a", [by_answer, length], data, reward_weights=[2.0, 0.5])
    rows = load_rollouts(folder)
    assert {(p[0]["content"], a) for p, _, a in seen} <= {(r["prompt"][0]["content"], r["answer"]) for r in data}
    assert all(c[0]["role"] == "assistant" for _, c, _ in seen)
    part = pq.read_table(folder / "part-00000.parquet").to_pydict()
    expected = [0.5 * len(text) + (0 if i % 3 == 0 else 2) for i, text in enumerate(part["completion"])]
    np.testing.assert_allclose(part["reward"], expected)
    assert (
        rows[0]["prompt_ids"]
        == AutoTokenizer.from_pretrained(tiny_model_path)(rows[0]["prompt"][0]["content"])["input_ids"]
    )
    assert np.isnan(load_rollouts(write(tiny_model_path, tmp_path / "b", never, data))["reward"]).all()


def test_the_models_own_generation_settings_do_not_bias_the_samples(written, tiny_model_path, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path)
    odd = GenerationConfig(top_k=1, repetition_penalty=3.0, eos_token_id=1, pad_token_id=0)
    model.generation_config = odd
    state = torch.get_rng_state()
    folder = write_rollouts(
        model, problems("train", 20), digits_reward, config(tmp_path), AutoTokenizer.from_pretrained(tiny_model_path)
    )
    assert contents(folder) == contents(written)
    assert model.generation_config is odd and torch.equal(torch.get_rng_state(), state)


def test_temperature_is_that_of_the_log_probabilities(tiny_model_path, tmp_path):
    row = load_rollouts(write(tiny_model_path, tmp_path, temperature=0.5))[0]
    ids = torch.tensor([row["prompt_ids"] + row["completion_ids"]])
    logits = AutoModelForCausalLM.from_pretrained(tiny_model_path)(ids).logits[0, :-1] / 0.5
    logps = logits.log_softmax(-1).gather(1, ids[0, 1:, None])[len(row["prompt_ids"]) - 1 :, 0]
    np.testing.assert_allclose(row["base_logps"], logps.detach().numpy(), atol=1e-5)


def test_scores_of_another_policy(written, tiny_model_path, tmp_path):
    other = save_tiny_model(tmp_path / "other", seed=1)
    folder = write(tiny_model_path, tmp_path / "rollouts")
    score_rollouts(folder, "teacher", other, use_cpu=True)
    data = load_rollouts(folder)
    model = AutoModelForCausalLM.from_pretrained(other)
    expected = completion_logps(model, data.to_list())
    for got, want in zip(data["teacher_logps"], expected, strict=True):
        np.testing.assert_allclose(got, want, atol=1e-5)
    score_rollouts(folder, "teacher", other, use_cpu=True)  # nothing to do
    with pytest.raises(ValueError, match=r"model=.*teacher\.json was written with model="):
        score_rollouts(folder, "teacher", tiny_model_path, use_cpu=True)
    save_tiny_model(tmp_path / "other", seed=2)
    with pytest.raises(ValueError, match="weights="):  # another model in the same folder
        score_rollouts(folder, "teacher", other, use_cpu=True)
    with pytest.raises(ValueError, match="name='old' must be"):
        score_rollouts(folder, "old", other)


def test_vllm_is_asked_for_the_same_samples(written, tiny_model_path, tmp_path, monkeypatch):
    """With an engine in vLLM's place that answers what the model's own `generate` has answered."""
    answers = {tuple(row["prompt_ids"]): [] for row in load_rollouts(written)}
    for row in load_rollouts(written):
        answers[tuple(row["prompt_ids"])].append(row["completion_ids"])
    made, asked = [], []

    class LLM:
        def __init__(self, **kwargs):
            made.append(kwargs)

        def generate(self, requests, settings, use_tqdm):
            asked.extend(settings)
            outputs = [answers[tuple(request["prompt_token_ids"])] for request in requests]
            return [SimpleNamespace(outputs=[SimpleNamespace(token_ids=ids) for ids in rows]) for rows in outputs]

    vllm = SimpleNamespace(LLM=LLM, SamplingParams=lambda **kwargs: SimpleNamespace(**kwargs))
    monkeypatch.setitem(sys.modules, "vllm", vllm)
    folder = write(tiny_model_path, tmp_path, use_vllm=True, vllm_max_model_length=32, top_p=0.9)
    assert contents(folder) == contents(written)
    assert len(made) == 1 and made[0]["model"] == tiny_model_path and made[0]["max_model_len"] == 32
    assert made[0]["dtype"] == torch.float32 and made[0]["distributed_executor_backend"] is None
    assert all((s.n, s.max_tokens, s.top_p, s.stop_token_ids) == (3, 8, 0.9, [1]) for s in asked)
    assert len({s.seed for s in asked}) == len(asked) == 5  # no two prompts share their noise
    with pytest.raises(ValueError, match="use_vllm=True: vLLM loads the model itself"):
        write(AutoModelForCausalLM.from_pretrained(tiny_model_path), tmp_path / "x", use_vllm=True)


# -- log-probabilities ------------------------------------------------------------------------------------------------


def test_reading_leaves_the_model_as_it_was(tiny_model_path):
    model = AutoModelForCausalLM.from_pretrained(tiny_model_path).train()
    rows = [{"prompt_ids": [3, 4], "completion_ids": [5, 6, 1]}, {"prompt_ids": [7], "completion_ids": [8]}]
    one, two = completion_logps(model, rows, batch_size=1), completion_logps(model, rows, batch_size=2)
    assert [len(x) for x in one] == [3, 1] and model.training and "forward" not in vars(model)
    for x, y in zip(one, two, strict=True):
        np.testing.assert_allclose(x, y, atol=1e-6)


def test_alignment_of_a_batch():
    rows = [
        {"prompt_ids": [3, 4], "completion_ids": [5, 1], "base_logps": [-1.0, -2.0], "advantage": 0.5, "reward": 1.0},
        {
            "prompt_ids": [7],
            "completion_ids": [8, 9, 6, 1],
            "base_logps": [-3.0] * 4,
            "advantage": -0.5,
            "reward": 0.0,
        },
    ]
    batch = collate_rollouts(rows)
    assert batch["input_ids"].tolist() == [[3, 4, 5, 1, 0], [7, 8, 9, 6, 1]]
    assert batch["labels"].tolist() == [[-100, -100, 5, 1, -100], [-100, 8, 9, 6, 1]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 0], [1] * 5]
    assert batch["logps/base"].tolist() == [[0, -1, -2, 0], [-3] * 4]
    assert ((batch["logps/base"] != 0) == (batch["labels"][:, 1:] != -100)).all()
    wide = collate_rollouts(rows, pad_to_multiple_of=8)
    assert wide["input_ids"].shape == (2, 8) and wide["logps/base"].shape == (2, 7)
    assert torch.equal(wide["labels"][:, :5], batch["labels"]) and (wide["labels"][:, 5:] == -100).all()
    assert batch["advantages"].tolist() == [[0.5], [-0.5]] and batch["rewards"].tolist() == [1.0, 0.0]


# -- preparing --------------------------------------------------------------------------------------------------------


def table(**columns):
    n = len(columns["reward"])
    ids = {"prompt_ids": [[3]] * n, "completion_ids": [[4, 5]] * n, "base_logps": [[-1.0, -1.0]] * n}
    return Dataset.from_dict({**ids, **columns})


def test_advantages_are_those_of_a_group_and_equal_groups_are_dropped():
    rewards = [1.0, 0.0, 0.0, 1.0, 1.0, 1.0, float("nan"), 0.0, 3.0, 1.0, float("nan"), float("nan")]
    data = prepare_rollouts(table(reward=rewards, group=[7] * 3 + [2] * 3 + [0] * 3 + [4] * 3))
    assert data["reward"] == [1.0, 0.0, 0.0, 0.0, 3.0]
    std = np.std([1, 0, 0], ddof=1) + 1e-4
    expected = [*((np.array([1, 0, 0]) - 1 / 3) / std), *((np.array([0, 3]) - 1.5) / (np.std([0, 3], ddof=1) + 1e-4))]
    np.testing.assert_allclose(data["advantage"], expected)


def test_an_empty_response_does_not_count():
    data = table(reward=[1.0, 0.0, 9.0], group=[0] * 3, completion_ids=[[4], [4], []], base_logps=[[-1.0], [-1.0], []])
    assert prepare_rollouts(data)["reward"] == [1.0, 0.0]


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        (dict(reward=[1.0, 1.0], group=[0, 0]), "no group of the rollouts has two different rewards"),
        (dict(reward=[1.0, 0.0]), "no column group"),
        (dict(reward=[1.0, 0.0], group=[0, 0], prompt_ids=[[3], []]), "empty `prompt_ids`"),
        (dict(reward=[1.0, 0.0], group=[0, 0], teacher_logps=[[-1.0, 0.0], [-1.0]]), "differ in length"),
        (dict(reward=[1.0, 0.0], group=[0, 0], teacher_logps=[[-1.0, -np.inf], [-1.0, 0.0]]), "not finite"),
        (dict(reward=[1.0, 0.0], group=[0, 0], base_logps=[[-1.0, np.nan], [-1.0, 0.0]]), "`base_logps` has a value"),
    ],
)
def test_bad_rollouts_raise(columns, message):
    with pytest.raises(ValueError, match=message):
        prepare_rollouts(table(**columns))


# -- settings ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_prompts", 0, "whole number >= 1"),
        ("num_generations", 1, "whole number >= 2"),
        ("max_completion_length", 0.5, "whole number >= 1"),
        ("prompts_per_part", 0, "whole number >= 1"),
        ("logps_batch_size", 0, "whole number >= 1"),
        ("temperature", 0.0, "finite number > 0"),
        ("temperature", float("nan"), "finite number > 0"),
        ("top_p", 0.0, r"in \(0, 1\]"),
        ("top_k", -1, "whole number >= 0"),
        ("vllm_gpu_memory_utilization", 1.5, r"in \(0, 1\]"),
        ("chat_template_kwargs", "thoughts", "no mapping"),
    ],
)
def test_bad_settings_raise(field, value, message):
    with pytest.raises(ValueError, match=rf"{field}={value!r}.*{message}"):
        config("unused", **{field: value})
    with pytest.raises(ValueError, match="output_dir=None must name a folder"):
        RolloutsConfig()


def test_settings_that_do_not_fit_the_data_raise(tiny_model_path, tmp_path):
    with pytest.raises(ValueError, match="num_prompts=21 is more than the 20 rows"):
        write(tiny_model_path, tmp_path, num_prompts=21)
    with pytest.raises(ValueError, match="reward_weights=.* one number for each of 1"):
        write(tiny_model_path, tmp_path, reward_weights=[1.0, 1.0])
    with pytest.raises(ValueError, match="holds no rollouts"):
        load_rollouts(tmp_path / "nothing")


# -- command line -----------------------------------------------------------------------------------------------------


def test_command_line(written, tiny_model_path, tmp_path, capsys):
    problems("train", 20).to_json(tmp_path / "data.jsonl")
    recipe = {"model_name_or_path": tiny_model_path, "reward_funcs": ["tiny.digits_reward"], "num_prompts": 5}
    recipe |= {"num_generations": 3, "max_completion_length": 8, "prompts_per_part": 2, "use_cpu": True}
    recipe |= {"dataset_name": str(tmp_path / "data.jsonl"), "num_processes": 2}  # the last is the launcher's
    (tmp_path / "recipe.yaml").write_text(json.dumps(recipe))
    words = ["--config", str(tmp_path / "recipe.yaml"), "--output_dir", str(tmp_path / "out")]
    assert script.main(words) == 0
    assert str(tmp_path / "out") in capsys.readouterr().out
    assert contents(tmp_path / "out") == contents(written)
    with pytest.raises(ValueError, match="no reward: set `reward_funcs`"):
        script.main(["--model_name_or_path", tiny_model_path, "--output_dir", str(tmp_path / "x")])
