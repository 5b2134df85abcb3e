"""Time and memory of an update step beside plain Adam's.

    python -m pytest --noconftest tests/benchmarks/bench_update.py

33.6 million float32 parameters in eight kernels of 1024 x 4096; the update step
alone, compiled, with parameters and state donated. Both steps run in one process,
in alternation; reported is the ratio of the medians, and the temporary memory that
the compiler plans. Without the tests' settings, which split the CPU into eight devices.
"""

import functools
import statistics
import time

import jax
import jax.numpy as jnp
import optax
import pytest

import normax

KERNELS, SHAPE, ROUNDS = 8, (1024, 4096), 30

# The largest ratio that is good enough, on a CPU and on an accelerator.
LIMITS = {
    "project_unit_norm": (normax.project_unit_norm(), 2.5, 1.3),
    "project_unit_norm_initial": (
        normax.project_unit_norm(radius="initial"),
        2.5,
        1.3,
    ),
    "monitor_weight_dynamics": (normax.monitor_weight_dynamics(), 2.5, 2.5),
}


class Step:
    """A compiled update step, and the arrays that it is called with next."""

    def __init__(self, tx: optax.GradientTransformation):
        keys = jax.random.split(jax.random.key(0), KERNELS)
        self.params = [jax.random.normal(key, SHAPE) for key in keys]
        self.grads = [0.01 * kernel + 0.001 for kernel in self.params]
        self.state = tx.init(self.params)

        # JAX pairs donated arrays with results of their shape in order: parameters
        # and state have to come out in the order in which they go in.
        @functools.partial(jax.jit, donate_argnums=(0, 1))
        def step(params, state, grads):
            updates, state = tx.update(grads, state, params)
            return optax.apply_updates(params, updates), state

        arguments = self.params, self.state, self.grads
        self.compiled = step.lower(*arguments).compile()

    def __call__(self) -> None:
        self.params, self.state = self.compiled(self.params, self.state, self.grads)
        jax.block_until_ready(self.params)

    def seconds(self) -> float:
        start = time.perf_counter()
        self()
        return time.perf_counter() - start

    def temporary_mebibytes(self) -> float:
        analysis = self.compiled.memory_analysis()
        assert analysis is not None
        return analysis.temp_size_in_bytes / 2**20


@pytest.mark.parametrize("name", LIMITS)
def test_update_step(name, benchmark):
    tx, cpu_limit, accelerator_limit = LIMITS[name]
    adam, ours = Step(optax.adam(1e-3)), Step(optax.chain(optax.adam(1e-3), tx))
    pairs = [(adam.seconds(), ours.seconds()) for _ in range(ROUNDS)][3:]
    medians = [statistics.median(column) for column in zip(*pairs, strict=True)]
    ratio = medians[1] / medians[0]
    benchmark.extra_info.update(
        device=jax.devices()[0].device_kind,
        jax=jax.__version__,
        adam_ms=round(1e3 * medians[0], 2),
        ours_ms=round(1e3 * medians[1], 2),
        ratio=round(ratio, 2),
        adam_temporary_MiB=round(adam.temporary_mebibytes(), 1),
        ours_temporary_MiB=round(ours.temporary_mebibytes(), 1),
    )
    print(f"\n{name}: {benchmark.extra_info}")
    benchmark.pedantic(ours, rounds=3)
    on_cpu = jax.default_backend() == "cpu"
    assert ratio < (cpu_limit if on_cpu else accelerator_limit)
    for kernel in ours.params:
        assert jnp.all(jnp.isfinite(kernel))
