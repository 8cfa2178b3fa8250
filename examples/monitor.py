"""A callback that stops a run which leaves its bounds; it works in stock trainers too."""

from datasets import load_dataset
from trl.rewards import accuracy_reward

from trl_trust import TrustGRPOConfig, TrustGRPOTrainer, TrustMonitor


def main():
    # five logs in a row outside of a bound, and training ends; None switches a default bound off
    monitor = TrustMonitor({"trust/kl": (0.0, 0.05), "entropy": None}, patience=5, stop=True)
    trainer = TrustGRPOTrainer(  # stock GRPO to the bit, with the metrics `trust/*`
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=TrustGRPOConfig(
            output_dir="monitor",
            gradient_accumulation_steps=1,
            steps_per_generation=4,
            logging_steps=1,
        ),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
        callbacks=[monitor],
    )
    trainer.train()
    print("out of bounds:", monitor.tripped or "nothing")


if __name__ == "__main__":
    main()
