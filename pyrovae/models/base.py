"""The base class of the models."""

from __future__ import annotations

import itertools
import json
from abc import abstractmethod
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, NoReturn, Self, Unpack

import pyro
import torch
from torch import Tensor, nn

from .. import files
from ..likelihoods import Likelihood
from ..nn import Shape
from ..priors import Prior
from ..registry import build, describe
from .inputs import in_batches

if TYPE_CHECKING:
    from ..evidence.keywords import LogMarginalKeywords
    from ..evidence.results import Evidence
    from ..training.history import History
    from ..training.options import FitKeywords

__all__ = ["PairModule"]

_counter = itertools.count()


class PairModule(nn.Module):
    """A module whose ``model`` and ``guide`` are Pyro programs: training, scoring, saving and loading.

    A subclass implements ``model`` and ``guide``. Its ``parts`` are the arguments of its ``__init__``, which are also
    attributes: each with its kind in the registry, or ``None`` for plain data. A registered subclass (``@register("model")``)
    can be trained from the command line, which makes it by :meth:`from_names`.

    Attributes:
        run_defaults: arguments of :meth:`from_names` for runs of the command line that do not set them.
        quantity: the quantity that ``log_marginal`` estimates from :meth:`score_inputs`, such as ``"log p(x)"``.

    Args:
        name: the name of this instance in Pyro's parameter store; by default unique, so that two models in one process do not
            share parameters.
    """

    parts: ClassVar[dict[str, str | None]]
    run_defaults: ClassVar[dict[str, Any]] = {}
    quantity: ClassVar[str] = "log p(x)"
    prior: Prior
    likelihood: Likelihood

    def __init__(self, name: str | None = None):
        super().__init__()
        self.name = name or _fresh_name()

    def __call__(self, *args: Any, **kwargs: Any) -> NoReturn:
        """Refuse a call: a pair is two programs, and a call does not say which of its results is meant.

        Raises:
            TypeError: always; the message has the methods to call.
        """
        methods = [each for each in ("fit", "log_marginal", "embed", "reconstruct", "sample") if hasattr(self, each)]
        raise TypeError(
            f"{type(self).__name__} is a pair of programs and cannot be called: use one of its methods {', '.join(methods)}."
        )

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's store adds a weak reference to every parameter that it returns, which cannot be pickled. The next run adds it
        # again.
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy needs another name: under the original's name, Pyro's store would return the parameters of the original.
        super().__setstate__(state)
        self.name = _fresh_name()

    @classmethod
    @abstractmethod
    def from_names(cls, data_shape: Shape, *args: Any, **kwargs: Any) -> Self:
        """A model from names of its parts; keyword arguments are the keys of the command line's ``[model]``."""

    @property
    def data_shape(self) -> tuple[int, ...]:
        """The shape of one datum."""
        return self.likelihood.event_shape

    @abstractmethod
    def model(self, *args: Any, **kwargs: Any) -> None:
        """The joint as a Pyro program."""

    @abstractmethod
    def guide(self, *args: Any, **kwargs: Any) -> None:
        """The variational posterior as a Pyro program; takes what ``model`` takes."""

    @abstractmethod
    def embed(self, *args: Any, **kwargs: Any) -> Tensor:
        """One point for each datum, shape ``(N, L)``, without gradients; takes data as :meth:`fit` takes them."""

    @abstractmethod
    def reconstruct(self, *args: Any, **kwargs: Any) -> Tensor:
        """A mean of the data for each datum, without gradients; takes data as :meth:`fit` takes them."""

    @abstractmethod
    def examples(self, num_samples: int) -> Tensor:
        """Means of p(x|z) at draws of z, for a report; shape ``(num_samples, *data_shape)``."""

    def train_inputs(self, x: Any, y: Tensor | None, *, mask: Any = None, covariates: Tensor | None = None) -> tuple[Any, ...]:
        """The arguments of ``model`` in training, for data and what belongs to them.

        Args:
            x: data.
            y: their labels, or ``None``.
            mask: true where a value was observed, or ``None`` if all were.
            covariates: numbers of shape ``(N, C)`` that are not modelled, or ``None``.

        Raises:
            ValueError: the model does not take something that the data have.
        """
        if covariates is not None:
            raise ValueError(
                f"A {type(self).__name__} takes no covariates, got {covariates.shape[1]}: leave them out, or choose "
                f'model.kind = "conditional".'
            )
        return (x,) if mask is None else (x, mask)

    def score_inputs(
        self, x: Tensor, y: Tensor | None, *, mask: Tensor | None = None, covariates: Tensor | None = None
    ) -> tuple[Tensor, ...]:
        """The arguments of ``model`` for test data, as in :meth:`train_inputs`, with which ``quantity`` is estimated."""
        return PairModule.train_inputs(self, x, y, mask=mask, covariates=covariates)

    def label_findings(self, x: Tensor, y: Tensor | None) -> dict[str, str]:
        """Results on the labels of test data: a sentence for each name."""
        return {}

    def fit(self, data: Any, **options: Unpack[FitKeywords]) -> History:
        """Train on data; see :func:`pyrovae.fit`."""
        from ..training.loop import fit

        return fit(self.model, self.guide, data, **options)

    def log_marginal(self, x: Any, **options: Unpack[LogMarginalKeywords]) -> Evidence:
        """Importance-sampled log p(x) of every datum; see :func:`pyrovae.log_marginal`."""
        from ..evidence.importance import log_marginal

        return log_marginal(self.model, self.guide, x, **options)

    def save_pretrained(self, folder: str | Path) -> None:
        """Write ``model.json`` (what to build) and ``model.safetensors`` (its weights) into a folder.

        Raises:
            ValueError: a part is not registered, so it could not be built again.
        """
        parts = {part: _describe(getattr(self, part), kind) for part, kind in self.parts.items()}
        described = {"model": type(self).__name__} | parts
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        files.save_weights(folder / "model.safetensors", self)
        files.write_text(folder / "model.json", json.dumps(described, indent=1) + "\n")

    def push_to_hub(
        self, repo_id: str, *, private: bool = False, message: str = "Upload a pyrovae model", hub: Any = None
    ) -> str:
        """Write the model into a repository of the Hugging Face hub: ``pip install "pyrovae[hub]"``.

        Args:
            repo_id: ``"owner/name"``; it is created if it does not exist.
            private: whether a new repository is private.
            message: the message of the commit.
            hub: a ``huggingface_hub.HfApi``; by default one with the login of this machine.

        Returns:
            The address of the commit.

        Raises:
            ValueError: a part is not registered, or huggingface_hub is not installed.
        """
        from .sharing import HUB_PREFIX, push_to_hub

        kind = type(self).__name__
        names = ", ".join(
            type(getattr(self, part)).__name__ for part in self.parts if isinstance(getattr(self, part), nn.Module)
        )
        card = (
            f"---\nlibrary_name: pyrovae\ntags: [variational-autoencoder, pyro]\n---\n\n# {repo_id}\n\nA `{kind}` of "
            f"[pyrovae](https://pypi.org/project/pyrovae/): {names}.\n\n```python\nimport pyrovae as pv\n\n"
            f'model = pv.{kind}.from_pretrained("{HUB_PREFIX}{repo_id}")\n```\n'
        )
        return push_to_hub(self, repo_id, private=private, message=message, card=card, hub=hub)

    @classmethod
    def from_pretrained(cls, folder: str | Path, *, revision: str | None = None, hub: Any = None) -> Self:
        """Build the model that :meth:`save_pretrained` wrote.

        Args:
            folder: the folder; or ``"hf://owner/name"``, a repository of the Hugging Face hub.
            revision: a branch, tag or commit of the repository.
            hub: a ``huggingface_hub.HfApi``; by default one with the login of this machine.

        Raises:
            FileNotFoundError: the folder or a file in it is missing.
            ValueError: a file is truncated, does not fit the other, or describes a model of another class.
        """
        from .sharing import HUB_PREFIX, pull_from_hub

        if str(folder).startswith(HUB_PREFIX):
            folder = pull_from_hub(str(folder), revision=revision, hub=hub)
        folder = Path(folder)
        parts = files.read_json(folder / "model.json")
        named = parts.pop("model", cls.__name__) if isinstance(parts, dict) else cls.__name__
        if named != cls.__name__:
            raise ValueError(
                f"{folder / 'model.json'} does not describe a {cls.__name__} but a {named}: call {named}.from_pretrained."
            )
        if not isinstance(parts, dict) or set(parts) != set(cls.parts):
            *most, last = cls.parts
            needs = f"{', '.join(most)} and {last}"
            raise ValueError(f"{folder / 'model.json'} does not describe a {cls.__name__}: it needs {needs}.")
        model = cls(**{part: _build(parts[part], kind) for part, kind in cls.parts.items()})
        files.load_weights(folder / "model.safetensors", model, cast=True)
        return model

    @property
    def _device(self) -> torch.device:
        return next(self.parameters()).device

    def _register(self) -> None:
        pyro.module(self.name, self)
        store = pyro.get_param_store()
        for name, parameter in self.named_parameters():
            key = f"{self.name}$$${name}"
            # Not if torch.func.functional_call has replaced the parameters by plain tensors.
            ours = isinstance(parameter, nn.Parameter) and parameter.requires_grad
            if ours and key in store and store[key].unconstrained() is not parameter:
                raise ValueError(
                    f"Another model is called {self.name!r} in Pyro's parameter store, so this one would never train: set "
                    f"vae.name to another name, or call pyro.clear_param_store()."
                )

    def _in_batches(self, compute: Callable[..., Tensor], *data: Any, batch_size: int) -> Tensor:
        return in_batches(self.model, compute, *data, batch_size=batch_size, device=self._device)

    def _as_data(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"The data must be a tensor, got {type(x).__name__}: write torch.as_tensor(x).")
        if tuple(x.shape[1:]) != self.data_shape:
            raise ValueError(
                f"The data have shape {tuple(x.shape)}, but the model takes (N, {', '.join(map(str, self.data_shape))}): "
                f"reshape them, or build the model for that shape."
            )
        # Data may be integers or bytes, on any device; the networks need their own floating type and device.
        return x.to(next(self.parameters()))

    def _encoder_input(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The encoder's input for data, with zeros in place of missing values."""
        x, mask = self._as_data(x), self._as_mask(x, mask)
        return self.likelihood.encoder_input(x if mask is None else torch.where(mask, x, 0.0))

    def _as_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        # The labels of a labelled data set, which do not have the shape of the data, are ignored.
        if mask is None or (mask.dtype != torch.bool and mask.shape != x.shape):
            return None
        if mask.dtype != torch.bool or mask.shape != x.shape:
            raise ValueError(
                f"A mask must be a boolean tensor of the data's shape {tuple(x.shape)}, true where a value was observed, got "
                f"{mask.dtype} of shape {tuple(mask.shape)}."
            )
        return mask.to(next(self.parameters()).device)


def _fresh_name() -> str:
    return f"pyrovae.vae{next(_counter)}"


def _describe(part: Any, kind: str | None) -> Any:
    if kind is None:
        return part
    return [describe(each, kind) for each in part] if isinstance(part, nn.ModuleList) else describe(part, kind)


def _build(spec: Any, kind: str | None) -> Any:
    if kind is None:
        return spec
    return [build(kind, each) for each in spec] if isinstance(spec, list) else build(kind, spec)
