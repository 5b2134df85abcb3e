"""What orders work for a compiler changes no number, and saves the memory it should."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import AxisType
from jax.sharding import PartitionSpec as P

import normax
from normax._core.scheduling import in_one_pass, one_after, sums, wait

pytestmark = pytest.mark.few_rows(1)

EVENTS = [[1.0, 0.0, 3.0, 1.0, 1.0], [jnp.nan], [jnp.inf], [0.0]]


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize("everywhere", [False, True])
def test_waiting_changes_nothing(everywhere):
    x = jnp.array([-1.0, 0.0, jnp.nan, jnp.inf, 2.0])
    after = functools.partial(wait, everywhere=everywhere)
    for event in map(jnp.array, EVENTS):
        np.testing.assert_array_equal(jax.jit(after)(x, event), x)
        batch = jnp.stack([x, x])
        np.testing.assert_array_equal(jax.vmap(after, (0, None))(batch, event), batch)
    gradient = jax.grad(lambda x: jnp.sum(after(x, jnp.ones(2)) ** 2))(x[:2])
    np.testing.assert_array_equal(gradient, 2 * x[:2])


def wait_and_double(array, event):
    return wait(array, event, everywhere=True) * 2


# Under vmap and shard_map an array may vary where another must not.
@pytest.mark.usefixtures("every_form")
def test_waiting_couples_no_arrays_of_a_batch():
    batched = jax.vmap(wait_and_double, in_axes=(None, 0), out_axes=None)
    np.testing.assert_array_equal(batched(jnp.ones(3), jnp.ones((4, 3))), 2)


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize(
    "axes", [(0,), (1,), (2,), (0, 1), (0, 2), (0, 1, 2), (-2,), (-1,), (-3, -2)]
)
def test_sums_in_one_pass(axes):
    arrays = np.random.default_rng(0).normal(size=(3, 5, 4, 6)).astype("f")
    for array, found in zip(arrays, sums(map(jnp.asarray, arrays), axes), strict=True):
        expected = np.sum(np.float64(array), axes, keepdims=True)
        np.testing.assert_allclose(found, expected, rtol=1e-5, atol=1e-6)


CONDITIONS = {
    "project_unit_norm": (normax.project_unit_norm(), 0),
    "monitor_weight_dynamics": (normax.monitor_weight_dynamics(), 1),
    "monitor_weight_dynamics_every": (normax.monitor_weight_dynamics(every=10), 2),
    "remove_radial_component": (normax.remove_radial_component(), 1),
    "hyperball": (normax.hyperball(optax.scale_by_adam(), 1e-3), 0),
    "adamp": (normax.adamp(1e-3), 1),
    "rotational_adamw": (normax.rotational_adamw(1e-3, 0.1), 1),
}


@pytest.mark.usefixtures("as_on_a_gpu")
@pytest.mark.parametrize("name", CONDITIONS)
def test_all_arrays_share_a_condition(name):
    """A GPU's host waits for each of them."""
    tx, conditions = CONDITIONS[name]
    params = [jnp.ones((4, 3)), jnp.ones((5, 2)), jnp.ones((3, 2, 6))]
    text = jax.jit(tx.update).lower(params, tx.init(params), params).as_text()
    assert text.count("stablehlo.case") == conditions


@pytest.mark.devices(2)
def test_waiting_couples_no_arrays_of_several_devices():
    mesh = jax.make_mesh((2,), ("x",), (AxisType.Auto,), devices=jax.devices()[:2])
    specs = dict(in_specs=(P(), P("x")), out_specs=P())
    mapped = jax.shard_map(wait_and_double, mesh=mesh, **specs)
    np.testing.assert_array_equal(jax.jit(mapped)(jnp.ones(2), jnp.ones(4)), 2)


@pytest.mark.parametrize("entry", [1.0, 0.0, -2.0, jnp.nan, jnp.inf, -jnp.inf])
def test_one_comes_after_everything(entry):
    updates = [jnp.full((2, 3), entry), jnp.arange(3), jnp.zeros((0, 4)), None]
    for event in (0.0, 3.0, jnp.nan, jnp.inf):
        assert jax.jit(one_after)(jnp.float32(event), updates) == 1


def test_care_is_taken_where_the_direct_result_is_wrong():
    largest = jnp.finfo(jnp.float32).max

    def direct(x):
        square = x * x
        return lambda: jnp.sqrt(square), square < largest

    norm = jax.jit(in_one_pass(direct, jnp.abs))
    np.testing.assert_array_equal(norm(jnp.array([-3.0, 2.0])), [3.0, 2.0])
    large = jnp.array([-3.0, 2e30])
    np.testing.assert_array_equal(norm(large), jnp.abs(large))
    batch = jnp.stack([large, jnp.ones(2)])
    np.testing.assert_array_equal(jax.vmap(norm)(batch), jnp.abs(batch))
    program = str(jax.make_jaxpr(jax.vmap(norm))(batch))
    assert "cond[" in program, "a batch has one condition, so one of the branches runs"


@pytest.mark.slow
@pytest.mark.skipif(jax.__version_info__ < (0, 10), reason="planned otherwise")
@pytest.mark.parametrize(
    ("tx", "arrays"),
    [(normax.project_unit_norm(), 1), (normax.monitor_weight_dynamics(), 3)],
)
def test_memory_of_one_array_serves_all(tx, arrays):
    tx = optax.chain(optax.adam(1e-3), tx)

    @functools.partial(jax.jit, donate_argnums=(0, 1))
    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    def temporary_bytes(kernels, shape):
        params = [jax.ShapeDtypeStruct(shape, jnp.float32)] * kernels
        lowered = step.lower(params, jax.eval_shape(tx.init, params), params)
        return lowered.compile().memory_analysis().temp_size_in_bytes

    few, many = (temporary_bytes(kernels, (256, 256)) for kernels in (4, 16))
    assert many < few + 4 * 256 * 256
    # XLA plans wide arrays in another way than square ones.
    wide = temporary_bytes(8, (1024, 4096))
    assert wide < (arrays + 0.25) * 4 * 1024 * 4096
