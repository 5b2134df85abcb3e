"""The examples, run small."""

import importlib
import sys
import urllib.error
from pathlib import Path
from typing import Any

import jax
import numpy as np
import pytest
from flax import nnx

sys.path.insert(0, str(Path(__file__).parents[2] / "examples"))
convnet: Any = importlib.import_module("convnet")
datasets: Any = importlib.import_module("datasets")
effective_learning_rate: Any = importlib.import_module("effective_learning_rate")
initialization: Any = importlib.import_module("initialization")
normalizers: Any = importlib.import_module("normalizers")
optimal_learning_rate: Any = importlib.import_module("optimal_learning_rate")
optimizer_trajectories: Any = importlib.import_module("optimizer_trajectories")
path_sgd: Any = importlib.import_module("path_sgd")
table_1: Any = importlib.import_module("table_1")

pytestmark = pytest.mark.usefixtures("quick_compilation")


@pytest.fixture
def arrays() -> dict[str, np.ndarray]:
    images = np.zeros((6, 4, 4), np.uint8)
    labels = np.arange(6)
    return {"x_train": images, "y_train": labels, "x_test": images, "y_test": labels}


@pytest.fixture(scope="module")
def small_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("out")
    arguments = ["--grid", "2", "--epochs", "4", "--rule", "nesterov"]
    arguments += ["--checkpoints", str(out / "runs")]
    return effective_learning_rate.main([*arguments, "--out", str(out)]), out


@pytest.mark.slow
def test_effective_learning_rate_measures_every_grid_point(
    small_run: tuple[Any, Path],
) -> None:
    results, _ = small_run
    assert {len(column) for column in results.values()} == {2 * 2 * 2}
    assert not results["diverged"].any()
    assert ((results["test_error"] >= 0) & (results["test_error"] <= 1)).all()


@pytest.mark.slow
def test_finished_runs_are_not_repeated(small_run: tuple[Any, Path]) -> None:
    results, out = small_run
    arguments = ["--grid", "2", "--epochs", "4", "--rule", "nesterov"]
    arguments += ["--checkpoints", str(out / "runs"), "--out", str(out / "again")]
    before = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    again = effective_learning_rate.main(arguments)
    after = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    assert before == after and len(before) == 8
    for name, column in results.items():
        np.testing.assert_array_equal(again[name], column)


@pytest.mark.slow
def test_projection_keeps_unit_norm(small_run: tuple[Any, Path]) -> None:
    results, _ = small_run
    norms = results["norm"][results["projected"]]
    # The first layer has eight weight vectors.
    np.testing.assert_allclose(norms, np.sqrt(8), rtol=1e-6)


@pytest.mark.slow
def test_decay_shrinks_the_norm_and_forgets_the_start(
    small_run: tuple[Any, Path],
) -> None:
    results, _ = small_run
    points = effective_learning_rate.select(results, "nesterov", False)
    assert points["norm"][1, 1] < points["norm"][0, 1]
    assert points["memory"][1, 1] < 0.1 < points["memory"][0, 0]


@pytest.mark.slow
def test_effective_learning_rate_writes_picture_and_csv(
    small_run: tuple[Any, Path],
) -> None:
    results, out = small_run
    lines = (out / "effective_learning_rate.csv").read_text().splitlines()
    assert lines[0].split(",") == list(results)
    assert len(lines) == 1 + len(results["eta"])
    assert (out / "effective_learning_rate.png").stat().st_size > 10_000


@pytest.mark.slow
@pytest.mark.parametrize("rule, power", [("nesterov", 2), ("adam", 1)])
def test_summary_recovers_the_exponent(rule: str, power: int) -> None:
    eta, lam = np.meshgrid(*effective_learning_rate.grid(rule, 5))
    effective = (eta**2 * lam**power) ** (1 / (power + 2))
    columns = {
        "eta": eta,
        "lambda": lam,
        "norm": np.exp(effective) * (eta / lam) ** (1 / (power + 2)),
        "memory": np.zeros_like(eta),
        "test_error": np.minimum(effective, 1),
        "diverged": eta > eta.max() / 2,
    }
    once = {name: column.ravel() for name, column in columns.items()}
    results = {name: np.tile(column, 2) for name, column in once.items()}
    results["rule"] = np.full(50, rule)
    results["projected"] = np.arange(50) >= 25
    summary = effective_learning_rate.summarize(results, rule)
    assert summary["settled"] == 20
    assert summary["exponent"] == pytest.approx(summary["predicted"], abs=1e-6)
    assert summary["along"] < 1e-6 < summary["across"]
    assert "10 of 50 runs diverged" in effective_learning_rate.table(results, [rule])
    effective_learning_rate.picture(results, [rule]).canvas.draw()


