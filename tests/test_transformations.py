"""What every transformation promises: one table, one test for each promise.

A new transformation is a new row of `ROWS`.
"""

import dataclasses
import functools
from typing import Any

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx
from flax.training import train_state
from jax.sharding import AxisType, NamedSharding
from jax.sharding import PartitionSpec as P

import normax

pytestmark = pytest.mark.usefixtures("quick_compilation")


@dataclasses.dataclass(frozen=True)
class Row:
    """A public transformation and the arguments that the tests make it with."""

    name: str
    factory: Any
    kwargs: dict[str, Any] = dataclasses.field(default_factory=dict)
    coupled: bool = False  # whether the update of an array depends on the others
    network: bool = False  # whether the arrays are layers, and none may be masked
    static: tuple[str, ...] = ()  # keywords that optax takes as Python numbers alone

    @property
    def whole(self):
        """Whether what one entry gets depends on all entries of its array."""
        return self.kwargs.get("axes") == "layer" or self.name in ("muon", "adafactor")

    def draw(self, seed=0, dtype=jnp.float32):
        return draw(seed, dtype, LAYERS if self.network else ARRAYS)

    def make_anew(self) -> optax.GradientTransformationExtraArgs:
        return self.factory(**self.kwargs)

    def make(self) -> optax.GradientTransformationExtraArgs:
        # Operation by operation the tests would take several times as long.
        return self._compiled

    @functools.cached_property
    def _compiled(self) -> optax.GradientTransformationExtraArgs:
        tx = self.make_anew()
        return optax.GradientTransformationExtraArgs(tx.init, jax.jit(tx.update))


def curved(params):
    """A loss with no coupling between entries, for what needs one to be made with."""
    return sum(jnp.sum(jnp.cosh(w)) for w in jax.tree.leaves(params))


def given_a_loss(factory):
    """Make the transformations of `factory` with `value_fn` given."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        tx = factory(*args, **kwargs)

        def update(updates, state, params=None, **extra_args):
            return tx.update(updates, state, params, value_fn=curved, **extra_args)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


def given_its_loss(factory):
    """As `given_a_loss`, of a loss that has the gradient, for what evaluates it."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        tx = factory(*args, **kwargs)

        @jax.jit
        def compiled(updates, state, params, extra_args):
            def value_fn(w):
                moved = jax.tree.map(jnp.subtract, w, params)
                linear = jax.tree.map(
                    lambda x, g: 0.0 if g is None else jnp.sum(x * g), moved, updates
                )
                quadratic = jax.tree.map(lambda x: x.ndim * jnp.sum(x**2) / 2, moved)
                return sum(jax.tree.leaves((linear, quadratic)))

            return tx.update(updates, state, params, value_fn=value_fn, **extra_args)

        def update(updates, state, params=None, **extra_args):
            return compiled(updates, state, params, extra_args)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


def given_gradients(factory):
    """Make the transformations of `factory`, which get the updates as `grad` too."""

    @functools.wraps(factory)
    def make(*args, **kwargs):
        tx = factory(*args, **kwargs | {"gradient_blocks": 2})

        def update(updates, state, params=None, **extra_args):
            return tx.update(updates, state, params, grad=updates, **extra_args)

        return optax.GradientTransformationExtraArgs(tx.init, update)

    return make


ARRAYS = {"dense": {"kernel": (8, 6), "bias": (6,)}, "conv": (3, 3, 2, 8)}
LAYERS = ARRAYS | {"conv": (6, 8)}


def network(params, x):
    """The plain stack that has `LAYERS` as parameters."""
    dense = params["dense"]
    x = x.astype(dense["bias"].dtype)
    return jax.nn.relu(x @ params["conv"]) @ dense["kernel"] + dense["bias"]


def all_but_images(params):
    """A mask as a function of the parameters."""
    return jax.tree.map(lambda w: np.ndim(w) < 4, params)


