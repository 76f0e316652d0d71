"""Every prior x likelihood x encoder of the registry: those that fit train twenty steps, and the others are refused.

The networks are small (6-8-2 and back). The data of a triple are drawn from its own untrained model, so that they lie in the
support of its likelihood. A triple passes if every loss is finite and every parameter moves. A triple whose prior and encoder
have different supports passes if ``make_vae`` refuses it with a ValueError of one sentence. The estimator is the ELBO, or VIMCO
if a latent has no reparameterised sampler.

    python tests/triples.py --out experiments/results/all_triples.json    # five minutes on one thread
    python tests/triples.py --only 20                                     # a sample, which ``--seed`` chooses

A class is included by being registered. ``tests/test_triples.py`` tries a sample with a fixed seed.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import random
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import torch
from parts import LIKELIHOODS, fit_together, spec

import pyrovae as pv
from pyrovae.programs.inspect import inspect_pair
from pyrovae.registry import names

DATA, LATENT, HIDDEN, NUM_DATA, BATCH, STEPS = 6, 2, [8], 32, 16, 20


class Triple(NamedTuple):
    """What ``make_vae`` is asked for."""

    prior: str
    likelihood: str | dict[str, Any]
    encoder: str

    def build(self) -> pv.VAE:
        """The VAE of the three parts."""
        parts = {"prior": spec("prior", self.prior), "encoder": spec("encoder", self.encoder)}
        return pv.make_vae(DATA, latent_dim=LATENT, hidden=HIDDEN, likelihood=self.likelihood, **parts)

    def __str__(self) -> str:
        return f"{self.prior} x {self.likelihood} x {self.encoder}"


def triples() -> list[Triple]:
    """All triples of registered names."""
    return [
        Triple(prior, likelihood, encoder)
        for prior in names("prior")
        for likelihood in LIKELIHOODS
        for encoder in names("encoder")
    ]


def train(triple: Triple, seed: int) -> None:
    """Train a triple for twenty steps from a seed.

    Raises:
        RuntimeError: a loss is not finite, or a parameter has not moved.
    """
    pyro.clear_param_store()
    torch.manual_seed(seed)
    vae = triple.build()
    x = vae.sample(NUM_DATA)
    before = {name: parameter.detach().clone() for name, parameter in vae.named_parameters()}
    estimator = "vimco" if inspect_pair(vae.model, vae.guide, x).not_reparameterized else "elbo"
    options: dict[str, Any] = {"epochs": STEPS * BATCH // NUM_DATA, "batch_size": BATCH, "compile": False, "progress": False}
    bounds = vae.fit(x, estimator=estimator, **options).bound
    if not all(map(math.isfinite, bounds)):
        raise RuntimeError(f"The bounds are {bounds}.")
    still = [name for name, parameter in vae.named_parameters() if torch.equal(parameter, before[name])]
    if still:
        raise RuntimeError(f"No step moved {', '.join(still)}.")


def refuse(triple: Triple) -> None:
    """Expect a ValueError of one sentence.

    Raises:
        RuntimeError: the triple was built, or the message is no sentence.
    """
    try:
        triple.build()
    except ValueError as error:
        message = str(error)
        if "\n" in message or ". " in message or not message.endswith((".", "?")):
            raise RuntimeError(f"This is not one sentence: {message}") from error
    else:
        raise RuntimeError("It was built, although prior and encoder have different supports.")


def outcome(triple: Triple, seed: int) -> str:
    """``"trained"``, ``"refused"``, or what went wrong."""
    try:
        if fit_together(triple.prior, triple.encoder):
            train(triple, seed)
            return "trained"
        refuse(triple)
        return "refused"
    except Exception as error:  # any failure is what this script looks for
        return f"{type(error).__name__}: {error}"


def main() -> int:
    """Try all triples, or a sample, print what fails, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", type=int, metavar="N", help="try a sample of N triples")
    parser.add_argument("--seed", type=int, default=0, help="chooses the sample, and seeds each triple")
    parser.add_argument("--out", type=Path, help="where to write the summary")
    options = parser.parse_args()
    torch.set_num_threads(1)
    chosen = triples()
    if options.only is not None:
        chosen = random.Random(options.seed).sample(chosen, min(options.only, len(chosen)))
    outcomes = {}
    for i, triple in enumerate(chosen):
        outcomes[str(triple)] = outcome(triple, options.seed)
        print(f"\r{i + 1} of {len(chosen)}", end="", file=sys.stderr, flush=True)
    failures = {name: result for name, result in outcomes.items() if result not in ("trained", "refused")}
    results = list(outcomes.values())
    counts = {result: results.count(result) for result in ("trained", "refused")} | {"failed": len(failures)}
    for name, result in failures.items():
        print(f"\n{name}\n    {result}")
    print("\n" + ", ".join(f"{count} {result}" for result, count in counts.items()) + f" of {len(outcomes)}")
    if options.out is not None:
        options.out.write_text(json.dumps(summary(counts, failures, options.seed), indent=1) + "\n")
    return 1 if failures else 0


def summary(counts: dict[str, int], failures: dict[str, str], seed: int) -> dict[str, Any]:
    """What was tried, what came out, and on which machine and versions."""
    return {
        "network": f"{DATA}-{HIDDEN[0]}-{LATENT}, {STEPS} steps of {BATCH} data",
        "priors": names("prior"),
        "likelihoods": LIKELIHOODS,
        "encoders": names("encoder"),
        "counts": counts,
        "failures": failures,
        "seed": seed,
        "date": time.strftime("%Y-%m-%d"),
        "machine": platform.machine(),
        "versions": {
            "python": platform.python_version(),
            "torch": torch.__version__,
            "pyro": pyro.__version__,
            "pyrovae": pv.__version__,
        },
    }


if __name__ == "__main__":
    sys.exit(main())
