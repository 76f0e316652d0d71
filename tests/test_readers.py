"""Files and containers of data: what they hold arrives with names, labels and masks, or is refused in one sentence."""

from __future__ import annotations

import gzip
import os
import pickle
import struct
import warnings
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import polars as pl
import pytest
import scipy.sparse as sp
import torch
from numpy.testing import assert_array_equal
from PIL import Image
from safetensors.torch import save_file

import pyrovae as pv
from pyrovae.data import Batches, DataError, Table, as_arrays, load, read
from pyrovae.data.rows import ArrayRows, Rows, SparseRows
from pyrovae.data.synthetic import SYNTHETIC, synthetic
from pyrovae.data.vision import VISION
from pyrovae.models.vae import make_vae

COUNTS = np.random.default_rng(0).poisson(2.0, (20, 5))
FRAME = pd.DataFrame(COUNTS, columns=list("abcde"))


def _write(path: Path, form: str) -> Path:
    """The counts, and the labels 0, 1, 0, 1, ... beside them where the format has a place for them."""
    path = path / f"x{form}"
    labels = np.arange(20) % 2
    if form == ".npy":
        np.save(path, COUNTS)
    elif form == ".npz":
        np.savez_compressed(path, x=COUNTS, y=labels)
    elif form in (".csv", ".tsv", ".csv.gz"):
        FRAME.assign(kind=labels).to_csv(path, sep="\t" if form == ".tsv" else ",")
    elif form == ".parquet":
        FRAME.assign(kind=labels).to_parquet(path)
    elif form == ".pt":
        torch.save((torch.as_tensor(COUNTS), torch.as_tensor(labels)), path)
    elif form == ".safetensors":
        save_file({"x": torch.as_tensor(COUNTS), "labels": torch.as_tensor(labels)}, path)
    elif form == ".h5":
        with h5py.File(path, "w") as file:
            file["data"], file["labels"] = COUNTS, labels
    else:
        write_h5ad(path, sp.csr_matrix(COUNTS) if "sparse" in str(path) else COUNTS)
    return path


def write_h5ad(path: Path, matrix: Any) -> None:
    """A file in the layout of AnnData 0.8 to 0.12, as its ``write_h5ad`` writes it."""
    with h5py.File(path, "w") as file:
        for name, each in (("X", matrix), ("layers/doubled", 2 * matrix)):
            if sp.issparse(each):
                group = file.create_group(name)
                group.attrs["encoding-type"], group.attrs["shape"] = f"{each.format}_matrix", each.shape
                group["data"], group["indices"], group["indptr"] = each.data, each.indices, each.indptr
            else:
                file[name] = each
        var, obs = file.create_group("var"), file.create_group("obs")
        var["_index"], obs["_index"] = list("abcde"), [f"cell{i}" for i in range(20)]
        var.attrs["_index"] = obs.attrs["_index"] = "_index"
        kind = obs.create_group("kind")
        kind["categories"], kind["codes"] = ["B cell", "NK cell", "T cell"], np.array([0, 2, -1, 2] * 5, np.int8)
        obs["depth"], obs["site"] = np.linspace(1, 2, 20), ["here", "there"] * 10
        age = obs.create_group("age")
        age["values"], age["mask"] = np.arange(20), np.arange(20) == 3


@pytest.mark.parametrize("form", [".npy", ".npz", ".csv", ".tsv", ".csv.gz", ".parquet", ".pt", ".safetensors", ".h5", ".h5ad"])
def test_every_format_gives_the_same_numbers(tmp_path: Path, form: str) -> None:
    tables = form in (".csv", ".tsv", ".csv.gz", ".parquet")
    table = read(_write(tmp_path, form), **({"labels": "kind"} if tables else {}))
    assert_array_equal(table.x, COUNTS)
    assert table.x.dtype.kind == "i"
    assert table.mask is None
    assert table.columns == (tuple("abcde") if tables or form == ".h5ad" else ())
    if form not in (".npy", ".h5ad"):
        assert_array_equal(table.labels, np.arange(20) % 2)
    (x,) = as_arrays(str(_write(tmp_path, form)), program=lambda x: None) if not tables else as_arrays(table)[:1]
    assert_array_equal(x, COUNTS)


