"""The policy terms in TRL's asynchronous trainer: generation and training side by side, rollouts several versions old.

`base` alone knows the insides of `AsyncGRPOTrainer` (with `local`, what a CPU needs in place of a GPU and of vLLM).
"""