SECOND_ORDER = {"newton": given_a_loss, "hessian_free": given_its_loss}
ROWS = [
    Row("project_unit_norm", normax.project_unit_norm),
    Row("project_unit_norm_radius", normax.project_unit_norm, {"radius": 0.5}),
    Row("project_unit_norm_initial", normax.project_unit_norm, {"radius": "initial"}),
    Row(
        "project_unit_norm_schedule",
        normax.project_unit_norm,
        {"radius": optax.linear_schedule(1.0, 2.0, 10)},
    ),
    Row("project_unit_norm_layer", normax.project_unit_norm, {"axes": "layer"}),
    Row("remove_radial_component", normax.remove_radial_component),
    Row("monitor_weight_dynamics", normax.monitor_weight_dynamics),
    Row("monitor_weight_dynamics_ema", normax.monitor_weight_dynamics, {"decay": 0.9}),
    Row("monitor_weight_dynamics_every", normax.monitor_weight_dynamics, {"every": 2}),
    Row(
        "monitor_weight_dynamics_gradients",
        given_gradients(normax.monitor_weight_dynamics),
        {"every": 2},
    ),
    Row(
        "monitor_optimizer",
        normax.spheres.monitor_optimizer,
        dict(optimizer=normax.remove_radial_component(), every=2),
    ),
    Row(
        "normalized_sgd_momentum",
        normax.normalized_sgd,
        dict(learning_rate=0.1, weight_decay=0.01, momentum=0.9),
    ),
    Row("rotate_by_angle", normax.rotate_by_angle, dict(angle=0.1, decay=0.9)),
    Row(
        "rotational_adamw",
        normax.rotational_adamw,
        dict(learning_rate=0.1, weight_decay=0.1),
    ),
    Row(
        "rotational_sgd_mask",
        normax.rotational_sgd,
        dict(learning_rate=0.1, weight_decay=0.1, mask=all_but_images),
    ),
    Row(
        "hyperball",
        normax.hyperball,
        dict(inner=optax.scale_by_adam(), learning_rate=0.1, axes="unit"),
    ),
    Row(
        "hyperball_layer",
        normax.hyperball,
        dict(inner=optax.scale_by_lion(), learning_rate=0.1, axes="layer", radius=2.0),
    ),
    Row("sgdp", normax.sgdp, dict(learning_rate=0.1, momentum=0.9, weight_decay=0.01)),
    Row("adamp", normax.adamp, dict(learning_rate=0.1, nesterov=True, axes="unit")),
    *(
        Row(
            name,
            SECOND_ORDER.get(name, lambda make: make)(rule.make),
            dict(learning_rate=0.1, weight_decay=0.01),
            coupled=name in SECOND_ORDER,
            static=("min_dim_size_to_factor",) if name == "adafactor" else (),
        )
        for name, rule in normax.UPDATE_RULES.items()
    ),
    Row("path_sgd", normax.scale_by_path_sgd, coupled=True, network=True),
    Row(
        "path_sgd_forward",
        normax.scale_by_path_sgd,
        dict(forward=network, inputs=np.ones(6, np.float32), update_every=2),
        coupled=True,
        network=True,
    ),
]


# By default each promise is tested on these, which differ most; in CI on all rows.
DIFFERENT = {
    "project_unit_norm",
    "monitor_weight_dynamics_ema",
    "rotate_by_angle",
    "hyperball",
    "adamp",
    "adamw",
    "path_sgd_forward",
}
# What is compiled whole, training loops for instance, by default on these.
WHOLE = DIFFERENT - {"rotate_by_angle", "hyperball", "adamw"}
# The rules are one chain with different links: two stand for all.
ALIKE = {"sgd", "momentum", "adagrad", "rmsprop", "adadelta", "adam"}


def rows(some, by_default):
    """Parametrize a test by rows, some of them only where slow tests run."""
    params = [
        pytest.param(
            row, id=row.name, marks=[pytest.mark.slow] * (row.name not in by_default)
        )
        for row in some
    ]
    return pytest.mark.parametrize("row", params)


UNLIKE = [row for row in ROWS if row.name not in ALIKE]
every_row = rows(ROWS, DIFFERENT)
few_rows = rows(UNLIKE, WHOLE)
DTYPES = [jnp.float16, jnp.bfloat16, jnp.float32, jnp.float64]


