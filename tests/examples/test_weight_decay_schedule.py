"""Runs that replace weight decay compute what it does, and the controls do not."""

import importlib
import sys
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx

import normax

pytestmark = pytest.mark.few_rows(1)

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
convnet: Any = importlib.import_module("convnet")
example: Any = importlib.import_module("weight_decay_schedule")

EPOCHS, SHRINKAGE = 6, 2.5
EXACT = [("momentum", "growing rate"), ("sgd", "matched"), ("adamw", "matched")]
DIFFERENT = [
    ("momentum", "constant rate"),
    ("sgd", "mean rate"),
    ("sgd", "constant rate"),
    ("adamw", "rate alone"),
    ("adamw", "mean rate"),
    ("adamw", "constant rate"),
]


@pytest.fixture(scope="module")
def small_run(
    tmp_path_factory: pytest.TempPathFactory, quick_compilation: None
) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("out")
    arguments = f"--images 640 --shrinkage {SHRINKAGE} --out {out}"
    setting = convnet.Setting((4, 8), (2, 2), 32, EPOCHS, augment=False)
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(convnet.SETTINGS, "digits", setting)
        return example.main(arguments.split()), out


def select(small_run: tuple[Any, Path], rule: str, name: str, precision: str) -> Any:
    return example.select(small_run[0], rule=rule, run=name, precision=precision)


@pytest.mark.slow
@pytest.mark.parametrize("rule, name", EXACT)
def test_equal_runs_part_by_rounding_alone(
    small_run: tuple[Any, Path], rule: str, name: str
) -> None:
    decay = select(small_run, rule, "weight decay", "float64")
    double = select(small_run, rule, name, "float64")
    assert (double["difference"] < 1e-10).all()
    assert (double["logits"] < 1e-10).all()
    np.testing.assert_array_equal(double["test_error"], decay["test_error"])
    np.testing.assert_allclose(double["training_loss"], decay["training_loss"], 1e-6)
    single = select(small_run, rule, name, "float32")
    # The runs differ by rounding, because they do not share their arithmetic.
    assert 0 < single["difference"][0] < 1e-5
    assert 0 < single["logits"][0] < 1e-5


@pytest.mark.slow
@pytest.mark.parametrize("rule, name", DIFFERENT)
@pytest.mark.parametrize("precision", ["float32", "float64"])
def test_other_runs_part_at_once(
    small_run: tuple[Any, Path], rule: str, name: str, precision: str
) -> None:
    found = select(small_run, rule, name, precision)
    assert (found["difference"] > 3e-4).all()
    assert found["difference"][-1] > 1e-2
    assert found["logits"][-1] > 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("rule, name", EXACT)
def test_effective_rates_are_those_of_the_run_with_decay(
    small_run: tuple[Any, Path], rule: str, name: str
) -> None:
    decay = select(small_run, rule, "weight decay", "float64")
    found = select(small_run, rule, name, "float64")
    ratio = found["effective_rate"] / decay["effective_rate"]
    steps = EPOCHS * 640 // 32
    if rule == "momentum":
        # The rate belongs between the norms before and after the step, at the root of
        # the recursion of weights that decay alone changes.
        share = SHRINKAGE / steps * (1 - example.MOMENTUM)
        kept = np.roots([1, -(1 + example.MOMENTUM - share), example.MOMENTUM])
        np.testing.assert_allclose(ratio[-1], 1 / kept.max(), rtol=1e-3)
    else:
        np.testing.assert_allclose(ratio, 1 / (1 - SHRINKAGE / steps), rtol=1e-5)
    assert decay["effective_rate"][-1] > 1.5 * decay["rate"][-1]
    if rule == "momentum":
        assert found["rate"][-1] > 50 * decay["rate"][-1]
    else:
        np.testing.assert_allclose(found["rate"], found["effective_rate"], rtol=1e-6)


@pytest.mark.slow
def test_picture_csv_and_table_are_written(small_run: tuple[Any, Path]) -> None:
    results, out = small_run
    lines = (out / "weight_decay_schedule.csv").read_text().splitlines()
    assert lines[0].split(",") == list(results)
    assert len(lines) == 1 + 24 * EPOCHS
    assert (out / "weight_decay_schedule.png").stat().st_size > 10_000
    changed = results | {"difference": np.tile([0.0, 0, 1, 0, 0, 0], 24)}
    changed["difference"][:EPOCHS] = np.nan
    rows = example.table(changed).splitlines()[4:]
    assert len(rows) == 12
    counts = [row[42:62].split() for row in rows]
    assert counts == [["0", "2"]] + [["2", "2"]] * 11


def test_largest_decay_is_what_the_schedule_admits() -> None:
    largest = example.LARGEST_DECAY * (1 - example.MOMENTUM)
    make = normax.theory.exponential_equivalent_schedule
    make(1.0, largest * (1 - 1e-6), example.MOMENTUM)
    with pytest.raises(ValueError, match="below 1"):
        make(1.0, largest * (1 + 1e-6), example.MOMENTUM)


@pytest.mark.slow
def test_float32_holds_the_gradient_of_batch_norm_up_to_e28() -> None:
    norm = nnx.BatchNorm(3, epsilon=0.0, rngs=nnx.Rngs(0))
    x, w, y = (
        jax.random.normal(jax.random.key(seed), shape)
        for seed, shape in enumerate([(16, 5), (5, 3), (16, 3)])
    )
    graph, state = nnx.split(norm)

    @jax.jit
    def scaled_gradient(log_scale: float) -> jax.Array:
        def loss(w: jax.Array) -> jax.Array:
            return (nnx.merge(graph, state, copy=True)(x @ w) * y).sum()

        scale = jnp.exp(log_scale)
        return scale * jax.grad(loss)(scale * w)

    expected = scaled_gradient(0.0)
    for log_scale in (example.LARGEST_SHRINKAGE, 28.0):
        np.testing.assert_allclose(scaled_gradient(log_scale), expected, atol=1e-4)
    assert jnp.abs(scaled_gradient(30.0) - expected).max() > 0.1


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--shrinkage 0", "below 25 in 960 steps, got 0.0"),
        ("--shrinkage nan", "below 25 in 960 steps, got nan"),
        ("--shrinkage 25", "below 25 in 960 steps, got 25.0"),
        ("--epochs 2", "below 2.11 in 80 steps, got 3.0"),
        ("--epochs 0", "--epochs must be at least 2, --channels"),
        ("--channels 8 8 0 8", "--epochs must be at least 2, --channels"),
        ("--images 31", "a batch is 32 images"),
    ],
)
def test_arguments_that_cannot_be_right(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example.main([*arguments.split(), "--out", str(tmp_path)])
    assert message in capsys.readouterr().err
