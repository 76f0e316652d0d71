"""The one registry: every component, estimator and kind of model has a name, and a name has one class.

A component keeps each argument of its ``__init__`` in an attribute of the same name, as scikit-learn's
estimators do. That is all it takes to describe it as plain data (:func:`describe`), to build it from a name
(:func:`build`), and so to save and load it without pickle. If the attribute differs from the argument, as a shape that was
computed from ``None``, the argument is kept in a dictionary ``init_arguments``.

Other packages add classes by entry points, without being imported first. The group is ``pyrovae.`` followed by the kind, and
the entry's name is that of the component: ``[project.entry-points."pyrovae.prior"]`` with ``gumbel = "acme:Gumbel"``.
"""

from __future__ import annotations

import inspect
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, TypeVar

from ._validation import unknown

if TYPE_CHECKING:
    from importlib.metadata import EntryPoint

__all__ = ["KINDS", "build", "canonical", "describe", "find", "names", "register", "snake_case"]

T = TypeVar("T", bound=type)
# Each kind with the module whose import registers its classes. Models are last, since their modules import all others.
_MODULES = {
    "prior": "priors",
    "likelihood": "likelihoods",
    "encoder": "encoders",
    "body": "nn",
    "guide": "models.guides",
    "estimator": "estimators",
    "model": "models",
}
KINDS = tuple(_MODULES)
# A module that is loaded again keeps what is registered: the modules of the classes are not loaded again with it.
_classes: dict[str, dict[str, type]] = globals().get("_classes") or {kind: {} for kind in KINDS}
# Abbreviations in lower case, each with the registered name.
_aliases: dict[str, dict[str, str]] = globals().get("_aliases") or {kind: {} for kind in KINDS}
# Kinds whose entry points have been read, and the entry points that did not load.
_read: set[str] = set()
_refused: dict[str, dict[str, EntryPoint]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str | None = None, *, aliases: Sequence[str] = ()) -> Callable[[T], T]:
    """Give a class a name that Python, TOML and the command line share.

    The class is also found by its class name and by its aliases, and all of them in any case: ``"dreg"``, ``"DReG"``.

    Args:
        kind: one of ``KINDS``, such as ``"prior"`` or ``"estimator"``.
        name: the name; by default the class name in snake case.
        aliases: abbreviations, in lower case.

    Raises:
        ValueError: the kind is unknown, or another class has one of the names.

    Example:
        >>> from pyrovae.registry import names, register
        >>> from pyrovae.priors import StandardNormal
        >>> @register("prior", "unit_gaussian")
        ... class UnitGaussian(StandardNormal):
        ...     "N(0, I) under another name."
        >>> "unit_gaussian" in names("prior")
        True
    """
    classes = _of_kind(kind)

    def decorate(cls: T) -> T:
        key = name or snake_case(cls.__name__)
        for each in (key, *aliases):
            _refuse_taken(kind, each, cls)
        classes[key] = cls
        _aliases[kind] |= dict.fromkeys(aliases, key)
        return cls

    return decorate


def names(kind: str) -> list[str]:
    """Names registered for a kind, sorted; without the aliases."""
    return sorted(_loaded(kind))


def canonical(kind: str, name: Any) -> Any:
    """The registered name for a class name or an alias, in any case; anything else is returned unchanged.

    Example:
        >>> from pyrovae.registry import canonical
        >>> canonical("estimator", "DReG"), canonical("likelihood", "NB")
        ('dreg', 'negative_binomial')
    """
    classes = _loaded(kind)
    if not isinstance(name, str) or name in classes:
        return name
    folded = name.casefold()
    if folded in classes:
        return folded
    of_class = (key for key, cls in classes.items() if folded in (cls.__name__.casefold(), snake_case(cls.__name__)))
    return _aliases[kind].get(folded) or next(of_class, name)


def find(kind: str, name: str) -> type:
    """The class with a registered name, a class name or an alias, in any case.

    Raises:
        ValueError: the name is unknown (the message has the nearest real one), or its entry point does not load.
    """
    key = canonical(kind, name)
    classes = _classes[kind]
    if isinstance(key, str) and key not in classes and key in _refused[kind]:
        # Try again, since the first attempt may have failed because a module was half imported.
        _load_entry(kind, _refused[kind][key])
    if isinstance(key, str) and key in classes:
        return classes[key]
    raise ValueError(unknown(kind, name, classes))


