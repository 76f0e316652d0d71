"""A sample of all prior x likelihood x guide triples, another on each run; experiments/all_triples.py tries them all."""

from __future__ import annotations

import os
import random

import all_triples as script
import pytest

from pyrovae.models.vae import VAE

FITTING = [triple for triple in script.triples() if script.fit_together(triple.prior, triple.encoder)]
USUAL = script.Triple("standard_normal", "bernoulli", "diagonal_normal")


@pytest.mark.parametrize("index", range(12))
def test_some_triple_trains_twenty_steps(index: int) -> None:
    # The seed cannot stand in the test's name, on which all workers must agree, so a failure's output says it.
    seed = int(os.environ.get("PYROVAE_TRIPLE_SEED", int.from_bytes(os.urandom(4), "big")))
    triple = random.Random(seed).choice(FITTING)
    print(f"{triple}; again by PYROVAE_TRIPLE_SEED={seed} pytest -n 0 -k twenty_steps tests/test_triples.py")
    script.train(triple, seed)


def test_a_triple_that_does_not_train_is_seen(monkeypatch: pytest.MonkeyPatch) -> None:
    fit = VAE.fit

    def stuck(vae: VAE, *args: object, **options: object) -> object:
        bias = vae.encoder.loc.bias.detach().clone()
        history = fit(vae, *args, **options)
        vae.encoder.loc.bias.data.copy_(bias)
        return history

    monkeypatch.setattr(VAE, "fit", stuck)
    assert script.outcome(USUAL, 0) == "RuntimeError: No step moved encoder.loc.bias."


def test_a_triple_that_is_not_refused_is_seen() -> None:
    with pytest.raises(RuntimeError, match=r"^It was built"):
        script.refuse(USUAL)


def test_a_refusal_is_one_sentence(monkeypatch: pytest.MonkeyPatch) -> None:
    wrong = script.Triple("standard_normal", "bernoulli", "power_spherical")
    assert script.outcome(wrong, 0) == "refused"

    def talkative(*_: object) -> None:
        raise ValueError("One. Two.")

    monkeypatch.setattr("pyrovae.models.vae._check_supports", talkative)
    assert script.outcome(wrong, 0).startswith("RuntimeError: This is not one sentence")