def draw(seed=0, dtype=jnp.float32, shapes=ARRAYS):
    rng = np.random.default_rng(seed)
    return jax.tree.map(
        lambda shape: jax.device_put(rng.normal(size=shape).astype(dtype)),
        shapes,
        is_leaf=lambda node: isinstance(node, tuple),
    )


def run(tx, params, steps=3, **extra):
    state = tx.init(params)
    for seed in range(steps):
        shapes = jax.tree.map(jnp.shape, params)
        grads = jax.tree.map(
            lambda g, w: g.astype(w.dtype), draw(seed + 1, shapes=shapes), params
        )
        updates, state = tx.update(grads, state, params, **extra)
        params = optax.apply_updates(params, updates)
    return params, state


def typeof(tree):
    return jax.tree.map(jax.typeof, tree)


@every_row
def test_extra_arguments_are_ignored(row):
    # Those that take longest to trace are compiled here too.
    tx, params = row.make() if row.coupled else row.make_anew(), row.draw()
    assert isinstance(tx, optax.GradientTransformationExtraArgs)
    chex.assert_trees_all_equal(run(tx, params), run(tx, params, value=1.0, unknown=2))


@every_row
def test_state_has_one_type(row):
    tx, params = row.make(), row.draw()
    state = tx.init(params)
    assert isinstance(state, tuple)
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))
    assert typeof(state) == typeof(run(tx, params)[1])
    assert typeof(jax.eval_shape(tx.init, params)) == typeof(state)
    square = lambda state: jax.tree.map(lambda x: x * x, state)  # noqa: E731
    jax.jit(square, donate_argnums=0)(state)  # raises if one buffer stands twice


@every_row
def test_scan_and_cond(row):
    tx, params = row.make(), row.draw()

    def step(carry, grads):
        params, state = carry
        updates, new_state = tx.update(grads, state, params)
        state = jax.lax.cond(True, lambda: new_state, lambda: state)
        return (optax.apply_updates(params, updates), state), None

    grads = jax.tree.map(
        lambda *xs: jnp.stack(xs), *(row.draw(seed + 1) for seed in range(3))
    )
    (scanned, state), _ = jax.lax.scan(step, (params, tx.init(params)), grads)
    expected = run(tx, params)
    chex.assert_trees_all_close((scanned, state), expected, rtol=2e-5, atol=1e-6)


@every_row
def test_missing_params_raise(row):
    tx, params = row.make(), row.draw()
    name = row.factory.__name__ if row.factory.__name__ != "make" else row.name
    for wrapped in (tx, optax.chain(tx)):
        with pytest.raises(ValueError, match=f"normax.*{name}.*`params` is None"):
            wrapped.update(row.draw(1), wrapped.init(params))


@every_row
def test_jit_compiles_once(row):
    tx, params = row.make_anew(), row.draw()
    step = jax.jit(chex.assert_max_traces(tx.update, n=1))
    state = jax.jit(tx.init)(params)
    for seed in range(3):
        _, state = step(row.draw(seed), state, params)
    chex.clear_trace_counter()


@few_rows
def test_vmap_over_runs(row):
    tx, runs = row.make(), [row.draw(seed) for seed in (10, 20, 30)]
    params = jax.tree.map(lambda *xs: jnp.stack(xs), *runs)
    state = jax.vmap(tx.init)(params)
    update = jax.jit(jax.vmap(tx.update, in_axes=(None, 0, 0)))
    for seed in range(3):
        updates, state = update(row.draw(seed + 1), state, params)
        params = optax.apply_updates(params, updates)
    for index, start in enumerate(runs):
        one = jax.tree.map(lambda x, index=index: x[index], (params, state))
        # Iterations of Newton and Schulz enlarge rounding.
        atol = 2e-5 if row.name == "muon" else 1e-6
        chex.assert_trees_all_close(one, run(tx, start), rtol=2e-5, atol=atol)


