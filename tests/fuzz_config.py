"""Random and damaged TOML files of runs: each is a run that trains or is refused in one sentence, and leaves no folder behind.

Each seed writes one TOML file: a table of random settings, or the file of a whole run with a few bytes, words or lines changed.
``pyrovae train`` reads it, loads its data, builds its model and estimator, and makes its folder; ``fit`` itself is replaced. A
file may take 20 seconds of the processor, or 10 minutes of a machine that is busy with something else.

    python tests/fuzz_config.py --files 10000 --out experiments/results/fuzz_config.json
"""

from __future__ import annotations

import argparse
import contextlib
import io
import json
import os
import platform
import random
import resource
import signal
import tempfile
import traceback
from collections import Counter
from pathlib import Path
from typing import Any, Never
from unittest import mock

import numpy as np
import tomli_w
import torch

import pyrovae as pv
from pyrovae.cli import main
from pyrovae.cli.config import read_run, write_run
from pyrovae.registry import names

SECONDS, MINUTES, BYTES = 20, 10, 6 << 30
ACCEPTED = "the run was accepted"
NUMBERS = (0, 1, 2, 3, 8, -1, 0.5, 1e-3, 1e308, float("nan"), float("inf"), 2**31, 10**30)
WORDS = ("", " ", "adam", "sgd", "auto", "cpu", "cosine", "guide", "prior", "dynamic", "levels", "none", "tanh", "å\n", "\0")
# What runs fetch from the network is left out.
KEYS = {
    "": ("seed", "name", "estimator", "epochs", "data", "model"),
    "data": ("name", "path", "root", "binarize", "test_fraction", "labelled", "key", "labels", "covariates", "ignore",
             "missing", "size", "colour", "memory"),
    "model": ("kind", "latent_dim", "latent_dims", "num_classes", "prior", "likelihood", "encoder", "guide", "layer", "body",
              "hidden", "activation", "options", "dtype", "hiden"),
    "train": ("epochs", "batch_size", "lr", "optimizer", "schedule", "clip_norm", "validation", "patience", "compile",
              "accumulate", "ema", "max_steps", "max_seconds", "validate_every", "validation_samples", "every", "checkpoint",
              "precision", "device", "lrr"),
    "evaluate": ("num_samples", "target_se", "proposal", "limit", "decompose"),
}  # fmt: skip
COMPONENTS = {"estimator": "estimator", "prior": "prior", "likelihood": "likelihood", "encoder": "encoder", "layer": "encoder",
              "body": "body", "guide": "guide", "kind": "model"}  # fmt: skip

# Values that a key takes, at least with some other settings.
FITTING: dict[str, tuple[Any, ...]] = {
    "latent_dim": (1, 2, 5), "latent_dims": ([4, 2], [3, 3, 3]), "num_classes": (2, 10), "activation": ("tanh", "relu", "ReLU"),
    "hidden": ([8], [9, 7], [], [[9], [5]]), "options": ({}, {"oops": 1}), "dtype": ("float32", "float64"),
    "epochs": (1, 7), "batch_size": (1, 64, 10**6), "lr": (1e-3, 1), "optimizer": ("adam", "SGD", "rmsprop"),
    "schedule": ("cosine", "constant", {"kind": "plateau"}), "accumulate": (1, 3), "ema": (0.9, 0.999), "max_steps": (1, 9),
    "max_seconds": (0.5,), "validate_every": (1, 3), "validation_samples": (5,), "every": (1, 3, "auto"),
    "checkpoint": (True, False), "clip_norm": (1, 0.1), "validation": (0, 0.5, 0.999), "patience": (1, 100),
    "compile": (True, False, "auto"), "precision": ("float32", "bfloat16", "tf32"), "device": ("cpu", "auto", "cuda"),
    "binarize": ("levels", "none", "static", "dynamic"), "test_fraction": (0.1, 0.9, 0.001), "labelled": (0.5, 1e-6, 1),
    "labels": ("a", "c", "z"), "covariates": (["a"], ["a", "b", "c"]), "ignore": (["b"], []), "memory": (1, 1e-6),
    "num_samples": (1, 100), "target_se": (0.1,), "proposal": ("refined", "prior"), "limit": (1, 10**9), "decompose": (0, 5),
    "total_count": (16, 3, 255), "num_particles": (1, 5), "components": (2, 50), "depth": (1, 3), "scale": ("shared", 0.5),
    "seed": (0, 7, 2**31, 2**64),
}  # fmt: skip


def value(rng: random.Random, key: str, depth: int = 0) -> Any:
    """A value for a key, of a type that it takes or of another."""
    kind = COMPONENTS.get(key)
    if key in FITTING and rng.random() < 0.75:
        return rng.choice(FITTING[key])
    if kind is not None and rng.random() < 0.8:
        name = rng.choice(names(kind))
        options = rng.choice(("total_count", "num_particles", "components", "family", "scale", "depth", "decoder", "oops"))
        return name if rng.random() < 0.6 else {"kind": name, options: value(rng, options, depth + 1)}
    if key == "name" and rng.random() < 0.5:
        return rng.choice(("digits", "ring", "mnist", "linear_gaussian", "Digits", "../x", "a/b", "..", "x"))
    if key == "path" and rng.random() < 0.8:
        return rng.choice(("x.npy", "x.csv", "nothing.npy", ".", "run.toml"))
    draw = rng.randrange(6 if depth < 2 else 3)
    if draw < 2:
        return rng.choice(NUMBERS)
    if draw == 2:
        return rng.choice((*WORDS, True, False))
    if draw == 3:
        return [value(rng, "", depth + 1) for _ in range(rng.randrange(4))]
    if draw == 4:
        return rng.choice(([8, 4], [3], [[9], [5]], ["a"], ["a", "b"]))
    return {rng.choice(("kind", "name", "component", "epochs", "x")): value(rng, "", depth + 1)}


