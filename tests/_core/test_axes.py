"""Which entries form one weight vector, and what is said when that is unclear."""

import collections
import dataclasses
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import normax
from normax._core.axes import map_vectors

pytestmark = pytest.mark.few_rows(2)

SHAPES = {
    "dense": (5, 3),
    "conv": (3, 3, 2, 4),
    "conv_1d": (5, 2, 4),
    "stacked": (6, 5, 3),
    "embedding": (7, 4),
    "bias": (3,),
    "scalar": (),
}


@pytest.fixture
def params():
    rng = np.random.default_rng(0)
    return {
        name: jax.device_put(rng.normal(size=shape).astype(jnp.float32))
        for name, shape in SHAPES.items()
    }


def norms(array, axes):
    return np.sqrt(np.sum(np.square(np.asarray(array, np.float64)), axis=axes))


@pytest.mark.parametrize(
    ("axes", "expected"),
    [
        ("unit", dict(dense=0, conv=(0, 1, 2), conv_1d=(0, 1), stacked=(0, 1))),
        ("layer", dict(dense=(0, 1), conv=(0, 1, 2, 3), stacked=(0, 1, 2))),
        ("none", {}),
        (
            dict(dense="layer", conv=(-1, 0), stacked=(1,), embedding=(1,), bias=(0,)),
            dict(dense=(0, 1), conv=(0, 3), stacked=1, embedding=1, bias=0),
        ),
        (dict(dense="unit", bias="layer", scalar="layer"), dict(dense=0, bias=0)),
    ],
)
def test_reduced_axes(params, axes, expected):
    if isinstance(axes, dict):
        axes = {name: axes.get(name, "none") for name in params}
    else:
        params = {k: v for k, v in params.items() if k in (*expected, "bias", "scalar")}
    measured = normax.weight_norm(params, axes)
    for name, array in params.items():
        if name in expected:
            value = norms(array, expected[name])
            assert measured[name].shape == value.shape
            np.testing.assert_allclose(measured[name], value, rtol=1e-6)
        else:
            assert measured[name] is None


def test_word_on_a_subtree_leaves_vectors_alone(params):
    tree = {"block": params, "head": {"kernel": jnp.ones((2, 2))}}
    measured = normax.weight_norm(tree, {"block": "layer", "head": "none"})
    assert measured["block"]["bias"] is None
    assert measured["block"]["dense"].shape == ()
    assert measured["head"]["kernel"] is None


@dataclasses.dataclass
class Layer:
    kernel: Any
    bias: Any


jax.tree_util.register_dataclass(Layer, ["kernel", "bias"], [])
Pair = collections.namedtuple("Pair", ["kernel", "bias"])
KERNEL, BIAS = jnp.arange(6.0).reshape(3, 2), jnp.ones(2)


@pytest.mark.parametrize(
    ("tree", "axes"),
    [
        ([KERNEL, [BIAS]], ["unit", "none"]),
        ((KERNEL, BIAS), ("unit", "none")),
        (Pair(KERNEL, BIAS), Pair((0,), "none")),
        (Layer(KERNEL, BIAS), Layer("unit", "none")),
        (Layer(KERNEL, BIAS), {"kernel": (0,), "bias": "none"}),
        ({"a": {"b": KERNEL}, "c": BIAS}, {"a": "unit", "c": "none"}),
        (KERNEL, (0,)),
        (KERNEL, (-2,)),
    ],
)
def test_pytrees_of_every_kind(tree, axes):
    measured = normax.weight_norm(tree, axes)
    (norm,) = jax.tree.leaves(measured)
    np.testing.assert_allclose(norm, norms(KERNEL, 0), rtol=1e-6)
    projected = normax.projection_unit_norm(tree, axes)
    assert jax.tree.structure(projected) == jax.tree.structure(tree)


@pytest.mark.slow
def test_linen_parameters():
    class Net(nn.Module):
        @nn.compact
        def __call__(self, x):
            return nn.Dense(2)(nn.relu(nn.Conv(4, (3,))(x)))

    variables = Net().init(jax.random.key(0), jnp.ones((1, 5, 3)))
    measured = normax.weight_norm(variables)["params"]
    assert measured["Conv_0"]["kernel"].shape == (4,)
    assert measured["Dense_0"]["bias"] is None