@pytest.mark.parametrize("form", ["csr", "csc", "coo", "torch_coo", "torch_csr", "h5ad_csr", "h5ad_csc", "npz"])
def test_sparse_rows_are_the_dense_ones(tmp_path: Path, form: str) -> None:
    dense = COUNTS * (COUNTS > 2) * 1.5
    if form.startswith("torch"):
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "Sparse CSR tensor support is in beta")
            tensor = torch.as_tensor(dense)
            matrix: Any = tensor.to_sparse() if form == "torch_coo" else tensor.to_sparse_csr()
    else:
        matrix = getattr(sp, f"{form.removeprefix('h5ad_')}_matrix" if form != "npz" else "csr_matrix")(dense)
    if form.startswith("h5ad"):
        write_h5ad(tmp_path / "x.h5ad", matrix)
        unread = read(tmp_path / "x.h5ad", memory=1).x
        assert isinstance(unread, SparseRows)
        assert_array_equal(unread[:], dense)
        matrix = read(tmp_path / "x.h5ad")
        assert_array_equal(read(tmp_path / "x.h5ad", key="doubled").x, 2 * dense)
    elif form == "npz":
        sp.save_npz(tmp_path / "x.npz", matrix)
        matrix = str(tmp_path / "x.npz")
    assert_array_equal(as_arrays(matrix)[0], dense)
    torch.manual_seed(0)
    found = torch.cat([x for (x,) in Batches(matrix, 7, shuffle=True)])
    torch.manual_seed(0)
    assert torch.equal(found, torch.cat([x for (x,) in Batches(dense, 7, shuffle=True)])), "in the order of the dense data"


def test_entries_in_one_place_are_added_and_bad_ones_refused() -> None:
    assert_array_equal(SparseRows([0, 2], [1, 1], [5.0, 7.0], 3)[:], [[0, 12, 0]])
    wrong = (([0, 3], [0, 1], "row starts"), ([0, 2], [0, 3], "columns from 0 to 2"), ([1, 2], [0, 0], "row starts"))
    for starts, columns, match in wrong:
        with pytest.raises(DataError, match=match):
            SparseRows(starts, columns, [1.0, 1.0], 3)


@pytest.mark.parametrize("library", ["pandas", "pandas_nullable", "polars", "csv", "parquet"])
def test_empty_cells_of_frames_are_missing(tmp_path: Path, library: str) -> None:
    columns = {"whole": [1, None, 3], "real": [0.5, 1.5, None], "flag": [True, False, True]}
    frame: Any = pl.DataFrame(columns) if library == "polars" else pd.DataFrame(columns)
    if library == "pandas_nullable":
        frame = frame.astype({"whole": "Int64", "real": "Float64", "flag": "boolean"})
    if library == "csv":
        frame.to_csv(tmp_path / "x.csv", index=False)
        frame = tmp_path / "x.csv"
    elif library == "parquet":
        frame.to_parquet(tmp_path / "x.parquet")
        frame = tmp_path / "x.parquet"
    x, mask = as_arrays(frame, program=lambda x, mask=None: None)
    assert_array_equal(x, [[1, 0.5, 1], [0, 1.5, 0], [3, 0, 1]])
    assert_array_equal(mask, [[1, 1, 1], [0, 1, 1], [1, 0, 1]])
    with pytest.raises(ValueError, match="nothing takes the mask that hides values"):
        as_arrays(frame, program=lambda x: None)


def test_labels_and_covariates_keep_their_names() -> None:
    frame = FRAME.assign(kind=["b", "a", None, "b"] * 5, batch=["u", "v"] * 10, age=np.arange(20.0), depth=2.0)
    table = read(frame, labels="kind", covariates=["batch", "age"], size_factors="depth", ignore=["e"])
    assert (table.columns, table.classes) == (("a", "b", "c", "d"), ("a", "b"))
    assert table.labels[:4].tolist() == [1, 0, -1, 1]
    assert table.covariate_names == ("batch=u", "batch=v", "age")
    assert_array_equal(table.covariates[:2], [[1, 0, 0], [0, 1, 1]])
    assert repr(table).startswith("Table(x (20, 4), labels (20,), covariates (20, 3), size_factors (20,)")

    def program(x: Any, size_factors: Any, covariates: Any) -> None: ...

    x, sizes, covariates = as_arrays(table, program=program)
    assert (x.shape, sizes.tolist(), covariates.shape) == ((20, 4), [2.0] * 20, (20, 3))
    # Categories keep their numbers where one of them is absent.
    categories = pd.Series(pd.Categorical(["z", "y"] * 10, ["x", "y", "z"]))
    assert read(FRAME.assign(kind=categories), labels="kind").labels[:2].tolist() == [2, 1]
    assert as_arrays((FRAME, categories))[1][:2].tolist() == [2, 1]


