"""What fit finds out before it trains, and of each batch as it passes."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pyro
import pyro.distributions as dist
import pytest
import torch
from pyro.infer.autoguide import AutoNormal
from torch import Tensor, nn
from torch.utils.data import DataLoader, IterableDataset, TensorDataset

import pyrovae as pv
from pyrovae.data.batches import Batches
from pyrovae.programs.parameters import find_parameters
from pyrovae.training.preflight import check_other_batches
from pyrovae.training.values import SupportCheck


class Pair(nn.Module):
    """x | z under any distribution of logits, and what is observed made of x in some way."""

    def __init__(self, likelihood: Callable[[Tensor], Any], made: Callable[[Tensor], Tensor] = lambda x: x, width: int = 3):
        super().__init__()
        torch.manual_seed(0)
        self.likelihood, self.made = likelihood, made
        self.decoder, self.encoder = nn.Linear(2, width), nn.Linear(width, 2)
        self.runs = 0

    def model(self, x: Tensor) -> None:
        self.runs += 1
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", self.likelihood(self.decoder(z)).to_event(1), obs=self.made(x))

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x.clamp(-1, 1)), 1.0).to_event(1))


def bernoulli(logits: Tensor) -> Any:
    return dist.Bernoulli(logits=logits)


def poisson(logits: Tensor) -> Any:
    return dist.Poisson(logits.exp())


def beta(logits: Tensor) -> Any:
    return dist.Beta(logits.exp() + 1, logits.exp() + 2)


def normal(logits: Tensor) -> Any:
    return dist.Normal(logits, 1.0)


def weights(module: nn.Module) -> Tensor:
    return torch.nn.utils.parameters_to_vector(module.parameters()).detach().clone()


GOOD = {"bernoulli": torch.ones(4, 3), "poisson": torch.full((4, 3), 2.0), "beta": torch.full((4, 3), 0.4)}
LIKELIHOODS = {"bernoulli": bernoulli, "poisson": poisson, "beta": beta}
WRONG = {"bernoulli": 255.0, "poisson": -1.0, "beta": 1.5}


@pytest.mark.parametrize("made", ["as it is", "computed"])
@pytest.mark.parametrize("likelihood", GOOD)
def test_a_bad_batch_of_a_loader_is_refused_when_it_comes(likelihood: str, made: str) -> None:
    good = GOOD[likelihood]
    bad = good.clone()
    bad[2, 1] = WRONG[likelihood]
    name = likelihood.capitalize()
    place = ", row 2 .counted from 0." if made == "as it is" else ""
    results = []
    for data in (torch.cat([good, bad, good]), good):
        pair = Pair(LIKELIHOODS[likelihood], (lambda x: x) if made == "as it is" else (lambda x: x + 0))
        loader = DataLoader(TensorDataset(data), batch_size=4)
        if data is good:
            pv.fit(pair.model, pair.guide, loader, epochs=1, lr=0.1, progress=False, seed=0)
        else:
            with pytest.raises(ValueError, match=f"In batch 2 of epoch 1{place}: .*outside the support of {name}"):
                pv.fit(pair.model, pair.guide, loader, epochs=1, lr=0.1, progress=False, seed=0)
        results.append(weights(pair))
    assert torch.equal(*results), "the first batch's step stands, and nothing of the second's"


class Labelled(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.head, self.encoder = nn.Linear(2, 3), nn.Linear(2, 2)

    def model(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("y", dist.Categorical(logits=self.head(z)), obs=y)

    def guide(self, x: Tensor, y: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


@pytest.mark.parametrize("loaded", [True, False])
def test_a_label_that_no_class_has_is_refused_with_its_row(loaded: bool) -> None:
    x, y = torch.randn(9, 2), torch.tensor([0, 1, 2, 0, 1, 2, 0, 7, 2])
    pair = Labelled()
    before = weights(pair)
    data = DataLoader(TensorDataset(x, y), batch_size=3) if loaded else (x, y)
    where = "batch 3 of epoch 1, row 1" if loaded else "the data, row 7"
    with pytest.raises(ValueError, match=f"In {where} .*outside the support of Categorical"):
        pv.fit(pair.model, pair.guide, data, epochs=1, batch_size=3, shuffle=False, progress=False)
    assert torch.equal(before, weights(pair)) != loaded


def test_a_loader_whose_data_change_is_checked_in_each_epoch() -> None:
    class Changing(IterableDataset):
        epoch = 0

        def __iter__(self) -> Iterator[Tensor]:
            return iter(torch.full((6, 3), 1.0 if self.epoch < 2 else 0.5))

    data, pair = Changing(), Pair(bernoulli)
    with pytest.raises(ValueError, match=r"In batch 1 of epoch 3, row 0"):
        pv.fit(pair.model, pair.guide, data, epochs=5, batch_size=3, progress=False,
               on_epoch=lambda record: setattr(data, "epoch", record["epoch"]))  # fmt: skip


def test_a_bad_batch_of_a_validation_loader_is_refused_too() -> None:
    good, pair = torch.ones(4, 3), Pair(bernoulli)
    loader = DataLoader(TensorDataset(torch.cat([good, good / 2])), batch_size=4)
    with pytest.raises(ValueError, match=r"In batch 2 of the validation data, row 0 .*outside the support of Bernoulli"):
        pv.fit(pair.model, pair.guide, good, epochs=1, progress=False, validation=loader)
    held_out = torch.cat([good, good, good / 2])
    with pytest.raises(ValueError, match=r"In the data, row 8 .*outside the support of Bernoulli"):
        pv.fit(pair.model, pair.guide, good, epochs=1, batch_size=4, progress=False, validation=held_out)


def test_what_a_transform_makes_is_checked() -> None:
    calls = []

    def grey_at_last(x: Tensor) -> Tensor:
        calls.append(len(x))
        return torch.where(x[:, :1] == 1, x, 0.5)

    x = torch.ones(8, 3)
    x[6] = 0
    pair = Pair(bernoulli)
    with pytest.raises(ValueError, match=r"In batch 4 of epoch 1, row 0 .*outside the support of Bernoulli"):
        pv.fit(pair.model, pair.guide, x, epochs=1, batch_size=2, shuffle=False, transform=grey_at_last, progress=False)
    assert len(calls) > 4, "as they pass, not before"


def test_the_data_are_not_run_through_the_pair_before_the_first_step() -> None:
    pair = Pair(bernoulli)
    steps = []

    class Watched(torch.optim.SGD):
        def step(self, closure: Any = None) -> Any:
            steps.append(pair.runs)
            return super().step(closure)

    x = torch.bernoulli(torch.full((1000, 3), 0.5))
    pv.fit(pair.model, pair.guide, x, epochs=2, batch_size=2, optimizer=Watched, progress=False, compile=False)
    assert steps[0] < 15
    assert len(steps) == 1000
    assert pair.runs == steps[0] + 999, "one run for each step"


@pytest.mark.parametrize("kind", ["nothing", "limits", "sizes"])
def test_supports_that_may_move_are_asked_of_the_pair(kind: str) -> None:
    """A Uniform whose limit is learned, or a Binomial with a total of its own for each datum."""
    made: dict[str, Callable[[Tensor], Any]] = {
        "nothing": bernoulli,
        "limits": lambda logits: dist.Uniform(torch.zeros(()), 2 + logits.exp(), validate_args=False),
        "sizes": lambda logits: dist.Binomial(torch.tensor([1.0, 2.0, 3.0]), logits=logits),
    }
    pair = Pair(made[kind])
    assert SupportCheck(pair.model, pair.guide, (torch.ones(4, 3),)).direct == (kind == "nothing")
    pv.fit(pair.model, pair.guide, torch.ones(9, 3), epochs=2, batch_size=4, progress=False)


class Normalised(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.encoder, self.decoder = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 2)), nn.Linear(2, 3)

    def model(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(self.decoder(z), 1.0).to_event(1), obs=x)

    def guide(self, x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(self.encoder(x), 1.0).to_event(1))


@pytest.mark.parametrize("how", ["methods", "functions"])
def test_early_stopping_restores_parameters_and_buffers(how: str) -> None:
    x, pair = torch.randn(40, 3) + 2, Normalised()
    states = []

    def model(x: Tensor) -> None:
        pyro.module("pair", pair)
        pair.model(x)

    programs = (pair.model, pair.guide) if how == "methods" else (model, lambda x: pair.guide(x))
    history = pv.fit(
        *programs, x, epochs=200, batch_size=10, lr=0.3, validation=torch.randn(20, 3) + 2, patience=3, progress=False, seed=1,
        on_epoch=lambda record: states.append({name: each.clone() for name, each in pair.state_dict().items()}),
    )  # fmt: skip
    assert history.stopped == "no better validation bound for 3 epochs"
    best, now = states[-4], pair.state_dict()
    assert all(torch.equal(best[name], now[name]) for name in now)
    assert not all(torch.equal(best[name], states[-1][name]) for name in now if "running" in name)


def free_functions(*registered: str) -> tuple[Callable, Callable, dict[str, nn.Module]]:
    torch.manual_seed(0)
    encoder, decoder = nn.Linear(3, 2), nn.Linear(2, 3)

    def model(x: Tensor) -> None:
        if "decoder" in registered:
            pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        if "encoder" in registered:
            pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    return model, guide, {"encoder": encoder, "decoder": decoder}


@pytest.mark.parametrize(
    "estimator", ["elbo", "iwae", "trace_elbo", {"kind": "renyi_elbo", "num_particles": 2}, "trace_graph_elbo"]
)
@pytest.mark.parametrize(("registered", "missed"), [("decoder", "encoder"), ("encoder", "decoder")])
def test_networks_that_will_not_train_are_named(registered: str, missed: str, estimator: Any) -> None:
    model, guide, nets = free_functions(registered)
    x = torch.randn(20, 3)
    with pytest.warns(
        UserWarning, match=rf"reaches {missed}\.weight \(\d, \d\), {missed}\.bias \(\d,\), which the optimizer lacks"
    ):
        pv.fit(model, guide, x, estimator=estimator, epochs=1, progress=False)
    for parameter in nets[missed].parameters():
        parameter.requires_grad_(False)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        pv.fit(model, guide, x, estimator=estimator, epochs=1, progress=False)


def test_a_bare_tensor_that_will_not_train_is_named_too() -> None:
    model, *_ = free_functions("decoder")
    shift = torch.zeros(2, requires_grad=True)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(shift + x[:, :2], 1.0).to_event(1))

    with pytest.warns(UserWarning, match=r"reaches shift \(2,\), which the optimizer lacks"):
        pv.fit(model, guide, torch.randn(20, 3), epochs=1, progress=False)


def tied(kind: str) -> tuple[Callable, Callable, Tensor]:
    x = torch.linspace(-2, 2, 20)
    scale = nn.Parameter(torch.tensor(1.0))

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, pyro.param("scale", scale).exp()), obs=x)

    def own(x: Tensor) -> None:
        loc = pyro.param("loc", lambda: torch.zeros(len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, 1.0))

    def matrix(x: Tensor) -> None:
        both = pyro.param("both", lambda: torch.zeros(2, len(x)))
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(both[0], both[1].exp()))

    def flat(x: Tensor) -> None:
        loc, log_scale = pyro.param("flat", lambda: torch.zeros(2 * len(x))).view(len(x), 2).unbind(-1)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(loc, log_scale.exp()))

    return model, {"parameter": own, "matrix": matrix, "flat": flat, "normal": AutoNormal(model)}[kind], x


@pytest.mark.parametrize("kind", ["parameter", "matrix", "flat", "normal"])
@pytest.mark.parametrize("options", [{}, {"batch_size": 5}, {"batch_size": 5, "shuffle": False}, {"loader": True}], ids=str)
def test_pairs_tied_to_one_set_of_data_are_refused_other_batches(kind: str, options: dict) -> None:
    model, guide, x = tied(kind)
    options = dict(options)
    data = DataLoader(TensorDataset(x), batch_size=20, shuffle=True) if options.pop("loader", False) else x
    with pytest.raises(ValueError, match=r"keeps a parameter for each datum .*shuffle=False, batch_size=20"):
        pv.fit(model, guide, data, epochs=1, progress=False, **options)


@pytest.mark.parametrize("kind", ["parameter", "matrix", "flat", "normal"])
def test_pairs_tied_to_one_set_of_data_train_on_it(kind: str) -> None:
    model, guide, x = tied(kind)
    history = pv.fit(model, guide, x, epochs=3, batch_size=20, shuffle=False, progress=False)
    assert len(history.bound) == 3


def test_an_autoguide_in_one_batch_reaches_the_evidence() -> None:
    x = torch.linspace(-2, 2, 20)

    def model(x: Tensor) -> None:
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z, 1.0), obs=x)

    guide = AutoNormal(model, init_scale=0.5)
    history = pv.fit(
        model, guide, x, epochs=600, batch_size=20, shuffle=False, lr=0.05, schedule="cosine", progress=False, seed=0
    )
    exact = (-0.5 * math.log(4 * math.pi) - x.square() / 4).mean().item()
    assert sum(history.bound[-100:]) / 100 == pytest.approx(exact, abs=5e-3)


def test_a_pair_with_a_fixed_batch_and_as_wide_a_layer_is_not_tied() -> None:
    net = nn.Linear(3, 10)

    def model(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", 10):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[:, None] + net(x)[:, :3], 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        with pyro.plate("data", 10):
            pyro.sample("z", dist.Normal(x.sum(-1), 1.0))

    pv.fit(model, guide, torch.randn(30, 3), epochs=1, batch_size=10, progress=False)
    with pytest.raises(ValueError, match=r"last batch of an epoch holds 4 of the 34 data, where the pair fails .*divides 34"):
        pv.fit(model, guide, torch.randn(34, 3), epochs=1, batch_size=10, progress=False)


@pytest.mark.parametrize("loaded", [True, False])
def test_a_last_batch_of_one_under_batch_norm_is_refused_before_the_first_step(loaded: bool) -> None:
    pair, x = Normalised(), torch.randn(21, 3)
    before = {name: each.clone() for name, each in pair.state_dict().items()}
    data = DataLoader(TensorDataset(x), batch_size=10) if loaded else x
    with pytest.raises(ValueError, match=r"holds 1 of the 21 data, where .*more than 1 value per channel.*such as 9") as caught:
        pv.fit(pair.model, pair.guide, data, epochs=1, batch_size=10, progress=False)
    assert ("drop_last=True" in str(caught.value)) == loaded
    assert all(torch.equal(before[name], each) for name, each in pair.state_dict().items())
    assert pair.encoder.training
    pv.fit(pair.model, pair.guide, x, epochs=1, batch_size=9, progress=False)
    # Several particles of one datum are several values, and a layer at rest has none to compute.
    wide = Normalised()
    wide.encoder.eval()
    pv.fit(wide.model, wide.guide, x, epochs=1, batch_size=10, progress=False)


def test_several_particles_of_a_last_datum_are_enough_and_leave_no_trace() -> None:
    """Batch normalisation of the decoder sees as many values as there are particles."""
    torch.manual_seed(0)
    decoder = nn.Sequential(nn.Linear(2, 4), nn.Flatten(0, -2), nn.BatchNorm1d(4), nn.Linear(4, 3))
    encoder = nn.Linear(3, 2)

    def model(x: Tensor) -> None:
        pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(torch.zeros(2), 1.0).to_event(1))
            pyro.sample("x", dist.Normal(decoder(z).reshape(*z.shape[:-1], 3), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x), 1.0).to_event(1))

    x = torch.randn(11, 3)
    train = Batches(x, 5, shuffle=True)
    parameters = find_parameters(model, guide, x[:5])
    decoder.train()
    before = {name: each.clone() for name, each in decoder.state_dict().items()}
    check_other_batches(pv.estimators.IWAE(4), model, guide, (x[:5],), parameters, train)
    with pytest.raises(ValueError, match=r"holds 1 of the 11 data, where .*such as 4"):
        check_other_batches(pv.estimators.IWAE(1), model, guide, (x[:5],), parameters, train)
    assert all(torch.equal(before[name], each) for name, each in decoder.state_dict().items())


@pytest.mark.parametrize("kind", ["Beta", "Gamma", "Dirichlet"])
def test_values_at_the_edge_of_a_density_are_named(kind: str) -> None:
    made: dict[str, Callable[[Tensor], Any]] = {
        "Beta": lambda logits: dist.Beta(2 + logits.exp(), 2 + logits.exp()),
        "Gamma": lambda logits: dist.Gamma(2 + logits.exp(), 1.0),
        "Dirichlet": lambda logits: dist.Dirichlet(2 + logits.exp()[:, None, :]),
    }
    x = torch.full((6, 3), 1 / 3)
    x[2] = torch.tensor([0.0, 0.5, 0.5])
    pair = Pair(made[kind], (lambda x: x[:, None, :]) if kind == "Dirichlet" else (lambda x: x))
    with pytest.raises(
        ValueError, match=rf"{kind} at site 'x' has no finite log-density at 0, which 1 of the 18 .*open interval"
    ):
        pv.fit(pair.model, pair.guide, x, epochs=1, progress=False)


def test_a_zero_in_a_later_batch_is_named_when_it_comes() -> None:
    x = torch.full((40, 3), 0.4)
    x[30, 1] = 0.0
    pair = Pair(lambda logits: dist.Beta(0.5 * logits.sigmoid(), 1.0))
    with pytest.warns(
        UserWarning, match=r"in epoch 1, step 4, which is skipped: Beta at site 'x' has .* at 0.*\(row 30 of the"
    ):
        history = pv.fit(pair.model, pair.guide, x, epochs=1, batch_size=10, shuffle=False, progress=False)
    assert history.skipped == 1
    assert math.isfinite(history.bound[0])


def test_a_later_datum_of_density_zero_is_named_once_and_left_out() -> None:
    x = torch.full((40, 3), 0.4)
    x[30:, 1] = 0.0
    pair = Pair(lambda logits: dist.Gamma(2.0 + 0 * logits, logits.exp()))
    with pytest.warns(UserWarning, match=r"infinite in epoch 1, step 4: Gamma at site 'x' .* at 0, which 10 of") as caught:
        pv.fit(pair.model, pair.guide, x, epochs=2, batch_size=10, shuffle=False, progress=False)
    assert len(caught) == 1


@pytest.mark.parametrize("clip_norm", [None, 1.0])
def test_pixels_under_a_normal_are_told_their_scale(clip_norm: float | None) -> None:
    x = torch.randint(0, 256, (40, 3), generator=torch.Generator().manual_seed(0)).float()
    pair = Pair(normal)
    with pytest.warns(
        UserWarning, match=r"bits per dimension: Normal at site 'x' observes values from \d+ to 25\d: divide them"
    ):
        pv.fit(pair.model, pair.guide, x, epochs=1, progress=False, clip_norm=clip_norm)
    pair = Pair(lambda logits: dist.Normal(logits, (-logits.square()).exp()))
    with (
        pytest.warns(UserWarning, match=r"bits per dimension"),
        pytest.warns(UserWarning, match=r"is skipped"),
        pytest.raises(
            FloatingPointError, match=r"step \d+ and .*: Normal at site 'x' observes values from .*data / 255.*dequantized"
        ),
    ):
        pv.fit(pair.model, pair.guide, x, epochs=50, lr=100.0, optimizer="sgd", progress=False, clip_norm=clip_norm)


def test_a_scale_that_fits_passes_without_remark() -> None:
    x = 50 + 10 * torch.randn(40, 3)
    pair = Pair(lambda logits: dist.Normal(50 + logits, 10.0))
    pv.fit(pair.model, pair.guide, x, epochs=1, progress=False)


@pytest.mark.parametrize(("clip_norm", "cure"), [(None, "or set clip_norm"), (5.0, "or clip_norm")])
def test_a_cure_is_not_what_was_done_already(clip_norm: float | None, cure: str) -> None:
    pair = Pair(lambda logits: dist.Normal(logits, 1e-3 + (-logits.square()).exp()))
    with (
        pytest.warns(UserWarning, match="is skipped"),
        pytest.raises(FloatingPointError, match=rf"lower the learning rate \(1e\+18\), {cure}\."),
    ):
        pv.fit(pair.model, pair.guide, torch.randn(20, 3), epochs=50, lr=1e18, optimizer="sgd", progress=False,
               clip_norm=clip_norm, seed=0)  # fmt: skip


def test_infinite_values_made_by_a_program_are_named() -> None:
    x = torch.ones(40, 3)
    x[35] = 0.0
    pair = Pair(normal, torch.log)
    with pytest.raises((UserWarning, ValueError), match=r"infinite|outside the support"):
        pv.fit(pair.model, pair.guide, x, epochs=1, batch_size=10, shuffle=False, progress=False)


def test_programs_and_optimizers_of_another_kind_get_one_sentence() -> None:
    vae = pv.make_vae(3, latent_dim=2, hidden=[4])
    x = torch.ones(5, 3)
    for bad, cure in (
        (vae, r"pass its \.model and its \.guide"),
        (nn.Module(), "a module with a forward"),
        ("vae", "pass a function"),
    ):
        with pytest.raises(ValueError, match=f"The model must be a Pyro program, got .*{cure}"):
            pv.fit(bad, vae.guide, x, progress=False)
    with pytest.raises(ValueError, match=r"The guide must be a Pyro program"):
        pv.fit(vae.model, vae, x, progress=False)
    with pytest.raises(TypeError, match=r"^VAE is a pair of programs and cannot be called: .* fit, log_marginal, embed"):
        vae(x)
    for optimizer in (pyro.optim.Adam({"lr": 1e-3}), torch.optim.SGD(vae.parameters(), lr=0.1), 3):
        with pytest.raises(ValueError, match=r"optimizer must be a name such as 'adam' or a callable .*got an instance of"):
            pv.fit(vae.model, vae.guide, x, optimizer=optimizer, progress=False)


def test_a_rehearsal_leaves_no_trace() -> None:
    x = torch.bernoulli(torch.full((20, 3), 0.5))
    pair = Pair(bernoulli)
    elbo = pv.estimators.ELBO(warm_up=10)
    torch.manual_seed(5)
    expected = torch.rand(3)
    parameters = find_parameters(pair.model, pair.guide, x)
    from pyrovae.training.preflight import rehearse

    torch.manual_seed(5)
    loss = rehearse(elbo, pair.model, pair.guide, (x,), parameters)
    assert torch.equal(torch.rand(3), expected)
    assert math.isfinite(loss)
    assert elbo.current_beta == pv.estimators.ELBO(warm_up=10).current_beta
    assert all(parameter.grad is None for parameter in parameters)


@pytest.mark.parametrize(
    ("verb", "registered"), [("fit", True), ("log_marginal", True), ("log_marginal", False), ("exact", False)]
)
def test_lazy_modules_are_run_first(verb: str, registered: bool) -> None:
    torch.manual_seed(0)
    decoder, encoder = nn.Sequential(nn.LazyLinear(4), nn.Tanh(), nn.LazyLinear(5)), nn.LazyLinear(1)

    def model(x: Tensor) -> None:
        if registered:
            pyro.module("decoder", decoder)
        with pyro.plate("data", len(x)):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(decoder(z[..., None]), 1.0).to_event(1), obs=x)

    def guide(x: Tensor) -> None:
        if registered:
            pyro.module("encoder", encoder)
        with pyro.plate("data", len(x)):
            pyro.sample("z", dist.Normal(encoder(x)[..., 0], 1.0))

    x = torch.randn(20, 5)
    options = {"fit": {"epochs": 1, "progress": False}, "log_marginal": {"num_samples": 5}, "exact": {}}[verb]
    with pytest.raises(ValueError, match=r"LazyLinear must have a shape .* call its network once on a batch"):
        getattr(pv, verb)(model, guide, x, **options)
    decoder(torch.zeros(2, 1)), encoder(x)
    assert getattr(pv, verb)(model, guide, x, **options)
