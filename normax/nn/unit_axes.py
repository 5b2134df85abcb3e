"""The axes of all parameters of a model, as the argument `axes` takes them."""

import functools
from typing import Any

import jax
import numpy as np
from flax import linen, nnx

from normax._core.axes import Axes
from normax.nn.module_axes import KeyPath, nnx_vector_axes, vector_axes, within
from normax.nn.weight_norm import WeightNorm

_BRIDGES = (nnx.bridge.ToNNX, nnx.bridge.ToLinen)


def _refuse_bridge(module: Any) -> None:
    if isinstance(module, _BRIDGES):
        raise TypeError(
            "unit_axes reads modules of one kind, but the model holds a "
            f"{type(module).__name__}; take the axes of the module that it wraps."
        )


class _Recorder:
    """The axes of the parameters of all modules that a Linen module calls."""

    def __init__(self) -> None:
        self.called: set[KeyPath] = set()
        self.found: dict[KeyPath, tuple[tuple[int, ...], tuple[int, ...]]] = {}

    def __call__(self, call, args, kwargs, context):
        """Record a call, as `flax.linen.intercept_methods` wants it."""
        result, module = call(*args, **kwargs), context.module
        if module.scope is None:
            return result
        _refuse_bridge(module)
        self.called.add(module.path)
        equation = kwargs.get("einsum_str", args[1] if len(args) > 1 else None)
        own = linen.meta.unbox(module.variables.get("params", {}))
        for name, array in own.items():
            rank = len(getattr(array, "shape", ()))
            axes = vector_axes(module, name, rank, equation)
            if axes is not None:
                # Inside a scan the array is that of one step.
                self.found[(*module.path, name)] = axes, array.shape
        return result


def _linen_axes(model: linen.Module, inputs: Any, kwargs: Any) -> Any:
    leaves, treedef = jax.tree.flatten((inputs, kwargs))
    kinds = jax.Array | np.ndarray | jax.ShapeDtypeStruct
    arrays = {i: leaf for i, leaf in enumerate(leaves) if isinstance(leaf, kinds)}

    def init(arrays):
        merged = [arrays.get(i, leaf) for i, leaf in enumerate(leaves)]
        args, keywords = treedef.unflatten(merged)
        with linen.intercept_methods(recorder):
            return model.init(jax.random.key(0), *args, **keywords)

    def names(path):
        return tuple(key.key for key in path)

    def axes_of(path, array):
        axes, one = recorder.found.get(names(path), ((), ()))
        return within(axes, one, array.shape)

    for without_jit in (False, True):
        recorder = _Recorder()
        with jax.disable_jit(without_jit):
            params = jax.eval_shape(functools.partial(init), arrays).get("params", {})
        params = linen.meta.unbox(params)
        paths = [names(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]
        # What `linen.jit` has compiled before is not called again.
        if all(path[:-1] in recorder.called for path in paths):
            break
    return jax.tree_util.tree_map_with_path(axes_of, params)


def unit_axes(model: nnx.Module | linen.Module, /, *inputs: Any, **kwargs: Any) -> Axes:
    r"""Find the weight vectors of every parameter by what its Flax module does.

    $$y_j = \sum_{i \in \text{axes}} x_i\, w_{ij}$$

    A weight vector spans the axes that the module sums over to make one output: the
    inputs of `Linear`, the window and channels of `Conv`, the inputs of attention's
    query, key and value, its heads and features on the way out. `Einsum` says it by its
    equation. A row of `Embed` is one vector. Axes that stack several modules, as
    `nnx.vmap` and `nn.scan` make them, count vectors; where sizes coincide, they are
    taken to be in front. Biases, gains, and arrays that no module of Flax owns are
    `"none"`.

    Args:
      model: A model of Flax NNX, which `nnx.eval_shape` may have made, or a module of
        Flax Linen.
      *inputs: What the Linen module is called with; arrays may be
        `jax.ShapeDtypeStruct`. Nothing is computed.
      **kwargs: Further arguments of the Linen module.

    Returns:
      Nested dict like the parameters, with a tuple of axes or `"none"` for each: the
      `axes` argument of all of normax. For NNX it fits `nnx.state(model, nnx.Param)`
      and what `nnx.Optimizer(model, tx, wrt=nnx.Param)` gives to `tx`.

    Raises:
      TypeError: The model is none of Flax, it mixes NNX and Linen by a bridge, or an
        NNX model comes with inputs.

    Examples:
      >>> import normax
      >>> from flax import nnx
      >>> attention = nnx.MultiHeadAttention(2, 8, rngs=nnx.Rngs(0), use_bias=False)
      >>> axes = normax.nn.unit_axes(attention)
      >>> axes["query"], axes["out"]
      ({'kernel': (0,)}, {'kernel': (0, 1)})

    References:
      van Laarhoven, L2 Regularization versus Batch and Weight Normalization, 2017, §3.
    """
    if isinstance(model, linen.Module):
        return _linen_axes(model, inputs, kwargs)
    if not isinstance(model, nnx.Module):
        raise TypeError(
            "unit_axes reads the modules of a Flax model, but got "
            f"{type(model).__name__}; pass the nnx.Module, or the linen.Module and its "
            "inputs."
        )
    if inputs or kwargs:
        raise TypeError(
            "an NNX model holds its parameters, but unit_axes got "
            f"{len(inputs) + len(kwargs)} inputs for {type(model).__name__}; pass the "
            "model alone."
        )
    found = nnx_vector_axes(model)
    for path, module in nnx.iter_modules(model):
        _refuse_bridge(module)
        if isinstance(module, WeightNorm):
            kernels = dict(nnx.to_flat_state(nnx.state(module.layer, nnx.Param)))
            for kernel, axes in module.vector_axes:
                (array,) = jax.tree.leaves(kernels[kernel])
                whole = (*path, "layer", *kernel)
                if whole in found:  # not under another name of the same array
                    found[whole] = tuple(array.ndim + axis for axis in axes)
    return nnx.traversals.unflatten_mapping(found)
