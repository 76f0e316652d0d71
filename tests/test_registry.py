"""The registry: names, tables, descriptions and entry points."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import invalidate_caches
from pathlib import Path

import pytest
import torch
from torch import nn

import pyrovae
from pyrovae import registry
from pyrovae.cli.app import main
from pyrovae.encoders import DiagonalNormal
from pyrovae.likelihoods import Bernoulli, Normal
from pyrovae.models.vae import make_vae
from pyrovae.nn import MLP
from pyrovae.priors import Prior, StandardNormal
from pyrovae.registry import build, canonical, describe, find, names, register, snake_case

# -- the registry itself ---------------------------------------------------------------------------------------------------


@pytest.fixture
def _scratch(monkeypatch: pytest.MonkeyPatch) -> None:
    for kind in registry.KINDS:
        names(kind)  # a room that were first imported in the test would register its classes in what is thrown away
        monkeypatch.setitem(registry._classes, kind, dict(registry._classes[kind]))
        monkeypatch.setitem(registry._refused, kind, {})
    monkeypatch.setattr(registry, "_read", set())


@pytest.mark.parametrize(
    ("camel", "snake"),
    [("DiagonalNormal", "diagonal_normal"), ("IWAE", "iwae"), ("MLP", "mlp"), ("StudentT", "student_t")],
)
def test_snake_case(camel: str, snake: str) -> None:
    assert snake_case(camel) == snake


def test_foundation_names_are_there() -> None:
    assert "standard_normal" in names("prior")
    assert {"bernoulli", "binomial", "normal"} <= set(names("likelihood"))
    assert {"diagonal_normal", "full_covariance_normal"} <= set(names("encoder"))
    assert {"mlp", "gated_mlp", "conv_encoder", "conv_decoder"} <= set(names("body"))
    assert {"trace_elbo", "trace_mean_field_elbo", "renyi_elbo"} <= set(names("estimator"))


def test_names_load_the_room_that_has_them() -> None:
    # In a process of its own, where no room is imported yet.
    code = "from pyrovae.registry import find, names; print(names('prior')[0], find('encoder', 'diagonal_normal').__name__)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split() == [names("prior")[0], "DiagonalNormal"]


@pytest.mark.parametrize(
    ("kind", "name", "nearest"),
    [("prior", "standardnormel", "standard_normal"), ("likelihood", "bernouli", "bernoulli"), ("body", "gated", "gated_mlp")],
)
def test_unknown_name_says_the_nearest(kind: str, name: str, nearest: str) -> None:
    with pytest.raises(ValueError, match=f"There is no {kind} '{name}'; did you mean '{nearest}'\\?"):
        find(kind, name)


@pytest.mark.parametrize(
    ("kind", "name", "registered"),
    [
        ("estimator", "IWAE", "iwae"),
        ("estimator", "DReG", "dreg"),
        ("encoder", "DiagonalNormal", "diagonal_normal"),
        ("encoder", "Diagonal_Normal", "diagonal_normal"),
        ("likelihood", "nb", "negative_binomial"),
        ("likelihood", "ZINB", "zero_inflated_negative_binomial"),
        ("body", "GatedMLP", "gated_mlp"),
        ("model", "ConditionalVAE", "conditional"),
    ],
)
def test_names_in_any_case_and_those_of_classes(kind: str, name: str, registered: str) -> None:
    assert canonical(kind, name) == registered
    assert find(kind, name) is find(kind, registered)
    assert name == registered or name not in names(kind)


@pytest.mark.usefixtures("_scratch")
def test_an_alias_belongs_to_one_class() -> None:
    with pytest.raises(ValueError, match=r"The likelihood name 'nb' belongs to pyrovae\.likelihoods\.Neg"):
        register("likelihood", "nb")(type("NaiveBayes", (), {}))


def test_far_names_are_not_suggested() -> None:
    with pytest.raises(ValueError, match=r"There is no prior 'normalising_flow'; choose one of .*, vamp\."):
        find("prior", "normalising_flow")


def test_name_like_no_other_lists_them_all() -> None:
    with pytest.raises(ValueError, match=r"choose one of .*diagonal_normal, .*full_covariance_normal"):
        find("encoder", "xyz")


@pytest.mark.parametrize(
    ("spec", "message"),
    [
        ({"kind": ["normal"]}, "There is no likelihood"),
        ({"kind": "normal", "scal": 2}, "There is no normal option 'scal'; did you mean 'scale'"),
        ({"total_count": 2}, r"A likelihood table must have the key kind, got \{'total_count': 2\}: add kind = "),
        ({"kind": "binomial"}, "The likelihood 'binomial' needs total_count: write { kind = 'binomial', total_count = ... }"),
    ],
)
def test_bad_table_gets_one_sentence(spec: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        build("likelihood", spec, decoder=MLP(1, [], 2))
    assert "\n" not in str(caught.value)


def test_unknown_kind() -> None:
    with pytest.raises(ValueError, match="There is no registry kind 'priors'; did you mean 'prior'"):
        names("priors")


def test_table_wins_over_defaults_and_unused_defaults_are_dropped() -> None:
    built = build("prior", {"kind": "standard_normal", "latent_dim": 3}, latent_dim=7, decoder=None)
    assert built.latent_dim == 3


def test_instance_passes_through() -> None:
    prior = StandardNormal(2)
    assert build("prior", prior, latent_dim=9) is prior


@pytest.mark.usefixtures("_scratch")
def test_a_name_has_one_class() -> None:
    with pytest.raises(ValueError, match=r"The prior name 'standard_normal' belongs to pyrovae\.priors.StandardNormal"):
        register("prior", "standard_normal")(type("Mine", (Prior,), {}))
    # A user's class of the same name in another module must not take over ours unseen.
    with pytest.raises(ValueError, match="register under another name"):
        register("prior")(type("StandardNormal", (Prior,), {"__module__": "mine"}))
    assert find("prior", "standard_normal") is StandardNormal


@pytest.mark.usefixtures("_scratch")
def test_a_reloaded_class_takes_its_name_again() -> None:
    again = type("StandardNormal", (Prior,), {"__module__": StandardNormal.__module__})
    register("prior")(again)
    assert find("prior", "standard_normal") is again


# A distribution of somebody else's: a module, and the folder that an installer leaves beside it.
ACME = """
import pyro.distributions as dist
import torch
from pyrovae.priors import Prior