@pytest.mark.parametrize("rule, power", [("nesterov", 2), ("rmsprop", 1)])
def test_best_learning_rates_give_the_slope(rule: str, power: int) -> None:
    lam, eta = np.meshgrid(np.geomspace(1e-3, 1, 7), np.geomspace(1e-5, 1, 16))
    lam, eta = lam.T, eta.T
    best = 2e-3 * lam ** (-power / 2)
    rng = np.random.default_rng(0)
    error = 0.1 + 0.01 * np.log(eta / best) ** 2 + 2e-4 * rng.normal(size=eta.shape)
    columns = {
        "lambda": lam,
        "eta": eta,
        "test_error": np.minimum(error, 0.9),
        # The smallest decay has not settled; the largest rates diverge.
        "memory": np.where(lam < 2e-3, 0.5, 0.01),
        "diverged": eta > 100 * best,
    }
    results = {name: column.ravel() for name, column in columns.items()}
    results |= {"rule": np.full(eta.size, rule), "seed": np.zeros(eta.size)}
    points = optimal_learning_rate.select(results, rule)
    found = optimal_learning_rate.fit(points)
    # The best rate of SGD for the smallest decay lies beyond the grid.
    np.testing.assert_array_equal(found.inside, best[:, 0] < 1)
    np.testing.assert_array_equal(found.settled, lam[:, 0] > 2e-3)
    np.testing.assert_allclose(found.best[1:], best[1:, 0], rtol=0.05)
    assert found.slope == pytest.approx(-power / 2, abs=0.02)
    assert abs(found.slope + power / 2) < found.halfwidth < 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    "rule, power, eta, lam", [("sgd", 2, 0.02, 1.0), ("adam", 1, 0.004, 0.4)]
)
def test_scaled_kernels_with_a_scaled_rate_learn_the_same(
    rule: str, power: int, eta: float, lam: float, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Equal effective rates train alike, unless the head's rate is scaled too."""
    course = convnet.make_course
    scale = 4.0

    def scaled(*arguments: Any) -> Any:
        model, order, keys = course(*arguments)
        for conv in model.convs:
            conv.kernel[...] *= scale
        return convnet.Course(model, order, keys)

    setting = convnet.Setting((4, 4), (2, 2), 32, 2, False)
    data = datasets.load("digits")
    scaled_eta, scaled_lam = eta * scale**power, lam / scale**2
    found = {}
    for other_rate in (eta, None):
        train = convnet.make_train(rule, data, setting, other_rate=other_rate)
        plain = train(eta, lam)
        with monkeypatch.context() as patch:
            patch.setattr(convnet, "make_course", scaled)
            train = convnet.make_train(rule, data, setting, other_rate=other_rate)
        found[other_rate] = jax.device_get((plain, train(scaled_eta, scaled_lam)))
    plain, scaled_run = found[eta]
    assert scaled_run["norm"] == pytest.approx(scale * plain["norm"], rel=2e-3)
    assert scaled_run["memory"] == pytest.approx(plain["memory"], rel=0.02)
    assert abs(scaled_run["test_error"] - plain["test_error"]) < 0.01
    np.testing.assert_array_equal(found[None][0]["test_error"], plain["test_error"])
    assert abs(found[None][1]["test_error"] - plain["test_error"]) > 0.05


def test_best_learning_rates_at_the_edge_do_not_count() -> None:
    lam, eta = np.meshgrid(np.geomspace(0.01, 1, 3), [0.1, 1.0, 10.0], indexing="ij")
    columns = {"lambda": lam, "eta": eta, "test_error": eta / 20}
    columns |= {"memory": np.zeros((3, 3)), "diverged": np.zeros((3, 3), bool)}
    columns |= {"rule": np.full((3, 3), "adam"), "seed": np.zeros((3, 3))}
    results = {name: column.ravel() for name, column in columns.items()}
    found = optimal_learning_rate.fit(optimal_learning_rate.select(results, "adam"))
    assert not found.inside.any() and np.isnan(found.slope)
    np.testing.assert_allclose(found.best, 0.1)
    optimal_learning_rate.picture(results, ["adam"]).canvas.draw()


@pytest.mark.slow
def test_optimal_learning_rate_validates_on_held_out_images(tmp_path: Path) -> None:
    small = ["--rule", "adam", "--decays", "3", "--rates", "3", "--epochs", "2"]
    results = optimal_learning_rate.main([*small, "--out", str(tmp_path)])
    assert {len(column) for column in results.values()} == {9}
    # 259 of 1297 images are held out.
    counts = results["test_error"] * 259
    np.testing.assert_allclose(counts, counts.round(), atol=1e-3)
    assert (tmp_path / "optimal_learning_rate.csv").exists()
    assert (tmp_path / "optimal_learning_rate.png").stat().st_size > 10_000
    data = datasets.load("digits")
    held = optimal_learning_rate.hold_out(data)
    assert (len(held.x_train), len(held.x_test)) == (1038, 259)
    images = np.concatenate([held.x_train, held.x_test]).reshape(1297, -1)
    expected = np.sort(data.x_train.reshape(1297, -1).view("V64"), axis=0)
    np.testing.assert_array_equal(np.sort(images.view("V64"), axis=0), expected)


def test_unknown_rule_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        effective_learning_rate.main(["--rule", "newton"])
    assert "invalid choice: 'newton'" in capsys.readouterr().err


def test_matmul_is_the_convolution() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 8, 8, 3)).astype(np.float32)
    kernel = rng.normal(size=(3, 3, 3, 4)).astype(np.float32)
    for strides in ((1, 1), (2, 2)):
        expected = convnet.conv_general_dilated(
            x,
            kernel,
            strides,
            ((1, 1), (1, 1)),
            dimension_numbers=("NHWC", "HWIO", "NHWC"),
        )
        actual = convnet.conv_as_matmul(x, kernel, strides)
        np.testing.assert_allclose(actual, expected, atol=1e-5)


