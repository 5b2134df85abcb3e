"""A monitored optimizer: the measures of a chain, at the cost of the optimizer."""

import re

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import normax
from normax.spheres.monitor import AVERAGED

pytestmark = [pytest.mark.usefixtures("quick_compilation"), pytest.mark.few_rows(2)]

monitor_optimizer = normax.spheres.monitor_optimizer
OPTIMIZERS = {
    "adamw": optax.adamw(0.01, weight_decay=0.1),
    "clipped": optax.chain(
        optax.clip_by_global_norm(0.1), optax.sgd(0.1, momentum=0.9)
    ),
    "plateau": optax.chain(
        optax.sgd(0.1), optax.contrib.reduce_on_plateau(patience=1, rtol=0.5)
    ),
}


def draw(seed, dtype):
    rng = np.random.default_rng(seed)
    shapes = {"bias": (3,), "kernel": (12, 3), "head": (3, 2)}
    return {
        name: jax.device_put(rng.normal(size=shape).astype(dtype))
        for name, shape in shapes.items()
    }


def close(got, wanted):
    rtol = 1e-6 if got.dtype.itemsize > 2 else 1e-2
    got, wanted = (np.asarray(x, np.float64) for x in (got, wanted))
    np.testing.assert_allclose(got, wanted, rtol=rtol, atol=1e-9)


@pytest.mark.usefixtures("every_form")
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("decay", [0.9, 0.0])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_it_is_the_chain(name, decay, dtype):
    optimizer, axes = OPTIMIZERS[name], {"bias": "none", "kernel": "unit", "head": (1,)}
    rare = monitor_optimizer(optimizer, 3, axes, decay)
    chain = optax.chain(optimizer, normax.monitor_weight_dynamics(axes, decay, every=3))
    params = draw(0, dtype)
    state, expected = rare.init(params), chain.init(params)
    step, wanted_step = jax.jit(rare.update), jax.jit(chain.update)
    for count in range(8):
        grads = draw(count + 1, dtype)
        value = jnp.float32(1.0)  # what a plateau is found by
        updates, state = step(grads, state, params, value=value)
        wanted, expected = wanted_step(grads, expected, params, value=value)
        assert state.monitor.steps == count + 1 == expected[-1].steps
        assert state.monitor.measured == 3 * (count // 3) == expected[-1].measured
        both = [
            (updates, wanted),
            (state.optimizer, expected[0]),
            *((getattr(state.monitor, x), getattr(expected[-1], x)) for x in AVERAGED),
        ]
        for pair in both:
            jax.tree.map(close, *pair)
        params = optax.apply_updates(params, updates)


def always_run(program):
    """Return what a compiled program runs whatever its conditions are."""
    found, parts = [], re.split(r"\n(?=ENTRY |%)", program)
    named = {re.match(r"(?:ENTRY )?%?([\w.\-]+)", part)[1]: part for part in parts}
    wanted = [next(part for part in parts if part.startswith("ENTRY "))]
    while wanted:
        found.append(wanted.pop())
        called = re.findall(r"(?:calls|to_apply|body)=%?([\w.\-]+)", found[-1])
        wanted += [named[name] for name in called]
    return "\n".join(found)


@pytest.mark.parametrize(
    "tx",
    [
        pytest.param(monitor_optimizer(optax.sgd(0.1), every=10), id="optimizer"),
        pytest.param(normax.monitor_weight_dynamics(every=10), id="chain"),
    ],
)
def test_steps_in_between_measure_nothing(tx):
    params = draw(0, "float32")
    lowered = jax.jit(tx.update).lower(params, tx.init(params), params)
    program = lowered.compile().as_text()
    always = always_run(program)
    assert " conditional(" in always
    for measured in (" sqrt(", " atan2("):
        assert measured in program and measured not in always


def test_weights_and_moments_change_in_place():
    params = draw(0, "float32")
    tx = monitor_optimizer(optax.adam(0.1), every=10)

    def step(params, state, grads):
        updates, state = tx.update(grads, state, params)
        return optax.apply_updates(params, updates), state

    lowered = jax.jit(step, donate_argnums=(0, 1)).lower(
        params, tx.init(params), params
    )
    program = lowered.compile().as_text()
    assert "f32[12,3]" in program
    assert not re.findall(r"f32\[\d+,\d+\]\S* copy\(", program)


def test_the_table_reads_it():
    params = draw(0, "float32")
    tx = monitor_optimizer(optax.sgd(0.1), every=2)
    _, state = tx.update(params, tx.init(params), params)
    table = normax.dynamics_table(state)
    assert [row.name for row in table.arrays] == ["head", "kernel"]
    scalars = normax.dynamics_scalars(state)
    # The update is -0.1 w, so no vector turns.
    update = next(v for k, v in scalars.items() if "relative" in k and "kernel" in k)
    np.testing.assert_allclose(update, 0.1, rtol=1e-6)


@pytest.mark.parametrize("every", [1, 0, float("nan")])
def test_a_step_of_one_is_refused(every):
    with pytest.raises(ValueError, match="every must be at least 2 and finite, got"):
        monitor_optimizer(optax.sgd(0.1), every)
    with pytest.raises(ValueError, match="whole number of steps, got 2"):
        monitor_optimizer(optax.sgd(0.1), 2.5)
