"""The public surface: documented, typed, light to import, quick to call again."""

import inspect
import subprocess
import sys

import jax
import jax.numpy as jnp
import optax
import pytest

import normax

PUBLIC = {name: getattr(normax, name) for name in dir(normax) if name[0] != "_"}
FUNCTIONS = {name: f for name, f in PUBLIC.items() if inspect.isfunction(f)}


def test_public_names():
    modules = [name for name, value in PUBLIC.items() if inspect.ismodule(value)]
    assert modules == []
    assert all(value.__module__.startswith("normax.") for value in FUNCTIONS.values())


@pytest.mark.parametrize("name", FUNCTIONS)
def test_docstrings_are_complete(name):
    doc = inspect.getdoc(FUNCTIONS[name])
    assert doc is not None
    for section in ("Args:", "Returns:", "Raises:", "Examples:", "References:", "$$"):
        assert section in doc, section
    for parameter in inspect.signature(FUNCTIONS[name]).parameters:
        assert f"\n  {parameter}: " in doc
    assert doc.splitlines()[0].endswith(".")


@pytest.mark.parametrize("name", FUNCTIONS)
def test_signatures_are_annotated(name):
    signature = inspect.signature(FUNCTIONS[name])
    assert signature.return_annotation is not inspect.Signature.empty
    for parameter in signature.parameters.values():
        assert parameter.annotation is not inspect.Parameter.empty


def test_import_costs_little():
    def modules(code):
        code = f"import {code}, sys; print(*sys.modules)"
        run = subprocess.run([sys.executable, "-c", code], check=True, stdout=-1)
        return set(run.stdout.decode().split())

    # Not seconds, of which a busy machine makes more: what those of optax and Flax
    # do not load already.
    more = modules("normax") - modules("optax, flax")
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
