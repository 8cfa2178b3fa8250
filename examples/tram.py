"""TRAM in SFT: ascent within a measured distance to the anchor, then AdamW's step. Two passes a step."""

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import trl_trust.optim  # noqa: F401  makes the name known


def main():
    trainer = SFTTrainer(
        model="Qwen/Qwen3-0.6B",
        args=SFTConfig(
            output_dir="tram",
            optim="tram_adamw",
            optim_args="tram_variant=init",  # the anchor is the model before the first step
            learning_rate=2e-5,
            logging_steps=1,
        ),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
