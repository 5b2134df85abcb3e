"""unit_axes beside scale_invariant_axes on ten architectures, both derived by hand.

`unit_axes` says what a module sums over; detection says which of it the loss does not
see. An entry of `invariant` is what a normalization after the array leaves free.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normax
from normax.nn import unit_axes

pytestmark = pytest.mark.usefixtures("quick_compilation")

WIDTH = 4
NO_BIAS: dict[str, Any] = {"use_bias": False}


class ResNet(nnx.Module):
    """Two convolutions with batch norm around an identity, and a head."""

    def __init__(self, rngs):
        self.stem = nnx.Conv(2, WIDTH, (3, 3), rngs=rngs, **NO_BIAS)
        self.first = nnx.Conv(WIDTH, WIDTH, (3, 3), rngs=rngs, **NO_BIAS)
        self.norms = nnx.List([nnx.BatchNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        x = nnx.relu(self.norms[0](self.stem(x)))
        x = nnx.relu(x + self.norms[1](self.first(x)))
        return self.head(x.mean((1, 2)))


class Block(nnx.Module):
    """A transformer's block; `place` says where its norms stand."""

    def __init__(self, place, rngs, normalize_qk=False):
        self.place = place
        self.attention = nnx.MultiHeadAttention(
            2, WIDTH, 8, decode=False, normalize_qk=normalize_qk, rngs=rngs, **NO_BIAS
        )
        self.up = nnx.Linear(WIDTH, 6, rngs=rngs)
        self.down = nnx.Linear(6, WIDTH, rngs=rngs)
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])

    def __call__(self, x):
        for norm, part in zip(self.norms, (self.attention, self.mlp), strict=True):
            x = x + part(norm(x)) if self.place == "pre" else norm(x + part(x))
        return x

    def mlp(self, x):
        return self.down(nnx.gelu(self.up(x)))


class Transformer(nnx.Module):
    """Embeddings (with a norm right behind them if post-norm), a block, a head."""

    def __init__(self, place, rngs, normalize_qk=False):
        self.embed = nnx.Embed(5, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.block = Block(place, rngs, normalize_qk)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, tokens):
        x = self.embed(tokens)
        if self.block.place == "post":
            return self.head(self.block(self.norm(x)))
        return self.head(self.norm(self.block(x)))


class ViT(nnx.Module):
    """Patches, a class token, positions, a block."""

    def __init__(self, rngs):
        self.patch = nnx.Conv(2, WIDTH, (2, 2), strides=2, padding="VALID", rngs=rngs)
        self.token = nnx.Param(rngs.params.normal((1, 1, WIDTH)))
        self.position = nnx.Param(rngs.params.normal((1, 10, WIDTH)))
        self.block = Block("pre", rngs)
        self.head = nnx.Linear(WIDTH, 3, rngs=rngs)

    def __call__(self, x):
        x = self.patch(x).reshape(len(x), -1, WIDTH)
        token = jnp.broadcast_to(self.token[...], (len(x), 1, WIDTH))
        x = jnp.concatenate([token, x], 1) + self.position[...]
        return self.head(self.block(x)[:, 0])


class Mixer(nnx.Module):
    """Linear maps over tokens and over channels."""

    def __init__(self, rngs):
        self.norms = nnx.List([nnx.LayerNorm(WIDTH, rngs=rngs) for _ in range(2)])
        self.tokens = nnx.Linear(6, 6, rngs=rngs)
        self.channels = nnx.Linear(WIDTH, WIDTH, rngs=rngs)

    def __call__(self, x):
        mixed = self.tokens(self.norms[0](x).swapaxes(1, 2)).swapaxes(1, 2)
        x = x + nnx.gelu(mixed)
        return x + nnx.gelu(self.channels(self.norms[1](x)))


class Layer(nnx.Module):
    """What is stacked: a linear map with a norm behind it."""

    def __init__(self, rngs):
        self.linear = nnx.Linear(WIDTH, WIDTH, rngs=rngs, **NO_BIAS)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.norm(self.linear(x)))


class Stacked(nnx.Module):
    """Three layers, one behind the other, by nnx.scan."""

    def __init__(self, rngs):
        @nnx.split_rngs(splits=3)
        @nnx.vmap
        def create(rngs):
            return Layer(rngs)

        self.layers = create(rngs)

    def __call__(self, x):
        @nnx.scan(in_axes=(nnx.Carry, 0), out_axes=nnx.Carry)
        def run(x, layer):
            return layer(x)

        return run(x, self.layers)


class Experts(nnx.Module):
    """Three experts at once, each with a norm behind it."""

    def __init__(self, rngs):
        self.experts = nnx.Einsum("ebd,edf->ebf", (3, WIDTH, 6), rngs=rngs)
        self.norm = nnx.RMSNorm(6, rngs=rngs)

    def __call__(self, x):
        return nnx.tanh(self.norm(self.experts(jnp.stack([x, 2 * x, x - 1]))))


class Tied(nnx.Module):
    """Embeddings that are the head too."""

    def __init__(self, rngs):
        self.embed = nnx.Embed(5, WIDTH, rngs=rngs)
        self.norm = nnx.LayerNorm(WIDTH, rngs=rngs)
        self.mix = nnx.Linear(WIDTH, WIDTH, rngs=rngs, **NO_BIAS)

    def __call__(self, tokens):
        return self.embed.attend(nnx.tanh(self.mix(self.norm(self.embed(tokens)))))


