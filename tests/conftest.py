"""Eight CPU devices, float32 products, no implicit change of rank, no program twice.

On a GPU, with `JAX_PLATFORMS=cuda`, tests marked with `devices(n)` are skipped where
there are fewer; so they are on a CPU of fewer devices, as `XLA_FLAGS` may ask for.
"""

import atexit
import collections
import importlib.metadata
import os
import pathlib
import shutil
import tempfile

import pytest

# First, since the last of two flags of one name holds.
os.environ["XLA_FLAGS"] = "--xla_force_host_platform_device_count=8 " + os.environ.get(
    "XLA_FLAGS", ""
)
if importlib.metadata.version("jaxlib").startswith(("0.8.", "0.9.", "0.10.")):
    # They have a second code generator, which compiles three times as fast.
    os.environ["XLA_FLAGS"] += " --xla_cpu_use_fusion_emitters=false"
# The tolerances are those of float32. A GPU takes products of matrices in TF32.
os.environ["JAX_DEFAULT_MATMUL_PRECISION"] = "highest"
os.environ["JAX_NUMPY_RANK_PROMOTION"] = "raise"
os.environ.setdefault("JAX_PLATFORMS", "cpu")
# One folder for all workers, which inherit the variable.
if "JAX_COMPILATION_CACHE_DIR" not in os.environ:
    os.environ["JAX_COMPILATION_CACHE_DIR"] = tempfile.mkdtemp()
    atexit.register(shutil.rmtree, os.environ["JAX_COMPILATION_CACHE_DIR"], True)
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS", "0")
os.environ.setdefault("JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES", "0")


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items):
    """Mark all but the first rows of long tables as slow, where a module asks for it.

    `pytestmark = pytest.mark.few_rows(2)` stands in modules whose rows take seconds to
    compile. Each law still runs by default, and CI runs it for all rows.
    """
    count = collections.Counter()
    for item in items:
        test = item.nodeid.partition("[")[0]
        count[test] += 1
        for marker in item.iter_markers("few_rows"):
            if count[test] > marker.args[0]:
                item.add_marker(pytest.mark.slow)


def pytest_runtest_setup(item):
    """Skip what wants more devices than there are."""
    import jax

    for marker in item.iter_markers("devices"):
        (wanted,) = marker.args
        if jax.device_count() < wanted:
            pytest.skip(f"wants {wanted} devices, and there are {jax.device_count()}")


@pytest.fixture(scope="module")
def quick_compilation():
    """For tests that compile more than they compute."""
    import jax

    jax.config.update("jax_disable_most_optimizations", True)
    yield
    jax.config.update("jax_disable_most_optimizations", False)


@pytest.fixture(autouse=True)
def numbers_do_not_depend_on_earlier_tests(request):
    """Which differ from run to run where several workers share the tests."""
    import numpy as np
    from flax import nnx

    for name, start in {"RNG": np.random.default_rng, "RNGS": nnx.Rngs}.items():
        if hasattr(getattr(request, "module", None), name):
            setattr(request.module, name, start(0))


@pytest.fixture(autouse=True, scope="module")
def programs_are_freed():
    """Each takes memory maps, of which a process on Linux may have 65,530."""
    yield
    maps = pathlib.Path("/proc/self/maps")
    if not maps.exists() or maps.read_bytes().count(b"\n") > 10_000:
        import jax

        jax.clear_caches()


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Compute what is computed in other ways on a GPU in these ways, on any device."""
    import jax

    from normax._core import norms, scheduling
    from normax.paths import contraction, pair_contraction, programs, saliency

    for module in (norms, scheduling, pair_contraction):
        monkeypatch.setattr(module, "on_cpu", lambda fn, otherwise: otherwise)
    for module in (scheduling, contraction, pair_contraction, programs, saliency):
        monkeypatch.setattr(module, "on_cuda", lambda fn, otherwise: fn)
    jax.clear_caches()
    yield
    jax.clear_caches()


@pytest.fixture(params=["cpu", "gpu"])
def every_form(request):
    """Run a test with the forms of a CPU, and with those of a GPU."""
    if request.param == "gpu":
        request.getfixturevalue("as_on_a_gpu")
    return request.param
