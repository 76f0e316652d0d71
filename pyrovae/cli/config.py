"""The TOML description of a run, checked, and what it stands for.

Importing this file imports neither torch nor Pyro, so that the command line can print its help at once.
"""

from __future__ import annotations

import inspect
import re
import tomllib
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from pydantic import TypeAdapter, ValidationError

from .._validation import unknown
from .sections import GIVEN_BY_DATA, NOT_OF_KINDS, DataSection, EvaluateSection, ModelSection, Run, TrainSection

if TYPE_CHECKING:
    import torch

    from ..data.datasets import Split
    from ..models.base import PairModule

__all__ = [
    "DataSection", "EvaluateSection", "ModelSection", "Run", "TrainSection", "build_model", "load_model", "load_split",
    "read_run", "run_device", "run_name", "run_of", "with_data", "write_run",
]  # fmt: skip

COMPONENTS = ("prior", "likelihood", "encoder", "layer", "estimator", "optimizer", "schedule")
SECTIONS = {"data": DataSection, "model": ModelSection, "train": TrainSection, "evaluate": EvaluateSection}


def read_run(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Run:
    """A run from a TOML file and overrides, checked.

    Args:
        path: a TOML file, or ``None`` for the defaults. A path with another ending is that of the data.
        overrides: nested tables that win over the file's.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: bad TOML, an unknown key (with the nearest real one), or a value of the wrong kind.

    Example:
        >>> from pyrovae.cli.config import read_run
        >>> read_run(overrides={"train": {"epochs": 3}}).train.epochs
        3
    """
    tables: dict[str, Any] = {}
    overrides = overrides or {}
    if path is not None and Path(path).suffix != ".toml":
        overrides = _with_data_path(Path(path), overrides)
        path = None
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no run file {path}: give a TOML file, or no argument for the default run.")
        try:
            tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid TOML: {error}.") from error
    return run_of(tables, overrides, str(path) if path is not None else "The run")


def run_of(tables: dict[str, Any], overrides: dict[str, Any], where: str = "The run") -> Run:
    """A run from the tables of its TOML file and overrides, checked; ``where`` begins the sentences of errors.

    Raises:
        ValueError: as :func:`read_run`.
    """
    _drop_idle_binarize(tables.get("data"))
    # Options without a name are meant for the component that would run without them.
    tables = {"estimator": Run().estimator} | tables
    try:
        TypeAdapter(Run).validate_python(_merged(tables, overrides))
        table = tables.get("model")
        tables["model"] = _with_defaults(table if isinstance(table, dict) else {}, overrides.get("model", {}))
        run = TypeAdapter(Run).validate_python(_merged(tables, overrides))
    except ValidationError as error:
        raise ValueError(_sentence(error, where)) from error
    if run.data.path is not None and run.data.name != DataSection.name:
        raise ValueError(
            f"{where}: data.name is {run.data.name!r} and data.path {run.data.path!r}, but a run has one data set: drop one."
        )
    _check_keys(run.model, where)
    return run


def write_run(run: Run) -> str:
    """The TOML text of a run, which :func:`read_run` reads back."""
    import tomli_w

    tables = TypeAdapter(Run).dump_python(run, exclude_none=True)
    if run.data.path is not None:
        del tables["data"]["name"]
    return tomli_w.dumps(tables)


def run_name(run: Run) -> str:
    """The run's own name, or one made of data set, estimator and latent dimensions."""
    if run.name is not None:
        return run.name
    estimator = run.estimator if isinstance(run.estimator, str) else str(run.estimator.get("kind"))
    data = run.data.name if run.data.path is None else Path(run.data.path).stem
    sizes = run.model.latent_dims or [size for size in [run.model.latent_dim] if size is not None]
    return "-".join(map(str, [data, estimator, *sizes]))


def with_data(run: Run, split: Split) -> Run:
    """The run with what the data set says of the model written out, unless it is set: its likelihood, its number of classes."""
    from_data = dict(zip(GIVEN_BY_DATA, (split.likelihood, split.num_classes), strict=True))
    takes = _arguments_of(run.model.kind)
    changes: dict[str, Any] = {
        key: value for key, value in from_data.items() if key in takes and getattr(run.model, key) is None
    }
    return replace(run, model=replace(run.model, **changes)) if changes else run


def load_split(run: Run) -> Split:
    """The data set that a run names."""
    from ..data.datasets import load

    data = run.data
    split = load(
        data.name,
        path=data.path,
        root=data.root,
        binarize=data.binarize,
        download=data.download,
        test_fraction=data.test_fraction,
        **data.reading(),
    )
    return split if data.labelled is None else split.with_labels_of(data.labelled)


def build_model(run: Run, split: Split) -> PairModule:
    """The model that a run describes, freshly initialised, for a data set.

    Raises:
        ValueError: the kind needs a setting that is missing.
    """
    import torch

    from ..registry import find

    model, options = run.model, with_data(run, split).model.arguments()
    parameters = _arguments_of(model.kind).values()
    missing = [p.name for p in parameters if p.default is p.empty and p.name not in options]
    if missing:
        raise ValueError(
            f'A model of kind "{model.kind}" needs model.{missing[0]}, and data without labels do not give it: choose labelled '
            f"data, or set it."
        )
    family: type[PairModule] = find("model", model.kind)
    return family.from_names(split.data_shape, **options).to(getattr(torch, model.dtype))


def run_device(run: Run) -> torch.device:
    """Where a run trains and scores.

    Raises:
        ValueError: it names a GPU, and this torch has none.
    """
    import torch

    has_gpu = torch.cuda.is_available()
    if run.train.device == "cuda" and not has_gpu:
        raise ValueError(
            'train.device must be "cpu" or "auto" where torch finds no GPU, got "cuda": leave it out, or install CUDA\'s torch.'
        )
    return torch.device("cuda" if has_gpu and run.train.device != "cpu" else "cpu")


def load_model(folder: str | Path) -> PairModule:
    """The trained model of a run's folder, of the class that its ``model.json`` names.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: a file is truncated, or describes no model that is registered.
    """
    from .. import files
    from ..registry import find

    path = Path(folder) / "model.json"
    described = files.read_json(path)
    # Version 0.1 wrote no name, and had one class.
    name = described.get("model", "vae") if isinstance(described, dict) else "vae"
    try:
        family: type[PairModule] = find("model", name)
    except ValueError as error:
        raise ValueError(f"{path} describes a model that is not registered: {error}") from error
    return family.from_pretrained(folder)


def _arguments_of(kind: str) -> dict[str, inspect.Parameter]:
    """The arguments by which a kind of model is made from names, besides the shape of the data and its own name."""
    from ..registry import find

    parameters = dict(inspect.signature(find("model", kind).from_names).parameters)  # type: ignore[attr-defined]
    return {name: parameter for name, parameter in parameters.items() if name not in ("data_shape", "name")}


def _with_defaults(table: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    """The file's table with the defaults of the kind of model, and without what another kind alone takes."""
    from ..registry import canonical, find

    before = table.get("kind", ModelSection.kind)
    kind = overrides.get("kind", before)
    arguments = _arguments_of(kind)
    defaults = {name: p.default for name, p in arguments.items() if p.default not in (p.empty, None)}
    defaults = {name: value for name, value in defaults.items() if name not in GIVEN_BY_DATA}
    for_runs: dict[str, Any] = find("model", kind).run_defaults  # type: ignore[attr-defined]
    defaults |= {name: value for name, value in for_runs.items() if name in arguments}
    same = canonical("model", kind) == canonical("model", before)
    kept = {key: value for key, value in table.items() if same or key in arguments or key in NOT_OF_KINDS}
    return defaults | kept


def _check_keys(model: ModelSection, where: str) -> None:
    """Refuse settings that a kind of model does not take, and a run without one that it needs."""
    from ..registry import names

    takes, arguments = _arguments_of(model.kind), model.arguments()
    for key in arguments:
        if key not in takes:
            kinds = [kind for kind in names("model") if key in _arguments_of(kind)]
            if not kinds:
                raise ValueError(f"{where}: {unknown('key', f'model.options.{key}', [f'model.options.{k}' for k in takes])}")
            kind = ", ".join(f'"{each}"' for each in kinds)
            raise ValueError(
                f'{where}: model.{key} is for models of kind {kind}, got kind "{model.kind}": leave it out, or set model.kind.'
            )
    for name, parameter in takes.items():
        if parameter.default is parameter.empty and name not in arguments and name not in GIVEN_BY_DATA:
            described = re.search(rf"^ +{name}: (.*?)\.$", ModelSection.__doc__ or "", re.MULTILINE)
            what = "" if described is None else f", {described[1][0].lower()}{described[1][1:]}"
            raise ValueError(f'{where}: a model of kind "{model.kind}" needs model.{name}{what}: set it.')


def _with_data_path(path: Path, overrides: dict[str, Any]) -> dict[str, Any]:
    """Settings with the data that stand in the place of a run file."""
    if (path / "run.toml").is_file():
        raise ValueError(f"{path} is the folder of a run: give its run.toml, as pyrovae train {path / 'run.toml'}.")
    if not path.exists():
        raise FileNotFoundError(
            f"There is no run file or data {path}: give a TOML file, data, or no argument for the default run."
        )
    data = overrides.get("data", {})
    given = data.get("path", data.get("name"))
    if given is not None:
        raise ValueError(f"The data are {path} by the argument, and {given!r} by an option: drop one.")
    return overrides | {"data": data | {"path": str(path)}}


def _drop_idle_binarize(data: Any) -> None:
    """Drop what earlier versions wrote into every run file, also where it meant nothing: a data set's name beside a path."""
    if isinstance(data, dict) and data.get("binarize") == "dynamic" and data.get("name") == "digits":
        del data["binarize"]


def _merged(tables: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tables)
    for key, value in overrides.items():
        if key in COMPONENTS and isinstance(value, dict):
            before = merged.get(key)
            before = {"kind": before} if isinstance(before, str) else before
            same = isinstance(before, dict) and _is_same_name(value.get("kind", before.get("kind")), before.get("kind"))
            merged[key] = before if same else {}  # another kind has options of its own
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _is_same_name(one: Any, other: Any) -> bool:
    return str(one).casefold() == str(other).casefold()


def _sentence(error: ValidationError, where: str) -> str:
    first = error.errors()[0]
    path = [
        str(part)
        for part in first["loc"]
        if not str(part).startswith(("function-", "constrained-", "str", "dict", "bool", "literal["))
    ]
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section = SECTIONS.get(path[0], Run) if len(path) > 1 else Run
        home = _home(path[-1]) if len(path) <= 2 else None
        if home is not None:
            return f"{where}: There is no key {'.'.join(path)!r}; did you mean {home}?"
        return f"{where}: {unknown('key', '.'.join(path), _keys(section, path[:-1]))}"
    return f"{where}: {'.'.join(path)} is {first['input']!r}, but {first['msg'][0].lower()}{first['msg'][1:]}."


def _home(key: str) -> str | None:
    """Where a key belongs that stands in the wrong table of a run's file."""
    if key in Run.__dataclass_fields__:
        return f"{key!r}, above the first table"
    homes = (name for name, section in SECTIONS.items() if key in section.__dataclass_fields__)  # type: ignore[attr-defined]
    return next((repr(f"{name}.{key}") for name in homes), None)


def _keys(section: type, prefix: list[str]) -> list[str]:
    return [".".join([*prefix, name]) for name in section.__dataclass_fields__]  # type: ignore[attr-defined]
