from __future__ import annotations

import json
import tomllib
from pathlib import Path

import pytest

from pyrovae.cli.config import SECTIONS, Run, build_vae, load_split, load_vae, read_run, run_name, with_likelihood, write_run
from pyrovae.models.conditional import make_conditional_vae
from pyrovae.models.hierarchical import HierarchicalVAE, make_hierarchical_vae
from pyrovae.models.vae import VAE, make_vae


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
    assert read_run(path) == Run() == read_run()


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
        ({"model": {"kind": "hierarchy"}}, "model.kind is 'hierarchy', but input should be 'vae' or 'hierarchical'"),
        ({"model": {"kind": "hierarchical"}}, r"a hierarchy needs model.latent_dims, .*: say \[8, 4\]"),
        (
            {"model": {"kind": "hierarchical", "latent_dims": [3, 2], "latent_dim": 2}},
            'model.latent_dim is for models of kind "vae", and this one is of kind "hierarchical": leave it out',
        ),
        ({"model": {"guide": "ladder"}}, 'model.guide is for models of kind "hierarchical", and this one is of kind "vae"'),
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
    vae = build_vae(run, load_split(run))
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
    vae = build_vae(run, load_split(run))
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
    made = {"one": make_vae(6, latent_dim=2, hidden=[4]), "two": make_hierarchical_vae(6, latent_dims=[3, 2])}
    for name, vae in made.items():
        vae.save_pretrained(tmp_path / name)
        assert type(load_vae(tmp_path / name)) is type(vae)
    # As folders were written before they said it.
    said = tmp_path / "one" / "model.json"
    described = json.loads(said.read_text())
    assert described.pop("model") == "VAE"
    said.write_text(json.dumps(described))
    assert type(load_vae(tmp_path / "one")) is VAE
    make_conditional_vae(6, num_classes=3, latent_dim=2).save_pretrained(tmp_path / "three")
    with pytest.raises(
        ValueError, match=r"model\.json does not describe a VAE but a ConditionalVAE: call Cond.*from_pretrained\.$"
    ):
        load_vae(tmp_path / "three")


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
    path.write_text(write_run(with_likelihood(run, split)))
    assert tomllib.loads(path.read_text())["model"]["likelihood"] == {"kind": "binomial", "total_count": 16}
    given = read_run(path, {"model": {"likelihood": "poisson"}})
    assert with_likelihood(given, split) is given


def test_every_setting_is_documented():
    for section in (Run, *SECTIONS.values()):
        for name in section.__dataclass_fields__:
            assert f"    {name}: " in section.__doc__, f"{section.__name__}.{name}"
