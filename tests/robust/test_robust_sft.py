"""Robust SFT and reward models: off is TRL to the bit, each term does what it says, state and layouts hold."""

import os
import runpy
from pathlib import Path

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from tiny import on_two_processes, parameter_gap
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, AutoTokenizer
from trl import RewardConfig, RewardTrainer, SFTConfig, SFTTrainer

from trl_trust import cli
from trl_trust.robust.sft import TERMS, RobustRewardConfig, RobustRewardTrainer, RobustSFTConfig, RobustSFTTrainer
from trl_trust.robust.terms import Reader, ascend, chance, pool, reversal
from trl_trust.robust.weights import row_weights


RECIPES = Path(__file__).parents[2] / "recipes"
BY_TOPIC = dict(group_column="topic", group_eta=0.5)
CASES = {
    "reweight": dict(terms=["reweight"], **BY_TOPIC),
    "worst_case": dict(terms=["worst_case"]),
    "invariance": dict(terms=["invariance"], condition_on="label", **BY_TOPIC),
    "all": dict(terms=list(TERMS), **BY_TOPIC),
}


def rows(reward=False, n=24):
    """Topic t1, a third of the rows, has longer answers."""
    data = []
    for i in range(n):
        row = {"prompt": f"{i}+{i}=", "topic": f"t{int(i % 3 == 0)}", "label": i % 2}
        answer = str(2 * i) * (1 + int(i % 3 == 0))
        data.append(row | ({"chosen": answer, "rejected": answer[::-1] + "0"} if reward else {"completion": answer}))
    return Dataset.from_list(data)


def build(trainer_class, config_class, model_path, folder, lora=False, data=None, **settings):
    reward = issubclass(trainer_class, RewardTrainer)
    common = dict(
        use_cpu=True,
        bf16=False,
        report_to="none",
        max_steps=4,
        logging_steps=1,
        save_strategy="no",
        per_device_train_batch_size=6,
        gradient_checkpointing=False,
        learning_rate=1e-2,
        disable_tqdm=True,
    )
    args = config_class(output_dir=str(folder), **common | settings)
    torch.manual_seed(0)
    loader = AutoModelForSequenceClassification if reward else AutoModelForCausalLM
    model = loader.from_pretrained(model_path, dtype=torch.float32, **({"num_labels": 1} if reward else {}))
    peft = LoraConfig(r=2, target_modules="all-linear", modules_to_save=["score"] if reward else None)
    return trainer_class(
        model,
        args,
        train_dataset=rows(reward) if data is None else data,
        processing_class=AutoTokenizer.from_pretrained(model_path),
        peft_config=peft if lora else None,
    )


def train(*given, resume=None, **settings):
    trainer = build(*given, **settings)
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def entries(trainer, key):
    return [entry[key] for entry in trainer.state.log_history if key in entry]


SFT = (RobustSFTTrainer, RobustSFTConfig)
REWARD = (RobustRewardTrainer, RobustRewardConfig)
HOSTS = {"sft": ((SFTTrainer, SFTConfig), SFT), "reward": ((RewardTrainer, RewardConfig), REWARD)}


@pytest.mark.parametrize("lora", [False, True], ids=["full", "lora"])
@pytest.mark.parametrize("host", HOSTS)
def test_off_is_trl_to_the_bit(host, lora, tiny_model_path, tmp_path):
    stock, ours = (train(*given, tiny_model_path, tmp_path, lora=lora) for given in HOSTS[host])
    assert parameter_gap(stock.model, ours.model) == 0.0
    assert entries(stock, "loss") == entries(ours, "loss")


def test_weights_of_one_are_sft_to_the_bit(tiny_model_path, tmp_path):
    stock = train(SFTTrainer, SFTConfig, tiny_model_path, tmp_path)
    even = dict(terms=["reweight"], group_column="topic", group_eta=0.0, weighting="plain")
    assert parameter_gap(stock.model, train(*SFT, tiny_model_path, tmp_path, **even).model) == 0.0
    clean = train(*SFT, tiny_model_path, tmp_path, terms=["worst_case"], mix=1.0)
    assert parameter_gap(stock.model, clean.model) < 1e-6
    stock, ours = (train(*g, tiny_model_path, tmp_path, **s) for g, s in zip(HOSTS["reward"], ({}, even), strict=True))
    assert parameter_gap(stock.model, ours.model) < 1e-6 and entries(stock, "accuracy") == entries(ours, "accuracy")


