"""Densities of unconstrained latents, which stay right where a value rounds to an end of its support."""

from __future__ import annotations

import math
from typing import Any

import torch
from pyro.distributions import ExpandedDistribution
from pyro.distributions.util import scale_and_mask
from torch import Tensor
from torch.distributions import Dirichlet, Independent, TransformedDistribution, biject_to, constraints, transforms
from torch.nn.functional import logsigmoid, pad

from .sites import log_prob_of, sum_last
from .support import _Union, bare, bounds_of, is_mixture, support_of
from .wrappers import base_distribution, is_point, with_tensors

__all__ = ["densities_beyond", "from_value", "log_density", "takes_float64", "to_value"]

# Up to 1 - z = eps ** EXPONENT the rounding error of 1 - z is a small part of it. From there on a density is followed along a
# straight line in u, as that of any power of 1 - z is; STEP is the distance of the two points that give its slope.
EXPONENT, STEP = 0.64, 1.0
# exp(u) is used up to this power of the largest number, so that its square does not overflow.
SQUARES = 0.42
# Each number of a vector has a slope of its own, which takes another evaluation of the density.
MOST_SLOPES = 64
_SIMPLEX, _CORRELATION = type(constraints.simplex), type(constraints.corr_cholesky)
_INTERVALS = (constraints.interval, constraints.half_open_interval, _Union)
_HALF_LINES = (constraints.greater_than, constraints.greater_than_eq, constraints.less_than)


def log_density(site: dict, support: Any, flat: Tensor, wide: bool) -> Tensor:
    r"""A site's log-density over unconstrained numbers, in the shape of the site's batch, in nats.

    .. math:: \log p(u) = \log p(T(u)) + \log \left| \det \frac{\partial T}{\partial u} \right|

    In float32 a sigmoid rounds to 1 from u = 16 on, where a Beta(0.2, 0.2) has 2 % of its mass. So the density comes from the
    base of a transformed distribution whose last transform is T; from the logarithms of its parts for a Dirichlet; and
    otherwise from float64 and, where T is not precise, from a straight line in u.

    Args:
        site: a latent site, of the model or of the guide.
        support: the support that the model declares for it, to which T is the bijection.
        flat: u, in the shape of the site.
        wide: whether the distribution can be computed in float64.
    """
    distribution, transform = site["fn"], biject_to(support)
    base = _without_last(distribution, transform)
    if base is not None:
        return log_prob_of({**site, "fn": base, "value": flat})
    constraint, element = _ended(support), base_distribution(site)
    if constraint is None:
        value = transform(flat)
        jacobian = transform.log_abs_det_jacobian(flat, value)
        return log_prob_of({**site, "value": value}) + sum_last(jacobian, distribution.event_dim - transform.codomain.event_dim)
    if wide:
        flat, element = flat.double(), with_tensors(element, torch.Tensor.double, flat.dtype)
    if isinstance(element, Dirichlet) and isinstance(constraint, _SIMPLEX):
        sizes = element.concentration
        values = (sizes * _log_parts(flat)).sum(-1) + sizes.sum(-1).lgamma() - sizes.lgamma().sum(-1)
    else:
        values = _extended(element, transform, constraint, flat)
    return sum_last(values, distribution.event_dim - element.event_dim)


def takes_float64(site: dict, support: Any, flat: Tensor) -> bool:
    """Whether a site's log-density can be computed in float64, which networks inside a distribution do not allow."""
    try:
        log_density(site, support, flat, True)
    except (RuntimeError, TypeError, NotImplementedError, KeyError):  # the two last are of flows without an inverse
        return False
    return True


def to_value(support: Any, flat: Tensor) -> Tensor:
    """T(u), within what the floating type holds: exp(u) is neither zero nor infinite."""
    value = biject_to(support)(flat)
    if not isinstance(bare(support), _HALF_LINES):
        return value
    limits, low = torch.finfo(value.dtype), bounds_of(bare(support))[0]
    return value.clamp(limits.tiny if not isinstance(low, Tensor) and low == 0 else -limits.max, limits.max)


def from_value(site: dict, support: Any, value: Tensor) -> Tensor:
    """The unconstrained numbers of a value that was drawn from a site's distribution.

    Where rounding has left only the end of an interval of a draw, or zero, its number is drawn from the tail there.

    Args:
        site: the site that the value was drawn at, of the model or of the guide.
        support: the support that the model declares for it.
        value: the draw.
    """
    if isinstance(bare(support), _SIMPLEX):
        return _sticks(value)
    flat = biject_to(support).inv(value)
    if isinstance(bare(support), _CORRELATION):  # of a correlation that rounds to 1 the inverse is infinite
        edge = -0.5 * math.log(torch.finfo(flat.dtype).eps)
        return flat.clamp(-edge, edge)
    found = _lost(site, support, flat)
    return flat if found is None else torch.where(found[0], found[1], flat)


