"""What a user brings reaches the programs as meant: each array in its place, all data, in their order, once, in its type."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pyro
import pyro.distributions as dist
import pytest
import torch
from torch import Tensor, nn
from torch.utils.data import (
    BatchSampler,
    DataLoader,
    Dataset,
    IterableDataset,
    RandomSampler,
    Sampler,
    SequentialSampler,
    SubsetRandomSampler,
    TensorDataset,
    WeightedRandomSampler,
    default_collate,
)

import pyrovae as pv
from pyrovae.data.batches import Batches, arguments, as_arrays
from pyrovae.data.streams import in_order, is_one_pass

X = torch.linspace(-2.0, 2.0, 20)


def truth(x: Any) -> np.ndarray:
    """log p(x) of z ~ N(0, 1), x | z ~ N(z, 1)."""
    return -math.log(4 * math.pi) / 2 - np.asarray(x, dtype=np.float64) ** 2 / 4


def model(x: Tensor, temperature: float = 1.0) -> None:
    with pyro.plate("data", x.shape[0]):
        z = pyro.sample("z", dist.Normal(torch.zeros_like(x / 2), 1.0))
        pyro.sample("x", dist.Normal(z, temperature), obs=x)


def guide(x: Tensor, temperature: float = 1.0) -> None:
    with pyro.plate("data", x.shape[0]):
        pyro.sample("z", dist.Normal(x / 2, math.sqrt(0.5)))


def masked_model(x: Tensor, mask: Tensor | None = None) -> None:
    """Each number of a datum is the datum's z plus noise, where it was observed."""
    with pyro.plate("data", x.shape[0]):
        z = pyro.sample("z", dist.Normal(torch.zeros(()).to(x), 1.0))
        distribution = dist.Normal(z[..., None].expand(*z.shape, x.shape[1]), 1.0)
        pyro.sample("x", (distribution if mask is None else distribution.mask(mask)).to_event(1), obs=x)


def masked_guide(x: Tensor, mask: Tensor | None = None) -> None:
    seen = torch.ones_like(x) if mask is None else mask.to(x)
    with pyro.plate("data", x.shape[0]):
        pyro.sample("z", dist.Normal((x * seen).sum(-1) / (1 + seen.sum(-1)), (1 + seen.sum(-1)) ** -0.5))


def masked_truth(x: np.ndarray, mask: np.ndarray) -> np.ndarray:
    found = []
    for row, seen in zip(x, mask, strict=True):
        size = int(seen.sum())
        covariance = torch.eye(size, dtype=torch.float64) + 1
        normal = dist.MultivariateNormal(torch.zeros(size, dtype=torch.float64), covariance)
        found.append(normal.log_prob(torch.as_tensor(row[seen])).item())
    return np.array(found)


# Masked arrays


def masked_table() -> np.ma.MaskedArray:
    x = np.random.default_rng(0).normal(size=(20, 4))
    hidden = np.random.default_rng(1).random((20, 4)) < 0.4
    hidden[:, 0] = False
    x[hidden] = 1e3
    return np.ma.masked_array(x, mask=hidden)


def test_a_masked_array_is_its_values_and_what_it_shows() -> None:
    table = masked_table()
    expected = masked_truth(table.data, ~table.mask)
    scored = pv.log_marginal(masked_model, masked_guide, table, num_samples=5, seed=0)
    np.testing.assert_allclose(scored.log_px, expected, rtol=1e-9)
    by_hand = pv.log_marginal(masked_model, masked_guide, (table.filled(0.0), ~table.mask), num_samples=5, seed=0)
    np.testing.assert_array_equal(scored.log_px, by_hand.log_px)
    for door in (pv.exact, lambda *args, **_: pv.ais(*args, num_temperatures=30, num_chains=64, seed=0)):
        found = door(masked_model, masked_guide, table)
        np.testing.assert_allclose(found.log_px, expected, atol=0.3)


