"""Programs as JAX traces them, and all that depends on the version of JAX.

Code that reads a primitive's parameters by name stands here. The versions 0.8.1 to 0.12
differ as follows.

- Up to 0.11, `ClosedJaxpr` holds a `Jaxpr` and its constants. In 0.12 both names are
  one class, and every jaxpr may have constants.
- Before 0.11, a scan counts its arguments in `num_consts` and `num_carry`. Since then
  it has trees, `ft_in` and `ft_out`.
"""

import contextlib
import functools
import itertools
import weakref
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn, jaxpr_as_fun
from jax.sharding import AxisType, NamedSharding


def open_program(program: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """Return a jaxpr and the arrays that it closes over."""
    # This test comes first, since one class may have both names.
    if isinstance(program, ClosedJaxpr):
        return program.jaxpr, program.consts
    return program, ()


def called_programs(equation: JaxprEqn) -> Iterator[Jaxpr]:
    """Return the programs that an equation calls, such as the body of a loop."""
    for part in jax.tree.leaves(list(equation.params.values())):
        if isinstance(part, Jaxpr | ClosedJaxpr):
            yield open_program(part)[0]


class Scan(NamedTuple):
    """What a `scan` does.

    Attributes:
      body: The program of one step.
      consts: How many of its arguments are the same at every step.
      carries: How many of the next ones are carried from step to step.
      length: The number of steps.
      reverse: Whether the last step comes first.
    """

    body: ClosedJaxpr
    consts: int
    carries: int
    length: int
    reverse: bool


def scan_of(equation: JaxprEqn) -> Scan:
    """Return what a `scan` does.

    Ranks tell its arguments apart: the body sees an array that is scanned over without
    its first axis.
    """
    params = equation.params
    body, _ = open_program(params["jaxpr"])

    def same_rank(whole: Sequence[Any], inner: Sequence[Any]) -> int:
        pairs = zip(whole, inner, strict=True)
        return sum(a.aval.ndim == b.aval.ndim for a, b in pairs)

    carries = same_rank(equation.outvars, body.outvars)
    consts = same_rank(equation.invars, body.invars) - carries
    return Scan(params["jaxpr"], consts, carries, params["length"], params["reverse"])


_CALLS = {
    "pjit", "jit", "closed_call", "core_call", "checkpoint", "remat", "remat2",
    "custom_jvp_call", "custom_vjp_call", "custom_vjp_call_jaxpr",
}  # fmt: skip


def program_in_place(equation: JaxprEqn) -> tuple[Jaxpr, Sequence[Any]] | None:
    """Return the program that an equation calls in its place, and its constants.

    Returns:
      The program, or None if the equation is no mere call.
    """
    if equation.primitive.name not in _CALLS:
        return None
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    found = (equation.params[name] for name in names if name in equation.params)
    return open_program(next(found))


# The functions from here on read parameters that have one name in all versions.


def contraction(equation: JaxprEqn) -> Any:
    """Return the dimension numbers of a `dot_general`, as `lax.dot_general` has them.

    They are the axes of both operands that are summed over, and those of a batch.
    """
    return equation.params["dimension_numbers"]


def convolution(equation: JaxprEqn) -> dict[str, Any]:
    """Return the options of a convolution, as `lax.conv_general_dilated` has them."""
    names = (
        "window_strides", "padding", "lhs_dilation", "rhs_dilation",
        "dimension_numbers", "feature_group_count", "batch_group_count",
    )  # fmt: skip
    return {name: equation.params[name] for name in names}


def window(equation: JaxprEqn) -> dict[str, Any]:
    """Return the options of a pooling, as `lax.reduce_window` has them."""
    names = (
        "window_dimensions", "window_strides", "padding", "base_dilation",
        "window_dilation",
    )  # fmt: skip
    return {name: equation.params[name] for name in names}


def reduced_axes(equation: JaxprEqn) -> tuple[int, ...]:
    """Return the axes that a reduction, or a cumulative operation, goes over."""
    params = equation.params
    return tuple(params["axes"]) if "axes" in params else (params["axis"],)


def ranges_of_parts(
    equation: JaxprEqn, shape: Sequence[int]
) -> list[list[tuple[int, int]]] | None:
    """Return the range along every axis of each part that a slice or split takes.

    Returns:
      Ranges from a start to an end, or None for other primitives.
    """
    params = equation.params
    if equation.primitive.name == "slice":
        limits = zip(params["start_indices"], params["limit_indices"], strict=True)
        return [list(limits)]
    if equation.primitive.name != "split":
        return None
    ends = list(itertools.accumulate(params["sizes"], initial=0))
    parts = []
    for start, end in itertools.pairwise(ends):
        ranges = [(0, n) for n in shape]
        ranges[params["axis"]] = (start, end)
        parts.append(ranges)
    return parts


def inverse_permutation(equation: JaxprEqn) -> tuple[int, ...]:
    """Return the permutation that undoes a transposition."""
    return tuple(np.argsort(equation.params["permutation"]).tolist())


def broadcast_axes(equation: JaxprEqn) -> tuple[int, ...]:
    """Return where a broadcast puts the axes of its operand."""
    return equation.params["broadcast_dimensions"]


def fill_value(equation: JaxprEqn) -> Any:
    """Return what a gather takes for entries outside of the array, None by default."""
    return equation.params.get("fill_value")


@contextlib.contextmanager
def one_explicit_device() -> Iterator[None]:
    """Make every axis of the mesh explicit and of one device, for what is traced.

    A network that names shardings, `out_sharding=P("x")`, can be traced there only. An
    axis of one device divides every length, also that of a batch of one.
    """
    mesh: Any = jax.sharding.get_abstract_mesh()
    # JAX wants as many devices as before. They lie along an axis that nobody names.
    names = (*mesh.axis_names, "all devices")
    sizes = (*(1 for _ in mesh.axis_names), mesh.size)
    explicit = (AxisType.Explicit,) * len(names)
    one = jax.sharding.AbstractMesh(sizes, names, explicit)
    with jax.sharding.use_abstract_mesh(one):
        yield


def shape_of(leaf: Any) -> Any:
    """Return the shape and dtype of an array, without the mesh that it lies on."""
    dtype = getattr(leaf, "dtype", None)  # of random keys as well
    dtype = jax.dtypes.result_type(leaf) if dtype is None else dtype
    return jax.ShapeDtypeStruct(np.shape(leaf), dtype)


_LAYOUTS = ("mesh_cast", "reshard", "sharding_constraint")


def _is_explicit(parameter: Any) -> bool:
    """Return whether a parameter of an equation is a sharding on an explicit mesh."""
    return isinstance(parameter, NamedSharding) and (
        AxisType.Explicit in parameter.mesh.axis_types
    )


def bind(equation: JaxprEqn, *operands: Any, **changed: Any) -> Any:
    """Evaluate the primitive of an equation, with some parameters changed.

    Shardings of `one_explicit_device` are left out, since there is no such mesh.
    """
    params = equation.params | changed
    explicit = {name for name, value in params.items() if _is_explicit(value)}
    if explicit and equation.primitive.name in _LAYOUTS:
        return operands[0]
    return equation.primitive.bind(*operands, **params | dict.fromkeys(explicit))


def may_collide(equation: JaxprEqn) -> bool:
    """Return whether an equation may write several entries to one place."""
    return (
        equation.primitive.name == "scatter" and not equation.params["unique_indices"]
    )


# Lengths of the axes along which primitives mix entries.


def _first_shape(equation: JaxprEqn) -> tuple[int, ...]:
    operand: Any = equation.invars[0]
    return operand.aval.shape


def contracted_lengths(equation: JaxprEqn) -> tuple[int, ...]:
    """Return the lengths of the axes that a `dot_general` sums over."""
    shape = _first_shape(equation)
    return tuple(shape[i] for i in contraction(equation)[0][0])


def convolved_lengths(equation: JaxprEqn) -> tuple[int, ...]:
    """Return the lengths of all axes of a convolution but that of the batch."""
    batch = convolution(equation)["dimension_numbers"].lhs_spec[0]
    shape = _first_shape(equation)
    return tuple(n for i, n in enumerate(shape) if i != batch)


def window_lengths(equation: JaxprEqn) -> tuple[int, ...]:
    """Return the lengths of the axes that windows of a pooling extend along."""
    sizes = window(equation)["window_dimensions"]
    shape = _first_shape(equation)
    return tuple(n for n, k in zip(shape, sizes, strict=True) if k > 1)


def scanned_length(equation: JaxprEqn) -> tuple[int, ...]:
    """Return the number of steps of a scan."""
    return (scan_of(equation).length,)


def reduced_lengths(equation: JaxprEqn) -> tuple[int, ...]:
    """Return the lengths of the axes that any reduction goes over, and no others."""
    reduces = equation.primitive.name.startswith(("reduce", "arg", "cum"))
    if not (reduces and {"axes", "axis"} & equation.params.keys()):
        return ()
    shape = _first_shape(equation)
    return tuple(shape[i] for i in reduced_axes(equation))


# Some parameters of primitives are functions that say nothing about the results. They
# are rules for derivatives, say what to keep in memory, or repeat a jaxpr beside them.
REDUNDANT_PARAMETERS = {
    "custom_jvp_call": {"jvp_jaxpr_fun"},
    "custom_vjp_call": {"fwd_jaxpr_thunk", "bwd", "out_trees"},
    "checkpoint": {"policy"},
    "remat2": {"policy"},
    "reduce": {"computation"},
}


def is_key(array: Any) -> bool:
    """Return whether an array holds random keys."""
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def is_float(array: Any) -> bool:
    """Return whether an array or a number is real and has derivatives.

    Integers, complex numbers and random keys are not floats.
    """
    # JAX finds no common dtype of random keys, but they know their own.
    dtype = getattr(array, "dtype", None)
    dtype = jax.dtypes.result_type(array) if dtype is None else dtype
    return jax.dtypes.issubdtype(dtype, np.floating)


# By identity: functions that are equal may close over different data.
_KEPT: dict[int, dict[Any, Any]] = {}


def kept_with(function: Any) -> dict[Any, Any]:
    """Return a dictionary for programs that lives as long as a function.

    `jax.jit` compiles anew for every function that it is given. Programs that are made
    of one function are kept here, and are forgotten with it. They must not hold the
    function themselves, or it lives for ever.

    Returns:
      The same dictionary for the same object. A new one at every call for an object
      that takes no weak references, since its end would not be noticed.
    """
    if id(function) not in _KEPT:
        try:
            # Another object can have this identity only after the dictionary has gone.
            end = weakref.finalize(function, _KEPT.pop, id(function), None)
        except TypeError:
            return {}
        end.atexit = False
    return _KEPT.setdefault(id(function), {})


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled anew, unless the user has compiled it."""
    # `jax.jit` traces a function object once, and then keeps what it closed over. So
    # the function is wrapped in a new object.
    if isinstance(fn, jax.stages.Wrapped):
        return fn
    return jax.jit(functools.partial(fn))


@contextlib.contextmanager
def full_precision() -> Iterator[None]:
    """Make programs that are traced meanwhile multiply matrices in full float32.

    By default a GPU or TPU rounds the factors of matrix products to 10 or 7 bits. A
    comparison with float32 tolerances would take that for a difference of functions.
    JAX traces compiled functions again for the new precision. A precision that a
    function itself asks for stays.
    """
    with jax.default_matmul_precision("highest"):
        yield


def with_closure(
    fn: Callable[..., Any], *args: Any
) -> tuple[Callable[..., Any], list[Any]]:
    """Return `fn(closure, *args)` and the closure: the arrays that `fn` closes over.

    `jax.custom_jvp` knows no derivative by what a function closes over.
    """
    closed, shapes = jax.make_jaxpr(fn, return_shape=True)(*args)
    structure = jax.tree.structure(shapes)

    def call(closure, *args):
        program = jaxpr_as_fun(ClosedJaxpr(closed.jaxpr, closure))
        return jax.tree.unflatten(structure, program(*jax.tree.leaves(args)))

    return call, closed.consts
