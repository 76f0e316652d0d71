"""A sample of all prior x likelihood x encoder triples; ``python tests/triples.py`` tries them all."""

from __future__ import annotations

import random

import pytest
import triples as script

from pyrovae.models.vae import VAE

FITTING = [triple for triple in script.triples() if script.fit_together(triple.prior, triple.encoder)]
USUAL = script.Triple("standard_normal", "bernoulli", "diagonal_normal")


@pytest.mark.parametrize("triple", random.Random(0).sample(FITTING, 12), ids=str)
def test_a_triple_trains_twenty_steps(triple: script.Triple) -> None:
    script.train(triple, seed=0)


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

    monkeypatch.setattr("pyrovae.models.vae.check_supports", talkative)
    assert script.outcome(wrong, 0).startswith("RuntimeError: This is not one sentence")
