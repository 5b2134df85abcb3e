"""WeightNorm: the layer's function at the start, the paper's gradients, no writes."""

import functools
import itertools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normax
from normax.nn import WeightNorm, initialize_weight_norm

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]


def draw(shape, seed=0, scale=1.0, dtype=jnp.float32):
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jax.device_put(values.astype(dtype))


# NumPy draws these values, because JAX would compile an initializer for every shape.
INIT = {
    "kernel_init": lambda key, shape, dtype: draw(shape, sum(shape), 0.5, dtype),
    "bias_init": lambda key, shape, dtype: draw(shape, 1, 1.0, dtype),
}


RNGS = nnx.Rngs(0)


def block(rngs, **init):
    layers = (
        nnx.Conv(2, 4, (3, 3), rngs=rngs, **init),
        nnx.BatchNorm(4, rngs=rngs),
        nnx.relu,
        nnx.LinearGeneral((4,), (2, 3), rngs=rngs, **init),
    )
    return nnx.Sequential(*layers)


LAYERS = {
    # Each entry has a layer, the shape of its inputs, and the axes of its kernels'
    # weight vectors.
    "linear": (functools.partial(nnx.Linear, 3, 5), (7, 3), {"kernel": (0,)}),
    "conv": (
        functools.partial(nnx.Conv, 4, 6, (3, 3), strides=2, feature_group_count=2),
        (2, 5, 5, 4),
        {"kernel": (0, 1, 2)},
    ),
    "conv_1d": (
        functools.partial(nnx.Conv, 2, 3, 3, kernel_dilation=2, use_bias=False),
        (2, 6, 2),
        {"kernel": (0, 1)},
    ),
    "conv_transpose": (
        functools.partial(nnx.ConvTranspose, 3, 4, (2, 2), strides=(2, 2)),
        (2, 3, 3, 3),
        {"kernel": (0, 1, 2)},
    ),
    "transposed_kernel": (
        functools.partial(nnx.ConvTranspose, 3, 4, (2, 2), transpose_kernel=True),
        (2, 3, 3, 3),
        {"kernel": (0, 1, 3)},
    ),
    "linear_general": (
        functools.partial(nnx.LinearGeneral, (2, 3), (4, 5), axis=(1, -1)),
        (6, 2, 3),
        {"kernel": (0, 1)},
    ),
    "batch_axis": (
        functools.partial(nnx.LinearGeneral, 3, 4, batch_axis={0: 2}),
        (2, 6, 3),
        {"kernel": (1,)},
    ),
    "einsum": (
        functools.partial(nnx.Einsum, "nta,hab->nthb", (2, 3, 4), (2, 4)),
        (2, 5, 3),
        {"kernel": (1,)},
    ),
    "attention": (
        functools.partial(nnx.MultiHeadAttention, 2, 4, decode=False),
        (2, 3, 4),
        {
            "query/kernel": (0,),
            "key/kernel": (0,),
            "value/kernel": (0,),
            "out/kernel": (0, 1),
        },
    ),
    "block": (
        block,
        (3, 4, 4, 2),
        {"layers/0/kernel": (0, 1, 2), "layers/3/kernel": (0,)},
    ),
}


def flat(module, *filters):
    """Return the variables' values by path."""
    state = nnx.state(module, *filters)
    return {"/".join(map(str, p)): v[...] for p, v in nnx.to_flat_state(state)}


def update(module, values):
    """Set variables by path."""
    for path, variable in nnx.to_flat_state(nnx.state(module)):
        name = "/".join(map(str, path))
        if name in values:
            variable[...] = jnp.asarray(values[name], variable.dtype)


@nnx.jit
def outputs_and_gradients(module, x):
    def loss_fn(module):
        y = module(x)
        weights = jnp.cos(jnp.arange(y.size)).reshape(y.shape)
        return jnp.sum(weights * y + 0.1 * y**2), y

    (_, y), grads = nnx.value_and_grad(loss_fn, has_aux=True)(module)
    return y, grads


