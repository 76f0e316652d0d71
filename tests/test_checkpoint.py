"""Writes are atomic, reads are safe."""

from __future__ import annotations

import errno
import json
import os
import pickle
import stat
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from torch import nn

from pyrovae import files
from pyrovae.nn import MLP


def _same(a: nn.Module, b: dict[str, torch.Tensor]) -> bool:
    return all(torch.equal(tensor, b[name]) and tensor.dtype == b[name].dtype for name, tensor in a.state_dict().items())


def _snapshot(module: nn.Module) -> dict[str, torch.Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_weights_round_trip_exactly(tmp_path: Path, dtype: torch.dtype) -> None:
    source, target = MLP(3, [4], 2).to(dtype), MLP(3, [4], 2).to(dtype)
    files.save_weights(tmp_path / "w", source)
    files.load_weights(tmp_path / "w", target)
    assert _same(source, target.state_dict())


def test_precision_is_the_modules_or_with_cast_the_files(tmp_path: Path) -> None:
    source, target = MLP(3, [4], 2).double(), MLP(3, [4], 2)
    identity = [id(parameter) for parameter in target.parameters()]
    files.save_weights(tmp_path / "w", source)
    files.load_weights(tmp_path / "w", target)
    assert {parameter.dtype for parameter in target.parameters()} == {torch.float32}
    files.load_weights(tmp_path / "w", target, cast=True)
    assert _same(source, target.state_dict())
    # An optimizer that holds the parameters still does.
    assert [id(parameter) for parameter in target.parameters()] == identity


def test_tied_weights_round_trip(tmp_path: Path) -> None:
    def tied() -> nn.Module:
        net = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3))
        net[1].weight = net[0].weight
        return net

    source, target = tied(), tied()
    files.save_weights(tmp_path / "w", source)
    files.load_weights(tmp_path / "w", target)
    assert _same(source, target.state_dict())
    assert target[1].weight is target[0].weight


def test_arrays_round_trip_with_notes(tmp_path: Path) -> None:
    base = torch.arange(12.0, dtype=torch.float64).reshape(3, 4)
    # Views of one tensor, transposed and strided: safetensors by itself refuses them.
    arrays = {"base": base, "transposed": base.T, "slice": base[:, ::2], "row": base[1], "flags": base > 3, "empty": base[:0]}
    files.write_arrays(tmp_path / "a", arrays, {"method": "iwae", "n": 5, "nested": {"x": [1, 2.5]}})
    found, notes = files.read_arrays(tmp_path / "a")
    assert set(found) == set(arrays)
    assert all(torch.equal(found[name], arrays[name]) and found[name].dtype == arrays[name].dtype for name in arrays)
    assert notes == {"method": "iwae", "n": 5, "nested": {"x": [1, 2.5]}}
    files.write_arrays(tmp_path / "b", {})
    assert files.read_arrays(tmp_path / "b") == ({}, {})


def test_text_is_utf8_whatever_the_locale(tmp_path: Path) -> None:
    files.write_text(tmp_path / "deep" / "t.json", '{"å": "β\\n"}')
    assert (tmp_path / "deep" / "t.json").read_bytes() == '{"å": "β\\n"}'.encode()
    assert files.read_json(tmp_path / "deep" / "t.json") == {"å": "β\n"}


@pytest.mark.parametrize("umask", [0o022, 0o027, 0o077])
def test_mode_is_the_umasks(tmp_path: Path, umask: int) -> None:
    before = os.umask(umask)
    try:
        files.write_text(tmp_path / "t", "x")
        files.save_weights(tmp_path / "w", MLP(1, [], 1))
        assert os.umask(umask) == umask  # a write leaves the process's umask alone
    finally:
        os.umask(before)
    assert {stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "tw"} == {0o666 & ~umask}


