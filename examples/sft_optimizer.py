"""A matrix optimizer by its name in SFT. The same two fields work in every trainer of transformers and TRL."""

from datasets import load_dataset
from trl import SFTConfig, SFTTrainer

import trl_trust.optim  # noqa: F401  makes the names known


def main():
    trainer = SFTTrainer(
        model="Qwen/Qwen3-0.6B",
        args=SFTConfig(
            output_dir="sft_optimizer",
            optim="hybrid_auon",
            learning_rate=2e-5,  # AdamW's: match_rms_adamw gives updates of its size; aux_lr is for what is no matrix
            optim_args="variant=repo,shape_scale=match_rms_adamw,aux_lr=2e-5",
            logging_steps=1,
        ),
        train_dataset=load_dataset("trl-lib/Capybara", split="train"),  # column: messages
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