def make(name, **options):
    factory, shape, axes = LAYERS[name]
    return factory(rngs=RNGS, **INIT, **options), draw(shape), axes


def exact(v, g, axes):
    v = np.asarray(v, np.float64)
    unit = v / np.sqrt(np.sum(v**2, axes, keepdims=True))
    return np.expand_dims(np.asarray(g, np.float64), axes) * unit


@pytest.mark.parametrize("name", LAYERS)
def test_wrapped_function_is_unchanged_to_the_last_bit(name):
    layer, _, axes = make(name)
    wrapped = WeightNorm(layer)
    gains = {path: g.shape for path, g in flat(wrapped.g).items()}
    kernels = flat(layer, nnx.Param)
    assert gains == {
        path: tuple(n for i, n in enumerate(kernels[path].shape) if i not in reduced)
        for path, reduced in axes.items()
    }
    for path, w in flat(wrapped.effective_layer(), nnx.Param).items():
        np.testing.assert_array_equal(w, kernels[path])


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_the_paper(name):
    layer, x, axes = make(name)
    wrapped = WeightNorm(layer)
    v = {path: flat(layer)[path] for path in axes}
    g = {path: draw(x.shape, 1) for path, x in flat(wrapped.g).items()}
    w = {path: exact(v[path], g[path], reduced) for path, reduced in axes.items()}
    plain = nnx.clone(layer)
    update(plain, w)
    update(wrapped.g, g)
    expected, slopes = outputs_and_gradients(plain, x)
    measured, grads = outputs_and_gradients(wrapped, x)
    np.testing.assert_allclose(measured, expected, rtol=2e-5, atol=2e-5)
    slopes, grads = flat(slopes), flat(grads)
    for path, value in slopes.items():
        if path not in axes:
            np.testing.assert_allclose(
                grads[f"layer/{path}"], value, rtol=1e-4, atol=1e-4
            )
    for path, reduced in axes.items():
        slope, size = np.asarray(slopes[path], np.float64), np.abs(slopes[path]).max()
        unit = exact(v[path], np.ones_like(g[path]), reduced)
        g_slope = np.sum(slope * unit, reduced)
        norm = np.sqrt(np.sum(np.asarray(v[path], np.float64) ** 2, reduced))
        tangent = slope - np.expand_dims(g_slope, reduced) * unit
        v_slope = np.expand_dims(np.asarray(g[path]) / norm, reduced) * tangent
        np.testing.assert_allclose(grads[f"g/{path}"], g_slope, atol=2e-5 * size)
        found = np.asarray(grads[f"layer/{path}"], np.float64)
        atol = 5e-5 * np.abs(v_slope).max()
        np.testing.assert_allclose(found, v_slope, atol=atol)
        cosine = np.sum(found * unit, reduced) / np.linalg.norm(found)
        assert np.abs(cosine).max() < 1e-6


@pytest.mark.parametrize("name", LAYERS)
def test_scale_of_v_does_not_matter(name):
    layer, x, axes = make(name)
    wrapped = WeightNorm(layer)
    before, slopes = outputs_and_gradients(wrapped, x)
    factors = {}
    for path, reduced in axes.items():
        v = flat(layer)[path]
        count = tuple(1 if i in reduced else n for i, n in enumerate(v.shape))
        factors[path] = np.exp(np.asarray(draw(count, 2, 3.0)))
        update(layer, {path: v * factors[path]})
    after, grads = outputs_and_gradients(wrapped, x)
    np.testing.assert_allclose(after, before, rtol=1e-4, atol=1e-5)
    slopes, grads = flat(slopes), flat(grads)
    for path, reduced in axes.items():
        expected = slopes[f"layer/{path}"] / factors[path]
        scale = np.max(np.abs(expected), reduced, keepdims=True)
        error = np.abs(grads[f"layer/{path}"] - expected) / scale
        assert np.max(np.where(scale > 0, error, 0)) < 2e-3


