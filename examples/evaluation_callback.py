"""Nine trust dimensions while a reward is trained: a line at the first alert, a table at the end."""

from datasets import load_dataset
from trl import GRPOConfig, GRPOTrainer
from trl.rewards import accuracy_reward

from trl_trust import TrustEvalCallback, TrustSuite


def main():
    trainer = GRPOTrainer(  # any trainer of transformers or TRL will do
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=GRPOConfig(output_dir="evaluation_callback", steps_per_generation=4, max_steps=500, logging_steps=10),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    # The same 64 slots a dimension each time, so that a change is compared item by item; half of the batch is asked at
    # once. `dims` names some of the nine only, `source` asks of facts of your own, `stop_on_alert=True` ends the run.
    suite = TrustSuite(n_per_dim=64, fresh_per_eval=False, batch_size=32)
    callback = TrustEvalCallback(trainer, suite, every_n_steps=100, baseline="start")
    trainer.add_callback(callback)
    trainer.train()
    trainer.save_model()
    if callback.reports:  # one every 100 steps; they are also in evaluation_callback/trusteval/
        comparison = callback.reports[-1].compare(callback.baseline)
        print(comparison.to_markdown())
        print("worse beyond chance:", ", ".join(comparison.alerts) or "nothing")


if __name__ == "__main__":
    main()
