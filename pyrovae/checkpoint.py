"""Files that survive: every write is atomic, every read is safe.

A file is written beside its target and moved over it, so a crash or a full disk leaves the old file whole. Weights are
safetensors, everything else is JSON: nothing here unpickles.
"""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor, nn


def write_text(path: str | Path, text: str) -> None:
    """Write a text file atomically."""
    _replace(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))


def write_arrays(path: str | Path, arrays: Mapping[str, Tensor], notes: Mapping[str, Any] | None = None) -> None:
    """Write named tensors, with notes that JSON can hold, as one safetensors file, atomically."""
    tensors = {name: tensor.detach().cpu().contiguous() for name, tensor in arrays.items()}
    metadata = {"notes": json.dumps(notes or {})}
    _replace(Path(path), lambda temporary: safetensors.torch.save_file(tensors, temporary, metadata))


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


def save_weights(path: str | Path, module: nn.Module) -> None:
    """Write a module's state dict as safetensors, atomically.

    Tied weights are stored once for each name, since safetensors refuses tensors that share memory.
    """
    write_arrays(path, {name: tensor.clone() for name, tensor in module.state_dict().items()})


def load_weights(path: str | Path, module: nn.Module) -> None:
    """Load what :func:`save_weights` wrote into a module of the same structure.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged, or its tensors are not the module's; the module is then unchanged.
    """
    tensors, _ = read_arrays(path)
    own = module.state_dict()
    wrong = sorted(set(own) ^ set(tensors)) or sorted(name for name in own if own[name].shape != tensors[name].shape)
    if wrong:
        raise ValueError(f"{path} does not fit the model: {wrong[0]} is missing, unexpected or of another shape.")
    module.load_state_dict(tensors)


def _must_exist(path: str | Path) -> None:
    if not Path(path).is_file():
        raise FileNotFoundError(f"There is no file {path}: is it the folder of a finished run?")


def _replace(path: Path, write: Callable[[Path], Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    temporary = Path(name)
    try:
        write(temporary)
        temporary.chmod(0o666 & ~_umask())
        temporary.replace(path)
    finally:
        temporary.unlink(missing_ok=True)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