def test_forward_changes_only_what_the_layer_changes():
    layer, x, _ = make("block")
    wrapped, plain = WeightNorm(layer), nnx.clone(layer)
    before = flat(wrapped)
    expected = plain(x)
    np.testing.assert_allclose(wrapped(x), expected, atol=1e-6)
    changed = {name for name, v in flat(wrapped).items() if np.any(v != before[name])}
    assert changed == {"layer/layers/1/mean", "layer/layers/1/var"}
    for name, value in flat(plain, nnx.BatchStat).items():
        np.testing.assert_allclose(flat(layer)[name], value, rtol=1e-6)
    wrapped.eval()
    plain.eval()
    before = flat(wrapped)
    np.testing.assert_allclose(wrapped(x), plain(x), atol=1e-6)
    for name, value in flat(wrapped).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.parametrize("name", ["linear", "block"])
def test_closed_over_in_every_transformation(name):
    layer, x, _ = make(name)
    layer.eval()
    wrapped = WeightNorm(layer)
    update(wrapped.g, {path: 1.5 * g for path, g in flat(wrapped.g).items()})
    expected, before = wrapped(x), flat(wrapped)
    slope = jax.jit(jax.grad(lambda x: jnp.sum(nnx.clone(wrapped)(x) ** 2)))(x)
    calls = {
        "jit": lambda x: wrapped(x),
        "vmap": lambda x: jax.vmap(wrapped)(x[:, None])[:, 0],
        "scan": lambda x: jax.lax.scan(lambda c, x: (c, wrapped(x[None])), 0, x)[1],
        "checkpoint": jax.checkpoint(lambda x: wrapped(x)),
    }
    for call in calls.values():
        y = np.asarray(jax.jit(call)(x)).reshape(expected.shape)
        np.testing.assert_allclose(y, expected, rtol=2e-5, atol=1e-6)
    grad = jax.jit(jax.grad(lambda x: jnp.sum(calls["checkpoint"](x) ** 2)))(x)
    np.testing.assert_allclose(grad, slope, rtol=1e-4, atol=1e-5)
    for name, value in flat(wrapped).items():
        np.testing.assert_array_equal(value, before[name])


@pytest.mark.slow
def test_nnx_transformations_of_a_stack():
    @nnx.vmap
    def stack(key):
        return WeightNorm(nnx.Linear(3, 3, rngs=nnx.Rngs(key)))

    layers = stack(jax.random.split(jax.random.key(0), 4))
    gains = flat(layers.g)["kernel"]
    assert gains.shape == (4, 3)
    np.testing.assert_allclose(
        gains, np.linalg.norm(flat(layers.layer)["kernel"], axis=1), rtol=1e-6
    )
    update(layers.g, {"kernel": 2 * gains})
    x = draw((5, 3))
    y = nnx.jit(nnx.scan(lambda x, m: jnp.tanh(m(x)), out_axes=nnx.Carry))(x, layers)
    expected = x
    params = flat(layers.layer)
    for w, b in zip(params["kernel"], params["bias"], strict=True):
        expected = np.tanh(expected @ (2 * w) + b[None])
    np.testing.assert_allclose(y, expected, atol=1e-5)
    each = nnx.vmap(lambda m, x: m(x), in_axes=(0, None))(layers, x)
    np.testing.assert_allclose(each[0], x @ (2 * flat(layers.layer)["kernel"][0]), 1e-5)


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_800_steps_of_a_plain_implementation(momentum):
    layer, x, _ = make("linear")
    target = 3 * (x @ draw((3, 5), 3) + draw((1, 5), 4))
    wrapped = WeightNorm(layer)
    rate = 0.05
    tx = optax.sgd(rate, momentum or None)
    params = {"v": layer.kernel, "g": wrapped.g["kernel"], "b": layer.bias}
    params = {name: np.asarray(p[...], np.float64) for name, p in params.items()}
    start = {name: value.copy() for name, value in params.items()}
    velocity = {name: np.zeros_like(value) for name, value in params.items()}
    inputs, targets = np.asarray(x, np.float64), np.asarray(target, np.float64)
    for _ in range(800):
        v, g, b = params["v"], params["g"], params["b"]
        norm = np.sqrt(np.sum(v**2, 0))
        unit = v / norm
        residual = inputs @ (g * unit) + b - targets
        slope = inputs.T @ residual * 2 / residual.size
        slope_g = np.sum(slope * unit, 0)
        grads = {"g": slope_g, "v": g / norm * (slope - slope_g * unit)}
        grads["b"] = residual.sum(0) * 2 / residual.size
        for name, grad in grads.items():
            velocity[name] = momentum * velocity[name] + grad
            params[name] = params[name] - rate * velocity[name]

    optimizer = nnx.Optimizer(wrapped, tx, wrt=nnx.Param)
    graphdef, state = nnx.split((wrapped, optimizer))

    def step(state, _):
        wrapped, optimizer = nnx.merge(graphdef, state)
        loss, grads = nnx.value_and_grad(lambda m: jnp.mean((m(x) - target) ** 2))(
            wrapped
        )
        optimizer.update(wrapped, grads)
        return nnx.state((wrapped, optimizer)), loss

    state, losses = jax.jit(lambda s: jax.lax.scan(step, s, length=800))(state)
    nnx.update((wrapped, optimizer), state)
    found = {"v": layer.kernel, "g": wrapped.g["kernel"], "b": layer.bias}
    for name, value in params.items():
        np.testing.assert_allclose(found[name][...], value, rtol=1e-3, atol=1e-4)
        assert np.abs(value - start[name]).max() > 0.1
    assert losses[-1] < 0.05 * losses[0]