@pytest.mark.parametrize("broken", ["fsync", "replace"])
@pytest.mark.parametrize(
    "write", [lambda path: files.write_text(path, "new"), lambda path: files.save_weights(path, MLP(1, [], 1))]
)
def test_a_failed_write_leaves_the_old_file_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, broken: str, write: object
) -> None:
    path = tmp_path / "file"
    path.write_text("old")

    def full(*_: object, **__: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(*{"fsync": (os, "fsync"), "replace": (Path, "replace")}[broken], full)
    with pytest.raises(OSError, match="No space left"):
        write(path)
    assert path.read_text() == "old"
    assert os.listdir(tmp_path) == ["file"]


def test_readers_never_see_a_partial_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file"
    files.write_text(path, "old")
    seen = []
    fsync = os.fsync
    monkeypatch.setattr(os, "fsync", lambda handle: (seen.append(path.read_text()), fsync(handle)))
    files.write_text(path, "new and longer")
    assert seen == ["old"]
    assert path.read_text() == "new and longer"


def _damaged(folder: Path, how: str) -> Path:
    path = folder / "w"
    files.save_weights(path, MLP(3, [4], 2))
    whole = path.read_bytes()
    content = {
        "empty": b"",
        "half": whole[: len(whole) // 2],
        "header": whole[:4],
        "last byte": whole[:-1],
        "pickle": pickle.dumps({"a": 1}),
        "text": b"hello, this is a text file",
    }[how]
    path.write_bytes(content)
    return path


@pytest.mark.parametrize("how", ["empty", "half", "header", "last byte", "pickle", "text"])
def test_damaged_weights_are_refused_and_the_module_stays(tmp_path: Path, how: str) -> None:
    module = MLP(3, [4], 2)
    before = _snapshot(module)
    with pytest.raises(ValueError, match=r"cannot be read .*truncated or not a safetensors file") as caught:
        files.load_weights(_damaged(tmp_path, how), module)
    assert "\n" not in str(caught.value)
    assert _same(module, before)


@pytest.mark.parametrize(
    ("other", "name"),
    [
        (MLP(3, [4, 4], 2), "layers.4.bias"),
        (MLP(3, [], 2), "layers.2.bias"),
        (MLP(3, [5], 2), "layers.0.bias"),
        (nn.Linear(3, 2), "bias"),
    ],
)
def test_weights_of_another_model_are_refused_and_the_module_stays(tmp_path: Path, other: nn.Module, name: str) -> None:
    files.save_weights(tmp_path / "w", other.double())
    module = MLP(3, [4], 2)
    before = _snapshot(module)
    with pytest.raises(ValueError, match=f"does not fit the model: {name} is missing, unexpected or of another shape"):
        files.load_weights(tmp_path / "w", module, cast=True)
    assert _same(module, before)


@pytest.mark.parametrize("content", [b"", b"{", b'{"a": 1', b"\xff\xfe\x00"])
def test_damaged_json_is_refused(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "j").write_bytes(content)
    with pytest.raises(ValueError, match=r"cannot be read .*truncated or not JSON") as caught:
        files.read_json(tmp_path / "j")
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("read", [files.read_json, files.read_arrays])
@pytest.mark.parametrize("what", ["missing", "folder"])
def test_missing_files_are_named(tmp_path: Path, read: object, what: str) -> None:
    (tmp_path / "folder").mkdir()
    with pytest.raises(FileNotFoundError, match=f"There is no file {tmp_path / what}"):
        read(tmp_path / what)


def test_notes_that_are_not_json_are_refused(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "a", {"notes": "{oops"})
    with pytest.raises(ValueError, match="cannot be read"):
        files.read_arrays(tmp_path / "a")
    # A file of someone else's, without notes, is fine.
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "b")
    assert files.read_arrays(tmp_path / "b")[1] == json.loads("{}")


def _bits(content: bytes, step: int) -> list[bytes]:
    """Copies of a file with one bit flipped: another bit at each place, and each bit of the first bytes and of the checksum."""
    flips = [(place, (place * 5) % 8) for place in range(0, len(content), step)]
    named = content.index(b'"sha256"')
    flips += [(place, bit) for place in (*range(8), *range(named, named + 12)) for bit in range(8)]
    flipped = []
    for place, bit in flips:
        copy = bytearray(content)
        copy[place] ^= 1 << bit
        flipped.append(bytes(copy))
    return flipped


def test_one_flipped_bit_is_refused_wherever_it_is(tmp_path: Path) -> None:
    path = tmp_path / "a"
    files.write_arrays(path, {"x": torch.arange(40.0), "y": torch.ones(3, dtype=torch.bool)}, {"note": 'a "word" \u00e5 0000'})
    whole = path.read_bytes()
    for content in _bits(whole, 1):
        path.write_bytes(content)
        with pytest.raises(ValueError, match=r"cannot be read|is damaged: its checksum") as caught:
            files.read_arrays(path)
        assert "\n" not in str(caught.value)
    path.write_bytes(whole)
    assert torch.equal(files.read_arrays(path)[0]["x"], torch.arange(40.0))


def test_the_same_arrays_make_the_same_bytes(tmp_path: Path) -> None:
    for _ in range(8):
        files.write_arrays(tmp_path / "a", {"x": torch.arange(3.0), "y": torch.ones(2)}, {"n": 1})
        files.write_arrays(tmp_path / "b", {"x": torch.arange(3.0), "y": torch.ones(2)}, {"n": 1})
        assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    with safetensors.safe_open(tmp_path / "a", "pt") as file:
        assert torch.equal(file.get_tensor("x"), torch.arange(3.0))


def test_files_without_a_checksum_still_load(tmp_path: Path) -> None:
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "old", {"notes": '{"n": 1}'})
    assert files.read_arrays(tmp_path / "old")[1] == {"n": 1}
    safetensors.torch.save_file({"a": torch.ones(1)}, tmp_path / "others", {"format": "pt"})
    assert torch.equal(files.read_arrays(tmp_path / "others")[0]["a"], torch.ones(1))