def test_a_list_of_masked_rows_keeps_what_it_hides() -> None:
    rows = [np.ma.masked_array([1.0, 1e3], mask=[False, True]), np.ma.masked_array([2.0, 3.0], mask=[False, False])]
    values, mask = as_arrays(rows)
    assert values.tolist() == [[1, 0], [2, 3]]
    assert mask.tolist() == [[True, False], [True, True]]


def test_a_masked_array_beside_labels_and_of_counts_and_missing_values() -> None:
    # The mask goes to the parameter of that name, wherever it stands, and NaN under it does not matter.
    counts = np.ma.masked_array([[3, 999], [1, 2]], mask=[[False, True], [False, False]])
    values, shown = as_arrays(counts)
    assert values.tolist() == [[3, 0], [1, 2]]
    assert shown.tolist() == [[True, False], [True, True]]
    assert values.dtype == torch.int64

    def program(x: Tensor, y: Tensor | None = None, mask: Tensor | None = None) -> None: ...

    labels = np.array([0, 1])
    _x, y, mask = as_arrays((counts, labels), program=program)
    assert torch.equal(y, torch.as_tensor(labels))
    assert torch.equal(mask, shown)
    _x, mask = as_arrays((counts, labels), program=masked_model)
    assert torch.equal(mask, shown)
    _x, mask, y = as_arrays((counts, labels), program=lambda x, mask, y: None)
    assert (mask.dtype, y.dtype) == (torch.bool, torch.int64)
    broken = np.ma.masked_invalid([[1.0, math.nan], [math.inf, 2.0]])
    assert as_arrays(broken)[0].tolist() == [[1.0, 0.0], [0.0, 2.0]]


def test_a_vae_takes_masked_arrays_everywhere() -> None:
    torch.manual_seed(0)
    table = masked_table().astype("f4")
    vae = pv.make_vae(4, latent_dim=1, hidden=[8], likelihood="normal")
    both = [
        vae.log_marginal(data, num_samples=20, seed=0).log_px
        for data in (table, (table.filled(0), ~table.mask), (table, range(20)))
    ]
    np.testing.assert_array_equal(both[0], both[1])
    np.testing.assert_array_equal(both[0], both[2])
    history = vae.fit(table, epochs=2, batch_size=7, progress=False, seed=1)
    assert all(bound > -30 for bound in history.bound), "nothing of 1e3 was seen"