def test_zero_vectors_are_finite_and_stay():
    layer, x, _ = make("linear")
    layer.kernel[...] = layer.kernel[...].at[:, 1].set(0.0)
    wrapped = WeightNorm(layer)
    y, grads = outputs_and_gradients(wrapped, x)
    np.testing.assert_array_equal(y[:, 1], layer.bias[1])
    grads = flat(grads)
    assert all(np.isfinite(value).all() for value in grads.values())
    np.testing.assert_array_equal(grads["layer/kernel"][:, 1], 0)
    np.testing.assert_array_equal(grads["g/kernel"][1], 0)
    wrapped.g["kernel"][...] = jnp.ones(5)
    _, grads = outputs_and_gradients(wrapped, x)
    assert np.abs(flat(grads)["layer/kernel"]).max() < 100


@pytest.mark.parametrize("scale", [1e-25, 1e25])
def test_squares_neither_overflow_nor_underflow(scale):
    layer, x, _ = make("linear")
    wrapped = WeightNorm(layer)
    expected, slopes = outputs_and_gradients(wrapped, x)
    layer.kernel[...] = scale * layer.kernel[...]
    y, grads = outputs_and_gradients(wrapped, x)
    np.testing.assert_allclose(y, expected, rtol=1e-5, atol=1e-6)
    slope = np.asarray(flat(slopes)["layer/kernel"], np.float64)
    found = np.asarray(flat(grads)["layer/kernel"], np.float64) * scale
    np.testing.assert_allclose(found, slope, rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("dtype", "param_dtype"),
    [
        (None, jnp.bfloat16),
        (None, jnp.float16),
        (jnp.bfloat16, jnp.float32),
        (jnp.float32, jnp.bfloat16),
    ],
)
def test_dtypes_are_kept(dtype, param_dtype):
    layer, x, _ = make("linear", dtype=dtype, param_dtype=param_dtype)
    x = x.astype(param_dtype)
    expected = layer(x)
    wrapped = WeightNorm(layer)
    y, grads = outputs_and_gradients(wrapped, x)
    assert y.dtype == expected.dtype
    for tree in (flat(wrapped), flat(grads)):
        assert {value.dtype for value in tree.values()} == {jnp.dtype(param_dtype)}
    tolerance = 3e-2 if jnp.bfloat16 in (dtype, param_dtype) else 3e-3
    np.testing.assert_allclose(
        np.asarray(y, np.float32), np.asarray(expected, np.float32), atol=tolerance
    )


