"""pyrovae: variational autoencoders as honest probabilistic programs."""

from ._lazy import attach

__version__ = "0.1.0"

# `__init__.pyi` is the only index of public names: type checkers read it, and so does this.
__getattr__, __dir__, __all__ = attach(__name__, __file__)