def densities_beyond(drawn: dict, model_site: dict, guide_site: dict) -> tuple[Tensor, Tensor] | None:
    r"""log p and log q of a latent, batch-shaped, which are right where rounding has left only the end of its support.

    A Beta(1, 0.05) has 43 % of its mass at numbers that are 1 in float32, where the ratio of its density to that of a
    Beta(1, 0.08) goes to infinity. There both densities are those of an unconstrained number from the tail of the distribution
    that was drawn from; the difference of their logarithms is the log-weight.

    Args:
        drawn: the site that the value was drawn at: one of the next two.
        model_site: the latent in the model.
        guide_site: the latent in the guide.

    Returns:
        ``None`` if the support has no such end.
    """
    sites, value = (model_site, guide_site), model_site["value"]
    try:
        support = support_of(model_site["fn"])
        if not isinstance(_ended(support), (*_INTERVALS, *_HALF_LINES)) or not value.is_floating_point():
            return None
        flat = biject_to(support).inv(value)
        found = _lost(drawn, support, flat)
        if found is None:
            return None
        flat = torch.where(found[0], found[1], flat)
        wide = all(takes_float64(site, support, flat) for site in sites)
        beyond = [scale_and_mask(log_density(site, support, flat, wide), 1.0, site["mask"]) for site in sites]
    except (NotImplementedError, KeyError):  # no support, no bijection to it, or a flow without an inverse
        return None
    lost = sum_last(found[0].double(), found[0].dim() - beyond[0].dim()) > 0
    log_prior, log_guide = (torch.where(lost, other, log_prob_of(site)) for other, site in zip(beyond, sites, strict=True))
    return log_prior, log_guide


def _lost(site: dict, support: Any, flat: Tensor) -> tuple[Tensor, Tensor] | None:
    """Which draws rounding has left at an end of their support, and numbers from the tails there; ``None`` without ends."""
    constraint, element, transform = _ended(support), base_distribution(site), biject_to(support)
    if (
        not isinstance(constraint, (*_INTERVALS, *_HALF_LINES))
        or element.event_dim
        or is_point(site)
        or _without_last(site["fn"], transform) is not None
    ):
        return None
    low, high = (cut.double() for cut in _reached(constraint, flat))
    wide = flat.double()
    inner = torch.minimum(torch.maximum(wide, low), high)
    towards = (wide - inner).sign()
    ends = (inner - towards * STEP, inner)
    try:
        rise = [_extended(with_tensors(element, torch.Tensor.double, flat.dtype), transform, constraint, at) for at in ends]
    except (RuntimeError, TypeError):  # a distribution with a network inside takes its own type alone
        rise = [_extended(element, transform, constraint, at.to(flat.dtype)).double() for at in ends]
    except (NotImplementedError, KeyError):  # a flow without an inverse
        return None
    rate = (rise[0] - rise[1]) / STEP
    lost = (towards != 0) & (rate > 0) & rate.isfinite()
    tail = -torch.log1p(-torch.rand_like(wide)) / torch.where(lost, rate, 1.0)
    return lost, (inner + towards * tail).to(flat.dtype)


def _density(element: Any, transform: Any) -> Any:
    def density(flat: Tensor) -> Tensor:
        value = transform(flat)
        jacobian = transform.log_abs_det_jacobian(flat, value)
        return element.log_prob(value) + sum_last(jacobian, element.event_dim - transform.codomain.event_dim)

    return density


def _extended(element: Any, transform: Any, constraint: Any, flat: Tensor) -> Tensor:
    """The log-density of an element of a site, continued along straight lines from where T is no longer precise."""
    transform = _bare_transform(transform)
    density, (low, high) = _density(element, transform), _precise(constraint, flat)
    inner = torch.minimum(torch.maximum(flat, low), high)
    beyond = flat - inner
    values, towards, distance = density(inner), beyond.sign(), beyond.abs()
    dims = element.event_dim - transform.codomain.event_dim + transform.domain.event_dim
    if dims == 0:
        rise = values - density(inner - towards * STEP)
        return values + torch.where(distance == 0, 0.0, rise / STEP * distance)
    shape = flat.shape[flat.dim() - dims :]
    if shape.numel() > MOST_SLOPES:
        return density(flat)
    whole = values
    for unit in torch.eye(shape.numel(), dtype=flat.dtype, device=flat.device).reshape(-1, *shape):
        rise, far = values - density(inner - unit * towards * STEP), sum_last(unit * distance, dims)
        whole = whole + torch.where(far == 0, 0.0, rise / STEP * far)
    return whole


def _ended(support: Any) -> Any:
    """The constraint by which a support has ends, or ``None``. A mixture has the bounds of its components."""
    constraint = bare(support)
    if any(isinstance(bound, Tensor) for bound in bounds_of(constraint)) and is_mixture(support):
        return _Union(constraint) if isinstance(constraint, _INTERVALS) else None
    return constraint if isinstance(constraint, (*_INTERVALS, *_HALF_LINES, _SIMPLEX, _CORRELATION)) else None


