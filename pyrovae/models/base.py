"""The base class of the models, and the checks and builders that they share."""

from __future__ import annotations

import itertools
import json
import math
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self, Unpack

import pyro
import torch
from pyro.distributions import constraints
from torch import Tensor, nn

from .. import files
from .._validation import unknown
from ..distributions import same_support
from ..encoders import Encoder
from ..likelihoods import Likelihood
from ..nn import Activation, Shape, as_shape, as_widths
from ..priors import Prior
from ..registry import build, canonical, describe, find, names
from .inputs import in_batches

if TYPE_CHECKING:
    from ..evidence.keywords import LogMarginalKeywords
    from ..evidence.results import Evidence
    from ..training.history import History
    from ..training.options import FitKeywords

__all__ = [
    "PairModule",
    "body_pair",
    "build_likelihood",
    "check_parts",
    "check_sizes",
    "in_shape_of",
    "in_size_of",
]

_counter = itertools.count()


class PairModule(nn.Module):
    """A module whose ``model`` and ``guide`` are Pyro programs: training, scoring, saving and loading.

    A concrete one writes the two programs, and names in ``parts`` the arguments of its ``__init__``, which it keeps as
    attributes: each with its kind in the registry, or ``None`` for plain data. A registered one (``@register("model")``) is
    trained from the command line too, which makes it by :meth:`from_names`.

    Attributes:
        run_defaults: arguments of :meth:`from_names` for runs of the command line that do not set them.
        quantity: what ``log_marginal`` estimates of :meth:`score_inputs`, in symbols.

    Args:
        name: the name under which Pyro's parameter store knows this instance; unique unless set, so that two models in one
            process never share parameters.
    """

    parts: ClassVar[dict[str, str | None]]
    run_defaults: ClassVar[dict[str, Any]] = {}
    quantity: ClassVar[str] = "log p(x)"
    prior: Prior
    likelihood: Likelihood

    def __init__(self, name: str | None = None):
        super().__init__()
        self.name = name or _fresh_name()

    def __getstate__(self) -> dict[str, Any]:
        # Pyro's store hangs a weak reference on every parameter that it hands out, which pickle refuses; the next run hangs
        # it on again.
        for parameter in self.parameters():
            vars(parameter).pop("unconstrained", None)
        return self.__dict__

    def __setstate__(self, state: dict[str, Any]) -> None:
        # A copy has parameters of its own: under the original's name Pyro's store would hand it the original's.
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
        """What ``model`` takes in training, of data and what belongs to them.

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
        """What ``model`` takes of test data, as in :meth:`train_inputs`, so that :attr:`quantity` is what is estimated."""
        return PairModule.train_inputs(self, x, y, mask=mask, covariates=covariates)

    def label_findings(self, x: Tensor, y: Tensor | None) -> dict[str, str]:
        """What the model finds out about labels of test data, in words, by name."""
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
            ValueError: a file is truncated, does not fit the other, or describes a model of another class. Nothing unpickles.
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
            # Not where torch.func.functional_call has put plain tensors in the parameters' place.
            ours = isinstance(parameter, nn.Parameter) and parameter.requires_grad
            if ours and key in store and store[key].unconstrained() is not parameter:
                raise ValueError(
                    f"Another model is called {self.name!r} in Pyro's parameter store, so this one would never train: set "
                    f"vae.name to a name of its own, or call pyro.clear_param_store()."
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
        # Counts come as integers and pixels as bytes, and from anywhere; the networks want their own floating type and device.
        return x.to(next(self.parameters()))

    def _encoder_input(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The data as an encoder sees them: zeros where they are missing."""
        x, mask = self._as_data(x), self._as_mask(x, mask)
        return self.likelihood.encoder_input(x if mask is None else torch.where(mask, x, 0.0))

    def _as_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        # Labels beside the data, as a labelled data set gives them, are left out as ever: they are not of the data's shape.
        if mask is None or (mask.dtype != torch.bool and mask.shape != x.shape):
            return None
        if mask.dtype != torch.bool or mask.shape != x.shape:
            raise ValueError(
                f"A mask must be a boolean tensor of the data's shape {tuple(x.shape)}, true where a value was observed, got "
                f"{mask.dtype} of shape {tuple(mask.shape)}."
            )
        return mask.to(next(self.parameters()).device)


