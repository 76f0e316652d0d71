"""Every prior x likelihood x guide of the registry: what fits trains twenty steps, and what does not says so when it is built.

The networks are small (6-8-2 and back), and the data of a triple are drawn from the model itself, untrained, so that they lie
where its likelihood lives. A triple passes if every loss is finite and every parameter has moved; one whose prior and guide
live on different sets passes if ``make_vae`` refuses it by a ValueError of one sentence. The estimator is the ELBO, or VIMCO
where a latent has no reparameterised sampler.

    python experiments/all_triples.py             # five minutes on one thread; writes results/all_triples.json
    python experiments/all_triples.py --resume    # goes on where an interrupted run stopped
    python experiments/all_triples.py --only 20   # a sample, which ``--seed`` chooses; writes nothing

A class is here by being registered. Which sets fit together and the options of a small instance are those of the tests, which
try a sample of these triples on each run.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import sys
from pathlib import Path
from typing import Any, NamedTuple

import pyro
import record
import torch

import pyrovae as pv
from pyrovae.programs.inspect import inspect_pair
from pyrovae.registry import names

sys.path.insert(0, str(Path(__file__).parent.parent / "tests"))
from parts import LIKELIHOODS, fit_together, spec

DATA, LATENT, HIDDEN, NUM_DATA, BATCH, STEPS = 6, 2, [8], 32, 16, 20


class Triple(NamedTuple):
    """What ``make_vae`` is asked for."""

    prior: str
    likelihood: str | dict[str, Any]
    encoder: str

    def build(self) -> pv.VAE:
        parts = {"prior": spec("prior", self.prior), "encoder": spec("encoder", self.encoder)}
        return pv.make_vae(DATA, latent_dim=LATENT, hidden=HIDDEN, likelihood=self.likelihood, **parts)

    def __str__(self) -> str:
        return f"{self.prior} x {self.likelihood} x {self.encoder}"


def likelihoods() -> list[str | dict[str, Any]]:
    listed = {table if isinstance(table, str) else table["kind"] for table in LIKELIHOODS}
    return [*LIKELIHOODS, *(name for name in names("likelihood") if name not in listed)]


def triples() -> list[Triple]:
    return [
        Triple(prior, likelihood, encoder)
        for prior in names("prior")
        for likelihood in likelihoods()
        for encoder in names("encoder")
    ]


def train(triple: Triple, seed: int) -> None:
    """Twenty steps from that seed.

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
        said = str(error)
        if "\n" in said or ". " in said or not said.endswith((".", "?")):
            raise RuntimeError(f"This is not one sentence: {said}") from error
    else:
        raise RuntimeError("It was built, though prior and guide live on different sets.")


def outcome(triple: Triple, seed: int) -> str:
    """``"trained"``, ``"refused"``, or what went wrong."""
    try:
        if fit_together(triple.prior, triple.encoder):
            train(triple, seed)
            return "trained"
        refuse(triple)
        return "refused"
    except Exception as error:  # whatever fails, its list is what this script is for
        return f"{type(error).__name__}: {error}"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    scope = parser.add_mutually_exclusive_group()
    scope.add_argument("--only", type=int, metavar="N", help="try a sample of N triples")
    scope.add_argument("--resume", action="store_true", help="keep what an interrupted run of all triples has found")
    parser.add_argument("--seed", type=int, default=0, help="chooses the sample, and seeds each triple")
    given = parser.parse_args()
    torch.set_num_threads(1)
    progress = Path("runs") / f"all_triples-{given.seed}.jsonl"
    chosen = triples()
    if given.only is not None:
        chosen = random.Random(given.seed).sample(chosen, min(given.only, len(chosen)))
    elif not given.resume:
        progress.unlink(missing_ok=True)
    found = dict(json.loads(line) for line in progress.read_text().splitlines()) if given.resume else {}
    for i, triple in enumerate(chosen):
        if str(triple) not in found:
            found[str(triple)] = outcome(triple, given.seed)
            if given.only is None:
                progress.parent.mkdir(exist_ok=True)
                with progress.open("a") as lines:
                    lines.write(json.dumps([str(triple), found[str(triple)]]) + "\n")
        print(f"\r{i + 1} of {len(chosen)}", end="", file=sys.stderr, flush=True)
    failures = {name: said for name, said in found.items() if said not in ("trained", "refused")}
    counts = {said: list(found.values()).count(said) for said in ("trained", "refused")} | {"failed": len(failures)}
    for name, said in failures.items():
        print(f"\n{name}\n    {said}")
    print("\n" + "".join(f"{name:>10}" for name in [*counts, "all"]))
    print("".join(f"{count:>10}" for count in [*counts.values(), len(found)]))
    if given.only is None:
        write(counts, failures, given.seed)
        progress.unlink()
    return 1 if failures else 0


def write(counts: dict[str, int], failures: dict[str, str], seed: int) -> None:
    result = {
        "network": f"{DATA}-{HIDDEN[0]}-{LATENT}, {STEPS} steps of {BATCH} data",
        "priors": names("prior"),
        "likelihoods": likelihoods(),
        "encoders": names("encoder"),
        "counts": counts,
        "failures": failures,
        "seed": seed,
    }
    record.write("all_triples", result)


if __name__ == "__main__":
    sys.exit(main())
