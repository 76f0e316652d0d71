"""The settings of a run: a dataclass for each table of its TOML file, whose docstrings are the command line's help."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import field, fields
from typing import Annotated, Any, Literal

from pydantic import ConfigDict, Field, PlainSerializer, WrapValidator
from pydantic.dataclasses import dataclass

__all__ = ["GIVEN_BY_DATA", "NOT_OF_KINDS", "DataSection", "EvaluateSection", "ModelSection", "Run", "TrainSection"]

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
        name: "digits" (ships with scikit-learn); torchvision's "mnist", "fashion_mnist", "kmnist", "emnist", "omniglot",
            "cifar10" or "svhn"; or "linear_gaussian", "ring", "bernoulli_mixture" or "poisson_mixture", of known log p(x).
        path: A file (.npy .npz .csv .tsv .parquet .h5 .h5ad .pt .safetensors) or a folder of images instead.
        root: The folder that holds MNIST/raw and the like.
        binarize: "dynamic" (MNIST's default), "static", "none" (grey in [0, 1]), "levels" (0..255), "dequantized" (with noise).
        download: Let torchvision fetch its data set.
        test_fraction: The held-out part of a file.
        labelled: The part of the training data whose labels are kept, for semi-supervised models; by default all.
        key: The array of a file that holds several, or the layer of an .h5ad file.
        labels: The column (or the array) of classes.
        covariates: Columns that are given and not modelled, for models of kind "conditional".
        ignore: Columns that are left out.
        missing: Take NaN in arrays as missing values; in tables they and empty cells always are.
        size: Height and width of images, or one number for both.
        colour: "rgb" or "grey", of images.
        memory: Data of more GB than this are read from disk in batches; by default more than half of what is free.
    """

    name: str = "digits"
    path: str | None = None
    root: str = "data"
    binarize: Literal["dynamic", "static", "none", "levels", "dequantized"] | None = None
    download: bool = False
    test_fraction: Fraction = 0.2
    labelled: Annotated[float, Field(gt=0, le=1)] | None = None
    key: str | None = None
    labels: str | None = None
    covariates: list[str] | None = None
    ignore: list[str] | None = None
    missing: bool = False
    size: list[Positive] | None = None
    colour: Literal["rgb", "grey"] | None = None
    memory: PositiveFloat | None = None

    def reading(self) -> dict[str, Any]:
        """The options of :func:`pyrovae.data.read` that are set."""
        options = {name: getattr(self, name) for name in ("key", "labels", "covariates", "ignore", "missing", "size", "colour")}
        return {name: value for name, value in options.items() if value} | (
            {} if self.memory is None else {"memory": self.memory * 1e9}
        )


@dataclass(frozen=True, config=_STRICT)
class ModelSection:
    """The kind of model, and its parts by name or as tables with options; what is left out is the kind's own default.

    Attributes:
        kind: "vae", "hierarchical", "conditional" or "semi_supervised"; pyrovae list has them with a line each.
        latent_dim: Number of latent dimensions of a model with one layer.
        latent_dims: The sizes of a hierarchy's layers, nearest to the data first, such as [8, 4].
        num_classes: Number of labels of a conditional or semi-supervised model; by default that of the data set.
        prior: p(z), in a hierarchy that of the top layer.
        likelihood: p(x|z); by default the one that fits the data set, by the support of a file's values.
        encoder: The family of q(z|x), or of each factor of a hierarchy's guide.
        guide: A hierarchy's guide: "bottom_up", "ladder" or "structured".
        layer: The family of a hierarchy's p(z_i|z_{i+1}).
        body: "mlp", "gated_mlp", "conv" or "resnet".
        hidden: Widths of the encoder's hidden layers, mirrored in the decoder; in a hierarchy a list for each layer.
        activation: "relu", "tanh", ...
        options: Further arguments, of a kind of model that another distribution registers.
        dtype: "float32" or "float64".
    """

    kind: str = "vae"
    latent_dim: Positive | None = None
    latent_dims: list[Positive] | None = None
    num_classes: Positive | None = None
    prior: Component | None = None
    likelihood: Component | None = None
    encoder: Component | None = None
    guide: str | None = None
    layer: Component | None = None
    body: str | None = None
    hidden: list[Widths] | None = None
    activation: str | None = None
    options: dict[str, Any] | None = None
    dtype: Literal["float32", "float64"] = "float32"

    def arguments(self) -> dict[str, Any]:
        """What is set of the kind's own arguments."""
        own = {name: getattr(self, name) for name in self.__dataclass_fields__ if name not in NOT_OF_KINDS}
        return {name: value for name, value in own.items() if value is not None} | (self.options or {})