@functools.cache
def gradient_through_update(tx):
    """Return the compiled gradient, by parameters and gradients, of what comes out."""

    def loss(params, grads):
        updates, state = tx.update(grads, tx.init(params), params)
        after = optax.apply_updates(params, updates)
        floats = [x for x in jax.tree.leaves(state) if jnp.issubdtype(x.dtype, float)]
        return optax.tree.sum(jax.tree.map(jnp.sin, (after, floats)))

    return jax.jit(jax.grad(loss, argnums=(0, 1)))


@few_rows
@pytest.mark.parametrize("scale", [0.0, 1.0])
def test_gradient_through_update_is_finite(row, scale):
    params = optax.tree.scale(scale, row.draw())
    for gradient in gradient_through_update(row.make())(params, row.draw(1)):
        chex.assert_tree_all_finite(gradient)


@every_row
@pytest.mark.parametrize(
    "mask",
    [
        {"dense": {"kernel": True, "bias": False}, "conv": False},
        {"dense": False, "conv": True},
        lambda params: jax.tree.map(lambda w: w.ndim == 4, params),
    ],
)
def test_masked(row, mask):
    params = row.draw()
    tree = mask(params) if callable(mask) else mask
    tree = jax.tree.map(
        lambda keep, sub: jax.tree.map(lambda _: keep, sub), tree, params
    )
    if row.network:
        with pytest.raises(
            ValueError, match=r"whole network.*outside of optax\.masked"
        ):
            optax.masked(row.make(), mask).init(params)
        return
    after, _ = run(optax.masked(row.make(), mask), params)
    applied, _ = run(row.make(), params)
    plain, _ = run(optax.identity(), params)
    expected = jax.tree.map(lambda keep, a, b: a if keep else b, tree, applied, plain)
    chex.assert_trees_all_close(after, expected, rtol=1e-5, atol=1e-6)


def test_masked_with_axes_of_the_whole_tree():
    axes = {"dense": {"kernel": (1,), "bias": "none"}, "conv": "layer"}
    tx = optax.masked(normax.project_unit_norm(axes), {"dense": False, "conv": True})
    after, _ = run(tx, draw())
    normax.testing.assert_unit_norm(after["conv"], "layer")


@every_row
def test_partition_and_named_chain(row):
    params = row.draw()
    labels = {"dense": "ours", "conv": "theirs"}
    tx = optax.partition({"ours": row.make(), "theirs": optax.set_to_zero()}, labels)
    if row.network:
        with pytest.raises(ValueError, match=r"whole network.*optax\.partition"):
            tx.init(params)
    else:
        after, _ = run(tx, params)
        expected, _ = run(row.make(), params)
        chex.assert_trees_all_equal(after["conv"], params["conv"])
        chex.assert_trees_all_close(
            after["dense"], expected["dense"], rtol=1e-5, atol=1e-6
        )
    named = optax.named_chain(("rate", optax.scale(-0.1)), ("ours", row.make()))
    chained = optax.chain(optax.scale(-0.1), row.make())
    chex.assert_trees_all_equal(run(named, params)[0], run(chained, params)[0])


@pytest.mark.slow
@few_rows
def test_multi_steps_and_apply_if_finite(row):
    params = row.draw()
    every_two = optax.MultiSteps(
        row.make(), every_k_schedule=2
    ).gradient_transformation()
    state = every_two.init(params)
    updates, state = every_two.update(row.draw(1), state, params)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    updates, state = every_two.update(row.draw(2), state, params)
    mean = jax.tree.map(lambda a, b: (a + b) / 2, row.draw(1), row.draw(2))
    expected, _ = row.make().update(mean, row.make().init(params), params)
    chex.assert_trees_all_close(updates, expected, rtol=1e-5, atol=1e-6)

    tx = optax.apply_if_finite(row.make(), max_consecutive_errors=3)
    bad = jax.tree.map(lambda g: g.at[0].set(jnp.nan), row.draw(1))
    state = tx.init(params)
    updates, skipped = tx.update(bad, state, params)
    chex.assert_trees_all_equal(updates, optax.tree.zeros_like(params))
    chex.assert_trees_all_equal(skipped.inner_state, state.inner_state)