def test_anndata_files_give_layers_names_and_columns_of_obs(tmp_path: Path) -> None:
    path = tmp_path / "x.h5ad"
    write_h5ad(path, COUNTS)
    table = read(path, key="doubled", labels="kind", covariates=["site"], size_factors="depth")
    assert_array_equal(table.x, 2 * COUNTS)
    assert (table.columns, table.classes) == (tuple("abcde"), ("B cell", "NK cell", "T cell"))
    assert table.labels[:4].tolist() == [0, 2, -1, 2]
    assert (table.covariate_names, table.size_factors[-1]) == (("site=here", "site=there"), 2.0)
    for options, match in (
        ({"labels": "kinds"}, "did you mean 'kind'"),
        ({"key": "raw"}, r"There is no layer 'raw'; choose one of X, doubled"),
        ({"covariates": ["age"]}, "column 'age' must have no empty cell, got one in row 3"),
    ):
        with pytest.raises(DataError, match=match):
            read(path, **options)


def test_an_anndata_in_memory_is_read_without_anndata() -> None:
    held = type("AnnData", (), {"__module__": "anndata._core.anndata"})()
    held.X, held.layers = sp.csr_matrix(COUNTS), {"raw": COUNTS * 3.0}
    held.obs, held.var_names = pd.DataFrame({"kind": ["a", "b"] * 10}), pd.Index(list("abcde"))
    table = read(held, labels="kind")
    assert_array_equal(table.x[:], COUNTS)
    assert (table.columns, table.classes) == (tuple("abcde"), ("a", "b"))
    assert_array_equal(as_arrays(read(held, key="raw"))[0], COUNTS * 3.0)


def test_dictionaries_go_to_the_parameters_of_their_names() -> None:
    x, size = torch.randn(6, 3), torch.rand(6)

    def program(size: Any, x: Any, mask: Any = None) -> None: ...

    assert [each.shape for each in as_arrays({"x": x, "size": size}, program=program)] == [(6,), (6, 3)]
    loader = torch.utils.data.DataLoader([{"x": row, "size": each} for row, each in zip(x, size, strict=True)], batch_size=4)
    assert torch.equal(next(iter(Batches(loader, 4, program=program)))[1], x[:4])
    masked = np.ma.masked_array(x.numpy(), x.numpy() > 0)
    assert len(as_arrays({"x": masked, "size": size}, program=program)) == 3
    with pytest.raises(ValueError, match="no parameter 'sizes', which the data name"):
        as_arrays({"x": x, "sizes": size}, program=program)
    with pytest.raises(ValueError, match="takes 'y' by keyword only"):
        as_arrays({"x": x, "y": size}, program=lambda x, *, y: None)
    with pytest.raises(ValueError, match=r"\(\*args\), so the array 'x'"):
        as_arrays({"x": x}, program=lambda *args: None)


def test_text_files_with_and_without_names(tmp_path: Path) -> None:
    def said(text: str, name: str = "x.csv", **options: Any) -> Table:
        (tmp_path / name).write_text(text)
        return read(tmp_path / name, **options)

    assert said("1,2\n3,4\n").x.tolist() == [[1, 2], [3, 4]]
    assert said("1,2\n3,4\n").columns == ("column 0", "column 1")
    assert said(",0,1\n0,1,2\n1,3,4\n").x.tolist() == [[1, 2], [3, 4]], "an index, as to_csv writes it"
    assert said("0,1\n5,2\n3,4\n").x.tolist() == [[5, 2], [3, 4]], "columns without names, as to_csv writes them"
    assert said("a;b\n1,5;2\n3;4\n").x.tolist() == [[1.5, 2], [3, 4]], "decimal commas"
    assert said("a\tb\n1\t2\n3\t4", "x.tsv").x.tolist() == [[1, 2], [3, 4]]
    assert said("cell,a\nAC-1,1\nAC-2,2\n").x.tolist() == [[1], [2]]
    assert "'cell' names the rows" in said("cell,a\nAC-1,1\nAC-2,2\n").note
    assert said("\ufeffa,b\n1,2\n").columns == ("a", "b")
    for text, match in (
        ("a,b\n1,2\n3,x\n", r"x\.csv: column 'b' must hold numbers, got 'x' in row 1 \(counted from 0\)"),
        ("a,b\n1,2\n3,4,5\n", r"x\.csv cannot be read as a text file \(.*line 3"),
        ("a,b\n1,inf\n", "column 'b' must hold finite numbers, got inf in row 0"),
        ("", "got an empty one"),
        ("a,b\n", "must have a row for each datum, got none"),
    ):
        with pytest.raises(ValueError, match=match):
            load(path=_text(tmp_path, text))
    with pytest.raises(DataError, match="'a' twice"):
        read(pd.DataFrame([[1, 2]], columns=["a", "a"]))
    with pytest.raises(DataError, match="did you mean 'kind'"):
        said("a,kind\n1,u\n", labels="kinds")