def test_nnx_state():
    model = nnx.Sequential(
        nnx.Linear(3, 4, rngs=nnx.Rngs(0)), nnx.BatchNorm(4, rngs=nnx.Rngs(0))
    )
    state = nnx.state(model, nnx.Param)
    words = {"layers": {0: {"kernel": (0,), "bias": "layer"}, 1: "none"}}
    own = jax.tree.map(lambda w: "unit" if w.ndim == 2 else "none", state)
    for axes in (words, own, nnx.to_pure_dict(own)):
        measured = normax.weight_norm(state, axes)
        np.testing.assert_allclose(
            measured["layers"][0]["kernel"][...],
            norms(model.layers[0].kernel[...], 0),
            rtol=1e-6,
        )
    optimizer = nnx.Optimizer(model, normax.project_unit_norm(own), wrt=nnx.Param)
    optimizer.update(model, jax.tree.map(jnp.zeros_like, state))
    np.testing.assert_allclose(norms(model.layers[0].kernel[...], 0), 1, rtol=3e-7)
    bias = normax.weight_norm(state, words)["layers"][0]["bias"][...]
    assert bias.shape == ()


def test_parts_without_arrays_need_no_axes(params):
    tree = {"a": None, "b": optax.MaskedNode(), "c": {}, "d": params["dense"]}
    axes = {"a": {"kernel": "unit"}, "b": {"kernel": {"x": (1,)}}, "d": "unit"}
    measured = normax.weight_norm(tree, axes)
    assert measured["a"] is None and measured["c"] == {}
    assert measured["d"].shape == (3,)
    assert normax.weight_norm({}) == {} and normax.weight_norm(None) is None
    assert normax.projection_unit_norm((), "layer") == ()


def test_arrays_that_hold_no_weights_are_left_alone():
    tree = {
        "count": jnp.ones((2, 2), jnp.int32),
        "mask": jnp.ones((2, 2), bool),
        "key": jax.random.split(jax.random.key(0), (2, 2)),
        "python": 3.0,
        "half": np.ones((2, 2), np.float16),
    }
    measured = normax.weight_norm(tree)
    assert [name for name, norm in measured.items() if norm is not None] == ["half"]
    projected = normax.projection_unit_norm(tree)
    assert projected["count"] is tree["count"] and projected["key"] is tree["key"]


@pytest.mark.parametrize(
    ("axes", "message"),
    [
        ("units", "must be one of 'unit', 'layer', 'none' or a tuple of ints"),
        (0, r"a single axis is written as a tuple, \(0,\)"),
        ({"kernel": [0]}, r"axes\['kernel'\]\[0\] must be one of"),
        ((2,), r"axes is \(2,\) for params\['bias'\] of shape \(2, 1\)"),
        ((-3,), "whose axes are 0 to 1"),
        ((0, -2), r"name one axis twice"),
        ((), r"leave the array alone with \"none\""),
        ({"kernel": "unit"}, r"no entry for params\['bias'\]"),
        (
            {"kernel": "unit", "bias": "none", "gain": "none"},
            r"the parameters have nothing at \['gain'\]",
        ),
    ],
)
def test_wrong_axes_raise(axes, message):
    params = {"kernel": KERNEL, "bias": jnp.ones((2, 1))}
    for function in (
        lambda: normax.weight_norm(params, axes),
        lambda: normax.projection_unit_norm(params, axes),
        lambda: normax.project_unit_norm(axes).init(params),
        lambda: normax.remove_radial_component(axes).init(params),
        lambda: normax.monitor_weight_dynamics(axes).init(params),
    ):
        with pytest.raises(ValueError, match=message):
            function()


@pytest.mark.parametrize("axes", ["units", 0, {"kernel": [0]}])
def test_malformed_axes_raise_before_init(axes):
    for factory in (
        normax.project_unit_norm,
        normax.remove_radial_component,
        normax.monitor_weight_dynamics,
    ):
        with pytest.raises(ValueError, match="must be one of"):
            factory(axes)


def test_complex_arrays_are_refused():
    params = {"kernel": KERNEL.astype(jnp.complex64)}
    with pytest.raises(ValueError, match=r"must be real, but params.*complex64"):
        normax.weight_norm(params)
    assert normax.weight_norm(params, "none") == {"kernel": None}


def test_functions_may_take_all_arrays_together():
    params = {"a": KERNEL, "b": jnp.ones(3), "c": 2 * KERNEL, "d": KERNEL}
    updates = {**params, "d": None}

    def total(rows):
        whole = sum(float(jnp.sum(w * u)) for _, w, u in rows)
        return [(vector_axes, whole) for vector_axes, _, _ in rows]

    found = map_vectors(total, "unit", params, updates, together=True)
    whole = 5 * float(jnp.sum(KERNEL**2))
    assert found == {"a": ((0,), whole), "b": None, "c": ((0,), whole), "d": None}
