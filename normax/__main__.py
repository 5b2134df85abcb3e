"""`python -m normax`, and the console script `normax`."""

import sys

import jax

from normax.inspection.command_line import main


def run() -> None:
    # A checkpoint is read beside the run that may hold the accelerators.
    jax.config.update("jax_platforms", "cpu")
    sys.exit(main())


if __name__ == "__main__":
    run()