@pytest.mark.parametrize(
    ("program", "message"),
    [
        (lambda x: None, "nothing takes the mask"),
        (lambda x, temperature=1.0: None, "nothing takes the mask"),
        (lambda x, y: None, "takes x, y, but the data give 1 array.s. and a mask, which only a parameter named 'mask' takes"),
        (lambda *xs: None, r"pass the tuple \(filled, ~mask\)"),
        (lambda x, beta=1.0, mask=None: None, "nothing goes to 'beta', which stands before it"),
    ],
)
def test_a_program_without_a_place_for_the_mask_is_told_so(program: Callable[..., Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        as_arrays(masked_table(), program=program)
    shown = np.ma.masked_array(np.ones((3, 2)), mask=False)
    if "beta" not in message and "takes x, y" not in message:
        assert len(as_arrays(shown, program=program)) == 1, "a mask that hides nothing is none"


def test_two_masked_arrays_are_refused() -> None:
    with pytest.raises(ValueError, match="2 masked arrays"):
        as_arrays((masked_table(), masked_table()))


# Surplus arrays


@pytest.mark.parametrize("y", [torch.full((20,), 2.0), torch.arange(20), torch.ones(20, 3)])
def test_an_array_does_not_replace_a_setting(y: Tensor) -> None:
    with pytest.raises(ValueError, match=r"array 1 of shape \(20,\) goes to 'x', but nothing takes array 2 .*temperature"):
        pv.log_marginal(model, guide, (X, y), num_samples=5)
    with pytest.raises(ValueError, match="temperature"):
        pv.fit(model, guide, (X, y), epochs=1, progress=False)
    # A data set has labels of its own, whatever the program.
    scored = pv.log_marginal(model, guide, TensorDataset(X, y), num_samples=5)
    np.testing.assert_allclose(scored.log_px, truth(X), rtol=1e-5)


def test_a_vae_takes_the_mask_beside_labels() -> None:
    torch.manual_seed(0)
    vae = pv.make_vae(5, latent_dim=2, hidden=[8], likelihood="normal")
    x, mask = torch.randn(12, 5), torch.rand(12, 5) < 0.6
    hidden = torch.where(mask, x, 50.0)
    right = vae.log_marginal((hidden, mask), num_samples=20, seed=0).log_px
    for batch in ((hidden, torch.arange(12), mask), (hidden, mask, torch.arange(12))):
        np.testing.assert_allclose(vae.log_marginal(batch, num_samples=20, seed=0).log_px, right, rtol=1e-6)
        loader = DataLoader(TensorDataset(*batch), batch_size=5)
        assert np.abs(vae.log_marginal(loader, num_samples=20, seed=0).log_px - right).max() < 5
        bounds = [
            vae.fit(data, epochs=1, batch_size=12, lr=1e-9, seed=0, progress=False).bound[0] for data in (batch, (hidden, mask))
        ]
        assert bounds[0] == bounds[1]
    with pytest.raises(ValueError, match="nothing takes array 2"):
        vae.log_marginal((hidden, torch.rand(12), mask), num_samples=20)


def test_arrays_that_nothing_takes() -> None:
    x = torch.randn(6, 3)
    for mask in (torch.rand(6, 3) < 0.5, (torch.rand(6, 3) < 0.5).float()):
        # Also from a data set: what is hidden would be scored.
        with pytest.raises(ValueError, match="nothing takes the mask"):
            arguments(lambda x: None, (x, mask))
    assert len(arguments(lambda x: None, (x, torch.ones(6, 3, dtype=torch.bool)))) == 1
    for labels in (torch.arange(6), torch.eye(6), torch.eye(6).bool()):
        assert len(as_arrays((x, labels), program=lambda x: None)) == 1
    for weights in (torch.rand(6), torch.rand(6, 2)):
        with pytest.raises(ValueError, match="nothing takes array 2"):
            as_arrays((x, weights), program=lambda x: None)
        assert len(arguments(lambda x: None, (x, weights))) == 1, "beside the images of a data set"


def test_what_each_parameter_takes() -> None:
    x, y, mask = torch.randn(6, 3), torch.arange(6), torch.rand(6, 3) < 0.5

    def taken(program: Callable[..., Any], *batch: Tensor) -> list[int]:
        return [next(i for i, array in enumerate((x, y, mask)) if array is each) for each in arguments(program, batch)]

    assert taken(lambda x, m: None, x, mask) == [0, 2], "required parameters are filled in order, whatever their names"
    assert taken(lambda x, y=None: None, x, y) == [0, 1]
    assert taken(lambda x, y=None, mask=None: None, x, mask, y) == [0, 1, 2]
    assert taken(lambda x, mask=None, y=None: None, x, y, mask) == [0, 2, 1]
    assert taken(lambda x, obs_mask=None: None, x, y) == [0]
    assert taken(lambda *xs: None, x, y, mask) == [0, 1, 2]

    def annealed(x: Tensor, beta: float | None = None) -> None: ...

    assert taken(annealed, x, y) == [0]
    with pytest.raises(ValueError, match="nothing goes to 'y', which stands before it"):
        taken(lambda x, y=None, mask=None: None, x, mask)


def test_estimators_are_compared_on_what_the_model_takes() -> None:
    torch.manual_seed(0)
    vae = pv.make_vae(5, latent_dim=2, hidden=[8], likelihood="normal")
    x, mask = torch.randn(12, 5), torch.rand(12, 5) < 0.6
    options: dict[str, Any] = {"num_draws": 10, "reference": {"kind": "iwae", "num_particles": 4}}
    one, other = (
        pv.compare_estimators(vae.model, vae.guide, data, ["elbo"], **options)
        for data in ((x, mask), (x, torch.arange(12), mask))
    )
    np.testing.assert_array_equal(one.bound, other.bound)


# Order


class Even(Sampler):
    """Every other datum, always the same."""

    def __iter__(self) -> Iterator[int]:
        return iter(range(0, 20, 2))

    def __len__(self) -> int:
        return 10


ROWS = TensorDataset(X)


def _interleaved(rows: list) -> list:
    return [*rows[::2], *rows[1::2]]


DOORS: dict[str, Callable[[Any], np.ndarray]] = {
    "log_marginal": lambda data: pv.log_marginal(model, guide, data, num_samples=5).log_px,
    "exact": lambda data: pv.exact(model, guide, data).log_px,
    "ais": lambda data: pv.ais(model, guide, data, num_chains=100, num_temperatures=40, seed=0).log_px,
    "refine": lambda data: pv.refine(model, guide, data, steps=20, seed=0).elbo,
    "decompose": lambda data: pv.decompose(model, guide, data, num_samples=5, progress=False).evidence.log_px,
}


@pytest.mark.parametrize("workers", [0, 1])
def test_data_of_several_shapes_are_refused_with_their_shapes(workers: int) -> None:
    ragged = DataLoader([torch.zeros(3, 4), torch.zeros(3, 5)], batch_size=2, num_workers=workers)
    vae = pv.make_vae(12, latent_dim=2, hidden=[4])
    for use in (vae.log_marginal, lambda data: vae.fit(data, epochs=1, progress=False)):
        with pytest.raises(ValueError, match=r"one shape, got \[3, 4\] and \[3, 5\] in one batch: resize or pad them"):
            use(ragged)


@pytest.mark.parametrize("door", DOORS)
def test_scores_are_in_the_order_of_the_data(door: str) -> None:
    loader = DataLoader(ROWS, batch_size=6, shuffle=True, drop_last=True)
    found = DOORS[door](loader)
    np.testing.assert_allclose(found, truth(X), atol=0.25 if door in ("ais", "refine") else 1e-4)


@pytest.mark.parametrize(
    "loader",
    [
        DataLoader(ROWS, batch_size=6, drop_last=True),
        DataLoader(ROWS, batch_size=6, shuffle=True, generator=torch.Generator()),
        DataLoader(ROWS, batch_size=6, sampler=SubsetRandomSampler(range(20)), drop_last=True),
        DataLoader(ROWS, batch_sampler=BatchSampler(RandomSampler(ROWS), 6, drop_last=True)),
        DataLoader(ROWS, batch_sampler=BatchSampler(SequentialSampler(ROWS), 6, drop_last=True)),
        DataLoader(ROWS, batch_size=6, shuffle=True, num_workers=1),
    ],
)
def test_loaders_that_shuffle_or_drop_are_read_in_order(loader: DataLoader) -> None:
    batches = Batches(loader, 1, ordered=True)
    assert batches.num_batches == 4
    assert torch.equal(torch.cat([x for (x,) in batches]), X)
    assert torch.equal(batches.peek()[0], X[:6])


@pytest.mark.parametrize(
    "order", [lambda rows: rows[::-1], lambda rows: sorted(rows, key=lambda row: -float(row[0].sum())), _interleaved]
)
def test_a_collate_fn_that_changes_the_order_is_refused(order: Any) -> None:
    loader = DataLoader(ROWS, batch_size=6, collate_fn=lambda rows: default_collate(order(rows)))
    with pytest.raises(ValueError, match="collate_fn must keep the order of its data"):
        pv.log_marginal(model, guide, loader, num_samples=5)


@pytest.mark.parametrize(
    "collate",
    [
        lambda rows: torch.stack([row[0] for row in rows]),
        lambda rows: (torch.stack([row[0] for row in rows]) + torch.rand(len(rows)), torch.ones(len(rows), dtype=torch.bool)),
        lambda rows: {"x": torch.stack([row[0] for row in rows])}["x"] if len(rows) > 1 else rows[1],
    ],
)
def test_a_collate_fn_that_keeps_the_order_is_read(collate: Any) -> None:
    loader = DataLoader(ROWS, batch_size=6, collate_fn=collate)
    assert len(torch.cat([batch[0] for batch in Batches(loader, 6, ordered=True)])) == 20


def test_batches_that_come_as_they_are_ready_are_read_in_order() -> None:
    loader = DataLoader(ROWS, batch_size=6, num_workers=2, in_order=False)
    assert in_order(loader).in_order


def test_a_fixed_sampler_keeps_its_order() -> None:
    loader = DataLoader(ROWS, batch_size=4, sampler=Even(), drop_last=True)
    assert torch.equal(torch.cat([x for (x,) in in_order(loader)]), X[::2])
    backwards = DataLoader(ROWS, batch_size=4, sampler=list(range(19, -1, -1)))
    assert in_order(backwards) is backwards
    whole = DataLoader(ROWS, batch_size=4)
    assert in_order(whole) is whole
    shuffled = Batches(DataLoader(ROWS, batch_size=20, shuffle=True), 1)
    assert not torch.equal(next(iter(shuffled))[0], X), "training keeps the loader's own order"


@pytest.mark.parametrize(
    "sampler",
    [
        WeightedRandomSampler([1.0] * 20, 20),
        SubsetRandomSampler(range(15)),
        RandomSampler(ROWS, replacement=True),
        RandomSampler(ROWS, num_samples=10),
    ],
)
def test_a_random_part_of_the_data_is_refused(sampler: Sampler) -> None:
    with pytest.raises(ValueError, match=r"draws \d+ of 20 data at random.*pass the data set"):
        pv.log_marginal(model, guide, DataLoader(ROWS, batch_size=6, sampler=sampler), num_samples=5)


def test_a_part_of_the_data_by_rank_is_refused() -> None:
    sampler = torch.utils.data.DistributedSampler(ROWS, num_replicas=2, rank=0, shuffle=False)
    with pytest.raises(ValueError, match="DistributedSampler gives this process a part"):
        pv.log_marginal(model, guide, DataLoader(ROWS, batch_size=6, sampler=sampler), num_samples=5)


def test_looking_at_the_order_leaves_the_random_stream_alone() -> None:
    state = torch.get_rng_state()
    in_order(DataLoader(ROWS, batch_size=6, sampler=SubsetRandomSampler(range(20))))
    assert torch.equal(torch.get_rng_state(), state)


# Streams


class Once(IterableDataset):
    """Over one generator, which it gives out itself."""

    def __init__(self, rows: Any = X):
        self.rows = (row for row in rows)

    def __iter__(self) -> Iterator[Any]:
        return self.rows


class OnceInTurn(Once):
    def __iter__(self) -> Iterator[Any]:
        for row in self.rows:
            yield 1 * row


class Itself(IterableDataset):
    def __init__(self) -> None:
        self.left = list(range(100))

    def __iter__(self) -> Iterator[Any]:
        return self

    def __next__(self) -> Tensor:
        if not self.left:
            raise StopIteration
        return torch.tensor(self.left.pop(0) / 50)


class Again(IterableDataset):
    """Its own iterator too, but one that starts anew."""

    def __iter__(self) -> Iterator[Any]:
        self.row = 0
        return self

    def __next__(self) -> Tensor:
        self.row += 1
        if self.row > 100:
            raise StopIteration
        return torch.tensor((self.row - 1) / 50)


class Renewed(IterableDataset):
    """Holds a generator, but a new one in each pass."""

    def __iter__(self) -> Iterator[Any]:
        self.rows = (torch.tensor(i / 50) for i in range(100))
        yield from self.rows


HUNDRED = torch.arange(100) / 50
STREAMS: dict[str, Callable[[], IterableDataset]] = {
    "once": lambda: Once(HUNDRED),
    "once in turn": lambda: OnceInTurn(HUNDRED),
    "itself": Itself,
    "again": Again,
    "renewed": Renewed,
}


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_stream_is_scored_whole(name: str, loaded: bool) -> None:
    data: Any = STREAMS[name]()
    data = DataLoader(data, batch_size=7, drop_last=True) if loaded else data
    scored = pv.log_marginal(model, guide, data, num_samples=5)
    np.testing.assert_allclose(scored.log_px, truth(HUNDRED), rtol=1e-5)


def pair_with_a_network() -> tuple[Callable, Callable, list[int]]:
    shift, seen = nn.Linear(1, 1), []

    def counted(x: Tensor) -> None:
        seen.append(len(x))
        pyro.module("shift", shift)
        guide(x + 0 * shift(x[:, None])[:, 0])

    return model, counted, seen


@pytest.mark.parametrize("name", STREAMS)
@pytest.mark.parametrize("loaded", [False, True])
def test_a_second_epoch_of_a_stream_is_refused_before_the_first(name: str, loaded: bool) -> None:
    once = name not in ("again", "renewed")
    for epochs in (1, 2):
        data: Any = STREAMS[name]()
        assert is_one_pass(data) == once
        data = DataLoader(data, batch_size=7) if loaded else data
        pyro.clear_param_store()
        run, see, seen = pair_with_a_network()
        if once and epochs == 2:
            with pytest.raises(ValueError, match="can be read only once, so epochs must be 1, got 2"):
                pv.fit(run, see, data, epochs=epochs, batch_size=7, progress=False)
            assert not seen
            assert len(list(Batches(data, 7))) == 15, "nothing was taken from it"
            continue
        history = pv.fit(run, see, data, epochs=epochs, batch_size=7, progress=False, compile=False)
        assert history.records[-1]["step"] == 15 * epochs
        assert history.bound[-1] == pytest.approx(truth(HUNDRED).mean(), abs=1e-2)


def test_a_stream_that_hides_its_generator_ends_after_one_epoch_with_what_it_learned() -> None:
    rows = iter(HUNDRED.tolist())

    class Hidden(IterableDataset):
        def __iter__(self) -> Iterator[Any]:
            for row in rows:
                yield torch.tensor(row)

    run, see, _ = pair_with_a_network()
    records: list[Any] = []
    with pytest.raises(ValueError, match=r"can be read only once\. What the first pass trained is kept"):
        pv.fit(run, see, Hidden(), epochs=2, batch_size=7, progress=False, on_epoch=records.append)
    assert len(records) == 1
    with pytest.raises(ValueError, match="empty, or a stream that has been read already"):
        pv.log_marginal(model, guide, Hidden(), num_samples=5)


def test_a_dataset_that_was_read_before_starts_anew_all_the_same() -> None:
    for data in (Again(), Renewed()):
        assert len(list(data)) == 100
        assert not is_one_pass(data)
    for data in (Once(), OnceInTurn()):
        next(iter(data))
        assert is_one_pass(data)


def test_validation_streams_too() -> None:
    run, see, _ = pair_with_a_network()
    with pytest.raises(ValueError, match="epochs must be 1, got 3"):
        pv.fit(run, see, X, validation=Once(), epochs=3, progress=False)
    history = pv.fit(run, see, X, validation=Once(), epochs=1, progress=False)
    assert history.validation[0] == pytest.approx(truth(X).mean(), abs=1e-2)


def test_a_loader_whose_workers_stay_is_read_whole_by_two_at_once() -> None:
    loader = DataLoader(ROWS, batch_size=6, num_workers=1, persistent_workers=True)
    run, see, _ = pair_with_a_network()
    history = pv.fit(run, see, loader, validation=loader, epochs=2, progress=False)
    assert history.records[-1]["step"] == 8
    assert history.validation[-1] == pytest.approx(truth(X).mean(), abs=1e-2)


def test_a_stream_read_by_processes_is_read_anew_in_each_epoch() -> None:
    run, see, _ = pair_with_a_network()
    history = pv.fit(run, see, DataLoader(Once(), batch_size=7, num_workers=1), epochs=2, progress=False)
    assert history.records[-1]["step"] == 6


def test_a_plain_generator_is_no_data() -> None:
    with pytest.raises(ValueError, match=r"must be an array of numbers, got generator"):
        pv.log_marginal(model, guide, (row for row in X), num_samples=5)


# Types


def test_float64_data_of_a_pair_without_parameters_stay() -> None:
    x = np.linspace(-2, 2, 20) + 1e-10
    scored = pv.log_marginal(model, guide, x, num_samples=5)
    np.testing.assert_allclose(scored.log_px, truth(x), rtol=1e-13)
    exact = pv.exact(model, guide, torch.as_tensor(x))
    np.testing.assert_allclose(exact.log_px, truth(x), rtol=1e-9)
    both = pv.log_marginal(model, guide, X, num_samples=5)
    np.testing.assert_allclose(both.log_px, truth(X), rtol=1e-5)


def network_pair(inputs: int) -> tuple[Callable, Callable, nn.Module]:
    net = nn.Linear(inputs, 1)

    def decoder(x: Tensor, y: Tensor | None = None) -> None:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Normal(z[..., None].expand(*z.shape, inputs), 100.0).to_event(1), obs=x)
            if y is not None:
                pyro.sample("y", dist.Categorical(logits=torch.stack([z, -z, 0 * z], -1)), obs=y)

    def encoder(x: Tensor, y: Tensor | None = None) -> None:
        pyro.module("net", net)
        with pyro.plate("data", x.shape[0]):
            z = net(x)[:, 0] / 255
            pyro.sample("z", dist.Normal(z if y is None else z + torch.eye(3)[y][:, 0], 1.0))

    return decoder, encoder, net


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int64])
def test_integer_images_are_cast_for_a_network_with_a_word(dtype: torch.dtype) -> None:
    x = torch.randint(0, 256, (12, 6), generator=torch.Generator().manual_seed(0))
    decoder, encoder, _ = network_pair(6)
    right = pv.log_marginal(decoder, encoder, x.float(), num_samples=20, seed=0).log_px
    for data in (x.to(dtype), TensorDataset(x.to(dtype)), DataLoader(TensorDataset(x.to(dtype)), batch_size=12)):
        with pytest.warns(UserWarning, match=rf"array 1 of the data, of {dtype}, is cast to torch.float32"):
            scored = pv.log_marginal(decoder, encoder, data, num_samples=20, seed=0)
        np.testing.assert_array_equal(scored.log_px, right)
    with pytest.warns(UserWarning, match="array 1"):
        pv.fit(decoder, encoder, x.to(dtype), epochs=1, progress=False)
    # The labels beside them stay what they are: an index.
    labels = torch.arange(12) % 3
    right = pv.log_marginal(decoder, encoder, (x.float(), labels), num_samples=20, seed=0).log_px
    with pytest.warns(UserWarning, match="array 1"):
        scored = pv.log_marginal(decoder, encoder, (x.to(dtype), labels), num_samples=20, seed=0)
    np.testing.assert_array_equal(scored.log_px, right)