def build_likelihood(spec: Any, data_shape: tuple[int, ...], decoder: Callable[[Shape], nn.Module]) -> Likelihood:
    """A likelihood from a name, a table or a ready object; ``decoder`` makes the network for an ``out_shape``.

    Raises:
        ValueError: an unknown name or option, or something that is no likelihood.
    """
    if isinstance(spec, str):
        spec = {"kind": spec}
    if isinstance(spec, Mapping) and "kind" in spec:
        family: type[Likelihood] = find("likelihood", spec["kind"])
        return build("likelihood", spec, decoder=decoder(family.decoder_shape(data_shape, spec)))
    if isinstance(spec, Likelihood):
        return spec
    raise ValueError('The likelihood is a name, a table with its kind = "bernoulli" or the like, or a Likelihood.')


def check_parts(*parts: tuple[Any, type]) -> None:
    """Refuse a part that is not of its family.

    Raises:
        ValueError: the first such part.
    """
    for part, family in parts:
        if not isinstance(part, family):
            kind = family.__name__
            raise ValueError(
                f"The {kind.lower()} must be a {family.__module__}.{kind}, got a {type(part).__name__}: build one, or "
                f"subclass it."
            )


def check_sizes(where: str, **sizes: Any) -> None:
    """Refuse parts of different sizes; ``None`` is a size that is not known.

    Raises:
        ValueError: they disagree.
    """
    known = {part: size for part, size in sizes.items() if size is not None}
    if len(set(known.values())) > 1:
        listed = ", ".join(f"{part} {size}" for part, size in known.items())
        raise ValueError(f"The parts disagree {where} ({listed}): build them with the same one.")


def in_shape_of(body: nn.Module) -> tuple[int, ...] | None:
    """The event shape that a network takes, if it has an attribute ``in_shape``."""
    in_shape: Any = getattr(body, "in_shape", None)
    return None if in_shape is None else as_shape(in_shape)


def in_size_of(body: nn.Module) -> int | None:
    """The number of inputs of a network, if it has an attribute ``in_shape``."""
    shape = in_shape_of(body)
    return None if shape is None else math.prod(shape)


def _check_supports(prior: Prior, encoder: Encoder) -> None:
    if prior.support is None or same_support(prior.support, encoder.support):
        return
    families: dict[str, type[Encoder]] = {name: find("encoder", name) for name in names("encoder")}
    fitting = [name for name, family in families.items() if same_support(prior.support, family.support)]
    choose = f"choose the encoder {' or '.join(map(repr, fitting))}" if fitting else "write an encoder for that set"
    raise ValueError(
        f"The prior {type(prior).__name__} is a distribution on {_set_name(prior.support)} and the encoder "
        f"{type(encoder).__name__} one on {_set_name(encoder.support)}, so their densities do not compare: {choose}, or "
        f"another prior."
    )


SET_NAMES = [
    (constraints.real_vector, "all real vectors"),
    (constraints.sphere, "the unit sphere"),
    (constraints.simplex, "the simplex"),
    (constraints.one_hot, "one-hot vectors"),
]


def _set_name(support: Any) -> str:
    return next((name for known, name in SET_NAMES if same_support(known, support)), str(support))


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


def body_pair(
    body: str, hidden: Sequence[int] | None, activation: Activation | None = None
) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """Names of the encoder's body and of the decoder's, then the options of each.

    Raises:
        ValueError: an unknown name, or widths that are no positive integers.
    """
    registered = names("body")
    pairs = [name.removesuffix("_encoder") for name in registered if name.endswith("_encoder")]
    given = {} if activation is None else {"activation": activation}
    body = body.casefold() if isinstance(body, str) and body.casefold() in pairs else canonical("body", body)
    if body in pairs:
        options: dict[str, Any] = given if hidden is None else {"hidden": as_widths(hidden)} | given
        return f"{body}_encoder", f"{body}_decoder", options, options
    single = [name for name in registered if not name.endswith(("_encoder", "_decoder"))]
    if body not in single:
        raise ValueError(unknown("body", body, single + pairs))
    widths = [200, 200] if hidden is None else as_widths(hidden)
    return body, body, {"hidden": widths} | given, {"hidden": widths[::-1]} | given