@pytest.mark.slow
@every_row
def test_inject_hyperparams(row):
    params = row.draw()
    static = [name for name, value in row.kwargs.items() if callable(value)]
    static += row.static
    injected = optax.inject_hyperparams(row.factory, static)(**row.kwargs)
    after, state = jax.jit(functools.partial(run, injected))(params)
    chex.assert_trees_all_close(after, run(row.make(), params)[0], rtol=1e-4, atol=1e-5)
    numbers = {k for k, v in row.kwargs.items() if isinstance(v, float)}
    assert numbers <= set(state.hyperparams)
    tuples = optax.inject_hyperparams(normax.project_unit_norm)(axes=(0,))
    kernel = {"kernel": row.draw()["dense"]["kernel"]}
    assert tuples.init(kernel).hyperparams["radius"] == 1.0


@every_row
def test_map_params(row):
    tx, params = row.make(), row.draw()
    state = tx.init(params)
    mapped = optax.tree.map_params(tx, lambda x: x + 1, state)
    chex.assert_trees_all_equal_structs(mapped, state)
    assert optax.tree.get(mapped, "nonexistent") is None
    leaves = jax.tree_util.tree_leaves_with_path(state)
    changed = [
        not np.array_equal(a, b)
        for a, (path, b) in zip(jax.tree.leaves(mapped), leaves, strict=True)
        # Scalars belong to no parameter, and neither do the coefficients of Muon.
        if a.ndim and "ns_coeffs" not in jax.tree_util.keystr(path)
    ]
    assert all(changed)


@every_row
def test_trees_without_weights(row):
    tx = row.make()
    for empty in ({}, (), [], {"a": None}):
        updates, _ = tx.update(empty, tx.init(empty), empty)
        assert updates == empty
    params, grads = row.draw() | {"frozen": None}, row.draw(1) | {"frozen": None}
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = tx.update(row.draw(1), tx.init(row.draw()), row.draw())
    assert updates["frozen"] is None
    chex.assert_trees_all_close(updates | {"frozen": None}, expected | {"frozen": None})


# What contains an optax rule handles dtypes as that rule does.
our_rows = rows(
    (row for row in ROWS if "learning_rate" not in row.kwargs),
    DIFFERENT - {"hyperball"},
)


@every_row
def test_complex_parameters_are_refused(row):
    with pytest.raises(ValueError, match="must be real"):
        row.make().init({"kernel": jnp.ones((3, 2), jnp.complex64)})


@few_rows
def test_arrays_without_entries(row):
    if row.name == "muon":
        pytest.skip("optax divides by the number of rows")
    tx, empty = row.make(), {"a": jnp.ones((3, 0)), "b": jnp.ones((0, 2))}
    params, grads = row.draw() | empty, row.draw(1) | empty
    updates, _ = tx.update(grads, tx.init(params), params)
    expected, _ = tx.update(row.draw(1), tx.init(row.draw()), row.draw())
    for name in expected:
        chex.assert_trees_all_close(updates[name], expected[name], rtol=1e-5, atol=1e-6)
    assert updates["a"].shape == (3, 0)


@our_rows
def test_leaves_that_are_no_weights(row):
    tx = row.make_anew()
    params = row.draw() | {"count": jnp.ones((2, 3), jnp.int32), "number": 2.0}
    if row.network and "forward" not in row.kwargs:
        pytest.skip("a number is no layer of a stack")
    grads = row.draw(1) | {"count": np.zeros((2, 3), jax.dtypes.float0), "number": 0.5}
    updates, state = tx.update(grads, tx.init(params), params)
    assert updates["count"] is grads["count"]
    assert updates["number"] == (0.0 if row.network else 0.5)  # 0: on no path
    updates, _ = tx.update(grads | {"conv": None}, state, params)
    assert updates["conv"] is None


@few_rows
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_dtypes_are_kept(row, dtype):
    with jax.enable_x64(dtype == jnp.float64):
        tx, params = row.make_anew(), row.draw(dtype=dtype)
        state = jax.eval_shape(tx.init, params)
        updates, new_state = jax.eval_shape(tx.update, params, state, params)
        assert {leaf.dtype for leaf in jax.tree.leaves(updates)} == {np.dtype(dtype)}
        assert new_state == state


