"""Programs as JAX traces them, and all that differs by JAX's version.

Whatever reads a primitive's parameters by name, or a class of JAX by its name, stands
here. Versions 0.8.1 to 0.12 differ so:

- Up to 0.11, `ClosedJaxpr` holds a `Jaxpr` and its constants; in 0.12 both names are
  one class, and every jaxpr may have constants.
- Since 0.11, a scan counts its arguments by trees, `ft_in` and `ft_out`; before, it has
  `num_consts` and `num_carry`.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import jax
from jax.extend.core import ClosedJaxpr, Jaxpr, JaxprEqn


def open_program(program: Jaxpr | ClosedJaxpr) -> tuple[Jaxpr, Sequence[Any]]:
    """Return a jaxpr and the arrays that it closes over."""
    # In this order, since one class may bear both names.
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

    Ranks tell: the body sees an array that is scanned over without its first axis.
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
    """Return the program that an equation stands for, with what it closes over.

    Returns:
      The program, or None for a primitive of its own, or one with a rule of its own.
    """
    if equation.primitive.name not in _CALLS:
        return None
    names = ("jaxpr", "call_jaxpr", "fun_jaxpr")
    found = (equation.params[name] for name in names if name in equation.params)
    return open_program(next(found))


def mixed_lengths(equation: JaxprEqn) -> tuple[int, ...]:
    """Return the lengths of the axes along which an equation mixes entries."""
    if not equation.invars:
        return ()
    shape, params = getattr(equation.invars[0].aval, "shape", ()), equation.params
    match equation.primitive.name:
        case "dot_general":
            return tuple(shape[i] for i in params["dimension_numbers"][0][0])
        case "conv_general_dilated":
            batch = params["dimension_numbers"].lhs_spec[0]
            return tuple(n for i, n in enumerate(shape) if i != batch)
        case "scan":
            return (params["length"],)
    if windows := params.get("window_dimensions"):
        return tuple(n for n, k in zip(shape, windows, strict=True) if k > 1)
    axes = params.get("axes", (params["axis"],) if "axis" in params else ())
    reduces = equation.primitive.name.startswith(("reduce", "arg", "cum"))
    return tuple(shape[i] for i in axes) if reduces else ()


# Functions among the parameters of a primitive that say nothing about its results: of
# rules for derivatives that are not taken, of what to keep in memory, and those that a
# jaxpr beside them describes.
REDUNDANT_PARAMETERS = {
    "custom_jvp_call": {"jvp_jaxpr_fun"},
    "custom_vjp_call": {"fwd_jaxpr_thunk", "bwd", "out_trees"},
    "checkpoint": {"policy"},
    "remat2": {"policy"},
    "reduce": {"computation"},
}


def is_key(array: Any) -> bool:
    """Return whether an array holds random keys, which are no numbers."""
    return jax.dtypes.issubdtype(array.dtype, jax.dtypes.prng_key)


def compiled(fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return the function compiled anew, unless the user has compiled it."""
    # Of the same function `jax.jit` would keep what it closed over at its first call.
    if isinstance(fn, jax.stages.Wrapped):
        return fn
    return jax.jit(functools.partial(fn))
