"""The switches of compile/, what it says where something cannot be had, and the table of private names in its README."""

from __future__ import annotations

import ast
import functools
import json
import logging
import re
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyro
import pytest
import torch
from torch import Tensor, nn

import pyrovae as pv
from pyrovae.cli import main
from pyrovae.compile import choices, doctor, graph, inductor, kernels, notes, settings
from pyrovae.compile import graph as compile_graph
from pyrovae.compile.graph import Staged

PACKAGE = Path(pv.__file__).parent
FOLDER = PACKAGE / "compile"
X = torch.bernoulli(torch.full((12, 6), 0.3), generator=torch.Generator().manual_seed(0))


@pytest.fixture(autouse=True)
def _fresh_notes(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    for variable in ("PYROVAE_COMPILE", "PYROVAE_NATIVE", "PYROVAE_CXX_FLAGS"):
        monkeypatch.delenv(variable, raising=False)
    monkeypatch.setenv("PYROVAE_CACHE", str(tmp_path / "cache"))
    notes.forget()
    yield
    notes.forget()
    choices._answers.clear()


def double(x: Tensor) -> tuple[Tensor, ...]:
    return (2.0 * x,)


# Switches


@pytest.mark.parametrize("asked", settings.BACKENDS)
@pytest.mark.parametrize("allowed", settings.BACKENDS)
def test_the_variable_limits_the_backend(asked: str, allowed: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYROVAE_COMPILE", allowed)
    order = settings.BACKENDS.index
    staged = Staged(double, asked)
    assert staged.backend == min(asked, allowed, key=order)
    assert (staged.reason is None) == (order(asked) <= order(allowed))


def test_a_limited_step_runs_as_asked_by_the_variable(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(graph, "_inductor", lambda *args: pytest.fail("compiled"))
    monkeypatch.setenv("PYROVAE_COMPILE", "aten")
    staged, x = Staged(double), torch.ones(2)
    assert [staged(x)[0].tolist() for _ in range(3)] == [[2.0, 2.0]] * 3
    assert staged.captured
    monkeypatch.setenv("PYROVAE_COMPILE", "eager")
    vae = pv.make_vae(6, latent_dim=2, hidden=[8])
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        history = vae.fit(X, epochs=2, compile=True, progress=False)
        evidence = vae.log_marginal(X, num_samples=20, compile=True, seed=0)
    assert len(history.bound) == 2
    assert evidence.log_px.shape == (12,)


@pytest.mark.parametrize(
    ("variable", "value", "call"),
    [
        ("PYROVAE_COMPILE", "jit", lambda: Staged(double)),
        ("PYROVAE_NATIVE", "yes", kernels.load_library),
        ("PYROVAE_NATIVE", "products", doctor.report),
    ],
)
def test_a_bad_value_is_refused_with_a_sentence(
    variable: str, value: str, call: Callable[[], Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv(variable, value)
    with pytest.raises(ValueError, match=rf"{variable} must be .* or .*, got '{value}': change it or unset it\."):
        call()


def test_bfloat16_names_the_variable_that_forbids_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYROVAE_COMPILE", "aten")
    with pytest.raises(ValueError, match="must have a compiled step, got PYROVAE_COMPILE=aten"):
        Staged(double, precision="bfloat16")


def test_native_code_is_switched_off_and_on(monkeypatch: pytest.MonkeyPatch) -> None:
    if kernels.load_library() is None:
        pytest.skip("no C++ compiler")
    assert kernels.register_products() in (True, False)
    monkeypatch.setenv("PYROVAE_NATIVE", "decoder")
    assert kernels.load_library() is not None
    assert not kernels.register_products()
    monkeypatch.setenv("PYROVAE_NATIVE", "none")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert kernels.load_library() is None
    for operation in (
        lambda: kernels.standard_normals((3,), 0),
        lambda: kernels.bernoulli_decoder(torch.zeros(1, 1), [torch.zeros(1, 1)], [torch.zeros(1)], [], torch.zeros(1, 1)),
    ):
        with pytest.raises(RuntimeError, match="needs pyrovae's C\\+\\+"):
            operation()


@pytest.mark.slow
def test_test_kernels_fails_where_a_compiler_is_required(tmp_path: Path) -> None:
    # Of a process whose compiler is nowhere: skipped by default, a failure where one is required.
    code = (
        "import sys, pytest; sys.exit(pytest.main(['-q', '-n', '0', '-p', 'no:cacheprovider', 'tests/test_kernels.py', "
        "'-k', 'test_the_cpp_compiles_here']))"
    )
    results = []
    for extra in ({}, {"PYROVAE_REQUIRE_COMPILER": "1"}, {"CI": "true"}):
        environment = {"PATH": "/usr/bin:/bin", "HOME": str(tmp_path), "PYTHONPATH": str(PACKAGE.parent)}
        environment |= {"CXX": "/nowhere/c++", "TORCHINDUCTOR_CACHE_DIR": str(tmp_path / "torch"), **extra}
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=PACKAGE.parent)
        results.append((done.returncode, "1 skipped" in done.stdout, "1 failed" in done.stdout))
    assert results == [(0, True, False), (1, False, True), (1, False, True)]


# What is said where something cannot be had


def test_a_graph_that_has_no_cpp_wrapper_says_so_once(monkeypatch: pytest.MonkeyPatch) -> None:
    compile_fx, wrappers = inductor._compile_fx, []

    def without_cpp(module: Any, inputs: Any, options: dict[str, Any]) -> Any:
        wrappers.append(options.get("cpp_wrapper", False))
        if wrappers[-1]:
            raise NotImplementedError("no C++ form of this\nand more")
        return compile_fx(module, inputs, options)

    monkeypatch.setattr(inductor, "_compile_fx", without_cpp)

    def compiles_and_is_right() -> bool:
        staged, x = Staged(lambda x: (x.sin() + 1.0,)), torch.arange(3.0)
        values = [staged(x)[0] for _ in range(3)]
        return staged.backend == "inductor" and staged.reason is None and all(torch.allclose(v, x.sin() + 1.0) for v in values)

    with pytest.warns(RuntimeWarning, match=r"kernels from C\+\+ \(NotImplementedError: no C\+\+ form of this\)") as caught:
        assert [compiles_and_is_right() for _ in range(2)] == [True, True]
    assert len(caught) == 1
    assert wrappers == [True, False] * 2
    assert "from Python" in notes.reasons()["C++ wrapper"]
    monkeypatch.setattr(doctor, "_try_to_compile", lambda: None)
    assert any(subject == "slower: C++ wrapper" for subject, _ in doctor.report())


def test_a_graph_that_does_not_compile_at_all_gives_its_own_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def fails(*args: Any) -> Any:
        raise NotImplementedError("neither way")

    monkeypatch.setattr(inductor, "_compile_fx", fails)
    staged, x = Staged(double), torch.ones(2)
    staged(x)
    with pytest.warns(RuntimeWarning, match=r"captured, but not compiled, since the compiler failed \(neither way\)") as caught:
        staged(x)
    assert len(caught) == 1


def test_a_graph_that_compiles_but_does_not_run_runs_uncompiled(monkeypatch: pytest.MonkeyPatch) -> None:
    def does_not_run(*args: Tensor) -> Any:
        raise NameError("name 's26' is not defined")

    monkeypatch.setattr(compile_graph, "_inductor", lambda *args: does_not_run)
    staged, x = Staged(double), torch.ones(2)
    staged(x)
    with pytest.warns(RuntimeWarning, match=r"captured, but not compiled, since the compiler failed \(name 's26'"):
        assert torch.equal(staged(x)[0], 2 * x)
    assert torch.equal(staged(x)[0], 2 * x)


def test_a_compiled_function_without_a_graph_inside_is_left_as_it_is() -> None:
    def compiled(x: Tensor) -> tuple[Tensor]:
        return (x + 1.0,)

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert inductor.without_wrappers(compiled) is compiled
    assert "wrappers stay" in notes.reasons()["wrappers"]


@pytest.mark.parametrize("wraps", [True, False])
def test_the_graph_inside_is_found_through_wrappers(wraps: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    graphs, original = [], inductor.without_wrappers

    def wrapped_once_more(compiled: Callable[..., Any]) -> Callable[..., Any]:
        def wrapper(*args: Tensor) -> Any:
            return compiled(*args)

        if wraps:
            wrapper = functools.wraps(compiled)(wrapper)
        graphs.append(inductor._graph_inside(wrapper))
        return original(wrapper)

    monkeypatch.setattr(inductor, "without_wrappers", wrapped_once_more)
    staged, x = Staged(lambda x: (x.cos() * 5.0,)), torch.ones(3)
    for _ in range(3):
        torch.testing.assert_close(staged(x)[0], x.cos() * 5.0)
    assert type(graphs[0]).__name__ == "CompiledFxGraph"
    assert "wrappers" not in notes.reasons()


def test_compiling_replaces_nothing_of_torch_or_pyro() -> None:
    from pyro.infer import trace_elbo, trace_mean_field_elbo
    from torch._inductor.output_code import CompiledFxGraph

    watched = [(CompiledFxGraph, "__call__")]
    watched += [(module, name) for module in (trace_elbo, trace_mean_field_elbo) for name in ("torch_item", "warn_if_nan")]
    watched = [(owner, name) for owner, name in watched if hasattr(owner, name)]
    before, during = [getattr(*each) for each in watched], []

    def looking(x: Tensor) -> tuple[Tensor]:
        during.append([getattr(*each) for each in watched])
        return (x * 3.0,)

    staged = Staged(looking)
    for _ in range(3):
        staged(torch.ones(2))
    assert during
    assert all(each == before for each in during)


def test_a_program_that_decides_by_pyros_functions_is_not_captured() -> None:
    # Only Pyro's own losses read values to report them; a program might branch on one.
    from pyro.infer.util import torch_item

    staged = Staged(lambda x: (x * 2.0 if torch_item(x.sum()) > 0 else x,))
    with pytest.warns(RuntimeWarning, match="cannot be captured"):
        assert staged(torch.ones(2))[0].tolist() == [2.0, 2.0]
    assert staged(-torch.ones(2))[0].tolist() == [-1.0, -1.0]


@pytest.mark.parametrize("elbo", [pyro.infer.Trace_ELBO, pyro.infer.TraceMeanField_ELBO])
def test_a_captured_loss_of_pyros_still_warns_of_nan_eagerly(elbo: type) -> None:
    # The capture says of no value that it is NaN: what a step finds out itself, by its outcome.
    vae = pv.make_vae(6, latent_dim=2, hidden=[8])
    step = pv.stage(elbo(), vae.model, vae.guide, torch.optim.Adam(vae.parameters(), lr=0.1, fused=True), X, backend="aten")
    outcomes = [step(X), step(X), step(torch.full_like(X, torch.nan))]
    assert step.captured
    assert step.reason is None
    assert [outcome.loss == outcome.loss for outcome in outcomes] == [True, True, False]


# Hooks


@pytest.mark.parametrize(
    ("kind", "when", "fused"),
    [  # each kind at both moments, and with both optimizers
        ("pre", "before the first step", True),
        ("pre", "after some steps", False),
        ("post", "before the first step", False),
        ("post", "after some steps", True),
        ("pre of all", "before the first step", False),
        ("pre of all", "after some steps", True),
        ("post of all", "before the first step", True),
        ("post of all", "after some steps", False),
    ],
)
def test_hooks_of_an_optimizer_run_at_every_step(kind: str, when: str, fused: bool) -> None:
    from torch.optim.optimizer import register_optimizer_step_post_hook, register_optimizer_step_pre_hook

    vae = pv.make_vae(6, latent_dim=2, hidden=[8])
    optimizer = torch.optim.Adam(vae.parameters(), lr=0.01, fused=fused)
    step = pv.stage(pv.estimators.ELBO(), vae.model, vae.guide, optimizer, X, backend="aten")
    calls: list[bool] = []

    def hook(hooked: torch.optim.Optimizer, args: Any, kwargs: Any) -> None:
        calls.append(all(parameter.grad is not None for parameter in vae.parameters()))

    register = {
        "pre": optimizer.register_step_pre_hook,
        "post": optimizer.register_step_post_hook,
        "pre of all": register_optimizer_step_pre_hook,
        "post of all": register_optimizer_step_post_hook,
    }[kind]
    if when == "after some steps":
        for _ in range(3):
            step(X)
    handle = register(hook)
    try:
        for _ in range(4):
            step(X)
    finally:
        handle.remove()
    assert calls == [True] * 4
    before = [parameter.detach().clone() for parameter in vae.parameters()]
    step(X)
    assert len(calls) == 4
    assert not all(map(torch.equal, before, vae.parameters()))


@pytest.mark.parametrize("kind", [torch.optim.Adam, torch.optim.AdamW])
def test_steps_with_and_without_hooks_are_the_same_steps(kind: type[torch.optim.Optimizer]) -> None:
    from pyrovae.compile.optimizer import _Update

    ours, theirs = ([nn.Parameter(torch.ones(3)), nn.Parameter(torch.zeros(2, 2))] for _ in range(2))
    one, other = (kind(parameters, lr=0.1, fused=True) for parameters in (ours, theirs))
    update, handle = _Update(one), None
    for turn in range(9):
        if turn == 3:
            handle = one.register_step_post_hook(lambda *args: None)
        if turn == 6:
            assert handle is not None
            handle.remove()
        gradients = [torch.randn(3), torch.randn(2, 2)]
        update(ours, [gradient.clone() for gradient in gradients])
        for parameter, gradient in zip(theirs, gradients, strict=True):
            parameter.grad = gradient
        other.step()
    for have, want in zip(ours, theirs, strict=True):
        torch.testing.assert_close(have, want, rtol=0, atol=0)


# Choices


def test_a_choice_is_measured_once_and_kept(tmp_path: Path) -> None:
    measured = []

    def measure() -> dict[str, float]:
        measured.append(1)
        return {"native": 0.5}

    assert choices.measured_once("ours, 2 threads", measure) == {"native": 0.5}
    assert choices.measured_once("ours, 2 threads", measure) == {"native": 0.5}
    (kept,) = choices.choices_folder().glob("*.json")
    assert json.loads(kept.read_text())["question"] == "ours, 2 threads"
    choices._answers.clear()  # as in another process
    assert choices.measured_once("ours, 2 threads", measure) == {"native": 0.5}
    assert choices.answers() == {"ours, 2 threads": {"native": 0.5}}
    assert len(measured) == 1


def test_the_first_of_two_processes_decides() -> None:
    def measure() -> dict[str, float]:
        choices._write(choices.choices_folder() / "ours.json", "ours", {"native": 0.4})  # another process, meanwhile
        return {"native": 0.9}

    assert choices.measured_once("ours", measure) == {"native": 0.4}


def test_other_flags_and_another_torch_measure_again(monkeypatch: pytest.MonkeyPatch) -> None:
    folders = {choices.choices_folder()}
    monkeypatch.setenv("PYROVAE_CXX_FLAGS", "-mno-avx512f")
    folders.add(choices.choices_folder())
    choices._machine.cache_clear()
    monkeypatch.setattr(torch, "__version__", "9.9.9")
    folders.add(choices.choices_folder())
    choices._machine.cache_clear()
    assert len(folders) == 3


@pytest.mark.parametrize("content", ["", "{", "[]", '{"ratios": {"native": "fast"}}'])
def test_a_damaged_choice_is_measured_and_written_again(content: str) -> None:
    path = choices.choices_folder() / "ours.json"
    path.parent.mkdir(parents=True)
    path.write_text(content)
    assert choices.measured_once("ours", lambda: {"native": 0.5}) == {"native": 0.5}
    assert json.loads(path.read_text())["ratios"] == {"native": 0.5}


def test_a_folder_that_cannot_be_written_is_named_once(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("PYROVAE_CACHE", str(tmp_path / "file"))
    with pytest.warns(RuntimeWarning, match="set PYROVAE_CACHE to a folder that can be") as caught:
        found = [choices.measured_once(question, lambda: {"native": 0.5}) for question in ("one", "another")]
    assert found == [{"native": 0.5}] * 2
    assert len(caught) == 1


# The doctor


@pytest.mark.parametrize(("backend", "unused"), [("native", {"products"}), ("aten", {"decoder", "normals", "products"})])
def test_the_doctor_knows_which_graphs_call_our_operations(
    backend: str, unused: set[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PYROVAE_COMPILE", backend)
    monkeypatch.setattr(doctor, "_try_to_compile", lambda: None)
    lines = dict(doctor.report())
    off = {name for name in ("decoder", "normals", "products") if "only compiled graphs" in lines[f"native {name}"]}
    assert off == unused


def test_the_doctor_says_what_is_on_and_why(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(doctor, "_try_to_compile", lambda: None)
    lines = dict(doctor.report())
    assert {"pyrovae", "Python", "torch", "C++ compiler", "GPU", "compile backend", "what to do"} <= set(lines)
    assert lines["torch"].startswith(torch.__version__)
    assert lines["compile backend"].startswith("inductor")
    monkeypatch.setenv("PYROVAE_NATIVE", "none")
    lines = dict(doctor.report())
    assert {lines[f"native {name}"] for name in ("decoder", "normals", "products")} == {"off, since PYROVAE_NATIVE=none is set"}
    monkeypatch.setenv("PYROVAE_COMPILE", "eager")
    assert main(["doctor"]) == 0
    printed = capsys.readouterr().out
    assert "eager, since PYROVAE_COMPILE=eager is set" in printed
    assert "Unset PYROVAE_COMPILE" in printed
    monkeypatch.setenv("PYROVAE_COMPILE", "all")
    assert main(["doctor"]) == 2
    assert "PYROVAE_COMPILE must be eager, aten, native or inductor, got 'all'" in capsys.readouterr().err


def test_the_doctor_knows_a_machine_without_a_compiler(monkeypatch: pytest.MonkeyPatch) -> None:
    from torch._inductor.codecache import CppCodeCache

    def fail(*args: object, **kwargs: object) -> None:
        raise RuntimeError("no compiler at all")

    monkeypatch.setattr(CppCodeCache, "load", fail)
    monkeypatch.setattr(doctor, "_try_to_compile", lambda: "This step runs captured, since the compiler failed.")
    kernels._load_library.cache_clear()
    try:
        lines = dict(doctor.report())
    finally:
        kernels._load_library.cache_clear()
    assert "the compiler failed" in lines["compile backend"]
    assert "no compiler at all" in lines["slower: native"]
    assert "Install a C++ compiler" in lines["what to do"]


# Private names


def _is_private(dotted: str) -> bool:
    parts = dotted.split(".")
    hidden = any(part.startswith("_") and not part.startswith("__") for part in parts[1:])
    return parts[0] == "torch" and (hidden or dotted.startswith("torch.fx.experimental"))


def _private_names(path: Path) -> set[str]:
    """The longest dotted names below torch in a file that have a private part."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    names = {"aten": "torch.ops.aten"}
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and not node.level:
            names |= {alias.asname or alias.name: f"{node.module}.{alias.name}" for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
    for node in ast.walk(tree):
        parts = []
        while isinstance(node, ast.Attribute):
            parts.append(node.attr)
            node = node.value
        if isinstance(node, ast.Name):
            found.add(".".join([names.get(node.id, node.id), *reversed(parts)]))
    found = {name.removesuffix(".default") for name in (found | set(names.values())) if _is_private(name)}
    return {name for name in found if not any(other.startswith(f"{name}.") for other in found)}


README = (FOLDER / "README.md").read_text(encoding="utf-8")
ROWS = re.findall(r"^\| `([^`]+)` \| `([a-z]+\.py)` \|", README.split("## Private names of torch")[1], re.MULTILINE)
ELSEWHERE = set(re.findall(r"`(torch\.[^`]+)` \(", README.split("Elsewhere in the package")[1]))


def test_the_table_has_the_private_names_of_the_code() -> None:
    in_code = {(name, path.name) for path in sorted(FOLDER.glob("*.py")) for name in _private_names(path)}
    assert in_code == {row for row in ROWS if row[0].startswith("torch.")}
    for name, file in ROWS:
        assert name.rpartition(".")[2] in (FOLDER / file).read_text(encoding="utf-8"), f"{file} does not use {name}"


def test_no_other_part_of_the_package_uses_private_names() -> None:
    others = [path for path in PACKAGE.rglob("*.py") if FOLDER not in path.parents]
    assert set().union(*map(_private_names, others)) <= ELSEWHERE
    assert len(ELSEWHERE) == 3


def test_nothing_fails_in_silence_here() -> None:
    for path in FOLDER.glob("*.py"):
        text = path.read_text(encoding="utf-8")
        assert "suppress(" not in text
        assert "unittest" not in text
        assert "except:" not in text


def test_inductors_notes_on_slow_calls_are_kept_from_users(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    lowering = logging.getLogger("torch._inductor.ir")

    def compiles(module: Any, inputs: Any, options: Any) -> Callable[..., Any]:
        lowering.warning("%s is missing a c-shim implementation, using proxy executor as fallback", "aten.op")
        lowering.warning("something else")
        return module.forward

    monkeypatch.setattr(torch._inductor, "compile", compiles)
    monkeypatch.setattr(lowering, "propagate", True)
    caplog.set_level(logging.WARNING, lowering.name)
    lowering.addHandler(caplog.handler)
    inductor._compile_fx(torch.fx.symbolic_trace(lambda x: x.sin()), [X], {})
    lowering.warning("after")
    lowering.removeHandler(caplog.handler)
    said = {record.getMessage() for record in caplog.records}
    assert said == {"something else", "after"}
    assert not lowering.filters