@our_rows
@pytest.mark.parametrize("dtype", DTYPES, ids=lambda dtype: dtype.__name__)
def test_no_implicit_promotion(row, dtype):
    with jax.enable_x64(dtype == jnp.float64), jax.numpy_dtype_promotion("strict"):
        tx, params = row.make_anew(), row.draw(dtype=dtype)
        state = jax.eval_shape(tx.init, params)
        jax.eval_shape(tx.update, params, state, params)


@pytest.mark.devices(4)
@few_rows
@pytest.mark.parametrize(
    "axis_type, spec",
    [
        (AxisType.Explicit, P("x", "y")),
        pytest.param(AxisType.Explicit, P(None, "x"), marks=pytest.mark.slow),
        pytest.param(AxisType.Auto, P("x", "y"), marks=pytest.mark.slow),
    ],
)
def test_sharding(row, axis_type, spec):
    mesh = jax.make_mesh(
        (2, 2), ("x", "y"), (axis_type,) * 2, devices=jax.devices()[:4]
    )
    if row.name == "muon" and axis_type == AxisType.Explicit:
        pytest.skip("optax does not say how its products of matrices are sharded")
    tx, params, grads = row.make(), row.draw(), row.draw(1)

    def place(tree):
        conv = P(*[None] * (tree["conv"].ndim - 2), *spec)
        specs = {"dense": {"kernel": spec, "bias": P()}, "conv": conv}
        return jax.device_put(
            tree, jax.tree.map(lambda s: NamedSharding(mesh, s), specs)
        )

    expected = tx.update(grads, tx.init(params), params)
    with jax.set_mesh(mesh):
        sharded = place(params)
        state = jax.jit(tx.init)(sharded)
        updates, new_state = jax.jit(tx.update)(place(grads), state, sharded)
        assert typeof(new_state) == typeof(state)
        if axis_type == AxisType.Explicit:
            assert typeof(updates) == typeof(sharded)
    got = jax.device_get((updates, new_state))
    chex.assert_trees_all_close(got, jax.device_get(expected), rtol=2e-5, atol=1e-6)


@pytest.mark.devices(2)
@few_rows
def test_shard_map_over_the_units(row):
    if row.whole:
        pytest.skip("a vector that spans all devices has no local norm")
    if row.coupled:
        pytest.skip("arrays that are elsewhere take part in every update")
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=jax.devices()[:2])
    tx, params, grads = row.make(), row.draw(), row.draw(1)
    # One array is split and another is not: they must not be made to vary together.
    specs = {"dense": {"kernel": P(None, "x"), "bias": P("x")}, "conv": P()}

    def update(grads, params):
        return tx.update(grads, tx.init(params), params)[0]

    mapped = jax.shard_map(update, mesh=mesh, in_specs=(specs, specs), out_specs=specs)
    chex.assert_trees_all_close(
        jax.jit(mapped)(grads, params), update(grads, params), rtol=2e-5, atol=1e-6
    )


@our_rows
def test_vmap_over_some_of_the_arrays(row):
    if row.coupled:
        pytest.skip("what one array is changes the update of the others")
    tx, params, grads = row.make(), row.draw(), row.draw(1)
    batch = jax.tree.map(lambda w: jnp.stack([w, 2 * w]), params["dense"])

    def update(dense):
        mixed = params | {"dense": dense}
        return tx.update(grads, tx.init(mixed), mixed)[0]

    axes = {"dense": 0, "conv": None}
    updates = jax.vmap(update, out_axes=axes)(batch)
    expected = update(jax.tree.map(lambda w: w[1], batch))
    chex.assert_trees_all_close(updates["conv"], expected["conv"], rtol=1e-6)
    second = jax.tree.map(lambda w: w[1], updates["dense"])
    chex.assert_trees_all_close(second, expected["dense"], rtol=2e-5, atol=1e-6)


