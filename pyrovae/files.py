"""Files that survive: every write is atomic, every read is safe.

A file is written beside its target and moved over it, so a crash or a full disk leaves the old file whole. Weights are
safetensors, everything else is JSON: nothing here unpickles.
"""

from __future__ import annotations

import json
import os
import secrets
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

__all__ = [
    "load_weights",
    "read_arrays",
    "read_json",
    "read_lines",
    "save_weights",
    "write_arrays",
    "write_bytes",
    "write_text",
]


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
    _replace(Path(path), safetensors.torch.save(tensors, {"notes": json.dumps(notes or {})}))


def read_arrays(path: str | Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Read what :func:`write_arrays` wrote: the tensors and the notes.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is truncated, damaged, or something else.
    """
    _must_exist(path)
    try:
        with safetensors.safe_open(str(path), "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118  (not a mapping)
            notes = json.loads((file.metadata() or {}).get("notes", "{}"))
    except (SafetensorError, ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be read ({error}): it is truncated or not a safetensors file.") from error
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
    finally:
        temporary.unlink(missing_ok=True)
