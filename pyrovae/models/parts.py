"""The parts of models: checked against each other, and built from names."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from pyro.distributions import constraints
from torch import nn

from .._validation import unknown
from ..distributions import same_support
from ..encoders import Encoder
from ..likelihoods import Likelihood
from ..nn import Activation, Shape, as_shape, as_widths
from ..priors import Prior
from ..registry import build, canonical, find, names

__all__ = [
    "body_pair",
    "build_likelihood",
    "build_networks",
    "check_parts",
    "check_sizes",
    "check_supports",
    "in_shape_of",
    "in_size_of",
]


def build_networks(
    shape: tuple[int, ...],
    latent_dim: int,
    likelihood: Any,
    body: str,
    hidden: Sequence[int] | None,
    activation: Activation | None,
    num_labels: int = 0,
) -> tuple[Likelihood, nn.Module]:
    """A likelihood, and the body of an encoder whose hidden layers mirror those of the likelihood's decoder.

    Args:
        shape: the shape of one datum.
        latent_dim: L.
        likelihood: a name, a table or a ready object.
        body: as in :func:`pyrovae.make_vae`.
        hidden: widths of the hidden layers of the encoder's body.
        activation: a name, or ``None`` for that of the body.
        num_labels: further inputs of decoder and body for a label; planes in a body of images.

    Raises:
        ValueError: an unknown name or option.
    """
    inward, outward, networks, mirrored = body_pair(body, hidden, activation)
    made = build_likelihood(
        likelihood, shape, lambda out: build("body", outward, in_shape=latent_dim + num_labels, out_shape=out, **mirrored)
    )
    in_shape = shape
    if num_labels:
        planes = inward != outward and len(shape) == 3
        in_shape = (shape[0] + num_labels, *shape[1:]) if planes else (math.prod(shape) + num_labels,)
    return made, build("body", inward, in_shape=in_shape, **networks)


def build_likelihood(spec: Any, data_shape: tuple[int, ...], decoder: Callable[[Shape], nn.Module]) -> Likelihood:
    """A likelihood from a name, a table or a ready object; ``decoder`` makes the network for an ``out_shape``.

    Raises:
        ValueError: an unknown name or option, or an object that is not a likelihood.
    """
    if isinstance(spec, str):
        spec = {"kind": spec}
    if isinstance(spec, Mapping) and "kind" in spec:
        family: type[Likelihood] = find("likelihood", spec["kind"])
        return build("likelihood", spec, decoder=decoder(family.decoder_shape(data_shape, spec)))
    if isinstance(spec, Likelihood):
        return spec
    raise ValueError(f'The likelihood must be a name, a table such as {{"kind": "bernoulli"}} or a Likelihood, got {spec!r}.')


def check_parts(*parts: tuple[Any, type]) -> None:
    """Raise an error if a part is not an instance of its class.

    Raises:
        ValueError: there is such a part; the message names the first.
    """
    for part, family in parts:
        if not isinstance(part, family):
            kind = family.__name__
            raise ValueError(
                f"The {kind.lower()} must be a {family.__module__}.{kind}, got a {type(part).__name__}: build one, or "
                f"subclass it."
            )


def check_sizes(where: str, **sizes: Any) -> None:
    """Raise an error if the sizes of parts differ; ``None`` is an unknown size.

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


def check_supports(prior: Prior, encoder: Encoder) -> None:
    """Raise an error if a prior and an encoder are densities on different sets.

    Raises:
        ValueError: they are; the message names the encoders that fit the prior.
    """
    if prior.support is None or same_support(prior.support, encoder.support):
        return
    families: dict[str, type[Encoder]] = {name: find("encoder", name) for name in names("encoder")}
    fitting = [name for name, family in families.items() if same_support(prior.support, family.support)]
    choose = f"choose the encoder {' or '.join(map(repr, fitting))}" if fitting else "write an encoder for that set"
    raise ValueError(
        f"The prior {type(prior).__name__} is a distribution on {_set_name(prior.support)} and the encoder "
        f"{type(encoder).__name__} one on {_set_name(encoder.support)}, so their densities cannot be compared: {choose}, or "
        f"another prior."
    )


SET_NAMES = [
    (constraints.real_vector, "all real vectors"),
    (constraints.sphere, "the unit sphere"),
    (constraints.simplex, "the simplex"),
    (constraints.one_hot, "one-hot vectors"),
    (constraints.independent(constraints.positive, 1), "vectors of positive numbers"),
    (constraints.independent(constraints.unit_interval, 1), "vectors of numbers in [0, 1]"),
]


def _set_name(support: Any) -> str:
    return next((name for known, name in SET_NAMES if same_support(known, support)), str(support))


def body_pair(
    body: str, hidden: Sequence[int] | None, activation: Activation | None = None
) -> tuple[str, str, dict[str, Any], dict[str, Any]]:
    """The names of the encoder's body and of the decoder's, then the options of each.

    Raises:
        ValueError: an unknown name, or widths that are not positive integers.
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