class Recurrent(nnx.Module):
    """A GRU over time."""

    def __init__(self, rngs):
        self.rnn = nnx.RNN(nnx.GRUCell(WIDTH, 3, rngs=rngs), rngs=rngs)

    def __call__(self, x):
        return self.rnn(x)


class Case(NamedTuple):
    """A model, its inputs, and what is derived by hand, by the ends of paths."""

    make: Any
    inputs: Any
    units: dict[str, tuple[int, ...]]
    invariant: dict[str, tuple[int, ...]]


TOKENS = np.arange(24).reshape(4, 6) * 7 % 5
IMAGES = np.random.default_rng(0).normal(size=(4, 6, 6, 2)).astype(np.float32)
VECTORS = IMAGES.reshape(8, 9, 4)[:, 0]
SERIES = IMAGES.reshape(4, 18, 4)[:, :6]
BLOCK = {
    "query/kernel": (0,),
    "key/kernel": (0,),
    "value/kernel": (0,),
    "out/kernel": (0, 1),
    "up/kernel": (0,),
    "down/kernel": (0,),
}
TRANSFORMER = BLOCK | {"embedding": (1,), "head/kernel": (0,)}
CASES = {
    # Batch norm follows each convolution: each unit's scale is free.
    "resnet": Case(
        ResNet,
        IMAGES,
        {"stem/kernel": (0, 1, 2), "first/kernel": (0, 1, 2), "head/kernel": (0,)},
        {"stem/kernel": (0, 1, 2), "first/kernel": (0, 1, 2)},
    ),
    # Nothing is normalized before something else is added to it.
    "pre_norm": Case(lambda rngs: Transformer("pre", rngs), TOKENS, TRANSFORMER, {}),
    # The norm right behind the embeddings frees the length of each row.
    "post_norm": Case(
        lambda rngs: Transformer("post", rngs), TOKENS, TRANSFORMER, {"embedding": (1,)}
    ),
    # The norm goes over one head's features, all of which share their scale.
    "qk_norm": Case(
        lambda rngs: Transformer("pre", rngs, normalize_qk=True),
        TOKENS,
        TRANSFORMER,
        {"query/kernel": (0, 2), "key/kernel": (0, 2)},
    ),
    "vit": Case(
        ViT, IMAGES, BLOCK | {"patch/kernel": (0, 1, 2), "head/kernel": (0,)}, {}
    ),
    "mixer": Case(Mixer, SERIES, {"tokens/kernel": (0,), "channels/kernel": (0,)}, {}),
    # Layer norm frees the scale of each layer's matrix, and the layers are stacked.
    "stacked": Case(
        Stacked, VECTORS, {"linear/kernel": (1,)}, {"linear/kernel": (1, 2)}
    ),
    "experts": Case(
        Experts, VECTORS, {"experts/kernel": (1,)}, {"experts/kernel": (1, 2)}
    ),
    # The head sees the scale that the norm behind the embeddings does not see.
    "tied": Case(Tied, TOKENS, {"embedding": (1,), "mix/kernel": (0,)}, {}),
    "gru": Case(
        Recurrent, SERIES, {"dense_i/kernel": (0,), "dense_h/kernel": (0,)}, {}
    ),
}


def flat(tree):
    leaves = jax.tree_util.tree_leaves_with_path(
        tree, is_leaf=lambda node: isinstance(node, tuple | str)
    )
    return {
        jax.tree_util.keystr(path, simple=True, separator="/"): leaf
        for path, leaf in leaves
    }


def by_hand(names, table):
    expected = {}
    for name in names:
        ends = [end for end in table if name.endswith(end)]
        expected[name] = table[ends[0]] if ends else "none"
    assert len([axes for axes in expected.values() if axes != "none"]) == len(table)
    return expected


@pytest.mark.parametrize("name", CASES)
def test_unit_axes_by_hand(name):
    case = CASES[name]
    axes = flat(unit_axes(nnx.eval_shape(lambda: case.make(nnx.Rngs(0)))))
    assert axes == by_hand(axes, case.units)


@pytest.mark.slow
@pytest.mark.parametrize("name", CASES)
def test_scale_invariant_axes_by_hand(name):
    case = CASES[name]
    model = case.make(nnx.Rngs(0))
    graphdef, params, rest = nnx.split(model, nnx.Param, ...)

    def loss_fn(params):
        outputs = nnx.merge(graphdef, params, rest, copy=True)(case.inputs)
        # The targets make each output count by itself.
        targets = jnp.sin(jnp.arange(outputs.size)).reshape(outputs.shape)
        return jnp.mean((outputs - targets) ** 2)

    params = nnx.to_pure_dict(params)
    found = normax.scale_invariant_axes(loss_fn, params, key=jax.random.key(0))
    shapes = {name: leaf.shape for name, leaf in flat(params).items()}

    def explicit(name, axes):
        words = {
            "unit": range(len(shapes[name]) - 1),
            "layer": range(len(shapes[name])),
        }
        return tuple(words.get(axes, axes)) if axes != "none" else axes

    measured = {name: explicit(name, axes) for name, axes in flat(found).items()}
    assert measured == by_hand(measured, case.invariant)
