"""In which order, and in how few passes over memory, a compiler computes things.

Nothing here changes a result. Each trick says what XLA does without it, and names the
case of `tests/benchmarks/bench_scheduling.py` that shows it. The ratios are those of
the times without and with the trick, on two cores, with JAX 0.10.2 and 0.12.
"""

import functools
from collections.abc import Callable, Iterable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import AxisType

from normax._core.axes import PyTree


@jax.custom_batching.custom_vmap
def _everywhere(conditions: Any) -> jax.Array:
    # Arrays of one type are joined first: one reduction less for each of them.
    joined: dict[Any, jax.Array] = {}
    for condition in jax.tree.leaves(conditions):
        kind = jax.typeof(condition)
        joined[kind] = joined[kind] & condition if kind in joined else condition
    whole = map(jnp.all, joined.values())
    return functools.reduce(jnp.logical_and, whole, jnp.bool(True))


@_everywhere.def_vmap
def _everywhere_vmap(axis_size, in_batched, conditions):
    # A whole batch shares one condition. If each of the batch had its own, `jax.vmap`
    # would compute both branches, and the branches would have to be sharded alike.
    del axis_size, in_batched
    return _everywhere(conditions), False


def in_one_pass(
    direct: Callable[..., tuple[Callable[[], Any], jax.Array]],
    careful: Callable[..., Any],
) -> Callable[..., Any]:
    """Make a function that takes sums directly, and with care only where it must.

    Without it XLA:CPU gives each of the careful sums a pass over memory of its own. The
    cases "norms" show a ratio of 1.9 for the projection and of 3.4 for the monitor.

    Args:
      direct: Takes the operands to a function that finishes the result, and to
        conditions, a pytree of arrays. Where all hold, the result is right, because
        nothing left the range of floats.
      careful: Takes the operands to a result that is always right.

    Returns:
      A function of the operands.
    """

    def call(*operands):
        finish, safe = direct(*operands)
        # Both branches run on a GPU, unless one only hands on what it was given.
        return lax.cond(
            _everywhere(safe),
            lambda result, operands: result,
            lambda result, operands: careful(*operands),
            finish(),
            operands,
        )

    return call


def on_cpu(fn: Callable[..., Any], otherwise: Callable[..., Any]) -> Callable[..., Any]:
    """Make a function that is `fn` on a CPU, and `otherwise` on other devices.

    XLA's compiler for GPUs takes several sums in one pass, and computes both branches
    of a condition. Its plan of a projection for an H200 takes 3% longer with
    `in_one_pass` and 2% longer with `wait`.
    """
    return lambda *operands: lax.platform_dependent(
        *operands, cpu=fn, default=otherwise
    )


def on_cuda(
    fn: Callable[..., Any], otherwise: Callable[..., Any]
) -> Callable[..., Any]:
    """Make a function that is `fn` on an NVIDIA GPU, and `otherwise` elsewhere."""
    return lambda *operands: lax.platform_dependent(
        *operands, cuda=fn, default=otherwise
    )


def sums(arrays: Iterable[jax.Array], axes: tuple[int, ...]) -> tuple[jax.Array, ...]:
    """Sum arrays of one shape over axes, which are kept, in one pass over memory.

    Without it XLA's compiler for NVIDIA GPUs makes two passes of three sums over
    columns, since each wants a third of a kernel's fast memory. Its plan of a step of
    Adam and the projection takes 1.11 times as long, of the monitor 1.12 times. Sums
    over rows and more would each end in a kernel of their own; the plan of a step of
    hyperball takes 1.11 times as long.
    """
    arrays = tuple(arrays)
    ndim = arrays[0].ndim
    last, axes = ndim - 1, tuple(axis % ndim for axis in axes)

    def stacked(*arrays):
        found = jnp.sum(jnp.stack(arrays, axis=last), axes, keepdims=True)
        return tuple(found[..., i, :] for i in range(len(arrays)))

    def in_rows(*arrays):
        rows = jnp.stack([jnp.sum(array, last, keepdims=True) for array in arrays])
        return tuple(jnp.sum(rows, [axis + 1 for axis in axes], keepdims=True))

    def separate(*arrays):
        return tuple(jnp.sum(array, axes, keepdims=True) for array in arrays)

    if axes == (last,) or len(set(map(jax.typeof, arrays))) > 1:
        return separate(*arrays)
    return on_cuda(in_rows if last in axes else stacked, separate)(*arrays)


@jax.custom_batching.custom_vmap
def _wait(array: jax.Array, event: jax.Array) -> jax.Array:
    # No event is negative, and a NaN compares false, so the condition never holds. XLA
    # cannot know that, and so computes the event first. With a constant in place of
    # -array, it would again plan fresh memory for every array.
    never = jnp.max(event) < 0
    return jnp.where(never, -array, array)


@_wait.def_vmap
def _wait_vmap(axis_size, in_batched, array, event):
    # The whole batch shares one condition. So only a batched array gives a batch.
    del axis_size
    return _wait(array, event), in_batched[0]


@jax.custom_batching.custom_vmap
def _wait_by_entry(array: jax.Array, event: jax.Array) -> jax.Array:
    # A GPU would need a kernel for the largest event, and several devices a message.
    return jnp.where(event < 0, -array, array)


