"""Damaged files of data: each is read as finite numbers or refused in one sentence, without a crash, a hang, or code that runs.

Each seed writes a small file of one format, damages its bytes in one to four places, and reads it as a user would. Half of the
files of NumPy and torch hold pickled objects that would create a file if they were unpickled. A process of its own reads, so
that a crash or a hang of another library's reader is seen; it may take 20 seconds for a file, and 4 GB.

    python tests/fuzz_data.py --files 2000 --out experiments/results/fuzz_data.json
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import pickle
import platform
import resource
import sys
import tempfile
import time
import traceback
from collections import Counter
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pandas as pd
import scipy.sparse as sp
import torch
from PIL import Image
from safetensors.torch import save_file

import pyrovae as pv
from pyrovae.data import as_arrays, load, read

SECONDS, BYTES = 20.0, 4 << 30
FORMATS = (
    ".npy", ".npz", ".csv", ".tsv", ".csv.gz", ".parquet", ".h5", ".h5ad", "sparse.h5ad", "sparse.npz", ".pt", ".safetensors",
    "images", "mnist", "cifar10", "trap.npy", "trap.npz", "trap.pt",
)  # fmt: skip


class Trap:
    """Unpickled, it creates a file."""

    def __init__(self, path: Path):
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch '{self.path}'",)


def write(folder: Path, form: str, rng: np.random.Generator) -> Path:
    """A valid file, and where it is; of a folder, the file that is to be damaged."""
    counts = rng.poisson(2.0, (12, 5))
    path = folder / f"x{form if form.startswith('.') else '.' + form.rpartition('.')[2]}"
    trap = np.array([[Trap(folder / "sprung")] * 3], object)
    if form in (".npy", "trap.npy"):
        np.save(path, counts if form == ".npy" else trap, allow_pickle=True)
    elif form in (".npz", "trap.npz"):
        np.savez_compressed(path, x=counts if form == ".npz" else trap, y=np.arange(12) % 2, allow_pickle=True)
    elif form in (".csv", ".tsv", ".csv.gz"):
        frame = pd.DataFrame(counts, columns=list("abcde"), index=[f"row{i}" for i in range(12)])
        frame.to_csv(path, sep="\t" if form == ".tsv" else ",")
    elif form == ".parquet":
        pd.DataFrame(counts, columns=list("abcde")).to_parquet(path)
    elif form == ".h5":
        with h5py.File(path, "w") as file:
            file["x"], file["labels"] = counts, np.arange(12) % 2
    elif form.endswith("h5ad"):
        with h5py.File(path, "w") as file:
            matrix = sp.csr_matrix(counts)
            if form.startswith("sparse"):
                group = file.create_group("X")
                group.attrs["encoding-type"], group.attrs["shape"] = "csr_matrix", matrix.shape
                group["data"], group["indices"], group["indptr"] = matrix.data, matrix.indices, matrix.indptr
            else:
                file["X"] = counts
            file["var/_index"] = list("abcde")
            file["obs/kind/categories"], file["obs/kind/codes"] = ["u", "v"], np.arange(12, dtype=np.int8) % 2
    elif form == "sparse.npz":
        sp.save_npz(path, sp.csr_matrix(counts))
    elif form in (".pt", "trap.pt"):
        torch.save({"x": torch.as_tensor(counts)} | ({"t": Trap(folder / "sprung")} if form == "trap.pt" else {}), path)
    elif form == ".safetensors":
        save_file({"x": torch.as_tensor(counts), "y": torch.arange(12) % 2}, path)
    elif form == "images":
        for i in range(3):
            kind = ("png", "jpg", "bmp", "gif", "tiff", "webp")[int(rng.integers(6))]
            path = folder / "pictures" / f"{i}.{kind}"
            path.parent.mkdir(exist_ok=True)
            Image.fromarray(rng.integers(0, 256, (7, 9, 3), dtype=np.uint8)).save(path)
    elif form == "mnist":
        (folder / "MNIST" / "raw").mkdir(parents=True)
        for part in ("train", "t10k"):
            for name, array in (
                ("images-idx3", np.zeros((6, 28, 28), np.uint8)),
                ("labels-idx1", np.arange(6, dtype=np.uint8)),
            ):
                path = folder / "MNIST" / "raw" / f"{part}-{name}-ubyte"
                sizes = b"".join(size.to_bytes(4, "big") for size in array.shape)
                path.write_bytes(b"\0\0\x08" + bytes([array.ndim]) + sizes + array.tobytes())
    else:
        (folder / "cifar-10-batches-py").mkdir()
        for name in ("data_batch_1", "data_batch_2", "data_batch_3", "data_batch_4", "data_batch_5", "test_batch"):
            path = folder / "cifar-10-batches-py" / name
            held = {"data": np.zeros((4, 3072), np.uint8), "labels": [0, 1, 2, 3]}
            path.write_bytes(pickle.dumps(held | ({"t": Trap(folder / "sprung")} if rng.random() < 0.5 else {}), protocol=2))
    return path


def damage(content: bytes, rng: np.random.Generator) -> bytes:
    """The bytes with one to four changes of the kinds that disks, networks and people make."""
    for _ in range(int(rng.integers(1, 5))):
        size = len(content)
        at, length = int(rng.integers(0, size + 1)), int(rng.integers(1, 17))
        kind = int(rng.integers(9))
        middle = content[at : at + length]
        if kind == 0 and middle:
            middle = bytes([middle[0] ^ (1 << int(rng.integers(8)))]) + middle[1:]
        elif kind == 1:
            middle = rng.integers(0, 256, len(middle), dtype=np.uint8).tobytes()
        elif kind == 2:
            middle = b""
        elif kind == 3:
            middle = rng.integers(0, 256, length, dtype=np.uint8).tobytes() + middle
        elif kind == 4:
            return content[: int(rng.integers(0, size + 1))]
        elif kind == 5:
            middle = (b"\xff", b"\0", b"\x7f")[int(rng.integers(3))] * len(middle)
        elif kind == 6:
            middle = middle * int(rng.integers(2, 50))
        elif kind == 7:  # text and numbers that formats take for lengths
            odd = (
                b"nan",
                b"1e999",
                b"-1",
                b"9" * 25,
                b'"',
                b",,",
                b"\n",
                b"\xef\xbb\xbf",
                (2**62).to_bytes(8, "little"),
                b"(1e9,)",
            )
            middle = odd[int(rng.integers(len(odd)))] + middle[1:]
        else:
            other = int(rng.integers(0, size + 1))
            middle = content[other : other + length]
        content = content[:at] + middle + content[at + length :]
    return content


def judge(seed: int) -> dict[str, Any]:
    """What becomes of one damaged file: ``"read"``, ``"refused"``, or a violation."""
    rng = np.random.default_rng(seed)
    form = FORMATS[seed % len(FORMATS)]
    record: dict[str, Any] = {"seed": seed, "format": form}
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        path = write(folder, form, rng)
        path.write_bytes(damage(path.read_bytes(), rng))
        try:
            if form in ("mnist", "cifar10"):
                split = load(form, root=str(folder))
                arrays: Any = (torch.as_tensor(split.train[:]), split.test)
            else:
                table = read(path.parent if form == "images" else path)
                arrays = as_arrays(table, program=lambda x, mask=None: None)
            if not all(torch.isfinite(array).all() for array in arrays):
                record["violation"] = "it was read as numbers that are not finite"
            record["outcome"] = "read"
        except (ValueError, FileNotFoundError) as error:
            said = str(error)
            record |= {"outcome": "refused", "why": said.replace(name, "")[:300]}
            if "\n" in said or not said.rstrip().endswith("."):
                record["violation"] = "the refusal is not one sentence"
            elif str(folder) not in said and "The data" not in said and "sparse matrix" not in said:
                record["violation"] = "the refusal does not name the file"
        except BaseException as error:
            record |= {"outcome": "crashed", "violation": traceback.format_exc()[-800:], "why": repr(error)[:200]}
        if (folder / "sprung").exists():
            record["violation"] = "the file ran code"
    return record


def _serve(connection: Connection) -> None:
    resource.setrlimit(resource.RLIMIT_AS, (BYTES, BYTES))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    torch.set_num_threads(1)
    os.dup2(os.open(os.devnull, os.O_WRONLY), 2)  # readers in C complain there
    while True:
        connection.send(judge(connection.recv()))


def judge_all(seeds: range) -> list[dict[str, Any]]:
    """The records of many seeds, each read in a process that a crash or a hang replaces."""
    context, records, process = multiprocessing.get_context("spawn"), [], None
    for seed in seeds:
        if process is None:
            ours, theirs = context.Pipe()
            process = context.Process(target=_serve, args=(theirs,), daemon=True)
            process.start()
            theirs.close()
            fresh = True
        ours.send(seed)
        record = {"seed": seed, "format": FORMATS[seed % len(FORMATS)], "outcome": "hung", "violation": "it took too long"}
        try:
            if ours.poll(SECONDS * (6 if fresh else 1)):  # a new process imports torch first
                record = ours.recv()
        except EOFError:
            process.join()
            record |= {"outcome": "died", "violation": f"the process ended with {process.exitcode}"}
        fresh = False
        if record["outcome"] in ("hung", "died"):
            process.kill()
            process = None
        records.append(record)
        if "violation" in record:
            print(json.dumps(record), flush=True)
    if process is not None:
        process.kill()
    return records


def main() -> None:
    """Judge many seeds, print what is wrong, and write the summary."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--files", type=int, default=2000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--out", type=Path)
    options = parser.parse_args()
    began = time.time()
    records = judge_all(range(options.first, options.first + options.files))
    violations = [record for record in records if "violation" in record]
    outcomes = Counter(f"{record['format']}: {record['outcome']}" for record in records)
    versions = {"torch": torch.__version__, "numpy": np.__version__, "pandas": pd.__version__, "h5py": h5py.__version__}
    summary = {
        "date": time.strftime("%Y-%m-%d"), "seconds": round(time.time() - began), "machine": platform.machine(),
        "python": sys.version.split()[0], "pyrovae": pv.__version__, **versions, "files": options.files,
        "first_seed": options.first, "outcomes": dict(sorted(outcomes.items())), "violations": violations,
    }  # fmt: skip
    print(f"{options.files} files, {len(violations)} violations; {dict(sorted(outcomes.items()))}")
    if options.out is not None:
        options.out.write_text(json.dumps(summary, indent=1) + "\n")


if __name__ == "__main__":
    main()
