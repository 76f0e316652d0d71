"""Files that survive: every write is atomic, every read is safe.

A file is written beside its target and moved over it, so a crash or a full disk leaves the old file whole. Weights are
safetensors, everything else is JSON: nothing here unpickles. Safetensors files hold a checksum of all their bytes, so that
a file with a flipped bit is refused.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
import shutil
import socket
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import filelock
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

__all__ = [
    "LOCK", "OWNER", "load_weights", "read_arrays", "read_json", "read_lines", "save_weights", "settle", "synchronise",
    "taken", "together", "write_arrays", "write_bytes", "write_text",
]  # fmt: skip

LOCK, OWNER = ".lock", ".owner.json"
# Beginnings of the names of folders: of files that are being written, and of complete ones that are being moved.
_STAGED, _COMPLETE = ".staged-", ".complete-"


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    _replace(Path(path), text.encode("utf-8"))


def write_bytes(path: str | Path, content: bytes) -> None:
    """Write a file atomically."""
    _replace(Path(path), content)


def write_arrays(path: str | Path, arrays: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> None:
    """Write named tensors, with notes that JSON can hold, as one safetensors file, atomically.

    Tensors that share memory, tied weights among them, are stored once for each name.
    """
    # Copies, since safetensors refuses shared memory.
    tensors = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in arrays.items()}
    # As bytes, because safetensors' own save_file makes files that only their owner may read.
    blank = _with_checksum(safetensors.torch.save(tensors, {"notes": json.dumps(notes or {})}))
    # The checksum is that of the file with zeros in its place, so that it covers every byte of it.
    place, digest = _place_of(_BLANK), hashlib.sha256(blank).hexdigest()
    _replace(Path(path), blank.replace(place, _place_of(digest), 1))


def read_arrays(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_arrays` wrote, or another safetensors file: the tensors and the notes.

    The tensors are copies in memory, so that the file may change or go afterwards.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged by as little as one bit, or something else.
    """
    _must_exist(path)
    try:
        content = Path(path).read_bytes()
        tensors = safetensors.torch.load(content)
        header = content[8 : 8 + int.from_bytes(content[:8], "little")]
        metadata = json.loads(header).get("__metadata__") or {}
        notes = json.loads(metadata.get("notes", "{}"))
    except (SafetensorError, ValueError, KeyError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is truncated or not a safetensors file.") from error
    known = set(metadata) <= {"notes", _CHECKSUM} or "notes" not in metadata
    if not known or (_CHECKSUM in metadata and not _is_intact(content, header, metadata[_CHECKSUM])):
        raise ValueError(f"{path} is damaged: its checksum is not that of its content. Restore it, or write it again.")
    return tensors, notes


def read_json(path: str | Path) -> Any:
    """Read a JSON file.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is truncated or not JSON.
    """
    _must_exist(path)
    try:
        return json.loads(Path(path).read_text(encoding="utf-8"))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is truncated or not JSON.") from error


def read_lines(path: str | Path) -> list[dict[str, Any]]:
    """Read a file with one JSON object a line.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: a line is truncated or not JSON, or there is none.
    """
    _must_exist(path)
    records = []
    for number, line in enumerate(Path(path).read_text(encoding="utf-8").splitlines(), 1):
        try:
            records.append(json.loads(line))
        except ValueError as error:
            raise ValueError(f"{path} cannot be read: line {number} is truncated or not JSON.") from error
    if not records:
        raise ValueError(f"{path} is empty: is it the folder of a finished run?")
    return records


def save_weights(path: str | Path, module: nn.Module) -> None:
    """Write a module's state dict as safetensors, atomically."""
    write_arrays(path, module.state_dict())


def load_weights(path: str | Path, module: nn.Module, *, cast: bool = False) -> None:
    """Load what :func:`save_weights` wrote into a module of the same structure.

    Args:
        path: the file.
        module: where the weights go.
        cast: let the module take on the file's precision, so that float64 weights stay float64; otherwise the weights take
            on the module's, as PyTorch has it.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its tensors are not the module's; the module is then unchanged.
    """
    tensors, _ = read_arrays(path)
    own = module.state_dict()
    wrong = sorted(set(own) ^ set(tensors)) or sorted(name for name in own if own[name].shape != tensors[name].shape)
    if wrong:
        raise ValueError(f"{path} does not fit the model: {wrong[0]} is missing, unexpected or of another shape.")
    precisions = {tensor.dtype for tensor in tensors.values() if tensor.is_floating_point()}
    if cast and len(precisions) == 1:
        module.to(dtype=precisions.pop())
    module.load_state_dict(tensors)


@contextmanager
def together(folder: str | Path) -> Iterator[Path]:
    """A context that gives an empty folder; at its end, the files written there replace those of the same names in ``folder``.

    If the context ends by an exception, ``folder`` keeps what it has. The new files are complete, and on the disk, before the
    first one is moved. A process that is interrupted while it moves them moves the rest first; after one that was killed,
    :func:`settle` does so. No other process may write ``folder`` meanwhile.

    Args:
        folder: where the files go; it is made if it does not exist.

    Raises:
        OSError: nothing can be written there; before the context begins.
    """
    target = Path(folder)
    target.mkdir(parents=True, exist_ok=True)
    settle(target)
    for orphan in target.glob(f"{_STAGED}*"):
        shutil.rmtree(orphan)
    staged = target / f"{_STAGED}{secrets.token_hex(8)}"
    staged.mkdir()
    try:
        yield staged
        synchronise(staged)
        staged.rename(target / f"{_COMPLETE}{secrets.token_hex(8)}")
        synchronise(target)
        settle(target)
    except BaseException:
        settle(target)  # once one of them has been moved, there is no way back to the old ones
        raise
    finally:
        shutil.rmtree(staged, ignore_errors=True)


def settle(folder: str | Path) -> None:
    """Finish what a process that was killed at the end of :func:`together` had begun, if there was one.

    Several processes may do so at once.

    Raises:
        OSError: the folder cannot be written, and its files are of two sets.
    """
    target = Path(folder)
    for complete in target.glob(f"{_COMPLETE}*"):
        with suppress(FileNotFoundError):  # another process is doing the same, and has moved it
            for path in sorted(complete.iterdir()):
                with suppress(FileNotFoundError):
                    path.replace(target / path.name)
            synchronise(target)
            complete.rmdir()


def synchronise(folder: Path) -> None:
    """Write a folder's names to the disk, where the system can."""
    if os.name != "posix":
        return
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


@contextmanager
def taken(folder: str | Path) -> Iterator[str | None]:
    """A context in which no other process takes the folder; it is made if it does not exist.

    The system gives back what a process held when it ends, however it ends.

    Args:
        folder: where the context is to be alone.

    Yields:
        The process that held the folder and was killed, in words; ``None`` if there is none.

    Raises:
        OSError: nothing can be written there.
        ValueError: another process holds it; the message says which.

    Example:
        >>> import tempfile
        >>> from pyrovae.files import taken
        >>> with tempfile.TemporaryDirectory() as folder, taken(folder):
        ...     with taken(folder):  # doctest: +ELLIPSIS
        ...         pass
        Traceback (most recent call last):
        ...
        ValueError: ... is in use by process ...: wait for it, or choose another folder.
    """
    path = Path(folder)
    path.mkdir(parents=True, exist_ok=True)
    lock, note = filelock.FileLock(path / LOCK, timeout=0), path / OWNER
    try:
        lock.acquire()
    except filelock.Timeout as error:
        holder = _owner(note) or "another process"
        raise ValueError(f"{folder} is in use by {holder}: wait for it, or choose another folder.") from error
    try:
        before = _owner(note)
        # No more than a name for a sentence: it need not survive a loss of power, so it is not synchronised.
        note.write_text(json.dumps({"process": os.getpid(), "machine": socket.gethostname()}) + "\n", encoding="utf-8")
        yield before
    finally:
        note.unlink(missing_ok=True)
        lock.release()


def _owner(note: Path) -> str | None:
    """The process that a folder's note names; ``None`` if there is no note, or one that was not written whole."""
    try:
        found = json.loads(note.read_text(encoding="utf-8"))
        return f"process {found['process']} on {found['machine']}"
    except (OSError, ValueError, TypeError, KeyError):
        return None


_CHECKSUM, _BLANK = "sha256", "0" * 64


def _with_checksum(content: bytes) -> bytes:
    """A safetensors file with a blank checksum before its metadata; safetensors itself writes several in random order."""
    start, size = b'{"__metadata__":{', int.from_bytes(content[:8], "little")
    header = start + _place_of(_BLANK) + b"," + content[8 + len(start) : 8 + size].rstrip(b" ")
    header += b" " * (-len(header) % 8)  # tensors begin at a multiple of 8
    return len(header).to_bytes(8, "little") + header + content[8 + size :]


def _place_of(digest: str) -> bytes:
    """A checksum as it stands in a safetensors header, which has no spaces."""
    return f'"{_CHECKSUM}":"{digest}"'.encode()


def _is_intact(content: bytes, header: bytes, digest: str) -> bool:
    """Whether the content has that checksum, with zeros in its place."""
    place = _place_of(digest)
    if header.count(place) != 1:
        return False
    blank = hashlib.sha256(content[:8])
    blank.update(header.replace(place, _place_of(_BLANK)))
    blank.update(memoryview(content)[8 + len(header) :])
    return blank.hexdigest() == digest


def _must_exist(path: str | Path) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}: is it the folder of a finished run?")


def _replace(path: Path, content: bytes) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    # Not by tempfile, whose files only their owner may read: the umask decides.
    temporary = path.with_name(f".{path.name}.{secrets.token_hex(8)}")
    try:
        with temporary.open("xb") as file:
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:  # that of a full disk names no file
        raise OSError(error.errno, error.strerror, str(path)) from error
    finally:
        temporary.unlink(missing_ok=True)