def test_integers_that_a_pair_takes_stay_integers() -> None:
    kinds: set[torch.dtype] = set()

    def counts(x: Tensor) -> None:
        kinds.add(x.dtype)
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Gamma(2.0, 1.0))
            pyro.sample("x", dist.Poisson(z), obs=x)

    def posterior(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Gamma(2.0 + x, 2.0))

    x = torch.arange(10, dtype=torch.uint8)
    scored = pv.log_marginal(counts, posterior, x, num_samples=5)
    exact = dist.GammaPoisson(2.0, 1.0).log_prob(x.double()).numpy()
    np.testing.assert_allclose(scored.log_px, exact, rtol=1e-5)
    assert kinds == {torch.uint8}


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16, torch.int64, torch.float32])
def test_simulated_counts_pass_255(dtype: torch.dtype) -> None:
    def counts(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(0.0, 0.1))
            pyro.sample("x", dist.Poisson((6 + z).exp()), obs=x)

    def posterior(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(torch.zeros(x.shape[0]), 0.1))

    like = torch.full((4,), 200).to(dtype)
    options: dict[str, Any] = {"num_data": 6, "num_chains": 16, "num_temperatures": 40, "seed": 0}
    sandwich = pv.bdmc(counts, posterior, like, **options)
    assert sandwich.data[0].min() > 255, "exp(6) is 403"
    assert sandwich.gap == pytest.approx(0, abs=4 * sandwich.gap_se + 0.3)


