r"""Sweeps: one training run, compiled once, at every point of a grid.

A small network leaves most of a GPU or TPU idle: there `jax.vmap` does many runs in the
time of one. On a CPU batched operations are slower than single ones, but a run leaves
most cores idle: as many runs as there are cores go side by side. A mesh spreads the
points over its devices.
"""

import os
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from normax._axes import PyTree
from normax._checks import check_range


def _points(grid: Mapping[str, jax.typing.ArrayLike]) -> tuple[PyTree, tuple[int, ...]]:
    """Return the hyperparameters of all points, and the shape of the grid."""
    axes = {name: jnp.asarray(values) for name, values in grid.items()}
    for name, values in axes.items():
        if values.ndim != 1 or not values.size:
            raise ValueError(
                "every axis of a grid is a 1-D array of one value or more, but that of "
                f"{name!r} has shape {values.shape}; pass a list of values, or hold a "
                "single one fixed in `train_fn`."
            )
    shape = tuple(len(values) for values in axes.values())
    indices = np.meshgrid(*map(np.arange, shape), indexing="ij")
    pairs = zip(axes.items(), indices, strict=True)
    return {name: values[index.ravel()] for (name, values), index in pairs}, shape


def _runs_at_once(
    batch_size: int | None, count: int, devices: int, cpu: bool
) -> tuple[int, int]:
    """Return the points of one call, a multiple of the devices, and calls at once."""
    if batch_size is None:
        batch_size = max(devices, os.cpu_count() or 1) if cpu else count
    if cpu and devices == 1:
        return 1, min(batch_size, count)
    # Fewer points than devices are repeated: a part of a device's work costs nothing.
    return max(1, min(batch_size, count) // devices) * devices, 1


def grid_sweep(
    train_fn: Callable[..., PyTree],
    grid: Mapping[str, jax.typing.ArrayLike],
    *,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
) -> PyTree:
    r"""Train at every point of a grid of hyperparameters, as one compiled program.

    $$r_{i j \dots} = f(a_i, b_j, \dots), \qquad
      (a_i, b_j, \dots) \in A \times B \times \dots$$

    `train_fn` is traced and compiled once. On a GPU or TPU it is batched with
    `jax.vmap`; on a CPU several runs go side by side, in threads or on the devices of a
    mesh. A run that diverges does not touch the others.

    Args:
      train_fn: A training run, `train_fn(**hyperparameters) -> pytree of arrays`, that
        can be traced: loops are `lax.scan` or `lax.fori_loop`. Data and keys may be
        closed over.
      grid: 1-D arrays of values, by name, such as
        `{"learning_rate": ..., "weight_decay": ...}`; arrays of random keys as well.
      batch_size: Most runs at once, which bounds the memory. None for the number of
        cores on a CPU, and for the entire grid on other devices. With a mesh, one
        run for each device at least.
      mesh: Devices to spread the points over, all of its axes together; None for the
        default device.
      progress: Whether to show a progress bar, which needs tqdm. It counts calls of
        the program: choose `batch_size` on a GPU, where one call may be the entire
        grid.

    Returns:
      What `train_fn` returns, with the axes of the grid in front of every array, in
      their order in `grid`. Numbers are those of single runs, up to the order of sums
      where runs are batched.

    Raises:
      ValueError: An axis of the grid is no 1-D array with at least one value, or
        `batch_size` is less than 1.
      Exception: Whatever `train_fn` raises.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def train(learning_rate, weight_decay):  # gradient descent on (w - 1)^2 / 2
      ...     w = jnp.zeros(())
      ...     for _ in range(10):
      ...         w = w - learning_rate * (w - 1 + weight_decay * w)
      ...     return {"w": w, "loss": (w - 1) ** 2 / 2}
      >>> grid = {"learning_rate": [0.5, 1.0], "weight_decay": [0.0, 0.25, 1.0]}
      >>> results = normax.grid_sweep(train, grid)
      >>> results["w"].shape, round(float(results["w"][0, 1]), 2)
      ((2, 3), 0.8)

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017,
      figures 1 to 3, sweep learning rate and weight decay.
    """
    check_range("batch_size", batch_size, low=1)
    points, shape = _points(grid)
    count = int(np.prod(shape, dtype=int))
    devices = list(mesh.devices.flat) if mesh else list(jnp.zeros(()).devices())
    cpu = devices[0].platform == "cpu"
    size, workers = _runs_at_once(batch_size, count, len(devices), cpu)

    def run(point):
        return jax.tree.map(jnp.asarray, train_fn(**point))

    def run_all(points):
        if size == len(devices):
            one = run({name: values[0] for name, values in points.items()})
            return jax.tree.map(lambda x: x[None], one)
        return lax.map(run, points) if cpu else jax.vmap(run)(points)

    if mesh is None:
        program, place = run_all, lambda points: points
    else:
        spec = P(mesh.axis_names)
        program = jax.shard_map(
            run_all, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
        place = lambda points: jax.device_put(  # noqa: E731
            points, NamedSharding(mesh, spec)
        )

    def some(start):
        # The last call repeats a point rather than to be compiled for fewer.
        index = np.minimum(np.arange(start, start + size), count - 1)
        return place({name: values[index] for name, values in points.items()})

    compiled = jax.jit(program).lower(some(0)).compile()
    starts = range(0, count, size)
    with ThreadPoolExecutor(workers) as pool:
        results = pool.map(lambda start: jax.device_get(compiled(some(start))), starts)
        chunks = list(_watched(results, len(starts), progress))

    def join(*parts):
        whole = np.concatenate(parts)[:count]
        return jnp.asarray(whole.reshape(shape + whole.shape[1:]))

    return jax.tree.map(join, *chunks)


def _watched(results: Iterable[Any], total: int, progress: bool) -> Iterable[Any]:
    if not progress:
        return results
    from tqdm import tqdm

    return tqdm(results, total=total, unit="call")