@pytest.mark.parametrize(
    ("feature_axes", "shape"),
    [(-1, (5,)), ((-2, -1), (4, 5)), ((0, 2), (2, 5)), (None, ()), ((), ()), (0, (2,))],
)
def test_feature_axes(feature_axes, shape):
    layer = nnx.LinearGeneral(2, (4, 5), rngs=RNGS, **INIT)
    wrapped = WeightNorm(layer, feature_axes=feature_axes)
    kernel = np.asarray(layer.kernel[...], np.float64)
    counted = np.arange(3)[
        list(np.atleast_1d(feature_axes if shape else []).astype(int))
    ]
    reduced = tuple(i for i in range(3) if i not in counted)
    assert wrapped.g["kernel"].shape == shape
    np.testing.assert_allclose(
        wrapped.g["kernel"][...], np.sqrt(np.sum(kernel**2, reduced)), rtol=1e-6
    )
    wrapped.g["kernel"][...] = draw(shape, 1)
    np.testing.assert_allclose(
        wrapped.effective_layer().kernel[...],
        exact(kernel, draw(shape, 1), reduced),
        rtol=1e-5,
        atol=1e-7,
    )


def test_other_parameters_than_kernels():
    embed = nnx.Embed(6, 4, rngs=nnx.Rngs(0))
    selected = nnx.PathContains("embedding")
    wrapped = WeightNorm(embed, feature_axes=0, variable_filter=selected)
    wrapped.g["embedding"][...] = jnp.arange(6.0)
    norms = jnp.linalg.norm(wrapped(jnp.arange(6)), axis=-1)
    np.testing.assert_allclose(norms, np.arange(6.0), rtol=1e-6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature_axes": 2}, r"must lie within.*\(2,\) for kernel of shape \(3, 5\)"),
        ({"feature_axes": (0, 1)}, r"spans at least one axis.*\(0, 1\)"),
        ({"feature_axes": "layer"}, "got 'layer'"),
        ({"variable_filter": nnx.PathContains("weight")}, r"selects none of Linear"),
        ({"variable_filter": nnx.PathContains("bias")}, r"spans at least one axis"),
    ],
)
def test_what_cannot_be_right_raises(arguments, message):
    layer, _, _ = make("linear")
    with pytest.raises(ValueError, match=message):
        WeightNorm(layer, **arguments)


def test_complex_kernels_are_refused():
    layer = nnx.Linear(2, 3, param_dtype=jnp.complex64, rngs=nnx.Rngs(0))
    with pytest.raises(
        ValueError, match="must be real, but kernel has dtype complex64"
    ):
        WeightNorm(layer)


@pytest.mark.parametrize("name", ["linear", "conv", "conv_transpose", "linear_general"])
@pytest.mark.parametrize("use_bias", [True, False])
def test_data_dependent_initialization(name, use_bias):
    factory, shape, _ = LAYERS[name]
    layer = factory(use_bias=use_bias, rngs=RNGS, **INIT)
    update(layer, {"bias": jnp.full(layer.bias.shape, 7.0) if use_bias else 0})
    x = 3 * draw((20, *shape[1:])) + 2
    v, wrapped = layer.kernel[...], WeightNorm(layer)
    plain = np.asarray(nnx.clone(layer)(x), np.float64) - (7 if use_bias else 0)
    units = wrapped.g["kernel"].ndim
    y = initialize_weight_norm(wrapped, x)
    np.testing.assert_array_equal(layer.kernel[...], v)
    batch = tuple(range(y.ndim - units))
    deviation = np.std(plain, batch) / np.asarray(WeightNorm(layer).g["kernel"][...])
    np.testing.assert_allclose(wrapped.g["kernel"][...], 1 / deviation, rtol=1e-4)
    np.testing.assert_allclose(np.std(y, batch), np.ones(y.shape[-units:]), rtol=1e-4)
    if use_bias:
        np.testing.assert_allclose(np.mean(y, batch), 0, atol=1e-4)
    np.testing.assert_allclose(wrapped(x), y, rtol=1e-6)


