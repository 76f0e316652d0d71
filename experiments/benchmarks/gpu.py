"""What a GPU gives: first checks that its steps are the right ones, then what steps, an epoch and scoring take.

One command, under five minutes on a bare machine with torch and this package; JAX and NumPyro take part where they are
installed. Each part stands alone: what fails is written down with its traceback, and the next begins.

    python experiments/benchmarks/gpu.py --root ../shared/data      # writes ../results/gpu_<card>.json
    python experiments/benchmarks/gpu.py --small                    # all but the CUDA graphs, on a CPU, in a minute
    python experiments/benchmarks/gpu.py --parts checks epoch

Steps are those of the 784-200-200-50 tanh network; data lie on the device and rows are gathered within the step. Times are
medians over laps of many steps, the outcomes read at each lap's end. "kernels" is the sum of what the profiler says each took.
"""

from __future__ import annotations

import argparse
import cProfile
import io
import json
import os
import platform
import pstats
import statistics
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from importlib import metadata
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parent))
os.environ.setdefault("XLA_PYTHON_CLIENT_PREALLOCATE", "false")
# The profiler otherwise fails at its second use beside CUDA graphs (torch/profiler/profiler.py says so).
os.environ |= {"DISABLE_CUPTI_LAZY_REINIT": "1", "TEARDOWN_CUPTI": "0"}
if "--numpyro" in sys.argv:
    os.environ.setdefault("JAX_PLATFORMS", "cpu" if "--small" in sys.argv else "cuda,cpu")

import common
import numpy as np
import pyro
import torch
from common import Network
from gpu_checks import CELLS, CHECKS, OTHERS, Cell, Machine, rows_of, the_pair, the_step
from torch import Tensor

import pyrovae as pv
from pyrovae.compile import cuda as compile_cuda
from pyrovae.compile import graph as compile_graph
from pyrovae.compile.cuda import products_in
from pyrovae.data.datasets import binarize

# Measurements.


def median_ms(on: Machine, take: Callable[[], Any], steps: int, laps: int = 5) -> float:
    take()
    times = []
    for _ in range(1 if on.small else laps):
        on.sync()
        began = time.perf_counter()
        take()
        on.sync()
        times.append((time.perf_counter() - began) / steps * 1e3)
    return round(statistics.median(times), 4)


def kernels_of(on: Machine, take: Callable[[], Any], steps: int, top: int = 0) -> dict[str, Any]:
    """The sum of kernel times a step, and how many there are, by the profiler."""
    if not on.cuda:
        return {}
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    with torch.profiler.profile(activities=activities) as profile:
        take()
        on.sync()
    events = [
        event
        for event in profile.events()
        if event.device_type == torch.autograd.DeviceType.CUDA and not event.name.startswith(("Optimizer.", "ProfilerStep"))
    ]
    total = sum(event.time_range.elapsed_us() for event in events)
    found: dict[str, Any] = {"kernels_ms": round(total / steps / 1e3, 4), "number": round(len(events) / steps, 1)}
    if top:
        by_name: dict[str, list[float]] = {}
        for event in events:
            by_name.setdefault(event.name, []).append(event.time_range.elapsed_us())
        ranked = sorted(by_name, key=lambda name: -sum(by_name[name]))[:top]
        found["us_a_step"] = {
            name[:120]: [round(sum(by_name[name]) / steps, 2), round(len(by_name[name]) / steps, 2)] for name in ranked
        }
    return found


