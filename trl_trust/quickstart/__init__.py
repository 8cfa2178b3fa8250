"""A task and a model that need no download: column addition, a character tokenizer, a Qwen2 of 0.1M parameters.

`task` has tokenizer, problems, demonstrator, reward and evaluation; `model` builds and warm-starts the policy. Both
are short names for what lies in `trl_trust.tasks`. `run` is the command `trl-trust quickstart`.
"""
