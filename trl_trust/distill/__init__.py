"""Trust regions in distillation."""

from .. import optim  # noqa: F401  makes `optim="auon"` known to transformers
