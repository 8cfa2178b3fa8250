"""Group-robust GRPO as it trains: off and one group are TRL's trainer, the adversary follows its closed form."""

import logging
import math
from dataclasses import dataclass

import pytest
import torch
from tiny import on_two_processes, parameter_gap, tiny_config, tiny_run, tiny_trainer
from trl import GRPOConfig, GRPOTrainer

from trl_trust.policy.dispo import DISPOConfig, DISPOTrainer
from trl_trust.policy.opmd import OPMDTrainer
from trl_trust.policy.trpa import TRPATrainer
from trl_trust.quickstart.task import problems
from trl_trust.robust.consistency import SiblingAnswers, consistency_reward, flip_rate
from trl_trust.robust.rl import GroupRLSettings, GroupRobustMixin, RobustGRPOConfig, RobustGRPOTrainer
from trl_trust.robust.weights import row_weights


def grouped(count=2, rows=32):
    data = problems("train", rows)
    return data.add_column("topic", [f"t{i % count}" for i in range(rows)])


def by_topic(completions, topic, **kwargs):
    """Digits earn more under topic t0, and a t1 is never worth more than a half."""
    share = [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
    return [x if name == "t0" else x / 2 for x, name in zip(share, topic, strict=True)]


def entries(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


class Watch(RobustGRPOTrainer):
    """Keeps the advantages of the host, those that came of them, what the adversary saw, and the answers."""

    def extend_rollouts(self, rollouts):
        self.answers = self.siblings and list(self.siblings.fresh)
        extras = super().extend_rollouts(rollouts)
        self.seen = (rollouts.tensors["advantages"].clone(), extras.get("advantages"), rollouts)
        return extras


@pytest.mark.parametrize("scale_rewards", ["group", "none"])
def test_off_and_one_group_are_trl_to_the_bit(scale_rewards, tiny_model_path, tmp_path):
    settings = dict(scale_rewards=scale_rewards, reward_range=[0.0, 1.0], train_dataset=grouped(1))
    data, reward_range = settings.pop("train_dataset"), settings.pop("reward_range")
    stock = tiny_run(GRPOTrainer, tiny_model_path, tiny_config(GRPOConfig, tmp_path, **settings), train_dataset=data)
    for column in (None, "topic"):
        args = tiny_config(RobustGRPOConfig, tmp_path, **settings, group_column=column, reward_range=reward_range)
        robust = tiny_run(RobustGRPOTrainer, tiny_model_path, args, train_dataset=data)
        assert parameter_gap(stock.model, robust.model) == 0.0
        assert bool(entries(robust, "robust/weight_max")) == (column is not None)


def test_the_adversary_follows_its_closed_form(tiny_model_path, tmp_path):
    args = tiny_config(RobustGRPOConfig, tmp_path, group_column="topic", group_eta=0.5, max_steps=12)
    trainer = tiny_run(Watch, tiny_model_path, args, train_dataset=grouped(), reward_funcs=by_topic)
    rewards = [{g: e[f"robust/{g}/reward"] for g in ("t0", "t1") if f"robust/{g}/reward" in e}
               for e in trainer.state.log_history if "robust/weight_max" in e]  # fmt: skip
    assert len(rewards) == 3  # one a generation batch
    grown = torch.tensor([math.exp(0.5 * sum(1 - r[g] for r in rewards if g in r)) for g in ("t0", "t1")])
    q = trainer.groups.q
    torch.testing.assert_close(q, (grown / grown.sum()).double(), atol=1e-6, rtol=0)
    assert q[1] > q[0] and entries(trainer, "robust/t1/q")[-1] == pytest.approx(q[1].item())
    assert entries(trainer, "robust/worst")[-1] == min(rewards[-1].values())

    before, after, rollouts = trainer.seen
    weights = row_weights(q, torch.tensor([int(row["topic"] == "t1") for row in rollouts.examples]))
    torch.testing.assert_close(after, before * weights.to(before.dtype))  # after the host's normalization
    assert not torch.equal(after, before)


def test_evaluation_neither_steps_nor_weighs(tiny_model_path, tmp_path):
    args = tiny_config(RobustGRPOConfig, tmp_path, group_column="topic", per_device_eval_batch_size=4)
    trainer = tiny_trainer(Watch, tiny_model_path, args, train_dataset=grouped(), eval_dataset=problems("train", 4))
    trainer.evaluate()
    assert trainer.seen[1] is None and trainer.groups.q.tolist() == [0.5, 0.5]


def test_a_resumed_run_equals_the_uninterrupted_one(tiny_model_path, tmp_path):
    def train(folder, max_steps, resume=None, **settings):
        args = tiny_config(RobustGRPOConfig, tmp_path / folder, max_steps=max_steps, group_eta=0.5,
                           save_strategy="steps", save_steps=4, **{"group_column": "topic"} | settings)  # fmt: skip
        data = grouped().add_column("other", ["a", "b"] * 16)
        trainer = tiny_trainer(RobustGRPOTrainer, tiny_model_path, args, train_dataset=data)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, checkpoint = train("a", 8), str(tmp_path / "a" / "checkpoint-4")
    resumed = train("b", 8, checkpoint)
    assert parameter_gap(whole.model, resumed.model) == 0.0
    assert whole.method_state() == resumed.method_state() and whole.groups.q[0] != 0.5
    with pytest.raises(ValueError, match="the checkpoint weighs groups, and group_column is None"):
        train("c", 8, checkpoint, group_column=None)
    with pytest.raises(ValueError, match="weighs the groups t0, t1, and group_column='other' has a, b"):
        train("d", 8, checkpoint, group_column="other")


def test_a_reward_outside_the_range_is_said_once(tiny_model_path, tmp_path, caplog):
    args = tiny_config(RobustGRPOConfig, tmp_path, group_column="topic", max_steps=8)
    with caplog.at_level(logging.WARNING):
        trainer = tiny_run(
            RobustGRPOTrainer,
            tiny_model_path,
            args,
            train_dataset=grouped(),
            reward_funcs=lambda completions, **_: [7.0] * len(completions),
        )
    said = [r.message for r in caplog.records if "lies outside reward_range=[0.0, 1.0]" in r.message]
    assert len(said) == 1 and trainer.groups.q.tolist() == [0.5, 0.5]


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(group_eta=-1), "group_eta=-1 must be"),
        (dict(weighting="equal"), "weighting='equal' must be 'frequency' or 'plain'"),
        (dict(max_weight=0.5), "max_weight=0.5 must be at least 1"),
        (dict(max_weight=math.nan), "max_weight=nan must be at least 1"),
        (dict(group_column=""), "group_column='' must name a column"),
        (dict(reward_range=[1.0, 0.0]), "reward_range=.* must be two finite numbers"),
        (dict(q_min=1.5), "q_min=1.5 must be"),
    ],
)
def test_bad_settings_are_a_line(settings, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        tiny_config(RobustGRPOConfig, tmp_path, **settings)


def test_bad_data_are_a_line(tiny_model_path, tmp_path):
    def build(data, **settings):
        args = tiny_config(RobustGRPOConfig, tmp_path, **{"group_column": "topic"} | settings)
        return tiny_trainer(RobustGRPOTrainer, tiny_model_path, args, train_dataset=data)

    with pytest.raises(ValueError, match="group_column='topik' is not in the data, which have .*topic"):
        build(grouped(), group_column="topik")
    with pytest.raises(ValueError, match="has 5 different values, more than max_groups=4"):
        build(grouped(5), max_groups=4)
    with pytest.raises(ValueError, match=r"q_min=0.5 must be below 1 / 2"):
        build(grouped(), q_min=0.5)
    with pytest.raises(ValueError, match="rows without a value"):
        build(problems("train", 32).add_column("topic", ["a", None] * 16))
    with pytest.raises(ValueError, match="load it without streaming"):
        build(grouped().to_iterable_dataset())


def test_it_composes_with_a_method(tiny_model_path, tmp_path):
    @dataclass
    class RobustDISPOConfig(GroupRLSettings, DISPOConfig):
        pass

    class RobustDISPOTrainer(GroupRobustMixin, DISPOTrainer):
        config_class = RobustDISPOConfig

    args = tiny_config(RobustDISPOConfig, tmp_path, group_column="topic", epsilon_pos_high=3.0)
    trainer = tiny_run(RobustDISPOTrainer, tiny_model_path, args, train_dataset=grouped(), reward_funcs=by_topic)
    assert entries(trainer, "dispo/weight/max") and trainer.groups.q[1] > 0.5
    with pytest.raises(ValueError, match="epsilon=0.3"):
        tiny_config(RobustDISPOConfig, tmp_path, epsilon=0.3)


def paired(rows=32):
    """Pairs of two: what the tests need of siblings is that they share a pair and differ in a variant."""
    data = grouped(rows=rows)
    data = data.add_column("pair", [f"p{i // 2 % 4}" for i in range(rows)])
    return data.add_column("wording", [i % 2 for i in range(rows)])


SIBLINGS = dict(pair_column="pair", variant_column="wording")


class WatchAnswers(RobustGRPOTrainer):
    """Keeps, a generation batch, what was rewarded, with what, and what the flip rate is made of."""

    def _calculate_rewards(self, inputs, prompts, completions, completion_ids_list):
        before = SiblingAnswers(self.args.consistency_rate)
        before.load_state_dict(self.siblings.answers.state_dict())
        rewards = super()._calculate_rewards(inputs, prompts, completions, completion_ids_list)
        self.batches = [*getattr(self, "batches", []), (before, list(self.siblings.fresh), rewards)]
        return rewards


def test_answers_are_rewarded_by_the_history_before_them(tiny_model_path, tmp_path):
    args = tiny_config(RobustGRPOConfig, tmp_path, **SIBLINGS, max_steps=12)
    trainer = tiny_run(WatchAnswers, tiny_model_path, args, train_dataset=paired())
    assert trainer.reward_weights.tolist() == [1.0, 0.25] and len(trainer.batches) == 3
    replayed, rates = SiblingAnswers(0.1), []
    for before, rows, rewards in trainer.batches:
        assert before.state_dict() == replayed.state_dict()  # once a batch, after its rewards
        wanted = torch.tensor([math.nan if x is None else x for x in replayed.rewards(rows)])
        torch.testing.assert_close(rewards[:, 1], wanted, equal_nan=True)
        replayed.update(rows)
        rates += [rate for rate in [flip_rate(rows)] if rate is not None]
    assert replayed.state_dict() == trainer.siblings.answers.state_dict() != {}
    assert entries(trainer, "robust/flip_rate") == pytest.approx(rates) and rates
    assert entries(trainer, "rewards/consistency/mean")


def test_evaluation_leaves_the_history(tiny_model_path, tmp_path):
    args = tiny_config(RobustGRPOConfig, tmp_path, **SIBLINGS, per_device_eval_batch_size=4)
    trainer = tiny_trainer(RobustGRPOTrainer, tiny_model_path, args, train_dataset=paired(), eval_dataset=paired(4))
    trainer.evaluate()
    assert trainer.siblings.answers.state_dict() == {} and trainer.siblings.fresh == []


def test_a_reward_of_the_users_own_is_found_and_resumed(tiny_model_path, tmp_path):
    def train(folder, max_steps, resume=None, reward=True):
        args = tiny_config(
            RobustGRPOConfig, tmp_path / folder, max_steps=max_steps, save_strategy="steps", save_steps=4
        )
        rewards = [by_topic, *([consistency_reward("pair", "wording", rate=0.5)] if reward else [])]
        trainer = tiny_trainer(RobustGRPOTrainer, tiny_model_path, args, train_dataset=paired(), reward_funcs=rewards)
        trainer.train(resume_from_checkpoint=resume)
        return trainer

    whole, checkpoint = train("a", 8), str(tmp_path / "a" / "checkpoint-4")
    resumed = train("b", 8, checkpoint)
    assert parameter_gap(whole.model, resumed.model) == 0.0
    assert whole.method_state() == resumed.method_state() and whole.method_state()["siblings"]
    with pytest.raises(ValueError, match="the checkpoint has answers of siblings, and pair_column is None"):
        train("c", 8, checkpoint, reward=False)


def test_under_another_trainer_the_reward_keeps_its_own_history():
    reward = consistency_reward("pair", "wording", parse=lambda text: text or None, rate=1.0)
    columns = dict(pair=["p", "p"], wording=[0, 1])
    assert reward(completions=["7", "7"], **columns) == [None, None]
    assert reward(completions=["7", [{"role": "assistant", "content": "8"}]], **columns) == [1.0, 0.0]
    assert reward(completions=["8", ""], **columns) == [1.0, 0.0]
    with pytest.raises(ValueError, match="the data have no column 'wording'"):
        reward(completions=["7"], pair=["p"])


def test_bad_siblings_are_a_line(tiny_model_path, tmp_path):
    for settings, says in (
        (dict(pair_column="pair"), "pair_column='pair' needs variant_column beside it"),
        (dict(variant_column="wording"), "variant_column='wording' needs pair_column beside it"),
        (dict(consistency_rate=0.0), "consistency_rate=0.0 must be"),
        (dict(consistency_weight=-1.0), "consistency_weight=-1.0 must be"),
    ):
        with pytest.raises(ValueError, match=says):
            tiny_config(RobustGRPOConfig, tmp_path, **settings)
    args = tiny_config(RobustGRPOConfig, tmp_path, pair_column="pair", variant_column="words")
    with pytest.raises(ValueError, match="variant_column='words' is not in the data"):
        tiny_trainer(RobustGRPOTrainer, tiny_model_path, args, train_dataset=paired())
    args = tiny_config(RobustGRPOConfig, tmp_path, **SIBLINGS)
    with pytest.raises(ValueError, match="there are two consistency rewards"):
        own = consistency_reward("pair", "wording")
        tiny_trainer(RobustGRPOTrainer, tiny_model_path, args, train_dataset=paired(), reward_funcs=[by_topic, own])


@pytest.mark.parametrize("base", [TRPATrainer, OPMDTrainer])
def test_a_trainer_without_the_hosts_advantages_is_refused(base):
    with pytest.raises(TypeError, match="cannot weigh advantages by group, it"):
        type("Robust", (GroupRobustMixin, base), {})


TWO_PROCESSES = """
import sys, torch
from tiny import leave, tiny_config, tiny_trainer
from test_robust_grpo import SIBLINGS, Watch, by_topic, paired
from trl_trust.robust.rl import RobustGRPOConfig

args = tiny_config(RobustGRPOConfig, sys.argv[2], group_column="topic", group_eta=0.5, max_steps=1, **SIBLINGS)
trainer = tiny_trainer(Watch, sys.argv[1], args, train_dataset=paired(), reward_funcs=by_topic)
trainer.train()
before, after, rollouts = trainer.seen
found = {"state": trainer.method_state(), "before": before, "after": after, "rewards": rollouts.rewards,
         "topics": [row["topic"] for row in rollouts.examples], "answers": trainer.answers}
torch.save(found, f"{sys.argv[2]}/rank-{trainer.accelerator.process_index}.pt")
leave()
"""


def test_two_processes_are_one_with_the_joined_batch(tiny_model_path, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    on_two_processes(script, tiny_model_path, tmp_path)
    one, two = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert one["state"] == two["state"] and torch.equal(one["rewards"], two["rewards"])
    for rows, equal in ((one["answers"] + two["answers"], True), (one["answers"], False)):
        alone = SiblingAnswers(0.1)
        alone.update(rows)
        assert (alone.state_dict() == one["state"]["siblings"]) == equal
    rewards, topics = one["rewards"].double(), torch.tensor([int(t == "t1") for t in one["topics"] + two["topics"]])
    grown = torch.stack([torch.exp(0.5 * (1 - rewards[topics == g].mean())) for g in (0, 1)])
    q = torch.tensor(one["state"]["robust"]["q"], dtype=torch.float64)
    torch.testing.assert_close(q, grown / grown.sum())
    before, after = (torch.cat([one[key], two[key]]) for key in ("before", "after"))
    torch.testing.assert_close(after, before * row_weights(q, topics).to(before.dtype))
