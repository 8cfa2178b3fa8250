"""`python -m trl_trust`: the command line in this process, for `accelerate launch -m trl_trust` and `torchrun -m`."""

import sys

from .cli import main


if __name__ == "__main__":
    sys.exit(main(launch=False))
