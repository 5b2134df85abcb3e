r"""The path transform on real networks, against the networks themselves in float64.

With ones as inputs and $|w|^p$ as weights every ReLU is the identity, so that the
network itself is $F$, and its gradient is that of $F$. Where a network has a maximum,
a mean or a number of its own, a twin says what these are in $F$.
"""

import functools
import itertools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

RNG = np.random.default_rng(0)
relu = jax.nn.relu


def draw(*shape):
    return jax.device_put(RNG.normal(size=shape).astype(jnp.float32))


def redrawn(params):
    """Draw all arrays anew, biases (which Flax starts at 0) included."""
    return jax.tree.map(
        lambda w: jax.device_put((0.7 * RNG.normal(size=w.shape)).astype(w.dtype)),
        params,
    )


def shape(*sizes):
    return jax.ShapeDtypeStruct(sizes, jnp.float32)


def linen(module, *sizes):
    """Return `forward`, random parameters and the input's shape."""
    variables = jax.eval_shape(module.init, jax.random.key(0), shape(*sizes))
    forward = lambda params, x: module.apply({"params": params}, x)  # noqa: E731
    return forward, redrawn(variables["params"]), shape(*sizes)


def powers(params, p):
    return jax.tree.map(lambda w: np.abs(np.asarray(w, np.float64)) ** p, params)


def oracle(twin, params, inputs, p):
    """Return F and the derivatives of F, in float64."""
    with jax.enable_x64(True):
        ones = jax.tree.map(lambda x: np.ones(x.shape), inputs)
        total = lambda v: sum(map(jnp.sum, jax.tree.leaves(twin(v, ones))))  # noqa: E731
        value, gradient = jax.jit(jax.value_and_grad(total))(powers(params, p))
        return float(value), jax.tree.map(np.asarray, gradient)


def scales_and_norm(forward, params, inputs, p):
    """Return both from one program, for two take longer to compile."""

    def both(params):
        scales = normax.path_scales(forward, params, inputs, p)
        return scales, normax.path_norm(forward, params, inputs, p)

    return jax.jit(both)(params)


def assert_scales(got, expected, rtol=3e-6):
    chex.assert_trees_all_equal_structs(got, expected)
    chex.assert_trees_all_close(got, expected, rtol=rtol, atol=0)


def check(forward, params, inputs, p=2.0, twin=None, rtol=3e-6):
    value, gradient = oracle(twin or forward, params, inputs, p)
    expected = jax.tree.map(lambda g: np.float32(g ** (2 / p)), gradient)
    scales, norm = scales_and_norm(forward, params, inputs, p)
    assert_scales(scales, expected, rtol)
    np.testing.assert_allclose(norm, value ** (1 / p), rtol=rtol)


# Every path written out.


def tiny(params, x):
    """A network with biases, a skip connection and a layer that is used twice."""
    h = relu(x @ params["first"] + params["b"])
    h = relu(h @ params["square"] + h)
    h = relu(h @ params["square"]) + x @ params["skip"]
    return h @ params["last"] + params["c"]


def edges_of_tiny():
    """Yield (from, to, name, index) for each edge between nodes (layer, unit)."""
    for i, j in itertools.product(range(2), range(3)):
        yield ("x", i), ("h", j), "first", (i, j)
        yield ("x", i), ("z", j), "skip", (i, j)
    for j in range(3):
        yield ("one", 0), ("h", j), "b", (0, j)
        yield ("h", j), ("k", j), None, None
        for k in range(3):
            yield ("h", j), ("k", k), "square", (j, k)
            yield ("k", j), ("z", k), "square", (j, k)
        for o in range(2):
            yield ("z", j), ("y", o), "last", (j, o)
    for o in range(2):
        yield ("one", 0), ("y", o), "c", (0, o)


def paths_of_tiny():
    edges = list(edges_of_tiny())
    unfinished = [
        ((layer, i), []) for layer, n in (("x", 2), ("one", 1)) for i in range(n)
    ]
    while unfinished:
        node, path = unfinished.pop()
        if node[0] == "y":
            yield path
        for start, end, name, index in edges:
            if start == node:
                unfinished.append((end, [*path, (name, index)]))


def enumerated(params, p):
    """Return equations (5) and (9), path by path, edge by edge."""
    params = {name: np.asarray(w, np.float64) for name, w in params.items()}
    weight = lambda name, index: 1.0 if name is None else params[name][index]  # noqa: E731
    total, sums = 0.0, {name: np.zeros(w.shape) for name, w in params.items()}
    for path in paths_of_tiny():
        sizes = [abs(weight(*edge)) ** p for edge in path]
        total += np.prod(sizes)
        for position, (name, index) in enumerate(path):
            if name is not None:
                others = sizes[:position] + sizes[position + 1 :]
                sums[name][index] += np.prod(others)
    return total ** (1 / p), {name: s ** (2 / p) for name, s in sums.items()}


