"""Many training runs as one compiled program.

A run that JAX can trace is compiled once for all choices of hyperparameters. Finished
runs are stored on request, under a digest of all that they compute, and found again.
"""

from normax.sweeps.sweep import grid_sweep, sweep

__all__ = [
    "grid_sweep",
    "sweep",
]
