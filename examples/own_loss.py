"""A policy term of your own: a pure function of tensors, and a trainer of one line. Under step control."""

from datasets import load_dataset
from trl.rewards import accuracy_reward

from trl_trust import PolicyBatch, PolicyLoss, TrustGRPOConfig, TrustGRPOTrainer


def leaky_clip_loss(batch: PolicyBatch, *, epsilon: float = 0.2, leak: float = 0.1) -> PolicyLoss:
    """GRPO's clip, but beyond it a tenth of the gradient is left: a token that went too far still counts a little."""
    ratio = (batch.logps - batch.old_logps).exp()  # (B, T)
    inside = ratio.clamp(1 - epsilon, 1 + epsilon)
    leaky = inside + leak * (ratio - inside)
    per_token_loss = -(leaky * batch.advantages)  # (B, T); masks, corrections and aggregation are the trainer's
    return PolicyLoss(per_token_loss, metrics={"leaky/outside": (ratio != inside).float()})


class LeakyTrainer(TrustGRPOTrainer):
    _name = "Leaky clip"

    def policy_loss(self, batch: PolicyBatch) -> PolicyLoss:
        return leaky_clip_loss(batch, epsilon=self.args.epsilon)


def main():
    trainer = LeakyTrainer(
        model="Qwen/Qwen3-0.6B",
        reward_funcs=accuracy_reward,
        args=TrustGRPOConfig(
            output_dir="own_loss",
            gradient_accumulation_steps=1,
            steps_per_generation=4,
            num_iterations=2,
            learning_rate=1e-5,
            step_control="kl",
            logging_steps=1,
        ),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
