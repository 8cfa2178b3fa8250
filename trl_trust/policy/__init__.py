"""Trust regions as loss terms of GRPO."""

from .. import optim  # noqa: F401  makes `optim="auon"` known to transformers
