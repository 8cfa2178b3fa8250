"""An environment with tools: the model looks numbers up before it answers. Needs a model whose template has tools."""

import random

from datasets import Dataset

from trl_trust import DISPOConfig, DISPOTrainer


class Warehouse:
    """One instance a rollout. Public methods are tools, described by their docstrings; `get_reward` scores it."""

    def reset(self, seed: int, **columns) -> None:
        rng = random.Random(seed)
        self.stock = {item: rng.randint(1, 99) for item in ("bolts", "nuts", "gears")}
        self.answer = None

    def count(self, item: str) -> int:
        """
        Count what is in stock.

        Args:
            item: bolts, nuts or gears.

        Returns:
            How many there are.
        """
        return self.stock.get(item, 0)

    def report(self, total: int) -> str:
        """
        Report the number of all items together.

        Args:
            total: The number.

        Returns:
            A confirmation.
        """
        self.answer = total
        return "reported"

    def get_reward(self) -> float:
        return float(self.answer == sum(self.stock.values()))


def main():
    prompt = [{"role": "user", "content": "How many bolts, nuts and gears are there together? Look, then report."}]
    trainer = DISPOTrainer(
        model="Qwen/Qwen3-0.6B",
        args=DISPOConfig(
            output_dir="environment",
            gradient_accumulation_steps=1,
            steps_per_generation=4,
            max_completion_length=1024,
            max_tool_calling_iterations=6,
            logging_steps=1,
        ),
        train_dataset=Dataset.from_list([{"prompt": prompt, "seed": seed} for seed in range(1000)]),
        environment_factory=Warehouse,
    )
    trainer.train()
    trainer.save_model()


if __name__ == "__main__":
    main()
