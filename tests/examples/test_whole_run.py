"""Whole runs, measured and predicted, in small."""

import importlib
import sys
from pathlib import Path
from typing import Any

import jax.numpy as jnp
import numpy as np
import optax
import pytest

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
datasets: Any = importlib.import_module("datasets")
example: Any = importlib.import_module("whole_run")

pytestmark = pytest.mark.usefixtures("quick_compilation")

STEPS = 400


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("out")
    arguments = f"--steps {STEPS} --width 32 --batch-size 32 --out {out}"
    return example.main(arguments.split()), out


@pytest.mark.slow
def test_measured_profiles_predict_norms_and_angles(
    small_run: tuple[Any, Path],
) -> None:
    rows = {row[:3]: row[3:] for row in example.errors(small_run[0])}
    assert len(rows) == 3 * 3 * 2
    # Bounds with the measured profile: of the errors of norm and angle, and of the mean
    # ratio of angles. The profile mends the norms of momentum, and the angles of all.
    largest = {
        "adamw": (0.03, 0.25, 0.4),
        "momentum": (0.04, 0.2, 0.1),
        "lion": (0.05, 0.1, 0.1),
    }
    for (rule, _, _), (constant, measured, other, *angles, ratio) in rows.items():
        norm, angle, mean = largest[rule]
        assert measured < norm and angles[1] < angle and abs(ratio - 1) < mean
        assert other < 0.15 and angles[2] < 0.25 and angles[1] < angles[0]
        assert rule != "momentum" or measured < constant


@pytest.mark.slow
def test_predictions_start_where_runs_start(small_run: tuple[Any, Path]) -> None:
    columns, _ = small_run
    first = columns["step"] == columns["step"].min()
    for name in example.PREDICTIONS:
        predicted = columns[f"norm, {name}"][first]
        np.testing.assert_allclose(predicted, columns["norm"][first], rtol=0.02)
    assert (columns["loss"][~first].min() < columns["loss"][first]).all()


@pytest.mark.slow
def test_picture_and_csv_are_written(small_run: tuple[Any, Path]) -> None:
    columns, out = small_run
    lines = (out / "whole_run.csv").read_text().splitlines()
    assert len(lines) == 1 + len(columns["norm"]) == 1 + 18 * example.ENTRIES
    assert len(example.table(columns).splitlines()) == 3 + 18
    assert (out / "whole_run.png").stat().st_size > 10_000


@pytest.mark.slow
def test_schedules_are_those_of_optax() -> None:
    rates = {name: example.make_rates(name, 0.5, 1000) for name in example.SCHEDULES}
    for found in rates.values():
        warmup = np.linspace(0.005, 0.5, 101)[:100]
        np.testing.assert_allclose(found[:100], warmup, rtol=1e-5)
        assert found.max() <= 0.5 and found[-1] < 0.01
    cosine = optax.cosine_decay_schedule(0.5, 900)(jnp.arange(900))
    np.testing.assert_allclose(rates["cosine"][100:], cosine, rtol=1e-5)
    assert (rates["wsd"][100:820] == 0.5).all() and rates["wsd"][830] < 0.5


@pytest.mark.slow
def test_colour_images_have_four_layers() -> None:
    images = np.zeros((4, 8, 8, 3), np.uint8)
    data = datasets.Dataset(images, np.arange(4), images, np.arange(4))
    model = example.make_network(data, 8, seed=0)
    assert len(model.convs) == 4 and model.head.kernel.shape == (16, 4)


@pytest.mark.parametrize(
    "arguments, message",
    [
        ("--steps 19", "--steps must be at least 20"),
        ("--width 0", "--steps must be at least 20"),
        ("--batch-size 0", "--steps must be at least 20"),
        ("--layer 3", "--layer must be from 1 to 2, got 3"),
    ],
)
def test_arguments_that_cannot_be_right(
    arguments: str, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        example.main([*arguments.split(), "--out", str(tmp_path)])
    assert message in capsys.readouterr().err
