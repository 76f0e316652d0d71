"""Checkpoints on disk: folders of safetensors and JSON that are written whole, checked whole, and never unpickled.

A folder of checkpoints holds ``step-N``, the last one, with these files:

==================== ==============================================================================================
``weights``          the parameters and buffers of the pair, ``.safetensors``
``best``             those of the best validation bound so far, if there is one
``state``            the optimizer's tensors, random states and averages
``checkpoint.json``  everything else, the size and SHA-256 of each file, and the SHA-256 of all of this
==================== ==============================================================================================

A checkpoint is written under a temporary name, synchronised to the disk, and renamed; only then is the one before it removed.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import secrets
import shutil
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor

from ..files import LOCK, synchronise, taken
from .history import History

__all__ = ["Checkpoint", "CheckpointFolder", "load_checkpoint", "pack", "unpack"]

# Raised when an older version could no longer read what is written.
FORMAT = 1
NOTES = "checkpoint.json"
# Beginnings of the names of what is not finished yet, and of what is being removed.
UNFINISHED, REMOVED = ".new-", ".old-"
# Types that JSON holds as they are.
_PLAIN = {bool, int, float, str, type(None)}


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that has been read and checked.

    Attributes:
        path: its folder.
        step: the number of training steps that were taken.
        weights: parameters and buffers by name.
        best: those of the best validation bound; empty without validation data.
        history: the records of all epochs so far.
        notes: everything else that is not a tensor.
        state: the other tensors by name.

    Example:
        >>> import tempfile, torch, pyrovae as pv
        >>> vae, folder = pv.make_vae(9, latent_dim=2, hidden=[16]), tempfile.mkdtemp()
        >>> _ = vae.fit(torch.ones(50, 9), epochs=2, progress=False, checkpoint=folder)
        >>> checkpoint = pv.load_checkpoint(folder)
        >>> checkpoint.step, len(checkpoint.history.records)
        (2, 2)
    """

    path: Path
    step: int
    weights: dict[str, Tensor]
    best: dict[str, Tensor]
    history: History
    notes: dict[str, Any]
    state: dict[str, Tensor]


def load_checkpoint(folder: str | Path) -> Checkpoint:
    """Read the last checkpoint of a folder that :func:`pyrovae.fit` wrote, and check all of it.

    Args:
        folder: what was passed as ``checkpoint=``, or one ``step-N`` in it.

    Raises:
        FileNotFoundError: there is no checkpoint.
        ValueError: a file is damaged, missing, or of a later format; the message names the file.

    Example:
        >>> import tempfile, torch, pyrovae as pv
        >>> vae, folder = pv.make_vae(9, latent_dim=2, hidden=[16]), tempfile.mkdtemp()
        >>> _ = vae.fit(torch.ones(50, 9), epochs=3, progress=False, checkpoint=folder)
        >>> pv.load_checkpoint(folder).step
        3
    """
    path = _last(Path(folder))
    if path is None:
        raise FileNotFoundError(f"There is no checkpoint in {folder}: give a folder that was passed to fit as checkpoint=.")
    notes = _read_notes(path / NOTES)
    arrays = {name: _read_arrays(path / f"{name}.safetensors", entry) for name, entry in notes["files"].items()}
    try:
        return Checkpoint(
            path=path,
            step=int(notes["step"]),
            weights=arrays["weights"],
            best=arrays.get("best", {}),
            history=History(**notes["history"]),
            notes=notes["run"],
            state=arrays["state"],
        )
    except (KeyError, TypeError) as error:
        raise ValueError(f"{path / NOTES} lacks a part of a checkpoint ({error}): remove {path}, or train anew.") from error


