"""Many training runs as one compiled program.

A training run that JAX can trace is compiled once for all choices of hyperparameters,
batched on a GPU or TPU and side by side on a CPU. Finished runs are stored on request,
under a digest of all that they compute, and found again.
"""

from normax.sweeps.sweep import grid_sweep, sweep

__all__ = [
    "grid_sweep",
    "sweep",
]
