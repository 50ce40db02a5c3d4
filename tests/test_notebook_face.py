"""`from plmsae_cli import load_plm, load_sae, open_blocks`: lazy, typed, three lines from a sequence to its latents."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import plmsae_cli
from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.executors.pipeline import run_experiment
from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.runtime.progress import PlainReporter

ASSETS = Path(plmsae_cli.__file__).parent / "data"
UBIQUITIN = "MQIFVKTLTGKTITLEVEPSDTIENVKAKIQDKEGIPPDQQRLIFAGKQLEDGRTLSDYNIQKESTLHLVLRLRGG"
LAYER = 4


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Experiment:
    """A small dictionary on the bundled model, trained for a moment."""
    experiment = Experiment.model_validate(
        {
            "name": "small",
            "root": str(tmp_path_factory.mktemp("notebook")),
            "embed": {"fasta": str(ASSETS / "smoke.fasta.gz"), "layers": [LAYER], "holdout": 0.1},
            "shuffle": {},
            "optimize": {"block_rows": 64},
            "train": {"sae": {"expansion": 2, "k": 8}, "batch_tokens": 128, "tokens": 1280},
        }
    )
    run_experiment(experiment, experiment.stages(), PlainReporter())
    return experiment


def modules_after(code: str) -> set[str]:
    """What a fresh interpreter has imported after this code."""
    command = [sys.executable, "-c", f"{code}\nimport sys, json; print(json.dumps(sorted(sys.modules)))"]
    answer = subprocess.run(command, capture_output=True, text=True, check=True)
    return set(json.loads(answer.stdout.splitlines()[-1]))


def test_importing_the_package_imports_nothing_heavy() -> None:
    found = modules_after("import plmsae_cli; plmsae_cli.__version__")
    assert {name for name in found if name.split(".")[0] == "plmsae_cli"} == {"plmsae_cli"}
    assert not {"torch", "numpy", "pyarrow", "pydantic", "typer", "rich"} & found


def test_the_face_imports_no_command_line_and_no_mirror() -> None:
    found = modules_after("from plmsae_cli import load_plm, load_sae, open_blocks")
    assert "torch" in found
    foreign = {"typer", "rich", "wandb", "litdata", "matplotlib", "jinja2", "boto3", "obstore", "esm"}
    assert not foreign & {name.split(".")[0] for name in found}
    rooms = {name.split(".")[1] for name in found if name.startswith("plmsae_cli.")}
    assert rooms <= {"config", "store", "runtime", "plm", "sae"}


def test_it_says_what_it_has() -> None:
    assert set(plmsae_cli.__all__) == {"load_plm", "load_sae", "open_blocks"}
    for name in plmsae_cli.__all__:
        assert callable(getattr(plmsae_cli, name))
        assert getattr(plmsae_cli, name).__doc__
    with pytest.raises(AttributeError, match="load_everything"):
        plmsae_cli.load_everything  # noqa: B018


def test_three_lines_encode_a_sequence(trained: Experiment) -> None:
    from plmsae_cli import load_plm, load_sae

    plm, sae = load_plm("bundled"), load_sae(f"{trained.root}/small")
    packed = pack([encode(UBIQUITIN)])
    latents = sae.encode(plm(packed.tokens_T, packed.documents, layers=[LAYER]).hidden[LAYER][packed.residue_mask_T])

    assert latents.acts_BK.shape == latents.indices_BK.shape == (len(UBIQUITIN), 8)
    # By the formula, from the exported tensors: the 8 largest of W_enc (x - b_dec) + b_enc.
    with torch.no_grad():
        x_BD = plm(packed.tokens_T, packed.documents, layers=[LAYER]).hidden[LAYER][1:-1]
        pre_BN = (x_BD - sae.b_dec_D) @ sae.w_enc_ND.T + sae.b_enc_N
    top = pre_BN.topk(8, dim=1)
    torch.testing.assert_close(latents.acts_BK.detach(), top.values.clamp(min=0), rtol=1e-4, atol=1e-4)
    same = (latents.indices_BK == top.indices) | (top.values <= 0)
    assert same.float().mean() > 0.99, "ties by rounding may change places"


def test_a_dictionary_and_a_model_are_ready_to_use(trained: Experiment) -> None:
    from plmsae_cli import load_plm, load_sae, open_blocks

    run = f"{trained.root}/small"
    one, other = load_sae(run), load_sae(Path(run) / "sae", device="cpu")
    assert not one.training
    assert all(torch.equal(a, b) for a, b in zip(one.state_dict().values(), other.state_dict().values(), strict=True))
    model = load_plm("bundled", device="cpu", dtype=torch.bfloat16)
    assert not model.training
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}

    (folder,) = Path(trained.root, "data").glob("optimize-*")
    blocks = open_blocks(folder)
    rows_RD = torch.empty(32, blocks.d, dtype=blocks.dtype)
    blocks.read_into(blocks.num_rows - 32, rows_RD)
    assert blocks.d == one.d == model.config.d
    x_BD = rows_RD.float()
    assert one(x_BD).shape == x_BD.shape
    assert (one(x_BD) - x_BD).square().sum() < (x_BD - x_BD.mean(0)).square().sum(), "better than their mean"


def test_what_is_not_there_is_one_clear_error(tmp_path: Path) -> None:
    from plmsae_cli import load_plm, load_sae

    with pytest.raises(UserError, match="holds no trained SAE"):
        load_sae(tmp_path)
    with pytest.raises(UserError, match="no published name"):
        load_plm(str(tmp_path / "nothing"))
    (tmp_path / "sae.json").write_text('{"format": "other/9"}')
    with pytest.raises(UserError, match=r"other/9.*not plmsae\.sae/1"):
        load_sae(tmp_path)