def time_ours(on: Machine, cell: Cell, precision: str, data: Tensor, top: int = 0) -> dict[str, Any]:
    number = 10 if on.small else 400 if cell.batch * cell.particles < 4_000 else 200
    rows = rows_of(on, data, cell, number)
    step = the_step(on, the_pair(on, cell), data, cell, precision=precision, lr=1e-4)
    began = time.perf_counter()
    for each in rows[:4]:
        step.step_async(each, data)
    losses = step.drain()
    on.sync()
    built = time.perf_counter() - began

    def take() -> None:
        for each in rows:
            step.step_async(each, data)
        step.drain()

    found: dict[str, Any] = {"ms": median_ms(on, take, number), "seconds_to_build": round(built, 2), "reason": step.reason}
    found["loss_per_datum"] = round(losses[0].loss / cell.batch, 3)
    if step._graphs:
        (graph,) = step._graphs.values()
        several = len(graph._slots)
        found["replays_alone_ms"] = median_ms(on, lambda: [graph._several() for _ in range(number // several)], number)
        found["launched_by_the_host_ms"] = host_ms(on, take, number)
    return found | kernels_of(
        on, lambda: [step.step_async(each, data) for each in rows[:40]] and step.drain(), len(rows[:40]), top
    )


def host_ms(on: Machine, take: Callable[[], Any], steps: int) -> float:
    """What the host takes for a step, by its own clock: below the GPU's time it is hidden."""
    usage = time.process_time()
    take()
    return round((time.process_time() - usage) / steps * 1e3, 4)


def time_eager(on: Machine, cell: Cell, data: Tensor) -> float:
    number = 3 if on.small else 40
    step = the_step(on, the_pair(on, cell), data, cell, compiled=False, lr=1e-4)
    rows = rows_of(on, data, cell, number)
    return median_ms(on, lambda: [step.step_async(each, data) for each in rows] and step.drain(), number, laps=3)


def time_pyro(on: Machine, cell: Cell, data: Tensor) -> float:
    """``SVI.step`` of a plain Pyro pair of the same network, validation off."""
    torch.manual_seed(0)
    net = Network(cell.kind, cell.components).to(on.device)
    pyro.clear_param_store()
    with torch.device(on.device):
        pair = common.pyro_pair(net, "svi")
    elbo: Any = pyro.infer.Trace_ELBO(max_plate_nesting=1)
    if cell.particles > 1:
        elbo = pyro.infer.RenyiELBO(alpha=0, num_particles=cell.particles, vectorize_particles=True, max_plate_nesting=1)
    svi = pyro.infer.SVI(*pair, pyro.optim.Adam({"lr": 1e-4}), elbo)
    number = 3 if on.small else 30
    rows = rows_of(on, data, cell, number)

    def take() -> None:
        with pyro.validation_enabled(False):
            for each in rows:
                svi.step(data[each])

    return median_ms(on, take, number, laps=3)


def part_cells(on: Machine, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    data, found = on.data(), {}
    for name, cell in list(CELLS.items())[: 2 if on.small else None]:
        found[name] = {"pyro_svi_ms": attempt(time_pyro, on, cell, data), "eager_ms": attempt(time_eager, on, cell, data)}
        for precision in ("float32", "tf32") if on.cuda else ("float32",):
            found[name][precision] = attempt(time_ours, on, cell, precision, data, 70 if name == "K=1 B=100" else 12)
        keep(found)
    return found


def part_other_networks(on: Machine, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    data, found = on.data(), {}
    for name, cell in OTHERS.items():
        if on.small and cell.kind != "two":
            continue
        found[name] = {
            "eager_ms": attempt(time_eager, on, cell, data),
            "float32": attempt(time_ours, on, cell, "float32", data, 12),
        }
        keep(found)
    return found


def part_epoch(on: Machine, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """An epoch of MNIST, or of as many random images, through ``fit``: B=100, binarised, with bar and metrics."""
    try:
        images = pv.data.load("mnist", root=on.root, binarize="dynamic").train.flatten(1)
        what = "MNIST"
    except (FileNotFoundError, ValueError) as error:
        images, what = on.data(grey=True), f"random images, since {error}"
    images = images[:1_000] if on.small else images
    found: dict[str, Any] = {"data": what, "images": len(images)}
    for precision in ("float32", "tf32") if on.cuda else ("float32",):
        marks = [time.perf_counter()]
        with open(os.devnull, "w") as nowhere, redirect_stderr(nowhere):
            history = the_pair(on, CELLS["K=1 B=100"]).fit(
                images, epochs=6 if on.cuda else 2, batch_size=100, transform=binarize, seed=0, compile=on.cuda,
                precision=precision, on_epoch=lambda record, marks=marks: marks.append(time.perf_counter()),
            )  # fmt: skip
        epochs = np.diff(marks).round(4).tolist()
        found[precision] = {
            "seconds_of_the_first": epochs[0],
            "seconds": epochs[1:],
            "median": float(np.median(epochs[1:])),
            "bound": history.bound,
            "precision": history.precision,
        }
        keep(found)
    return found


def part_scoring(on: Machine, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """log p(x) of 10,000 images from 5,000 draws each: seconds, peak memory, the mean, and where the time goes."""
    images, samples = (30, 100) if on.small else (10_000, 5_000)
    torch.manual_seed(0)
    net, x = Network("tanh", spread=0.1), common.binary_images(images)
    net.decoder[0].weight.data *= 0.3  # a posterior near the guide, whose errors can be believed
    vae, found = common.as_vae(net).to(on.device), {}
    runs: list[tuple[str, dict[str, Any]]] = [("float32, compile=False", {"compile": False})]
    if on.cuda:
        runs = [
            ("float32, by default, first", {}),
            ("float32, by default, again", {}),
            *runs,
            ("tf32, by default, first", {"precision": "tf32"}),
            ("tf32, by default, again", {"precision": "tf32"}),
            ("tf32, compile=False", {"precision": "tf32", "compile": False}),
        ]
    for name, options in runs:
        found[name] = attempt(score, on, vae, x, samples, options)
        keep(found)
    profile = cProfile.Profile()
    profile.enable()
    attempt(score, on, vae, x, samples, {})
    profile.disable()
    table = pstats.Stats(profile)
    ranked = sorted(table.stats.items(), key=lambda item: -item[1][3])[:45]  # type: ignore[attr-defined]
    found["profile, cumulative and own seconds"] = {
        f"{Path(file).name}:{line} {what}": [round(cumulative, 3), round(own, 3), calls]
        for (file, line, what), (calls, _, own, cumulative, _) in ranked
    }
    return found


def score(on: Machine, vae: Any, x: Tensor, samples: int, options: dict[str, Any]) -> dict[str, Any]:
    if on.cuda:
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    began = time.perf_counter()
    evidence = vae.log_marginal(x, num_samples=samples, seed=0, **options)
    seconds = time.perf_counter() - began
    peak = torch.cuda.max_memory_allocated() / 2**20 if on.cuda else 0.0
    return {
        "seconds": round(seconds, 3),
        "peak_mebibytes": round(peak),
        "mean": evidence.mean,
        "mean_se": evidence.mean_se,
        "reliable": int(evidence.reliable.sum()),
        "notes": evidence.notes,
    }


def part_products(on: Machine, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """The ceilings of this card: products of the decoder and a copy."""
    rows, found = 1_000 if on.small else 500_000, {}
    sizes, x = [(50, 200), (200, 200), (200, 784)], torch.randn(rows, 50, device=on.device)
    chain = [(torch.randn(rows, a, device=on.device), torch.randn(a, b, device=on.device)) for a, b in sizes]
    for precision in ("float32", "tf32") if on.cuda else ("float32",):
        with products_in(precision, on.device):
            ms = median_ms(on, lambda: [a @ b for a, b in chain], 1)
        found[f"decoder, {precision}, seconds for 50 million pairs"] = round(ms / rows * 5e4, 3)
    big = x.new_empty(2**20 if on.small else 2**29)
    ms = median_ms(on, lambda: big.clone(), 1)
    found["copy, GB/s read and written"] = round(2 * big.numel() * 4 / ms / 1e6)
    return found


def part_numpyro(on: Machine, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """NumPyro's jitted update and lax.scan, in a process of its own, which may fail on its own."""
    found: dict[str, Any] = {}
    command = [sys.executable, __file__, "--numpyro", *(["--small"] if on.small else [])]
    environment = os.environ | {"JAX_PLATFORMS": "cpu" if not on.cuda else "cuda,cpu"}
    try:
        process = subprocess.run(command, capture_output=True, text=True, timeout=110, env=environment)
        output, errors = process.stdout, process.stderr
    except subprocess.TimeoutExpired as error:
        output, errors = (text.decode() if isinstance(text, bytes) else text or "" for text in (error.stdout, error.stderr))
        found["timed_out"] = True
    for line in output.splitlines():
        if line.startswith("{"):
            found |= json.loads(line)
    if not found or found.get("timed_out"):
        found["stderr"] = errors[-3_000:]
    return found


def numpyro_cells(small: bool) -> None:
    """Print a line for each cell: milliseconds a step, at TF32 products, which are JAX's default, and in float32."""
    jax, jnp = common.library("jax"), common.library("jax.numpy")
    infer, optim = common.library("numpyro.infer"), common.library("numpyro.optim")
    print(json.dumps({"devices": str(jax.devices()), "jax": jax.__version__}), flush=True)
    steps, cells = 5 if small else 200, []
    for name, cell in list(CELLS.items())[: 1 if small else None]:
        cells.append(name)
        torch.manual_seed(0)
        net = Network(cell.kind)
        elbo = infer.Trace_ELBO() if cell.particles == 1 else infer.RenyiELBO(alpha=0, num_particles=cell.particles)
        svi = infer.SVI(*common.numpyro_pair(net), optim.Adam(1e-4), elbo)
        stacked = jnp.array((np.random.default_rng(0).random((steps, cell.batch, 784)) < 0.13).astype(np.float32))
        found: dict[str, Any] = {}
        for precision in ("tensorfloat32", "highest"):
            with jax.default_matmul_precision(precision):
                state = svi.init(jax.random.PRNGKey(0), stacked[0])
                scanned = jax.jit(lambda state, stacked, svi=svi: jax.lax.scan(svi.update, state, stacked))
                times = []
                for _ in range(2 if small else 6):
                    began = time.perf_counter()
                    jax.block_until_ready(scanned(state, stacked))
                    times.append((time.perf_counter() - began) / steps * 1e3)
                found[f"scan, {precision}"] = round(statistics.median(times[1:]), 4)
                if precision == "highest" or len(cells) > 2:
                    continue
                update, batches = jax.jit(svi.update), list(stacked)
                times = []
                for _ in range(2 if small else 4):
                    began = time.perf_counter()
                    for x in batches:
                        state, _ = update(state, x)
                    jax.block_until_ready(state)
                    times.append((time.perf_counter() - began) / steps * 1e3)
                found[f"update, {precision}"] = round(statistics.median(times[1:]), 4)
        print(json.dumps({name: found}), flush=True)


def part_command_line(on: Machine, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """``pyrovae train`` and ``evaluate`` on the digits, which say where they run."""
    if on.small:
        return {"left_out": "tests/test_cli.py runs it"}
    from pyrovae.cli.app import main as pyrovae

    before, said = Path.cwd(), io.StringIO()
    quick = ["--train.epochs", "3", "--evaluate.num-samples", "200", "--evaluate.decompose", "10", "--name", "gpu"]
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(said):
        os.chdir(folder)
        try:
            codes = [pyrovae(["train", *quick, "--device", "auto"]), pyrovae(["evaluate", "runs/gpu", "--limit", "50"])]
        finally:
            os.chdir(before)
    assert codes == [0, 0], said.getvalue()
    return {"first_line": said.getvalue().splitlines()[0]}


# What was refused or failed on the way, in full: a step that falls back says one line.
REFUSALS: list[str] = []


def watch() -> None:
    """Keep the tracebacks of whatever makes a step fall back."""

    def watched(function: Any) -> Any:
        def run(*arguments: Any, **options: Any) -> Any:
            try:
                return function(*arguments, **options)
            except Exception:
                REFUSALS.append(traceback.format_exc()[-5_000:])
                raise

        return run

    compile_graph._capture, compile_graph._inductor = watched(compile_graph._capture), watched(compile_graph._inductor)
    compile_cuda.GraphedSteps.__init__ = watched(compile_cuda.GraphedSteps.__init__)  # type: ignore[method-assign]


def attempt(function: Callable[..., Any], *arguments: Any) -> Any:
    """What it returns, or why it does not, and the parts after it go on."""
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found = function(*arguments)
    except Exception:
        return {"error": traceback.format_exc()[-4_000:]}
    said = sorted(
        {f"{each.category.__name__}: {str(each.message)[:300]}" for each in caught if each.category is RuntimeWarning}
    )
    return found | {"warnings": said} if said and isinstance(found, dict) else found


PARTS: dict[str, Callable[..., dict[str, Any]]] = {
    "epoch": part_epoch,
    "scoring": part_scoring,
    "cells": part_cells,
    "other networks": part_other_networks,
    "products": part_products,
    "command line": part_command_line,
    "numpyro": part_numpyro,
}


def about(on: Machine) -> dict[str, Any]:
    versions = {}
    for package in ("torch", "triton", "pyro-ppl", "numpy", "arviz", "arviz-stats", "zuko", "jax", "numpyro"):
        try:
            versions[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            versions[package] = "not installed"
    card = torch.cuda.get_device_name() if on.cuda else "no GPU"
    free = [round(number / 2**20) for number in torch.cuda.mem_get_info()] if on.cuda else []
    return {
        "card": card,
        "free_and_total_mebibytes": free,
        "processor": common.processor() if hasattr(common, "processor") else platform.machine(),
        "cores": os.cpu_count(),
        "python": platform.python_version(),
        "pyrovae": pv.__version__,
        "versions": versions,
        "date": time.strftime("%Y-%m-%d"),
    }


def run_all(on: Machine, parts: list[str], out: Path, seconds: float) -> dict[str, Any]:
    """Run the parts and write what they found after each."""
    began = time.perf_counter()
    result: dict[str, Any] = {"checks": {}, "failed": [], "seconds": {}}
    if out.exists():  # parts that are not asked for stay as they were
        result |= json.loads(out.read_text())
    result |= about(on)
    refused_before = result.get("refusals", [])

    def write() -> None:
        out.parent.mkdir(parents=True, exist_ok=True)
        out.write_text(json.dumps(plain(result), indent=1) + "\n")

    def run(name: str, function: Callable[[], Any], keep: Callable[[Any], None]) -> None:
        started = time.perf_counter()
        result["failed"] = [each for each in result["failed"] if each != name]
        if started - began > seconds:
            keep({"left_out": f"{seconds:g} seconds were over"})
            result["failed"].append(name)
        else:
            pyro.clear_param_store()
            found = attempt(function)
            keep(found)
            errors = errors_in(found)
            failed = bool(errors)
            result["refusals"] = refused_before + REFUSALS
            result["failed"] += [name] * failed
            took = time.perf_counter() - started
            result["seconds"][name] = round(took, 2)
            print(f"{name:<34}{took:8.1f} s  {'FAILED' if failed else 'done'}", flush=True)
            if failed:
                print(errors[0], flush=True)
        write()

    if "checks" in parts:
        for name, check in CHECKS.items():
            run(f"check {name}", lambda check=check: check(on), lambda found, name=name: result["checks"].update({name: found}))
    for name in [name for name in PARTS if name in parts]:

        def keep(found: Any, name: str = name) -> None:
            result[name] = found
            write()

        run(name, lambda name=name, keep=keep: PARTS[name](on, keep), keep)
    write()
    return result


def errors_in(found: Any) -> list[str]:
    """The tracebacks among what a part found."""
    if not isinstance(found, dict):
        return []
    return [found["error"]] if "error" in found else [error for each in found.values() for error in errors_in(each)]


def plain(value: Any) -> Any:
    """For JSON, which has no infinity and no NaN."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else str(value)
    return value


def table(result: dict[str, Any]) -> str:
    """The cells in lines, ms a step."""
    heads = {"Pyro": 8, "eager": 8, "float32": 9, "kernels": 9, "tf32": 8, "kernels ": 9, "scan tf32": 11, "scan f32": 10}
    lines = [f"{'ms a step':<26}" + "".join(f"{head.strip():>{width}}" for head, width in heads.items())]

    def number(value: Any, *path: str) -> str:
        for key in path:
            value = value.get(key) if isinstance(value, dict) else None
        return f"{value:.3f}" if isinstance(value, float) else "-"

    for name, cell in (result.get("cells") or {}).items() if isinstance(result.get("cells"), dict) else ():
        scans = (result.get("numpyro") or {}).get(name, {})
        lines.append(
            f"{name:<26}{number(cell, 'pyro_svi_ms'):>8}{number(cell, 'eager_ms'):>8}{number(cell, 'float32', 'ms'):>9}"
            f"{number(cell, 'float32', 'kernels_ms'):>9}{number(cell, 'tf32', 'ms'):>8}{number(cell, 'tf32', 'kernels_ms'):>9}"
            f"{number(scans, 'scan, tensorfloat32'):>11}{number(scans, 'scan, highest'):>10}"
        )
    for part in ("epoch", "scoring"):
        for name, found in (result.get(part) or {}).items():
            if isinstance(found, dict) and ("median" in found or "seconds" in found):
                lines.append(f"{part}, {name}: {found.get('median', found.get('seconds'))} s")
    return "\n".join([*lines, f"failed: {result['failed'] or 'nothing'}"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--small", action="store_true", help="all but the CUDA graphs, on a CPU")
    parser.add_argument("--root", default="../shared/data", help="the folder that holds MNIST/raw")
    parser.add_argument("--parts", nargs="+", choices=["checks", *PARTS], default=["checks", *PARTS], metavar="PART")
    parser.add_argument("--out", type=Path, help="by default ../results/gpu_<card>.json, and nothing there on a CPU")
    parser.add_argument("--seconds", type=float, default=270.0, help="parts that would begin later are left out")
    parser.add_argument("--numpyro", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.numpyro:
        numpyro_cells(options.small)
        return 0
    on = Machine(options.small, options.root)
    watch()
    if not on.cuda and not options.small:
        print("This torch finds no GPU: pass --small to run all but the CUDA graphs on the CPU.")
        return 1
    card = torch.cuda.get_device_name().lower().replace(" ", "_") if on.cuda else ""
    out = options.out or (common.RESULTS / f"gpu_{card}.json" if on.cuda else Path(tempfile.gettempdir()) / "gpu_small.json")
    result = run_all(on, options.parts, out, options.seconds)
    print(table(result))
    return 1 if result["failed"] else 0


if __name__ == "__main__":
    sys.exit(main())
