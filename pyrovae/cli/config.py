"""The TOML description of a run, checked, and what it stands for.

This file imports neither torch nor Pyro, so that the command line can read and refuse a description at once.
"""

from __future__ import annotations

import tomllib
from collections.abc import Callable
from dataclasses import field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainSerializer, TypeAdapter, ValidationError, WrapValidator
from pydantic.dataclasses import dataclass

if TYPE_CHECKING:
    import torch

    from ..data.datasets import Split
    from ..models.hierarchical import HierarchicalVAE
    from ..models.vae import VAE

_STRICT = ConfigDict(extra="forbid")
Component = str | dict[str, Any]
Positive = Annotated[int, Field(gt=0)]
PositiveFloat = Annotated[float, Field(gt=0)]
Fraction = Annotated[float, Field(gt=0, lt=1)]


def _each(value: Any, check: Callable[[Any], int]) -> Any:
    return [check(each) for each in value] if isinstance(value, list | tuple) else check(value)


# A width, or a list of them; no union, of which the command line cannot tell how many words it takes.
Widths = Annotated[Positive, WrapValidator(_each), PlainSerializer(lambda value: value, return_type=Any)]


@dataclass(frozen=True, config=_STRICT)
class DataSection:
    """What to train on.

    Attributes:
        name: "digits" (ships with scikit-learn) or "mnist".
        path: A .npy array of shape (N, ...) instead.
        root: The folder that holds MNIST/raw.
        binarize: "dynamic" (MNIST's default), "static", "none" (grey in [0, 1]), "levels" (0..255), "dequantized" (with noise).
        download: Let torchvision fetch MNIST.
        test_fraction: The held-out part of a .npy file.
    """

    name: str = "digits"
    path: str | None = None
    root: str = "data"
    binarize: Literal["dynamic", "static", "none", "levels", "dequantized"] | None = None
    download: bool = False
    test_fraction: Fraction = 0.2


@dataclass(frozen=True, config=_STRICT)
class ModelSection:
    """Prior, likelihood, encoder and networks, by name or as tables with options.

    Attributes:
        kind: "vae", of one stochastic layer, or "hierarchical", of several; see pyrovae.make_vae and make_hierarchical_vae.
        latent_dim: Number of latent dimensions of a vae.
        latent_dims: Those of each layer of a hierarchy, nearest to the data first.
        prior: p(z), in a hierarchy that of the top layer.
        likelihood: p(x|z); by default the one that fits the data set, by the support of a file's values.
        encoder: The family of q(z|x), or of each factor of a hierarchy's guide, where it is "diagonal_normal" by default.
        guide: A hierarchy's guide: "bottom_up", "ladder" or "structured".
        layer: The family of a hierarchy's p(z_i|z_{i+1}).
        body: "mlp", "gated_mlp", "conv" or "resnet".
        hidden: Widths of the encoder's hidden layers, mirrored in the decoder; in a hierarchy a list for each layer.
        activation: "relu", "tanh", ...; by default the body's own, and "tanh" in a hierarchy.
        dtype: "float32" or "float64".
    """

    kind: Literal["vae", "hierarchical"] = "vae"
    latent_dim: Positive = 4
    latent_dims: list[Positive] | None = None
    prior: Component = "standard_normal"
    likelihood: Component | None = None
    encoder: Component = "full_covariance_normal"
    guide: str = "bottom_up"
    layer: Component = "diagonal_normal"
    body: str = "mlp"
    hidden: list[Widths] | None = None
    activation: str | None = None
    dtype: Literal["float32", "float64"] = "float32"


@dataclass(frozen=True, config=_STRICT)
class TrainSection:
    """How to train; see pyrovae.fit.

    Attributes:
        epochs: Passes over the data.
        batch_size: Data per step.
        lr: Learning rate.
        optimizer: "adam", "adamw", "sgd", ...
        schedule: "constant" or "cosine".
        clip_norm: Largest norm of the gradient.
        validation: Fraction of the training data held out for the validation curve; 0 for none.
        patience: Stop after this many epochs without a better validation bound.
        compile: Capture and compile the training step: true, false, or "auto" for runs long enough to repay it.
        precision: Of matrix products: "float32", "tf32" on a GPU, or "bfloat16".
        device: "cpu", "cuda", or "auto": a GPU if there is one. Scoring takes the same.
        tensorboard: Also log the curves for TensorBoard, in the run's folder.
    """

    epochs: Positive = 60
    batch_size: Positive = 64
    lr: PositiveFloat = 2e-3
    optimizer: str = "adam"
    schedule: Literal["constant", "cosine"] = "cosine"
    clip_norm: PositiveFloat | None = None
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    patience: Positive | None = None
    compile: bool | Literal["auto"] = "auto"
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensorboard: bool = False


