"""Hyperball: its formula in float64, and what went wrong where others trained so."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import orbax.checkpoint as ocp
import pytest
from flax import nnx
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normax

pytestmark = pytest.mark.few_rows(1)

CASES = [
    ("unit", (64, 10), (0,)),
    ("layer", (30, 20), (0, 1)),
    ((2, 3), (2, 3, 5, 4), (2, 3)),
]


def draw(shape, seed=0, scale=1.0, dtype=jnp.float32):
    values = np.random.default_rng(seed).normal(size=shape) * scale
    return jax.device_put(values.astype(dtype))


def norms(x, axes):
    return np.sqrt(np.sum(np.asarray(x, np.float64) ** 2, axis=axes, keepdims=True))


def unit(x, axes):
    norm = norms(x, axes)
    return np.asarray(x, np.float64) / np.where(norm == 0, 1, norm)


def exact(w, u, rate, radius, axes):
    """Return R N(w - rate R N(u)) in float64."""
    stepped = np.asarray(w, np.float64) - rate * radius * unit(u, axes)
    return radius * unit(stepped, axes)


def step(tx, grads, state, params):
    updates, state = tx.update(grads, state, params)
    return optax.apply_updates(params, updates), state


def plain(rate, axes="layer", radius="initial"):
    return normax.hyperball(optax.identity(), rate, axes, radius)


@pytest.mark.parametrize("rate", [1e-3, 0.3, 20.0])
@pytest.mark.parametrize(("axes", "shape", "reduced"), CASES)
def test_one_step_in_float64(axes, shape, reduced, rate):
    w, u = draw(shape), draw(shape, seed=1)
    for radius in ("initial", 2.5):
        tx = plain(rate, axes, radius)
        after, _ = step(tx, u, tx.init(w), w)
        length = norms(w, reduced) if radius == "initial" else radius
        expected = exact(w, u, rate, length, reduced)
        np.testing.assert_allclose(after, expected, rtol=3e-6, atol=1e-6)


@pytest.mark.parametrize("axes, reduced", [("layer", (0, 1)), ("unit", (0,))])
def test_adam_in_float64(axes, reduced):
    w, rate, b1, b2 = draw((20, 6)), 0.05, 0.9, 0.99
    tx = normax.hyperball(optax.scale_by_adam(b1, b2), rate, axes)
    state, theirs, m, r = tx.init(w), np.asarray(w, np.float64), 0.0, 0.0
    radius = norms(w, reduced)
    for t in range(1, 8):
        g = np.asarray(draw((20, 6), seed=t), np.float64)
        w, state = step(tx, jnp.float32(g), state, w)
        m, r = b1 * m + (1 - b1) * g, b2 * r + (1 - b2) * g**2
        u = m / (1 - b1**t) / (np.sqrt(r / (1 - b2**t)) + 1e-8)
        theirs = exact(theirs, u, rate, radius, reduced)
        np.testing.assert_allclose(w, theirs, rtol=2e-5, atol=2e-6)


def test_the_rate_is_a_schedule():
    w, u = draw((8, 5)), draw((8, 5), seed=1)
    schedule = optax.linear_schedule(0.1, 0.4, 3)
    state, after = plain(schedule).init(w), w
    for t in range(4):
        expected = exact(after, u, float(schedule(t)), norms(w, (0, 1)), (0, 1))
        after, state = step(plain(schedule), u, state, after)
        np.testing.assert_allclose(after, expected, rtol=1e-5, atol=1e-6)


def growing(count):
    return {"kernel": 1.0 + 0.5 * count, "bias": None}


@pytest.mark.parametrize("project", [False, True])
def test_the_radius_is_a_schedule(project):
    w, u = {"kernel": draw((8, 5)), "bias": draw(5)}, draw((8, 5), seed=1)
    grads = {"kernel": u, "bias": jnp.zeros(5)}
    tx = plain(0.2, "unit", growing)
    if project:
        tx = optax.chain(optax.sgd(0.2), normax.project_unit_norm(radius=growing))
    update, state = jax.jit(tx.update), tx.init(w)
    assert optax.tree.get(state, "count") == 0
    for t in range(3):
        x, radius = np.asarray(w["kernel"], np.float64), growing(t)["kernel"]
        expected = exact(x, u, 0.2, radius, 0)
        if project:
            expected = radius * unit(x - 0.2 * np.asarray(u, np.float64), 0)
        updates, state = update(grads, state, w)
        w = optax.apply_updates(w, updates)
        np.testing.assert_allclose(w["kernel"], expected, rtol=1e-5, atol=1e-6)
    assert optax.tree.get(state, "count") == 3


@pytest.mark.parametrize(
    ("radius", "message"),
    [
        (lambda count: -1.0 + count, r"radius must be at least 0 .*got -1\.0"),
        (lambda count: "initial", r"radius must be a number.*got 'initial'"),
        (lambda count: jnp.ones(7), "radius must broadcast to one number"),
        ({"kernel": 1.0, "bia": 2.0}, r"radius .*no entry for params\['bias'\]"),
        ("unit", r"radius must be a number, .*\"initial\", got 'unit'"),
    ],
)
def test_a_wrong_radius_raises_at_init(radius, message):
    params = {"kernel": draw((8, 5)), "bias": draw(5)}
    for make in (plain, lambda _, axes, radius: normax.project_unit_norm(axes, radius)):
        with pytest.raises(ValueError, match=message):
            make(0.1, "unit", radius).init(params)


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize("w_scale", [1e-30, 1.0, 1e30])
@pytest.mark.parametrize("u_scale", [1e-30, 1.0, 1e30])
def test_sizes_do_not_matter(w_scale, u_scale):
    for axes, reduced in (("layer", (0, 1)), ("unit", (0,))):
        w, u = draw((30, 20), scale=w_scale), draw((30, 20), 1, u_scale)
        tx = plain(0.1, axes)
        after, _ = step(tx, u, tx.init(w), w)
        expected = exact(w, u, 0.1, norms(w, reduced), reduced)
        np.testing.assert_allclose(after, expected, rtol=3e-6, atol=1e-6 * w_scale)


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize("rate", [0.0, 0.1, 1e10])
@pytest.mark.parametrize("u_scale", [0.0, 1.0])
def test_a_zero_matrix_stays_where_it_is(rate, u_scale):
    """marin-community/marin#9054: a NaN, even at rate 0, spoiled a checkpoint."""
    params = {"zero": jnp.zeros((4, 3)), "other": draw((4, 3))}
    grads = optax.tree.scale(u_scale, {"zero": draw((4, 3)), "other": draw((4, 3), 1)})
    for inner in (optax.identity(), optax.scale_by_adam()):
        tx = normax.hyperball(inner, rate)
        after, state = params, tx.init(params)
        for _ in range(3):
            after, state = step(tx, grads, state, after)
            np.testing.assert_array_equal(after["zero"], 0)
            chex.assert_tree_all_finite((after, state))


