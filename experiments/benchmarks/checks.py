"""What the checks at the door cost: their share of a default ``fit`` and ``log_marginal`` on digits and MNIST.

Each check is timed inside the run that it belongs to, in seconds of processor time of this process, so that other load on the
machine matters little.

    python experiments/benchmarks/checks.py

``results/checks.json`` has for each run the seconds, the share of the checks and what each check took.
"""

from __future__ import annotations

import argparse
import functools
import time
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from common import write

import pyrovae as pv
from pyrovae.compile.graph import Staged
from pyrovae.compile.step import Step
from pyrovae.evidence import sampler
from pyrovae.training import setup
from pyrovae.training.values import SupportCheck

SEED, MOST = 0, 0.03
# Epochs of fit, and images that are scored: all test digits; of MNIST few, which are not compiled, a part, and all.
RUNS = {"digits": (100, (360,)), "mnist": (100, (300, 3_000, 10_000))}
IN_FIT = "prepare check_estimator inspect_pair check_other_batches check_steady_scale rehearse check_first_loss".split()
IN_SCORING = "open_pair inspect_pair covered_data".split()


class Clock:
    """Adds up the processor time of functions, of the outermost one where they call each other."""

    def __init__(self) -> None:
        self.seconds, self.depth = Counter[str](), 0

    def timed(self, name: str, function: Callable[..., Any]) -> Callable[..., Any]:
        """The function, timed under a name."""

        @functools.wraps(function)
        def run(*args: Any, **kwargs: Any) -> Any:
            self.depth += 1
            began = time.process_time()
            try:
                return function(*args, **kwargs)
            finally:
                self.depth -= 1
                if self.depth == 0:
                    self.seconds[name] += time.process_time() - began

        return run


def watch(clock: Clock) -> None:
    """Have the clock time every check."""
    for module, names in ((setup, IN_FIT), (sampler, IN_SCORING)):
        for name in names:
            setattr(module, name, clock.timed(name, getattr(module, name)))
    for kind, name in ((SupportCheck, "__init__"), (SupportCheck, "__call__"), (SupportCheck, "check_early")):
        setattr(kind, name, clock.timed("support of the data", getattr(kind, name)))
    for staged in (Step, Staged):
        staged.recheck = clock.timed("recheck", staged.recheck)  # type: ignore[attr-defined]
    kind = sampler.ImportanceSampler
    kind._missed = clock.timed("probes of the prior", kind._missed)  # type: ignore[method-assign]


def measure(clock: Clock, run: Callable[[], Any]) -> dict[str, Any]:
    """The share of the checks in one run."""
    clock.seconds.clear()
    began = time.process_time()
    run()
    total = time.process_time() - began
    checks = sum(clock.seconds.values())
    return {
        "cpu_seconds": round(total, 2),
        "share": round(checks / total, 4),
        "checks": {name: round(seconds, 3) for name, seconds in clock.seconds.most_common()},
    }


def main() -> None:
    """Measure all runs and write the record."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--root", default="data", help="the folder that torchvision keeps MNIST in")
    root, clock, runs = parser.parse_args().root, Clock(), {}
    watch(clock)
    for name, (epochs, sizes) in RUNS.items():
        split, fit = pv.data.load(name, root=root), {"epochs": epochs, "seed": SEED, "progress": False}
        torch.manual_seed(SEED)
        vae = pv.make_vae(split.data_shape, latent_dim=10, likelihood=split.likelihood)
        pair = vae.model, vae.guide
        runs[f"fit on {name}, {epochs} epochs"] = measure(
            clock, functools.partial(pv.fit, *pair, split.train, transform=split.transform, **fit)
        )
        for number in sizes:
            test = split.test[:number]
            runs[f"log_marginal of {number:,} {name}"] = measure(
                clock, functools.partial(pv.log_marginal, *pair, test, seed=SEED)
            )
    for name, found in runs.items():
        print(f"{name}: {100 * found['share']:.2f} % of {found['cpu_seconds']} s; {found['checks']}")
    write("checks", {"seed": SEED, "unit": "processor seconds", "most_allowed": MOST, "runs": runs})


if __name__ == "__main__":
    main()
