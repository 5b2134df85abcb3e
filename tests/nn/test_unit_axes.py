"""unit_axes: the vectors that a module's outputs are made of, in NNX and Linen."""

import functools
from typing import Any, cast

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import scipy
from flax import nnx

import normax
from normax.nn import unit_axes

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]

NO_BIAS: dict[str, Any] = {"use_bias": False}
# A layer, and the shape of its inputs.
NNX = {
    "linear": (functools.partial(nnx.Linear, 3, 5, **NO_BIAS), (2, 3)),
    "linear_general": (
        functools.partial(nnx.LinearGeneral, (2, 3), (4, 5), axis=(-2, -1), **NO_BIAS),
        (2, 2, 3),
    ),
    "query": (functools.partial(nnx.LinearGeneral, 4, (2, 3), **NO_BIAS), (2, 4)),
    "batch_axis": (
        functools.partial(nnx.LinearGeneral, 3, 4, batch_axis={0: 2}, **NO_BIAS),
        (2, 3),
    ),
    "conv": (functools.partial(nnx.Conv, 2, 3, (3, 2), **NO_BIAS), (1, 4, 4, 2)),
    "grouped": (
        functools.partial(nnx.Conv, 4, 6, (3,), feature_group_count=2, **NO_BIAS),
        (1, 5, 4),
    ),
    "conv_transpose": (
        functools.partial(nnx.ConvTranspose, 2, 3, (2, 2), **NO_BIAS),
        (1, 3, 3, 2),
    ),
    "transposed_kernel": (
        functools.partial(
            nnx.ConvTranspose, 2, 3, (2, 2), transpose_kernel=True, **NO_BIAS
        ),
        (1, 3, 3, 2),
    ),
    "einsum": (functools.partial(nnx.Einsum, "nta,hab->nthb", (2, 3, 4)), (2, 5, 3)),
    "experts": (
        functools.partial(nnx.Einsum, "ebd, edf -> ebf", (2, 3, 4)),
        (2, 5, 3),
    ),
}
LINEN = {
    "dense": (nn.Dense(5, **NO_BIAS), (2, 3)),
    "dense_general": (nn.DenseGeneral((4, 5), axis=(-2, -1), **NO_BIAS), (2, 2, 3)),
    "batch_dims": (nn.DenseGeneral(4, axis=-1, batch_dims=(0,), **NO_BIAS), (2, 3)),
    "conv": (nn.Conv(3, (3, 2), **NO_BIAS), (1, 4, 4, 2)),
    "grouped": (nn.Conv(6, (3,), feature_group_count=2, **NO_BIAS), (1, 5, 4)),
    "conv_local": (nn.ConvLocal(3, (2,), padding="VALID", **NO_BIAS), (1, 4, 2)),
    "transposed_kernel": (
        nn.ConvTranspose(3, (2, 2), transpose_kernel=True, **NO_BIAS),
        (1, 3, 3, 2),
    ),
    "einsum": (nn.Einsum((2, 3, 4), "nta,hab->nthb", use_bias=False), (2, 5, 3)),
}


def check(function, kernel, axes):
    """Compare with the Jacobian: entries that share an output are of one vector."""
    rows = np.asarray(jax.jacobian(function)(kernel)).reshape(-1, kernel.size) != 0
    together = scipy.sparse.csr_array(rows.T.astype(int) @ rows.astype(int))
    number, component = scipy.sparse.csgraph.connected_components(together)
    counts = [1 if i in axes else n for i, n in enumerate(kernel.shape)]
    vectors = np.arange(np.prod(counts)).reshape(counts)
    vector = np.broadcast_to(vectors, kernel.shape).ravel()
    assert len(set(zip(component, vector, strict=True))) == number == vectors.size


@pytest.mark.parametrize("name", NNX)
def test_nnx_modules_against_the_jacobian(name):
    make, shape = NNX[name]
    layer = make(rngs=nnx.Rngs(0))
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    graphdef, params, rest = nnx.split(layer, nnx.Param, ...)

    def function(kernel):
        merged = nnx.merge(graphdef, {"kernel": params["kernel"].replace(kernel)}, rest)
        return merged(x)

    check(function, layer.kernel[...], unit_axes(layer)["kernel"])


