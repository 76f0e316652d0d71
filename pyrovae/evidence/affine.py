"""Whether a program is affine in its latents, read off every tensor operation that it makes."""

from __future__ import annotations

from typing import Any

from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

__all__ = ["AffineOnly", "NotAffineError"]


class NotAffineError(Exception):
    """The operation that is not affine."""


class AffineOnly(TorchDispatchMode):
    """Follow latents through all tensor operations, and raise at the first that is not affine in them.

    Values at some points would not reveal a ReLU that is not crossed between them, and autograd's graph lacks a mask that is
    made from a latent. Below autograd every operation is visible.
    """

    def __init__(self) -> None:
        super().__init__()
        # By storage, which all views of a tensor share; kept alive, so that no other takes its place.
        self._dependent: dict[int, Any] = {}

    def hold(self, tensor: Tensor) -> None:
        """Record that a tensor depends on a latent."""
        storage = tensor.untyped_storage()
        self._dependent[storage._cdata] = storage

    def __contains__(self, value: Any) -> bool:
        """Whether a value depends on a latent."""
        return isinstance(value, Tensor) and value.untyped_storage()._cdata in self._dependent

    def __torch_dispatch__(self, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None) -> Any:
        kwargs = kwargs or {}
        inputs = [*args, *kwargs.values()]
        touched = [
            place
            for place, arg in enumerate(inputs)
            if arg in self or (isinstance(arg, list | tuple) and any(item in self for item in arg))
        ]
        out = func(*args, **kwargs)
        if not touched:
            return out
        name = func.overloadpacket.__name__
        one_of = _BILINEAR.get(name)
        if one_of is None and name not in _LINEAR:
            raise NotAffineError(name.strip("_"))
        if one_of is not None and len(set(touched) & set(one_of)) > 1:
            raise NotAffineError(f"a product ({name})")
        if name == "div" and (touched != [0] or kwargs.get("rounding_mode")):
            raise NotAffineError("a quotient")
        if name == "index" and touched != [0]:
            raise NotAffineError("an index")
        for tensor in out if isinstance(out, list | tuple) else [out]:
            if not tensor.is_floating_point():
                raise NotAffineError(f"an integer ({name})")
            self.hold(tensor)
        return out


_LINEAR = set(
    "view _unsafe_view reshape expand t transpose permute unsqueeze squeeze select slice split split_with_sizes unbind cat "
    "stack clone neg sum mean _to_copy alias add sub rsub div index index_select constant_pad_nd flip roll repeat cumsum "
    "diagonal diag_embed lift_fresh".split()
)
# Affine in either of two factors, but not in both at once; by the place of the factors among the arguments.
_BILINEAR = {
    "mul": (0, 1),
    "mm": (0, 1),
    "bmm": (0, 1),
    "mv": (0, 1),
    "dot": (0, 1),
    "addmm": (1, 2),
    "baddbmm": (1, 2),
    "addmv": (1, 2),
    "convolution": (0, 1),
}