@pytest.mark.parametrize(
    ("device", "widest", "as_matmul"),
    [("cpu", 512, True), ("gpu", 32, True), ("gpu", 64, False), ("tpu", 8, False)],
)
def test_convolutions_are_what_was_measured_as_faster(
    device: str, widest: int, as_matmul: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    chosen = convnet.faster_convolution(widest)
    assert (chosen is convnet.conv_as_matmul) == as_matmul


def test_memory_is_what_is_left_of_the_start() -> None:
    arrays = [[1.0, 0]], [[0.5, 2]], [[0.3, 0.4]]
    start, longer, shorter = np.array(arrays, np.float32)
    assert convnet.memory(start, longer, 2) == pytest.approx(0.5**4)
    assert convnet.memory(start, shorter, 1) == pytest.approx(0.6**3)
    assert convnet.memory(start, -longer, 2) == 0


def test_images_are_moved_by_four_pixels_and_flipped() -> None:
    images = np.random.default_rng(0).integers(1, 256, (64, 6, 5, 3), np.uint8)
    moved = np.asarray(convnet.shift_and_flip(jax.random.key(0), images))
    assert moved.dtype == np.uint8
    found = []
    for image, result in zip(images, moved, strict=True):
        padded = np.pad(image, ((4, 4), (4, 4), (0, 0)))
        found += [
            (down, right, flipped)
            for down in range(9)
            for right in range(9)
            for flipped in (False, True)
            if np.array_equal(
                padded[down : down + 6, right : right + 5][:, :: 1 - 2 * flipped],
                result,
            )
        ]
    assert len(found) == 64
    ends = np.min(found, axis=0), np.max(found, axis=0)
    np.testing.assert_array_equal(ends, [(0, 0, False), (8, 8, True)])


def test_digits_are_split_once() -> None:
    digits = datasets.load("digits")
    assert digits.x_train.shape == (1297, 8, 8, 1)
    assert digits.x_test.shape == (500, 8, 8, 1)
    assert digits.x_train.dtype == np.uint8
    assert set(digits.y_test) == set(range(10))


def test_file_is_read_from_the_folder_of_the_environment(
    arrays: dict[str, np.ndarray], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    np.savez(tmp_path / "mnist.npz", **arrays)  # type: ignore[arg-type]
    monkeypatch.setenv("NORMAX_DATA", str(tmp_path))
    assert datasets.load("mnist").x_train.shape == (6, 4, 4, 1)


def test_openml_copy_is_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    ramp = np.arange(32.0)
    image = np.stack([np.add.outer(ramp, 2 * ramp), *np.zeros((2, 32, 32))])
    rows = np.tile(image.ravel(), (60, 1))
    labels = np.tile(["1", "2", "3"], 20)
    monkeypatch.setattr(datasets, "fetch_openml", lambda **options: (rows, labels))
    source = datasets._Source(0, 40, (32, 32, 3))
    monkeypatch.setitem(datasets._OPENML, "cifar10", source)
    dataset = datasets.load("cifar10", tmp_path)
    np.testing.assert_array_equal(dataset.x_train[0], image.transpose(1, 2, 0))
    assert len(dataset.x_train) == 40
    assert len(dataset.x_test) == 20
    assert set(dataset.y_train) == {0, 1, 2}
    monkeypatch.delattr(datasets, "fetch_openml")
    np.testing.assert_array_equal(datasets.load("cifar10", tmp_path).x_test, dataset[2])


def test_unknown_set_is_refused() -> None:
    with pytest.raises(ValueError, match=r"one of digits, mnist, .* got 'imagenet'"):
        datasets.load("imagenet")


def test_without_file_and_network_the_error_says_where_to_put_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def unreachable(**options: Any) -> None:
        raise urllib.error.URLError("no network")

    monkeypatch.setattr(datasets, "fetch_openml", unreachable)
    with pytest.raises(FileNotFoundError, match=r"svhn\.npz.*x_train.*--data"):
        datasets.load("svhn", tmp_path)


@pytest.mark.parametrize(
    "change, message",
    [
        ({"x_test": None}, "x_test is missing"),
        ({"x_train": np.zeros((6, 4, 4))}, "x_train in .* must be uint8"),
        ({"y_test": np.zeros(5, int)}, r"y_test in .* integers of shape \(6,\)"),
        ({"y_train": np.zeros(6)}, "y_train in .* must be integers"),
    ],
)
def test_wrong_arrays_are_refused(
    arrays: dict[str, Any], tmp_path: Path, change: dict[str, Any], message: str
) -> None:
    wrong = {k: v for k, v in (arrays | change).items() if v is not None}
    np.savez(tmp_path / "mnist.npz", **wrong)
    with pytest.raises(ValueError, match=message):
        datasets.load("mnist", tmp_path)


def test_broken_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "mnist.npz").write_bytes(b"PK no archive")
    with pytest.raises(ValueError, match=r"mnist\.npz is no readable \.npz archive"):
        datasets.load("mnist", tmp_path)


def test_bad_input_is_refused_before_training(
    tmp_path: Path, arrays: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "mnist.npz", **arrays)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    few = ["--dataset", "mnist", "--data", str(tmp_path), "--out", str(tmp_path)]
    for arguments, message in (
        (few, "a batch is 128 images, but mnist has only 6"),
        ([*few, "--images", "7"], "--images must be from 1 to 6"),
        (["--images", "0"], "--images must be from 1 to 1297"),
        (["--out", str(tmp_path / "file")], "File exists"),
    ):
        with pytest.raises(SystemExit):
            effective_learning_rate.main(arguments)
        assert message in capsys.readouterr().err


def test_a_grid_that_diverged_is_drawn_and_said() -> None:
    count = 2 * 4
    results = {
        "rule": np.array(["adam"] * count),
        "projected": np.repeat([False, True], 4),
        "eta": np.tile([0.1, 1.0], 4),
        "lambda": np.tile([0.01, 0.01, 0.1, 0.1], 2),
        "norm": np.full(count, np.nan),
        "memory": np.full(count, np.nan),
        "test_error": np.full(count, 0.9),
        "diverged": np.full(count, True),
    }
    assert "8 of 8 runs diverged" in effective_learning_rate.table(results, ["adam"])
    figure = effective_learning_rate.picture(results, ["adam"])
    figure.canvas.draw()


@pytest.mark.slow
def test_table_1_measures_the_derived_exponents(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    rules = ["sgd", "rmsprop"]
    arguments = ["--rule", *rules, "--grid", "2", "--steps", "1200"]
    results = table_1.main([*arguments, "--out", str(tmp_path)])
    assert {len(column) for column in results.values()} == {2 * 2 * 2}
    laws = (((1 / 4, -1 / 4), (1 / 2, 1 / 2)), ((1 / 3, -1 / 3), (2 / 3, 1 / 3)))
    for rule, law in zip(rules, laws, strict=True):
        np.testing.assert_allclose(table_1.measured(results, rule), law, atol=0.02)
        np.testing.assert_allclose(table_1.derived(rule), law, atol=1e-4)
    printed = capsys.readouterr().out
    assert "η^1/2 λ^1/2" in printed
    assert "η^1/2 λ^-1/2 !" in printed
    assert "η^2/3 λ^-1/3 !" in printed
    assert (tmp_path / "table_1.png").stat().st_size > 10_000
    lines = (tmp_path / "table_1.csv").read_text().splitlines()
    assert lines[0].split(",") == list(results)
    assert len(lines) == 1 + 8


@pytest.mark.slow
def test_table_1_names_its_misprints() -> None:
    for rule, (norm, rate) in table_1.PRINTED.items():
        derived_norm, derived_rate = table_1.derived(rule)
        np.testing.assert_allclose(norm, derived_norm, atol=1e-4)
        # The printed rate is right for normalized SGD alone.
        right = np.allclose(rate, derived_rate, atol=1e-4)
        assert right == (rule == "normalized_sgd")


def test_table_1_refuses_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--grid", "1"], "--grid must be at least 2"),
        (["--out", str(tmp_path / "file")], "File exists"),
        (["--rule", "adagrad"], "invalid choice: 'adagrad'"),
    ):
        with pytest.raises(SystemExit):
            table_1.main(arguments)
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def path_sgd_run(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("out")
    return small_path_sgd(out), out


def small_path_sgd(out: Path) -> Any:
    small = ["--width", "32", "--epochs", "4", "--seeds", "1"]
    folders = ["--out", str(out), "--checkpoints", str(out / "runs")]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(path_sgd, "STEP_SIZES", np.array([1e-1, 1e-2]))
        return path_sgd.main([*small, *folders])


@pytest.mark.slow
def test_path_sgd_trains_alike_from_both_starts(path_sgd_run: tuple[Any, Path]) -> None:
    results, _ = path_sgd_run
    assert {len(column) for column in results.values()} == {3 * 2 * 5}
    one, other = (
        path_sgd.select(results, "Path-SGD", start) for start in path_sgd.STARTS
    )
    np.testing.assert_array_equal(one["step_size"], other["step_size"])
    np.testing.assert_allclose(one["cross_entropy"], other["cross_entropy"], rtol=1e-3)
    assert path_sgd.difference(results)["cross_entropy"] < 1e-3
    assert one["test_error"][0, -1] < 0.5 * one["test_error"][0, 0]
    assert not path_sgd.diverged(one).any()


@pytest.mark.slow
@pytest.mark.parametrize("rule", ["SGD", "AdaGrad"])
def test_other_rules_do_not(path_sgd_run: tuple[Any, Path], rule: str) -> None:
    results, _ = path_sgd_run
    one, other = (path_sgd.select(results, rule, start) for start in path_sgd.STARTS)
    first = one["cross_entropy"][0, 0], other["cross_entropy"][0, 0]
    assert first[0] == pytest.approx(first[1], rel=1e-5)
    assert one["cross_entropy"][0, -1] < 0.7 * first[0]
    assert not other["cross_entropy"][0, -1] < 2 * one["cross_entropy"][0, -1]


@pytest.mark.slow
def test_path_sgd_writes_picture_and_csv(path_sgd_run: tuple[Any, Path]) -> None:
    results, out = path_sgd_run
    lines = (out / "path_sgd.csv").read_text().splitlines()
    assert lines[0].split(",") == list(results)
    assert len(lines) == 1 + len(results["epoch"])
    assert (out / "path_sgd.png").stat().st_size > 10_000


@pytest.mark.slow
def test_finished_runs_of_path_sgd_are_not_repeated(
    path_sgd_run: tuple[Any, Path],
) -> None:
    results, out = path_sgd_run
    runs = {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    # There are two step sizes for each of five choices, and six experiments.
    assert len(runs) == 2 * 5 + 6
    again = small_path_sgd(out)
    assert runs == {path: path.stat().st_mtime_ns for path in (out / "runs").iterdir()}
    for name, column in results.items():
        np.testing.assert_array_equal(again[name], column)


def test_step_size_is_that_of_the_smallest_error_reached_first() -> None:
    nan = np.nan
    errors = [[nan, nan, nan], [0.5, 0.2, 0.1], [0.5, 0.1, 0.3], [0.2, 0.2, 0.2]]
    assert path_sgd.fastest(np.array(errors)) == 2


def test_dropout_keeps_half_of_the_units_and_the_mean() -> None:
    rng = np.random.default_rng(0)
    x = rng.normal(size=(2, 5)).astype(np.float32)
    params = [rng.normal(size=shape).astype(np.float32) for shape in ((5, 4), (4, 3))]
    keys = jax.random.split(jax.random.key(0), 4000)
    outputs = jax.jit(jax.vmap(lambda key: path_sgd.network(params, x, key)))(keys)
    units = np.maximum(x @ params[0], 0)
    # Twice a fair coin has mean 1 and variance 1.
    variance = units**2 @ params[1] ** 2
    np.testing.assert_allclose(outputs.var(0), variance, rtol=0.1)
    error = (outputs.mean(0) - units @ params[1]) / np.sqrt(variance / len(keys))
    assert np.abs(error).max() < 4


def test_validation_set_is_taken_from_the_training_set() -> None:
    data = datasets.load("digits")
    for split, train, test in zip(
        path_sgd.splits(data, 0), (1038, 1297), (259, 500), strict=True
    ):
        used = [set(np.flatnonzero(share)) for share in split.shares]
        assert used[0] == set(split.train)
        assert (len(used[0]), len(used[1])) == (train, test)
        assert not used[0] & used[1]
        limit = 1297 if test == 259 else 1797
        assert max(used[0] | used[1]) == limit - 1
        np.testing.assert_allclose([share.sum() for share in split.shares], 1, 1e-5)


@pytest.mark.slow
def test_measures_are_means_over_their_own_images() -> None:
    x = np.array([[1.0, 0.0], [0.0, 1.0], [2.0, 0.0], [np.inf, 0.0]], np.float32)
    examples = x, np.array([0, 0, 1, 1])
    split = path_sgd.make_split(4, np.array([0, 1]), np.array([1, 2]))
    measured = path_sgd.measure(examples, split.shares, [np.eye(2, dtype=np.float32)])
    losses = np.log1p(np.exp([-1.0, 1.0])).mean()
    values = [measured[name] for name in path_sgd.MEASURES]
    np.testing.assert_allclose(values, [losses, 0.5, 1.0], rtol=1e-6)
    split = path_sgd.make_split(4, np.array([0, 3]), np.array([1]))
    measured = path_sgd.measure(examples, split.shares, [np.eye(2, dtype=np.float32)])
    values = [measured[name] for name in path_sgd.MEASURES]
    np.testing.assert_array_equal(values, [np.nan, np.nan, 1.0])


def test_path_sgd_says_what_diverged() -> None:
    runs = [(r, s, i) for r in path_sgd.RULES for s in path_sgd.STARTS for i in (0, 1)]
    epochs = 3
    results = {
        name: np.repeat([run[position] for run in runs], epochs)
        for position, name in enumerate(("rule", "start", "seed"))
    }
    count = len(runs)
    results["step_size"] = np.full(count * epochs, 0.01)
    results["epoch"] = np.tile(np.arange(epochs), count)
    for name in path_sgd.MEASURES:
        results[name] = np.tile([0.5, 0.25, 0.125], count)
    lost = (results["rule"] == "SGD") & (results["start"] == "unbalanced")
    for name in path_sgd.MEASURES:
        results[name][lost & (results["seed"] == 1) & (results["epoch"] > 0)] = np.nan
    slow = (results["rule"] == "AdaGrad") & (results["epoch"] == 2)
    results["cross_entropy"][slow] = 0.2
    text = path_sgd.table(results)
    rows = [line.split()[5:] for line in text.splitlines()[3:9]]
    assert rows == [
        ["12.50%", "2"],
        ["12.50%", "2"],
        ["12.50%", "2"],
        ["nan%", "-", "(diverged:", "1", "of", "2)"],
        ["12.50%", "-"],
        ["12.50%", "-"],
    ]
    assert text.count("1e-2 ") == 6
    path_sgd.picture(results, "digits", True).canvas.draw()


def test_path_sgd_refuses_bad_input(
    tmp_path: Path, arrays: dict[str, np.ndarray], capsys: pytest.CaptureFixture[str]
) -> None:
    np.savez(tmp_path / "mnist.npz", **arrays)  # type: ignore[arg-type]
    (tmp_path / "file").touch()
    few = ["--dataset", "mnist", "--data", str(tmp_path), "--out", str(tmp_path)]
    for arguments, message in (
        (few, "a batch is 100 images, but mnist has only 6 to train on"),
        (["--out", str(tmp_path / "file")], "File exists"),
        (["--seeds", "0"], "--seeds must be at least 1"),
    ):
        with pytest.raises(SystemExit):
            path_sgd.main(arguments)
        assert message in capsys.readouterr().err


@pytest.mark.slow
def test_initialization_measures_the_products(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    results = initialization.main(["--networks", "10", "--out", str(tmp_path)])
    assert {len(column) for column in results.values()} == {4 * 2 * 10}
    for measure in initialization.MEASURES:
        ratio = results[measure] / results[f"{measure}_predicted"]
        # The relative error of a network grows by about 15 % with every layer.
        assert np.abs(np.log(ratio)).max() < 0.5
        assert np.abs(np.log(ratio)).mean() < 0.15
    glorot = initialization.select(results, "Glorot", "linear")
    np.testing.assert_allclose(glorot["activation_predicted"], 1)
    normal = initialization.select(results, "standard normal", "linear")
    np.testing.assert_allclose(normal["activation_predicted"][-1], 1e20, rtol=1e-6)
    assert "Kaiming" in capsys.readouterr().out
    assert (tmp_path / "initialization.png").stat().st_size > 10_000
    lines = (tmp_path / "initialization.csv").read_text().splitlines()
    assert lines[0].split(",") == list(results)
    assert len(lines) == 1 + 80


@pytest.mark.slow
def test_normalizers_train_in_every_condition() -> None:
    training = normalizers.Training("LayerNorm", 64, epochs=3, steps=10, dense=True)
    found = normalizers.train_all(training, 0.1, list(normalizers.CONDITIONS), 2)
    assert {values.shape for values in found.values()} == {(4, 2, 3)}
    plain, decay, projection, both = found["norm"][:, :, -1]
    np.testing.assert_allclose((projection, both), 1, rtol=1e-5)
    assert (decay < plain).all()
    assert (found["training_loss"][:, :, -1] < found["training_loss"][:, :, 0]).all()
    assert ((found["angle"] > 0) & (found["angle"] < 1)).all()
    # Decay on the sphere changes the rate by the factor 1 - eta lambda.
    losses = found["training_loss"][2:]
    np.testing.assert_allclose(losses[0], losses[1], rtol=0.15)


@pytest.mark.slow
@pytest.mark.parametrize("name", normalizers.NORMALIZERS)
def test_every_network_has_its_normalizer(name: str) -> None:
    network = normalizers.Network(normalizers.Training(name, 64, 20, 20), nnx.Rngs(0))
    kinds = {type(module).__name__ for _, module in nnx.iter_modules(network)}
    assert name == "none" or name in kinds
    assert network(np.ones((2, 8, 8, 1), np.float32)).shape == (2, 10)


@pytest.mark.slow
def test_normalizers_writes_pictures_and_tables(
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    def train_all(training: Any, rate: float, conditions: Any, seeds: int) -> Any:
        shape = len(conditions), seeds, training.epochs
        error = 0.5 if training.normalizer == "BatchNorm" else 0.25
        error *= rate / normalizers.LEARNING_RATE * 64 / training.batch_size
        return {name: np.full(shape, error) for name in normalizers.MEASURES}

    monkeypatch.setattr(normalizers, "train_all", train_all)
    small = ["--epochs", "8", "--seeds", "2", "--batch-sizes", "4", "16"]
    experiment = normalizers.main([*small, "--out", str(tmp_path)])
    assert {len(column) for column in experiment.curves.values()} == {8 * 4 * 2 * 8}
    assert {len(column) for column in experiment.batch_sizes.values()} == {2 * 2 * 2}
    lines = capsys.readouterr().out.splitlines()
    assert lines[3].split() == ["none", *["25.0%", "/", "0.25", "/", "14.32"] * 4]
    assert lines[-2].split() == ["BatchRenorm", "25.0+-0.0%", "25.0+-0.0%"]
    for name, results in (
        ("normalizers", experiment.curves),
        ("normalizers_batch_sizes", experiment.batch_sizes),
    ):
        rows = (tmp_path / f"{name}.csv").read_text().splitlines()
        assert rows[0].split(",") == list(results)
        assert len(rows) == 1 + len(results["seed"])
    assert (tmp_path / "normalizers.png").stat().st_size > 10_000


@pytest.mark.parametrize("example", [initialization, normalizers])
def test_initialization_and_normalizers_refuse_bad_input(
    example: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    number = "--networks" if example is initialization else "--seeds"
    for arguments, message in (
        ([number, "0"], "at least 1"),
        (["--out", str(tmp_path / "file")], "File exists"),
    ):
        with pytest.raises(SystemExit):
            example.main(arguments)
        assert message in capsys.readouterr().err


@pytest.fixture(scope="module")
def trajectories(tmp_path_factory: pytest.TempPathFactory) -> tuple[Any, Path]:
    out = tmp_path_factory.mktemp("out")
    names = ("gradient descent", "momentum", "Newton", "Hessian-free")
    small = {name: optimizer_trajectories.RULES[name] for name in names}
    jax.config.update("jax_disable_most_optimizations", True)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(optimizer_trajectories, "RULES", small)
        arguments = ["--steps", "40", "--grid", "9", "--out", str(out)]
        results = optimizer_trajectories.main(arguments)
    jax.config.update("jax_disable_most_optimizations", False)
    return results, out


@pytest.mark.slow
def test_second_order_methods_need_few_steps(trajectories: tuple[Any, Path]) -> None:
    runs = trajectories[0]["runs"]
    steps = {name: {r: run["steps"] for r, run in runs[name].items()} for name in runs}
    assert steps["ravine"]["Newton"] == 1
    assert steps["saddle"]["Newton"] == 41  # It goes to the saddle and never succeeds.
    np.testing.assert_allclose(runs["saddle"]["Newton"]["path"][-1], 0, atol=1e-5)
    for name in runs:
        assert steps[name]["Hessian-free"] <= 15
        assert steps[name]["gradient descent"] > 15
    starts = {name: [run["gap"][0] for run in runs[name].values()] for name in runs}
    assert all(len(set(gaps)) == 1 for gaps in starts.values())


@pytest.mark.slow
def test_momentum_is_measured_to_be_what_it_is_in_theory(
    trajectories: tuple[Any, Path],
) -> None:
    phases = trajectories[0]["phases"]
    np.testing.assert_allclose(phases["measured"], phases["exact"], atol=0.01)
    assert phases["best_exact"] == pytest.approx(2 / 3, rel=1e-3)
    assert phases["exact"].min() > 2 / 3
    eta, rho = 0.05, 0.3
    matrices = np.array([[[1 + rho - eta * c, -rho], [1.0, 0.0]] for c in (1, 25)])
    expected = np.abs(np.linalg.eigvals(matrices)).max()
    exact = optimizer_trajectories.closed_form(np.array(eta), np.array(rho))
    assert exact == pytest.approx(expected)


@pytest.mark.slow
def test_optimizer_trajectories_writes_picture_and_csv(
    trajectories: tuple[Any, Path],
) -> None:
    _, out = trajectories
    lines = (out / "optimizer_trajectories.csv").read_text().splitlines()
    assert len(lines) == 1 + 3 * 4 * 41
    assert len((out / "momentum_phases.csv").read_text().splitlines()) == 1 + 81
    assert (out / "optimizer_trajectories.png").stat().st_size > 10_000


def test_steps_are_counted_until_the_loss_stays_near_the_minimum() -> None:
    losses = np.array(
        [[2, 1.5, 1.0005, 1.4, 1.0001], [2, 1.0001, 1, 1, 1], [2, 1, 1, 1, np.nan]]
    )
    needed = optimizer_trajectories.steps_needed(losses, 1.0)
    np.testing.assert_array_equal(needed, [4, 1, 5])


def test_optimizer_trajectories_refuses_bad_input(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "file").touch()
    for arguments, message in (
        (["--steps", "0"], "--steps must be at least 1"),
        (["--out", str(tmp_path / "file")], "File exists"),
    ):
        with pytest.raises(SystemExit):
            optimizer_trajectories.main(arguments)
        assert message in capsys.readouterr().err