@pytest.mark.parametrize("host", HOSTS)
def test_the_weighted_loss_is_its_formula(host, tiny_model_path, tmp_path):
    """One batch: q from the rows' losses, then weights, by hand."""
    trainer = build(*HOSTS[host][1], tiny_model_path, tmp_path, **CASES["reweight"])
    trainer.create_optimizer()
    inputs = next(iter(trainer.get_train_dataloader()))
    groups = inputs["robust_group"].clone()
    plain = {k: v for k, v in inputs.items() if not k.startswith("robust")}
    outputs = trainer.forward_rows(trainer.model, dict(plain))
    losses = trainer.row_losses(outputs).detach()
    means = torch.stack([losses[groups == g].mean() for g in (0, 1)]).double()
    q = torch.softmax(0.5 * means, 0)
    weights = row_weights(q, groups).float()
    trainer.model.train()
    got = trainer.compute_loss(trainer.model, dict(inputs))
    if host == "sft":  # the row's token *sum* over the batch's tokens
        want = (-outputs.log_probs.sum(1) * weights).sum() / outputs.label_mask.sum()
    else:
        want = (losses * weights).mean()
    torch.testing.assert_close(got, want)
    torch.testing.assert_close(trainer.groups.q, q, atol=1e-6, rtol=0)


def test_the_worst_case_is_worse_and_inside_its_ball(tiny_model_path, tmp_path):
    trainer = build(*SFT, tiny_model_path, tmp_path, terms=["worst_case"], radius=0.5, ascent_steps=3)
    inputs = next(iter(trainer.get_train_dataloader()))
    delta = trainer._worst_case(trainer.model, dict(inputs))
    live = inputs["attention_mask"]
    norms = trainer.model.get_input_embeddings()(inputs["input_ids"]).norm(dim=-1)
    radius = 0.5 * (norms * live).sum(1) / live.sum(1)
    length = delta.flatten(1).norm(dim=1)
    assert (length <= radius * 1.0001).all() and (length > 0.5 * radius).all()
    assert (delta[live == 0] == 0).all() and (live == 0).any()
    clean, moved = trainer.robust_forward(trainer.model, dict(inputs))
    assert (trainer.row_losses(moved) > trainer.row_losses(clean)).all()
    alone = trainer.forward_rows(trainer.model, dict(inputs))
    torch.testing.assert_close(trainer.row_losses(clean), trainer.row_losses(alone))


def test_terms_move_the_loss_in_training_only(tiny_model_path, tmp_path):
    for name, settings in CASES.items():
        trainer = train(*SFT, tiny_model_path, tmp_path, **settings)
        stock = train(SFTTrainer, SFTConfig, tiny_model_path, tmp_path)
        assert parameter_gap(trainer.model, stock.model) > 1e-5, name
        before = trainer.robust_state()
        trainer.evaluate(trainer.train_dataset)
        assert str(before) == str(trainer.robust_state())


@pytest.mark.parametrize("host", HOSTS)
def test_every_term_logs_what_it_did(host, tiny_model_path, tmp_path):
    trainer = train(*HOSTS[host][1], tiny_model_path, tmp_path, **CASES["all"])
    for key in ("t0/loss", "t1/q", "worst", "weight_max", "delta_norm", "adversary_accuracy", "adversary_chance"):
        assert len(entries(trainer, f"robust/{key}")) == 4, key
    assert all(x > 0 for x in entries(trainer, "robust/delta_norm"))
    assert trainer.skipped_nonfinite == 0


def test_a_reader_reads_what_is_there_and_the_features_forget_it():
    torch.manual_seed(0)
    groups = torch.randint(0, 2, (256,))
    body = torch.nn.Linear(4, 3)
    x = torch.randn(256, 4)
    x[:, 0] = groups * 2.0 - 1
    conditions = torch.zeros(256, dtype=torch.long)

    def read(fresh):
        reader = Reader(3, 2, steps=300)
        reader.fit(fresh.detach(), conditions, groups)
        return reader.fit(fresh.detach(), conditions, groups)

    features = lambda: torch.nn.functional.normalize(body(x))
    assert read(features()) > 0.9
    reader, optimizer = Reader(3, 2), torch.optim.Adam(body.parameters(), lr=1e-2)
    for step in range(300):
        reader.fit(features(), conditions, groups)
        optimizer.zero_grad()
        (-reversal(step / 300) * reader.loss(features(), conditions, groups)).backward()
        optimizer.step()
    assert read(features()) < 0.75  # guessing: .5


