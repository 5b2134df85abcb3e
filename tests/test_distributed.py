"""Two processes that share one mesh make the step that one process makes."""

import os
import socket
import subprocess
import sys

import pytest

PROCESSES = 2


def worker(process: int, port: int) -> None:
    import jax

    jax.distributed.initialize(f"127.0.0.1:{port}", PROCESSES, process)
    import jax.numpy as jnp
    import numpy as np
    import optax
    from jax.experimental import multihost_utils
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P

    import normax

    assert jax.process_count() == PROCESSES
    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("x",), (AxisType.Auto,))
    weights = np.random.default_rng(0).normal(size=(2, 8, 8)).astype(np.float32)
    tx = optax.chain(
        optax.sgd(0.1, momentum=0.9),
        normax.remove_radial_component(),
        normax.project_unit_norm(radius="initial"),
        normax.monitor_weight_dynamics(decay=0.5),
    )

    def run(params, grads):
        state = tx.init(params)
        for _ in range(3):
            updates, state = tx.update(grads, state, params)
            params = optax.apply_updates(params, updates)
        return params, optax.tree.get(state, "angular_update")

    for spec in (P("x", None), P(None, "x")):  # split within and between the vectors
        sharding = NamedSharding(mesh, spec)
        params, grads = (
            jax.make_array_from_callback((8, 8), sharding, w.__getitem__)
            for w in weights
        )
        got = multihost_utils.process_allgather(jax.jit(run)(params, grads), tiled=True)
        expected = run(*(jnp.asarray(w) for w in weights))
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, rtol=2e-5, atol=1e-6)
    print("agreed")


@pytest.mark.slow
def test_two_processes():
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = os.environ | {
        "XLA_FLAGS": "--xla_force_host_platform_device_count=2",
        "JAX_PLATFORMS": "cpu",
    }
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, str(process), str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        for process in range(PROCESSES)
    ]
    outputs = [worker.communicate(timeout=240)[0] for worker in workers]
    for worker, output in zip(workers, outputs, strict=True):
        assert worker.returncode == 0, output
        assert "agreed" in output


if __name__ == "__main__":
    worker(int(sys.argv[1]), int(sys.argv[2]))