def test_simulated_fractions_are_not_rounded_to_the_type_of_the_data() -> None:
    like = torch.arange(4)  # integers under a Normal
    sandwich = pv.bdmc(model, guide, like, num_data=6, num_chains=16, num_temperatures=40, seed=0)
    assert np.abs(sandwich.data[0] - np.round(sandwich.data[0])).max() > 0.05
    assert sandwich.gap == pytest.approx(0, abs=4 * sandwich.gap_se + 0.3)


def test_simulated_classes_stay_an_index() -> None:
    table = torch.eye(3).log_softmax(-1)

    def classes(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", dist.Normal(0.0, 1.0))
            pyro.sample("x", dist.Categorical(logits=torch.stack([z, -z, 0 * z], -1)), obs=x)

    def posterior(x: Tensor) -> None:
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(table[x.long()][:, 0], 1.0))

    sandwich = pv.bdmc(classes, posterior, torch.arange(3), num_data=6, num_chains=8, num_temperatures=20, seed=0)
    assert sandwich.data[0].dtype == np.int64


def test_a_map_dataset_is_read_in_order_and_labels_are_left_out() -> None:
    class Images(Dataset):
        def __len__(self) -> int:
            return 20

        def __getitem__(self, i: int) -> tuple[Tensor, int]:
            return X[i], i % 3

    scored = pv.log_marginal(model, guide, Images(), num_samples=5)
    np.testing.assert_allclose(scored.log_px, truth(X), rtol=1e-5)


