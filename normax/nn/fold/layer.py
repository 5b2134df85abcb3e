"""Batch normalization at inference, merged into the layer before it."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from flax import nnx
from jax import lax

from normax._core.norms import at_least_float32
from normax._core.programs import full_precision
from normax.nn.batch_renorm import BatchRenorm
from normax.nn.module_axes import vector_axes

# Subclasses are left out, since they may compute something else.
LAYERS = (nnx.Linear, nnx.Conv, nnx.ConvTranspose)
BATCH_NORMS = (nnx.BatchNorm, BatchRenorm)


def misfit(layer: Any, batch_norm: Any) -> str | None:
    """Return why a pair cannot become one layer, or None if it can."""
    if type(layer) not in LAYERS:
        names = ", ".join(kind.__name__ for kind in LAYERS)
        return f"the layer must be one of {names}, got {type(layer).__name__}"
    if type(batch_norm) not in BATCH_NORMS:
        names = ", ".join(kind.__name__ for kind in BATCH_NORMS)
        return f"batch_norm must be one of {names}, got {type(batch_norm).__name__}"
    if batch_norm.num_features != layer.out_features:
        return (
            "batch_norm must have as many features as the layer's output, but has "
            f"{batch_norm.num_features} and the layer {layer.out_features}"
        )
    spatial = len(getattr(layer, "kernel_size", ()))
    if layer.kernel.ndim != spatial + 2 or batch_norm.mean.ndim != 1:
        return (
            "neither may hold a stack of several, but the kernel has shape "
            f"{layer.kernel.shape} and the mean {batch_norm.mean.shape}"
        )
    if batch_norm.axis not in (-1, layer.kernel.ndim - 1):
        return (
            "batch_norm must normalize the layer's last axis, but its axis is "
            f"{batch_norm.axis}"
        )
    return None


def fold_batch_norm(layer: Any, batch_norm: nnx.BatchNorm) -> Any:
    r"""Merge batch normalization at inference into the layer before it.

    $$\gamma\, \frac{(w * x + b) - \mu}{\sigma} + \beta = w' * x + b', \qquad
    w' = \frac{\gamma}{\sigma}\, w, \quad
    b' = \frac{\gamma}{\sigma}\, (b - \mu) + \beta, \quad
    \sigma = (\text{var} + \varepsilon)^{1/2}$$

    Here $\mu$ and var are the running statistics. Rounding alone changes the outputs;
    `folding_error` measures it.

    Args:
      layer: A `Linear`, `Conv` or `ConvTranspose` of Flax NNX.
      batch_norm: The `BatchNorm` or `BatchRenorm` that is called on its output.

    Returns:
      A new layer of the same kind and dtypes, with a bias.

    Raises:
      ValueError: The layer is of another kind, or `batch_norm` does not fit it.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> from flax import nnx
      >>> linear = nnx.Linear(2, 1, use_bias=False, rngs=nnx.Rngs(0))
      >>> linear.kernel[...] = jnp.array([[1.0], [2.0]])
      >>> norm = nnx.BatchNorm(1, epsilon=0.0, rngs=nnx.Rngs(0))
      >>> norm.mean[...], norm.var[...] = jnp.array([3.0]), jnp.array([4.0])
      >>> folded = normax.nn.fold_batch_norm(linear, norm)
      >>> folded.kernel[...], folded.bias[...]
      (Array([[0.5], [1. ]], dtype=float32), Array([-1.5], dtype=float32))

    References:
      Ioffe, Szegedy, Batch Normalization, 2015.
    """
    reason = misfit(layer, batch_norm)
    if reason is not None:
        raise ValueError(
            f"{reason}; keep batch_norm in the model and call it where it stands."
        )
    kernel, bias, mean, var, scale, shift = at_least_float32(
        layer.kernel[...],
        0.0 if layer.bias is None else layer.bias[...],
        batch_norm.mean[...],
        batch_norm.var[...],
        1.0 if batch_norm.scale is None else batch_norm.scale[...],
        0.0 if batch_norm.bias is None else batch_norm.bias[...],
    )
    factor = scale * lax.rsqrt(var + batch_norm.epsilon)
    bias = (bias - mean) * factor + shift
    summed = vector_axes(layer, "kernel", kernel.ndim) or ()
    weight = kernel * jnp.expand_dims(factor, summed)
    folded = nnx.clone(layer)
    dtype = layer.kernel.dtype
    folded.kernel = layer.kernel.replace(weight.astype(dtype))
    if layer.bias is None:
        folded.bias, folded.use_bias = nnx.Param(bias.astype(dtype)), True
    else:
        folded.bias = layer.bias.replace(bias.astype(layer.bias.dtype))
    return folded


def inference(model: Callable[..., Any]) -> Callable[..., Any]:
    """Return a copy of a module in inference mode; return other functions as given."""
    if isinstance(model, nnx.Module):
        model = nnx.clone(model)
        model.eval()
    return model


@full_precision()
def folding_error(
    model: Callable[..., Any], folded: Callable[..., Any], *args: Any, **kwargs: Any
) -> jax.Array:
    r"""Largest difference that folding made to the outputs at inference.

    $$\max_i |f(x)_i - f'(x)_i|$$

    Only the rounding of folding is to be measured. So float32 matrices are multiplied
    in full precision, also on a GPU, unless a function names another.

    Args:
      model: The original module, or any function.
      folded: The module or function that takes its place.
      *args: Inputs of both.
      **kwargs: Further inputs of both.

    Returns:
      The largest absolute difference of all outputs, float32 or better, of shape ().

    Raises:
      ValueError: The two return pytrees of different structure.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> from flax import nnx
      >>> linear = nnx.Linear(2, 4, rngs=nnx.Rngs(0))
      >>> norm = nnx.BatchNorm(4, rngs=nnx.Rngs(0))
      >>> folded = normax.nn.fold_batch_norm(linear, norm)
      >>> pair = nnx.Sequential(linear, norm)
      >>> bool(normax.nn.folding_error(pair, folded, jnp.ones((1, 2))) < 1e-6)
      True

    References:
      Zaytsev, Burnaev, Deep learning models and how to train them (lecture).
    """
    expected, found = (inference(f)(*args, **kwargs) for f in (model, folded))

    def largest(x: jax.Array, y: jax.Array) -> jax.Array:
        x, y = at_least_float32(x, y)
        return jnp.max(jnp.abs(x - y), initial=0.0)

    errors = jax.tree.leaves(jax.tree.map(largest, expected, found))
    return jnp.max(jnp.stack([jnp.zeros([]), *errors]))