@_wait_by_entry.def_vmap
def _wait_by_entry_vmap(axis_size, in_batched, array, event):
    del axis_size
    if not in_batched[0]:
        event = jnp.max(event, 0)
    elif not in_batched[1]:
        event = event[None]
    return _wait_by_entry(array, event), in_batched[0]


def _waiting(otherwise: Callable[..., jax.Array]) -> Callable[..., jax.Array]:
    @jax.custom_jvp
    @jax.jit
    def call(array, event):
        return on_cpu(_wait, otherwise)(array, event)

    call.defjvp(lambda primals, tangents: (call(*primals), tangents[0]))
    return call


_wait_on_cpu = _waiting(lambda array, event: array)
_wait_everywhere = _waiting(_wait_by_entry)


def in_shard_map() -> bool:
    """Return whether this is traced inside of `jax.shard_map`."""
    return AxisType.Manual in jax.sharding.get_abstract_mesh().axis_types


def wait(array: jax.Array, event: jax.Array, everywhere: bool = False) -> jax.Array:
    """Return `array`, on a CPU not before `event` is known.

    Without it XLA:CPU adds an update to a copy of the parameters, which the measures
    still read. The case "wait, monitor" shows a ratio of 2; `lax.optimization_barrier`
    does not help enough, as "wait, projection" shows, since XLA:CPU drops most of it.
    For GPUs, too, XLA would make that copy: a step of the monitor takes 1.08 times as
    long.

    Args:
      array: Any array.
      event: An array of non-negative numbers.
      everywhere: Whether other devices wait too. The event must broadcast against the
        array.

    Returns:
      `array`, unchanged. Inside `jax.shard_map` nothing waits, since an array that is
      the same on all devices must not depend on an event that is not.
    """
    if in_shard_map() or event.size == 0:
        return array
    return (_wait_everywhere if everywhere else _wait_on_cpu)(array, event)


def in_turn(fn: Callable[..., tuple[Any, jax.Array]]) -> Callable[..., Any]:
    """Make the calls of a function over several arrays wait for each other.

    Without it XLA:CPU writes the updates of all arrays to fresh memory before it
    reduces the first. The cases "in_turn" show a ratio of 1.9 for the projection and
    of 2.4 for the monitor; for eight arrays the former plans 128 MiB instead of 16.

    Args:
      fn: Called as `fn(vector_axes, w, u, *others)`. It returns a result, and the
        event, as in `wait`, after which the next array's update is computed.

    Returns:
      The function that returns the result alone.
    """
    done: list[jax.Array] = []

    def call(vector_axes, w, u, *others):
        u = wait(u, done[-1] if done else jnp.sum(w * w, vector_axes, keepdims=True))
        result, event = fn(vector_axes, w, u, *others)
        done.append(event)
        return result

    return call


def event_of(arrays: Iterable[jax.Array]) -> jax.Array:
    """Return a number, not negative, that is known when some arrays are."""
    entries = (
        lax.slice(x, (0,) * x.ndim, (1,) * x.ndim).reshape(()) for x in arrays if x.size
    )
    return sum((jnp.abs(x.astype(jnp.float32)) for x in entries), jnp.float32(0))


def one_after(event: jax.Array, updates: PyTree) -> jax.Array:
    """Return the number one, on a CPU not before an event and the updates are known.

    Without it XLA:CPU updates copies of the parameters, since path scales and gradients
    may still read them. The case "one_after, path_sgd" shows three more copies, which
    move 17% more bytes in a step, and a ratio of 1.04.
    """
    axis_types = jax.sharding.get_abstract_mesh().axis_types
    if in_shard_map() or AxisType.Explicit in axis_types:
        return jnp.float32(1)  # Devices may hold different entries of an array.
    arrays = map(jnp.asarray, jax.tree.leaves(updates))
    event += event_of(x for x in arrays if jnp.issubdtype(x.dtype, jnp.inexact))
    # XLA would repeat the sum for each parameter, but a root it computes once.
    event = lax.stop_gradient(jnp.sqrt(event))
    # XLA does not know that no event is negative; a NaN compares false.
    one = on_cpu(lambda event: jnp.where(event < 0, event, 1), jnp.ones_like)
    return one(event)


def unless(
    condition: jax.Array, result: Any, otherwise: Callable[..., Any], *operands: Any
) -> Any:
    """Return `result`, or `otherwise(*operands)` if a condition holds.

    XLA for GPUs computes both branches of a conditional if both compute something. So
    one branch hands on what was computed before.
    """
    return lax.cond(
        condition,
        lambda result, operands: otherwise(*operands),
        lambda result, operands: result,
        result,
        operands,
    )


def unless_safe(
    safe: PyTree, result: Any, careful: Callable[..., Any], *operands: Any
) -> Any:
    """Return `result` where all of `safe` holds, in a whole batch of `jax.vmap`.

    Otherwise it returns `careful(*operands)`. The case "unless_safe, path_sgd" shows
    what it saves to take sums directly where that is safe.
    """
    return unless(~_everywhere(safe), result, careful, *operands)