class CheckpointFolder:
    """A folder of checkpoints that one training run writes.

    Args:
        path: the folder; it is made if it is missing.

    Raises:
        OSError: the folder cannot be written.
        ValueError: another run writes it now.
    """

    def __init__(self, path: str | Path):
        self.path = Path(path)
        self._made = not self.path.exists()
        with _system_errors(self.path):
            self.path.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise OSError(errno.EACCES, os.strerror(errno.EACCES), str(self.path))
            self._held = ExitStack()
            self._held.enter_context(taken(self.path))
        self.sweep()

    @property
    def last(self) -> Path | None:
        """The last checkpoint that is complete."""
        return _last(self.path)

    def close(self) -> None:
        """Let other runs use the folder; remove one that a refused run has made."""
        self._held.close()
        if self._made and self.last is None and {each.name for each in self.path.iterdir()} <= {LOCK}:
            (self.path / LOCK).unlink(missing_ok=True)
            self.path.rmdir()

    def write(
        self, step: int, history: History, run: Mapping[str, Any], arrays: Mapping[str, Mapping[str, Tensor]], same: str | None
    ) -> Path:
        """Write a checkpoint, then remove the one before it.

        Args:
            step: the number of training steps that were taken.
            history: the records so far.
            run: what JSON can hold.
            arrays: tensors by name, for each file.
            same: a file that has not changed since the last checkpoint of this process, and is linked rather than written.

        Raises:
            OSError: the disk is full, say. The checkpoint before is whole then.
        """
        before = self.last
        target = self.path / f"step-{step:010d}"
        new = self.path / f"{UNFINISHED}{secrets.token_hex(8)}"
        with _system_errors(target):
            try:
                new.mkdir()
                files = {name: _write_arrays(new / f"{name}.safetensors", tensors) for name, tensors in arrays.items()}
                if same is not None and before is not None:
                    files[same] = _link(before, new, same)
                record = vars(history) | {"records": list(history.records)}
                notes = {"format": FORMAT, "step": step, "files": files, "history": record, "run": run}
                _write(new / NOTES, _with_checksum(notes))
                synchronise(new)
                if target.exists():  # a resumed run may write the step that it began with
                    target.rename(self.path / f"{REMOVED}{secrets.token_hex(8)}")
                new.rename(target)
                synchronise(self.path)
            except BaseException:
                shutil.rmtree(new, ignore_errors=True)
                raise
        self.sweep()
        return target

    def sweep(self) -> None:
        """Remove all checkpoints but the last one, and what interrupted runs left."""
        last = self.last
        for each in self.path.iterdir():
            if not each.is_dir() or each == last:
                continue
            if each.name.startswith("step-"):  # renamed first, so that no part of it is taken for a checkpoint
                each = each.rename(self.path / f"{REMOVED}{secrets.token_hex(8)}")
            if each.name.startswith((UNFINISHED, REMOVED)):
                shutil.rmtree(each, ignore_errors=True)


def pack(value: Any, arrays: dict[str, Tensor], name: str) -> Any:
    """A nested value as JSON can hold it; its tensors go into ``arrays``, under names that begin with ``name``.

    Raises:
        ValueError: a part is no tensor, number, text, list, tuple or dictionary.
    """
    if isinstance(value, bool | int | float | str | None):
        return value
    if isinstance(value, np.generic):
        return value.item()
    if isinstance(value, np.ndarray):
        return pack(torch.from_numpy(value.astype(np.int64) if value.dtype.kind == "u" else value), arrays, name)
    if isinstance(value, Tensor):
        arrays[name] = value.detach()
        return {"tensor": name}
    if isinstance(value, list | tuple):
        plain = _PLAIN.issuperset(map(type, value))  # as the hundreds of numbers of a random state are
        packed = list(value) if plain else [pack(each, arrays, f"{name}.{place}") for place, each in enumerate(value)]
        return packed if isinstance(value, list) else {"tuple": packed}
    if isinstance(value, Mapping):
        return {"items": [[pack(key, arrays, name), pack(each, arrays, f"{name}.{key}")] for key, each in value.items()]}
    raise ValueError(
        f"A checkpoint must consist of tensors, numbers, text and collections of them, got {type(value).__name__} in {name}: "
        f"leave checkpoint out, or choose another optimizer or schedule."
    )