def _precise(constraint: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Between which unconstrained numbers T(u) is precise, and so is its distance from the ends of the support."""
    limits = torch.finfo(like.dtype)
    deep = SQUARES * math.log(limits.max)
    return _ends(constraint, like, -EXPONENT * math.log(limits.eps), deep, deep)


def _ends(constraint: Any, like: Tensor, edge: float, deep: float, far: float) -> tuple[Tensor, Tensor]:
    """Between which unconstrained numbers T(u) keeps its distance from the ends of the support.

    Args:
        constraint: the support.
        like: a tensor of the type of u.
        edge: how far from an end exp(-edge) is kept, as a part of the end.
        deep: how far exp(-deep) is kept from zero.
        far: the largest number for a support without an upper end.
    """
    low, high = (torch.as_tensor(bound).detach().to(like) for bound in bounds_of(constraint))
    symmetric = torch.as_tensor(edge).to(like)
    if isinstance(constraint, _CORRELATION):  # tanh(u) = 2 sigmoid(2u) - 1
        return -symmetric / 2, symmetric / 2
    if isinstance(constraint, _SIMPLEX):
        return torch.as_tensor(-deep).to(like), symmetric
    if isinstance(constraint, _Union):  # whose bounds are those of its components
        return -symmetric, symmetric
    if isinstance(constraint, _HALF_LINES):
        bound = high if isinstance(constraint, constraints.less_than) else low
        return (bound.abs().log() - edge).clamp(min=-deep, max=0.0), torch.full_like(bound, far)
    span = high - low
    return ((low.abs() / span).log() - edge).clamp(min=-deep, max=0.0), (edge - (high.abs() / span).log()).clamp(0.0, edge)


def _reached(constraint: Any, like: Tensor) -> tuple[Tensor, Tensor]:
    """Between which unconstrained numbers a value of this type says where it was drawn."""
    limits = torch.finfo(like.dtype)
    edge, deep = -math.log(16 * limits.eps), -math.log(limits.tiny) - 3
    return _ends(constraint, like, edge, deep, math.inf)


def _without_last(distribution: Any, transform: Any) -> Any:
    """The distribution of u if it is what the last transform of a distribution is applied to, or ``None``."""
    if isinstance(distribution, Independent):
        base = _without_last(distribution.base_dist, transform)
        return None if base is None else Independent(base, distribution.reinterpreted_batch_ndims, validate_args=False)
    if isinstance(distribution, ExpandedDistribution):
        base = _without_last(distribution.base_dist, transform)
        return None if base is None else base.expand(distribution.batch_shape)
    if type(distribution).log_prob is not TransformedDistribution.log_prob:
        return None
    *before, last = _flat_parts(distribution.transforms)
    if type(last) is not _core(transform):
        return None
    base = TransformedDistribution(distribution.base_dist, before, validate_args=False) if before else distribution.base_dist
    return base if len(base.event_shape) == len(distribution.event_shape) else None


def _flat_parts(parts: list[Any]) -> list[Any]:
    """Transforms without the compositions and independent dimensions around them, and without those that change nothing."""
    found = []
    for part in parts:
        if isinstance(part, transforms.ComposeTransform):
            found += _flat_parts(part.parts)
        elif isinstance(part, transforms.IndependentTransform):
            found += _flat_parts([part.base_transform])
        elif not (isinstance(part, transforms.AffineTransform) and _is_number(part.loc, 0) and _is_number(part.scale, 1)):
            found.append(part)
    return found


def _is_number(part: Any, number: float) -> bool:
    return not isinstance(part, Tensor) and part == number


def _core(transform: Any) -> Any:
    """The type of a bijection that is one of exp, sigmoid and stick-breaking alone, or ``None``."""
    parts = _flat_parts([transform])
    single = (transforms.ExpTransform, transforms.SigmoidTransform, transforms.StickBreakingTransform)
    return type(parts[0]) if len(parts) == 1 and isinstance(parts[0], single) else None


def _bare_transform(transform: Any) -> Any:
    while isinstance(transform, transforms.IndependentTransform):
        transform = transform.base_transform
    return transform


def _log_parts(flat: Tensor) -> Tensor:
    """The logarithms of the parts that stick-breaking makes of u, which sum to the log-determinant of its Jacobian."""
    offset = flat.shape[-1] - torch.arange(flat.shape[-1], dtype=flat.dtype, device=flat.device)
    odds = flat - offset.log()
    left = logsigmoid(-odds).cumsum(-1)
    return pad(logsigmoid(odds), [0, 1]) + pad(left, [1, 0])


def _sticks(value: Tensor) -> Tensor:
    """The inverse of stick-breaking. It adds up what is left of the stick from its end, where small parts have all digits."""
    tiny, rest = torch.finfo(value.dtype).tiny, value.shape[-1] - 1
    left = value.flip(-1).cumsum(-1).flip(-1)[..., 1:]
    offset = rest - torch.arange(rest, dtype=value.dtype, device=value.device)
    return value[..., :-1].clamp(min=tiny).log() - left.clamp(min=tiny).log() + offset.log()
