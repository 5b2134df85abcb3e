"""Runs on disk: whatever changes a result makes another run, on every version of JAX.

Each program computes the rate times the sum of what it closes over, by another way
through JAX. A stored run of one program must never be taken for that of another.
"""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax import lax

import normax
from normax.sweeps.fingerprint import fingerprint

pytestmark = pytest.mark.few_rows(40)

RATES = np.array([1.0, 2.0], np.float32)


def total(value):
    """Return the sum of the entries; of random keys, that of what they draw."""
    if isinstance(value, jax.Array) and jnp.issubdtype(
        value.dtype, jax.dtypes.prng_key
    ):
        return jnp.sum(jax.random.normal(value, (3,)))
    return jnp.sum(jnp.asarray(value))


def through_custom_vjp(value):
    @jax.custom_vjp
    def times(rate):
        return rate * total(value)

    times.defvjp(lambda rate: (times(rate), None), lambda _, g: (g * total(value),))
    return times


def through_the_rule_of_custom_vjp(value):
    @jax.custom_vjp
    def one(rate):
        return rate

    one.defvjp(lambda rate: (rate, None), lambda _, g: (g * total(value),))
    return lambda rate: rate * jax.grad(one)(rate)


def through_custom_jvp(value):
    @jax.custom_jvp
    def times(rate):
        return rate * total(value)

    times.defjvp(lambda rate, dot: (times(*rate), dot[0] * total(value)))
    return times


def through_scan(value):
    def run(rate):
        body = lambda carry, _: (carry + total(value) / 4, None)  # noqa: E731
        return rate * lax.scan(body, jnp.float32(0), length=4)[0]

    return run


def through_scanned_arrays(value):
    def run(rate):
        stack = jnp.stack([total(value)] * 4)
        add = lambda carry, x: (carry + x, None)  # noqa: E731
        return rate / 4 * lax.scan(add, jnp.float32(0), stack)[0]

    return run


def through_while(value):
    def run(rate):
        step = lambda state: (state[0] + 1, state[1] + total(value) / 4)  # noqa: E731
        start = (0, jnp.float32(0))
        return rate * lax.while_loop(lambda state: state[0] < 4, step, start)[1]

    return run


def through_cond(value):
    def run(rate):
        return lax.cond(rate > 0, lambda r: r * total(value), lambda r: r, rate)

    return run


WAYS = {
    "directly": lambda value: lambda rate: rate * total(value),
    "jit": lambda value: lambda rate: rate * jax.jit(lambda: total(value))(),
    "vmap": lambda value: (
        lambda rate: jax.vmap(lambda r: r * total(value))(rate[None])[0]
    ),
    "scan": through_scan,
    "scanned arrays": through_scanned_arrays,
    "while": through_while,
    "cond": through_cond,
    "grad": lambda value: (
        lambda rate: jax.grad(lambda r: r**2 / 2 * total(value))(rate)
    ),
    "custom_vjp": through_custom_vjp,
    "rule of custom_vjp": through_the_rule_of_custom_vjp,
    "custom_jvp": through_custom_jvp,
    "remat": lambda value: jax.checkpoint(lambda rate: rate * total(value)),
    "jit in remat in scan": lambda value: through_scan(
        jax.checkpoint(jax.jit(lambda: total(value)))()
    ),
}
VALUES = {
    "jax": lambda size: jnp.arange(3, dtype=jnp.float32) * size,
    "numpy": lambda size: np.arange(3, dtype=np.float32) * size,
    "large": lambda size: jnp.ones(5000).at[2500].set(size),
    "bfloat16": lambda size: jnp.full(2, size, jnp.bfloat16),
    "python number": float,
    "numpy number": np.float32,
    "key": jax.random.key,
}


@pytest.fixture(params=[False, True], ids=["closed over", "literal"])
def constants(request):
    """Run with arrays that a jaxpr closes over, and with arrays as its literals."""
    name = "jax_use_simplified_jaxpr_constants"
    before = getattr(jax.config, name)
    jax.config.update(name, request.param)
    yield
    jax.config.update(name, before)


def digest(run):
    return fingerprint(jax.jit(run).trace(RATES[0])).hexdigest()


def expected(value):
    if not isinstance(value, jax.Array | np.ndarray):
        return float(value)
    if value.dtype.name.startswith("key"):
        value = jax.random.normal(value, (3,))
    return np.sum(np.asarray(value, np.float64))


@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("way", WAYS)
def test_what_is_closed_over_makes_another_run(way, kind):
    make, value = WAYS[way], VALUES[kind]
    one, same, other = (make(value(size)) for size in (1, 1, 2))
    assert digest(one) == digest(same)
    assert digest(one) != digest(other)


@pytest.mark.slow
@pytest.mark.usefixtures("constants")
@pytest.mark.parametrize("way", WAYS)
def test_a_resumed_sweep_returns_the_results_of_its_own_data(way, tmp_path):
    for size in (1, 2, 1):
        value = VALUES["jax"](size)
        run = WAYS[way](value)
        found = normax.sweeps.sweep(run, {"rate": RATES}, checkpoint_dir=tmp_path)
        np.testing.assert_allclose(found, RATES * expected(value), rtol=1e-6)
    assert len(list(tmp_path.iterdir())) == 4


@pytest.mark.parametrize("kind", VALUES)
def test_values_of_every_kind_are_told_apart_on_disk(kind, tmp_path):
    for size in (1, 2):
        value = VALUES[kind](size)
        run = WAYS["jit"](value)
        found = normax.sweeps.sweep(run, {"rate": RATES}, checkpoint_dir=tmp_path)
        np.testing.assert_allclose(found, RATES * expected(value), rtol=1e-5)