class Skewed(Prior):
    "Independent Gumbel dimensions."

    def __init__(self, latent_dim):
        super().__init__(latent_dim)
        self.register_buffer("loc", torch.zeros(latent_dim), persistent=False)

    def forward(self):
        return dist.Gumbel(self.loc, 1.0).to_event(1)

def skewed(latent_dim):
    return Skewed(latent_dim)
"""


def installed(folder: Path, *entries: str, module: str = ACME) -> None:
    """Install the distribution ``acme-parts`` into a folder of the path, with entry points for priors."""
    (folder / "acme_parts.py").write_text(module)
    info = folder / "acme_parts-1.2.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: acme-parts\nVersion: 1.2\n")
    (info / "entry_points.txt").write_text("\n".join(["[pyrovae.prior]", *entries]))


@pytest.fixture
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, _scratch: None) -> Iterator[Path]:
    """A folder on the path; what is imported from it is forgotten."""
    monkeypatch.syspath_prepend(tmp_path)
    yield tmp_path
    sys.modules.pop("acme_parts", None)


def test_an_entry_point_is_a_name_like_ours(elsewhere: Path, capsys: pytest.CaptureFixture[str]) -> None:
    installed(elsewhere, "skewed = acme_parts:Skewed")
    vae = make_vae(3, latent_dim=2, hidden=[4], prior="skewed")
    assert "skewed" in names("prior")
    assert find("prior", "skewed") is type(vae.prior)
    assert main(["list"]) == 0
    assert f"  {'skewed':<24}Independent Gumbel dimensions." in capsys.readouterr().out.splitlines()
    vae.fit(torch.ones(8, 3), epochs=1, progress=False)
    vae.save_pretrained(elsewhere / "model")
    # In a process of its own, which never imports acme_parts by itself.
    code = (
        "import torch; from pyrovae import VAE; "
        f"print(VAE.from_pretrained({str(elsewhere / 'model')!r}).prior().log_prob(torch.zeros(2)).item())"
    )
    path = os.pathsep.join([str(elsewhere), str(Path(pyrovae.__file__).parents[1])])
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True, env=os.environ | {"PYTHONPATH": path}
    )
    assert float(done.stdout) == -2.0  # of a Gumbel, log p(0) is -1
    assert done.stderr == ""


def test_a_class_is_described_by_its_entry_point_before_any_name_was_asked_for(elsewhere: Path) -> None:
    installed(elsewhere, "skewed = acme_parts:Skewed")
    from acme_parts import Skewed  # type: ignore[import-not-found]

    assert describe(Skewed(2), "prior") == {"component": "prior", "kind": "skewed", "latent_dim": 2}


@pytest.mark.parametrize(
    ("entry", "module", "reason"),
    [
        (
            "skewed = acme_parts:Skewed",
            "import no_such_module",
            "its entry point acme_parts:Skewed does not load (ModuleNotFoundError: No module named 'no_such_module'): "
            "repair or uninstall it.",
        ),
        (
            "skewed = acme_parts:Skewd",
            ACME,
            "its entry point acme_parts:Skewd does not load (AttributeError: module 'acme_parts' has no attribute 'Skewd'): "
            "repair or uninstall it.",
        ),
        ("skewed = acme_parts:skewed", ACME, "its entry point acme_parts:skewed is a function: point it to a class."),
        ("skewed = acme_parts:skewed", "raise KeyError", "its entry point acme_parts:skewed does not load (KeyError: )"),
    ],
    ids=["no module", "no class", "no class but a function", "no message"],
)
def test_a_broken_entry_point_is_told_once_and_fails_who_asks_for_it(
    elsewhere: Path, entry: str, module: str, reason: str
) -> None:
    installed(elsewhere, entry, module=module)
    told = re.escape(f"The prior 'skewed' of acme-parts 1.2 cannot be used, because {reason}")
    with pytest.warns(RuntimeWarning, match=f"^{told}"):
        assert "skewed" not in names("prior")
    # From here on a warning would fail the test.
    assert find("prior", "standard_normal") is StandardNormal
    for _ in range(2):
        with pytest.raises(ValueError, match=f"^{told}") as caught:
            find("prior", "skewed")
        assert "\n" not in str(caught.value)


def test_a_repaired_entry_point_is_found(elsewhere: Path) -> None:
    installed(elsewhere, "skewed = acme_parts:Skewed", module="import no_such_module")
    with pytest.warns(RuntimeWarning, match="does not load"):
        names("prior")
    (elsewhere / "acme_parts.py").write_text(ACME)
    invalidate_caches()
    assert find("prior", "skewed")(2)().event_shape == (2,)


def test_an_entry_point_does_not_take_our_names(elsewhere: Path) -> None:
    installed(elsewhere, "standard_normal = acme_parts:Skewed", "skewed = acme_parts:Skewed")
    with pytest.warns(RuntimeWarning) as told:
        assert find("prior", "standard_normal") is StandardNormal
    assert [str(warning.message) for warning in told] == [
        "The prior 'standard_normal' of acme-parts 1.2 cannot be used, because that name belongs to "
        "pyrovae.priors.StandardNormal: rename the entry point, or uninstall it."
    ]
    assert find("prior", "skewed").__name__ == "Skewed"


def test_an_entry_point_and_the_decorator_agree(elsewhere: Path) -> None:
    decorated = ACME.replace("class", "from pyrovae.registry import register\n@register('prior')\nclass")
    installed(elsewhere, "skewed = acme_parts:Skewed", module=decorated)
    assert find("prior", "skewed").__module__ == "acme_parts"


@pytest.mark.usefixtures("_scratch")
def test_components_in_lists_come_back() -> None:
    @register("body")
    class Chain(nn.Module):
        def __init__(self, parts: list[nn.Module]):
            super().__init__()
            self.parts = parts

    again = build("body", json.loads(json.dumps(describe(Chain([MLP(2, [3]), MLP(3, [], 1)]), "body"))))
    assert [type(part) for part in again.parts] == [MLP, MLP]
    assert [part.in_shape for part in again.parts] == [(2,), (3,)]


class _Homemade(Prior):
    def __init__(self, width: int):
        super().__init__(2)


@pytest.mark.usefixtures("_scratch")
def test_what_cannot_be_described_says_why() -> None:
    with pytest.raises(ValueError, match=r"_Homemade is not a registered prior.*decorate its class"):
        describe(_Homemade(1), "prior")
    register("prior")(_Homemade)
    with pytest.raises(ValueError, match=r"_Homemade does not keep its argument 'width'.*self.width = width"):
        describe(_Homemade(1), "prior")
    with pytest.raises(ValueError, match=r"bernoulli.decoder is a Linear.*register a network's class"):
        describe(Bernoulli(nn.Linear(2, 3), event_shape=3), "likelihood")
    with pytest.raises(ValueError, match=r"mlp.activation is a type.*give a name or plain data"):
        describe(DiagonalNormal(MLP(3, [4], activation=nn.Tanh), 2), "encoder")


def test_numpy_numbers_become_plain() -> None:
    import numpy as np

    likelihood = Normal(MLP(np.int64(2), [np.int64(4)], (np.int64(3),)), scale=np.float32(0.5))
    assert json.loads(json.dumps(describe(likelihood, "likelihood")))["scale"] == 0.5


@pytest.mark.parametrize("component", [3, 0.5, "", "priors"])
def test_a_table_of_no_kind_of_component_is_refused(component: object) -> None:
    with pytest.raises(ValueError, match="kind"):
        registry.build("prior", {"kind": "flow", "latent_dim": 2, "base": {"component": component}})