@dataclass(frozen=True, config=_STRICT)
class EvaluateSection:
    """How to score the test data; see pyrovae.log_marginal.

    Attributes:
        num_samples: Importance samples per datum; the most that one gets where target_se is given.
        target_se: Aim at this standard error of each datum's estimate, in nats.
        proposal: What the samples come from: "guide", "refined", "mixture" or "prior".
        limit: Score only the first so many test data.
        decompose: Split the gap and the rate of the first so many; 0 leaves it out.
    """

    num_samples: Positive = 5000
    target_se: PositiveFloat | None = None
    proposal: Literal["guide", "refined", "mixture", "prior"] = "guide"
    limit: Positive | None = None
    decompose: Annotated[int, Field(ge=0)] = 200


@dataclass(frozen=True, config=_STRICT)
class Run:
    """A whole run.

    Attributes:
        seed: Seeds initialisation, order, draws and evaluation.
        name: The run's folder under runs/; by default made of data set, estimator and latent dimensions.
        data: What to train on.
        model: The pair of programs.
        estimator: An estimator's name, or a table such as {kind = "iwae", num_particles = 50}.
        train: How to train.
        evaluate: How to score.
    """

    seed: Annotated[int, Field(ge=0)] = 0
    name: str | None = None
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    estimator: Component = field(default_factory=lambda: {"kind": "dreg", "num_particles": 10})
    train: TrainSection = field(default_factory=TrainSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)


COMPONENTS = ("prior", "likelihood", "encoder", "layer", "estimator")
# The keys of [model] that one kind of model has alone.
ONLY_FOR = {"latent_dim": "vae", "latent_dims": "hierarchical", "guide": "hierarchical", "layer": "hierarchical"}
SECTIONS = {"data": DataSection, "model": ModelSection, "train": TrainSection, "evaluate": EvaluateSection}


def read_run(path: str | Path | None = None, overrides: dict[str, Any] | None = None) -> Run:
    """A run from a TOML file and overrides, checked.

    Args:
        path: a TOML file, or ``None`` for the defaults.
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
    if path is not None:
        if not Path(path).is_file():
            raise FileNotFoundError(f"There is no run file {path}: give a TOML file, or no argument for the default run.")
        try:
            tables = tomllib.loads(Path(path).read_text(encoding="utf-8"))
        except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
            raise ValueError(f"{path} is not valid TOML: {error}.") from error
    _drop_idle_binarize(tables.get("data"))
    overrides = overrides or {}
    where = str(path) if path is not None else "The run"
    # Options without a name are meant for the component that would run without them.
    tables = {"estimator": Run().estimator} | tables
    tables["model"] = _model_defaults(tables.get("model", {}), overrides.get("model", {}))
    merged = _merged(tables, overrides)
    try:
        run = TypeAdapter(Run).validate_python(merged)
    except ValidationError as error:
        raise ValueError(_sentence(error, where)) from error
    kind = run.model.kind
    for key in merged["model"]:
        if ONLY_FOR.get(key, kind) != kind:
            raise ValueError(
                f'{where}: model.{key} is for models of kind "{ONLY_FOR[key]}", and this one is of kind "{kind}": leave it '
                f"out, or set model.kind."
            )
    if run.data.path is not None and run.data.name != DataSection.name:
        raise ValueError(
            f"{where}: data.name is {run.data.name!r} and data.path {run.data.path!r}, but a run has one data set: drop one."
        )
    if kind == "hierarchical" and run.model.latent_dims is None:
        raise ValueError(f"{where}: a hierarchy needs model.latent_dims, the sizes of its layers from the data up: say [8, 4].")
    return run


def write_run(run: Run) -> str:
    """The TOML text of a run, which :func:`read_run` reads back."""
    tables = TypeAdapter(Run).dump_python(run, exclude_none=True)
    plain = [f"{key} = {_toml(value)}" for key, value in tables.items() if key not in SECTIONS]
    for section in SECTIONS:
        plain += ["", f"[{section}]"]
        kind = tables[section].get("kind")
        left_out = {"name"} if section == "data" and run.data.path is not None else set()
        plain += [
            f"{key} = {_toml(value)}"
            for key, value in tables[section].items()
            if ONLY_FOR.get(key, kind) == kind and key not in left_out
        ]
    return "\n".join(plain) + "\n"


def run_name(run: Run) -> str:
    """The run's own name, or one made of data set, estimator and latent dimensions."""
    if run.name is not None:
        return run.name
    estimator = run.estimator if isinstance(run.estimator, str) else str(run.estimator.get("kind"))
    data = run.data.name if run.data.path is None else Path(run.data.path).stem
    sizes = [run.model.latent_dim] if run.model.latent_dims is None else run.model.latent_dims
    return "-".join(map(str, [data, estimator, *sizes]))


def with_likelihood(run: Run, split: Split) -> Run:
    """The run with the likelihood that fits the data set written out, where it names none."""
    if run.model.likelihood is not None:
        return run
    return replace(run, model=replace(run.model, likelihood=split.likelihood))


def load_split(run: Run) -> Split:
    """The data set that a run names."""
    from ..data.datasets import load

    data = run.data
    return load(
        data.name,
        path=data.path,
        root=data.root,
        binarize=data.binarize,
        download=data.download,
        test_fraction=data.test_fraction,
    )


