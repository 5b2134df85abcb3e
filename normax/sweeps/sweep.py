"""Sweeps: one training run, compiled once, for many hyperparameters.

A small network leaves most of a device idle. On a GPU or TPU `jax.vmap` does many runs
in the time of one. On a CPU batched operations are slower than single ones, but as many
runs as there are cores go side by side. A mesh spreads the runs over its devices.
"""

import contextlib
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax, stages
from jax.sharding import Mesh, NamedSharding
from jax.sharding import PartitionSpec as P

from normax._core.axes import PyTree
from normax._core.checks import check_range
from normax._core.programs import is_key, kept_with

Points = Mapping[str, jax.Array]


def _arrays(values: Mapping[str, jax.typing.ArrayLike]) -> dict[str, jax.Array]:
    arrays = {name: jnp.asarray(array) for name, array in values.items()}
    for name, array in arrays.items():
        if array.ndim != 1 or not array.size:
            raise ValueError(
                "the values of a hyperparameter are a 1-D array of one or more, but "
                f"those of {name!r} have shape {array.shape}; pass a list of values, "
                "or hold a single one fixed in `train_fn`."
            )
    return arrays


def _runs_at_once(
    batch_size: int | None, count: int, devices: int, cpu: bool
) -> tuple[int, int]:
    """Return the runs of one call, a multiple of the devices, and calls at once."""
    if batch_size is None:
        batch_size = max(devices, os.cpu_count() or 1) if cpu else count
    if cpu and devices == 1:
        return 1, min(batch_size, count)
    # Where there are fewer runs than devices, some are repeated. Those devices would be
    # idle otherwise.
    return max(1, min(batch_size, count) // devices) * devices, 1


def _run(
    train_fn: Callable[..., PyTree],
) -> tuple[stages.Wrapped, dict[Any, stages.Wrapped]]:
    """Return the jitted function of one point, and the programs made of it so far."""
    programs, function = kept_with(train_fn), cast(Any, lambda: train_fn)
    with contextlib.suppress(TypeError):  # Some callables take no weak references.
        # The program must not keep alive the function that it is kept with.
        function = weakref.ref(train_fn)
    if None not in programs:
        programs[None] = jax.jit(
            lambda point: jax.tree.map(jnp.asarray, function()(**point))
        )
    return programs[None], programs


def _program(run: stages.Wrapped, mesh: Mesh | None, cpu: bool) -> stages.Wrapped:
    """Return the jitted function of the points of one call."""

    def run_all(points: Points) -> PyTree:
        if all(len(values) == 1 for values in points.values()):
            one = run({name: values[0] for name, values in points.items()})
            return jax.tree.map(lambda x: x[None], one)
        return lax.map(run, points) if cpu else jax.vmap(run)(points)

    if mesh is None:
        return jax.jit(run_all)
    spec = P(mesh.axis_names)
    return jax.jit(
        jax.shard_map(
            run_all, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False
        )
    )


def _train_all(
    train_fn: Callable[..., PyTree],
    points: Points,
    count: int,
    batch_size: int | None,
    mesh: Mesh | None,
    progress: bool,
    checkpoint_dir: str | os.PathLike[str] | None,
) -> PyTree:
    """Train at every point; return the results with one axis in front."""
    check_range("batch_size", batch_size, low=1)
    devices = list(mesh.devices.flat) if mesh else list(jnp.zeros(()).devices())
    cpu = devices[0].platform == "cpu"
    run, programs = _run(train_fn)
    finished, rows, digest = None, [None] * count, b""
    if checkpoint_dir is not None:
        # Orbax takes a second to import, which no other part of normax needs.
        from normax.sweeps.finished_runs import FinishedRuns

        finished = FinishedRuns(Path(checkpoint_dir), run, points, count)
        rows = [finished.load(index) for index in range(count)]
        # NumPy arrays may have changed since a program was compiled with them.
        digest = finished.program
    program = programs.setdefault((mesh, cpu, digest), _program(run, mesh, cpu))
    left = [index for index, row in enumerate(rows) if row is None]
    size, workers = _runs_at_once(batch_size, max(1, len(left)), len(devices), cpu)

    def chosen_at(start: int) -> Points:
        # The last call repeats points if too few are left. For fewer, the program would
        # be compiled again.
        index = np.resize(left[start : start + size], size)
        chosen = {name: values[index] for name, values in points.items()}
        if mesh is not None:
            chosen = jax.device_put(chosen, NamedSharding(mesh, P(mesh.axis_names)))
        return chosen

    # Threads do not inherit contexts such as `jax.enable_x64`. So the program is
    # compiled here, and they only run it.
    starts = range(0, len(left), size)
    calls = [chosen_at(start) for start in starts]
    compiled: Any = program.lower(calls[0]).compile() if calls else None

    def call(chosen: Points) -> PyTree:
        return jax.device_get(compiled(chosen))

    # If a run fails, or on Ctrl-C, `closing` cancels the calls that are left.
    with (
        ThreadPoolExecutor(workers) as pool,
        contextlib.closing(cast(Any, pool.map(call, calls))) as results,
    ):
        watched = _watched(results, len(calls), progress)
        for start, result in zip(starts, watched, strict=True):
            for offset, index in enumerate(left[start : start + size]):
                rows[index] = jax.tree.map(lambda x: x[offset], result)  # noqa: B023
                if finished is not None:
                    finished.save(index, rows[index])
    return jax.tree.map(_stacked, *rows)


def _stacked(*rows: Any) -> jax.Array:
    # NumPy is faster for many rows, but has no random keys.
    if is_key(rows[0]):
        return jnp.stack(rows)
    return jnp.asarray(np.stack(rows))


def sweep(
    train_fn: Callable[..., PyTree],
    points: Mapping[str, jax.typing.ArrayLike],
    *,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    checkpoint_dir: str | os.PathLike[str] | None = None,
) -> PyTree:
    r"""Train with each of several choices of hyperparameters, as one compiled program.

    $$r_i = f(a_i, b_i, \dots)$$

    The points need not form a grid: they may be random, or proposed by a search. A
    second call with this function object and number of points compiles nothing.

    Args:
      train_fn: A training run, as in `grid_sweep`.
      points: 1-D arrays of the same length, by name: one entry for each run.
      batch_size: As in `grid_sweep`.
      mesh: As in `grid_sweep`.
      progress: As in `grid_sweep`.
      checkpoint_dir: As in `grid_sweep`.

    Returns:
      What `train_fn` returns, with one axis, the runs, in front of every array.

    Raises:
      ValueError: Lengths differ, there are no arrays, or as in `grid_sweep`.

    Examples:
      >>> import normax
      >>> def train(learning_rate, weight_decay):  # one step from w = 1 on w^2 / 2
      ...     return 1 - learning_rate * (1 + weight_decay)
      >>> points = {"learning_rate": [0.5, 0.25], "weight_decay": [0.0, 1.0]}
      >>> normax.sweeps.sweep(train, points).tolist()
      [0.5, 0.5]

    References:
      Bergstra and Bengio, Random Search for Hyper-Parameter Optimization, 2012.
    """
    arrays = _arrays(points)
    lengths = {name: len(array) for name, array in arrays.items()}
    if len(set(lengths.values())) != 1:
        raise ValueError(
            "a sweep takes one value of every hyperparameter for each run, but the "
            f"numbers of values are {lengths}; pass arrays of one length, or use "
            "`grid_sweep` for all combinations."
        )
    count = next(iter(lengths.values()))
    return _train_all(
        train_fn, arrays, count, batch_size, mesh, progress, checkpoint_dir
    )


def grid_sweep(
    train_fn: Callable[..., PyTree],
    grid: Mapping[str, jax.typing.ArrayLike],
    *,
    batch_size: int | None = None,
    mesh: Mesh | None = None,
    progress: bool = False,
    checkpoint_dir: str | os.PathLike[str] | None = None,
) -> PyTree:
    r"""Train at every point of a grid of hyperparameters, as one compiled program.

    $$r_{i j \dots} = f(a_i, b_j, \dots), \qquad
      (a_i, b_j, \dots) \in A \times B \times \dots$$

    On a GPU or TPU the runs are batched with `jax.vmap`; on a CPU several go side by
    side. A run that diverges does not touch the others. As with `jax.jit`, what
    `train_fn` closes over is read at the first call with this function object.

    Args:
      train_fn: A training run, `train_fn(**hyperparameters) -> pytree of arrays`, that
        JAX can trace: its loops are `lax.scan` or `lax.fori_loop`.
      grid: 1-D arrays of values or of random keys, by name.
      batch_size: Most runs at once, which bounds the memory. None for the number of
        cores on a CPU, and for the entire grid on other devices.
      mesh: Devices to spread the points over, by all axes together; None for the
        default device. Each device takes at least one run.
      progress: Whether to show a progress bar of calls of the program; needs tqdm.
      checkpoint_dir: Folder for finished runs, stored with Orbax after every call. Runs
        that are found there are not run again, so a sweep that was killed continues.
        They are known by computation, data, hyperparameters and versions: any number
        of sweeps can share a folder, and what has changed runs anew. Storing takes
        some 50 ms a run.

    Returns:
      What `train_fn` returns, with the axes of the grid in front of every array, in
      their order in `grid`. Batching may change the order of sums.

    Raises:
      ValueError: An axis is no 1-D array of at least one value, `batch_size` is less
        than 1, or a run cannot be stored or read.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> def train(learning_rate, weight_decay):  # gradient descent on (w - 1)^2 / 2
      ...     w = jnp.zeros(())
      ...     for _ in range(10):
      ...         w = w - learning_rate * (w - 1 + weight_decay * w)
      ...     return {"w": w, "loss": (w - 1) ** 2 / 2}
      >>> grid = {"learning_rate": [0.5, 1.0], "weight_decay": [0.0, 0.25, 1.0]}
      >>> results = normax.sweeps.grid_sweep(train, grid)
      >>> results["w"].shape, round(float(results["w"][0, 1]), 2)
      ((2, 3), 0.8)

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017.
    """
    axes = _arrays(grid)
    shape = tuple(len(values) for values in axes.values())
    indices = np.meshgrid(*map(np.arange, shape), indexing="ij")
    pairs = zip(axes.items(), indices, strict=True)
    points = {name: values[index.ravel()] for (name, values), index in pairs}
    count = int(np.prod(shape, dtype=int))
    results = _train_all(
        train_fn, points, count, batch_size, mesh, progress, checkpoint_dir
    )
    return jax.tree.map(lambda x: x.reshape(shape + x.shape[1:]), results)


def _watched(results: Iterable[Any], total: int, progress: bool) -> Iterable[Any]:
    if not progress:
        return results
    from tqdm import tqdm

    return tqdm(results, total=total, unit="call")
