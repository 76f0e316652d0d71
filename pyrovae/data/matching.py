"""Matching of the arrays of the data to the parameters of a program."""

from __future__ import annotations

import inspect
import re
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

__all__ = ["MASK", "Batch", "match"]

Batch = tuple[Tensor, ...]
Parameters = list[inspect.Parameter]
MASK = "mask"  # the name of an array that is true for observed values
_SETTING = re.compile(r"\b(float|int|bool|str)\b")


def match(program: Callable[..., Any], batch: Batch, names: Sequence[str | None] = (), *, strict: bool = False) -> Batch:
    """The arrays of a batch that a program takes, in the order of its parameters.

    Required parameters are filled in order. A parameter whose default is ``None`` takes one of the remaining arrays; if its
    name contains "mask", only a mask. A parameter with another default, such as ``temperature=1.0``, is a setting and takes
    none.

    Args:
        program: the model.
        batch: the arrays, each with one entry per datum.
        names: :data:`MASK` for an array that is a mask, a parameter's name for one that goes there, ``None`` for one that is
            matched by its position, the default.
        strict: refuse arrays other than labels that no parameter takes.

    Raises:
        ValueError: a required parameter gets no array; or no parameter takes a mask, or an array in ``strict`` mode.
    """
    # The signature of a module is that of __call__, which takes any arguments.
    called = program.forward if isinstance(program, torch.nn.Module) else program
    parameters = list(inspect.signature(called).parameters.values())
    names = [*names, *[None] * (len(batch) - len(names))]
    if any(p.kind is p.VAR_POSITIONAL for p in parameters):
        return _without_names(batch, names)
    positional = [p for p in parameters if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    _check_names(positional, parameters, names)
    places = _places(positional, batch, names)
    needed = [p.name for p in positional if p.default is p.empty]
    if not set(needed) <= set(places):
        and_mask = " and a mask, which only a parameter named 'mask' takes" if MASK in names else ""
        raise ValueError(
            f"The model takes {', '.join(needed)}, but the data give {len(batch) - names.count(MASK)} array(s){and_mask}: "
            f"pass a tuple with one for each."
        )
    filled = [p.name for p in positional if p.name in places]
    skipped = next((p.name for p, name in zip(positional, filled, strict=False) if p.name != name), None)
    if skipped is not None:
        raise ValueError(
            f"The model takes {_signature(positional)}, and {_assignments(batch, places)}, but nothing goes to {skipped!r}, "
            f"which stands before it: put the parameters that the data fill first."
        )
    for index in sorted(set(range(len(batch))) - set(places.values())):
        _leave_out(index, positional, batch, names, places, strict)
    return tuple(batch[places[name]] for name in filled)


def _places(positional: Parameters, batch: Batch, names: Sequence[str | None]) -> dict[str, int]:
    """The index of the array that each parameter takes, by the parameter's name."""
    places: dict[str, int] = {}
    left = list(range(len(batch)))

    def place(parameter: inspect.Parameter, fits: Callable[[int], bool]) -> None:
        index = next((i for i in left if fits(i)), None)
        if parameter.name not in places and index is not None:
            places[parameter.name] = index
            left.remove(index)

    def by_place(index: int) -> bool:
        return names[index] is None

    required = [p for p in positional if p.default is p.empty]
    optional = [p for p in positional if p.default is None and not _is_setting(p)]
    for index, name in enumerate(names):
        if name is not None and name in [p.name for p in positional] and name not in places:
            places[name] = index
            left.remove(index)
    for parameter in (p for p in [*required, *optional] if MASK in p.name):
        place(parameter, lambda index: names[index] == MASK)
    for parameter in required:
        place(parameter, by_place)
    for parameter in (p for p in optional if MASK in p.name):
        place(parameter, lambda index: by_place(index) and index > 0 and _has_the_form_of_a_mask(batch[index], batch[0]))
    for parameter in (p for p in optional if MASK not in p.name):
        place(parameter, by_place)
    return places


def _check_names(positional: Parameters, parameters: Parameters, names: Sequence[str | None]) -> None:
    """Refuse names that no parameter has, and those of parameters that are not given by position."""
    known = [p.name for p in positional]
    for name in (name for name in names if name not in (None, MASK, *known)):
        if any(p.name == name and p.kind is p.KEYWORD_ONLY for p in parameters):
            raise ValueError(f"The model takes {name!r} by keyword only: let it be given by position too, without the '*'.")
        raise ValueError(
            f"The model takes {_signature(positional)}, but no parameter {name!r}, which the data name: rename the array, "
            f"leave it out, or give the model and the guide a parameter for it."
        )


def _without_names(batch: Batch, names: Sequence[str | None]) -> Batch:
    """The arrays for a program with ``*args``, whose parameters have no names."""
    named = next((name for name in names if name not in (None, MASK)), None)
    if named is not None:
        raise ValueError(
            f"The model takes any number of arrays (*args), so the array {named!r} of the data has no place there: pass a "
            f"tuple, or name the model's parameters."
        )
    for array, name in zip(batch, names, strict=True):
        if name == MASK and not bool(array.all()):
            raise ValueError(
                "The model takes any number of arrays (*args), so a masked array cannot tell which is its mask: pass the tuple "
                "(filled, ~mask), or name the model's parameters."
            )
    return tuple(array for array, name in zip(batch, names, strict=True) if name != MASK)


def _leave_out(
    index: int, positional: Parameters, batch: Batch, names: Sequence[str | None], places: dict[str, int], strict: bool
) -> None:
    """Refuse an array that no parameter takes, unless nothing is lost without it."""
    array, x = batch[index], batch[0]
    settings = [p.name for p in positional if p.name not in places and not (p.default is None and MASK in p.name)]
    message = f"The model takes {_signature(positional)}, and {_assignments(batch, places)}"
    if names[index] == MASK or (_has_the_form_of_a_mask(array, x) and bool(((array == 0) | (array == 1)).all())):
        if bool((array != 0).all()):
            return  # the mask hides nothing
        raise ValueError(
            f"{message}, but nothing takes the mask that hides values: give the model and the guide a positional parameter "
            f"mask=None, and score with .mask(mask), or pass data without missing values."
        )
    whole = not array.is_floating_point() and array.dim() == 1
    indicators = array.dim() == 2 and array.shape != x.shape and bool(((array == 0) | (array == 1)).all())
    if strict and (settings or not (whole or indicators)):
        kept = f" ({', '.join(settings)}: a setting that no array replaces)" if settings else ""
        raise ValueError(
            f"{message}, but nothing takes array {index + 1} of shape {tuple(array.shape)}{kept}: leave it out, or give the "
            f"model and the guide a parameter for it."
        )


def _has_the_form_of_a_mask(array: Tensor, x: Tensor) -> bool:
    # A vector of numbers beside vectors may be a label.
    return array.shape == x.shape and (array.dtype == torch.bool or x.dim() > 1)


def _is_setting(parameter: inspect.Parameter) -> bool:
    """Whether a parameter that may be ``None`` is annotated as a number or a string."""
    annotation = parameter.annotation
    name = annotation.__name__ if isinstance(annotation, type) else str(annotation)
    return "Tensor" not in name and _SETTING.search(name) is not None


def _signature(positional: Parameters) -> str:
    return ", ".join(str(p.replace(annotation=p.empty)) for p in positional)


def _assignments(batch: Batch, places: dict[str, int]) -> str:
    """The array that each parameter takes, in words."""
    return ", ".join(
        f"array {index + 1} of shape {tuple(batch[index].shape)} goes to {name!r}" for name, index in places.items()
    )
