from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from sklearn.datasets import load_digits
from torch.utils.data import DataLoader, Dataset

from pyrovae.data.batches import Batches, arguments, as_arrays
from pyrovae.data.datasets import binarize, dequantize, load
from pyrovae.models.vae import make_vae

MNIST = Path(__file__).parents[2] / "shared" / "data"
needs_mnist = pytest.mark.skipif(not (MNIST / "MNIST" / "raw").is_dir(), reason=f"the MNIST files are not under {MNIST}")


def test_digits_split_is_fixed_and_complete():
    one, two = load("digits"), load("digits")
    assert torch.equal(one.train, two.train)
    assert one.train.shape == (1437, 1, 8, 8)
    assert one.test.shape == (360, 1, 8, 8)
    both = torch.cat([one.train, one.test]).flatten(1).numpy()
    original = load_digits().data
    np.testing.assert_array_equal(both[np.lexsort(both.T)], original[np.lexsort(original.T)])
    assert one.likelihood == {"kind": "beta_binomial", "total_count": 16}
    # Each label still belongs to its image.
    label_of = {
        image.tobytes(): label for image, label in zip(load_digits().images.astype("f4"), load_digits().target, strict=True)
    }
    assert [label_of[image.numpy().tobytes()] for image in one.test[:, 0]] == one.test_labels.tolist()


@needs_mnist
def test_mnist_is_read_through_torchvision_and_binarised():
    dynamic = load("mnist", root=str(MNIST))
    assert dynamic.train.shape == (60000, 1, 28, 28)
    assert dynamic.test.shape == (10000, 1, 28, 28)
    assert dynamic.transform is binarize
    assert set(dynamic.test.unique().tolist()) == {0.0, 1.0}
    assert dynamic.train.max() == 1
    assert 0.1 < dynamic.train.mean() < 0.15
    static = load("mnist", root=str(MNIST), binarize="static")
    assert static.transform is None
    assert set(static.train[:100].unique().tolist()) == {0.0, 1.0}
    assert torch.equal(static.test, dynamic.test), "one binarised test set for both"
    assert torch.equal(static.train[:50], load("mnist", root=str(MNIST), binarize="static").train[:50])
    grey = load("mnist", root=str(MNIST), binarize="none")
    assert len(grey.test.unique()) > 200
    # The binarised test set was drawn from these probabilities.
    assert (dynamic.test - grey.test).mean().abs() < 1e-3
    assert ((dynamic.test == 1) & (grey.test == 0)).sum() == 0


@needs_mnist
def test_mnist_in_levels_and_with_noise():
    levels, noisy = (load("mnist", root=str(MNIST), binarize=how) for how in ("levels", "dequantized"))
    assert (levels.train.min(), levels.train.max()) == (0, 255)
    assert torch.equal(noisy.test.floor(), levels.test)
    assert torch.equal(noisy.test, load("mnist", root=str(MNIST), binarize="dequantized").test)
    assert torch.equal(noisy.train, levels.train)
    assert noisy.transform is dequantize
    for split in (levels, noisy, load("mnist", root=str(MNIST), binarize="none")):
        vae = make_vae(split.data_shape, latent_dim=2, hidden=[4], likelihood=split.likelihood)
        assert np.isfinite(vae.log_marginal(split.test[:3], num_samples=2).log_px).all()


def test_missing_mnist_says_where_to_look_and_downloads_nothing(tmp_path: Path):
    with pytest.raises(FileNotFoundError, match=r"--data\.root"):
        load("mnist", root=str(tmp_path))
    assert not list(tmp_path.iterdir())


def test_npy_file(tmp_path: Path):
    array = np.random.default_rng(0).normal(size=(50, 3))
    np.save(tmp_path / "mine.npy", array)
    split = load(path=str(tmp_path / "mine.npy"), test_fraction=0.3)
    assert (len(split.train), len(split.test), split.name) == (35, 15, "mine")
    both = torch.cat([split.train, split.test]).numpy()
    np.testing.assert_allclose(np.sort(both, 0), np.sort(array, 0).astype("f4"))


LEVELS = np.random.default_rng(0).integers(0, 256, (30, 7, 5))