@pytest.mark.slow
@pytest.mark.parametrize("axes", ["layer", "unit"])
def test_without_rate_or_direction_weights_stay(axes):
    w, u = draw((16, 6)), draw((16, 6), 1)
    for rate, direction in ((0.0, u), (0.5, 0 * u)):
        tx = plain(rate, axes)
        np.testing.assert_array_equal(step(tx, direction, tx.init(w), w)[0], w)
        tx = plain(rate, axes, 2.0)
        projected = normax.projection_unit_norm(w, axes, radius=2.0)
        after, _ = step(tx, direction, tx.init(w), w)
        np.testing.assert_allclose(after, projected, rtol=1e-6, atol=1e-7)


@pytest.mark.slow
def test_experts_do_not_mix():
    """marin-community/marin#8621, #8749: the norm ran over the experts."""
    shape = layers, experts, *_ = 2, 3, 6, 4
    w, u = (draw(shape, s) * draw((*shape[:2], 1, 1), s + 2) for s in (0, 1))
    tx = plain(0.3, (2, 3))
    after, state = step(tx, u, tx.init(w), w)
    assert optax.tree.get(state, "radius").shape == (layers, experts)
    other = u.at[1, 2].multiply(-7.0).at[0, 0, 0, 0].add(1.0)
    changed = step(tx, other, tx.init(w), w)[0]
    for layer, expert in np.ndindex(layers, experts):
        alone = plain(0.3)
        x, g = w[layer, expert], u[layer, expert]
        expected, _ = step(alone, g, alone.init(x), x)
        np.testing.assert_allclose(after[layer, expert], expected, rtol=2e-6, atol=1e-6)
        same = np.array_equal(after[layer, expert], changed[layer, expert])
        assert same == ((layer, expert) not in {(1, 2), (0, 0)})