def test_worked_numbers_of_the_terms():
    assert reversal(0) == 0 and reversal(0.1) == pytest.approx(0.46211716) and reversal(1) == pytest.approx(0.9999092)
    delta = ascend(torch.zeros(2, 2), torch.tensor([[3.0, 4.0], [0.0, 0.0]]), torch.tensor([0.5, 0.5]))
    torch.testing.assert_close(delta, torch.tensor([[0.3, 0.4], [0.0, 0.0]]))
    pooled = pool(torch.tensor([[[1.0, 7.0], [3.0, -7.0], [9.0, 9.0]]]), torch.tensor([[1, 1, 0]]))
    torch.testing.assert_close(pooled, torch.tensor([[2**0.5, 0.0]]), atol=1e-5, rtol=0)
    assert chance(torch.tensor([0, 0, 1, 1]), torch.tensor([0, 0, 0, 1]), 2, 2) == 0.75


@pytest.mark.parametrize("host", HOSTS)
def test_a_resumed_run_equals_the_uninterrupted_one(host, tiny_model_path, tmp_path):
    given = (*HOSTS[host][1], tiny_model_path)
    saves = dict(save_strategy="steps", save_steps=2, save_safetensors=True) | CASES["all"]
    saves.pop("save_safetensors")
    whole = train(*given, tmp_path / "a", **saves)
    checkpoint = str(tmp_path / "a" / "checkpoint-2")
    resumed = train(*given, tmp_path / "b", resume=checkpoint, **saves)
    assert parameter_gap(whole.model, resumed.model) == 0.0
    assert whole.groups.q.tolist() == resumed.groups.q.tolist() != [0.5, 0.5]
    assert torch.equal(whole.reader.head.weight, resumed.reader.head.weight)
    with pytest.raises(ValueError, match="is of terms="):
        train(*given, tmp_path / "c", resume=checkpoint, **CASES["reweight"])
    os.remove(tmp_path / "a" / "checkpoint-2" / "trl_trust_robust.pt")
    with pytest.raises(ValueError, match=r"trl_trust_robust.pt is missing"):
        train(*given, tmp_path / "d", resume=checkpoint, **saves)


@pytest.mark.parametrize(
    ("settings", "says"),
    [
        (dict(terms=["rewait"]), r"terms=\['rewait'\] must be of reweight, worst_case, invariance"),
        (dict(terms=["reweight"]), "group_column=None must name the column"),
        (dict(terms=["worst_case"], packing=True), "packing=True mixes rows"),
        (dict(terms=["worst_case"], padding_free=True), "padding_free=True mixes rows"),
        (dict(terms=["worst_case"], loss_type="dft"), "loss_type='dft' must be 'nll'"),
        (dict(terms=["worst_case"], label_smoothing_factor=0.1), "label_smoothing_factor=0.1 must be 0"),
        (dict(terms=["worst_case"], radius=0.0), "radius=0.0 must be"),
        (dict(terms=["worst_case"], condition_on="label"), "condition_on='label' is read by invariance"),
    ],
)
def test_bad_settings_are_a_line(settings, says, tmp_path):
    with pytest.raises(ValueError, match=says):
        RobustSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, **settings)


def test_only_the_words_that_are_named_move(tiny_model_path, tmp_path):
    trainer = build(*SFT, tiny_model_path, tmp_path, terms=["worst_case"], perturb_words=["="])
    inputs = next(iter(trainer.get_train_dataloader()))
    trainer.model.train()
    moved = trainer._worst_case(trainer.model, dict(inputs)).norm(dim=-1) > 0  # (B, T)
    equals = trainer.processing_class("=", add_special_tokens=False)["input_ids"][0]
    assert torch.equal(moved, inputs["input_ids"] == equals)
    with pytest.raises(ValueError, match="the tokenizer knows none of them"):
        build(*SFT, tiny_model_path, tmp_path, terms=["worst_case"], perturb_words=["\u2603"])
    with pytest.raises(ValueError, match="perturb_words=.* is read by worst_case alone"):
        RobustSFTConfig(output_dir=str(tmp_path), use_cpu=True, bf16=False, perturb_words=["="])


@pytest.mark.slow
@pytest.mark.parametrize("term", ["reweight", "worst_case", "invariance"])
def test_the_worst_group_of_a_small_network_rises(term):
    families = runpy.run_path(str(RECIPES.parent / "benchmarks" / "robust.py"))["families"]
    assert families(term, 0)[0] > families("nothing", 0)[0] + 0.05


