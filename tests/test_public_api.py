"""The public surface: documented, typed, light to import, quick to call again."""

import functools
import inspect
import pathlib
import re
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import normax

TOPICS = {name: value for name, value in vars(normax).items() if name in normax.__all__}
TOPICS = {name: value for name, value in TOPICS.items() if inspect.ismodule(value)}
PACKAGES = {"normax": normax} | {f"normax.{n}": topic for n, topic in TOPICS.items()}
PUBLIC = {
    f"{package}.{name}": getattr(module, name)
    for package, module in PACKAGES.items()
    for name in module.__all__
}
# Modules of our own are documented like functions, those of Flax by Flax.
MODULES = {"normax.nn.WeightNorm", "normax.nn.BatchRenorm"}
FUNCTIONS = {
    name: value
    for name, value in PUBLIC.items()
    if inspect.isfunction(value) or name in MODULES
}


def signatures(name):
    """Return what a public name is called with."""
    if name not in MODULES:
        return [inspect.signature(FUNCTIONS[name])]
    # Without self.
    methods = FUNCTIONS[name].__init__, FUNCTIONS[name].__call__
    return [inspect.signature(functools.partial(method, None)) for method in methods]


def test_public_names():
    topics = "inspection invariance nn paths rescaling second_order spheres sweeps"
    assert set(TOPICS) == {*topics.split(), "testing", "theory"}
    # What is flat stands in a topic too, and all that is defined in a topic there only.
    flat = {name for name in normax.__all__ if name not in TOPICS}
    homes = [name for topic in TOPICS.values() for name in topic.__all__]
    assert flat < set(homes) and len(homes) == len(set(homes))
    assert all(value.__module__.startswith("normax.") for value in FUNCTIONS.values())
    assert FUNCTIONS.keys() >= MODULES


@pytest.mark.parametrize("package", PACKAGES)
def test_nothing_else_looks_public(package):
    module = PACKAGES[package]
    folder = pathlib.Path(module.__file__).parent
    files = {path.stem for path in [*folder.glob("*.py"), *folder.glob("*/")]}
    named = {name for name in vars(module) if not name.startswith("_")}
    assert named - files <= set(module.__all__)


def test_layers_are_flax_or_ours():
    for name, value in PUBLIC.items():
        if inspect.isclass(value) and issubclass(value, nnx.Module):
            ours = value.__module__.startswith("normax.nn.")
            assert ours == (name in MODULES)
            assert ours or value is getattr(nnx, name.removeprefix("normax.nn."))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_are_complete(name):
    doc = inspect.getdoc(FUNCTIONS[name])
    assert doc is not None
    returns = "Attributes:" if name in MODULES else "Returns:"
    sections = [returns, "Examples:", "References:", "$$"]
    parameters = signatures(name)[0].parameters.values()
    # What takes nothing, and what raises nothing, does not say so.
    sections += ["Args:"] if parameters else []
    for section in sections:
        assert section in doc, section
    assert not re.search(r"(Args|Raises): *(None|Nothing)", doc)
    for parameter in parameters:
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        assert f"\n  {stars.get(parameter.kind, '')}{parameter.name}: " in doc
    assert doc.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_annotated(name):
    for signature in signatures(name):
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty
    assert signature.return_annotation is not inspect.Signature.empty


TRANSFORMATIONS = {
    name: value
    for name, value in FUNCTIONS.items()
    if "GradientTransformation" in str(inspect.signature(value).return_annotation)
} | {name: rule.make for name, rule in normax.UPDATE_RULES.items()}


@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_help_shows_short_signatures(name):
    assert len(TRANSFORMATIONS) > 20
    signature = inspect.signature(TRANSFORMATIONS[name])
    for parameter in signature.parameters.values():
        assert len(str(parameter)) < 80, parameter
        assert not re.search(r"numpy\.|Union|typing\.Call", str(parameter)), parameter
    assert len(str(signature)) < 60 * (len(signature.parameters) + 2)
    # Optax reads the signature.
    wrapped = optax.inject_hyperparams(TRANSFORMATIONS[name])
    assert inspect.signature(wrapped).parameters == signature.parameters


def test_import_costs_little():
    def modules(code):
        code = f"import {code}, sys; print(*sys.modules)"
        run = subprocess.run([sys.executable, "-c", code], check=True, stdout=-1)
        return set(run.stdout.decode().split())

    # Not seconds, of which a busy machine makes more: what those of optax and Flax
    # do not load already.
    more = modules("normax") - modules("optax, flax.nnx")
    packages = {name.partition(".")[0] for name in more}
    assert packages - sys.stdlib_module_names == {"normax"}


@pytest.mark.slow
def test_calls_outside_jit_compile_once():
    compiled = []

    def listen(event, duration, **kwargs):
        del duration, kwargs
        if event.endswith("backend_compile_duration"):
            compiled.append(event)

    params = {"kernel": jnp.ones((4, 3)), "bias": jnp.ones(3)}
    tx = optax.chain(
        normax.remove_radial_component(),
        normax.project_unit_norm(),
        normax.monitor_weight_dynamics(),
    )
    state = tx.init(params)
    jax.monitoring.register_event_duration_secs_listener(listen)
    for repetition in range(2):
        before = len(compiled)
        normax.projection_unit_norm(params)
        normax.angular_update(params, params)
        tx.update(params, state, params)
        assert (len(compiled) > before) == (repetition == 0)