class Owner(nnx.Module):
    """A module with a kernel, and an array that no module of Flax owns."""

    def __init__(self):
        rngs = nnx.Rngs(0)
        self.mlp = nnx.Linear(4, 6, rngs=rngs)
        self.embedder_norm_proj = nnx.Linear(6, 3, use_bias=False, rngs=rngs)
        self.table = nnx.Param(jnp.ones((4, 6)))


def left_alone(params, state):
    """Return the names of the matrices that no axes claim."""
    radius = optax.tree.get(state, "radius")
    return [
        jax.tree_util.keystr(path)
        for path, w in jax.tree_util.tree_leaves_with_path(params)
        if w.ndim > 1 and functools.reduce(lambda r, k: r[k.key], path, radius) is None
    ]


@pytest.mark.slow
def test_names_route_nothing_and_what_is_left_alone_shows():
    """marin-community/marin#5644, #5750: substrings of names left out a matrix."""
    model = Owner()
    params, axes = nnx.state(model, nnx.Param), normax.nn.unit_axes(model)
    params = nnx.to_pure_dict(params)
    tx = plain(0.1, axes)
    state = tx.init(params)
    assert left_alone(params, state) == ["['table']"]
    assert left_alone(params, plain(0.1, "layer").init(params)) == []
    after, _ = step(tx, params, state, params)
    renamed = {"lm_head": params["mlp"], "b": params["embedder_norm_proj"]}
    tx = plain(0.1, {"lm_head": axes["mlp"], "b": axes["embedder_norm_proj"]})
    again, _ = step(tx, renamed, tx.init(renamed), renamed)
    chex.assert_trees_all_equal(again["lm_head"], after["mlp"])
    chex.assert_trees_all_equal(again["b"], after["embedder_norm_proj"])


def test_an_array_without_axes_raises():
    params = {"up": draw((4, 6)), "down": draw((6, 4))}
    with pytest.raises(ValueError, match=r"axes .* has no entry for params\['down'\]"):
        plain(0.1, {"up": "layer"}).init(params)
    with pytest.raises(ValueError, match=r"the parameters have nothing at \['dwon'\]"):
        plain(0.1, {"up": "layer", "down": "layer", "dwon": "layer"}).init(params)


def follow(tx, w, steps):
    """Return the weights after each step of a walk, as they are stored."""

    @jax.jit
    def walk(w):
        def one(carry, key):
            w, state = carry
            grads = jax.random.normal(key, w.shape, w.dtype)
            w, state = step(tx, grads, state, w)
            # Of the sum itself XLA would keep digits that bfloat16 has not.
            return (w, state), jax.lax.bitcast_convert_type(w, jnp.uint16)

        keys = jax.random.split(jax.random.key(0), steps)
        return jax.lax.scan(one, (w, tx.init(w)), keys)

    (_, state), history = walk(w)
    return state, np.asarray(history).view(w.dtype).astype(np.float64)


@pytest.mark.slow
@pytest.mark.parametrize("shape", [(64, 64), (128, 32)])
def test_in_bfloat16_the_norm_stays(shape):
    """marin-community/marin#6486: it jumps where R is measured anew each step."""
    w = draw(shape, scale=0.05, dtype=jnp.bfloat16)
    start = norms(w, (0, 1)).item()
    tx = normax.hyperball(optax.scale_by_adam(), 1e-2)
    state, history = follow(tx, w, 1500)
    lengths = np.sqrt((history**2).sum((1, 2)))
    assert np.max(np.abs(lengths / start - 1)) < 7e-4
    radius = optax.tree.get(state, "radius")
    assert radius.dtype == jnp.float32
    # With JAX 0.8.1 a sum of 4,096 squares is off by 1e-6. The radius stays as it was.
    np.testing.assert_allclose(radius, start, rtol=2e-6)
    first = optax.tree.get(jax.jit(tx.init)(w), "radius")
    np.testing.assert_allclose(radius, first, rtol=3e-7)


@pytest.mark.parametrize("dtype", [jnp.float16, jnp.bfloat16])
def test_half_precision_loses_no_step(dtype):
    # An entry of the direction times the rate is below the range of float16.
    w, u = draw((1024, 256), dtype=dtype), draw((1024, 256), 1, 1e-3, dtype)
    tx = plain(1e-5)
    updates, _ = tx.update(u, tx.init(w), w)
    assert updates.dtype == dtype
    moved = np.asarray(updates, np.float64)
    expected = exact(w, u, 1e-5, norms(w, (0, 1)), (0, 1)) - np.asarray(w, np.float64)
    share = np.vdot(moved, expected) / np.vdot(expected, expected)
    assert share == pytest.approx(1, abs=1e-2)