def _text(folder: Path, text: str) -> Path:
    (folder / "x.csv").write_text(text)
    return folder / "x.csv"


class _Trap:
    """Unpickled, it writes a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.path}",)


@pytest.mark.parametrize("form", [".npy", ".npz", ".pt", ".parquet", ".h5", ".safetensors", ".csv"])
def test_no_file_runs_code(tmp_path: Path, form: str) -> None:
    trap, path = _Trap(tmp_path / "sprung"), tmp_path / f"x{form}"
    if form == ".npy":
        np.save(path, np.array([[trap]]), allow_pickle=True)
    elif form == ".npz":
        np.savez(path, x=np.array([[trap]]), allow_pickle=True)
    elif form == ".pt":
        torch.save({"x": trap}, path)
    else:
        path.write_bytes(pickle.dumps(trap))
    with pytest.raises(DataError, match=rf"{path.name}"):
        read(path)
    assert not (tmp_path / "sprung").exists()


def test_bad_arrays_name_file_row_and_column(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    holes = COUNTS.astype(float)
    holes[3, 2] = np.nan
    for array, match in (
        (
            holes,
            r"x\.npy must hold finite numbers, got .* in 1 of 20 rows, the first nan in row 3, column 2 \(counted from 0\)",
        ),
        (COUNTS + 1j, "must be an array of numbers, got dtype complex128"),
        (COUNTS[:, 0], r"must hold one datum per row, shape \(N, \.\.\.\), got an array of shape \(20,\)"),
        (np.array([["a"]]), "must be an array of numbers, got dtype <U1"),
        (np.zeros(3, [("a", int)]), "must be an array of numbers"),
    ):
        np.save(path, array)
        with pytest.raises(DataError, match=match):
            read(path)
    np.save(path, holes)
    table = read(path, missing=True)
    assert (table.x[3, 2], table.mask.sum()) == (0, 99)
    path.write_bytes(path.read_bytes()[:-8])
    with pytest.raises(DataError, match="must have 800 bytes of numbers, got 792: it is damaged"):
        read(path)
    np.savez(tmp_path / "x.npz", counts=COUNTS, other=COUNTS)
    with pytest.raises(DataError, match=r"holds 2 arrays \(counts \(20, 5\), other \(20, 5\)\): say which has the data"):
        read(tmp_path / "x.npz")
    assert_array_equal(read(tmp_path / "x.npz", key="other").x, COUNTS)
    for name, match in (("x.xls", r"must end in \.npy, .* got \.xls"), ("x.png", "give the folder")):
        (tmp_path / name).write_bytes(b"")
        with pytest.raises(DataError, match=match):
            read(tmp_path / name)
    with pytest.raises(DataError, match="takes no option 'colour'"):
        read(path, colour="rgb")


def test_what_other_arrays_of_a_file_are_for(tmp_path: Path) -> None:
    np.savez(tmp_path / "x.npz", x=COUNTS, y=np.array(["u", "v"] * 10), mask=COUNTS > 0, size=np.ones(20), other=np.ones(20))
    path = tmp_path / "x.npz"
    assert read(path).classes == ("u", "v")
    assert len(as_arrays(path, program=lambda x, size, mask=None: None)) == 3
    assert_array_equal(as_arrays(path, program=lambda x, mask=None: None)[1], COUNTS > 0)
    np.savez(path, x=COUNTS, mask=COUNTS)
    with pytest.raises(DataError, match="the mask must have the shape of the data"):
        read(path)


def test_integers_of_any_width_and_byte_order_arrive(tmp_path: Path) -> None:
    for kind in ("u1", "u2", "u4", "u8", "i1", "i8", ">i4", ">f8", "f2", "g", "?"):
        np.save(tmp_path / "x.npy", (COUNTS % 2 if kind == "?" else COUNTS).astype(kind))
        (x,) = as_arrays(tmp_path / "x.npy")
        assert_array_equal(x.double(), (COUNTS % 2 if kind == "?" else COUNTS).astype(float))


def _images(folder: Path, sizes: list[tuple[int, int]], mode: str = "RGB", classes: tuple[str, ...] = ("cat", "dog")) -> None:
    generator = np.random.default_rng(0)
    for number, (height, width) in enumerate(sizes):
        (folder / classes[number % len(classes)]).mkdir(parents=True, exist_ok=True)
        pixels = generator.integers(0, 256, (height, width, 3), dtype=np.uint8)
        Image.fromarray(pixels).convert(mode).save(folder / classes[number % len(classes)] / f"{number}.png")


def test_a_folder_of_images(tmp_path: Path) -> None:
    _images(tmp_path / "same", [(6, 8)] * 4)
    table = read(tmp_path / "same")
    assert (table.x.shape, table.x.dtype, table.classes) == ((4, 3, 6, 8), np.uint8, ("cat", "dog"))
    assert table.labels.tolist() == [0, 0, 1, 1], "in the order of the paths"
    with Image.open(tmp_path / "same" / "cat" / "0.png") as image:
        assert_array_equal(table.x[0], np.asarray(image).transpose(2, 0, 1))
    (tmp_path / "same" / "notes.txt").write_text("not an image")
    (tmp_path / "same" / ".hidden.png").write_text("nor this")
    assert len(read(tmp_path / "same")) == 4
    assert_array_equal(read(tmp_path / "same", memory=1).x[[2, 0]], table.x[[2, 0]])
    assert read(tmp_path / "same", colour="grey", size=[5, 7]).x.shape == (4, 1, 5, 7)
    _images(tmp_path / "mixed", [(10, 20), (14, 30), (16, 24)])
    table = read(tmp_path / "mixed")
    assert table.x.shape == (3, 3, 14, 24)
    assert "rgb images of 14 x 24, scaled and cut from 10 x 20 to 16 x 24" in table.note
    _images(tmp_path / "grey", [(6, 8)] * 2, "L", ("",))
    assert (read(tmp_path / "grey").x.shape, read(tmp_path / "grey").labels) == ((2, 1, 6, 8), None)
    _images(tmp_path / "large", [(100, 200)] * 2)
    assert read(tmp_path / "large").x.shape == (2, 3, 32, 64)


def test_bad_images_are_named(tmp_path: Path) -> None:
    _images(tmp_path, [(6, 8)] * 2)
    path = tmp_path / "cat" / "0.png"
    whole = path.read_bytes()
    for content, match in ((b"nonsense", "cannot be read as an image"), (whole[:60], "cannot be read as an image")):
        path.write_bytes(content)
        with pytest.raises(DataError, match=rf"0\.png {match}"):
            read(tmp_path)
    Image.fromarray(np.zeros((6, 8), np.int32)).save(tmp_path / "cat" / "0.tiff")
    path.unlink()
    with pytest.raises(DataError, match=r"0\.tiff must have eight bits in a channel, got the mode I"):
        read(tmp_path)
    with pytest.raises(DataError, match=r"must hold images .* got none"):
        read(_empty(tmp_path / "empty"))


def _empty(folder: Path) -> Path:
    folder.mkdir()
    return folder


def _idx(path: Path, array: np.ndarray, compress: bool = False) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    content = b"\0\0\x08" + bytes([array.ndim]) + struct.pack(f">{array.ndim}I", *array.shape) + array.tobytes()
    path.write_bytes(gzip.compress(content) if compress else content)


@pytest.mark.parametrize("name", ["mnist", "fashion_mnist", "kmnist", "emnist", "cifar10", "svhn", "omniglot"])
def test_the_data_sets_of_torchvision_are_read_from_its_folders(tmp_path: Path, name: str) -> None:
    generator = np.random.default_rng(0)
    grey, labels = generator.integers(0, 256, (6, 28, 28), dtype=np.uint8), np.arange(6, dtype=np.uint8) % 3
    colour = generator.integers(0, 256, (6, 3, 32, 32), dtype=np.uint8)
    expected = grey[:, None]
    if name in ("mnist", "fashion_mnist", "kmnist", "emnist"):
        folder = tmp_path / VISION[name][0] / "raw"
        for part in ("emnist-balanced-train", "emnist-balanced-test") if name == "emnist" else ("train", "t10k"):
            suffix = ".gz" if name == "kmnist" else ""
            _idx(folder / f"{part}-images-idx3-ubyte{suffix}", grey, bool(suffix))
            _idx(folder / f"{part}-labels-idx1-ubyte{suffix}", labels, bool(suffix))
        expected = grey.transpose(0, 2, 1)[:, None] if name == "emnist" else expected
    elif name == "cifar10":
        expected = np.concatenate([colour] * 5)
        folder = tmp_path / "cifar-10-batches-py"
        folder.mkdir()
        for part in (*(f"data_batch_{number}" for number in range(1, 6)), "test_batch"):
            held = {"data": colour.reshape(6, -1), "labels": labels.tolist()}
            (folder / part).write_bytes(pickle.dumps(held, protocol=2))
    elif name == "svhn":
        from scipy.io import savemat

        expected = colour
        for part in ("train", "test"):
            digits = np.array([10, 1, 2, 10, 1, 2])[:, None]
            savemat(tmp_path / f"{part}_32x32.mat", {"X": colour.transpose(2, 3, 1, 0), "y": digits})
    else:
        expected = np.stack([np.kron(np.eye(3, dtype=np.uint8) * 255, np.ones((35, 35), np.uint8))] * 2)[:, None]
        for part in ("background", "evaluation"):
            for character in ("character01", "character02"):
                folder = tmp_path / "omniglot-py" / f"images_{part}" / "Latin" / character
                folder.mkdir(parents=True)
                Image.fromarray(expected[0, 0]).convert("1").save(folder / "0001_01.png")
    split = load(name, root=str(tmp_path), binarize="levels")
    assert_array_equal(split.train, expected)
    assert split.train_labels[:3].tolist() == ([0, 1] if name == "omniglot" else [0, 1, 2])
    assert split.likelihood == {"kind": "discretized_logistic"}
    for path in tmp_path.rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    with pytest.raises((DataError, FileNotFoundError), match=r"fetch|under"):
        load(name, root=str(tmp_path))
    with pytest.raises(FileNotFoundError, match=r"--data\.root"):
        load(name, root=str(tmp_path / "elsewhere"))


def test_a_pickle_of_cifar_runs_no_code(tmp_path: Path) -> None:
    folder = tmp_path / "cifar-10-batches-py"
    folder.mkdir()
    (folder / "data_batch_1").write_bytes(pickle.dumps(_Trap(tmp_path / "sprung")))
    with pytest.raises(DataError, match=r"must hold arrays only, got posix\.system"):
        load("cifar10", root=str(tmp_path))
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("name", list(SYNTHETIC))
def test_the_log_density_of_synthetic_data_is_known(name: str) -> None:
    x, log_px = synthetic(name, 20_000)
    split = load(name)
    assert torch.equal(split.test_log_px, synthetic(name, 1000, seed=1)[1])
    assert torch.equal(split.test.double(), synthetic(name, 1000, seed=1)[0].float().double())
    vae = make_vae(split.data_shape, latent_dim=2, hidden=[4], likelihood=split.likelihood)
    assert np.isfinite(vae.log_marginal(split.test[:3], num_samples=2).log_px).all()
    if name == "bernoulli_mixture":
        place = torch.tensor([4.0, 2.0, 1.0], dtype=torch.float64)
        code = (x[:, :3] @ place).long()
        every = torch.cartesian_prod(*[torch.tensor([0.0, 1.0], dtype=torch.float64)] * 16)
        distribution = _made(name)
        total = distribution.log_prob(every).exp()
        assert total.sum().item() == pytest.approx(1, abs=1e-12)
        marginal = torch.zeros(8, dtype=torch.float64).index_add_(0, (every[:, :3] @ place).long(), total)
        error = 4 * (marginal * (1 - marginal) / len(x)).sqrt()
        assert ((torch.bincount(code, minlength=8) / len(x) - marginal).abs() < error).all()
    elif name == "ring":
        near = torch.tensor([3.0, 0.0], dtype=torch.float64)
        inside = ((x - near).square().sum(1) < 0.3**2 * 1.386).double().mean()
        assert inside.item() == pytest.approx(0.5 / 8, abs=4 * (0.06 / len(x)) ** 0.5)
        assert _made(name).log_prob(near).exp().item() == pytest.approx(1 / 8 / (2 * np.pi * 0.09), rel=1e-3)
    assert log_px.shape == (20_000,)


def _made(name: str) -> torch.distributions.Distribution:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return SYNTHETIC[name]()


def _small() -> pv.VAE:
    torch.manual_seed(0)
    return make_vae(5, latent_dim=2, hidden=[8], likelihood="negative_binomial")


@pytest.mark.parametrize("form", ["array", "frame", "sparse", "memmap", "path", "loader", "dictionary", "table"])
def test_whatever_takes_data_takes_all_of_these(tmp_path: Path, form: str) -> None:
    np.save(tmp_path / "x.npy", COUNTS)
    data: Any = {
        "array": COUNTS,
        "frame": FRAME,
        "sparse": sp.csr_matrix(COUNTS),
        "memmap": np.load(tmp_path / "x.npy", mmap_mode="r"),
        "path": tmp_path / "x.npy",
        "loader": torch.utils.data.DataLoader(torch.utils.data.TensorDataset(torch.as_tensor(COUNTS)), batch_size=3),
        "dictionary": {"x": COUNTS},
        "table": read(FRAME),
    }[form]
    vae, x = _small(), torch.as_tensor(COUNTS)
    for method in (vae.embed, vae.reconstruct):
        found = method(data, batch_size=6)
        assert not found.requires_grad
        torch.testing.assert_close(found, method(x))
    torch.testing.assert_close(vae.encode(data).mean, vae.encode(x).mean.detach())
    assert not vae.encode(data).mean.requires_grad
    if form == "loader":  # whose batches draw other random numbers
        assert np.isfinite(vae.log_marginal(data, num_samples=20).log_px).all()
        return
    evidence = vae.log_marginal(data, num_samples=20, seed=0)
    np.testing.assert_allclose(evidence.log_px, vae.log_marginal(x, num_samples=20, seed=0).log_px, rtol=1e-5)
    options: Any = {"epochs": 2, "batch_size": 8, "seed": 1, "progress": False, "compile": False}
    histories = [_small().fit(each, **options) for each in (data, x)]
    np.testing.assert_allclose(*(history.bound for history in histories), rtol=1e-5)


def test_labelled_data_of_any_form() -> None:
    torch.manual_seed(0)
    vae = pv.make_conditional_vae(5, num_classes=2, latent_dim=2, hidden=[8], likelihood="negative_binomial")
    x, y = torch.as_tensor(COUNTS), torch.arange(20) % 2
    table = read(FRAME.assign(kind=["a", "b"] * 10), labels="kind")
    for data in ((table,), (FRAME, y), (COUNTS, y.numpy())):
        torch.testing.assert_close(vae.embed(*data, batch_size=7), vae.embed(x, y))
        torch.testing.assert_close(vae.reconstruct(*data), vae.reconstruct(x, y))
    with pytest.raises(ValueError, match="takes x, y"):
        vae.embed(FRAME)


def test_missing_values_are_filled_in_whatever_holds_them() -> None:
    vae, mask = _small(), np.random.default_rng(0).random(COUNTS.shape) < 0.7
    holes = np.where(mask, COUNTS, np.nan)
    frame = pd.DataFrame(holes)
    expected = vae.impute(torch.as_tensor(COUNTS * mask), torch.as_tensor(mask), num_samples=20, seed=0)
    for data in ((frame,), (np.ma.masked_array(COUNTS, ~mask),), (holes, mask), (frame.fillna(0), frame.notna())):
        torch.testing.assert_close(vae.impute(*data, num_samples=20, seed=0), expected)
        torch.testing.assert_close(vae.embed(*data), vae.embed(torch.as_tensor(COUNTS * mask), torch.as_tensor(mask)))
    hierarchy = pv.make_hierarchical_vae(5, latent_dims=[3, 2], hidden=[[8], [8]], likelihood="negative_binomial")
    hidden = torch.as_tensor(COUNTS) + 50 * torch.as_tensor(~mask)
    torch.testing.assert_close(hierarchy.reconstruct(frame), hierarchy.reconstruct(hidden, torch.as_tensor(mask)))


@pytest.mark.parametrize("transform", [False, True])
@pytest.mark.parametrize("compile", [False, pytest.param(True, marks=pytest.mark.slow)])
def test_training_from_disk_is_training_from_memory(tmp_path: Path, compile: bool, transform: bool) -> None:
    np.save(tmp_path / "x.npy", (COUNTS / 15).astype("f4"))
    unread = read(tmp_path / "x.npy", memory=1).x
    assert isinstance(unread, ArrayRows)
    found = []
    for data in (unread, np.load(tmp_path / "x.npy")):
        torch.manual_seed(0)
        vae = make_vae(5, latent_dim=2, hidden=[8], likelihood="bernoulli" if transform else "continuous_bernoulli")
        options: Any = {"transform": pv.data.binarize if transform else None, "compile": compile}
        history = vae.fit(data, epochs=3, batch_size=8, validation=0.25, seed=2, progress=False, **options)
        found.append((history.bound, history.validation, vae.embed(data)))
    np.testing.assert_allclose(found[0][1], found[1][1], rtol=1e-5)
    if not compile or not transform:  # a compiled step draws the pixels itself, from other random bits
        np.testing.assert_allclose(found[0][0], found[1][0], rtol=1e-5)
        torch.testing.assert_close(found[0][2], found[1][2])


def test_rows_that_are_read_in_batches_are_checked_as_arrays_are(tmp_path: Path) -> None:
    array = COUNTS.astype("f4")
    array[13, 1] = np.nan
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match="in 1 of 20 rows, first row 13"):
        _small().fit(np.load(tmp_path / "x.npy", mmap_mode="r"), epochs=1, progress=False)
    array[13, 1] = -1
    np.save(tmp_path / "x.npy", array)
    with pytest.raises(ValueError, match=r"row 13 \(counted from 0\)"):
        _small().fit(np.load(tmp_path / "x.npy", mmap_mode="r"), epochs=1, batch_size=5, shuffle=False, progress=False)


def test_missing_values_are_read_in_batches(tmp_path: Path) -> None:
    holes = np.where(COUNTS == 3, np.nan, COUNTS)
    np.save(tmp_path / "x.npy", holes)
    table = read(tmp_path / "x.npy", missing=True, memory=1)
    assert isinstance(table.mask, Rows)
    batches = list(Batches(table, 6, program=lambda x, mask=None: None))
    assert_array_equal(torch.cat([x for x, _ in batches]), np.where(COUNTS == 3, 0, COUNTS))
    assert_array_equal(torch.cat([mask for _, mask in batches]), COUNTS != 3)
    split = load(path=tmp_path / "x.npy", missing=True, memory=1)
    assert split.likelihood == {"kind": "negative_binomial"}
    assert f"{(COUNTS == 3).sum()} of 100 values missing" in split.note
    whole = load(path=tmp_path / "x.npy", missing=True)
    for name in ("train", "train_mask", "test", "test_mask"):
        assert_array_equal(getattr(split, name)[:], getattr(whole, name))


def test_size_factors_are_for_programs_that_take_them(tmp_path: Path) -> None:
    FRAME.assign(depth=1.5).to_csv(tmp_path / "x.csv", index=False)
    with pytest.raises(ValueError, match="no model by name takes size factors"):
        load(path=tmp_path / "x.csv", size_factors="depth")
    table = read(tmp_path / "x.csv", size_factors="depth")
    with pytest.raises(ValueError, match="no parameter 'size_factors'"):
        as_arrays(table, program=lambda x: None)
    with pytest.raises(DataError, match=r"size factors must be positive, got 0 in row 0"):
        read(FRAME.assign(depth=0.0), size_factors="depth")


def test_rows_of_an_hdf5_file_come_in_any_order(tmp_path: Path) -> None:
    rows = read(_write(tmp_path, ".h5"), memory=1).x
    assert isinstance(rows, ArrayRows)
    assert_array_equal(rows[[5, 2, 5, 19]], COUNTS[[5, 2, 5, 19]])
    assert_array_equal(rows[-1], COUNTS[-1])
    assert len(list(rows)) == 20


def test_rows_select_map_and_chunk() -> None:
    rows: Rows = ArrayRows(np.arange(24.0).reshape(6, 4))
    part = rows.select(np.array([5, 1, 3])).map(lambda x: x.astype("f4") / 2)
    assert (part.shape, part.dtype) == ((3, 4), np.float32)
    assert part[:].tolist() == (np.arange(24.0).reshape(6, 4)[[5, 1, 3]] / 2).tolist()
    assert part[torch.tensor([True, False, True])].shape == (2, 4)
    assert np.concatenate(list(rows.chunks())).shape == (6, 4)