@few_rows
def test_export(row):
    tx, params = row.make(), row.draw()
    arguments = row.draw(1), tx.init(params), params
    platforms = ("cpu", "cuda", "tpu")
    exported = jax.export.export(jax.jit(tx.update), platforms=platforms)(*arguments)
    assert exported.platforms == platforms
    got = exported.call(*arguments)
    chex.assert_trees_all_close(got, tx.update(*arguments), rtol=2e-5, atol=1e-6)


@every_row
@pytest.mark.parametrize("value", [jnp.nan, jnp.inf])
def test_what_is_not_finite_is_not_hidden(row, value):
    tx, params, grads = row.make(), row.draw(), row.draw(1)
    grads["dense"]["kernel"] = grads["dense"]["kernel"].at[2, 3].set(value)
    updates, _ = tx.update(grads, tx.init(params), params)
    # The sign of an infinity is finite, and optax takes it.
    hidden = row.name in ("lion", "hyperball_layer") and np.isinf(value)
    assert np.isfinite(updates["dense"]["kernel"][2, 3]) == hidden
    others = jnp.delete(updates["dense"]["kernel"], 3, axis=1)
    if not row.whole and not row.coupled:
        chex.assert_tree_all_finite((others, updates["conv"]))


@every_row
@pytest.mark.parametrize("gradient", [0.0, 1.0])
def test_zero_weights_never_make_a_nan(row, gradient):
    zeros = optax.tree.zeros_like(row.draw())
    tx = row.make()
    state = tx.init(zeros)
    for _ in range(3):
        updates, state = tx.update(
            optax.tree.scale(gradient, row.draw(1)), state, zeros
        )
        chex.assert_tree_all_finite((updates, state))


@pytest.mark.slow
@few_rows
def test_nnx_optimizer_loop(row):
    if row.network:
        pytest.skip("the model normalizes by the batch")
    model = nnx.Sequential(
        nnx.Linear(4, 8, rngs=nnx.Rngs(0)),
        nnx.BatchNorm(8, rngs=nnx.Rngs(0)),
        nnx.Linear(8, 2, rngs=nnx.Rngs(1)),
    )
    base = optax.identity() if "learning_rate" in row.kwargs else optax.sgd(0.05)
    optimizer = nnx.Optimizer(model, optax.chain(base, row.make()), wrt=nnx.Param)
    x = jax.random.normal(jax.random.key(0), (32, 4))

    @nnx.jit
    def step(model, optimizer):
        loss_fn = lambda model: jnp.mean((model(x) - x[:, :2]) ** 2)  # noqa: E731
        loss, grads = nnx.value_and_grad(loss_fn)(model)
        optimizer.update(model, grads)
        return loss

    losses = [step(model, optimizer) for _ in range(40)]
    assert losses[-1] < losses[0]
    if "unit_norm" in row.name and "axes" not in row.kwargs:
        radius = row.kwargs.get("radius", 1.0)
        if radius != "initial" and not callable(radius):
            normax.testing.assert_unit_norm(nnx.state(model, nnx.Param), radius=radius)


@pytest.mark.slow
@few_rows
def test_linen_train_state_loop(row):
    if row.network:
        pytest.skip("the model normalizes by the batch")
    model = nn.Sequential([nn.Dense(8), nn.LayerNorm(), nn.Dense(2)])
    x = jax.random.normal(jax.random.key(0), (32, 4))
    base = optax.identity() if "learning_rate" in row.kwargs else optax.sgd(0.05)
    state = train_state.TrainState.create(
        apply_fn=model.apply,
        params=model.init(jax.random.key(1), x)["params"],
        tx=optax.chain(base, row.make()),
    )

    @jax.jit
    def step(state):
        def loss_fn(params):
            return jnp.mean((state.apply_fn({"params": params}, x) - x[:, :2]) ** 2)

        loss, grads = jax.value_and_grad(loss_fn)(state.params)
        return state.apply_gradients(grads=grads), loss

    losses = []
    for _ in range(40):
        state, loss = step(state)
        losses.append(loss)
    assert losses[-1] < losses[0]
