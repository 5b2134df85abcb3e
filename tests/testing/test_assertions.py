"""Assertions about weight vectors: they pass what is right and name what is wrong."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normax

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(1)]
INPUTS = np.random.default_rng(7).normal(size=(16, 5)).astype(np.float32)
AXES = {"dense": {"kernel": "unit", "bias": "none"}, "head": "none"}


def draw(dtype=jnp.float32):
    rng = np.random.default_rng(0)
    shapes = {"dense": {"kernel": (5, 4), "bias": (4,)}, "head": (4, 3)}
    return jax.tree.map(
        lambda shape: jax.device_put(rng.normal(size=shape).astype(dtype)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


@functools.partial(jax.jit, static_argnames="statistics")
def network(params, statistics=0, epsilon=1e-5):
    """Batch norm for statistics over axis 0, layer norm over axis 1."""
    z = INPUTS.astype(params["head"].dtype) @ params["dense"]["kernel"]
    z = z + params["dense"]["bias"][None] if statistics == 0 else z
    z = z - jnp.mean(z, statistics, keepdims=True)
    z = z / jnp.sqrt(jnp.mean(z**2, statistics, keepdims=True) + epsilon)
    return jax.nn.relu(z) @ params["head"]


@jax.jit
def layer_network(params):
    return network(params, statistics=1)


@jax.jit
def loss(params):
    return jnp.mean(jnp.sin(network(params)) ** 2)


@jax.jit
def layer_loss(params):
    return jnp.mean(jnp.sin(layer_network(params)) ** 2)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64])
def test_projected_weights_have_unit_norm(dtype):
    with jax.enable_x64(dtype == jnp.float64):
        params = draw(dtype) | {"none": None, "count": jnp.ones((2, 2), jnp.int32)}
        for axes in ("unit", "layer"):
            projected = normax.projection_unit_norm(params, axes, radius=0.3)
            normax.testing.assert_unit_norm(projected, axes, radius=0.3)
            scaled = jax.tree.map(lambda w: (1.02 * w).astype(w.dtype), projected)
            with pytest.raises(AssertionError, match=r"params\['dense'\]\['kernel'\]"):
                normax.testing.assert_unit_norm(scaled, axes, radius=0.3)


def test_unit_norm_message_and_tolerance():
    w = {"a": jnp.array([[0.6, 3.0], [0.8, 4.0]]), "b": jnp.eye(2)}
    message = (
        r"(?s)assert_unit_norm: every weight vector.*params\['a'\]: 1 of 2 values.*"
        r"at \(1,\), is 5.0 instead of 1.0 .*measured: \[1. 5.\].*\[in training\]"
    )
    with pytest.raises(AssertionError, match=message):
        normax.testing.assert_unit_norm(w, custom_message="in training")
    normax.testing.assert_unit_norm(w, radius={"a": jnp.array([1.0, 5.0]), "b": 1.0})
    normax.testing.assert_unit_norm(
        w["a"] * 1.00001, radius=jnp.array([1.0, 5.0]), rtol=1e-4
    )
    normax.testing.assert_unit_norm(w["b"] * 1.00001, atol=1e-4)
    for wrong in (w["b"] * 1.00001, w["b"].at[0, 0].set(jnp.nan), 0 * w["b"]):
        with pytest.raises(AssertionError, match="params"):
            normax.testing.assert_unit_norm(wrong)
    # Every vector is held to its own radius, however different the others'.
    radii = jnp.array([1e-6, 1.0])
    with pytest.raises(AssertionError, match="1 of 2"):
        normax.testing.assert_unit_norm(
            jnp.eye(2) * jnp.array([[2e-6, 1.0]]), radius=radii
        )


@pytest.mark.slow
def test_scale_invariant_networks():
    normax.testing.assert_scale_invariant(network, draw(), AXES)
    layer = {"dense": {"kernel": "layer", "bias": "none"}, "head": "none"}
    normax.testing.assert_scale_invariant(layer_network, draw(), layer)
    for check, fn in (
        (normax.testing.assert_scale_invariant, layer_network),
        (normax.testing.assert_inverse_gradient_scaling, layer_loss),
        (normax.testing.assert_orthogonal_gradient, layer_loss),
    ):
        with pytest.raises(AssertionError, match=r"params\['dense'\]\['kernel'\]"):
            check(fn, draw(), AXES)


ABOUT_A_LOSS = [
    normax.testing.assert_scale_invariant,
    normax.testing.assert_inverse_gradient_scaling,
    normax.testing.assert_orthogonal_gradient,
]


@pytest.mark.parametrize("check", ABOUT_A_LOSS)
def test_loss_of_batch_norm(check):
    check(loss, draw(), AXES)
    check(
        loss,
        draw() | {"unused": jnp.ones((2, 2)), "none": None},
        {**AXES, "unused": "unit"},
    )
    everything = AXES | {"head": "unit"}
    with pytest.raises(AssertionError) as error:
        check(loss, draw(), everything, custom_message="as it should be")
    message = str(error.value)
    assert check.__name__ in message and "[as it should be]" in message
    assert "params['head']" in message and "['dense']" not in message
    check(loss, draw(), everything, rtol=1e3)
    with pytest.raises(AssertionError, match="nan"):
        check(lambda params: jnp.nan * loss(params), draw(), AXES)


@pytest.mark.parametrize("check", ABOUT_A_LOSS)
def test_large_epsilon_is_seen(check):
    with pytest.raises(AssertionError, match="kernel"):
        check(lambda params: jnp.mean(network(params, epsilon=0.3) ** 4), draw(), AXES)


@jax.jit
def scaled_loss(params):
    return params["size"] * loss(params)


@pytest.mark.parametrize("check", ABOUT_A_LOSS)
def test_the_size_of_the_loss_does_not_count(check):
    for size in (1e-12, 1e-3, 1e6):
        params = draw() | {"size": jnp.array(size)}
        check(scaled_loss, params, AXES | {"size": "none"})
        with pytest.raises(AssertionError, match="head"):
            check(scaled_loss, params, AXES | {"head": "layer", "size": "none"})


@pytest.mark.parametrize("check", ABOUT_A_LOSS)
def test_rounding_is_no_gradient(check):
    # The bias in front of batch norm has a gradient of nothing but rounding.
    check(loss, draw(), {"dense": {"kernel": "unit", "bias": "layer"}, "head": "none"})


@pytest.mark.parametrize(
    ("fn", "axes"),
    [
        (lambda w: jnp.prod(jnp.linalg.norm(w, axis=0)), "unit"),
        (lambda w: w[0, 0] / w[0, 1], "unit"),
        (lambda w: jnp.linalg.norm(w[:, 0]) / jnp.linalg.norm(w[:, 1]), "unit"),
        (lambda w: jnp.minimum(jnp.linalg.norm(w), 1.0), "layer"),
        (lambda w: jnp.maximum(jnp.linalg.norm(w), 2.0), "layer"),
        (lambda w: w / jnp.linalg.norm(w, axis=0, keepdims=True), (1,)),
        (lambda w: w / jnp.linalg.norm(w), "unit"),
    ],
)
def test_functions_that_come_close_to_invariance(fn, axes):
    w = draw()["dense"]["kernel"]
    with pytest.raises(AssertionError, match="assert_scale_invariant"):
        normax.testing.assert_scale_invariant(fn, 1.5 * w / jnp.linalg.norm(w), axes)


@pytest.mark.slow
@pytest.mark.parametrize("check", ABOUT_A_LOSS[:2])
def test_no_two_vectors_are_rescaled_alike(check):
    # Layer norm over every other unit, every third, or blocks: what the units of a
    # group have in common does not count.
    x, w = np.random.default_rng(1).normal(size=(16, 5)), jnp.eye(5, 24) + 0.1
    for shape, axis in (((16, 12, 2), 1), ((16, 8, 3), 1), ((16, 6, 4), 2)):

        def grouped(w, shape=shape, axis=axis):
            z = (x @ w).reshape(shape)
            z = (z - z.mean(axis, keepdims=True)) / z.std(axis, keepdims=True)
            return jnp.sum(jnp.sin(z) ** 3)

        with pytest.raises(AssertionError, match=check.__name__):
            check(grouped, w, "unit")
    for i, j in itertools.combinations(range(0, 24, 3), 2):
        with pytest.raises(AssertionError, match=check.__name__):
            check(lambda w, i=i, j=j: w[0, i] / jnp.linalg.norm(w[:, j]), w, "unit")


def test_one_array_at_a_time():
    def product(params):
        return params["a"] @ params["b"]

    params = {"a": jnp.ones((2, 3)), "b": jnp.ones((3, 2))}
    with pytest.raises(AssertionError, match=r"(?s)\['a'\].*and 3 more.*\['b'\]"):
        normax.testing.assert_scale_invariant(product, params, "layer")


def test_outputs_in_bfloat16():
    def fn(w):
        norm = jnp.sqrt(jnp.sum(w * w, axis=0, keepdims=True))
        return {"y": jnp.asarray(INPUTS, w.dtype) @ (w / norm)}

    kernel = draw(jnp.bfloat16)["dense"]["kernel"]
    normax.testing.assert_scale_invariant(fn, kernel, rtol=1e-6)
    with pytest.raises(AssertionError, match=r"outputs\['y'\] for params"):
        normax.testing.assert_scale_invariant(fn, kernel, (1,))


@pytest.mark.slow
def test_nnx_state():
    model = nnx.Sequential(
        nnx.Linear(5, 4, rngs=nnx.Rngs(0)), nnx.LayerNorm(4, rngs=nnx.Rngs(1))
    )
    graph, params = nnx.split(model, nnx.Param)

    def fn(params):
        return nnx.merge(graph, params)(INPUTS)

    def squares(params):
        return jnp.mean(fn(params) ** 4)

    def axes(word):
        return {"layers": {0: {"kernel": word, "bias": "none"}, 1: "none"}}

    for check, f in zip(ABOUT_A_LOSS, (fn, squares, squares), strict=True):
        check(f, params, axes("layer"))
        with pytest.raises(AssertionError, match="kernel"):
            check(f, params, axes("unit"))


def test_integer_parameters_are_no_weights():
    def fn(params):
        return jnp.sum(
            jnp.sin(params["w"] / jnp.linalg.norm(params["w"])) * params["n"]
        )

    params = {"w": jnp.arange(1.0, 5.0).reshape(2, 2), "n": jnp.array(3)}
    for check in ABOUT_A_LOSS:
        check(fn, params, "layer")


def test_wrong_axes_raise():
    for check in ABOUT_A_LOSS:
        with pytest.raises(ValueError, match="axes"):
            check(loss, draw(), (7,))


def test_under_jit():
    def checks(params):
        normax.testing.assert_unit_norm(params, AXES, custom_message="norms")
        for check in ABOUT_A_LOSS:
            check(loss, params, AXES | {"head": "none"})
        return params

    good = normax.projection_unit_norm(draw(), AXES)
    with pytest.raises(RuntimeError, match=r"chex\.chexify"):
        jax.jit(checks)(good)
    checked = chex.chexify(jax.jit(checks), async_check=False)
    checked(good)
    with pytest.raises(AssertionError, match=r"(?s)params\['dense'\].*norms"):
        checked(draw())