def test_bad_data_are_a_line(tiny_model_path, tmp_path):
    with pytest.raises(ValueError, match="group_column='topik' is not in the data"):
        build(*SFT, tiny_model_path, tmp_path, terms=["reweight"], group_column="topik")
    with pytest.raises(ValueError, match="load it without streaming"):
        build(*SFT, tiny_model_path, tmp_path, data=rows().to_iterable_dataset(), **CASES["reweight"])


@pytest.mark.parametrize(("command", "reward"), [("robust-sft", False), ("robust-reward", True)])
def test_command(command, reward, tiny_model_path, tmp_path, capsys):
    rows(reward).to_json(str(tmp_path / "rows.jsonl"))
    data, out = str(tmp_path / "rows.jsonl"), str(tmp_path / "out")
    words = [command, "--model_name_or_path", tiny_model_path, "--dataset_name", data, "--output_dir", out]
    words += ["--use_cpu", "--bf16", "false", "--report_to", "none", "--max_steps", "2", "--save_steps", "2"]
    words += ["--per_device_train_batch_size", "4", "--dtype", "float32", "--learning_rate", "1e-2"]
    words += ["--group_column", "topic", "--terms", "reweight", "worst_case"]
    assert cli.main(words, launch=False) == 0
    assert (tmp_path / "out" / "model.safetensors").is_file()
    assert (tmp_path / "out" / "checkpoint-2" / "trl_trust_robust.pt").is_file()
    with pytest.raises(SystemExit) as left:
        cli.main([*words, "--terms", "rewait"], launch=False)
    assert left.value.code == 2
    assert capsys.readouterr().err.strip().splitlines()[-1].endswith("must be of reweight, worst_case, invariance.")


@pytest.mark.parametrize("path", sorted(RECIPES.glob("robust-[sr]*/*.yaml")), ids=lambda path: path.stem)
def test_recipes_as_shipped_but_small(path, tiny_model_path, tmp_path):
    reward = path.parent.name == "robust-reward"
    rows(reward).map(lambda row: {"site": row["topic"], "source": row["topic"], "longer": row["topic"]}).to_json(
        str(tmp_path / "rows.jsonl")
    )
    small = {
        "model_name_or_path": tiny_model_path,
        "dataset_name": tmp_path / "rows.jsonl",
        "dataset_config": "default",
    }
    small |= {"output_dir": tmp_path / "out", "use_cpu": True, "bf16": False, "dtype": "float32", "report_to": "none"}
    small |= {
        "dataset_config": "default",
        "max_steps": 1,
        "per_device_train_batch_size": 6,
        "gradient_accumulation_steps": 2,
        "logging_steps": 1,
    }
    words = [path.parent.name, "--config", str(path)]
    for name, value in small.items():
        words += [f"--{name}", str(value)]
    assert cli.main(words, launch=False) == 0
    assert any((tmp_path / "out").glob("*model.safetensors"))


TWO_PROCESSES = """
import sys, torch
from tiny import leave
from test_robust_sft import CASES, SFT, build
trainer = build(*SFT, sys.argv[1], sys.argv[2], **CASES["all"] | {"per_device_train_batch_size": 3, "max_steps": 2})
trainer.train()
state = {"q": trainer.groups.q, "head": trainer.reader.head.state_dict(), "model": trainer.model.state_dict(),
         "log": [e for e in trainer.state.log_history if "robust/worst" in e]}
torch.save(state, f"{sys.argv[2]}/rank-{trainer.accelerator.process_index}.pt")
leave()
"""


def test_two_processes_are_one(tiny_model_path, tmp_path):
    script = tmp_path / "two.py"
    script.write_text(TWO_PROCESSES)
    on_two_processes(script, tiny_model_path, tmp_path)
    one, two = (torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1))
    assert torch.equal(one["q"], two["q"]) and torch.equal(one["head"]["weight"], two["head"]["weight"])
    whole = train(*SFT, tiny_model_path, tmp_path / "one", **CASES["all"] | {"max_steps": 2})
    torch.testing.assert_close(one["q"], whole.groups.q, atol=1e-6, rtol=0)
    gaps = [(one["model"][k] - v).abs().max().item() for k, v in whole.model.state_dict().items()]
    assert max(gaps) < 2e-4
