"""Components with one mistake each, which the contract tests must see: a plugin for ``tests/test_broken_components.py``."""

from __future__ import annotations

from typing import Any

import pyro.distributions as dist
import torch
from torch import Tensor

from pyrovae.encoders import DiagonalNormal
from pyrovae.estimators import Estimator
from pyrovae.likelihoods import Likelihood
from pyrovae.priors import StandardNormal
from pyrovae.programs.weights import LogWeights
from pyrovae.registry import register


class _Unnormalised(dist.Normal):
    def log_prob(self, value: Tensor) -> Tensor:
        return super().log_prob(value) + 0.01

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Unnormalised:
        return super().expand(batch_shape, self._get_checked_instance(_Unnormalised, _instance))


class _Wide(dist.Normal):
    def rsample(self, sample_shape: Any = ()) -> Tensor:
        return self.loc + 1.1 * (super().rsample(sample_shape) - self.loc)

    def sample(self, sample_shape: Any = ()) -> Tensor:
        return self.rsample(sample_shape).detach()

    def expand(self, batch_shape: Any, _instance: Any = None) -> _Wide:
        return super().expand(batch_shape, self._get_checked_instance(_Wide, _instance))


@register("prior")
class BrokenDensity(StandardNormal):
    """Its density integrates to 1.01 in each dimension."""

    def forward(self) -> Any:
        return _Unnormalised(self.loc, self.scale).to_event(1)


@register("prior")
class BrokenSampler(StandardNormal):
    """Its samples are wider than its density."""

    def forward(self) -> Any:
        return _Wide(self.loc, self.scale).to_event(1)


@register("prior")
class BrokenSupport(StandardNormal):
    """It is positive, and declares all real vectors."""

    def forward(self) -> Any:
        return dist.LogNormal(self.loc, self.scale).to_event(1)


@register("encoder")
class BrokenBatch(DiagonalNormal):
    """It reads all data of a batch for each."""

    def forward(self, x: Tensor) -> Any:
        features = self.features(x)
        features = features - features.mean(0, keepdim=True)
        return dist.Normal(self.loc(features), self.log_scale(features).exp()).to_event(1)


@register("likelihood")
class BrokenConstant(Likelihood):
    """It leaves a constant out."""

    def forward(self, z: Tensor) -> Any:
        (loc,) = self.parameters_of(z)
        return _Unnormalised(loc, torch.ones_like(loc)).to_event(self.event_dim)


@register("likelihood")
class BrokenEvent(Likelihood):
    """Its event lacks a dimension."""

    def forward(self, z: Tensor) -> Any:
        (loc,) = self.parameters_of(z)
        return dist.Normal(loc, 1.0).to_event(self.event_dim - 1)


@register("estimator")
class BrokenZero(Estimator):
    """It is NaN where all weights of a datum are zero."""

    def reduce(self, weights: LogWeights) -> Tensor:
        largest = weights.log_weights.max(0).values
        return (weights.log_weights - largest).exp().mean(0).log() + largest


@register("estimator")
class BrokenBranch(Estimator):
    """It branches on values, which a graph cannot."""

    def reduce(self, weights: LogWeights) -> Tensor:
        mean = weights.log_weights.mean(0)
        return mean if mean.mean() > 0 else 2 * mean


@register("estimator")
class BrokenSign(Estimator):
    """It trains in the wrong direction."""

    def reduce(self, weights: LogWeights) -> Tensor:
        return -weights.log_weights.mean(0)
