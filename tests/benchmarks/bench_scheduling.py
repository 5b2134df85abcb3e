"""What each trick of `normax._core.scheduling` saves on a CPU.

    python -m pytest --noconftest tests/benchmarks/bench_scheduling.py -s

A compiled step, and the same step with one trick replaced by the plain thing, run in
one process and in alternation. Reported is the ratio of the medians, without the trick
over with it, and what the compiler plans: temporary memory, and copies of arrays. The
steps are those of `bench_update.py`, Adam's included, and of `bench_path_sgd.py`.
"""

import functools
import statistics

import bench_path_sgd
import bench_update
import jax
import jax.numpy as jnp
import optax
import pytest
from jax import lax

import normax
from normax._core import norms, scheduling
from normax.paths import programs, sgd
from normax.spheres import monitor as monitor_module

pytestmark = pytest.mark.skipif(
    jax.default_backend() != "cpu", reason="a CPU's compiler is what they help"
)

ROUNDS = 15


def update_step(tx):
    return bench_update.Step(optax.chain(optax.adam(1e-3), tx()))


def path_step():
    def make(forward, inputs):
        return normax.path_sgd(bench_path_sgd.RATE, forward, inputs)

    model = bench_path_sgd.MultiLayerPerceptron()
    return bench_path_sgd.Step(model, (100, 784), make)


project = functools.partial(update_step, normax.project_unit_norm)
monitor = functools.partial(update_step, normax.monitor_weight_dynamics)


def at_once(array, event, everywhere=False):
    return array


def behind_a_barrier(array, event):
    return lax.optimization_barrier((array, event))[0]


# A step, what replaces a trick in it, and the smallest ratio that is worth the trick.
CASES = {
    "in_turn, projection": (project, (scheduling, "wait", at_once), 1.3),
    "in_turn, monitor": (monitor, (scheduling, "wait", at_once), 1.3),
    "wait, monitor": (monitor, (monitor_module, "wait", at_once), 1.2),
    "wait, projection": (project, (scheduling, "_wait", behind_a_barrier), 1.3),
    "norms, projection": (
        project,
        (norms, "on_cpu", lambda fn, otherwise: otherwise),
        1.3,
    ),
    "norms, monitor": (
        monitor,
        (norms, "on_cpu", lambda fn, otherwise: otherwise),
        1.5,
    ),
    "one_after, path_sgd": (
        path_step,
        (sgd, "one_after", lambda event, updates: jnp.float32(1)),
        1.03,
    ),
    "unless_safe, path_sgd": (
        path_step,
        (programs, "unless_safe", lambda safe, once, careful, *x: careful(*x)),
        1.03,
    ),
}


def planned(step) -> dict[str, float]:
    analysis = step.compiled.memory_analysis()
    return {
        "temporary_MiB": round(analysis.temp_size_in_bytes / 2**20, 1),
        "copies": step.compiled.as_text().count(" copy("),
    }


@pytest.mark.parametrize("name", CASES)
def test_trick(name, benchmark, monkeypatch):
    build, replacement, least = CASES[name]
    with_trick = build()
    with monkeypatch.context() as patch:
        patch.setattr(*replacement)
        jax.clear_caches()  # of functions that were traced with the trick
        without = build()
    jax.clear_caches()
    pairs = [(with_trick.seconds(), without.seconds()) for _ in range(ROUNDS)][2:]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    ratio = medians[1] / medians[0]
    benchmark.extra_info.update(
        jax=jax.__version__,
        ratio=round(ratio, 2),
        with_trick=planned(with_trick),
        without=planned(without),
    )
    print(f"\n{name}: {benchmark.extra_info}")
    benchmark.pedantic(with_trick.seconds, rounds=1)
    assert ratio > least
