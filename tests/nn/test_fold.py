"""Folding of batch normalization: the pair's function, nothing else changed."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

from normax.nn import (
    BatchNorm,
    BatchRenorm,
    WeightNorm,
    fold_batch_norm,
    fold_batch_norms,
    folding_error,
)

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(3)]

RNGS = nnx.Rngs(0)


def draw(shape, seed=0, scale=1.0, dtype=jnp.float32):
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jax.device_put(values.astype(dtype))


INIT = {
    "kernel_init": lambda key, shape, dtype: draw(shape, 1, dtype=dtype),
    "bias_init": lambda key, shape, dtype: draw(shape, 2, dtype=dtype),
}
MASK: jax.Array = jnp.arange(72).reshape(3, 4, 6) % 2
LAYERS = {
    "linear": (functools.partial(nnx.Linear, 3, 6), (5, 3)),
    "conv": (functools.partial(nnx.Conv, 4, 6, (3, 3)), (2, 5, 5, 4)),
    "strides": (
        functools.partial(nnx.Conv, 4, 6, (3, 2), strides=(2, 1), padding="VALID"),
        (2, 5, 5, 4),
    ),
    "groups": (
        functools.partial(nnx.Conv, 4, 6, (3, 3), feature_group_count=2),
        (2, 5, 5, 4),
    ),
    "dilation": (
        functools.partial(nnx.Conv, 4, 6, 3, kernel_dilation=2, padding="CIRCULAR"),
        (2, 7, 4),
    ),
    "mask": (
        functools.partial(
            nnx.Conv,
            4,
            6,
            3,
            mask=MASK,
            padding="REFLECT",
        ),
        (2, 7, 4),
    ),
    "transpose": (
        functools.partial(nnx.ConvTranspose, 4, 6, (3, 3), strides=(2, 2)),
        (2, 4, 4, 4),
    ),
    "transposed_kernel": (
        functools.partial(
            nnx.ConvTranspose, 4, 6, (3, 3), strides=(2, 2), transpose_kernel=True
        ),
        (2, 4, 4, 4),
    ),
}


def normalization(features, kind=BatchNorm, seed=3, **options):
    """Return a normalization with nonzero statistics and scales of both signs."""
    norm = kind(features, rngs=RNGS, **options)
    norm.mean[...] = draw((features,), seed)
    norm.var[...] = jnp.abs(draw((features,), seed + 1)) + 0.1
    if norm.scale is not None:
        norm.scale[...] = (-1.0) ** jnp.arange(features) * draw((features,), seed + 2)
    if norm.bias is not None:
        norm.bias[...] = draw((features,), seed + 3)
    return norm


def values(module):
    state = nnx.state(module, nnx.Not(nnx.RngState))
    return [np.asarray(leaf).copy() for leaf in jax.tree.leaves(state)]


@pytest.mark.parametrize("use_bias", [True, False])
@pytest.mark.parametrize("name", LAYERS)
def test_pair_of_layers(name, use_bias):
    factory, shape = LAYERS[name]
    layer = factory(use_bias=use_bias, rngs=RNGS, **INIT)
    norm, x = normalization(6), draw(shape, 9)
    before = values(layer), values(norm)
    folded = fold_batch_norm(layer, norm)
    # The reference is computed in float64 from the layer's own output.
    mean, var, gamma, beta = (
        np.asarray(v[...], np.float64)
        for v in (norm.mean, norm.var, norm.scale, norm.bias)
    )
    y = np.asarray(layer(x), np.float64)
    expected = (y - mean) / np.sqrt(var + norm.epsilon) * gamma + beta
    np.testing.assert_allclose(folded(x), expected, rtol=1e-5, atol=5e-5)
    assert type(folded) is type(layer)
    assert folded.use_bias
    for module, old in zip((layer, norm), before, strict=True):
        for value, kept in zip(values(module), old, strict=True):
            np.testing.assert_array_equal(value, kept)
    assert folding_error(nnx.Sequential(layer, norm), folded, x) < 5e-5


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        (BatchNorm, {"use_scale": False, "epsilon": 0.1}),
        (BatchNorm, {"use_bias": False, "axis": 1}),
        (BatchRenorm, {"use_running_average": True}),
    ],
)
def test_kinds_of_normalization(kind, options):
    layer = nnx.Linear(3, 6, rngs=RNGS, **INIT)
    norm, x = normalization(6, kind, **options), draw((5, 3))
    expected = norm(layer(x), use_running_average=True)
    np.testing.assert_allclose(
        fold_batch_norm(layer, norm)(x), expected, rtol=1e-5, atol=1e-5
    )


@pytest.mark.parametrize("param_dtype", [jnp.bfloat16, jnp.float16])
def test_dtypes_are_kept(param_dtype):
    layer = nnx.Linear(3, 6, param_dtype=param_dtype, rngs=RNGS, **INIT)
    norm, x = normalization(6), draw((5, 3), dtype=param_dtype)
    folded = fold_batch_norm(layer, norm)
    assert {p.dtype for p in (folded.kernel, folded.bias)} == {jnp.dtype(param_dtype)}
    scale = np.abs(norm(layer(x), use_running_average=True)).max()
    error = folding_error(nnx.Sequential(layer, norm), folded, x)
    assert 0 < error < 4 * jnp.finfo(param_dtype).eps * scale


def test_error_is_the_largest_difference():
    error = folding_error(
        lambda x: {"a": x, "b": (2 * x, x.astype(jnp.bfloat16))},
        lambda x: {"a": x + 0.5, "b": (2 * x - 3.0, x.astype(jnp.bfloat16))},
        jnp.arange(4.0),
    )
    assert error == 3.0
    assert jnp.isnan(folding_error(jnp.log, jnp.sin, -jnp.ones(2)))


@pytest.mark.parametrize(
    ("layer", "norm", "message"),
    [
        (nnx.Linear(3, 5, rngs=RNGS), {}, "has 6 and the layer 5"),
        (nnx.Linear(3, 6, rngs=RNGS), {"axis": 0}, "last axis, but its axis is 0"),
        (nnx.LoRALinear(3, 6, lora_rank=2, rngs=RNGS), {}, "got LoRALinear"),
        (WeightNorm(nnx.Linear(3, 6, rngs=RNGS)), {}, "got WeightNorm"),
        (nnx.Linear(3, 6, rngs=RNGS), {"kind": nnx.LayerNorm}, "got LayerNorm"),
    ],
)
def test_what_does_not_fit_raises(layer, norm, message):
    norm = dict(norm)
    norm = norm.pop("kind", BatchNorm)(6, rngs=RNGS, **norm)
    with pytest.raises(ValueError, match=message):
        fold_batch_norm(layer, norm)


class Residual(nnx.Module):
    """Two pairs that fold, one whose input is used twice, and one after a sum."""

    def __init__(self):
        convs = [nnx.Conv(4, 4, (3, 3), rngs=RNGS, **INIT) for _ in range(3)]
        self.stem, self.hidden, self.shared = convs
        self.norms = nnx.List([normalization(4, seed=seed) for seed in range(3, 7)])
        self.dropout = nnx.Dropout(0.5, rngs=RNGS)
        self.head = nnx.Dict(up=nnx.ConvTranspose(4, 2, (2, 2), rngs=RNGS, **INIT))
        self.scanned = nnx.Linear(2, 2, rngs=RNGS, **INIT)
        self.after = normalization(2, BatchRenorm)

    def __call__(self, x, *, flip):
        x = self.norms[0](self.stem(x))
        if flip:
            x = -x
        x = x + jax.checkpoint(lambda x: self.norms[1](self.hidden(jax.nn.relu(x))))(x)
        y = self.shared(self.dropout(x))
        x = self.norms[2](y) + jnp.tanh(y)
        x = self.head["up"](self.norms[3](x))
        return jax.lax.scan(lambda _, x: (None, self.after(self.scanned(x))), None, x)


@pytest.mark.slow
def test_whole_model():
    model, x = Residual(), draw((2, 5, 5, 4), 8)
    before = values(model)
    folded = fold_batch_norms(model, x, flip=True)
    assert dict(folded.pairs) == {
        "stem": "norms/0",
        "hidden": "norms/1",
        "scanned": "after",
    }
    assert set(folded.left) == {"norms/2", "norms/3"}
    assert not model.norms[0].use_running_average
    model.eval()
    expected = model(x, flip=True)[1]
    found = folded.model(x, flip=True)[1]
    scale = np.abs(expected).max()
    np.testing.assert_allclose(found, expected, atol=1e-5 * scale)
    assert folded.max_error == np.abs(found - expected).max()
    for value, kept in zip(values(model), before, strict=True):
        np.testing.assert_array_equal(value, kept)
    other = draw(x.shape, 11)
    np.testing.assert_allclose(
        folded.model(other, flip=False)[1],
        model(other, flip=False)[1],
        atol=1e-5 * scale,
    )
    graphdef, state = nnx.split(folded.model)
    text = jax.jit(lambda state, x: nnx.merge(graphdef, state)(x, flip=True)).lower(
        state, x
    )
    assert text.as_text().count("rsqrt") == 2


def test_layers_that_are_called_twice_are_left():
    class Twice(nnx.Module):
        def __init__(self):
            self.first, self.second = (nnx.Linear(3, 3, rngs=RNGS) for _ in range(2))
            self.norm, self.other = normalization(3), normalization(3)

        def __call__(self, x):
            x = self.other(self.first(self.first(x)))
            return self.norm(self.second(self.norm(x)))

    folded = fold_batch_norms(Twice(), draw((4, 3)))
    assert folded.pairs == ()
    assert set(folded.left) == {"norm", "other"}
    assert folded.max_error == 0


def test_a_layer_at_two_paths_is_folded_at_one():
    class Shared(nnx.Module):
        def __init__(self):
            self.first = self.second = nnx.Linear(3, 3, rngs=RNGS, **INIT)
            self.norms = nnx.List([normalization(3), normalization(3, seed=6)])

        def __call__(self, x):
            return self.norms[1](self.second(self.norms[0](self.first(x))))

    model, x = Shared(), draw((4, 3))
    folded = fold_batch_norms(model, x)
    assert len(folded.pairs) == 1
    model.eval()
    np.testing.assert_allclose(folded.model(x), model(x), rtol=1e-4, atol=1e-5)


class Block(nnx.Module):
    """One pair, called through a transformation of Flax."""

    def __init__(self, transform):
        self.layer, self.norm = nnx.Linear(3, 3, rngs=RNGS), normalization(3)
        self.transform = transform

    def pair(self, x):
        return self.norm(self.layer(x))

    def __call__(self, x):
        return self.transform(Block.pair)(self, x)


@pytest.mark.slow
@pytest.mark.parametrize(
    "transform",
    [
        nnx.remat,
        nnx.jit,
        lambda f: nnx.jit(nnx.remat(f)),
        functools.partial(nnx.vmap, in_axes=(None, 0)),
        functools.partial(nnx.scan, in_axes=(None, 0), out_axes=0),
    ],
    ids=["remat", "jit", "both", "vmap", "scan"],
)
def test_pairs_inside_of_transformations_of_flax(transform):
    model, x = Block(transform), draw((4, 3), 9)
    before = values(model)
    for _ in range(2):
        folded = fold_batch_norms(model, x)
        assert (folded.pairs, folded.left) == ((("layer", "norm"),), ())
    for value, kept in zip(values(model), before, strict=True):
        np.testing.assert_array_equal(value, kept)
    model.eval()
    np.testing.assert_allclose(folded.model(x), model(x), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("shared", [(), ("layer",), ("norm",)])
def test_stacked_layers_are_left(shared):
    axes = nnx.StateAxes({nnx.PathContains(name): None for name in shared} | {...: 0})

    class Stack(nnx.Module):
        def __init__(self):
            self.blocks = Block(lambda f: f)
            for path, variable in nnx.to_flat_state(nnx.state(self.blocks)):
                if path[0] not in shared:
                    variable.set_value(jnp.stack([variable[...], 0.5 * variable[...]]))

        def __call__(self, x):
            scan = nnx.scan(in_axes=(axes, nnx.Carry), out_axes=nnx.Carry)
            return scan(lambda block, x: block(x))(self.blocks, x)

    model, x = Stack(), draw((4, 3))
    folded = fold_batch_norms(model, x)
    assert (folded.pairs, folded.left) == ((), ("blocks/norm",))
    model.eval()
    np.testing.assert_array_equal(folded.model(x), model(x))
    inside = model.blocks
    with pytest.raises(ValueError, match=r"stack of several.*shape.*call it where"):
        fold_batch_norm(inside.layer, inside.norm)


@pytest.mark.slow
@pytest.mark.parametrize(
    "wrap",
    [
        WeightNorm,
        lambda layer: nnx.WeightNorm(layer, rngs=nnx.Rngs(1)),
        lambda layer: nnx.SpectralNorm(layer, rngs=nnx.Rngs(1)),
    ],
)
def test_layers_whose_weights_are_computed_are_left(wrap):
    def block(layer):
        return nnx.Sequential(layer, nnx.BatchNorm(4, rngs=nnx.Rngs(0)), nnx.relu)

    layers = [nnx.Linear(4, 4, rngs=nnx.Rngs(seed)) for seed in range(2)]
    model, x = nnx.Sequential(block(layers[0]), block(wrap(layers[1]))), draw((4, 4))
    model(x)
    folded = fold_batch_norms(model, x)
    assert folded.pairs == (("layers/0/layers/0", "layers/0/layers/1"),)
    assert folded.left == ("layers/1/layers/1",)
    model.eval()
    np.testing.assert_allclose(folded.model(x), model(x), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    "read",
    [
        lambda model, x: x @ model.layer.kernel.T,
        lambda model, x: x + jnp.sum(model.layer.kernel[...] ** 2),
        lambda model, x: x * model.norm.num_features - model.norm.epsilon,
        nnx.jit(lambda model, x: x @ model.layer.kernel.T),
        nnx.remat(lambda model, x: x @ model.layer.kernel.T),
    ],
)
def test_pairs_of_which_the_model_reads_more_are_left(read):
    class Reading(nnx.Module):
        def __init__(self):
            self.layer, self.norm = nnx.Linear(3, 3, rngs=RNGS), normalization(3)
            self.other = Block(lambda f: f)

        def __call__(self, x):
            return self.other(read(self, self.norm(self.layer(x))))

    model, x = Reading(), draw((4, 3), 9)
    for _ in range(2):
        folded = fold_batch_norms(model, x)
        assert folded.pairs == (("other/layer", "other/norm"),)
        assert folded.left == ("norm",)
    model.eval()
    np.testing.assert_allclose(folded.model(x), model(x), rtol=1e-4, atol=1e-4)


def test_batch_statistics_at_inference_are_refused():
    class Training(nnx.Module):
        def __init__(self):
            self.layer, self.norm = nnx.Linear(3, 3, rngs=RNGS), normalization(3)

        def __call__(self, x):
            return self.norm(self.layer(x), use_running_average=False)

    with pytest.raises(Exception, match="Cannot mutate BatchStat"):
        fold_batch_norms(Training(), draw((4, 3)))
