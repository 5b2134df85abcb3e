"""Weight normalization of any Flax NNX layer."""

import operator
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import nnx

from normax._core.axes import Axes
from normax._core.norms import at_least_float32, nonzero, ratio, vector_norm
from normax.nn.module_axes import KeyPath, nnx_vector_axes

_KERNELS = nnx.PathContains("kernel")


def path_name(path: KeyPath) -> str:
    """Return how errors and results call the array or module at a path."""
    return "/".join(map(str, path))


def require_nnx(
    name: str, model: Any, fix: str, refused: type | tuple[type, ...] = ()
) -> None:
    """Raise unless a model is a module of Flax NNX, and of no kind that is refused."""
    if not isinstance(model, nnx.Module) or isinstance(model, refused):
        kind = type(model)
        raise ValueError(
            f"normax.nn.{name} takes a module of Flax NNX, got a "
            f"{kind.__module__}.{kind.__qualname__}; {fix}."
        )


def _vector_axes(
    feature_axes: str | int | Sequence[int] | None,
    of_module: Axes,
    name: str,
    kernel: jax.Array,
) -> tuple[int, ...]:
    """Return the axes of one weight vector as negative numbers."""
    rank = kernel.ndim
    if not jnp.issubdtype(kernel.dtype, jnp.floating):
        raise ValueError(
            f"weight vectors must be real, but {name} has dtype {kernel.dtype}; leave "
            "it out with variable_filter."
        )
    if isinstance(feature_axes, str):
        if feature_axes not in ("module", "unit"):
            raise ValueError(
                'feature_axes must be "module", "unit", an axis, several axes, or None '
                f"for one vector per array, got {feature_axes!r}."
            )
        features: Sequence[int] = (rank - 1,)
        if feature_axes == "module" and of_module != "none":
            features = [axis for axis in range(rank) if axis not in of_module]
    elif feature_axes is None:
        features = ()
    else:
        features = tuple(map(operator.index, np.atleast_1d(feature_axes)))
        if not all(-rank <= axis < rank for axis in features):
            raise ValueError(
                f"feature_axes must lie within the array's rank, but are {features} "
                f"for {name} of shape {kernel.shape}, whose axes are 0 to {rank - 1}; "
                "leave the array out with variable_filter."
            )
    counted = {axis % rank for axis in features}
    # Negative axes stay right when `nnx.vmap` puts an axis of layers in front.
    axes = tuple(axis - rank for axis in range(rank) if axis not in counted)
    if not axes:
        raise ValueError(
            f"a weight vector spans at least one axis, but feature_axes {features} are "
            f"all axes of {name} of shape {kernel.shape}; leave the array out with "
            "variable_filter, or name fewer axes."
        )
    return axes


def _effective_weight(
    v: jax.Array, g: jax.Array | None, axes: tuple[int, ...]
) -> jax.Array:
    (x,) = at_least_float32(v)
    norm = nonzero(vector_norm(x, axes))
    gain = 1.0 if g is None else jnp.expand_dims(g.astype(x.dtype), axes)
    # The division comes first: for g = ||v|| it gives exactly 1, and the product
    # returns v to the last bit.
    return (x * ratio(gain, norm)).astype(v.dtype)