@pytest.mark.parametrize("data", [3.0, np.float64(2.0), DataLoader(ROWS, batch_size=None)], ids=["float", "numpy", "loader"])
def test_a_single_number_is_no_data(data: Any) -> None:
    with pytest.raises(ValueError, match=r"one entry per datum along their first dimension, got a single number"):
        pv.log_marginal(model, guide, data, num_samples=5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32, torch.float64])
def test_data_take_the_type_of_a_network_in_float64(dtype: torch.dtype) -> None:
    net = nn.Linear(1, 1).double()

    def encoder(x: Tensor) -> None:
        pyro.module("net", net)
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", dist.Normal(x / 2 + 0 * net(x[:, None])[:, 0], math.sqrt(0.5)))

    scored = pv.log_marginal(model, encoder, X.to(dtype), num_samples=5)
    np.testing.assert_allclose(scored.log_px, truth(X.to(dtype).double()), rtol=1e-12)
    pv.fit(model, encoder, X.to(dtype), epochs=1, progress=False)


def test_booleans_under_a_density_are_numbers() -> None:
    with pytest.warns(UserWarning, match="torch.bool, is cast to"):
        scored = pv.log_marginal(model, guide, X > 0, num_samples=5)
    np.testing.assert_allclose(scored.log_px, truth((X > 0).double()), rtol=1e-5)
