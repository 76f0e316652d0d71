"""Our own pairs of programs: one stochastic layer, several, and models of data with labels."""

from .conditional import ConditionalVAE, SemiSupervisedVAE, make_conditional_vae, make_semi_supervised_vae
from .hierarchical import HierarchicalVAE, make_hierarchical_vae
from .vae import VAE, make_vae

__all__ = [
    "VAE",
    "ConditionalVAE",
    "HierarchicalVAE",
    "SemiSupervisedVAE",
    "make_conditional_vae",
    "make_hierarchical_vae",
    "make_semi_supervised_vae",
    "make_vae",
]
