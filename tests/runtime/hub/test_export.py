"""Exported folders: loaded by transformers alone, in a process that cannot import this package, with the same logits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from dataclasses import asdict
from pathlib import Path

import pytest
import torch

import plmsae_cli
from plmsae_cli.config.errors import UserError
from plmsae_cli.plm.alphabet import MASK, encode, pack
from plmsae_cli.plm.esm2 import ESM2Config
from plmsae_cli.plm.unet_config import UNetConfig
from plmsae_cli.runtime.hub import export_run, push
from plmsae_cli.runtime.models import build_model, load_plm
from plmsae_cli.store.fs import Store
from plmsae_cli.store.tensorfile import TensorFile
from plmsae_cli.store.weights import save_model

SEQUENCES = [
    "MKTAYIAKQRQISFVKSHFSRQ",
    "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG",
    "W",
    "MKT<mask>YIAK<mask>",
]
CONFIGS: dict[str, ESM2Config | UNetConfig] = {
    "esm2": ESM2Config(2, 32, 2),
    "unet": UNetConfig(4, 32, 2),
    "tied": UNetConfig(4, 32, 2, tie_embeddings=True, attention_soft_cap=20.0, mask_embedding=False),
    "learned": UNetConfig(2, 32, 2, num_att_tokens=16, value_embeddings=False),
    "plain": UNetConfig(3, 32, 2, unet=False, soft_logit_cap=10.0),
}
CLEAN = """
import sys
sys.path = [p for p in sys.path if p not in ("", sys.argv[1])]
try:
    import plmsae_cli
    raise SystemExit("plmsae can be imported")
except ImportError:
    pass
try:
    import torchvision
except (ImportError, RuntimeError):  # of another build than torch: transformers must not find it
    sys.modules["torchvision"] = None
import json
from pathlib import Path
import torch
from safetensors.torch import save_file
from transformers import AutoModel, AutoModelForMaskedLM, AutoTokenizer
root = Path(sys.argv[2])
for folder in sorted(root.iterdir()):
    sequences = json.loads(sys.argv[3])
    tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=True)
    batch = tokenizer(sequences, return_tensors="pt", padding=True)
    ids, seen = batch["input_ids"], batch["attention_mask"]
    model, told = AutoModelForMaskedLM.from_pretrained(folder, trust_remote_code=True, output_loading_info=True)
    assert not any(told[k] for k in ("missing_keys", "unexpected_keys", "mismatched_keys")), told
    with torch.inference_mode():
        logits = model.eval()(input_ids=ids, attention_mask=seen).logits
        base = AutoModel.from_pretrained(folder, trust_remote_code=True).eval()
        hidden = base(input_ids=ids, attention_mask=seen, output_hidden_states=True)
    # Saved again by transformers, and loaded once more: tied weights are where that goes wrong.
    again = folder / "again"
    model.save_pretrained(again)
    with torch.inference_mode():
        second = AutoModelForMaskedLM.from_pretrained(again, trust_remote_code=True).eval()(input_ids=ids, attention_mask=seen)
    assert torch.equal(second.logits, logits)
    found = {"ids": ids, "logits": logits, "last": hidden.last_hidden_state, "first": hidden.hidden_states[0]}
    save_file({k: v.contiguous() for k, v in found.items()}, folder / "found.safetensors")
"""


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All models exported, and what one clean process made of them."""
    root = tmp_path_factory.mktemp("hub")
    for name, config in CONFIGS.items():
        model = build_model(config)
        model.init_weights(5)
        generator = torch.Generator().manual_seed(1)
        with torch.no_grad():  # projections that begin at zero would hide mistakes
            for parameter in model.parameters():
                parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        save_model(Store(), str(root / "runs" / name / "plm"), dict(model.state_dict()), asdict(config), {})
        export_run(str(root / "runs" / name), root / "out" / name)
    package = str(Path(plmsae_cli.__file__).parents[1])
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    environment |= {"HF_HUB_OFFLINE": "1", "HF_HOME": str(root / "home"), "OMP_NUM_THREADS": "1"}
    # An installed package would be found whatever the path: -S leaves site-packages out, so they are named.
    site = [p for p in sys.path if p.endswith("-packages")]
    environment["PYTHONPATH"] = os.pathsep.join(site)
    command = [sys.executable, "-S", "-c", CLEAN, package, str(root / "out"), json.dumps(SEQUENCES)]
    done = subprocess.run(command, env=environment, cwd=root, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return root


@pytest.mark.parametrize("name", CONFIGS)
def test_a_clean_process_has_the_same_logits(exported: Path, name: str) -> None:
    found = TensorFile(Store(), str(exported / "out" / name / "found.safetensors"))
    model = load_plm(str(exported / "runs" / name / "plm"))
    ids, logits, last, first = (found.read(key) for key in ("ids", "logits", "last", "first"))
    for row, sequence in enumerate(SEQUENCES):
        residues = encode(sequence.replace("<mask>", "-"))
        residues[residues == encode("-")[0]] = MASK
        packed = pack([residues])
        length = len(residues) + 2
        assert ids[row, :length].tolist() == packed.tokens_T.tolist()
        layers = model.config.num_layers
        with torch.inference_mode():
            own = model(packed.tokens_T, packed.documents, layers=[0, layers], logits=True)
        torch.testing.assert_close(logits[row, :length], own.logits, rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(last[row, :length], own.hidden[layers], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(first[row, :length], own.hidden[0], rtol=1e-4, atol=1e-4)
        assert own.logits is not None
        assert own.logits.std() > 0.1  # not all one number


def test_an_exported_esm2_is_read_back(exported: Path) -> None:
    own, again = (load_plm(str(exported / place)) for place in ("runs/esm2/plm", "out/esm2"))
    assert all(torch.equal(a, b) for a, b in zip(own.parameters(), again.parameters(), strict=True))


def test_only_a_unet_needs_code(exported: Path) -> None:
    names = {name: {p.name for p in (exported / "out" / name).iterdir()} for name in ("esm2", "unet")}
    assert names["unet"] - names["esm2"] == {"modeling_plmsae_unet.py"}
    assert json.loads((exported / "out/esm2/config.json").read_text())["architectures"] == ["EsmForMaskedLM"]


def test_what_cannot_be_exported_is_refused(exported: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is not an empty folder"):
        export_run(str(exported / "runs/esm2"), exported / "out" / "esm2")
    with pytest.raises(UserError, match="holds no language model"):
        export_run(str(tmp_path), tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_push_is_refused_without_a_token(exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("huggingface_hub")
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(constants, "HF_TOKEN_PATH", str(tmp_path / "no-token"))
    with pytest.raises(UserError, match=r"--push") as caught:
        push(exported / "out" / "esm2", "someone/model")
    assert "hf upload someone/model" in str(caught.value)