def build(kind: str, spec: Any, **defaults: Any) -> Any:
    """Build a component from a name or a table with ``kind``; an instance is returned as it is.

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
        example = f'add kind = "{names(kind)[0]}", for example.'  # names refuses what is no kind
        article = "An" if kind[0] in "aeiou" else "A"
        raise ValueError(f"{article} {kind} table must have the key kind, got {options!r}: {example}")
    name = options.pop("kind")
    cls = find(kind, name)
    takes = inspect.signature(cls).parameters
    for key in options:
        if key not in takes:
            raise ValueError(unknown(f"{name} option", key, [p for p in takes if p not in defaults]))
    arguments = {key: value for key, value in defaults.items() if key in takes} | options
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    missing = [p.name for p in takes.values() if p.default is p.empty and p.kind not in variadic and p.name not in arguments]
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
    name = next((name for name, registered in _loaded(kind).items() if registered is cls), None)
    if name is None:
        raise ValueError(
            f"{cls.__qualname__} is not a registered {kind}, so it cannot be described for saving: decorate its class with "
            f'@pyrovae.registry.register("{kind}"), or save its state_dict() yourself.'
        )
    description: dict[str, Any] = {"component": kind, "kind": name}
    arguments = getattr(component, "init_arguments", {})
    for argument in inspect.signature(cls).parameters:
        if argument not in arguments and not hasattr(component, argument):
            raise ValueError(
                f"{cls.__qualname__} does not keep its argument {argument!r}, so it cannot be described for saving: write "
                f"self.{argument} = {argument} in its __init__."
            )
        value = arguments[argument] if argument in arguments else getattr(component, argument)
        description[argument] = _plain(value, f"{name}.{argument}")
    return description


def snake_case(name: str) -> str:
    """``DiagonalNormal`` -> ``diagonal_normal``; runs of capitals stay one word: ``IWAE`` -> ``iwae``."""
    return re.sub(r"(?<=[a-z0-9])(?=[A-Z])", "_", name).lower()


def _refuse_taken(kind: str, name: str, cls: type) -> None:
    """Raise an error if another class has the name; a class that is defined again, as in a notebook, may keep it."""
    owner = _classes[kind].get(_aliases[kind].get(name, name))
    if owner is not None and (owner.__module__, owner.__qualname__) != (cls.__module__, cls.__qualname__):
        raise ValueError(
            f"The {kind} name {name!r} belongs to {owner.__module__}.{owner.__qualname__}: register under another name."
        )


def _of_kind(kind: str) -> dict[str, type]:
    if kind not in _classes:
        raise ValueError(unknown("registry kind", kind, KINDS))
    return _classes[kind]


def _loaded(kind: str) -> dict[str, type]:
    known = _of_kind(kind)
    # On demand, since the modules of components import this one, and a caller may not have imported them.
    import_module(f".{_MODULES[kind]}", __package__)
    if kind not in _read:
        _read.add(kind)  # before loading, since the import of an entry point may ask for names itself
        _load_entries(kind)
    return known


def _load_entries(kind: str) -> None:
    """Register the classes of other packages' entry points; warn of those that fail."""
    from importlib.metadata import entry_points

    reasons = []
    for entry in entry_points(group=f"pyrovae.{kind}"):
        try:
            _load_entry(kind, entry)
        except ValueError as error:
            _refused[kind][entry.name] = entry
            reasons.append(str(error))
    for reason in reasons:
        warnings.warn(reason, RuntimeWarning, stacklevel=4)


def _load_entry(kind: str, entry: EntryPoint) -> None:
    source = "an unknown distribution" if entry.dist is None else f"{entry.dist.name} {entry.dist.version}"
    cannot = f"The {kind} {entry.name!r} of {source} cannot be used, because"
    try:
        cls = entry.load()
    except Exception as error:  # whatever the other distribution's import raises
        reason = next(iter(str(error).splitlines()), "")
        raise ValueError(
            f"{cannot} its entry point {entry.value} does not load ({type(error).__name__}: {reason}): repair or uninstall it."
        ) from error
    if not isinstance(cls, type):
        raise ValueError(f"{cannot} its entry point {entry.value} is a {type(cls).__name__}: point it to a class.")
    try:
        register(kind, entry.name)(cls)
    except ValueError as error:
        owner = _classes[kind][_aliases[kind].get(entry.name, entry.name)]
        raise ValueError(
            f"{cannot} that name belongs to {owner.__module__}.{owner.__qualname__}: rename the entry point, or uninstall it."
        ) from error


def _rebuilt(value: Any) -> Any:
    if isinstance(value, list | tuple):
        return [_rebuilt(item) for item in value]
    nested = isinstance(value, Mapping) and "component" in value
    return build(value["component"], value) if nested else value


def _plain(value: Any, where: str) -> Any:
    if value is None or isinstance(value, bool | int | float | str):
        return value
    if isinstance(value, list | tuple):
        return [_plain(item, where) for item in value]
    if isinstance(value, Mapping):
        return {str(key): _plain(item, where) for key, item in value.items()}
    for kind in KINDS:
        if type(value) in _loaded(kind).values():
            return describe(value, kind)
    raise ValueError(
        f"{where} is a {type(value).__qualname__}, so the model cannot be described for saving: give a name or plain data "
        f'there, register a network\'s class with @pyrovae.registry.register("body"), or save the state_dict() yourself.'
    )
