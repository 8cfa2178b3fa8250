"""LoRA on one 24 GB GPU, rollouts by vLLM in the same process."""

from datasets import load_dataset
from peft import LoraConfig
from trl.rewards import accuracy_reward

from trl_trust import DPPOConfig, DPPOTrainer


def main():
    trainer = DPPOTrainer(
        model="Qwen/Qwen3-1.7B",
        reward_funcs=accuracy_reward,
        args=DPPOConfig(
            output_dir="lora_vllm",
            use_vllm=True,  # DPPO's anchor is then the sampler itself
            vllm_mode="colocate",
            vllm_gpu_memory_utilization=0.3,
            vllm_enable_sleep_mode=True,
            per_device_train_batch_size=2,
            gradient_accumulation_steps=16,
            steps_per_generation=64,  # four updates from each generation
            num_generations=8,
            max_completion_length=2048,
            learning_rate=1e-5,
            logging_steps=1,
        ),
        train_dataset=load_dataset("trl-lib/DeepMath-103K", split="train"),
        # without dropout: a policy trained with it is not the one that is scored, and the ratio is noise
        peft_config=LoraConfig(r=32, lora_alpha=64, lora_dropout=0.0, target_modules="all-linear"),
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
