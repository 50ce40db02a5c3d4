"""Beside the projects' own code, on random weights: theirs read by us, ours read by SAELens.

pip install --no-deps sae-lens dictionary-learning jaxtyping wadler-lindig simple-parsing docstring-parser
"""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor
from torch.testing import assert_close

from plmsae_cli import load_sae
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.imported import ImportedSAE
from plmsae_cli.runtime.dictionaries import read_dictionary, write_saelens
from plmsae_cli.runtime.saved import SavedSAE
from plmsae_cli.sae.architectures import ARCHITECTURES, name_of
from plmsae_cli.sae.dictionary import Dictionary

SCRIPT = Path(__file__).with_name("peers.py")
D, N = 8, 24
ABSENT = [name for name in ("sae_lens", "dictionary_learning") if importlib.util.find_spec(name) is None]
needs_peers = pytest.mark.skipif(bool(ABSENT), reason=f"not installed: {', '.join(ABSENT)}")


def peers(verb: str, folder: Path) -> None:
    done = subprocess.run([sys.executable, str(SCRIPT), verb, str(folder)], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr


def ours(architecture: str) -> Dictionary:
    """A dictionary with random numbers everywhere and decoder rows of norm 1."""
    k = {"k": 4} if "topk" in architecture else {}
    model = ARCHITECTURES[architecture](D, N, **k)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for name, tensor in model.trained().items():
            drawn = torch.randn(tensor.shape, generator=generator)
            if name == "theta":
                tensor.fill_(0.6)
            elif name == "log_theta_N":
                tensor.copy_(drawn - 1)
            elif tensor.is_floating_point():
                tensor.copy_(drawn)
        model.w_dec_ND.div_(model.w_dec_ND.norm(dim=1, keepdim=True))
    return model


def saved(model: Dictionary, layer: int = 3, num_layers: int = 6) -> SavedSAE:
    return SavedSAE(model, {"layer": layer, "num_layers": num_layers, "weights": {"name": "esm2_t6_8M_UR50D"}})


@needs_peers
def test_theirs_are_read(tmp_path: Path) -> None:
    peers("save", tmp_path)
    folders = sorted(path.parent for path in tmp_path.glob("*/*/codes.safetensors"))
    assert len(folders) == 17
    for folder in folders:
        model, codes = load_sae(folder), load_file(folder / "codes.safetensors")
        with torch.no_grad():
            assert_close(model(codes["x"]), codes["reconstruction"], rtol=1e-5, atol=1e-5, msg=str(folder))
            found_BN = model.encode_dense(codes["x"])
        assert torch.equal(found_BN > 0, codes["latents"] > 0), folder
        # The latents themselves, up to one factor a latent: the norm that left the decoder's row.
        factor_N = found_BN.sum(0) / codes["latents"].sum(0).clamp(min=1e-9)
        assert_close(found_BN, codes["latents"] * factor_N, rtol=1e-4, atol=1e-5, msg=str(folder))


@needs_peers
def test_saelens_reads_ours(tmp_path: Path) -> None:
    x = torch.randn(64, D, generator=torch.Generator().manual_seed(2))
    save_file({"x": x}, tmp_path / "x.safetensors")
    names = [name for name in ARCHITECTURES if name != "switch"]
    expected: dict[str, Tensor] = {}
    for name in names:
        model = ours(name)
        expected[name] = model.encode_dense(x).detach()
        assert write_saelens(saved(model), tmp_path / name) == ["README.md", "cfg.json", "sae_weights.safetensors"]
    peers("load", tmp_path)
    for name in names:
        found = load_file(tmp_path / f"{name}.safetensors")
        assert_close(found["latents"], expected[name], rtol=1e-5, atol=1e-5, msg=name)
        assert_close(found["reconstruction"], ours(name)(x).detach(), rtol=1e-5, atol=1e-5, msg=name)


@pytest.mark.parametrize("name", [name for name in ARCHITECTURES if name != "switch"])
def test_ours_comes_back_as_it_was(tmp_path: Path, name: str) -> None:
    """Written for SAELens and read again: the same function, and the same layer."""
    model, x = ours(name), torch.randn(64, D, generator=torch.Generator().manual_seed(2))
    write_saelens(saved(model), tmp_path / "folder")
    back = read_dictionary(ImportedSAE(path=str(tmp_path / "folder")))
    assert (back.weights, back.layer) == ("esm2_t6_8M_UR50D", 3)
    assert name_of(back.model) == {
        "topk": "topk",
        "multi_topk": "topk",
        "matryoshka_topk": "topk",
        "relu_l1": "relu_l1",
    }.get(name, "gated" if name == "gated" else "jumprelu")
    assert_close(back.model.encode_dense(x), model.encode_dense(x), rtol=1e-5, atol=1e-5)


def test_what_saelens_lacks_is_not_written(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no architecture like switch"):
        write_saelens(saved(ARCHITECTURES["switch"](D, N, k=2)), tmp_path / "folder")
    assert not (tmp_path / "folder").exists()
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("")
    with pytest.raises(UserError, match="not an empty folder"):
        write_saelens(saved(ours("topk")), tmp_path / "full")
