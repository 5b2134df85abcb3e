"""The search of learning rate and weight decay, run small; two processes share one."""

import argparse
import importlib
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import optuna
import pytest

import normax

EXAMPLES = Path(__file__).parents[2] / "examples"
sys.path.insert(0, str(EXAMPLES))
search: Any = importlib.import_module("hyperparameter_search")
studies: Any = importlib.import_module("studies")

SMALL = ["--epochs", "2", "--images", "40", "--channels", "2", "2", "2", "2"]
SPACE = {"eta": (1e-3, 1e1), "lambda": (1e-2, 1e1)}
# The process waits in its first sweep until the other one has asked for trials too.
PROCESS = """
import os, pathlib, sys, time
examples, folder, *arguments = sys.argv[1:]
sys.path.insert(0, examples)
import hyperparameter_search, normax
sweep = normax.sweeps.sweep

def patient(*args):
    pathlib.Path(folder, f"{os.getpid()}.ready").touch()
    for _ in range(600):
        if len(list(pathlib.Path(folder).glob("*.ready"))) == 2:
            return sweep(*args)
        time.sleep(0.1)
    sys.exit("the other process never asked")

normax.sweeps.sweep = patient
hyperparameter_search.main([*arguments, "--out", folder])
"""


@pytest.fixture(scope="module")
def small_run(
    tmp_path_factory: pytest.TempPathFactory, quick_compilation: None
) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("out")
    arguments = ["--grid", "2", "--seeds", "2", "--batch", "3", "--out", str(out)]
    return search.main([*SMALL, *arguments]), out


def oracle(theta: Any, momentum: float) -> Any:
    """Return the product of rate and decay for which momentum turns by an angle."""
    return (1 + momentum) * (1 - np.cos(theta))


@pytest.mark.parametrize("rule, momentum", [("sgd", 0.0), ("momentum", 0.9)])
def test_decay_follows_from_the_rotation(rule: str, momentum: float) -> None:
    eta, theta = np.array([1e-3, 0.3, 20.0]), np.array([2e-3, 0.1, 0.5])
    point = search.complete(rule, {"eta": eta, "rotation": theta})
    np.testing.assert_allclose(eta * point["lambda"], oracle(theta, momentum), 1e-4)
    np.testing.assert_array_equal(point["rotation"], theta)


@pytest.mark.parametrize("rule", search.BOXES)
def test_both_directions_are_inverse(rule: str) -> None:
    eta, lam = np.array([1e-3, 1e-2, 0.1]), np.array([1e-2, 50.0, 1.0])
    forth = search.complete(rule, {"eta": eta, "lambda": lam})
    expected = normax.UPDATE_RULES[rule].equilibrium_rotation(eta, lam)
    np.testing.assert_allclose(forth["rotation"], expected, rtol=1e-5)
    back = search.complete(rule, {"eta": eta, "rotation": forth["rotation"]})
    np.testing.assert_allclose(back["lambda"], lam, rtol=1e-4)


def test_beyond_stability_there_is_no_rotation() -> None:
    point = search.complete("nesterov", {"eta": np.ones(2), "lambda": np.r_[0.99, 3.0]})
    np.testing.assert_array_equal(np.isnan(point["rotation"]), [False, True])


def test_boxes_have_the_same_centre_and_area() -> None:
    first, second = search.make_spaces("sgd").values()
    assert first["eta"] == second["eta"]
    low, high = (oracle(theta, 0.0) for theta in second["rotation"])
    (a, b), (c, d) = first.values()
    assert high / low == pytest.approx(d / c, rel=1e-3)
    assert high * low == pytest.approx(a * b * c * d, rel=1e-3)


def test_grid_is_a_grid_in_its_cells() -> None:
    grids = []
    for seed in range(2):
        study = optuna.create_study(sampler=studies.Grid(SPACE, 3, seed))
        trials = [t for _ in range(4) for t in studies.ask(study, SPACE, 4, 9)]
        assert len(trials) == 9
        points = np.array([[t.params[name] for name in SPACE] for t in trials])
        units = np.log(points / [1e-3, 1e-2]) / np.log([1e4, 1e3])
        assert ((units >= 0) & (units <= 1)).all()
        cells = np.floor(units * 3)
        assert len({tuple(cell) for cell in cells}) == 9
        np.testing.assert_allclose(np.ptp(units * 3 - cells, axis=0), 0, atol=1e-6)
        grids.append(units)
    assert (np.sort(grids[0], axis=0) != np.sort(grids[1], axis=0)).all()


