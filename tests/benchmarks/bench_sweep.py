"""Throughput of a sweep over a loop of compiled runs.

    python -m pytest --noconftest tests/benchmarks/bench_sweep.py -s

A run trains the batch-norm network of the examples on digits for eight epochs, too
small a network to fill a device. Thirty runs as one sweep, without and with a progress
bar, and one after the other, in one process and in alternation, compiled before;
reported is the ratio of the medians. The aims are 1.5 on two cores, and 10 on a GPU.
"""

import statistics
import sys
import time
from pathlib import Path

import jax
import numpy as np
import pytest

import normax

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
import convnet
import datasets

ROUNDS = 5
GRID = {"eta": np.geomspace(1e-3, 1e-1, 6), "lam": np.geomspace(1e-3, 1e-1, 5)}


def seconds(function):
    start = time.perf_counter()
    function()
    return time.perf_counter() - start


@pytest.mark.parametrize("progress", [False, True])
def test_sweep_beside_a_loop(progress):
    setting = convnet.SETTINGS["digits"]._replace(epochs=8)
    train = convnet.make_train("nesterov", datasets.load("digits"), setting)
    single = jax.jit(train)

    def loop():
        for eta in GRID["eta"]:
            for lam in GRID["lam"]:
                jax.block_until_ready(single(eta=eta, lam=lam))

    def sweep():
        jax.block_until_ready(normax.sweeps.grid_sweep(train, GRID, progress=progress))

    loop(), sweep()
    pairs = [(seconds(loop), seconds(sweep)) for _ in range(ROUNDS)]
    before, after = map(statistics.median, zip(*pairs, strict=True))
    bar = "with" if progress else "without"
    print(f"\n30 runs: loop {before:.2f} s, sweep {after:.2f} s {bar} a progress bar")
    print(f"throughput: {before / after:.2f} times the loop's")