def build_vae(run: Run, split: Split) -> VAE | HierarchicalVAE:
    """The model that a run describes, freshly initialised, for a data set."""
    import torch

    from ..models.hierarchical import make_hierarchical_vae
    from ..models.vae import make_vae

    model = run.model
    options: dict[str, Any] = {
        "prior": model.prior,
        "likelihood": model.likelihood if model.likelihood is not None else split.likelihood,
        "encoder": model.encoder,
        "body": model.body,
        "hidden": model.hidden,
    } | ({} if model.activation is None else {"activation": model.activation})
    vae: VAE | HierarchicalVAE
    if model.kind == "hierarchical":
        dims = model.latent_dims or []
        vae = make_hierarchical_vae(split.data_shape, latent_dims=dims, guide=model.guide, layer=model.layer, **options)
    else:
        vae = make_vae(split.data_shape, latent_dim=model.latent_dim, **options)
    return vae.to(getattr(torch, model.dtype))


def run_device(run: Run) -> torch.device:
    """Where a run trains and scores.

    Raises:
        ValueError: it names a GPU, and this torch has none.
    """
    import torch

    found = torch.cuda.is_available()
    if run.train.device == "cuda" and not found:
        raise ValueError(
            'train.device must be "cpu" or "auto" where torch finds no GPU, got "cuda": leave it out, or install CUDA\'s torch.'
        )
    return torch.device("cuda" if found and run.train.device != "cpu" else "cpu")


def load_vae(folder: str | Path) -> VAE | HierarchicalVAE:
    """The trained model of a run's folder, of the class that its ``model.json`` names.

    Raises:
        FileNotFoundError: the folder or a file in it is missing.
        ValueError: a file is truncated, or describes no model that a run can have.
    """
    from .. import files
    from ..models.hierarchical import HierarchicalVAE
    from ..models.vae import VAE

    described = files.read_json(Path(folder) / "model.json")
    named = described.get("model") if isinstance(described, dict) else None
    return HierarchicalVAE.from_pretrained(folder) if named == "HierarchicalVAE" else VAE.from_pretrained(folder)


def _model_defaults(given: Any, overrides: Any) -> Any:
    """The model's table with what its components would be without it, and without what another kind than its own has."""
    if not isinstance(given, dict) or not isinstance(overrides, dict):
        return given  # which is refused
    default = ModelSection()
    before = given.get("kind", default.kind)
    kind = overrides.get("kind", before)
    hierarchical = kind == "hierarchical"
    components = {"prior": default.prior, "encoder": "diagonal_normal" if hierarchical else default.encoder}
    if hierarchical:
        components["layer"] = default.layer
    return components | {key: value for key, value in given.items() if kind == before or ONLY_FOR.get(key, kind) == kind}


def _drop_idle_binarize(data: Any) -> None:
    """Drop what earlier versions wrote into every run file, also where it meant nothing: a data set's name beside a path."""
    if isinstance(data, dict) and data.get("binarize") == "dynamic" and data.get("name") == "digits":
        del data["binarize"]


def _merged(tables: dict[str, Any], overrides: dict[str, Any]) -> dict[str, Any]:
    merged = dict(tables)
    for key, value in overrides.items():
        if key in COMPONENTS and isinstance(value, dict):
            held = merged.get(key)
            held = {"kind": held} if isinstance(held, str) else held
            same = isinstance(held, dict) and value.get("kind", held.get("kind")) == held.get("kind")
            merged[key] = held if same else {}  # another kind has options of its own
        both = isinstance(value, dict) and isinstance(merged.get(key), dict)
        merged[key] = _merged(merged[key], value) if both else value
    return merged


def _sentence(error: ValidationError, where: str) -> str:
    from .._validation import unknown

    first = error.errors()[0]
    path = [
        str(part)
        for part in first["loc"]
        if not str(part).startswith(("function-", "constrained-", "str", "dict", "bool", "literal["))
    ]
    if first["type"] in ("unexpected_keyword_argument", "extra_forbidden"):
        section = SECTIONS.get(path[0], Run) if len(path) > 1 else Run
        return f"{where}: {unknown('key', '.'.join(path), _keys(section, path[:-1]))}"
    return f"{where}: {'.'.join(path)} is {first['input']!r}, but {first['msg'][0].lower()}{first['msg'][1:]}."


def _keys(section: type, prefix: list[str]) -> list[str]:
    return [".".join([*prefix, name]) for name in section.__dataclass_fields__]  # type: ignore[attr-defined]


def _toml(value: Any) -> str:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, dict):
        return "{ " + ", ".join(f"{key} = {_toml(item)}" for key, item in value.items()) + " }"
    if isinstance(value, list | tuple):
        return "[" + ", ".join(_toml(item) for item in value) + "]"
    if isinstance(value, str):
        # JSON's escapes are TOML's too, but for surrogate pairs; and TOML wants the delete character escaped.
        import json

        return json.dumps(value, ensure_ascii=False).replace("\x7f", "\\u007f")
    return repr(value)