def random_tables(rng: random.Random) -> str:
    """A TOML file of one to six settings, each of a name, a value or a type that it takes or not."""
    tables: dict[str, Any] = {}
    for _ in range(rng.choice((1, 1, 2, 2, 3, 6))):
        section = rng.choice(list(KEYS))
        key = rng.choice(KEYS[section])
        into = tables.setdefault(section, {}) if section else tables
        if isinstance(into, dict):
            into[key] = value(rng, key)
    return tomli_w.dumps(tables)


def mutated(rng: random.Random) -> str:
    """The TOML file of a whole run, with one to four changes."""
    kind: dict[str, Any] = rng.choice(
        ({}, {"kind": "conditional"}, {"kind": "semi_supervised"}, {"kind": "hierarchical", "latent_dims": [4, 2]})
    )
    text = write_run(read_run(overrides={"model": kind}))
    for _ in range(rng.choice((1, 1, 2, 4))):
        place, lines = rng.randrange(len(text)), text.splitlines(keepends=True)
        line = rng.randrange(len(lines))
        change = rng.randrange(8)
        if change == 0:
            text = text[:place] + chr(rng.choice((*range(32, 127), 0, 10, 233))) + text[place + 1 :]
        elif change == 1:
            text = text[:place] + text[place + rng.randint(1, 5) :]
        elif change == 2:
            text = "".join(lines[:line] + lines[line + 1 :])
        elif change == 3:
            text = "".join([*lines[: line + 1], rng.choice(lines), *lines[line + 1 :]])
        else:
            key = lines[line].partition(" = ")[0]
            text = "".join([*lines[:line], f"{key} = {json.dumps(value(rng, key, 2))}\n", *lines[line + 1 :]])
        text = text or "\n"
    return text


def _accept(*_: Any, **__: Any) -> Never:
    raise ValueError(ACCEPTED)


def _late(*_: Any) -> Never:
    raise TimeoutError(f"more than {SECONDS} seconds of the processor, or {MINUTES} minutes")


def judge(seed: int) -> dict[str, Any]:
    """What ``pyrovae train`` makes of the seed's file: "accepted" or "refused", with a "violation" if a promise is broken."""
    rng = random.Random(seed)
    form = "random" if seed % 2 else "mutated"
    text = random_tables(rng) if form == "random" else mutated(rng)
    here = Path.cwd()
    with tempfile.TemporaryDirectory() as name:
        os.chdir(name)
        try:
            counts = np.random.default_rng(0).poisson(2.0, (30, 3))
            np.save("x.npy", counts)
            np.savetxt("x.csv", counts, "%d", ",", header="a,b,c", comments="")
            Path("run.toml").write_text(text, encoding="utf-8")
            before = sorted(Path().rglob("*"))
            record = {"seed": seed, "form": form} | _trained()
            left = sorted(set(Path().rglob("*")) - set(before))
            if left:
                record["violation"] = f"left behind {', '.join(map(str, left))}"
        finally:
            os.chdir(here)
    return record | ({"text": text} if "violation" in record else {})


def _trained() -> dict[str, Any]:
    """What ``pyrovae train run.toml`` says, up to ``fit``."""
    out, err = io.StringIO(), io.StringIO()
    before = {number: signal.signal(number, _late) for number in (signal.SIGALRM, signal.SIGPROF)}
    signal.alarm(60 * MINUTES)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err), mock.patch("pyrovae.training.loop.fit", _accept):
            code = main(["train", "run.toml"])
    except BaseException:
        return {"outcome": "raised", "violation": traceback.format_exc()}
    finally:
        signal.alarm(0)
        signal.setitimer(signal.ITIMER_PROF, 0)
        for number, handler in before.items():
            signal.signal(number, handler)
    lines = [line for line in err.getvalue().splitlines() if line.startswith("pyrovae: ")]
    said = lines[0].removeprefix("pyrovae: ") if lines else ""
    record: dict[str, Any] = {"outcome": "accepted" if said == ACCEPTED else "refused", "said": said}
    if len(lines) != 1 or "Traceback" in err.getvalue() or code not in (2, 3, 5) or f"more than {SECONDS} seconds" in said:
        record["violation"] = f"exit code {code}: {err.getvalue()[-500:]}"
    return record


def _summary(records: list[dict[str, Any]]) -> dict[str, Any]:
    return {
        "files": len(records),
        "outcomes": {
            form: dict(Counter(each["outcome"] for each in records if each["form"] == form)) for form in ("mutated", "random")
        },
        "violations": [each for each in records if "violation" in each][:20],
        "num_violations": sum("violation" in each for each in records),
        "different_sentences": len({each.get("said") for each in records}),
        "examples": sorted({each["said"][:160] for each in records[:300] if each.get("said")})[:40],
        "pyrovae": pv.__version__,
        "torch": torch.__version__,
        "python": platform.python_version(),
        "machine": platform.machine(),
    }


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--files", type=int, default=10_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    summary = _summary([judge(seed) for seed in range(arguments.first, arguments.first + arguments.files)])
    print(json.dumps(summary, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(summary, indent=1) + "\n", encoding="utf-8")