def tiny_params(dtype):
    sizes = {"first": (2, 3), "b": (1, 3), "square": (3, 3), "skip": (2, 3)}
    sizes |= {"last": (3, 2), "c": (1, 2)}
    rng = np.random.default_rng(1)
    return {
        k: jax.device_put(rng.normal(size=s).astype(dtype)) for k, s in sizes.items()
    }


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.float64])
def test_enumerated_paths(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params, x = tiny_params(dtype), jnp.ones((1, 2), dtype)
        rtol = 2e-6 if dtype == jnp.float32 else 1e-12

        def values(params, p):
            norm = normax.path_norm(tiny, params, x, p)
            return norm, normax.path_scales(tiny, params, x, p)

        traced = jax.jit(values)
        static = jax.jit(values, static_argnums=1)
        cases = [(1.5, traced), (3.0, traced)]
        if dtype == jnp.float32:
            cases += [(1, static), (2, static)]
        for p, compiled in cases:
            norm, scales = compiled(params, p)
            expected_norm, expected = enumerated(params, p)
            np.testing.assert_allclose(norm, expected_norm, rtol=rtol)
            assert norm.dtype == dtype
            for name in params:
                assert scales[name].dtype == dtype
                np.testing.assert_allclose(scales[name], expected[name], rtol=rtol)


# Nonlinearities.


@jax.custom_vjp
def custom_vjp_relu(x):
    return jnp.maximum(x, 0)


custom_vjp_relu.defvjp(
    lambda x: (jnp.maximum(x, 0), x), lambda x, cotangent: (cotangent * (x > 0),)
)


@jax.custom_jvp
def custom_jvp_relu(x):
    return jnp.where(x > 0, x, 0)


custom_jvp_relu.defjvps(lambda tangent, y, x: tangent * (x > 0))


RELUS = [
    relu,
    jax.nn.leaky_relu,
    nn.leaky_relu,
    nnx.relu,
    jnp.abs,
    custom_vjp_relu,
    custom_jvp_relu,
    jax.checkpoint(relu),
    jax.jit(lambda x: jnp.where(x > 0, x, 0)),
    lambda x: jnp.maximum(x, 0),
    lambda x: jnp.maximum(jnp.zeros_like(x), x),
    lambda x: jnp.where(x <= 0, 0, x),
    lambda x: jnp.where(0 < x, x, jnp.zeros_like(x)),
    lambda x: jnp.where(x >= 0, x, 0.1 * x),
    lambda x: jnp.clip(x, 0),
    lambda x: jnp.clip(x, 0, jnp.inf),
    lambda x: jax.lax.clamp(jnp.float32(0), x, jnp.float32(jnp.inf)),
    lambda x: x * (x > 0),
    lambda x: (x > 0).astype(x.dtype) * x,
    lambda x: -jnp.minimum(-x, 0),
    lambda x: jnp.maximum(x, 0.2 * x),
    lambda x: jnp.maximum(-x, 0.5 * x),
    lambda x: jax.lax.stop_gradient(x),
    lambda x: jax.lax.optimization_barrier((x, 1.0))[0],
]


@pytest.mark.slow
def test_relu_in_every_way():
    # Side by side: layers one after the other take several times as long to compile.
    def forward(params, x, activations=RELUS):
        parts = jnp.split(x @ params["in"] + params["b"], len(RELUS), axis=-1)
        pairs = zip(activations, parts, strict=True)
        return jnp.concatenate([f(h) for f, h in pairs], -1) @ params["out"]

    width = 3 * len(RELUS)
    params = {"in": draw(3, width), "b": draw(1, width), "out": draw(width, 3)}
    identity = functools.partial(forward, activations=[lambda x: x] * len(RELUS))
    check(forward, params, shape(1, 3), 2, identity)


@pytest.mark.parametrize(
    "widths", [(4, 4000, 2), (784, 30, 5), (784, 400, 700), (300, 1000, 3)]
)
def test_scalars_before_and_after_layers(widths):
    # Units whose path values are equal, to XLA the broadcast of one number.
    def forward(params, x):
        h = relu(params["s"] * x @ params["a"])
        return params["t"] * relu(h @ params["b"])

    shapes = zip("stab", [(), (), *itertools.pairwise(widths)], strict=True)
    params = {name: draw(*size) for name, size in shapes}
    check(forward, params, shape(1, widths[0]), 2, rtol=5e-6)


def test_slopes_beyond_one_count():
    # The steepest slope of a leaky ReLU is the factor of its paths.
    forward = lambda w, x: jnp.where(x @ w > 0, x @ w, 0)  # noqa: E731, F841
    steep = lambda w, x: (lambda h: jnp.where(h > 0, 0.5 * h, -3 * h))(x @ w)  # noqa: E731
    w = jnp.array([[3.0], [4.0]])
    np.testing.assert_allclose(normax.path_norm(steep, w, shape(1, 2)), 15.0, rtol=1e-6)


@pytest.mark.slow
def test_pooling():
    def forward(params, x, pool=nn.max_pool, sub=nn.max_pool, p=1, top=jnp.max):
        window = dict(window_shape=(2, 3), strides=(1, 2), padding=((1, 1), (1, 0)))
        x = pool(relu(x @ params[0] + params[1]), **window)
        x = sub(x @ params[2], (1, 1), (2, 2))
        x = nn.avg_pool(x, (2, 2), padding="SAME", count_include_pad=False)
        x = top(x.reshape(*x.shape[:-1], 2, 2), axis=-1) + jnp.min(
            x, axis=-1, keepdims=True
        )
        return jnp.mean(x @ params[3], axis=(1, 2))

    def twin(v, x):
        def total(x, **window):
            return 6 * nn.avg_pool(x, **window)

        return forward(v, x, total, lambda x, *_: x[:, ::2, ::2], top=jnp.sum)

    params = [draw(2, 3), draw(1, 1, 1, 3), draw(3, 4), draw(2, 5)]

    def twin_min(v, x):  # a minimum over four is a sum over four
        def sum4(x, axis, keepdims):
            return jnp.sum(x, axis=axis, keepdims=keepdims)

        return sum4, twin(v, x)

    with pytest.MonkeyPatch.context() as patch:
        got = normax.path_scales(forward, params, shape(1, 5, 6, 2), 1)
        patch.setattr(jnp, "min", jnp.sum)
        _, gradient = oracle(twin, params, shape(1, 5, 6, 2), 1)
    assert_scales(got, jax.tree.map(lambda g: np.float32(g**2), gradient))


# Linear layers.


LAYERS = {
    "strided": (nn.Conv(3, (3, 2), strides=2, padding=((0, 2), (1, 0))), (1, 7, 6, 2)),
    "dilated groups": (
        nn.Conv(6, (2, 2), kernel_dilation=2, feature_group_count=2),
        (1, 4, 3, 4),
    ),
    "depthwise": (nn.Conv(6, (3, 3), feature_group_count=3), (1, 4, 3, 3)),
    "transposed": (nn.ConvTranspose(3, (3, 2), strides=(2, 2)), (1, 3, 2, 2)),
    "causal": (nn.Conv(3, (3,), padding="CAUSAL"), (1, 5, 2)),
    "circular": (nn.Conv(3, (3,), padding="CIRCULAR"), (1, 5, 2)),
    "local": (nn.ConvLocal(3, (3,), padding="VALID"), (1, 5, 2)),
    "split": (nn.DenseGeneral((2, 3), axis=-1), (1, 5, 4)),
    "join": (nn.DenseGeneral(4, axis=(-2, -1)), (1, 5, 2, 3)),
    "einsum": (nn.Einsum((5, 4, 3), "bti,tij->btj"), (1, 5, 4)),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", LAYERS)
def test_linear_layers(name):
    layer, sizes = LAYERS[name]
    variables = jax.eval_shape(layer.init, jax.random.key(0), shape(*sizes))
    outputs = jax.eval_shape(layer.apply, variables, shape(*sizes)).shape
    params = {"in": draw(*sizes), "layer": redrawn(variables["params"])}
    params["out"] = draw(*outputs)  # every input and output of the layer differs

    def forward(params, x):
        h = layer.apply({"params": params["layer"]}, x * params["in"])
        return relu(h) * params["out"]

    check(forward, params, shape(*sizes), 2)


class Connections(nn.Module):
    """A residual block, a DenseNet block, a bottleneck, dropout, remat, flatten."""

    @nn.compact
    def __call__(self, x):
        x = relu(nn.Conv(4, (3, 3))(x))
        x = relu(x + nn.Conv(4, (3, 3))(x))
        x = jnp.concatenate([x, relu(nn.Conv(2, (3, 3))(x))], axis=-1)
        x = nn.Dropout(0.5, deterministic=True)(nn.remat(nn.Conv)(3, (1, 1))(x))
        return nn.Dense(2)(relu(x).reshape(x.shape[0], -1))


@pytest.mark.slow
def test_connections():
    check(*linen(Connections(), 1, 4, 4, 2))


@pytest.mark.slow
def test_structural_operations():
    def forward(params, x):
        ones = jnp.ones((1, 1))
        x = relu(jnp.concatenate([x, ones], axis=-1) @ params["bias column"])
        x = relu((params["transposed"] @ x.T).T)
        for w, b in zip(
            jnp.split(params["split"], 2, axis=1), params["indexed"], strict=True
        ):
            x = relu(x @ w + b)
        x = jnp.tile(jnp.roll(x[:, jnp.array([2, 0, 2, 1])], 1, axis=-1), (1, 2))
        x = jnp.repeat(x @ params["taken"][:, jnp.array([1, 1, 0])], 2, axis=-1)[
            :, ::-1
        ]
        x = jnp.pad(jnp.stack([x, jnp.flip(x)], axis=1), ((0, 0), (0, 1), (1, 0)))
        mask = jnp.arange(7).reshape(1, 1, 7) < 5
        x = jnp.swapaxes(jnp.where(mask, x, 0), 1, 2)[:, 1:]
        x = jax.vmap(lambda x, w: relu(x @ w), in_axes=(1, 0), out_axes=1)(
            x, params["vmap"]
        )
        x = jnp.sum(jnp.squeeze(x[:, ::2], axis=0), axis=0, keepdims=True)
        return x * params["scale"] * params["scale"] / 1.0 + params["scale"].reshape(
            1, 1
        )

    params = {
        "bias column": draw(3, 4), "transposed": draw(3, 4), "split": draw(3, 6),
        "indexed": draw(2, 1, 3), "taken": draw(8, 2), "vmap": draw(6, 3, 2),
        "scale": draw(1),
    }  # fmt: skip
    params["scale"] = params["scale"].reshape(1, 1)
    check(forward, params, shape(1, 2), 1.5)


@pytest.mark.slow
def test_writing_into_arrays_and_cumulative_sums():
    def forward(params, x):
        buffer = jnp.ones((1, 6)).at[:, 1:4].set(x @ params["first"])
        x = relu(buffer.at[0, 5].set(params["entry"], unique_indices=True))
        x = jax.lax.dynamic_update_slice(x, relu(x[:, :2] @ params["second"]), (0, 3))
        kernel = jnp.zeros((6, 4)).at[:, ::2].set(params["third"])
        x = jnp.cumsum(x, axis=1) @ jax.lax.dynamic_update_slice(
            kernel, params["fourth"], (0, 1)
        )
        return jax.lax.cumsum(relu(x).reshape(2, 2), axis=1, reverse=True) + 1

    params = {
        "first": draw(2, 3), "entry": draw(1).reshape(()), "second": draw(2, 2),
        "third": draw(6, 2), "fourth": draw(6, 1),
    }  # fmt: skip
    check(forward, params, shape(1, 2), 1.5)


ZEROS = jnp.zeros((1, 5, 1))
BROADCAST = {
    "ones": lambda h: h * jnp.ones((1, 5, 1)),
    "minus ones": lambda h: h * -jnp.ones((1, 5, 1)),
    "divided": lambda h: h / jnp.ones((1, 5, 1)),
    "maximum": lambda h: jnp.maximum(h, jnp.zeros((1, 5, 1))),
    "closed-over zeros": lambda h: jnp.maximum(h, ZEROS),
    "no bound": lambda h: jnp.maximum(h, jnp.full((1, 5, 1), -jnp.inf)),
    "leaky": lambda h: jnp.maximum(h, 0.5 * h * jnp.ones((1, 5, 1))),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", BROADCAST)
def test_known_numbers_broadcast_activations(name):
    def stretched(params, x, stretch):
        h = relu(x @ params["first"])[:, None, :]
        return relu(stretch(h) @ params["second"]), stretch(h)

    forward = lambda params, x: stretched(params, x, BROADCAST[name])  # noqa: E731
    twin = lambda v, x: stretched(v, x, BROADCAST["ones"])  # noqa: E731
    params = {"first": draw(2, 3), "second": draw(3, 2)}
    check(forward, params, shape(1, 2), twin=twin)


def test_constants_made_inside_of_a_network_that_takes_a_batch():
    def forward(params, x):
        return relu(x @ (params["w"] * jnp.triu(jnp.ones((3, 3))))) @ jnp.eye(3, 2)

    params = {"w": draw(3, 3)}
    found = normax.path_scales(forward, params, shape(7, 3))
    _, gradient = oracle(forward, params, shape(1, 3), 2.0)
    expected = jax.tree.map(np.float32, gradient)
    assert_scales(found, expected)


@pytest.mark.slow
def test_numbers_before_and_after_transposition():
    def forward(params, x):
        h = x @ (params["w"].T * 0.5).T
        h = relu((params["w"].T @ h.T).T * 0.5) * params["t"]
        return jnp.transpose(h[:, None] * params["v"][None], (0, 2, 1)) / 8

    def twin(v, x):
        h = x @ v["w"] @ v["w"] * v["t"] / 16
        return h[:, None] * v["v"][None] / 64

    params = {"w": draw(2, 2), "t": draw(1)[0], "v": draw(3, 2)}
    check(forward, params, shape(1, 2), twin=twin)


@pytest.mark.slow
def test_entries_that_nothing_fills():
    index = jnp.array([2, 7, 0, -9])

    def forward(params, x):
        rows = params["table"].at[index].get(mode="fill", fill_value=0)
        h = relu(x @ params["w"]).at[:, index].get(mode="fill", fill_value=0)
        return h @ params["v"] + (x @ params["w"]) @ rows

    params = {"w": draw(2, 4), "table": draw(4, 3), "v": draw(4, 3)}
    check(forward, params, shape(1, 2))


@pytest.mark.slow
def test_entries_taken_as_numpy_takes_them():
    index = jnp.array([2, 0, 0])

    def forward(params, x):
        h = relu(jnp.take(x @ params["w"], index, axis=1))
        return jnp.take_along_axis(h, index[None], axis=1) @ params["v"]

    params = {"w": draw(2, 4), "v": draw(3, 2)}
    check(forward, params, shape(1, 2))
    outside = lambda w, x: jnp.take(x @ w, jnp.array([0, 7]), axis=1)  # noqa: E731
    assert np.isnan(normax.path_norm(outside, params["w"], shape(1, 2)))


@pytest.mark.parametrize(
    ("number", "dtype", "expected"),
    [(2.7, jnp.int32, 2), (0.5, bool, 1), (0.1, jnp.bfloat16, 0.10009765625)],
)
def test_numbers_are_those_of_their_dtype(number, dtype, expected):
    def forward(w, x):
        return (x @ w) * jnp.full((1, 1), number).astype(dtype)

    norm = normax.path_norm(forward, jnp.array([[3.0], [4.0]]), shape(1, 2))
    np.testing.assert_allclose(norm, 5 * expected, rtol=1e-6)


@pytest.mark.slow
def test_what_a_maximum_leaves_out_has_no_paths():
    mask = jnp.array([True, False, True])

    def forward(params, x):
        h = x @ params["w"] + params["b"]
        one = jnp.max(h, axis=-1, where=mask, initial=-jnp.inf)
        other = jnp.max(jnp.where(mask, h, -jnp.inf), axis=-1)
        largest, _ = jax.lax.scan(
            lambda most, row: (jnp.maximum(most, row @ params["v"]), None),
            jnp.full((1, 2), -jnp.inf),
            h[:, mask].T[:, None, :],
        )
        least = jnp.min(h, axis=-1, where=mask, initial=jnp.inf)
        return one, other, largest, least

    def twin(v, x):
        kept = (x @ v["w"] + v["b"])[:, mask]
        rows = kept.T[:, None, :] @ v["v"]
        return kept.sum(), kept.sum(), rows.sum(), kept.sum()

    params = {"w": draw(2, 3), "b": draw(1, 3), "v": draw(1, 2)}
    check(forward, params, shape(1, 2), 1.5, twin)


@pytest.mark.slow
@pytest.mark.parametrize("start", ["learned", "ones"])
def test_scans_that_start_at_a_weight(start):
    def forward(params, x):
        h = params["h"] if start == "learned" else jnp.ones((1, 3))
        step = lambda h, x: (relu(h @ params["v"] + x @ params["w"]), None)  # noqa: E731
        return jax.lax.scan(step, h, jnp.stack([x, x]))[0]

    params = {"h": draw(1, 3), "v": draw(3, 3), "w": draw(2, 3)}
    if start == "ones":
        del params["h"]
    check(forward, params, shape(1, 2), 1.5)


def deep(weights, x):
    for w in weights:
        x = relu(x * w)
    return x


BESIDE = {
    "head": lambda p, x: deep(p["deep"], x) @ p["zero"] + p["b"][None],
    "residual": lambda p, x: deep(p["deep"], x) @ p["zero"] + x @ p["b"][None],
    "concatenated": lambda p, x: (
        jnp.concatenate([deep(p["deep"], x) @ p["zero"], x], -1) @ p["both"]
    ),
}


@pytest.mark.parametrize("size", [1e10, 1e-10])
@pytest.mark.parametrize("name", BESIDE)
def test_numbers_beside_dead_ones_keep_their_size(name, size):
    params = {"deep": [jnp.full((1, 1), size)] * 12, "zero": jnp.zeros((1, 1))}
    params |= {"b": jnp.full((1,), 3.0), "both": jnp.array([[2.0], [3.0]])}
    norm = normax.path_norm(BESIDE[name], params, shape(1, 1))
    np.testing.assert_allclose(norm, 3.0, rtol=1e-6)


@pytest.mark.parametrize(("size", "expected"), [(1e10, 1e120), (1e-10, 2.0)])
def test_the_larger_of_path_and_bias_counts(size, expected):
    params = {"deep": [jnp.full((1, 1), size)] * 12, "b": jnp.full((1,), 2.0)}
    forward = lambda p, x: deep(p["deep"], x) + p["b"][None]  # noqa: E731
    norm = normax.path_norm(forward, params, shape(1, 1), log=True)
    np.testing.assert_allclose(norm, np.log(expected), rtol=1e-6)
    without = params | {"b": jnp.zeros((1,))}
    norm = normax.path_norm(forward, without, shape(1, 1), log=True)
    np.testing.assert_allclose(norm, 12 * np.log(size), rtol=1e-6)


def test_what_is_below_the_range_of_its_layer_counts_as_zero():
    def forward(params, x):
        return jnp.concatenate([deep(params["deep"], x), x], -1) @ params["last"]

    params = {"deep": [jnp.full((1, 1), 1e10)] * 12, "last": jnp.array([[0.0], [1.0]])}
    assert normax.path_norm(forward, params, shape(1, 1)) == 0
    norm = normax.path_norm(
        forward, params | {"last": jnp.ones((2, 1))}, shape(1, 1), log=True
    )
    np.testing.assert_allclose(norm, 12 * np.log(1e10), rtol=1e-6)


def test_concatenated_weights_are_edges_of_their_own():
    def forward(params, x):
        kernel = jnp.concatenate([params["w"], -params["w"]], axis=1)
        return relu(x @ kernel) @ params["v"]

    def twin(v, x):
        return x @ jnp.concatenate([v["w"], v["w"]], axis=1) @ v["v"]

    check(forward, {"w": draw(2, 3), "v": draw(6, 1)}, shape(1, 2), 1.5, twin)


PADDINGS = {
    "all sides": lambda w, s: jnp.pad(w, ((1, 0), (2, 1)), constant_values=s),
    "one axis": lambda w, s: jnp.pad(w, ((0, 0), (0, 3)), constant_values=s),
    "inside": lambda w, s: jax.lax.pad(w, s, ((1, 0, 1), (0, 0, 2))),
    "cut": lambda w, s: jax.lax.pad(w, s, ((-1, 2, 0), (1, 0, 0))),
    "part of the array": lambda w, s: jnp.pad(w, 1, constant_values=w[0, 1]),
    "twice": lambda w, s: jnp.pad(
        jnp.pad(w, ((0, 1), (0, 0)), constant_values=s), 1, constant_values=2 * s
    ),
}


@pytest.mark.parametrize("p", [1.0, 2.0])
@pytest.mark.parametrize("name", PADDINGS)
def test_learned_padding_of_weights(name, p):
    pad = PADDINGS[name]
    params = {"w": draw(2, 2), "s": draw(1)[0]}
    rows, columns = jax.eval_shape(pad, params["w"], params["s"]).shape
    params |= {"a": draw(1, rows), "v": draw(columns, 1)}

    def forward(params, x):
        return relu(x @ params["a"]) @ pad(params["w"], params["s"]) @ params["v"]

    # Every entry of the padded array is an edge, and F is linear in it.
    w, s, a, v = (np.asarray(params[k], np.float64) for k in "wsav")
    edges = np.outer(np.abs(a.ravel()) ** p, np.abs(v.ravel()) ** p)
    numbers = [*w.ravel(), float(s)]
    total, derivatives = 0.0, np.zeros(5)
    for k in range(5):
        # Which entries hold this number, and how often: padding with nothing but it.
        one = [float(k == j) for j in range(5)]
        held = pad(jnp.array(one[:4]).reshape(2, 2), jnp.float32(one[4]))
        held = np.abs(np.asarray(held, np.float64)) ** p
        derivatives[k] = np.sum(held * edges)
        total += derivatives[k] * abs(numbers[k]) ** p
    norm = normax.path_norm(forward, params, shape(1, 1), p)
    np.testing.assert_allclose(norm, total ** (1 / p), rtol=3e-6)
    scales = normax.path_scales(forward, params, shape(1, 1), p)
    got = [*scales["w"].ravel(), scales["s"]]
    np.testing.assert_allclose(got, derivatives ** (2 / p), rtol=3e-6)


@pytest.mark.slow
def test_parts_of_a_parameter_are_combined():
    def forward(params, x):
        first, second = jnp.split(params["split"], 2, axis=1)
        x = x @ (params["stack"][0] * params["stack"][1]) + params["b"][:1]
        return relu(x + params["b"][1:]) @ (first * second)

    def twin(v, x):
        x = x @ (v["stack"][0] * v["stack"][1]) + v["b"].sum(0, keepdims=True)
        return x @ (v["split"][:, :2] * v["split"][:, 2:])

    params = {"stack": draw(2, 2, 2), "b": draw(2, 2), "split": draw(2, 4)}
    params = jax.tree.map(jnp.abs, params)
    check(forward, params, shape(1, 2), 1.0, twin)

    def scanned(w, x):
        layer = lambda h, pair: (relu(h @ (pair[0] * pair[1])), None)  # noqa: E731
        return jax.lax.scan(layer, x, (w[:, 0], w[:, 1]))[0]

    check(scanned, draw(3, 2, 2, 2), shape(1, 2), 1.5)

    def joined(w, x):
        first, second = jnp.split(jnp.concatenate([w[0], w[1]]), 2)
        return x @ (first * second)

    check(joined, draw(2, 2, 2), shape(1, 2), 1.5)


@pytest.mark.slow
def test_what_a_scan_returns_and_nothing_uses():
    def forward(params, x):
        h = x @ params["w"]

        def step(carry, slices):
            (a, b), (s, h) = carry, slices
            return (relu(h * s * s), b * s), jnp.flip(0.5 * a, 1)

        stacked = params["s"], jnp.stack([h, h])
        (a, b), _ = jax.lax.scan(step, (h, h), stacked)
        return a @ params["v"], b

    def twin(v, x):
        h = x @ v["w"]
        return h * v["s"][1] * v["s"][1] @ v["v"], h * v["s"][0] * v["s"][1]

    params = {"w": draw(2, 3), "s": draw(2, 1, 1), "v": draw(3, 2)}
    check(forward, params, shape(1, 2), 1.0, twin)


def test_scans_of_no_step():
    def forward(params, x):
        step = lambda h, w: (relu(h @ w), None)  # noqa: E731
        return jax.lax.scan(step, x, params["none"])[0] @ params["w"]

    params = {"none": jnp.zeros((0, 2, 2)), "w": draw(2, 1)}
    norm = normax.path_norm(forward, params, shape(1, 2))
    np.testing.assert_allclose(norm, np.linalg.norm(params["w"]), rtol=1e-6)


@pytest.mark.slow
def test_inputs_of_many_arrays_and_outputs_of_many():
    def forward(params, x):
        hidden = relu(x["a"] @ params["w"][0]) + x["b"][0] @ params["w"][1]
        return {"one": hidden, "two": (hidden @ params["v"], params["c"])}

    params = {"w": [draw(2, 3), draw(4, 3)], "v": draw(3, 2), "c": draw(2)}
    check(forward, params, {"a": shape(1, 2), "b": (shape(1, 4),)})


@pytest.mark.slow
def test_only_the_shape_of_one_example_matters():
    params = [draw(2, 3), draw(3), draw(3, 2)]
    forward = lambda w, x: relu(x @ w[0] + w[1].reshape(*[1] * (x.ndim - 1), 3)) @ w[2]  # noqa: E731
    expected = normax.path_scales(forward, params, jnp.ones(2))
    for inputs in (shape(2), shape(1, 2), shape(7, 2), jnp.full((5, 2), jnp.nan)):
        assert_scales(normax.path_scales(forward, params, inputs), expected, 1e-6)


# Batch norm.


class Block(nn.Module):
    """A ResNet block; `folded` has the batch norms in its convolutions."""

    width: int
    strides: int = 1
    folded: bool = False

    @nn.compact
    def __call__(self, x):
        conv = functools.partial(nn.Conv, self.width, use_bias=self.folded)
        norm = lambda x: x if self.folded else nn.BatchNorm(True)(x)  # noqa: E731
        y = relu(norm(conv((3, 3), self.strides)(x)))
        y = norm(conv((3, 3))(y))
        if x.shape != y.shape:
            x = norm(conv((1, 1), self.strides)(x))
        return relu(x + y)


class ResNet(nn.Module):
    widths: tuple[int, ...]
    folded: bool = False

    @nn.compact
    def __call__(self, x):
        x = nn.Conv(self.widths[0], (3, 3), use_bias=self.folded)(x)
        x = relu(x if self.folded else nn.BatchNorm(True)(x))
        for stage, width in enumerate(self.widths):
            for block in range(2 if len(self.widths) > 1 else 1):
                strides = 2 if stage and not block else 1
                x = Block(width, strides, self.folded)(x)
        return nn.Dense(3)(jnp.sum(x, axis=(1, 2)))


def folded(params, stats):
    """Fold the i-th batch norm of each module into its i-th convolution."""
    result, factors = {}, {}
    for name, sub in params.items():
        if name.startswith("Conv_"):
            norm, mean = (
                params[name.replace("Conv", "BatchNorm")],
                stats[name.replace("Conv", "BatchNorm")],
            )
            factor = norm["scale"] / np.sqrt(mean["var"] + 1e-5)
            bias = norm["bias"] - mean["mean"] * factor
            result[name] = {"kernel": sub["kernel"] * factor, "bias": bias}
            factors[name] = {"kernel": factor}
        elif name.startswith("Block_"):
            result[name], factors[name] = folded(sub, stats[name])
        elif not name.startswith("BatchNorm_"):
            result[name] = sub
    return result, factors


def resnet(widths, size):
    x = shape(1, size, size, 2)
    variables = jax.eval_shape(ResNet(widths).init, jax.random.key(0), x)
    params = redrawn(variables["params"])
    stats = jax.tree.map(
        lambda s: np.abs(RNG.normal(size=s.shape).astype(s.dtype)) + np.float32(0.5),
        variables["batch_stats"],
    )

    def forward(params, x):
        variables = {"params": params, "batch_stats": stats}
        return ResNet(widths).apply(variables, x)

    def twin(params, x):
        return ResNet(widths, folded=True).apply({"params": params}, x)

    as64 = jax.tree.map(lambda a: np.asarray(a, np.float64), (params, stats))
    return forward, params, twin, *folded(*as64), x


@pytest.mark.slow
def test_folding_batch_norm_changes_nothing():
    forward, params, twin, folded_params, factors, x = resnet((3,), 4)
    value, gradient = oracle(twin, folded_params, x, 2)
    scales, norm = scales_and_norm(forward, params, x, 2.0)
    np.testing.assert_allclose(norm, np.sqrt(value), rtol=2e-6)
    assert_scales(scales["Dense_0"], jax.tree.map(np.float32, gradient["Dense_0"]))
    for name in ("Conv_0", "Conv_1"):
        kernel = gradient["Block_0"][name]["kernel"]
        expected = kernel * factors["Block_0"][name]["kernel"] ** 2
        got = scales["Block_0"][name]["kernel"]
        np.testing.assert_allclose(got, expected, rtol=3e-6)
        shift = scales["Block_0"][name.replace("Conv", "BatchNorm")]["bias"]
        expected = gradient["Block_0"][name]["bias"]
        np.testing.assert_allclose(shift, expected, rtol=3e-6)


@pytest.mark.slow
def test_resnet_18():
    forward, params, twin, folded_params, _, x = resnet((2, 3, 4, 5), 8)
    with jax.enable_x64(True):
        total = jax.jit(twin)(powers(folded_params, 2), np.ones(x.shape))
    log_norm = normax.path_norm(forward, params, x, log=True)
    np.testing.assert_allclose(
        log_norm, np.log(np.sum(np.asarray(total))) / 2, rtol=2e-6
    )


class VGG(nn.Module):
    pool: object = nn.max_pool

    @nn.compact
    def __call__(self, x):
        for width in (2, "M", 3, "M", 4, 4, "M", 5, 5, "M", 5, 5, "M"):
            if width == "M":
                x = self.pool(x, (2, 2), (2, 2))
            else:
                x = relu(nn.Conv(width, (3, 3))(x))
        x = relu(nn.Dense(6)(x.reshape(x.shape[0], -1)))
        return nn.Dense(3)(x)


@pytest.mark.slow
def test_vgg_11():
    forward, params, x = linen(VGG(), 1, 32, 32, 3)
    twin = VGG(lambda x, *args: 4 * nn.avg_pool(x, *args))
    with jax.enable_x64(True):
        total = jax.jit(twin.apply)({"params": powers(params, 2)}, np.ones(x.shape))
    log_norm = normax.path_norm(forward, params, x, log=True)
    np.testing.assert_allclose(
        log_norm, np.log(np.sum(np.asarray(total))) / 2, rtol=2e-6
    )


def test_biases_of_layers_that_meet_are_edges_of_their_own():
    params = [(draw(2, 3), draw(1, 3)), (draw(2, 3), draw(1, 3)), draw(3, 2)]

    def forward(params, x):
        (w, b), (v, c), last = params
        return relu((x @ w + b) - (x @ v + c)) @ last

    check(
        forward,
        params,
        shape(1, 2),
        2,
        lambda v, x: forward((v[0], jax.tree.map(jnp.negative, v[1]), v[2]), x),
    )


def test_constants_are_signed_until_the_next_layer():
    def forward(params, x):
        h = (x @ params["w"] + params["b"] - 5.0) * params["s"] + params["c"]
        return (h - params["c"][:, ::-1]) @ params["v"] + params["d"] - 1.0

    params = {k: draw(1, 2) for k in "bscd"} | {"w": draw(3, 2), "v": draw(2, 2)}
    w = {k: np.asarray(a, np.float64) for k, a in params.items()}
    hidden = np.sum(w["w"] ** 2, 0, keepdims=True) * w["s"] ** 2
    hidden += ((w["b"] - 5) * w["s"] + w["c"] - w["c"][:, ::-1]) ** 2
    total = np.sum(hidden @ w["v"] ** 2 + (w["d"] - 1) ** 2)
    norm = normax.path_norm(forward, params, shape(1, 3))
    np.testing.assert_allclose(norm, np.sqrt(total), rtol=1e-6)


def test_adding_a_known_zero_changes_nothing():
    def forward(params, x, zero):
        h = (x @ params["w"] + zero) + (x @ params["v"] + params["b"])
        return h - 1.0

    params = {"w": draw(3, 2), "v": draw(3, 2), "b": draw(1, 2)}
    norms = [
        normax.path_norm(functools.partial(forward, zero=zero), params, shape(1, 3))
        for zero in (0.0, jnp.zeros((1, 2)))
    ]
    w = {k: np.asarray(a, np.float64) for k, a in params.items()}
    total = np.sum(w["w"] ** 2 + w["v"] ** 2) + np.sum((w["b"] - 1) ** 2)
    np.testing.assert_allclose(norms, [np.sqrt(total)] * 2, rtol=1e-6)


# Scans.


def unrolled(body, carry, xs):
    results = []
    for step in range(len(jax.tree.leaves(xs)[0])):
        carry, y = body(carry, jax.tree.map(lambda x: x[step], xs))  # noqa: B023
        results.append(y)
    return carry, jax.tree.map(lambda *ys: jnp.stack(ys), *results)


def residual_stack(params, x, loop):
    zeros = jnp.zeros((1, 4))

    def body(carry, layer):
        h, count = carry
        wider = jnp.maximum(h @ layer["w"] + layer["b"], zeros)
        h = h + wider @ params["shared"] + layer["c"]
        return (h, count + 1), (jnp.sum(wider) * layer["s"], h > 0)

    (h, count), (side, _) = loop(body, (x + params["c"], 0), params["layers"])
    return h * jnp.asarray(count, h.dtype), side


@pytest.mark.slow
def test_scan_is_the_loop():
    layers = {
        "w": draw(2, 4, 4),
        "b": draw(2, 1, 4),
        "c": draw(2, 1, 4),
        "s": draw(2, 1),
    }
    params = {"layers": layers, "shared": draw(4, 4), "c": draw(1, 4)}

    def scales(loop):
        forward = functools.partial(residual_stack, loop=loop)
        return normax.path_scales(forward, params, shape(1, 4), 2)

    assert_scales(scales(jax.lax.scan), scales(unrolled))


def recurrent(params, x, loop):
    def cell(h, x):
        h = relu(h @ params["h"] + x @ params["x"] + params["b"])
        return h, h @ params["o"]

    return jnp.sum(loop(cell, jnp.zeros((1, 3), x.dtype), x)[1], axis=0)


@pytest.mark.slow
def test_tied_weights_count_every_step():
    params = {"h": draw(3, 3), "x": draw(2, 3), "b": draw(1, 3), "o": draw(3, 2)}
    forward = functools.partial(recurrent, loop=jax.lax.scan)
    twin = functools.partial(recurrent, loop=unrolled)
    check(forward, params, shape(4, 1, 2), 2, twin)


class Layer(nn.Module):
    @nn.compact
    def __call__(self, x, _):
        return relu(nn.Dense(3)(x)), None


class Stacked(nn.Module):
    @nn.compact
    def __call__(self, x):
        layer = nn.remat(Layer, prevent_cse=False)
        axes = dict(variable_axes={"params": 0}, split_rngs={"params": True})
        return nn.scan(layer, length=4, **axes)()(x, None)[0]


def test_linen_scan_with_remat():
    check(*linen(Stacked(), 1, 3))


@pytest.mark.slow
def test_nested_and_reversed_scans_and_fori_loop():
    def forward(params, x):
        inner = lambda h, w: (relu(h @ w), None)  # noqa: E731
        outer = lambda h, ws: (jax.lax.scan(inner, h, ws, reverse=True)[0], None)  # noqa: E731
        h = jax.lax.scan(outer, x, params["w"])[0]
        return jax.lax.fori_loop(0, 3, lambda i, h: relu(h @ params["v"][i]), h)

    def twin(params, x):
        for w in params["w"]:
            x = x @ w[1] @ w[0]
        return functools.reduce(jnp.matmul, params["v"], x)

    params = {"w": draw(2, 2, 3, 3), "v": draw(3, 3, 3)}
    check(forward, params, shape(1, 3), 2, twin)


# Parameters and dtypes.


class NNXNetwork(nnx.Module):
    def __init__(self, rngs):
        self.hidden = nnx.Linear(4, 5, rngs=rngs)
        self.dropout = nnx.Dropout(0.5, deterministic=True, rngs=rngs)
        self.output = nnx.Linear(5, 3, rngs=rngs)

    def __call__(self, x):
        return self.output(self.dropout(relu(self.hidden(x))))


@pytest.mark.slow
def test_nnx_states():
    model = NNXNetwork(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)
    params = redrawn(params)
    forward = lambda params, x: nnx.merge(graphdef, params, rest)(x)  # noqa: E731
    check(forward, params, shape(1, 4))
    # The whole state holds keys of random numbers, which are no weights.
    graphdef, state = nnx.split(nnx.merge(graphdef, params, rest))
    whole = normax.path_scales(
        lambda s, x: nnx.merge(graphdef, s)(x), state, shape(1, 4)
    )
    expected = normax.path_scales(forward, params, shape(1, 4))
    chex.assert_trees_all_equal(whole["hidden"], expected["hidden"])
    assert jax.tree.leaves(whole["dropout"]) == []


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.bfloat16, jnp.float16])
def test_half_precision_parameters(dtype):
    def forward(params, x):
        step = lambda h, layer: (relu(h @ layer[0]) + layer[1], None)  # noqa: E731
        h = jax.lax.scan(step, x @ params["w"], params["layers"])[0]
        return jnp.mean(h, axis=-1)

    def twin(v, x):
        x = x @ v["w"]
        for w, b in zip(*v["layers"], strict=True):
            x = x @ w + b
        return jnp.sum(x, axis=-1) / 7**2

    params = {"w": draw(3, 7), "layers": (draw(2, 7, 7), draw(2, 1, 7))}
    params = jax.tree.map(lambda w: w.astype(dtype), params)
    check(forward, params, jax.ShapeDtypeStruct((1, 3), dtype), 2, twin)


def test_integers_numbers_and_none_among_the_parameters():
    params = {"w": draw(2, 3), "n": jnp.int32(3), "s": 2.0, "none": None}
    forward = lambda params, x: relu(x @ params["w"]) * params["n"] * params["s"]  # noqa: E731
    scales = normax.path_scales(forward, params, shape(1, 2))
    np.testing.assert_allclose(scales["w"], np.full((2, 3), 36.0), rtol=1e-6)
    expected = 9 * np.sum(np.square(params["w"]))
    np.testing.assert_allclose(scales["s"], expected, rtol=1e-6)
    assert scales["n"] is None and scales["none"] is None


def test_constants_of_another_dtype_in_a_scan():
    with jax.enable_x64(True):

        def forward(w, x):
            body = lambda h, w: (relu(h @ w) * np.float64(2), None)  # noqa: E731
            return jax.lax.scan(body, x.astype(jnp.float64), w)[0]

        w = jnp.ones((2, 1, 1), jnp.float32)
        scales = normax.path_scales(forward, w, jnp.ones((1, 1), jnp.float32))
    np.testing.assert_allclose(scales, np.full((2, 1, 1), 16.0))


def test_what_the_network_closes_over_is_read_anew():
    scale = {"by": 1.0}

    def forward(w, x):
        return scale["by"] * (x @ w)

    w, x = jnp.ones((2, 2)), jnp.ones((1, 2))
    before = normax.path_norm(forward, w, x), normax.path_scales(forward, w, x)[0, 0]
    scale["by"] = 10.0
    after = normax.path_norm(forward, w, x), normax.path_scales(forward, w, x)[0, 0]
    np.testing.assert_allclose(before + after, (2, 1, 20, 100), 1e-6)


@pytest.mark.slow
def test_examples_in_a_batch_are_told_from_steps_and_rows():
    def recurrent(params, x):
        def step(state, x):
            state = relu(x @ params["in"] + state @ params["state"])
            return state, state

        return jax.lax.scan(step, jnp.zeros((*x.shape[1:-1], 4)), x)[1]

    params = {"in": draw(3, 4), "state": draw(4, 4)}
    whole = normax.path_norm(
        jax.vmap(recurrent, (None, 0)), params, jnp.ones((7, 5, 3))
    )
    np.testing.assert_allclose(
        normax.path_norm(recurrent, params, jnp.ones((5, 3))), whole, 1e-6
    )
    assert np.all(normax.path_scales(recurrent, params, jnp.ones((5, 3)))["state"] > 0)

    conv = nn.Conv(2, (3, 3))
    image = jnp.ones((6, 6, 1))
    params = conv.init(jax.random.key(0), image)
    np.testing.assert_allclose(
        normax.path_norm(conv.apply, params, image),
        normax.path_norm(conv.apply, params, image[None]),
        1e-6,
    )

    def pooled(w, x):
        return nn.avg_pool(x * w, (3, 3), padding="SAME")

    norms = [normax.path_norm(pooled, jnp.ones((1, 1, 1)), image)]
    norms += [normax.path_norm(pooled, jnp.ones((1, 1, 1, 1)), image[None])]
    np.testing.assert_allclose(*norms, 1e-6)

    def mixed(w, x):
        return relu(x @ w).mean(0, keepdims=True) + x @ w

    w = draw(4, 4)
    rows = [normax.path_norm(mixed, w, jnp.ones((n, 4))) for n in (1, 3)]
    assert not np.isclose(*rows)

    def with_bias(w, x):
        return relu(x @ w + w[:1]) @ w

    whole, one = (normax.path_norm(with_bias, w, jnp.ones((n, 4))) for n in (32, 1))
    np.testing.assert_allclose(whole, one, 1e-6)

    def squeezed(w, x):
        return relu(x @ w[:, :1]).squeeze()

    whole, one = (normax.path_norm(squeezed, w, jnp.ones((n, 4))) for n in (32, 1))
    np.testing.assert_allclose(whole, one, 1e-6)

    def bounded(w, x):
        assert x.shape[0] <= 32
        return relu(x @ w) @ w

    whole, one = (normax.path_norm(bounded, w, jnp.ones((n, 4))) for n in (32, 1))
    np.testing.assert_allclose(whole, one, 1e-6)

    def with_step(w, inputs):
        return relu(inputs["x"] @ w) @ w, jnp.zeros(())

    inputs = {"x": jnp.ones((32, 4)), "step": 3, "key": jax.random.key(0)}
    np.testing.assert_allclose(
        normax.path_norm(with_step, w, inputs),
        normax.path_norm(lambda w, x: relu(x @ w) @ w, w, jnp.ones((1, 4))),
        1e-6,
    )


@pytest.mark.devices(4)
def test_inputs_of_an_explicit_mesh():
    mesh = jax.make_mesh((4,), ("x",), axis_types=(AxisType.Explicit,))
    w = draw(4, 4)
    expected = normax.path_norm(lambda w, x: x @ w, w, jnp.ones((1, 4)))
    with jax.set_mesh(mesh):
        sharded = jax.device_put(jnp.ones((8, 4)), NamedSharding(mesh, P("x")))
        for x in (jnp.ones((1, 4)), sharded):
            got = normax.path_norm(lambda w, x: x @ w, jnp.asarray(w), x)
            np.testing.assert_allclose(got, expected, 1e-6)


@pytest.mark.devices(4)
def test_an_einsum_that_names_its_sharding():
    mesh = jax.make_mesh((4,), ("x",), (AxisType.Explicit,))
    w = draw(4, 4)

    def network(w, x):
        return jnp.einsum("bi,ij->bj", x, w, out_sharding=P("x", None))

    with jax.set_mesh(mesh):
        x = jax.ShapeDtypeStruct((8, 4), jnp.float32)
        got = normax.path_norm(network, jnp.asarray(w), x)
    np.testing.assert_allclose(got, np.linalg.norm(w), 1e-6)


@pytest.mark.slow
@pytest.mark.devices(4)
def test_networks_that_name_shardings():
    mesh = jax.make_mesh((2, 2), ("x", "y"), (AxisType.Explicit,) * 2)
    first, second = draw(4, 6), draw(6, 2)
    stack = jnp.stack([draw(6, 6), draw(6, 6)])
    params = {"first": first, "stack": stack, "second": second}

    def plain(params, x):
        h = relu(x @ params["first"])
        h, _ = jax.lax.scan(lambda h, w: (relu(h @ w), None), h, params["stack"])
        return h @ params["second"] * jnp.float32(0.5)

    def sharded(params, x):
        spec = P("x", "y")
        h = relu(jnp.einsum("bi,ij->bj", x, params["first"], out_sharding=spec))
        h = jax.sharding.reshard(h, P("x", None))

        def layer(h, w):
            h = jax.lax.dot_general(
                h, w, (((1,), (0,)), ((), ())), out_sharding=P("x", None)
            )
            return relu(h), None

        h, _ = jax.lax.scan(layer, h, params["stack"])
        h = jnp.einsum("bi,ij->bj", h, params["second"], out_sharding=P("x", None))
        return h * jax.sharding.reshard(jnp.full((1, 2), 0.5), P(None, None))

    batch = jnp.ones((8, 4))
    norm = normax.path_norm(plain, params, batch)
    scales = normax.path_scales(plain, params, batch)
    tx = normax.scale_by_path_sgd(plain, batch)
    updates, _ = tx.update(params, tx.init(params), params)
    with jax.set_mesh(mesh):
        specs = {"first": P(None, "y"), "stack": P(), "second": P("y")}
        placed = {
            name: jax.device_put(w, NamedSharding(mesh, specs[name]))
            for name, w in params.items()
        }
        x = jax.device_put(batch, NamedSharding(mesh, P("x")))
        sharded(placed, x)  # It is a network that JAX takes.
        np.testing.assert_allclose(normax.path_norm(sharded, placed, x), norm, 1e-6)
        found = normax.path_scales(sharded, placed, x)
        chex.assert_trees_all_close(jax.device_get(found), scales, rtol=1e-6)
        for every in (1, 2):
            tx = normax.scale_by_path_sgd(sharded, x, update_every=every)
            state, step = tx.init(placed), jax.jit(tx.update)
            for _ in range(2):
                got, state = step(placed, state, placed)
            chex.assert_trees_all_close(jax.device_get(got), updates, rtol=1e-5)
        wrong = lambda w, x: jnp.tanh(sharded(w, x))  # noqa: E731
        with pytest.raises(ValueError, match="applies `tanh`"):
            normax.path_norm(wrong, placed, x)

        def broken(w, x):
            raise KeyError("of the network itself")

        with pytest.raises(KeyError, match="of the network itself") as error:
            normax.path_norm(broken, placed, x)
        assert "PartitionSpec" not in str(getattr(error.value, "__notes__", ""))
        closing = lambda _, x: sharded(placed, x)  # noqa: E731
        with pytest.raises(ValueError, match="einsum") as error:
            normax.path_norm(closing, placed, x)
        assert "closes over no array on the mesh" in str(error.value.__notes__)
