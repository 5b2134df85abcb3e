"""Checks of arguments. Each error says how to put the argument right."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax


def check_range(name: str, value: Any, low: float, below: float = float("inf")) -> None:
    """Raise unless every number in a pytree lies in `[low, below)`.

    Traced numbers pass, since they are not known yet. Those of
    `optax.inject_hyperparams` under `jit` are of this kind.
    """
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, jax.core.Tracer):
            continue
        array = np.asarray(leaf)
        if not np.all((array >= low) & (array < below)):
            upper = "finite" if below == float("inf") else f"below {below}"
            raise ValueError(
                f"{name} must be at least {low} and {upper}, got {array}; "
                f"choose {name} in that range."
            )


def check_positive(name: str, value: Any) -> None:
    """Raise unless every number in a pytree is positive and finite, or traced."""
    for leaf in jax.tree.leaves(value):
        if isinstance(leaf, jax.core.Tracer):
            continue
        array = np.asarray(leaf)
        if not np.all((array > 0) & (array < np.inf)):
            raise ValueError(
                f"{name} must be positive and finite, got {array}; choose {name} "
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
    """Return `transformation`, which refuses complex and missing parameters."""
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
        return transformation.update(updates, state, params, **extra_args)

    return optax.GradientTransformationExtraArgs(init_fn, update_fn)
