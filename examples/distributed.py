"""A sharded model, trained by several processes with `jax.distributed`.

`python examples/distributed.py` starts two processes of itself on this machine, and
they talk over a port. Each has one device, and all devices form a mesh. A batch is
split over it, and so is every kernel, with its part of AdamW's averages. normax needs
nothing for this: norms and angles are sums, and the compiler adds the parts.

On a pod, or on several machines with GPUs:

- Nothing is launched from here. Each machine runs the same program, by Slurm, GKE or
  `gcloud compute tpus tpu-vm ssh --worker=all`.
- `jax.distributed.initialize()` takes no arguments there. It finds the others by
  itself. On a cluster that it does not know, it needs those given below.
- `XLA_FLAGS` and `JAX_PLATFORMS` are left out. They make a CPU device here.
- Each process reads its own part of the data. It hands this part to
  `jax.make_array_from_process_local_data`, as `batches` does below.
- Checkpoints go to a file system that all share, and every process calls Orbax.
- Only process 0 prints and logs, but every process calls what computes with arrays.

Process 0 prints the table and the losses; the others print nothing.
"""

import argparse
import json
import os
import socket
import subprocess
import sys
from collections.abc import Iterator, Sequence
from typing import Any

BATCH = 16


def launch(argv: Sequence[str], processes: int) -> str:
    """Run this program in some processes and return what the first has printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    flag = "--xla_force_host_platform_device_count=1"
    environment = os.environ | {"XLA_FLAGS": flag, "JAX_PLATFORMS": "cpu"}
    workers = [
        subprocess.Popen(
            [sys.executable, __file__, *argv, "--process", str(i), "--port", str(port)],
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        for i in range(processes)
    ]
    results = [worker.communicate() for worker in workers]
    for worker, (_, errors) in zip(workers, results, strict=True):
        if worker.returncode:
            raise RuntimeError(f"a process ended with {worker.returncode}: {errors}")
    return results[0][0]


def work(options: argparse.Namespace) -> None:
    """Train as one of the processes; process 0 prints what was found."""
    import jax

    # This comes before anything else that JAX does.
    address = f"127.0.0.1:{options.port}"
    jax.distributed.initialize(address, options.processes, options.process)
    import numpy as np
    import optax
    from flax import nnx
    from jax.sharding import AxisType, NamedSharding
    from jax.sharding import PartitionSpec as P
    from layer_dynamics import from_nnx, loss_fn
    from transformer import Setting, Transformer, read_text

    import normax

    devices = jax.device_count()
    mesh = jax.make_mesh((devices,), ("all",), (AxisType.Auto,))
    setting = Setting(options.width, 1, 2, 32)

    def make() -> nnx.Module:
        return Transformer(setting, nnx.Rngs(0))

    # This has shapes alone. No process holds more than its part of the model.
    network = from_nnx(nnx.eval_shape(make))

    def sharding(array: jax.Array) -> NamedSharding:
        # Mostly the last axis counts vectors, so a device holds whole vectors. An axis
        # within the vectors would do as well.
        split = array.ndim > 1 and array.shape[-1] % devices == 0
        last = ("all",) if split else ()
        return NamedSharding(mesh, P(*(None,) * (array.ndim - len(last)), *last))

    shardings = jax.tree.map(sharding, network.params)
    init = jax.jit(lambda: nnx.state(make(), nnx.Param), out_shardings=shardings)
    params = init()
    optimizer = optax.chain(
        optax.adamw(1e-2, weight_decay=0.3, mask=network.mask),
        normax.monitor_weight_dynamics(network.axes, decay=0.9),
    )
    state = jax.jit(optimizer.init)(params)

    def batches() -> Iterator[Any]:
        text, rng = read_text(), np.random.default_rng(0)
        rows = NamedSharding(mesh, P("all"))
        size = BATCH // options.processes
        for _ in range(options.steps):
            starts = rng.integers(len(text) - setting.context, size=BATCH)
            own = starts[options.process * size :][:size]
            pieces = text[own[:, None] + np.arange(setting.context + 1)]
            yield tuple(
                jax.make_array_from_process_local_data(rows, part)
                for part in (pieces[:, :-1], pieces[:, 1:])
            )

    @jax.jit
    def step(params: Any, state: Any, batch: Any) -> Any:
        grad_fn = jax.value_and_grad(loss_fn, argnums=1, has_aux=True)
        (loss, _), grads = grad_fn(network, params, network.rest, batch)
        updates, state = optimizer.update(grads, state, params)
        return optax.apply_updates(params, updates), state, loss

    losses = []
    for batch in batches():
        params, state, loss = step(params, state, batch)
        losses.append(float(loss))
    scalars = jax.jit(normax.dynamics_scalars)(state)
    found = {name: float(scalar) for name, scalar in scalars.items()}
    largest = max(jax.tree.leaves(params), key=lambda array: array.size)
    parts = largest.size // largest.addressable_shards[0].data.size
    table = normax.dynamics_table(state, "adamw", 1e-2, 0.3)
    if options.process == 0:
        print(table)
        numbers = {"losses": losses, "scalars": found, "parts": parts}
        print(json.dumps(numbers | {"processes": jax.process_count()}))


def main(argv: Sequence[str] | None = None) -> dict[str, Any]:
    """Start the processes and return the numbers that process 0 has found."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    add = parser.add_argument
    add("--processes", type=int, default=2, choices=(1, 2))
    add("--steps", type=int, default=50)
    add("--width", type=int, default=32)
    add("--process", type=int, help=argparse.SUPPRESS)
    add("--port", type=int, help=argparse.SUPPRESS)
    argv = sys.argv[1:] if argv is None else argv
    options = parser.parse_args(argv)
    if options.process is not None:
        work(options)
        return {}
    *table, last = launch(argv, options.processes).splitlines()
    numbers = json.loads(last)
    losses = numbers["losses"]
    print("\n".join(table))
    print(f"{numbers['processes']} processes: loss {losses[0]:.3f} to {losses[-1]:.3f}")
    return numbers


if __name__ == "__main__":
    main()