def test_what_was_read_outlives_the_file(tmp_path: Path) -> None:
    files.write_arrays(tmp_path / "a", {"x": torch.arange(1000.0)})
    found = files.read_arrays(tmp_path / "a")[0]["x"]
    with (tmp_path / "a").open("r+b") as file:
        file.truncate(0)  # a mapped file would now end the process
    assert torch.equal(found, torch.arange(1000.0))


def test_files_written_together_replace_the_old_ones_at_the_end_or_not_at_all(tmp_path: Path) -> None:
    (tmp_path / "one").write_text("old")

    def fails() -> None:
        with files.together(tmp_path) as staged:
            files.write_text(staged / "one", "new")
            raise RuntimeError

    with pytest.raises(RuntimeError):
        fails()
    assert os.listdir(tmp_path) == ["one"]
    assert (tmp_path / "one").read_text() == "old"
    with files.together(tmp_path) as staged:
        files.write_text(staged / "one", "new")
        files.write_text(staged / "two", "new")
        assert (tmp_path / "one").read_text() == "old"
        assert not (tmp_path / "two").exists()
    assert sorted(os.listdir(tmp_path)) == ["one", "two"]
    assert (tmp_path / "one").read_text() == "new"


def at_rename(monkeypatch: pytest.MonkeyPatch, call: int, end: Callable[[], None], *, after: bool = False) -> None:
    """Let something happen before or after the n-th rename."""
    calls = list[int]()

    def watched(rename: Callable[..., None]) -> Callable[..., None]:
        def renamed(*paths: Any) -> None:
            calls.append(1)
            if len(calls) == call and not after:
                end()
            rename(*paths)
            if len(calls) == call:
                end()

        return renamed

    for name in ("rename", "replace"):
        monkeypatch.setattr(os, name, watched(getattr(os, name)))


def interrupt() -> None:
    raise KeyboardInterrupt


def written(folder: Path, word: str) -> None:
    """Three files are written, then the folder of all of them is renamed, then each is moved: seven renames."""
    with files.together(folder) as staged:
        for name in ("one", "two", "three"):
            files.write_text(staged / name, word)


@pytest.mark.parametrize("after", [False, True])
@pytest.mark.parametrize("call", range(1, 8))
def test_an_interrupt_at_any_rename_leaves_the_old_set_or_the_new(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: int, after: bool
) -> None:
    written(tmp_path, "old")
    with monkeypatch.context() as patch:
        at_rename(patch, call, interrupt, after=after)
        with pytest.raises(KeyboardInterrupt):
            written(tmp_path, "new")
    word = "new" if (call, after) >= (4, True) else "old"
    assert {path.name: path.read_text() for path in tmp_path.iterdir()} == dict.fromkeys(("one", "two", "three"), word)


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs a process that ends at a given rename")
@pytest.mark.filterwarnings("ignore:.*fork:DeprecationWarning")
@pytest.mark.parametrize("call", range(1, 8))
def test_a_set_of_files_is_settled_after_a_kill_at_any_rename(tmp_path: Path, call: int) -> None:
    written(tmp_path, "old")
    child = os.fork()
    if child == 0:
        at_rename(pytest.MonkeyPatch(), call, lambda: os._exit(9))
        written(tmp_path, "new")
        os._exit(0)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 9
    files.settle(tmp_path)
    found = {path.name: path.read_text() for path in tmp_path.iterdir() if path.is_file()}
    assert found == dict.fromkeys(("one", "two", "three"), "new" if call > 4 else "old")
    written(tmp_path, "last")
    assert {path.name for path in tmp_path.iterdir()} == {"one", "two", "three"}, "what the process left is swept"


def test_a_failed_write_names_the_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left") as caught:
        files.write_text(tmp_path / "t", "x")
    assert caught.value.filename == str(tmp_path / "t")