@pytest.mark.parametrize(
    ("array", "kind", "reason"),
    [
        (LEVELS.astype(np.uint8), "discretized_logistic", "8-bit levels 0..255"),
        (LEVELS.astype("f4"), "discretized_logistic", "divide them by 255"),
        ((LEVELS // 4).astype(np.uint8), "discretized_logistic", "dequantized"),
        (LEVELS.reshape(30, 35).astype(np.uint8), "discretized_logistic", "8-bit levels"),
        (LEVELS.reshape(30, 35), "negative_binomial", "counts 0..255"),
        (LEVELS // 16, "negative_binomial", "counts 0..15"),
        (LEVELS * 100.0, "negative_binomial", "counts 0..25500"),
        (LEVELS > 100, "bernoulli", "0 or 1"),
        ((LEVELS > 100).astype("f8"), "bernoulli", "0 or 1"),
        (LEVELS / 255, "continuous_bernoulli", "grey values in [0, 1]"),
        (LEVELS.reshape(30, 35) / 255, "normal", "real numbers from 0 to 1"),
        (LEVELS - 100, "normal", "integers, some below zero, from -100 to 155; standardise"),
        (LEVELS / 7 - 3, "normal", "real numbers from -3 to 33.43"),
    ],
)
def test_the_likelihood_of_a_file_is_chosen_by_support(tmp_path: Path, array: np.ndarray, kind: str, reason: str):
    np.save(tmp_path / "x.npy", array)
    split = load(path=str(tmp_path / "x.npy"))
    assert split.likelihood["kind"] == kind
    assert reason in split.reason
    assert split.unit == ("image" if kind in ("discretized_logistic", "continuous_bernoulli") and array.ndim == 3 else "datum")
    vae = make_vae(split.data_shape, latent_dim=2, hidden=[4], likelihood=split.likelihood)
    assert np.isfinite(vae.log_marginal(split.test, num_samples=2).log_px).all(), "all values lie in the support"


def test_binarize_is_honoured_for_a_file_or_refused(tmp_path: Path):
    path, grey, counts = (str(tmp_path / f"{name}.npy") for name in ("levels", "grey", "counts"))
    np.save(path, LEVELS.astype(np.uint8))
    np.save(grey, LEVELS / 255)
    np.save(counts, LEVELS * 3)
    plain = load(path=path)
    noisy, levels, unit, drawn = (load(path=path, binarize=how) for how in ("dequantized", "levels", "none", "static"))
    assert torch.equal(noisy.test.floor(), plain.test)
    assert not torch.equal(noisy.test, plain.test)
    assert noisy.transform is dequantize
    assert noisy.likelihood["kind"] == "dequantized"
    assert torch.equal(levels.train, plain.train)
    assert torch.equal(unit.train, plain.train / 255)
    assert unit.likelihood == {"kind": "continuous_bernoulli"}
    assert set(drawn.train.unique().tolist()) == {0.0, 1.0}
    assert load(path=grey, binarize="dynamic").transform is binarize
    assert load(path=grey, binarize="none").train.max() == 1
    for name, how in ((counts, "none"), (counts, "levels"), (grey, "levels"), (grey, "dequantized")):
        with pytest.raises(ValueError, match=rf"binarize='{how}' must be given 8-bit levels 0\.\.255.*leave binarize out"):
            load(path=name, binarize=how)
    with pytest.raises(ValueError, match="the digits are counts"):
        load("digits", binarize="none")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"nonsense", "cannot be read"),
        (b"", "cannot be read"),
        (np.array([["a", "b"]]), "must be an array of numbers"),
        (np.ones(3), r"shape \(N"),
    ],
)
def test_bad_npy_files(tmp_path: Path, content: object, message: str):
    path = tmp_path / "bad.npy"
    path.write_bytes(content) if isinstance(content, bytes) else np.save(path, content)
    with pytest.raises(ValueError, match=message):
        load(path=str(path))


def test_unknown_names():
    with pytest.raises(ValueError, match="did you mean 'mnist'"):
        load("mnits")
    with pytest.raises(ValueError, match="did you mean 'dynamic'"):
        load("mnist", binarize="dynamik")
    with pytest.raises(FileNotFoundError, match=r"nope\.npy"):
        load(path="nope.npy")


def test_batches_cover_every_datum_once_in_a_new_order_each_pass():
    x, y = torch.arange(10.0)[:, None], torch.arange(10)
    batches = Batches((x, y), 4, shuffle=True)
    passes = [torch.cat([b[1] for b in batches]) for _ in range(2)]
    for order in passes:
        assert sorted(order.tolist()) == list(range(10))
    assert not torch.equal(passes[0], passes[1])
    assert batches.num_batches == 3
    assert all(torch.equal(b[0][:, 0].long(), b[1]) for b in batches), "the arrays stay aligned"


