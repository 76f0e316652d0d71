"""Models as graphs of torch.export and ONNX, and on a hub that is a folder."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

import pyrovae as pv

PARTS: dict[str, dict[str, Any]] = {
    "plain": {},
    "counts": {"likelihood": "negative_binomial", "encoder": "full_covariance_normal"},
    "flow": {"encoder": "flow"},
}


@pytest.mark.parametrize("name", PARTS)
def test_graphs_of_torch_export_give_the_models_numbers(name: str, tmp_path: Path):
    vae = pv.make_vae((1, 3, 3), latent_dim=2, hidden=[8], **PARTS[name])
    x, z = torch.ones(7, 1, 3, 3), torch.randn(7, 2)
    files = vae.export(tmp_path)
    assert [path.name for path in files] == ["encoder.pt2", "decoder.pt2"]
    assert sorted(tmp_path.iterdir()) == sorted(files)
    encoder, decoder = (torch.export.load(path).module() for path in files)
    with torch.no_grad():
        torch.testing.assert_close(encoder(x), vae.embed(x), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(decoder(z), vae.decode(z).mean, rtol=1e-4, atol=1e-5)
        assert encoder(x[:1]).shape == (1, 2)


def test_graphs_of_onnx_give_the_models_numbers(tmp_path: Path):
    runtime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    vae = pv.make_vae(9, latent_dim=2, hidden=[8])
    x, z = torch.rand(7, 9).round(), torch.randn(7, 2)
    for path, given, expected in zip(
        vae.export(tmp_path, format="onnx"), (x, z), (vae.embed(x), vae.decode(z).mean), strict=True
    ):
        session = runtime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        (found,) = session.run(None, {session.get_inputs()[0].name: given.numpy()})
        torch.testing.assert_close(torch.as_tensor(found), expected.detach(), rtol=1e-4, atol=1e-5)


def test_what_cannot_be_exported_is_said_and_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    vae = pv.make_vae(9, latent_dim=2, hidden=[8])
    with pytest.raises(ValueError, match='format must be "torch" or "onnx", got'):
        vae.export(tmp_path, format="tf")  # type: ignore[arg-type]
    monkeypatch.setattr(vae, "_encoder_input", lambda x: x if float(x.sum()) > 3 else -x)
    with pytest.raises(ValueError, match=r"The encoder cannot be exported: torch\.export says"):
        vae.export(tmp_path)
    assert not list(tmp_path.iterdir())
    assert vae.training


def test_a_graph_with_other_numbers_is_not_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    vae = pv.make_vae(9, latent_dim=2, hidden=[8])
    calls = []

    def drifting(x: torch.Tensor) -> torch.Tensor:
        calls.append(0)
        return x * len(calls)

    monkeypatch.setattr(vae, "_encoder_input", drifting)
    with pytest.raises(ValueError, match="The exported encoder gives other numbers, by up to"):
        vae.export(tmp_path)
    assert not list(tmp_path.iterdir())


class FolderHub:
    """What is used of huggingface_hub.HfApi, on a folder."""

    def __init__(self, root: Path):
        self.root, self.asked = root, []

    def create_repo(self, repo_id: str, *, private: bool, exist_ok: bool) -> None:
        assert exist_ok
        self.asked.append(("private", private))
        (self.root / repo_id).mkdir(parents=True, exist_ok=True)

    def upload_folder(self, *, repo_id: str, folder_path: str, commit_message: str) -> str:
        shutil.copytree(folder_path, self.root / repo_id, dirs_exist_ok=True)
        return f"https://hub/{repo_id}/commit/1"

    def snapshot_download(self, *, repo_id: str, revision: str | None, allow_patterns: list[str]) -> str:
        self.asked.append(("revision", revision))
        found = self.root / "cache" / repo_id
        found.mkdir(parents=True, exist_ok=True)
        for name in allow_patterns:
            shutil.copy(self.root / repo_id / name, found)
        return str(found)


def test_a_model_goes_to_the_hub_and_back(tmp_path: Path):
    hub = FolderHub(tmp_path)
    vae = pv.make_vae(9, latent_dim=2, hidden=[8], prior="vamp")
    assert vae.push_to_hub("me/digits", private=True, hub=hub) == "https://hub/me/digits/commit/1"
    card = (tmp_path / "me/digits/README.md").read_text()
    assert 'pv.VAE.from_pretrained("hf://me/digits")' in card
    assert "VAE` of" in card
    again = pv.VAE.from_pretrained("hf://me/digits", revision="main", hub=hub)
    x = torch.ones(3, 9)
    assert torch.equal(again.embed(x), vae.embed(x))
    assert hub.asked == [("private", True), ("revision", "main")]
    assert {path.name for path in (tmp_path / "cache/me/digits").iterdir()} == {"model.json", "model.safetensors"}
    for wrong in ("hf://digits", "hf://me/", "hf://a/b/c"):
        with pytest.raises(ValueError, match='must be named "hf://owner/name", got'):
            pv.VAE.from_pretrained(wrong, hub=hub)


def test_a_folder_is_never_looked_up_on_the_hub():
    with pytest.raises(FileNotFoundError, match="no file me/digits"):
        pv.VAE.from_pretrained("me/digits", hub=object())


def test_a_missing_package_is_named(monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)  # as if it were not installed
    with pytest.raises(ValueError, match=r'huggingface_hub is not installed: pip install "pyrovae\[hub\]"'):
        pv.make_vae(9, latent_dim=2, hidden=[8]).push_to_hub("me/digits")
