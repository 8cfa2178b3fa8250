"""Group-robust training: the worst group of a named nuisance is kept up (on the taxonomy of arXiv 2307.16851)."""
