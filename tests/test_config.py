from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pyrovae import registry
from pyrovae.cli.config import SECTIONS, Run, build_model, load_model, load_split, read_run, run_name, with_data, write_run
from pyrovae.cli.sections import TrainSection
from pyrovae.models.conditional import ConditionalVAE, SemiSupervisedVAE, make_conditional_vae, make_semi_supervised_vae
from pyrovae.models.hierarchical import HierarchicalVAE, make_hierarchical_vae
from pyrovae.models.vae import VAE, make_vae
from pyrovae.training.options import FitKeywords


def test_written_runs_read_back_equal(tmp_path: Path):
    run = read_run(
        overrides={
            "seed": 3,
            "name": 'a "quoted" name',
            "estimator": {"kind": "iwae", "num_particles": 5},
            "model": {"hidden": [30, 20], "likelihood": {"kind": "normal", "scale": 0.5}},
            "train": {"clip_norm": 1e-7, "validation": 0.25},
            "data": {"download": True},
        }
    )
    path = tmp_path / "run.toml"
    path.write_text(write_run(run))
    assert read_run(path) == run
    path.write_text(write_run(Run()))
    assert read_run(path) == read_run()


def test_settings_of_training_are_those_of_fit():
    section = TrainSection(validation=0.0, every=7)
    keywords = section.fit_keywords()
    assert keywords["validation"] is None
    assert keywords["every"] == 7
    beside = {"estimator", "shuffle", "seed", "progress", "transform", "on_epoch", "callbacks", "checkpoint", "resume"}
    assert keywords.keys() == FitKeywords.__optional_keys__ - beside


def test_overrides_win_over_the_file_and_leave_the_rest(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('[train]\nepochs = 7\nlr = 0.5\n[model]\nlikelihood = { kind = "normal", scale = 2.0 }\n')
    run = read_run(path, {"train": {"epochs": "9"}, "model": {"likelihood": {"scale": "shared"}}})
    assert (run.train.epochs, run.train.lr) == (9, 0.5)
    assert run.model.likelihood == {"kind": "normal", "scale": "shared"}


def test_estimator_options_without_a_name_are_the_default_estimators(tmp_path: Path):
    default = Run().estimator
    assert read_run(overrides={"estimator": {"num_particles": 3}}).estimator == default | {"num_particles": 3}
    path = tmp_path / "run.toml"
    path.write_text('estimator = { kind = "iwae", num_particles = 50 }')
    assert read_run(path, {"estimator": {"num_particles": 3}}).estimator == {"kind": "iwae", "num_particles": 3}


def test_components_merge_by_kind(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text('estimator = "iwae"\n[model]\nlikelihood = { kind = "normal", scale = 2.0 }\n')
    assert read_run(path, {"estimator": {"num_particles": "3"}}).estimator == {"kind": "iwae", "num_particles": "3"}
    assert read_run(path, {"estimator": {"kind": "elbo", "beta": 0.5}}).estimator == {"kind": "elbo", "beta": 0.5}
    assert read_run(path, {"model": {"likelihood": {"kind": "binomial", "total_count": 3}}}).model.likelihood == {
        "kind": "binomial",
        "total_count": 3,
    }
    assert read_run(overrides={"model": {"encoder": {"num_features": 3}}}).model.encoder["kind"] == "full_covariance_normal"


def test_any_character_survives_the_file(tmp_path: Path):
    run = read_run(overrides={"name": 'emoji \U0001f600 "quoted" \\ \x7f \t'})
    (tmp_path / "run.toml").write_text(write_run(run), encoding="utf-8")
    assert read_run(tmp_path / "run.toml") == run


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        ({"train": {"epohcs": 3}}, "no key 'train.epohcs'; did you mean 'train.epochs'"),
        ({"trian": {}}, "no key 'trian'; did you mean 'train'"),
        ({"train": {"epochs": -1}}, "train.epochs is -1, but input should be greater than 0"),
        ({"train": {"lr": "fast"}}, "train.lr is 'fast', but input should be a valid number"),
        (
            {"data": {"binarize": "dyn"}},
            "data.binarize is 'dyn', but input should be 'dynamic', 'static', 'none', 'levels' or 'dequantized'",
        ),
        ({"model": {"hidden": [3, -1]}}, "model.hidden.1 is -1"),
        ({"model": {"hidden": [[3], [4, -1]]}}, "model.hidden.1 is -1"),
        ({"model": {"hidden": [[3], "x"]}}, "model.hidden.1 is 'x'"),
        ({"model": {"kind": "hierarchy"}}, "There is no model 'hierarchy'; did you mean 'hierarchical'"),
        (
            {"model": {"kind": "hierarchical"}},
            r'kind "hierarchical" needs model.latent_dims, the sizes of .* such as \[8, 4\]: set it',
        ),
        (
            {"model": {"kind": "hierarchical", "latent_dims": [3, 2], "latent_dim": 2}},
            'model.latent_dim is for models of kind "conditional", "semi_supervised", "vae", got kind "hierarchical"',
        ),
        ({"model": {"guide": "ladder"}}, 'model.guide is for models of kind "hierarchical", got kind "vae"'),
        ({"model": 3}, "model is 3"),
    ],
)
def test_mistakes_get_one_sentence(overrides: dict, message: str):
    with pytest.raises(ValueError, match=message) as caught:
        read_run(overrides=overrides)
    assert "\n" not in str(caught.value)