@pytest.mark.slow
def test_data_dependent_initialization_of_a_model():
    x = 4 + draw((50, 3))
    first, second = (WeightNorm(nnx.Linear(3, 3, rngs=RNGS, **INIT)) for _ in "12")
    model = nnx.Sequential(first, nnx.relu, second)
    y = nnx.jit(initialize_weight_norm)(model, x)
    for output in (first(x), y, model(x)):
        np.testing.assert_allclose(np.mean(output, 0), 0, atol=1e-4)
        np.testing.assert_allclose(np.std(output, 0), 1, rtol=1e-4)
    constant = initialize_weight_norm(first, jnp.ones((4, 3)))
    np.testing.assert_allclose(constant, 0, atol=1e-5)
    np.testing.assert_array_equal(first.g["kernel"][...], 1)


def test_data_dependent_initialization_needs_single_layers():
    layer, x, _ = make("block")
    with pytest.raises(ValueError, match=r"one kernel, but Sequential has \['layers"):
        initialize_weight_norm(WeightNorm(layer), x)
    with pytest.raises(ValueError, match="Sequential holds none"):
        initialize_weight_norm(layer, x)
    layer, x, _ = make("batch_axis")
    with pytest.raises(ValueError, match=r"shape is \(2, 4\).*output's \(2, 6, 4\)"):
        initialize_weight_norm(WeightNorm(layer), x)


@pytest.mark.parametrize("name", ["linear", "attention"])
def test_to_a_plain_layer_and_back(name):
    layer, x, _ = make(name)
    wrapped = WeightNorm(layer)
    update(
        wrapped.g, {path: draw(g.shape, 1) ** 2 for path, g in flat(wrapped.g).items()}
    )
    plain = nnx.clone(wrapped.effective_layer())
    assert type(plain) is type(layer)
    expected = wrapped(x)
    np.testing.assert_array_equal(plain(x), expected)
    again = WeightNorm(plain)
    np.testing.assert_array_equal(again(x), expected)
    for path, g in flat(wrapped.g).items():
        np.testing.assert_allclose(flat(again.g)[path], g, rtol=1e-6)
    update(plain, {path: 0 * w for path, w in flat(plain).items()})
    np.testing.assert_array_equal(wrapped(x), expected)


def test_tied_kernels_stay_tied():
    layer, other = (nnx.Linear(3, 3, rngs=RNGS) for _ in range(2))
    other.kernel = layer.kernel
    wrapped = WeightNorm(nnx.Sequential(layer, other))
    assert len(flat(wrapped.g)) == 1
    update(wrapped.g, {path: 2 * g for path, g in flat(wrapped.g).items()})
    x, w = draw((2, 3)), np.asarray(layer.kernel[...])
    np.testing.assert_allclose(wrapped(x), x @ (2 * w) @ (2 * w), rtol=1e-5)


def test_dropout_draws_anew():
    layers = nnx.Linear(3, 8, rngs=RNGS), nnx.Dropout(0.5, rngs=RNGS)
    wrapped = WeightNorm(nnx.Sequential(*layers))
    x = draw((4, 3))
    assert any(np.any(a != b) for a, b in itertools.pairwise(wrapped(x) for _ in "123"))


def test_v_is_found_scale_invariant():
    model = nnx.Sequential(
        WeightNorm(nnx.Linear(3, 4, rngs=RNGS)), nnx.tanh, nnx.Linear(4, 2, rngs=RNGS)
    )
    graphdef, params = nnx.split(model)
    x = draw((8, 3))
    axes = normax.scale_invariant_axes(
        lambda params: jnp.sum(jnp.sin(nnx.merge(graphdef, params)(x))),
        params,
        key=jax.random.key(0),
    )
    found = {
        jax.tree_util.keystr(p): a
        for p, a in jax.tree_util.tree_leaves_with_path(
            axes, is_leaf=lambda a: isinstance(a, tuple | str)
        )
    }
    invariant = {path for path, value in found.items() if value != "none"}
    assert len(invariant) == 1
    assert "layer" in invariant.pop()
