"""The one registry: every component and estimator has a name, and a name has one class.

A component keeps each argument of its ``__init__`` in an attribute of the same name, as scikit-learn's
estimators do. That is all it takes to describe it as plain data (:func:`describe`), to build it from a name
(:func:`build`), and so to save and load it without pickle.
"""

from __future__ import annotations

import difflib
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

T = TypeVar("T", bound=type)

KINDS = ("prior", "likelihood", "encoder", "body", "estimator")

_classes: dict[str, dict[str, type]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str | None = None) -> Callable[[T], T]:
    """Give a class a name that Python, TOML and the command line share.

    Args:
        kind: one of ``"prior"``, ``"likelihood"``, ``"encoder"``, ``"body"``, ``"estimator"``.
        name: the name; by default the class name in snake case.

    Raises:
        ValueError: the kind is unknown, or the name belongs to another class already.

    Example:
        >>> from pyrovae.registry import names, register
        >>> from pyrovae.priors import StandardNormal
        >>> @register("prior", "unit_gaussian")
        ... class UnitGaussian(StandardNormal):
        ...     "N(0, I) under another name."
        >>> "unit_gaussian" in names("prior")
        True
    """
    known = _of_kind(kind)

    def decorate(cls: T) -> T:
        key = name or snake_case(cls.__name__)
        held = known.get(key)
        if held is not None and held.__qualname__ != cls.__qualname__:
            raise ValueError(f"The {kind} name {key!r} belongs to {held.__qualname__}; register under another name.")
        known[key] = cls
        return cls

    return decorate


def names(kind: str) -> list[str]:
    """Names registered for a kind, sorted."""
    return sorted(_of_kind(kind))


def find(kind: str, name: str) -> type:
    """The class behind a name.

    Raises:
        ValueError: the name is unknown; the message has the nearest real one.
    """
    known = _of_kind(kind)
    if name in known:
        return known[name]
    raise ValueError(unknown(kind, name, known))


def build(kind: str, spec: Any, **defaults: Any) -> Any:
    """Build a component from a name, a table with ``kind``, or pass an instance through.

    Args:
        kind: the registry kind.
        spec: ``"vamp"``, ``{"kind": "vamp", "components": 500}``, or a ready object.
        **defaults: arguments used when the class takes them and the table does not set them.

    Raises:
        ValueError: an unknown name, or an argument that the class does not take.
    """
    if isinstance(spec, str):
        spec = {"kind": spec}
    if not isinstance(spec, Mapping):
        return spec
    options = {key: _rebuilt(value) for key, value in spec.items() if key != "component"}
    if "kind" not in options:
        raise ValueError(f'A {kind} table needs its name: kind = "{names(kind)[0]}", for example.')
    name = options.pop("kind")
    cls = find(kind, name)
    takes = inspect.signature(cls).parameters
    for key in options:
        if key not in takes:
            raise ValueError(unknown(f"{name} option", key, [p for p in takes if p not in defaults]))
    arguments = {key: value for key, value in defaults.items() if key in takes} | options
    missing = [p.name for p in takes.values() if p.default is p.empty and p.kind not in (2, 4) and p.name not in arguments]
    if missing:
        raise ValueError(f"The {kind} {name!r} needs {missing[0]}: write {{ kind = {name!r}, {missing[0]} = ... }}.")
    try:
        return cls(**arguments)
    except TypeError as error:
        raise ValueError(f"The {kind} {name!r} could not be built from {options}: {error}.") from error


def describe(component: Any, kind: str) -> dict[str, Any]:
    """The plain-data description from which :func:`build` makes the component again.

    Raises:
        ValueError: the component, or something it holds, is not registered or not plain data.
    """
    cls = type(component)
    for name, held in _of_kind(kind).items():
        if held is cls:
            break
    else:
        raise ValueError(
            f"{cls.__qualname__} is not a registered {kind}, so it cannot be described for saving: decorate its class with "
            f'@pyrovae.registry.register("{kind}"), or save its state_dict() yourself.'
        )
    return {"component": kind, "kind": name} | {
        argument: _plain(getattr(component, argument), f"{name}.{argument}") for argument in inspect.signature(cls).parameters
    }


def unknown(what: str, name: str, known: Any) -> str:
    """One sentence for a name that does not exist, with the nearest that does."""
    known = sorted(known)
    near = difflib.get_close_matches(str(name), known, n=1, cutoff=0.5)
    cure = f"did you mean {near[0]!r}?" if near else f"choose one of {', '.join(known)}."
    return f"There is no {what} {name!r}; {cure}"


def snake_case(name: str) -> str:
    """``DiagonalNormal`` -> ``diagonal_normal``; runs of capitals stay one word: ``IWAE`` -> ``iwae``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _of_kind(kind: str) -> dict[str, type]:
    if kind not in _classes:
        raise ValueError(unknown("registry kind", kind, KINDS))
    return _classes[kind]


def _rebuilt(value: Any) -> Any:
    nested = isinstance(value, Mapping) and "component" in value
    return build(value["component"], value) if nested else value


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    for kind in KINDS:
        if type(value) in _classes[kind].values():
            return describe(value, kind)
    raise ValueError(
        f"{where} is a {type(value).__qualname__}, which is not plain data, so the model cannot be described for saving: "
        f'register its class with @pyrovae.registry.register("body"), or save its state_dict() yourself.'
    )