def other_programs():
    ones = jnp.ones(3)
    return {
        "sum": lambda rate: rate * jnp.sum(ones),
        "product": lambda rate: rate + jnp.sum(ones),
        "largest": lambda rate: rate * jnp.max(ones),
        "order": lambda rate: rate - jnp.sum(ones),
        "order of operands": lambda rate: jnp.sum(ones) - rate,
        "parameter": lambda rate: rate * jnp.cumsum(ones)[-1],
        "reversed": lambda rate: rate * lax.cumsum(ones, reverse=True)[-1],
        "shape": lambda rate: rate * jnp.sum(ones[None]),
        "dtype": lambda rate: rate * jnp.sum(ones.astype(jnp.bfloat16)),
        "number of steps": lambda rate: lax.fori_loop(0, 3, lambda _, r: r + 1, rate),
        "more steps": lambda rate: lax.fori_loop(0, 4, lambda _, r: r + 1, rate),
        "precision": lambda rate: rate * jnp.dot(ones, ones, precision="high"),
        "no precision": lambda rate: rate * jnp.dot(ones, ones),
        "sequence": lambda rate: (rate * 2, rate + 2),
        "other sequence": lambda rate: (rate + 2, rate * 2),
        "other results": lambda rate: (rate * 2, rate + 2)[::-1],
        "one result": lambda rate: (rate * 2, rate + 2)[:1],
        "generator": lambda rate: rate * jax.random.uniform(jax.random.key(0)),
        "other generator": lambda rate: (
            rate * jax.random.uniform(jax.random.key(0, impl="rbg"))
        ),
    }


def test_every_program_has_a_digest_of_its_own():
    programs = other_programs()
    assert len({digest(run) for run in programs.values()}) == len(programs)


@pytest.mark.parametrize(
    ("setting", "value"),
    [
        ("jax_threefry_partitionable", False),
        ("jax_default_matmul_precision", "high"),
    ],
)
def test_settings_that_change_results_make_another_run(setting, value):
    run = lambda rate: rate * jnp.dot(jnp.ones(3), jnp.ones(3))  # noqa: E731
    before, normal = getattr(jax.config, setting), digest(run)
    jax.config.update(setting, value)
    try:
        assert digest(run) != normal
    finally:
        jax.config.update(setting, before)
    assert digest(run) == normal


@pytest.mark.parametrize("name", ["normax", "jax", "jaxlib"])
def test_versions_make_another_run(name, monkeypatch):
    from importlib import metadata

    run, version = other_programs()["sum"], metadata.version
    normal = digest(run)
    monkeypatch.setattr(
        metadata, "version", lambda asked: version(asked) + "0" * (asked == name)
    )
    assert digest(run) != normal


def test_policies_and_rules_that_are_not_used_do_not_matter():
    def make():
        policy = jax.checkpoint_policies.save_only_these_names("a")
        return jax.checkpoint(lambda rate: jax.nn.relu(rate), policy=policy)

    assert digest(make()) == digest(make())


def test_our_own_transformations_can_be_stored(tmp_path):
    """They batch by rules of their own, which are Python functions."""
    tx = optax.chain(
        optax.sgd(0.1), normax.project_unit_norm(), normax.monitor_weight_dynamics()
    )

    def train(rate):
        w = jnp.ones((3, 2))
        updates, _ = tx.update(rate * w, tx.init(w), w)
        return optax.apply_updates(w, updates)

    # A function of its own at every call, as in another process.
    runs = [lambda rate: train(rate) for _ in range(2)]
    first, again = (
        normax.sweeps.sweep(run, {"rate": RATES}, checkpoint_dir=tmp_path)
        for run in runs
    )
    np.testing.assert_array_equal(first, again)
    assert len(list(tmp_path.iterdir())) == len(RATES)


def test_rules_of_batching_that_are_not_known_are_refused():
    def make(factor):
        @jax.custom_batching.custom_vmap
        def double(x):
            return 2 * x

        @double.def_vmap
        def rule(axis_size, in_batched, x):
            return factor * x, in_batched[0]

        return double

    with pytest.raises(ValueError, match=r"`custom_vmap_call` depends on <function"):
        digest(make(2))


def callbacks():
    shape = jax.ShapeDtypeStruct((), jnp.float32)
    double = lambda x: np.float32(2 * x)  # noqa: E731
    return {
        "pure_callback": lambda rate: jax.pure_callback(double, shape, rate),
        "inside": jax.jit(lambda rate: jax.pure_callback(double, shape, rate)),
        "io_callback": lambda rate: jax.experimental.io_callback(double, shape, rate),
        "debug": lambda rate: (jax.debug.callback(lambda _: None, rate), rate)[1],
    }


@pytest.mark.parametrize("name", callbacks())
def test_callbacks_are_refused(name, tmp_path):
    import jax.experimental  # noqa: F401

    with pytest.raises(ValueError, match=r"callback.*leave it out of `train_fn`"):
        normax.sweeps.sweep(callbacks()[name], {"rate": RATES}, checkpoint_dir=tmp_path)
    assert not list(tmp_path.iterdir())
    normax.sweeps.sweep(callbacks()[name], {"rate": RATES})


class Equal:
    """A training run that is equal to others with other data."""

    def __init__(self, data):
        self.data = data

    def __eq__(self, other):
        return isinstance(other, Equal)

    def __hash__(self):
        return 0

    def __call__(self, rate):
        return rate * self.data


def test_functions_that_are_equal_are_not_the_same():
    runs = [Equal(jnp.float32(data)) for data in (1.0, 2.0)]
    for run, data in zip(runs, (1.0, 2.0), strict=True):
        np.testing.assert_array_equal(
            normax.sweeps.sweep(run, {"rate": RATES}), data * RATES
        )
