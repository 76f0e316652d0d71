"""Any pair's parameters and buffers in a file, by name."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .. import files
from ..data.batches import Batches, as_arrays
from .inspect import prepare
from .parameters import _parameter_sites
from .reachable import reachable
from .sites import Program
from .state import own_scope

__all__ = ["load", "save"]

FORMAT = 1


def save(path: str | Path, model: Program, guide: Program, x: Any) -> None:
    """Write the parameters and buffers of any pair into one safetensors file, atomically.

    The networks are named by the variables or attributes by which the programs reach them, and values of ``pyro.param`` that no
    network owns by their own names. Nothing is pickled, so the programs themselves are not in the file: build the same pair
    again and call :func:`load`. Our own models have ``save_pretrained`` too, which writes what to build.

    Args:
        path: the file.
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        x: a few data, on which the pair runs once, so that parameters that are made on the first run exist.

    Raises:
        ValueError: the pair does not run on the data, has nothing to save, or a network keeps state that is no tensor.

    Example:
        >>> import tempfile, torch, pyrovae as pv
        >>> one, other = (pv.make_vae(9, latent_dim=2, hidden=[16]) for _ in range(2))
        >>> x = torch.ones(5, 9)
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     pv.save(f"{folder}/pair.safetensors", one.model, one.guide, x)
        ...     pv.load(f"{folder}/pair.safetensors", other.model, other.guide, x)
        >>> bool((one.embed(x) == other.embed(x)).all())
        True
    """
    with own_scope(model, guide, keep=True):
        tensors = _tensors(model, guide, _first_run(model, guide, x))
        if not tensors:
            raise ValueError("The pair must have parameters to be saved, got none: there is nothing to write.")
        files.write_arrays(path, tensors, {"pair": {"format": FORMAT}})


def load(path: str | Path, model: Program, guide: Program, x: Any) -> None:
    """Load what :func:`save` wrote into a pair of the same programs and networks.

    Args:
        path: the file.
        model: a Pyro program for p(x, z).
        guide: a Pyro program for q(z|x).
        x: a few data, on which the pair runs once, so that parameters that are made on the first run exist.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: the file is damaged or of another kind, or its tensors are not the pair's; the pair is then unchanged.
    """
    arrays, notes = files.read_arrays(path)
    record = notes.get("pair")
    if not isinstance(record, dict):
        raise ValueError(f"{path} must be a file that pyrovae.save wrote, got one that holds no pair.")
    if record.get("format") != FORMAT:
        raise ValueError(f"{path} has format {record.get('format')!r}, and this version reads {FORMAT}: update pyrovae.")
    with own_scope(model, guide, keep=True):
        tensors = _tensors(model, guide, _first_run(model, guide, x))
        for name in sorted(arrays.keys() | tensors.keys()):
            if name not in tensors or name not in arrays:
                where = "the pair, but not the file" if name in tensors else "the file, but not the pair"
                raise ValueError(f"{path} does not fit the pair: {where}, has {name!r}; build the pair that was saved.")
            kept, own = arrays[name], tensors[name]
            if kept.shape != own.shape or kept.dtype != own.dtype:
                raise ValueError(
                    f"{path} does not fit the pair: {name!r} must be {_described(own)}, got {_described(kept)}; build the pair "
                    f"with the sizes and the floating type that were saved."
                )
        with torch.no_grad():
            for name, own in tensors.items():
                own.copy_(arrays[name])


def _described(tensor: Tensor) -> str:
    return f"{str(tensor.dtype).removeprefix('torch.')} of shape {tuple(tensor.shape)}"


def _first_run(model: Program, guide: Program, x: Any) -> tuple[Any, ...]:
    """Run the pair once, which makes its parameters; return its arguments."""
    data = Batches(as_arrays(x, program=model), batch_size=1)
    data.batch_size = len(data.arrays[0])
    start = prepare(model, guide, data, particles=False, each=False)
    return start.args


def _tensors(model: Program, guide: Program, args: tuple[Any, ...]) -> dict[str, Tensor]:
    """The pair's parameters and buffers by name: of its networks, of its closures, and of Pyro's store."""
    found: dict[str, Tensor] = {}
    named = [
        (f"{program}.{name}".rstrip("."), value)
        for program, root in (("model", model), ("guide", guide))
        for name, value in reachable(root, scope="modules")
    ]
    modules: dict[int, tuple[str, nn.Module]] = {}
    for name, value in named:
        if isinstance(value, nn.Module):
            modules.setdefault(id(value), (name, value))
    inner = {id(part) for _, module in modules.values() for part in module.modules() if part is not module}
    owned: set[int] = set()
    for key, (name, module) in modules.items():
        if key in inner:
            continue
        for entry, value in module.state_dict(keep_vars=True).items():
            if not isinstance(value, Tensor):
                raise ValueError(
                    f"The network {name!r} must keep its state in tensors, got {type(value).__name__} for {entry!r}: only "
                    f"tensors can be saved."
                )
            _add(found, f"{name}.{entry}", value)
            owned.add(id(value))
    for name, value in named:
        if isinstance(value, nn.Parameter) and id(value) not in owned:
            _add(found, name, value)
            owned.add(id(value))
    for name, own, _ in _parameter_sites(model, guide, args, {}):
        if isinstance(own, Tensor) and own.is_leaf and id(own) not in owned:
            _add(found, f"pyro.param.{name}", own)
            owned.add(id(own))
    return found


def _add(found: dict[str, Tensor], name: str, value: Tensor) -> None:
    """Add a tensor under its name, which gets marks if another tensor has it."""
    while name in found:
        name += "'"
    found[name] = value
