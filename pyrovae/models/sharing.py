"""Models outside this package: networks for torch.export and ONNX, folders on the Hugging Face hub."""

from __future__ import annotations

import importlib
import tempfile
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

__all__ = ["HUB_PREFIX", "export_networks", "pull_from_hub", "push_to_hub"]

HUB_PREFIX = "hf://"
Format = Literal["torch", "onnx"]


class _Function(nn.Module):
    """A function of one tensor as a module, with the model whose parameters it reads."""

    def __init__(self, model: nn.Module, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.model, self.function = model, function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


def export_networks(
    model: nn.Module,
    functions: dict[str, tuple[Callable[[Tensor], Tensor], Tensor]],
    folder: str | Path,
    format: Format,
) -> list[Path]:
    """Write functions of a model as graphs that run without this package, for batches of any size.

    Each graph is run on its example and compared with the function before it is kept.

    Args:
        model: the module that holds the parameters.
        functions: by name a function of one batch of tensors, and an example of such a batch, of at least two rows.
        folder: where the files go, each under its name.
        format: ``"torch"`` for torch.export's ``.pt2``, or ``"onnx"``.

    Returns:
        The files.

    Raises:
        ValueError: another format, a package that is missing, or a function that cannot be exported.
    """
    if format not in ("torch", "onnx"):
        raise ValueError(f'format must be "torch" or "onnx", got {format!r}: choose one.')
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    paths = []
    was_training = model.training
    model.eval()
    try:
        for name, (function, example) in functions.items():
            path = folder / f"{name}.{'pt2' if format == 'torch' else 'onnx'}"
            with tempfile.TemporaryDirectory(dir=folder) as inside:
                written = Path(inside) / path.name
                _export(_Function(model, function), example, written, format, name)
                written.replace(path)
            paths.append(path)
    finally:
        model.train(was_training)
    return paths


def _export(module: _Function, example: Tensor, path: Path, format: Format, name: str) -> None:
    from pyro import validation_enabled

    batch = torch.export.Dim("batch", min=1)
    # Distributions check their arguments by reading values, which no graph can do.
    with torch.no_grad(), validation_enabled(False), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, of its own deprecations
        expected = module(example)
        try:
            program = torch.export.export(module, (example,), dynamic_shapes={"x": {0: batch}})
        except Exception as error:
            first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
            raise ValueError(f"The {name} cannot be exported: torch.export says {first!r}.") from error
        if format == "torch":
            torch.export.save(program, path)
            found = torch.export.load(path).module()(example)
        else:
            found = _to_onnx(program, example, path)
    if found is not None and not torch.allclose(found, expected, rtol=1e-4, atol=1e-5):
        raise ValueError(f"The exported {name} gives other numbers, by up to {float((found - expected).abs().max()):.2g}.")


def _to_onnx(program: Any, example: Tensor, path: Path) -> Tensor | None:
    """Write ONNX; and run it, if its runtime is installed."""
    for package in ("onnx", "onnxscript"):
        _needs(package, "onnx")
    torch.onnx.export(program, (example,), str(path), dynamo=True, verbose=False, external_data=False)
    try:
        runtime = importlib.import_module("onnxruntime")
    except ImportError:
        return None
    session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    return torch.as_tensor(session.run(None, {session.get_inputs()[0].name: example.cpu().numpy()})[0])


def push_to_hub(model: Any, repo_id: str, *, private: bool, message: str, card: str, hub: Any = None) -> str:
    """Write a model's folder, with a card, into a repository of the hub; return the address of the commit."""
    hub = _hub() if hub is None else hub
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        (Path(folder) / "README.md").write_text(card, encoding="utf-8")
        hub.create_repo(repo_id, private=private, exist_ok=True)
        return str(hub.upload_folder(repo_id=repo_id, folder_path=folder, commit_message=message))


def pull_from_hub(address: str, *, revision: str | None, hub: Any = None) -> Path:
    """Fetch the two files of a model, named as ``"hf://owner/name"``, and return their folder."""
    hub = _hub() if hub is None else hub
    repo_id = address.removeprefix(HUB_PREFIX)
    if repo_id.count("/") != 1 or not all(repo_id.split("/")):
        raise ValueError(f'A model on the hub must be named "hf://owner/name", got {address!r}.')
    patterns = ["model.json", "model.safetensors"]  # nothing else is read, and nothing unpickled
    return Path(hub.snapshot_download(repo_id=repo_id, revision=revision, allow_patterns=patterns))


def _hub() -> Any:
    return _needs("huggingface_hub", "hub").HfApi()


def _needs(package: str, extra: str) -> Any:
    try:
        return importlib.import_module(package)
    except ImportError as error:
        raise ValueError(f'{package} is not installed: pip install "pyrovae[{extra}]".') from error
