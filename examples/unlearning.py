"""Forget TOFU's authors and keep the rest: NPO, each update without the part that would move the retain loss."""

from trl_trust.unlearn.data import load_unlearning
from trl_trust.unlearn.gu import GUConfig, GUTrainer


def main():
    data = load_unlearning("tofu:forget10")  # a folder with the files does too: path=...
    trainer = GUTrainer(
        model="open-unlearning/tofu_Llama-3.2-1B-Instruct_full",
        args=GUConfig(
            output_dir="unlearning",
            forget_loss="npo",
            gu_mode="null",
            learning_rate=1e-5,
            per_device_train_batch_size=8,
            num_train_epochs=5,
            logging_steps=1,
        ),
        train_dataset=data.train,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