def unpack(value: Any, arrays: Mapping[str, Tensor]) -> Any:
    """The value that :func:`pack` took; its tensors are copies, aligned as torch aligns its own."""
    if isinstance(value, list):
        return [unpack(each, arrays) for each in value]
    if not isinstance(value, dict):
        return value
    ((kind, content),) = value.items()
    if kind == "tensor":
        return arrays[content].clone()
    if kind == "tuple":
        return tuple(unpack(each, arrays) for each in content)
    return {unpack(key, arrays): unpack(each, arrays) for key, each in content}


def _last(folder: Path) -> Path | None:
    """The checkpoint with the most steps, or the folder itself if it is one."""
    if (folder / NOTES).is_file():
        return folder
    return max(folder.glob("step-*"), default=None, key=lambda each: each.name) if folder.is_dir() else None


def _with_checksum(notes: dict[str, Any]) -> bytes:
    """JSON in one form only, so that any changed byte shows."""
    body = json.dumps(notes, separators=(",", ":"))
    digest = hashlib.sha256(body.encode()).hexdigest()
    return f'{{"sha256":"{digest}","checkpoint":{body}}}\n'.encode()


def _read_notes(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise ValueError(f"{path} is missing, so the checkpoint is not whole: remove {path.parent}, or train anew.")
    with _system_errors(path):
        content = path.read_bytes()
    try:
        notes = json.loads(content)["checkpoint"]
        whole = _with_checksum(notes) == content and isinstance(notes["files"], dict)
        version = notes["format"]
    except (ValueError, KeyError, TypeError, RecursionError):
        whole, version = False, None
    if not whole:
        raise ValueError(f"{path} is damaged: its checksum is not that of its content. Remove {path.parent}, or train anew.")
    if version != FORMAT:
        raise ValueError(
            f"{path} has format {version}, and this version of pyrovae reads {FORMAT}: use the version that wrote it."
        )
    return notes


def _write_arrays(path: Path, arrays: Mapping[str, Tensor]) -> dict[str, Any]:
    # Copies, since safetensors refuses shared memory, and what is trained must not change meanwhile.
    tensors = {name: tensor.detach().cpu().clone(memory_format=torch.contiguous_format) for name, tensor in arrays.items()}
    content = safetensors.torch.save(tensors)
    _write(path, content)
    return {"bytes": len(content), "sha256": hashlib.sha256(content).hexdigest()}


def _read_arrays(path: Path, entry: Mapping[str, Any]) -> dict[str, Tensor]:
    if path.name != Path(path.name).name or not path.is_file():
        raise ValueError(f"{path} is missing, so the checkpoint is not whole: remove {path.parent}, or train anew.")
    with _system_errors(path):
        content = path.read_bytes()
    if len(content) != entry["bytes"] or hashlib.sha256(content).hexdigest() != entry["sha256"]:
        raise ValueError(f"{path} is damaged: its checksum is not that of its content. Remove {path.parent}, or train anew.")
    try:
        return safetensors.torch.load(content)
    except (SafetensorError, ValueError, KeyError, RuntimeError, OverflowError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is not a safetensors file. Remove {path.parent}.") from error


def _link(before: Path, new: Path, name: str) -> dict[str, Any]:
    """Take over an unchanged file; returns its size and checksum."""
    file = f"{name}.safetensors"
    try:
        os.link(before / file, new / file)
    except OSError:  # a file system without hard links
        _write(new / file, (before / file).read_bytes())
    return dict(_read_notes(before / NOTES)["files"][name])


def _write(path: Path, content: bytes) -> None:
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


@contextmanager
def _system_errors(path: Path) -> Iterator[None]:
    """Errors of the system as one sentence that names the file."""
    try:
        yield
    except OSError as error:
        if error.errno is None:  # it has been named
            raise
        cure = (
            "free some space" if error.errno in (errno.ENOSPC, errno.EDQUOT) else "make it accessible, or choose another folder"
        )
        reason = error.strerror or type(error).__name__
        raise type(error)(f"The checkpoint {path} cannot be read or written ({reason}): {cure}.") from error