@pytest.mark.devices(4)
@pytest.mark.slow
def test_a_checkpoint_on_another_sharding_keeps_the_radius(tmp_path):
    params = {"kernel": draw((8, 16), dtype=jnp.bfloat16), "stack": draw((4, 8, 4))}
    axes = {"kernel": "layer", "stack": (1, 2)}
    tx = normax.hyperball(optax.scale_by_adam(), 0.1, axes)

    def train(carry, seeds, place):
        for seed in seeds:
            grads = {
                name: place(draw(w.shape, seed, dtype=w.dtype), name)
                for name, w in params.items()
            }
            updates, state = jax.jit(tx.update)(grads, carry[1], carry[0])
            carry = optax.apply_updates(carry[0], updates), state
        return carry

    def placement(shape, specs):
        devices = jax.devices()[: np.prod(shape)]
        mesh = jax.make_mesh(shape, ("x", "y"), (AxisType.Auto,) * 2, devices=devices)
        return lambda x, name: jax.device_put(x, NamedSharding(mesh, specs[name]))

    def placed(tree, place):
        return {name: place(w, name) for name, w in tree.items()}

    first = placement((4, 1), {"kernel": P("x"), "stack": P("x")})
    other = placement((2, 2), {"kernel": P("y", "x"), "stack": P(None, "y", "x")})
    start = placed(params, first)
    params_then, state_then = train((start, tx.init(start)), range(1, 6), first)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(tmp_path / "run", (params_then, state_then))
        checkpointer.wait_until_finished()
        blank = placed(params, other)
        shapes = jax.tree.map(
            lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=x.sharding),
            (blank, jax.jit(tx.init)(blank)),
        )
        carry = checkpointer.restore(tmp_path / "run", shapes)
    restored = optax.tree.get(carry[1], "radius")
    # The norm of what was stored is another number: an `init` anew would take it.
    kept = normax.weight_norm(params, axes)
    chex.assert_trees_all_close(jax.device_get(restored), kept, rtol=2e-7)
    assert restored["kernel"] != normax.weight_norm(carry[0], axes)["kernel"]
    there = train(carry, range(6, 9), other)
    here = train((params_then, state_then), range(6, 9), first)
    radii = (optax.tree.get(state, "radius") for _, state in (there, here))
    chex.assert_trees_all_equal(*map(jax.device_get, radii))
    for name, reduced in (("kernel", (0, 1)), ("stack", (1, 2))):
        rtol = 2e-3 if name == "kernel" else 3e-7
        np.testing.assert_allclose(
            norms(there[0][name], reduced), norms(params[name], reduced), rtol=rtol
        )


def test_what_is_left_alone_takes_the_plain_step():
    params = {"kernel": draw((8, 5)), "bias": draw(5), "scale": draw((2, 5))}
    grads = {"kernel": draw((8, 5), 1), "bias": draw(5, 1), "scale": draw((2, 5), 1)}
    axes = {"kernel": "layer", "bias": "none", "scale": "none"}
    tx = plain(0.1, axes)
    updates, _ = tx.update(grads, tx.init(params), params)
    for name in ("bias", "scale"):
        np.testing.assert_allclose(updates[name], -0.1 * grads[name], rtol=1e-6)


def test_partition_gives_the_rest_another_rule():
    params = {"kernel": draw((8, 5)), "bias": draw(5)}
    grads = {"kernel": draw((8, 5), 1), "bias": draw(5, 1)}
    rules = {"ball": plain(0.1), "rest": optax.adamw(1e-3)}
    tx = optax.partition(rules, {"kernel": "ball", "bias": "rest"})
    after, _ = step(tx, grads, tx.init(params), params)
    ball = plain(0.1)
    expected, _ = step(
        ball, grads["kernel"], ball.init(params["kernel"]), params["kernel"]
    )
    np.testing.assert_allclose(after["kernel"], expected, rtol=1e-6)
    adam = optax.adamw(1e-3)
    expected, _ = step(adam, grads["bias"], adam.init(params["bias"]), params["bias"])
    np.testing.assert_allclose(after["bias"], expected, rtol=1e-6)


def test_what_is_no_transformation_raises():
    for inner in (0.1, optax.scale_by_adam, None):
        with pytest.raises(TypeError, match="must be a gradient transformation of opt"):
            normax.hyperball(inner, 0.1)