@pytest.mark.parametrize("sampler", ["random", "tpe"])
def test_only_what_is_shared_is_drawn_without_a_seed(sampler: str) -> None:
    def draw(shared: bool) -> dict[str, float]:
        made = studies.make_sampler(sampler, SPACE, 3, 0, shared)
        return studies.ask(optuna.create_study(sampler=made), SPACE, 1, 9)[0].params

    assert draw(False) == draw(False)
    assert draw(True) != draw(True)


def test_a_trial_in_excess_is_not_run(monkeypatch: pytest.MonkeyPatch) -> None:
    study = optuna.create_study()
    assert len(studies.ask(study, SPACE, 3, 4)) == 3
    # The other process takes the last trial after this one has counted.
    late = study.get_trials()
    study.ask()
    with monkeypatch.context() as patch:
        patch.setattr(study, "get_trials", lambda **options: late)
        assert studies.ask(study, SPACE, 3, 4) == []
    states = [trial.state.name for trial in study.get_trials()]
    assert states == ["RUNNING"] * 4 + ["FAIL"]
    assert studies.ask(study, SPACE, 3, 4) == []
    assert len(study.get_trials()) == 5


def test_divergence_counts_as_the_largest_error(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def sweep(train: Any, points: Any) -> Any:
        errors = points["lam"] + points["seed"] / 100
        return {"diverged": points["eta"] > 1, "test_error": errors}

    monkeypatch.setattr(normax.sweeps, "sweep", sweep)
    points = {"eta": np.r_[0.5, 2], "lambda": np.r_[0.3, 0.4], "seed": np.r_[5, 6]}
    errors = search.train_at("sgd", None, None)(points)
    np.testing.assert_allclose(errors, [0.35, 1])


@pytest.mark.slow
def test_only_what_was_found_meets_the_test_images(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def train_at(rule: str, data: Any, setting: Any) -> Any:
        seen.append(data)
        return lambda point: point["eta"] / 20

    monkeypatch.setattr(search, "train_at", train_at)
    search.main(["--grid", "2", "--seeds", "1", "--out", str(tmp_path)])
    (x_train, y_train, x_test, y_test), final = seen
    digits = search.datasets.load("digits")
    np.testing.assert_array_equal(np.concatenate([x_train, x_test]), digits.x_train)
    np.testing.assert_array_equal(np.concatenate([y_train, y_test]), digits.y_train)
    assert len(x_train) == len(y_train) == 648
    for actual, expected in zip(final, digits, strict=True):
        np.testing.assert_array_equal(actual, expected)


def made_up(seeds: int, budget: int) -> Any:
    """Return results in the order of a real run, with random errors."""
    axes = studies.SAMPLERS, [*search.COORDINATES], range(seeds), range(budget)
    columns = [column.ravel() for column in np.meshgrid(*axes, indexing="ij")]
    results = dict(zip([*search.KEY, "trial"], columns, strict=True))
    rng = np.random.default_rng(0)
    return results | {"validation_error": rng.random(len(results["seed"]))}


def test_regret_is_what_the_seed_could_have_had() -> None:
    results = made_up(seeds=3, budget=7)
    regrets = search.regret(results, "random", "rotation")
    for seed in range(3):
        of_seed = results["seed"] == seed
        mine = of_seed & (results["sampler"] == "random")
        mine &= results["coordinates"] == "rotation"
        errors = results["validation_error"][mine]
        smallest = min(results["validation_error"][of_seed])
        expected = [min(errors[: count + 1]) - smallest for count in range(7)]
        np.testing.assert_allclose(regrets[seed], expected, atol=1e-12)


def test_the_best_of_each_search_is_tested() -> None:
    results = made_up(seeds=3, budget=7)
    search.add_test_errors(results, lambda point: 1 + point["validation_error"])
    keys = [*zip(*(results[name] for name in search.KEY), strict=True)]
    for key in {*keys}:
        (rows,) = np.nonzero([other == key for other in keys])
        errors = results["validation_error"][rows]
        expected = np.where(errors == min(errors), 1 + errors, np.nan)
        np.testing.assert_array_equal(results["test_error"][rows], expected)


@pytest.mark.slow
def test_every_search_has_its_trials_and_one_is_tested(
    small_run: tuple[Any, Path],
) -> None:
    results, _ = small_run
    for name in ("sampler", "coordinates", "seed", "trial"):
        _, counts = np.unique(results[name], return_counts=True)
        assert len(set(counts)) == 1 and counts.sum() == 3 * 2 * 2 * 4
    for start in range(0, 48, 4):
        part = {name: column[start : start + 4] for name, column in results.items()}
        for name in ("sampler", "coordinates", "seed"):
            assert len({*part[name]}) == 1
        np.testing.assert_array_equal(part["trial"], range(4))
        assert np.isfinite(part["test_error"]).sum() == 1
        space = search.make_spaces("nesterov")[part["coordinates"][0]]
        for name, (low, high) in space.items():
            assert ((part[name] >= low) & (part[name] <= high)).all()
    assert (results["validation_error"] <= 1).all()


@pytest.mark.slow
def test_pairs_of_searches_begin_with_the_same_draws(
    small_run: tuple[Any, Path],
) -> None:
    results, _ = small_run
    rates = [
        search.select(results, "eta", "random", name) for name in search.COORDINATES
    ]
    np.testing.assert_array_equal(*rates)
    assert not np.isin(rates[0][0], rates[0][1]).any()


@pytest.mark.slow
def test_picture_and_csv_are_written(small_run: tuple[Any, Path]) -> None:
    results, out = small_run
    lines = (out / "hyperparameter_search.csv").read_text().splitlines()
    assert lines[0].split(",") == list(results)
    assert len(lines) == 1 + len(results["eta"])
    assert (out / "hyperparameter_search.png").stat().st_size > 10_000
    assert search.table(results).count("regret in the end") == 3


@pytest.mark.slow
def test_two_processes_share_the_trials(
    tmp_path: Path, small_run: tuple[Any, Path], capsys: pytest.CaptureFixture[str]
) -> None:
    url = f"sqlite:///{tmp_path / 'trials.db'}"
    shared = ["--grid", "2", "--seeds", "1", "--storage", url, "--study", "two"]
    small = [*SMALL, *shared]
    command: list[Any] = [sys.executable, "-W", "error", "-c", PROCESS]
    command += [EXAMPLES, tmp_path, *small, "--batch", "1"]
    environment = os.environ | {
        "JAX_DISABLE_MOST_OPTIMIZATIONS": "true",
        "PYTHONPATH": str(EXAMPLES.parent),
    }
    pipes: dict[str, Any] = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [
        subprocess.Popen(command, env=environment, text=True, **pipes) for _ in range(2)
    ]
    for process in processes:
        _, errors = process.communicate(timeout=120)
        assert process.returncode == 0, errors
    names = [f"two/{s}/{c}/0" for s in studies.SAMPLERS for c in search.COORDINATES]
    storage = studies.open_storage(argparse.ArgumentParser(), url)
    assert sorted(names) == sorted(optuna.get_all_study_names(storage))
    for name in names:
        trials = optuna.load_study(study_name=name, storage=storage).get_trials()
        complete = [trial for trial in trials if trial.state.name == "COMPLETE"]
        assert [trial.number for trial in complete] == list(range(4))
        assert len({tuple(trial.params.values()) for trial in complete}) == 4
        assert len({trial.user_attrs["process"] for trial in complete}) == 2
        assert all(trial.state.name == "FAIL" for trial in trials[4:])
    lines = (tmp_path / "hyperparameter_search.csv").read_text().splitlines()
    assert len(lines) == 1 + 6 * 4
    with pytest.raises(SystemExit):
        search.main([*small, "--rule", "sgd", "--out", str(tmp_path)])
    assert "need the same options" in capsys.readouterr().err


@pytest.mark.parametrize(
    "arguments, message",
    [
        (["--grid", "1"], "--grid must be at least 2, --batch"),
        (["--batch", "0"], "--batch and --seeds 1"),
        (["--rule", "adam"], "invalid choice: 'adam'"),
        (["--images", "20"], "but 10 are less than a batch, 16"),
        (["--storage", "nowhere"], "--storage nowhere cannot be used"),
        (["--storage", "mysql+nodriver://x"], "nodriver://x cannot be used"),
        (["--storage", "sqlite:////no/such/folder/x.db"], "unable to open database"),
    ],
)
def test_bad_input_is_refused(
    arguments: list[str],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(studies.time, "sleep", lambda seconds: None)
    with pytest.raises(SystemExit):
        search.main([*arguments, "--out", str(tmp_path)])
    assert message in capsys.readouterr().err