@pytest.mark.parametrize("name", LINEN)
def test_linen_modules_against_the_jacobian(name):
    layer, shape = LINEN[name]
    x = np.random.default_rng(0).normal(size=shape).astype(np.float32)
    kernel = layer.init(jax.random.key(0), x)["params"]["kernel"]
    axes = unit_axes(layer, jax.ShapeDtypeStruct(shape, jnp.float32))["kernel"]
    check(lambda k: layer.apply({"params": {"kernel": k}}, x), kernel, axes)


class LinenBlock(nn.Module):
    """A pre-norm block that `nn.scan` can stack."""

    @nn.compact
    def __call__(self, x, _):
        x = x + nn.MultiHeadDotProductAttention(2, use_bias=False)(nn.LayerNorm()(x))
        return x + nn.Dense(4)(nn.Dense(16)(nn.LayerNorm()(x))), None


class LinenTransformer(nn.Module):
    """Tied embeddings, a learned position, three stacked blocks."""

    @nn.compact
    def __call__(self, tokens, train):
        embed = nn.Embed(7, 4)
        x = embed(tokens) + self.param("position", nn.initializers.ones, (1, 5, 4))
        scanned = nn.scan(
            LinenBlock,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=3,
        )
        x, _ = scanned(name="blocks")(x, None)
        return embed.attend(nn.BatchNorm(not train)(x))


def test_linen_transformer():
    tokens = jax.ShapeDtypeStruct((2, 5), jnp.int32)
    norm = {"scale": "none", "bias": "none"}
    dense = {"kernel": (1,), "bias": "none"}
    into, out = {"kernel": (1,)}, {"kernel": (1, 2)}
    attention = {"query": into, "key": into, "value": into, "out": out}
    expected = {
        "Embed_0": {"embedding": (1,)},
        "position": "none",
        "blocks": {
            "LayerNorm_0": norm,
            "LayerNorm_1": norm,
            "MultiHeadDotProductAttention_0": attention,
            "Dense_0": dense,
            "Dense_1": dense,
        },
        "BatchNorm_0": norm,
    }
    axes = unit_axes(LinenTransformer(), tokens, train=True)
    assert axes == expected
    params = jax.eval_shape(
        lambda: LinenTransformer().init(
            jax.random.key(0), jnp.zeros((2, 5), jnp.int32), True
        )
    )["params"]
    shapes = jax.eval_shape(lambda p: normax.weight_norm(p, axes), params)
    query = shapes["blocks"]["MultiHeadDotProductAttention_0"]["query"]["kernel"]
    assert query.shape == (3, 2, 2)


class Block(nnx.Module):
    """What can be stacked by `nnx.vmap`, an axis of the layers in front or behind."""

    def __init__(self, rngs):
        self.attention = nnx.MultiHeadAttention(2, 4, rngs=rngs, decode=False)
        self.mlp = nnx.Linear(4, 8, rngs=rngs)
        self.gain = nnx.Param(jnp.ones((4, 4)))


@pytest.mark.parametrize("out_axis", [0, 1])
def test_axes_of_stacked_nnx_modules_are_left_out(out_axis):
    @nnx.split_rngs(splits=3)
    @nnx.vmap(in_axes=0, out_axes=out_axis)
    def create(rngs):
        return Block(rngs)

    blocks = nnx.eval_shape(lambda: create(nnx.Rngs(0)))
    axes = unit_axes(blocks)
    place = {0: (1,), 1: (0,)}[out_axis]
    assert axes["mlp"] == {"kernel": place, "bias": "none"}
    assert axes["attention"]["query"] == {"kernel": place, "bias": "none"}
    out = {0: (1, 2), 1: (0, 2)}[out_axis]
    assert axes["attention"]["out"] == {"kernel": out, "bias": "none"}
    assert axes["gain"] == "none"


