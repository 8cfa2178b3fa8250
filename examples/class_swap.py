"""A GRPOTrainer script with one class swapped, and a reward of your own."""

import re

from datasets import load_dataset
from trl import GRPOConfig

from trl_trust import DPPOTrainer


def final_answer(completions, solution, **kwargs):
    """1 if the last number of a response is the data's `solution`, else 0: one float a response, in order."""
    texts = [completion[0]["content"] for completion in completions]  # chats; for plain prompts these are strings
    numbers = [re.findall(r"-?\d+(?:\.\d+)?", text) for text in texts]
    return [float(bool(found) and found[-1] == str(s)) for found, s in zip(numbers, solution, strict=True)]


def main():
    dataset = load_dataset("trl-lib/DeepMath-103K", split="train")  # columns: prompt (a chat), solution
    trainer = DPPOTrainer(  # was: GRPOTrainer
        model="Qwen/Qwen3-0.6B",
        reward_funcs=final_answer,
        args=GRPOConfig(
            output_dir="class_swap",
            steps_per_generation=4,  # more than gradient_accumulation_steps, or the region does nothing
            gradient_accumulation_steps=1,
            max_completion_length=1024,
            logging_steps=1,
        ),
        train_dataset=dataset,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
