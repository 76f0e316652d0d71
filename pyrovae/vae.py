"""The most common pair: one latent, one observation, a prior, a likelihood and an encoder."""

from __future__ import annotations

import itertools
import json
import math
import warnings
from abc import abstractmethod
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar, Self

import numpy as np
import pyro
import pyro.distributions as dist
import torch
from pyro.distributions import constraints
from pyro.poutine.messenger import Messenger
from torch import Tensor, nn

from . import checkpoint
from .distributions import centre
from .encoders import Encoder
from .likelihoods import Likelihood
from .nn import Activation, Shape, as_shape, as_widths
from .priors import Prior
from .registry import build, describe, find, names, positive_integer, unknown

if TYPE_CHECKING:
    from .evidence import Evidence
    from .training import History

_counter = itertools.count()


class PairModule(nn.Module):
    """A module whose ``model`` and ``guide`` are Pyro programs: what every such model does the same way.

    A concrete one writes the two programs, and names in ``parts`` the arguments of its ``__init__``, which it keeps as
    attributes: each with its kind in the registry, or ``None`` for plain data.

    Args:
        name: the name under which Pyro's parameter store knows this instance; unique unless set, so that two models in one
            process never share parameters.
    """

    parts: ClassVar[dict[str, str | None]]
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

    def fit(self, data: Any, **options: Any) -> History:
        """Train on data; see :func:`pyrovae.fit`."""
        from .training import fit

        return fit(self.model, self.guide, data, **options)

    def log_marginal(self, x: Any, **options: Any) -> Evidence:
        """Importance-sampled log p(x) of every datum; see :func:`pyrovae.log_marginal`."""
        from .marginal import log_marginal

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
        checkpoint.save_weights(folder / "model.safetensors", self)
        checkpoint.write_text(folder / "model.json", json.dumps(described, indent=1) + "\n")

    @classmethod
    def from_pretrained(cls, folder: str | Path) -> Self:
        """Build the model that :meth:`save_pretrained` wrote.

        Raises:
            FileNotFoundError: the folder or a file in it is missing.
            ValueError: a file is truncated, does not fit the other, or describes a model of another class. Nothing unpickles.
        """
        folder = Path(folder)
        parts = checkpoint.read_json(folder / "model.json")
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
        checkpoint.load_weights(folder / "model.safetensors", model, cast=True)
        return model

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

    def _as_data(self, x: Tensor) -> Tensor:
        if not isinstance(x, Tensor):
            raise TypeError(f"The model takes a tensor, not {type(x).__name__}: write torch.as_tensor(x).")
        if tuple(x.shape[1:]) != self.data_shape:
            raise ValueError(
                f"The data have shape {tuple(x.shape)}, but the model takes (N, {', '.join(map(str, self.data_shape))}): "
                f"reshape them, or build the model for that shape."
            )
        # Counts come as integers and pixels as bytes, and from anywhere; the networks want their own floating type and device.
        return x.to(next(self.parameters()))

    def _shown(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The data as an encoder sees them: zeros where they are missing."""
        x, mask = self._as_data(x), self._as_mask(x, mask)
        return self.likelihood.shown(x if mask is None else torch.where(mask, x, 0.0))

    def _as_mask(self, x: Tensor, mask: Tensor | None) -> Tensor | None:
        # Labels beside the data, as a labelled data set gives them, are left out as ever: they are not of the data's shape.
        if mask is None or (mask.dtype != torch.bool and mask.shape != x.shape):
            return None
        if mask.dtype != torch.bool or mask.shape != x.shape:
            raise ValueError(
                f"A mask is a boolean tensor of the data's shape {tuple(x.shape)}, true where a value was observed, not one of "
                f"{mask.dtype} and shape {tuple(mask.shape)}."
            )
        return mask.to(next(self.parameters()).device)


class VAE(PairModule):
    r"""A variational autoencoder as a pair of Pyro programs.

    .. math:: p_\theta(x, z) = p_\theta(z) \, p_\theta(x \mid z), \qquad q_\phi(z \mid x) \approx p_\theta(z \mid x)

    ``vae.model(x)`` and ``vae.guide(x)`` are valid Pyro: they run under ``pyro.infer.SVI``, ``Predictive`` and
    ``poutine.trace``. The sites are ``"z"`` and ``"x"`` in the plate ``"data"`` at dim -1. Where values are missing, a mask
    goes beside the data, ``vae.model(x, mask)``, of the shape of ``x`` and true where a value was observed: only those are
    scored, so every bound and estimate is of log p(x_obs), and the encoder sees zeros in place of the others. Whatever takes
    data takes the pair: ``vae.fit((x, mask))``, ``vae.log_marginal((x, mask))``.

    Args:
        prior: p(z).
        likelihood: p(x|z), with its decoder.
        encoder: q(z|x).
        name: the name under which Pyro's parameter store knows this instance; unique unless set, so that two models in one
            process never share parameters.

    Raises:
        ValueError: a part is no prior, likelihood or encoder, they disagree on the latent dimension or the data's shape, or
            prior and encoder live on different sets, such as a sphere and all vectors.

    References:
        Kingma and Welling, Auto-Encoding Variational Bayes, 2014.

    Example:
        >>> import torch
        >>> import pyrovae as pv
        >>> vae = pv.VAE(prior=pv.priors.StandardNormal(2),
        ...              likelihood=pv.likelihoods.Bernoulli(pv.nn.MLP(2, [16], 9)),
        ...              encoder=pv.encoders.DiagonalNormal(pv.nn.MLP(9, [16]), 2))
        >>> vae.sample(5).shape
        torch.Size([5, 9])
    """

    parts: ClassVar[dict[str, str | None]] = {"prior": "prior", "likelihood": "likelihood", "encoder": "encoder"}

    def __init__(self, prior: Prior, likelihood: Likelihood, encoder: Encoder, name: str | None = None):
        super().__init__(name)
        check_parts((prior, Prior), (likelihood, Likelihood), (encoder, Encoder))
        check_sizes(
            "on the latent dimension",
            prior=prior.latent_dim,
            encoder=encoder.latent_dim,
            decoder=in_size_of(likelihood.decoder),
        )
        check_sizes("on the shape of one datum", encoder=in_shape_of(encoder.body), likelihood=likelihood.event_shape)
        _check_supports(prior, encoder)
        prior.bind(encoder)
        self.prior, self.likelihood, self.encoder = prior, likelihood, encoder

    @property
    def latent_dim(self) -> int:
        """L, the number of latent dimensions."""
        return self.prior.latent_dim

    def model(self, x: Tensor, mask: Tensor | None = None) -> None:
        """p(x, z) as a Pyro program; ``x`` has shape ``(B, *data_shape)``, and so has a ``mask`` of what was observed."""
        x, mask = self._as_data(x), self._as_mask(x, mask)
        self._register()
        with pyro.plate("data", x.shape[0]):
            z = pyro.sample("z", self.prior())  # batch (B,), event (L,)
            law, seen = self.likelihood.observe(z, x, mask)
            pyro.sample("x", law, obs=seen)  # batch (B,), event data_shape

    def guide(self, x: Tensor, mask: Tensor | None = None) -> None:
        """q(z|x) as a Pyro program; takes what ``model`` takes."""
        encoding = self.encode(x, mask)
        self._register()
        with pyro.plate("data", x.shape[0]):
            pyro.sample("z", encoding)  # batch (B,), event (L,)

    def encode(self, x: Tensor, mask: Tensor | None = None) -> dist.Distribution:
        """q(z|x), batch shape ``(B,)`` and event shape ``(L,)``; missing values are zeros to the encoder."""
        return self.encoder(self._shown(x, mask))

    def embed(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """One point for each datum, shape ``(B, L)``: the mean of q(z|x), or its centre where there is no mean to be had."""
        return centre(self.encode(x, mask))

    def decode(self, z: Tensor) -> dist.Distribution:
        """p(x|z), batch shape ``z.shape[:-1]`` and event shape ``data_shape``."""
        return self.likelihood(z)

    @torch.no_grad()
    def sample(self, num_samples: int, *, mean: bool = False) -> Tensor:
        """Draws from p(x), shape ``(num_samples, *data_shape)``; or the means of p(x|z) at draws of z."""
        law = self.decode(self.prior().sample((num_samples,)))
        return law.mean if mean else law.sample()

    @torch.no_grad()
    def reconstruct(self, x: Tensor, mask: Tensor | None = None) -> Tensor:
        """The mean of p(x|z) where :meth:`embed` puts x, shape of ``x``."""
        law, _ = self.likelihood.observe(self.embed(x, mask), self._as_data(x), self._as_mask(x, mask))
        return law.mean

    @torch.no_grad()
    def interpolate(self, a: Tensor, b: Tensor, steps: int = 10) -> Tensor:
        """Means of p(x|z) on the straight line between two encodings.

        Args:
            a: data ``(*data_shape)`` or ``(B, *data_shape)``, where the lines start.
            b: data of the same shape, where they end.
            steps: points on each line, both ends included.

        Returns:
            Shape ``(steps, *data_shape)`` or ``(steps, B, *data_shape)``.
        """
        if a.shape != b.shape:
            raise ValueError(f"The ends must have one shape, not {tuple(a.shape)} and {tuple(b.shape)}.")
        single = a.dim() == len(self.data_shape)
        ends = [self.embed(x[None] if single else x) for x in (a, b)]
        weight = torch.linspace(0, 1, steps, dtype=ends[0].dtype, device=ends[0].device)[:, None, None]
        means = self.decode(ends[0] + weight * (ends[1] - ends[0])).mean
        return means[:, 0] if single else means

    def impute(
        self,
        x: Tensor,
        mask: Tensor,
        *,
        num_samples: int = 1000,
        num_draws: int | None = None,
        chunk_size: int | None = None,
        seed: int | None = None,
    ) -> Tensor:
        r"""Fill in missing values by self-normalised importance sampling; observed ones are kept.

        .. math:: \mathbb{E}[x_{mis} \mid x_{obs}] \approx \sum_{s=1}^S \bar w_s \, \mathbb{E}[x_{mis} \mid z_s], \qquad
            \bar w_s \propto \frac{p(x_{obs} \mid z_s) \, p(z_s)}{q(z_s \mid x_{obs})}, \quad z_s \sim q(z \mid x_{obs})

        Draws pick a latent with probability :math:`\bar w_s` and sample p(x|z) there, each draw afresh. Both are as good as
        the weights: from 25 samples on, a warning says of how many data their Pareto k is too large. Where k is, a few latents
        carry the answer; more samples help, or a guide that is closer to the posterior.

        Args:
            x: data, shape ``(B, *data_shape)``; what they hold where the mask is false does not matter.
            mask: true where a value was observed, shape of ``x``.
            num_samples: S, latents drawn for every datum.
            num_draws: return so many draws of the missing values instead of their mean.
            chunk_size: (sample, datum) pairs scored at once; by default as many as fill about 16 MB of observations.
            seed: makes it reproducible and leaves the global random stream untouched.

        Returns:
            The posterior-predictive mean, shape of ``x``; or draws, shape ``(num_draws, B, *data_shape)``. With discrete data
            only the draws lie in the support.

        Raises:
            ValueError: the mask is no boolean tensor of the shape of ``x``, or a number is not positive.

        References:
            Mattei and Frellsen, MIWAE: Deep generative modelling and imputation of incomplete data sets, 2019.

        Example:
            >>> import torch, pyrovae as pv
            >>> vae = pv.make_vae(9, latent_dim=2, hidden=[16])
            >>> x, mask = torch.ones(5, 9), torch.arange(9) < 6
            >>> filled = vae.impute(x, mask.expand(5, 9), num_samples=1000, seed=0)
            >>> filled[0, 0].item(), bool(filled[0, 8] < 1)
            (1.0, True)
        """
        from .marginal import CHUNK_NUMBERS
        from .traces import evaluation_mode

        num_samples = positive_integer(num_samples, "num_samples")
        num_draws = None if num_draws is None else positive_integer(num_draws, "num_draws")
        chunk = CHUNK_NUMBERS // max(math.prod(self.data_shape), 256) if chunk_size is None else chunk_size
        chunk = positive_integer(max(chunk, 1) if chunk_size is None else chunk, "chunk_size")
        x, known = self._as_data(x), self._as_mask(x, mask)
        if known is None:
            raise ValueError(f"The mask must be a boolean tensor of the data's shape {tuple(x.shape)}, true where observed.")
        rows = max(1, chunk // num_samples)
        devices = [x.device] if x.device.type == "cuda" else []
        with torch.no_grad(), evaluation_mode(self.model, self.guide), torch.random.fork_rng(devices, enabled=seed is not None):
            if seed is not None:
                torch.manual_seed(seed)
            parts = [
                self._impute(data, seen, num_samples, num_draws, max(1, chunk // len(data)))
                for data, seen in zip(x.split(rows), known.split(rows), strict=True)
            ]
        _warn_of_tails(torch.cat([tail for _, tail in parts]), num_samples, torch.finfo(x.dtype).eps)
        return torch.cat([filled for filled, _ in parts], 0 if num_draws is None else 1)

    def _impute(self, x: Tensor, mask: Tensor, num_samples: int, num_draws: int | None, chunk: int) -> tuple[Tensor, Tensor]:
        """One batch, in chunks of particles; all weight so far is kept as one log-sum and the largest for each datum."""
        from .evidence import tail_size
        from .weights import log_weights

        event = (1,) * len(self.data_shape)
        log_sum = torch.full((len(x),), -math.inf, dtype=torch.float64, device=x.device)
        tail, keep = log_sum[:, None][:, :0], tail_size(num_samples)
        mean, latents = torch.zeros_like(x), x.new_zeros(num_draws or 0, len(x), self.latent_dim)
        left = num_samples
        while left:
            size = min(left, chunk)
            with _Seen() as seen:
                weights = log_weights(self.model, self.guide, x, mask, num_particles=size, max_plate_nesting=1)
            log_w = weights.log_weights.double()  # (size, B)
            tail = torch.cat([tail, log_w.T], 1)
            tail = torch.topk(tail, min(keep, tail.shape[1])).values
            total = torch.logaddexp(log_sum, torch.logsumexp(log_w, 0))
            dead = total == -math.inf
            kept = torch.where(dead, 1.0, torch.exp(log_sum - total))  # the earlier chunks' share of all weight so far
            share = torch.where(dead, 0.0, torch.exp(log_w - total))
            if num_draws is None:
                share = share.to(x.dtype).reshape(*share.shape, *event)
                mean = mean * kept.to(x.dtype).reshape(-1, *event) + (share * seen.law.mean.reshape(size, *x.shape)).sum(0)
            else:
                # Each draw moves to this chunk with the chunk's share, and picks within it by weight.
                picked = torch.multinomial(torch.where(share.sum(0) > 0, share, 1.0).T, num_draws, replacement=True).T
                moves = torch.rand(picked.shape, dtype=log_w.dtype, device=x.device) >= kept
                drawn = seen.z.reshape(size, *latents.shape[1:]).gather(0, picked[..., None].expand(latents.shape))
                latents = torch.where(moves[..., None], drawn, latents)
            log_sum = total
            left -= size
        filled = mean
        if num_draws is not None:
            law, _ = self.likelihood.observe(latents, x, mask)
            filled = law.sample()
        # Where no latent explains what was observed, nothing can be said of the rest.
        filled = filled.masked_fill((log_sum == -math.inf).reshape(-1, *event), math.nan)
        return torch.where(mask, x, filled), tail


def _warn_of_tails(tail: Tensor, num_samples: int, precision: float) -> None:
    """Say of how many data the largest log-weights (N, 5 M) show that a few latents carry the answer."""
    from .evidence import FEWEST_SAMPLES, khat_limit, pareto_khat

    if num_samples < FEWEST_SAMPLES:
        return
    limit = khat_limit(num_samples)
    bad = np.flatnonzero(pareto_khat(tail.cpu().numpy(), num_samples, precision=precision) >= limit)
    if len(bad):
        warnings.warn(
            f"The weights of {len(bad)} of {len(tail)} data (first datum {bad[0]}) have a Pareto k of {limit:.2f} or more with "
            f"{num_samples:,} samples, so a few latents carry what is filled in there: draw more samples.",
            UserWarning,
            stacklevel=3,
        )


def make_vae(
    data_shape: Shape,
    *,
    latent_dim: int,
    prior: Any = "standard_normal",
    likelihood: Any = "bernoulli",
    encoder: Any = "diagonal_normal",
    body: str = "mlp",
    hidden: Sequence[int] | None = None,
    activation: Activation | None = None,
    name: str | None = None,
) -> VAE:
    """A :class:`VAE` from names.

    Args:
        data_shape: the shape of one datum, ``(1, 28, 28)`` or ``784``.
        latent_dim: L.
        prior: a name, a table ``{"kind": name, ...}``, or a ready object; so too ``likelihood`` and ``encoder``.
        likelihood: p(x|z).
        encoder: the family of q(z|x).
        body: ``"mlp"``, ``"gated_mlp"``, ``"conv"`` or ``"resnet"``; the last two stand for a pair, such as ``"conv_encoder"``
            and ``"conv_decoder"``.
        hidden: widths of the encoder's hidden layers, mirrored in the decoder; channels for such a pair. By default
            ``[200, 200]``, or the pair's own channels.
        activation: a name such as ``"tanh"``; by default the body's own.
        name: see :class:`VAE`.

    Raises:
        ValueError: an unknown name (the message has the nearest), or parts that do not fit.

    Example:
        >>> import pyrovae as pv
        >>> vae = pv.make_vae((1, 28, 28), latent_dim=50, likelihood={"kind": "normal", "scale": "shared"})
        >>> vae.data_shape, vae.latent_dim
        ((1, 28, 28), 50)
    """
    shape, latent_dim = as_shape(data_shape), positive_integer(latent_dim, "latent_dim")
    inward, outward, networks, mirrored = body_pair(body, hidden, activation)
    likelihood = build_likelihood(
        likelihood, shape, lambda out: build("body", outward, in_shape=latent_dim, out_shape=out, **mirrored)
    )
    encoder_body = build("body", inward, in_shape=shape, **networks)
    return VAE(
        prior=build("prior", prior, latent_dim=latent_dim, data_shape=shape),
        likelihood=likelihood,
        encoder=build("encoder", encoder, body=encoder_body, latent_dim=latent_dim, in_scale=likelihood.in_scale),
        name=name,
    )


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
                f"The {kind.lower()} must be a {family.__module__}.{kind}, not a {type(part).__name__}: build one, or "
                f"subclass it."
            )


def check_sizes(where: str, **said: Any) -> None:
    """Refuse parts that say different sizes; ``None`` says nothing.

    Raises:
        ValueError: they disagree.
    """
    found = {part: size for part, size in said.items() if size is not None}
    if len(set(found.values())) > 1:
        listed = ", ".join(f"{part} {size}" for part, size in found.items())
        raise ValueError(f"The parts disagree {where} ({listed}): build them with the same one.")


def in_shape_of(body: nn.Module) -> tuple[int, ...] | None:
    """The event shape that a network takes, if it says it."""
    said: Any = getattr(body, "in_shape", None)
    return None if said is None else as_shape(said)


def in_size_of(body: nn.Module) -> int | None:
    """How many numbers a network takes, if it says it."""
    shape = in_shape_of(body)
    return None if shape is None else math.prod(shape)


def _check_supports(prior: Prior, encoder: Encoder) -> None:
    wanted, given = str(prior.support), str(encoder.support)
    if prior.support is None or wanted == given:
        return
    known: dict[str, type[Encoder]] = {name: find("encoder", name) for name in names("encoder")}
    fitting = [name for name, family in known.items() if str(family.support) == wanted]
    choose = f"choose the encoder {' or '.join(map(repr, fitting))}" if fitting else "write an encoder for that set"
    raise ValueError(
        f"The prior {type(prior).__name__} is a law on {_SETS.get(wanted, wanted)} and the encoder {type(encoder).__name__} "
        f"one on {_SETS.get(given, given)}, so their densities do not compare: {choose}, or another prior."
    )


_SETS = {
    str(constraints.real_vector): "all real vectors",
    str(constraints.sphere): "the unit sphere",
    str(constraints.simplex): "the simplex",
    str(constraints.one_hot): "one-hot vectors",
}


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
    known = names("body")
    pairs = [name.removesuffix("_encoder") for name in known if name.endswith("_encoder")]
    chosen = {} if activation is None else {"activation": activation}
    if body in pairs:
        options: dict[str, Any] = chosen if hidden is None else {"hidden": as_widths(hidden)} | chosen
        return f"{body}_encoder", f"{body}_decoder", options, options
    single = [name for name in known if not name.endswith(("_encoder", "_decoder"))]
    if body not in single:
        raise ValueError(unknown("body", body, single + pairs))
    widths = [200, 200] if hidden is None else as_widths(hidden)
    return body, body, {"hidden": widths} | chosen, {"hidden": widths[::-1]} | chosen


class _Seen(Messenger):
    """Remembers z and p(x|z)."""

    law: Any
    z: Tensor

    def _pyro_post_sample(self, msg: Any) -> None:
        if msg["name"] == "z":
            self.z = msg["value"]
        elif msg["name"] == "x":
            self.law = msg["fn"]