def test_map_datasets_and_loaders():
    class Squares(Dataset):
        def __len__(self) -> int:
            return 7

        def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
            return torch.tensor([float(i)]), i

    batches = Batches(Squares(), 3, dtype=torch.float64)
    assert [len(b[0]) for b in batches] == [3, 3, 1]
    assert next(iter(batches))[0].dtype == torch.float64
    assert next(iter(batches))[1].dtype == torch.int64, "labels stay integers"
    assert batches.num_data == 7
    assert [len(b[0]) for b in Batches(DataLoader(Squares(), batch_size=5), 3)] == [5, 2]


def test_arguments_are_as_many_as_the_program_takes():
    batch = (torch.zeros(2), torch.ones(2))
    assert len(arguments(lambda x: None, batch)) == 1
    assert len(arguments(lambda x, y=None: None, batch)) == 2
    assert len(arguments(lambda *xs: None, batch)) == 2
    with pytest.raises(ValueError, match="takes x, y, z"):
        arguments(lambda x, y, z: None, batch)


def test_lists_and_integers_are_data():
    (x,) = as_arrays([[1, 0], [0, 1]])
    assert x.dtype == torch.int64
    assert as_arrays(np.float64([[1.5]]), torch.float32)[0].dtype == torch.float32


def test_arrays_of_odd_layout_are_the_same_numbers():
    x = np.arange(12.0, dtype="f4").reshape(4, 3)
    read_only = x.copy()
    read_only.flags.writeable = False
    for odd in (x[::-1][::-1], x[::-1], x.astype(">f4"), read_only, np.asfortranarray(x)):
        np.testing.assert_array_equal(as_arrays(odd)[0].numpy(), np.asarray(odd, "f4"))


def test_a_module_takes_what_its_forward_takes():
    class Program(torch.nn.Module):
        def forward(self, x: torch.Tensor) -> None: ...

    assert len(arguments(Program(), (torch.zeros(2), torch.ones(2)))) == 1


def test_binarize_draws_each_pixel_with_its_own_probability():
    torch.manual_seed(0)
    # Some lie within one of the 65,536 steps of the first sixteen bits, where the next eight decide.
    levels = torch.tensor([0.0, 2**-17, 0.25, 1 / 3, 0.5, 1 - 2**-17, 1.0], dtype=torch.float64)
    for dtype in (torch.float32, torch.float64):
        drawn = binarize(levels.to(dtype).expand(400_001, 7))
        assert drawn.dtype == dtype
        assert set(drawn.unique().tolist()) == {0.0, 1.0}
        error = (levels * (1 - levels) / len(drawn)).sqrt()
        assert ((drawn.double().mean(0) - levels).abs() <= 4 * error + 1e-12).all()
    assert binarize(torch.zeros(1_000_000)).sum() == 0
    assert binarize(torch.ones(1_000_000)).sum() == 1_000_000
    # Data share bits, but only where eight others left both pixels open.
    pixels = binarize(torch.full((1600, 1001), 0.5))
    for one, other in ((pixels[:, 1:], pixels[:, :-1]), (pixels[1:], pixels[:-1]), (pixels[::16], pixels[15::16])):
        assert (one * other).mean() == pytest.approx(0.25, abs=4e-3)
    for shape in ((), (0, 3), (5,), (17,), (3, 2, 2)):
        assert binarize(torch.ones(shape)).shape == shape


@pytest.mark.parametrize("row", [0, 15, 16])
def test_the_bits_that_decide_between_two_levels_are_spent(row: int, monkeypatch: pytest.MonkeyPatch):
    words = torch.zeros(5, dtype=torch.int64)
    parts = words.view(torch.uint8)
    monkeypatch.setattr(torch, "randint", lambda *args, **kwargs: words)
    x = torch.zeros(17, 2)
    # A pixel's own eight bits, and then sixteen of its column that it shares with the fifteen data beside it.
    place = 34 + 2 * (row // 16)
    parts[2 * row], parts[place], parts[place + 1] = 128, 1, 64
    x[row, 0] = 0.5 + 2**-16 + 64 * 2**-24
    assert binarize(x)[row, 0] == 0.0
    assert binarize(x + 2**-24)[row, 0] == 1.0


def test_a_batch_is_loaded_from_its_rows():
    x, y = np.arange(10.0)[:, None], np.arange(10)
    for shuffle in (False, True):
        batches = Batches((x, y), batch_size=4, shuffle=shuffle, transform=lambda x: 2 * x)
        found = [batches.load(*inputs) for inputs in batches.inputs()]
        assert [len(label) for _, label in found] == [4, 4, 2]
        assert all(torch.equal(a[:, 0], 2 * b.to(a.dtype)) for a, b in found)
        assert sorted(torch.cat([b for _, b in found]).tolist()) == list(range(10))