def test_recurrent_cells():
    cell = nnx.eval_shape(lambda: nnx.GRUCell(3, 4, rngs=nnx.Rngs(0)))
    gate = {"kernel": (0,), "bias": "none"}
    assert unit_axes(cell) == {"dense_i": gate, "dense_h": gate} or unit_axes(cell) == {
        "dense_i": gate,
        "dense_h": {"kernel": (0,)},
    }
    rnn = nn.RNN(nn.OptimizedLSTMCell(4))
    axes = unit_axes(rnn, jax.ShapeDtypeStruct((2, 5, 3), jnp.float32))
    kernels = [gate["kernel"] for gate in next(iter(axes.values())).values()]
    assert kernels == [(0,)] * 8


def test_weight_norm_says_what_its_vectors_are():
    general = functools.partial(nnx.LinearGeneral, 3, (2, 4), rngs=nnx.Rngs(0))
    for feature_axes, axes in {"module": (0,), "unit": (0, 1), None: (0, 1, 2)}.items():
        model = normax.nn.WeightNorm(general(), feature_axes=feature_axes)
        assert unit_axes(model)["layer"]["kernel"] == axes
        assert unit_axes(model)["g"] == {"kernel": "none"}
        assert model.g["kernel"].ndim == 3 - len(axes)


@pytest.mark.slow
def test_the_axes_fit_an_optimizer_and_plain_trees():
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(0))
    )
    axes = unit_axes(model)
    tx = optax.chain(
        optax.sgd(0.1),
        normax.project_unit_norm(axes),
        normax.monitor_weight_dynamics(axes),
    )
    optimizer = nnx.Optimizer(model, tx, wrt=nnx.Param)
    x = jnp.ones((2, 3))
    grads = nnx.grad(lambda model: jnp.sum(jnp.sin(model(x))))(model)
    optimizer.update(model, grads)
    kernel = model.layers[0].kernel[...]
    np.testing.assert_allclose(jnp.linalg.norm(kernel, axis=0), 1, rtol=3e-7)
    params = nnx.to_pure_dict(nnx.state(model, nnx.Param))
    norms = normax.weight_norm(params, axes)
    np.testing.assert_allclose(norms["layers"][0]["kernel"], 1, rtol=3e-7)


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: unit_axes(cast(Any, {"kernel": 0})), "got dict.*pass the nnx"),
        (
            lambda: unit_axes(nnx.bridge.ToNNX(nn.Dense(3))),
            "holds a ToNNX; take the axes of the module that it wraps",
        ),
        (
            lambda: unit_axes(nnx.Linear(2, 2, rngs=nnx.Rngs(0)), jnp.ones(2)),
            "got 1 inputs for Linear; pass the model alone",
        ),
    ],
)
def test_what_is_no_model_raises(call, message):
    with pytest.raises(TypeError, match=message):
        call()


class Jitted(nn.Module):
    """Two equal layers that are compiled once."""

    @nn.compact
    def __call__(self, x):
        layer = nn.jit(LinenBlock)
        return layer(name="second")(layer(name="first")(x, None)[0], None)[0]


def test_what_is_compiled_once_is_seen_every_time():
    x = jax.ShapeDtypeStruct((2, 3, 4), jnp.float32)
    for _ in range(2):
        axes = unit_axes(Jitted(), x)
        assert axes["first"] == axes["second"]
        assert axes["first"]["Dense_0"] == {"kernel": (0,), "bias": "none"}


def test_equations():
    x = jax.ShapeDtypeStruct((2, 5, 4), jnp.float32)
    einsum = nn.Einsum((3, 4), use_bias=False)
    assert unit_axes(einsum, x, "bsd,fd->bsf") == {"kernel": (1,)}
    assert unit_axes(einsum, x, einsum_str="bsd,fd->bsf") == {"kernel": (1,)}
    dots = nn.Einsum((5, 4, 3), "b...d,...df->b...f", use_bias=False)
    assert unit_axes(dots, x) == {"kernel": (1,)}


def test_arrays_under_two_names_and_under_none():
    class Shared(nnx.Module):
        def __init__(self):
            self.a = nnx.Linear(4, 4, rngs=nnx.Rngs(0))
            self.nothing = nnx.Param(None)
            self.b = normax.nn.WeightNorm(self.a)

    model = Shared()
    norms = normax.weight_norm(nnx.state(model, nnx.Param), unit_axes(model))
    assert [x.shape for x in jax.tree.leaves(norms)] == [(4,)]