def test_bad_toml_names_the_file_and_the_place(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text("[train\nepochs = 3\n")
    with pytest.raises(ValueError, match=r"run\.toml is not valid TOML.*line 1"):
        read_run(path)
    path.write_bytes(b"\xff\xfe")
    with pytest.raises(ValueError, match="not valid TOML"):
        read_run(path)
    with pytest.raises(FileNotFoundError, match=r"no\.toml"):
        read_run(tmp_path / "no.toml")


def test_a_run_builds_what_it_says():
    run = read_run(overrides={"model": {"latent_dim": 3, "hidden": [11], "dtype": "float64", "encoder": "diagonal_normal"}})
    vae = build_model(run, load_split(run))
    assert vae.latent_dim == 3
    assert type(vae.encoder).__name__ == "DiagonalNormal"
    assert vae.likelihood.total_count == 16, "the data set's own likelihood"
    assert {str(parameter.dtype) for parameter in vae.parameters()} == {"torch.float64"}
    assert vae.encoder.body.out_shape == (11,)


LAYERS = {"kind": "hierarchical", "latent_dims": [3, 2]}


def test_a_hierarchy_is_built_as_it_says(tmp_path: Path):
    path = tmp_path / "run.toml"
    path.write_text(
        '[model]\nkind = "hierarchical"\nlatent_dims = [3, 2]\nguide = "ladder"\n'
        'hidden = [[12, 11], [6]]\nactivation = "relu"\n'
        'prior = { kind = "vamp", components = 4 }\nlayer = "diagonal_normal"\ndtype = "float64"\n'
    )
    run = read_run(path)
    vae = build_model(run, load_split(run))
    assert isinstance(vae, HierarchicalVAE)
    assert (vae.latent_dims, vae.prior.components, vae.likelihood.total_count) == ((3, 2), 4, 16)
    assert [(body.hidden, body.out_shape, body.activation) for body in vae.inference.bodies] == [
        ([12, 11], (11,), "relu"),
        ([6], (6,), "relu"),
    ]
    assert vae.likelihood.decoder.hidden == [11, 12]
    assert next(vae.parameters()).dtype.itemsize == 8
    path.write_text(write_run(run))
    assert read_run(path) == run
    assert "latent_dim =" not in path.read_text()


def test_a_hierarchy_has_defaults_of_its_own(tmp_path: Path):
    run = read_run(overrides={"model": LAYERS})
    assert (run.model.encoder, run.model.guide, run_name(run)) == ("diagonal_normal", "bottom_up", "digits-dreg-3-2")
    path = tmp_path / "run.toml"
    path.write_text("[model]\nlatent_dim = 7\nhidden = [9]\n")
    changed = read_run(path, {"model": LAYERS | {"guide": "structured", "hidden": [[9], [8]], "layer": {"rank": 2}}}).model
    assert (changed.latent_dims, changed.hidden, changed.layer) == ([3, 2], [[9], [8]], {"kind": "diagonal_normal", "rank": 2})
    path.write_text(write_run(run))
    back = read_run(path, {"model": {"kind": "vae", "latent_dim": 5}}).model
    assert (back.latent_dim, back.latent_dims) == (5, None)


def test_a_folder_says_which_class_it_holds(tmp_path: Path):
    made = {
        "one": make_vae(6, latent_dim=2, hidden=[4]),
        "two": make_hierarchical_vae(6, latent_dims=[3, 2]),
        "three": make_conditional_vae(6, num_classes=3, latent_dim=2),
        "four": make_semi_supervised_vae(6, num_classes=3, latent_dim=2),
    }
    for name, vae in made.items():
        vae.save_pretrained(tmp_path / name)
        assert type(load_model(tmp_path / name)) is type(vae)
    # As folders were written before they said it.
    said = tmp_path / "one" / "model.json"
    described = json.loads(said.read_text())
    assert described.pop("model") == "VAE"
    said.write_text(json.dumps(described))
    assert type(load_model(tmp_path / "one")) is VAE
    said.write_text(json.dumps({"model": "Diffusion"}))
    with pytest.raises(
        ValueError, match=r"model\.json describes a model that is not registered: There is no model 'Diffusion'"
    ):
        load_model(tmp_path / "one")


def test_names_of_runs():
    assert run_name(read_run(overrides={"estimator": {"kind": "iwae"}})).startswith("digits-iwae-")
    assert run_name(read_run(overrides={"name": "mine"})) == "mine"
    assert run_name(read_run(overrides={"data": {"path": "a/b.npy"}})).startswith("b-")


def test_a_run_of_a_file_names_the_file_alone(tmp_path: Path):
    run = read_run(overrides={"data": {"path": "a/b.npy"}})
    path = tmp_path / "run.toml"
    path.write_text(write_run(run))
    assert tomllib.loads(path.read_text())["data"] == {
        "path": "a/b.npy",
        "root": "data",
        "download": False,
        "test_fraction": 0.2,
        "missing": False,
    }
    assert read_run(path) == run
    assert tomllib.loads(write_run(Run()))["data"]["name"] == "digits"
    with pytest.raises(ValueError, match=r"data.name is 'mnist' and data.path 'a/b\.npy', but a run has one data set"):
        read_run(path, {"data": {"name": "mnist"}})
    # As run files were written, where the setting meant nothing.
    for rest in ('path = "a/b.npy"\n', ""):
        path.write_text(f'[data]\nname = "digits"\nbinarize = "dynamic"\n{rest}')
        assert read_run(path).data.binarize is None
    path.write_text('[data]\nname = "mnist"\nbinarize = "dynamic"\n')
    assert read_run(path).data.binarize == "dynamic"


def test_the_likelihood_that_was_chosen_is_written_down(tmp_path: Path):
    run = read_run()
    split = load_split(run)
    path = tmp_path / "run.toml"
    path.write_text(write_run(with_data(run, split)))
    assert tomllib.loads(path.read_text())["model"]["likelihood"] == {"kind": "beta_binomial", "total_count": 16}
    given = read_run(path, {"model": {"likelihood": "poisson"}})
    assert with_data(given, split) is given


def test_every_setting_is_documented():
    for section in (Run, *SECTIONS.values()):
        for name in section.__dataclass_fields__:
            assert f"    {name}: " in section.__doc__, f"{section.__name__}.{name}"


@pytest.mark.parametrize(("kind", "cls"), [("conditional", ConditionalVAE), ("Semi_Supervised", SemiSupervisedVAE)])
def test_models_of_data_with_labels_are_built_as_any(tmp_path: Path, kind: str, cls: type):
    run = read_run(overrides={"model": {"kind": kind, "hidden": [7], "encoder": {"kind": "DiagonalNormal"}}})
    split = load_split(run)
    run = with_data(run, split)
    assert (run.model.num_classes, run.model.latent_dim) == (10, 4)
    vae = build_model(run, split)
    assert isinstance(vae, cls)
    assert vae.encoder.body.in_shape == (74,)
    (tmp_path / "run.toml").write_text(write_run(run))
    assert read_run(tmp_path / "run.toml") == run


def test_a_kind_that_needs_labels_refuses_data_without(tmp_path: Path):
    np.save(tmp_path / "x.npy", np.random.default_rng(0).normal(size=(20, 3)))
    tables = {"data": {"path": str(tmp_path / "x.npy")}, "model": {"kind": "conditional"}}
    run = read_run(overrides=tables)
    with pytest.raises(ValueError, match=r'kind "conditional" needs model.num_classes, and data without labels do not give it'):
        build_model(run, load_split(run))
    run = read_run(overrides=tables | {"model": {"kind": "conditional", "num_classes": 3}})
    split = load_split(run)
    with pytest.raises(ValueError, match="The data of a ConditionalVAE must have labels"):
        build_model(run, split).train_inputs(split.train, split.train_labels)
    with pytest.raises(ValueError, match=r"The data set 'x' has no labels to keep: leave data.labelled out"):
        load_split(read_run(overrides={"data": tables["data"] | {"labelled": 0.5}}))


def test_labels_are_kept_for_a_part_of_each_class():
    whole, part = (load_split(read_run(overrides={"data": data})) for data in ({}, {"labelled": 0.1}))
    assert part.num_classes == whole.num_classes == 10
    kept = part.train_labels >= 0
    assert (part.train_labels[kept] == whole.train_labels[kept]).all()
    counts, kept_counts = (labels.bincount() for labels in (whole.train_labels, part.train_labels[kept]))
    assert ((0.1 * counts - kept_counts).abs() <= 0.5).all()


def test_a_model_of_another_distribution_is_a_kind_like_ours(monkeypatch: pytest.MonkeyPatch):
    registry.names("model")
    monkeypatch.setitem(registry._classes, "model", dict(registry._classes["model"]))

    @registry.register("model")
    class Shifted(VAE):
        @classmethod
        def from_names(cls, data_shape: Any, *, latent_dim: int, shift: float, likelihood: Any = "bernoulli"):
            made = super().from_names(data_shape, latent_dim=latent_dim, likelihood=likelihood)
            made.shift = shift
            return made

    run = read_run(overrides={"model": {"kind": "shifted", "options": {"shift": 2.0}}})
    assert build_model(run, load_split(run)).shift == 2.0
    with pytest.raises(ValueError, match=r"no key 'model.options.shfit'; did you mean 'model.options.shift'"):
        read_run(overrides={"model": {"kind": "shifted", "options": {"shfit": 2.0}}})
    with pytest.raises(ValueError, match=r'kind "shifted" needs model.shift: set it'):
        read_run(overrides={"model": {"kind": "shifted"}})
