"""Checks of arguments. Each error says how to put the argument right."""

import difflib
import operator
from collections.abc import Iterable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from normax._core.axes import check_shapes


def _known_numbers(name: str, value: Any) -> Iterator[tuple[str, np.ndarray]]:
    """Yield the numbers in a pytree with their names, except those that are traced."""
    for path, leaf in jax.tree_util.tree_leaves_with_path(value):
        where = f"{name}{jax.tree_util.keystr(path)}"
        dtype = leaf.dtype if hasattr(leaf, "dtype") else np.asarray(leaf).dtype
        if not any(jnp.issubdtype(dtype, kind) for kind in (jnp.integer, jnp.floating)):
            fix = (
                "pass its value at one step, or schedule it by optax.inject_hyperparams"
                if callable(leaf)
                else "pass a float or an array of floats"
            )
            raise ValueError(f"{where} must be a real number, got {leaf!r}; {fix}.")
        if not isinstance(leaf, jax.core.Tracer):
            yield where, np.asarray(leaf)


def check_number(name: str, value: Any) -> None:
    """Raise unless all leaves of a pytree are real numbers, which may be traced."""
    for _ in _known_numbers(name, value):
        pass


def check_scalar(name: str, value: Any) -> None:
    """Raise unless a value is one real number, which may be traced."""
    check_number(name, value)
    if np.ndim(value):
        raise ValueError(
            f"{name} must be one number, but it has shape {np.shape(value)}; pass one "
            "at a time."
        )


def check_learning_rate(value: Any) -> None:
    """Raise unless a learning rate is a number or a schedule."""
    if not callable(value):
        check_number("learning_rate", value)


def nearest(name: Any, known: Iterable[str], otherwise: str) -> str:
    """Return what to do about an unknown name: take the nearest one, if any is near."""
    near = difflib.get_close_matches(str(name).lower(), known, n=1, cutoff=0.5)
    return f"did you mean {near[0]}?" if near else otherwise


def check_count(name: str, value: Any, fix: str) -> int:
    """Return a positive integer of Python's or NumPy's, or raise."""
    try:
        count = operator.index(value)
    except (TypeError, jax.errors.JAXTypeError):
        count = 0
    if count < 1 or isinstance(value, bool | np.bool):
        raise ValueError(f"{name} must be a positive integer, got {value!r}; {fix}.")
    return count


def check_range(name: str, value: Any, low: float, below: float = float("inf")) -> None:
    """Raise unless every number in a pytree lies in `[low, below)`.

    Traced numbers pass, since they are not known yet. Those of
    `optax.inject_hyperparams` under `jit` are of this kind.
    """
    for where, array in _known_numbers(name, value):
        if not np.all((array >= low) & (array < below)):
            upper = "finite" if below == float("inf") else f"below {below}"
            # An optimizer's numbers may be rounded to the dtype of the parameters.
            dtype = f" in {array.dtype}" if array.dtype.itemsize < 4 else ""
            raise ValueError(
                f"{where} must be at least {low} and {upper}, got {array}{dtype}; "
                f"choose {name} in that range."
            )


def check_positive(name: str, value: Any) -> None:
    """Raise unless every number in a pytree is positive and finite, or traced."""
    for where, array in _known_numbers(name, value):
        if not np.all((array > 0) & (array < np.inf)):
            raise ValueError(
                f"{where} must be positive and finite, got {array}; choose {name} "
                "above 0."
            )


def require_params(name: str, params: Any) -> Any:
    """Return `params`, or raise a ValueError that names the transformation."""
    if params is None:
        raise ValueError(
            f"normax.{name} depends on the parameters, but `params` is None; call "
            "update(updates, state, params)."
        )
    return params


def requiring_params(
    name: str, transformation: optax.GradientTransformation
) -> optax.GradientTransformationExtraArgs:
    """Return `transformation`, which refuses parameters and updates that do not fit."""
    transformation = optax.with_extra_args_support(transformation)

    def init_fn(params):
        for leaf in jax.tree.leaves(params):
            if jnp.iscomplexobj(leaf):
                raise ValueError(
                    f"normax.{name}: parameters must be real, but one has dtype "
                    f"{leaf.dtype}; hold real and imaginary parts as two arrays."
                )
        return transformation.init(params)

    def update_fn(updates, state, params=None, **extra_args):
        params = require_params(name, params)
        check_shapes(params, updates)
        return transformation.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
