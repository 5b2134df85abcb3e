"""The public surface: documented, typed, light to import, quick to call again."""

import functools
import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest
from flax import nnx

import normax

PUBLIC = {name: getattr(normax, name) for name in dir(normax) if name[0] != "_"}
LAYERS = {
    f"nn.{name}": getattr(normax.nn, name) for name in dir(normax.nn) if name[0] != "_"
}
# Modules of our own are documented like functions, those of Flax by Flax.
MODULES = {"nn.WeightNorm", "nn.BatchRenorm"}
FUNCTIONS = {
    name: value
    for name, value in (PUBLIC | LAYERS).items()
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
    modules = [n for n, value in (PUBLIC | LAYERS).items() if inspect.ismodule(value)]
    assert modules == ["nn"]
    assert all(value.__module__.startswith("normax.") for value in FUNCTIONS.values())
    assert FUNCTIONS.keys() >= MODULES


def test_layers_are_flax_or_ours():
    for name, value in LAYERS.items():
        if inspect.isclass(value) and issubclass(value, nnx.Module):
            ours = value.__module__.startswith("normax.nn.")
            assert ours == (name in MODULES)
            assert ours or value is getattr(nnx, name.removeprefix("nn."))


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_are_complete(name):
    doc = inspect.getdoc(FUNCTIONS[name])
    assert doc is not None
    returns = "Attributes:" if name in MODULES else "Returns:"
    for section in ("Args:", returns, "Raises:", "Examples:", "References:", "$$"):
        assert section in doc, section
    for parameter in signatures(name)[0].parameters.values():
        stars = {parameter.VAR_POSITIONAL: "*", parameter.VAR_KEYWORD: "**"}
        assert f"\n  {stars.get(parameter.kind, '')}{parameter.name}: " in doc
    assert doc.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_annotated(name):
    for signature in signatures(name):
        for parameter in signature.parameters.values():
            assert parameter.annotation is not inspect.Parameter.empty
    assert signature.return_annotation is not inspect.Signature.empty


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