# Keys of [model] that mean the same for every kind, and those that a data set gives.
NOT_OF_KINDS = ("kind", "options", "dtype")
GIVEN_BY_DATA = ("likelihood", "num_classes")


@dataclass(frozen=True, config=_STRICT)
class TrainSection:
    """How to train; see pyrovae.fit.

    Attributes:
        epochs: Passes over the data.
        batch_size: Data per step.
        lr: Learning rate.
        optimizer: "adam", "adamw", "sgd", ..., or a table such as {kind = "sgd", momentum = 0.9}.
        schedule: "constant", "cosine", "step" or "plateau", or a table such as {kind = "cosine", warm_up = 500}.
        clip_norm: Largest norm of the gradient.
        accumulate: Parts of a batch that are computed one after the other, to save memory.
        ema: Decay of a moving average of the parameters, such as 0.999, which becomes the model.
        validation: Fraction of the training data held out for the validation curve; 0 for none.
        validation_samples: Score it by importance sampling with so many draws in place of the bound.
        validate_every: Epochs between two scores of it.
        patience: Stop after this many epochs without a better validation bound.
        max_seconds: Stop after the step that crosses this time.
        max_steps: Stop after so many steps.
        max_skips: End the run after so many steps in a row whose loss or gradient is not finite; they are skipped.
        compile: Capture and compile the training step: true, false, or "auto" for runs long enough to repay it.
        precision: Of matrix products: "float32", "tf32" on a GPU, or "bfloat16".
        device: "cpu", "cuda", or "auto": a GPU if there is one. Scoring takes the same.
        tensorboard: Also log the curves for TensorBoard, in the run's folder.
        wandb: Also log the curves with Weights & Biases.
        mlflow: Also log the curves with MLflow.
        checkpoint: Keep the run's last and best state in its folder, from which --resume goes on.
        every: Steps between checkpoints, "epoch", or "auto": at the ends of epochs, in less than 1 % of the time.
    """

    epochs: Positive = 60
    batch_size: Positive = 64
    lr: PositiveFloat = 2e-3
    optimizer: Component = "adam"
    schedule: Component = "cosine"
    clip_norm: PositiveFloat | None = None
    accumulate: Positive = 1
    ema: Annotated[float, Field(gt=0, lt=1)] | None = None
    validation: Annotated[float, Field(ge=0, lt=1)] = 0.1
    validation_samples: Positive | None = None
    validate_every: Positive = 1
    patience: Positive | None = None
    max_seconds: PositiveFloat | None = None
    max_steps: Positive | None = None
    max_skips: Positive = 10
    compile: bool | Literal["auto"] = "auto"
    precision: Literal["float32", "tf32", "bfloat16"] = "float32"
    device: Literal["auto", "cpu", "cuda"] = "auto"
    tensorboard: bool = False
    wandb: bool = False
    mlflow: bool = False
    checkpoint: bool = True
    every: Positive | Literal["auto", "epoch"] = "auto"

    def fit_keywords(self) -> dict[str, Any]:
        """The options that :func:`pyrovae.fit` takes by the same names."""
        others = {"device", "tensorboard", "wandb", "mlflow", "checkpoint"}
        options = {each.name: getattr(self, each.name) for each in fields(self) if each.name not in others}
        return options | {"validation": self.validation or None}


@dataclass(frozen=True, config=_STRICT)
class EvaluateSection:
    """How to score the test data; see pyrovae.log_marginal.

    Attributes:
        num_samples: Importance samples per datum; the most that one gets where target_se is given.
        target_se: Aim at this standard error of each datum's estimate, in nats.
        proposal: What the samples come from: "auto" (repaired where the guide fails), "guide", "refined", "mixture" or "prior".
        second: Check so many estimates by annealing from the prior, and the chains on as many simulated data; slow.
        limit: Score only the first so many test data.
        decompose: Split the gap and the rate of the first so many; 0 leaves it out.
    """

    num_samples: Positive = 5000
    target_se: PositiveFloat | None = None
    proposal: Literal["auto", "guide", "refined", "mixture", "prior"] = "auto"
    second: Annotated[int, Field(ge=0)] = 0
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

    seed: Annotated[int, Field(ge=0, lt=2**63)] = 0
    name: str | None = None
    data: DataSection = field(default_factory=DataSection)
    model: ModelSection = field(default_factory=ModelSection)
    estimator: Component = field(default_factory=lambda: {"kind": "dreg", "num_particles": 10})
    train: TrainSection = field(default_factory=TrainSection)
    evaluate: EvaluateSection = field(default_factory=EvaluateSection)
