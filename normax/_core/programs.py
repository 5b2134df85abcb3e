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
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


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


def scan_counts(equation: JaxprEqn) -> tuple[int, int]:
    """Return how many arguments of a scan are constants, and how many are carried.

    Their ranks show it. The body sees those arrays that are scanned over without
    their first axis.
    """
    body, _ = open_program(equation.params["jaxpr"])

    def same_rank(whole: Sequence[Any], inner: Sequence[Any]) -> int:
        pairs = zip(whole, inner, strict=True)
        return sum(a.aval.ndim == b.aval.ndim for a, b in pairs)

    carried = same_rank(equation.outvars, body.outvars)
    return same_rank(equation.invars, body.invars) - carried, carried


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


def may_collide(equation: JaxprEqn) -> bool:
    """Return whether an equation may write several entries to one place."""
    return (
        equation.primitive.name == "scatter" and not equation.params["unique_indices"]
    )


def mixed_lengths(equation: JaxprEqn) -> tuple[int, ...]:
    """Return the lengths of the axes along which an equation mixes entries."""
    if not equation.invars:
        return ()
    shape, name = getattr(equation.invars[0].aval, "shape", ()), equation.primitive.name
    match name:
        case "dot_general":
            return tuple(shape[i] for i in contraction(equation)[0][0])
        case "conv_general_dilated":
            batch = convolution(equation)["dimension_numbers"].lhs_spec[0]
            return tuple(n for i, n in enumerate(shape) if i != batch)
        case "scan":
            return (equation.params["length"],)
    if "window_dimensions" in equation.params:
        sizes = window(equation)["window_dimensions"]
        return tuple(n for n, k in zip(shape, sizes, strict=True) if k > 1)
    reduces = name.startswith(("reduce", "arg", "cum"))
    known = reduces and {"axes", "axis"} & equation.params.keys()
    return tuple(shape[i] for i in reduced_axes(equation)) if known else ()


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
