"""The curriculum: kappa's worked numbers, rows by length that repeat in a generation, the same after a resume."""

import pytest
from datasets import Dataset
from tiny import tiny_config
from transformers import AutoModelForCausalLM, AutoTokenizer
from trl import GRPOConfig, GRPOTrainer

from trl_trust import DISPOConfig, DISPOTrainer
from trl_trust.tasks.geometry import GeometryCurriculum
from trl_trust.tasks.geometry.curriculum import kappas


def table():
    return Dataset.from_list([{"prompt": f"{i}+{i}=", "proof_length": 1 + i % 6, "number": i} for i in range(60)])


def play(trainer_class, model_path, folder, *, steps, resume=False, saved=0, **settings):
    """The kappas logged and (number, length) of every row that was rewarded, a list a generation."""
    seen = []

    def geometry_reward(completions, number, proof_length, **kwargs):
        value = (0.9, 1.0, 1.0, 0.8, 0.2)[len(seen) + saved]
        seen.append(list(zip(number, proof_length, strict=True)))
        return [value] * len(completions)

    args = tiny_config(
        DISPOConfig if trainer_class is DISPOTrainer else GRPOConfig,
        output_dir=folder,
        max_steps=steps,
        per_device_train_batch_size=4,
        num_generations=4,
        steps_per_generation=2,
        gradient_accumulation_steps=1,
        logging_steps=1,
        save_steps=4,
        save_strategy="steps",
        **settings,
    )
    trainer = trainer_class(
        AutoModelForCausalLM.from_pretrained(model_path),
        geometry_reward,
        args,
        table(),
        processing_class=AutoTokenizer.from_pretrained(model_path),
    )
    trainer.add_callback(GeometryCurriculum(trainer, eta=2.0))
    trainer.train(resume_from_checkpoint=str(folder / "checkpoint-4") if resume else None)
    return [entry["geometry/kappa"] for entry in trainer.state.log_history if "geometry/kappa" in entry], seen


def test_worked_numbers():
    assert kappas(5, [0.8, 0.7, 0.4, 0.5], 1.0, 3, 12) == pytest.approx([5, 5.3, 5.5, 5.4, 5.4])
    assert kappas(3, [0.0, 1.0], 4.0, 3, 4) == [3, 3, 4]


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("trainer_class", [GRPOTrainer, DISPOTrainer])
def test_rows_follow_kappa_and_a_resumed_run_sees_the_same(trainer_class, tiny_model_path, tmp_path):
    logged, seen = play(trainer_class, tiny_model_path, tmp_path / "whole", steps=10)
    assert logged[:4] == pytest.approx([1.8, 2.8, 3.8, 4.4])
    lengths = [{length for _, length in generation} for generation in seen]
    assert lengths == [{1}, {2}, {3}, {4}, {4}]
    for generation in seen:  # TRL's repeats of a prompt are one row
        numbers = [number for number, _ in generation]
        assert len(generation) == 8 and all(numbers.count(number) % 4 == 0 for number in numbers)
    assert len({tuple(generation) for generation in seen}) == len(seen)

    again_logged, again = play(trainer_class, tiny_model_path, tmp_path / "whole", steps=10, resume=True, saved=2)
    assert again == seen[2:] and again_logged == logged


def test_what_does_not_fit_is_named(tiny_model_path, tmp_path):
    def reward(completions, **kwargs):
        return [0.0] * len(completions)

    def trainer(data, **settings):
        args = tiny_config(output_dir=tmp_path, **settings)
        tokenizer = AutoTokenizer.from_pretrained(tiny_model_path)
        return GRPOTrainer(tiny_model_path, reward, args, data, processing_class=tokenizer)

    with pytest.raises(ValueError, match="a column proof_length"):
        GeometryCurriculum(trainer(table().remove_columns("proof_length")))
    with pytest.raises(ValueError, match="dataloader_num_workers=2"):
        GeometryCurriculum(trainer(table(), dataloader_num_workers=2))
    with pytest.raises(ValueError, match="eta=0"):
        GeometryCurriculum(trainer(table()), eta=0)