class WeightNorm(nnx.Module):
    r"""Weight normalization: the norm of each weight vector is a parameter.

    $$w = g\, v / \|v\|, \qquad
    \nabla_g L = \langle \nabla_w L, \hat v\rangle, \qquad
    \nabla_v L = \frac{g}{\|v\|}\big(\nabla_w L
    - \langle \nabla_w L, \hat v\rangle\, \hat v\big)$$

    The kernels of the layer hold $v$, and `g` holds one number per weight vector. Both
    are trained. At the start $g = \|v\|$, so the layer still computes its own function.
    Derivation: docs/theory/normalizers.md.

    A vector $v = 0$ has no direction: then $w = 0$. If $g = 0$ too, both gradients are
    0 and the unit never learns. Start it from small random weights.

    Args:
      layer: A module that holds kernels, or a block of several; it is not copied.
      feature_axes: Axes that index the weight vectors of a kernel, one for each `g`.
        `"module"` takes the output units of each Flax module, as `unit_axes` does.
        `"unit"` takes the last axis, as it does everywhere. An int or several hold
        for all kernels alike. None makes each kernel one vector.
      variable_filter: `nnx` filter that selects the parameters to normalize.

    Raises:
      ValueError: No parameter is selected, `feature_axes` does not fit one, or the
        layer is no module of Flax NNX.

    Attributes:
      layer: The wrapped layer, whose kernels are $v$.
      g: Nested dict of `nnx.Param`, with the paths and dtypes of the kernels.

    Examples:
      >>> import jax.numpy as jnp
      >>> import normax
      >>> from flax import nnx
      >>> linear = nnx.Linear(3, 2, rngs=nnx.Rngs(0))
      >>> layer = normax.nn.WeightNorm(linear)
      >>> layer.g["kernel"].shape
      (2,)
      >>> x = jnp.ones((1, 3))
      >>> bool((layer(x) == linear(x)).all())
      True

    References:
      Salimans, Kingma, Weight Normalization, 2016. van Laarhoven, L2 Regularization
      versus Batch and Weight Normalization, 2017, sections 1 and 3.
    """

    def __init__(
        self,
        layer: nnx.Module,
        *,
        feature_axes: str | int | Sequence[int] | None = "module",
        variable_filter: nnx.filterlib.Filter = _KERNELS,
    ):
        require_nnx("WeightNorm", layer, "flax.linen.WeightNorm takes those of Linen")
        of_modules = nnx_vector_axes(layer)
        selected = nnx.state(layer, nnx.All(nnx.Param, variable_filter))
        gains: dict[KeyPath, nnx.Param] = {}
        vector_axes = []
        for path, v in nnx.to_flat_state(selected):
            name, value = path_name(path), v[...]
            axes = _vector_axes(feature_axes, of_modules[path], name, value)
            norm = jnp.squeeze(vector_norm(at_least_float32(value)[0], axes), axes)
            gains[path] = nnx.Param(norm.astype(value.dtype))
            vector_axes.append((path, axes))
        if not gains:
            params = nnx.to_flat_state(nnx.state(layer, nnx.Param))
            names = [path_name(path) for path, _ in params]
            raise ValueError(
                "variable_filter must select a parameter to normalize, but "
                f"{variable_filter} selects none of {type(layer).__name__}, which has "
                f"{names or 'no parameters'}; pass for example "
                'nnx.PathContains("embedding").'
            )
        self.layer = layer
        self.g = nnx.data(nnx.traversals.unflatten_mapping(gains))
        self.vector_axes = tuple(vector_axes)
        self.initializing = False

    def effective_layer(self) -> Any:
        """Return the plain layer whose kernels are $w$; it shares all else."""
        return self._layer_with(dict(nnx.to_flat_state(nnx.state(self.g))))

    def _layer_with(self, gains: dict[KeyPath, nnx.Variable]) -> Any:
        graphdef, state = nnx.split(self.layer)
        variables = dict(nnx.to_flat_state(state))
        for path, axes in self.vector_axes:
            v = variables[path]
            g = gains[path][...] if path in gains else None
            variables[path] = v.replace(_effective_weight(v[...], g, axes))
        return nnx.merge(graphdef, nnx.from_flat_state(variables))

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Call the layer with the weights $w$."""
        if self.initializing:
            self._initialize(*args, **kwargs)
        return self.effective_layer()(*args, **kwargs)

    def _initialize(self, *args: Any, **kwargs: Any) -> None:
        if [path for path, _ in self.vector_axes] != [("kernel",)]:
            raise ValueError(
                "data-dependent initialization needs a layer with one kernel, but "
                f"{type(self.layer).__name__} has "
                f"{[path_name(path) for path, _ in self.vector_axes]}; "
                "wrap each layer of the block in a WeightNorm of its own."
            )
        layer: Any = self._layer_with({})
        g, bias = self.g["kernel"], getattr(layer, "bias", None)
        if bias is not None:
            layer.bias = bias.replace(jnp.zeros_like(bias[...]))
        (t,) = at_least_float32(layer(*args, **kwargs))
        batch_axes = tuple(range(t.ndim - g.ndim))
        if t.shape[len(batch_axes) :] != g.shape:
            raise ValueError(
                "data-dependent initialization needs the output units on the last axes "
                f"of the output, but their shape is {g.shape} and the output's "
                f"{t.shape}; set g and the bias by hand."
            )
        inverse = 1 / nonzero(jnp.std(t, batch_axes))
        g[...] = inverse.astype(g.dtype)
        if bias is not None:
            shift = -jnp.mean(t, batch_axes) * inverse
            bias[...] = jnp.broadcast_to(shift, bias.shape).astype(bias.dtype)


def initialize_weight_norm(model: nnx.Module, *args: Any, **kwargs: Any) -> Any:
    r"""Initialize every `WeightNorm` of a model from the first batch.

    $$t = \langle v, x\rangle / \|v\|, \qquad g \leftarrow 1 / \sigma[t], \qquad
    b \leftarrow -\mu[t] / \sigma[t]$$

    The model is called once, and each `WeightNorm` is set just before it computes its
    output. So over this batch every unit has mean 0 and variance 1. Without a bias
    only the variance is set. A unit that is constant over the batch gets $g = 1$.

    Args:
      model: A `WeightNorm` or a module that holds some, each around a single layer
        with one kernel. It is changed in place.
      *args: Inputs of the model.
      **kwargs: Further inputs of the model.

    Returns:
      The outputs of the initialized model on the batch.

    Raises:
      ValueError: The model holds no `WeightNorm`, or one that does not fit.

    Examples:
      >>> import jax
      >>> import normax
      >>> from flax import nnx
      >>> layer = normax.nn.WeightNorm(nnx.Linear(3, 2, rngs=nnx.Rngs(0)))
      >>> x = 5 + jax.random.normal(jax.random.key(0), (100, 3))
      >>> y = normax.nn.initialize_weight_norm(layer, x)
      >>> [f"{value:.3f}" for value in y.std(0)]
      ['1.000', '1.000']

    References:
      Salimans, Kingma, Weight Normalization, 2016, section 3.
    """
    require_nnx("initialize_weight_norm", model, "build it of flax.nnx layers")
    found = [m for _, m in nnx.iter_modules(model) if isinstance(m, WeightNorm)]
    if not found:
        raise ValueError(
            f"the model must hold a WeightNorm, but {type(model).__name__} holds none; "
            "wrap its layers in normax.nn.WeightNorm."
        )
    for layer in found:
        layer.initializing = True
    try:
        return model(*args, **kwargs)  # type: ignore[operator]
    finally:
        for layer in found:
            layer.initializing = False
