"""Weights found, identified and read from every layout, and refused where they are not what they say."""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import threading
from collections.abc import Iterator
from dataclasses import asdict
from functools import partial
from http.server import BaseHTTPRequestHandler, SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import esm
import pytest
import torch
from safetensors.torch import save_file
from torch import Tensor

from plmsae_cli.config.errors import UserError
from plmsae_cli.plm.alphabet import encode, pack
from plmsae_cli.plm.esm2 import ESM2, ESM2Config
from plmsae_cli.plm.esm2 import PUBLISHED as PUBLISHED_SHAPES
from plmsae_cli.runtime.models import load_plm
from plmsae_cli.store import weights as module
from plmsae_cli.store.digests import remembered_sha256
from plmsae_cli.store.fs import Store
from plmsae_cli.store.weight_names import state_shapes
from plmsae_cli.store.weights import PUBLISHED, load_state, resolve_weights, save_model

CONFIG = ESM2Config(num_layers=6, d=32, num_heads=4)
NAME = "esm2_t6_8M_UR50D"
SEQUENCES = ["MKTAYIAKQR", "GAVLX", "M"]


@pytest.fixture(autouse=True)
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache and a torch hub folder of the test's own; downloads go nowhere."""
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))
    monkeypatch.setenv("PLMSAE_WEIGHTS_URL", "http://127.0.0.1:9/models")
    monkeypatch.setenv("NO_PROXY", "127.0.0.1,localhost")
    return tmp_path / "cache"


@pytest.fixture(scope="module")
def peer() -> torch.nn.Module:
    """fair-esm's module, every number of it random, frequencies rounded to fp16 as in the published files."""
    model = esm.model.esm2.ESM2(CONFIG.num_layers, CONFIG.d, CONFIG.num_heads)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * 0.3)
        for layer in model.layers:
            layer.self_attn.rot_emb.inv_freq.copy_(layer.self_attn.rot_emb.inv_freq.half().float())
    return model.eval()


def settings() -> argparse.Namespace:
    return argparse.Namespace(
        encoder_layers=6, encoder_embed_dim=32, encoder_attention_heads=4, token_dropout=True, arch="esm2"
    )


def published_state(peer: torch.nn.Module) -> dict[str, Tensor]:
    """Names as in the published files: the head under `encoder.`, the rest under
    `encoder.sentence_encoder.`."""
    return {
        ("encoder." if name.startswith("lm_head") else "encoder.sentence_encoder.") + name: tensor.clone()
        for name, tensor in peer.state_dict().items()
        if not name.startswith("contact_head")
    }


def write_pt(path: Path, peer: torch.nn.Module, layout: str = "cfg", **changes: object) -> Path:
    state = published_state(peer)
    about = {"cfg": {"model": settings(), "task": None}} if layout == "cfg" else {"args": settings()}
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save({**about, "model": state, **changes}, path)
    return path


def hugging_face_name(name: str) -> str:
    """fair-esm's name of a tensor to that in transformers' EsmForMaskedLM."""
    if name.startswith("lm_head"):
        return "lm_head.decoder.weight" if name == "lm_head.weight" else name
    head, _, rest = name.partition(".")
    if head == "embed_tokens":
        return f"esm.embeddings.word_embeddings.{rest}"
    if head != "layers":
        return f"esm.encoder.{name}" if head == "emb_layer_norm_after" else f"esm.{name}"
    number, _, rest = rest.partition(".")
    part, kind = rest.rsplit(".", 1)
    places = {
        "self_attn.q_proj": "attention.self.query",
        "self_attn.k_proj": "attention.self.key",
        "self_attn.v_proj": "attention.self.value",
        "self_attn.rot_emb": "attention.self.rotary_embeddings",
        "self_attn.out_proj": "attention.output.dense",
        "self_attn_layer_norm": "attention.LayerNorm",
        "fc1": "intermediate.dense",
        "fc2": "output.dense",
        "final_layer_norm": "LayerNorm",
    }
    return f"esm.encoder.layer.{number}.{places[part]}.{kind}"


def write_hugging_face(folder: Path, peer: torch.nn.Module, shards: int = 1, **changes: object) -> Path:
    folder.mkdir(parents=True)
    state = {hugging_face_name(n): t.clone() for n, t in peer.state_dict().items()}
    state["esm.embeddings.position_ids"] = torch.arange(1026)[None]
    if shards > 1:  # as transformers 5 writes them
        new = {".LayerNorm.weight": ".LayerNorm.gamma", ".LayerNorm.bias": ".LayerNorm.beta"}
        for old, name in new.items():
            state = {n.replace(old, name): t for n, t in state.items()}
    about = {
        "model_type": "esm",
        "hidden_size": 32,
        "num_hidden_layers": 6,
        "num_attention_heads": 4,
        "intermediate_size": 128,
        "position_embedding_type": "rotary",
        "emb_layer_norm_before": False,
        "token_dropout": True,
        "layer_norm_eps": 1e-5,
        "mask_token_id": 32,
        "pad_token_id": 1,
        "vocab_size": 33,
    }
    (folder / "config.json").write_text(json.dumps({**about, **changes}))
    if shards == 1:
        save_file(state, folder / "model.safetensors")
        return folder
    index = {name: f"model-{i % shards}.safetensors" for i, name in enumerate(sorted(state))}
    for file in set(index.values()):
        save_file({n: state[n] for n, where in index.items() if where == file}, folder / file)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": index}))
    return folder


def agrees(model: ESM2, peer: torch.nn.Module) -> bool:
    """The same representations and logits, sequence by sequence."""
    packed = pack([encode(s) for s in SEQUENCES])
    result = model(packed.tokens_T, packed.documents, layers=[0, 3, 6], logits=True)
    start = 0
    for length in packed.lengths:
        rows = slice(start, start + length)
        with torch.no_grad():
            expected = peer(packed.tokens_T[None, rows].long(), repr_layers=[0, 3, 6])
        for k, layer in expected["representations"].items():
            torch.testing.assert_close(result.hidden[k][rows], layer[0], rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(result.logits[rows], expected["logits"][0], rtol=1e-4, atol=1e-4)
        start += length
    return True


def test_the_stores_names_and_shapes_are_the_models() -> None:
    for config in (CONFIG, ESM2Config(2, 24, 2, token_dropout=False, vocab=40)):
        with torch.device("meta"):
            model = ESM2(config)
        assert state_shapes(asdict(config)) == {n: tuple(t.shape) for n, t in model.state_dict().items()}
    assert {name: config.num_layers for name, config in PUBLISHED_SHAPES.items()} == PUBLISHED


@pytest.mark.parametrize("layout", ["cfg", "args"])
def test_a_fair_esm_checkpoint_is_read_and_converted_once(
    tmp_path: Path, peer: torch.nn.Module, layout: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = write_pt(tmp_path / "mine.pt", peer, layout)
    info = resolve_weights(str(path), Store())
    assert (info.name, info.format, info.config) == ("mine", "fair-esm", asdict(CONFIG))
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()
    assert agrees(load_plm(str(path), Store()), peer)

    def unpickled_again(*_: object) -> None:
        raise AssertionError("the pickle was read a second time")

    monkeypatch.setattr(module, "read_pickle", unpickled_again)
    monkeypatch.setattr(hashlib, "file_digest", unpickled_again)
    assert resolve_weights(str(path), Store()) == info


def test_a_changed_file_is_another_model(tmp_path: Path, peer: torch.nn.Module) -> None:
    path = write_pt(tmp_path / "mine.pt", peer)
    before = resolve_weights(str(path), Store()).sha256
    state = published_state(peer)
    state["encoder.lm_head.bias"] += 1
    write_pt(path, peer, model=state)
    os.utime(path, ns=(1, 1))
    info = resolve_weights(str(path), Store())
    assert info.sha256 == hashlib.sha256(path.read_bytes()).hexdigest() != before
    assert torch.equal(load_state(info)["lm_head.bias"], state["encoder.lm_head.bias"])


def test_a_hash_of_a_file_that_was_written_to_meanwhile_is_not_remembered(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path, real = tmp_path / "weights", hashlib.file_digest
    path.write_bytes(b"one")

    def late(*arguments: Any) -> Any:
        monkeypatch.setattr(hashlib, "file_digest", real)
        found = real(*arguments)
        path.write_bytes(b"and more")
        return found

    monkeypatch.setattr(hashlib, "file_digest", late)
    remembered_sha256(path, tmp_path / "cache")
    assert not (tmp_path / "cache").exists()
    assert remembered_sha256(path, tmp_path / "cache") == hashlib.sha256(b"and more").hexdigest()
    assert len(list((tmp_path / "cache" / "sha256").iterdir())) == 1


@pytest.mark.parametrize("shards", [1, 3])
def test_a_hugging_face_folder_is_read(tmp_path: Path, peer: torch.nn.Module, shards: int) -> None:
    folder = write_hugging_face(tmp_path / "esm2", peer, shards)
    info = resolve_weights(str(folder), Store())
    assert (info.name, info.format, info.config) == ("esm2", "hf", asdict(CONFIG))
    assert agrees(load_plm(str(folder), Store()), peer)


def test_frequencies_are_computed_only_where_the_file_has_none(tmp_path: Path, peer: torch.nn.Module) -> None:
    folder = write_hugging_face(tmp_path / "esm2", peer)
    kept = load_plm(str(folder), Store()).rotary.inv_freq
    assert torch.equal(kept, peer.layers[0].self_attn.rot_emb.inv_freq)  # type: ignore[index, union-attr]
    state = load_state(resolve_weights(str(folder), Store()))
    state.pop("rotary.inv_freq")
    save_model(Store(), str(tmp_path / "ours"), state, asdict(CONFIG), {})
    fresh = load_plm(str(tmp_path / "ours"), Store()).rotary.inv_freq
    assert torch.equal(fresh, ESM2(CONFIG).rotary.inv_freq)
    assert not torch.equal(fresh, kept)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_our_own_folder_gives_back_every_bit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    model = ESM2(CONFIG)
    model.init_weights(1)
    model.to(dtype)
    folder = tmp_path / "run" / "plm"
    facts = {"name": "demo", "tokens": 12}
    records = save_model(Store(), str(folder), model.state_dict(), asdict(CONFIG), facts)
    assert sorted(Path(r.name).name for r in records) == ["config.json", "model.safetensors"]
    assert all(r.size == Path(r.name).stat().st_size for r in records)
    assert json.loads((folder / "config.json").read_text())["facts"] == facts
    monkeypatch.setattr(module, "BUNDLED", folder)
    for name in (str(folder), "bundled"):
        info = resolve_weights(name, Store())
        assert (info.name, info.format, info.config) == ("demo", "plmsae", asdict(CONFIG))
        loaded = load_plm(name, Store(), dtype=dtype)
        assert not loaded.training
        for key, tensor in model.state_dict().items():
            assert torch.equal(loaded.state_dict()[key], tensor), key


def test_a_run_is_the_model_that_it_trained(tmp_path: Path) -> None:
    model = ESM2(CONFIG)
    model.init_weights(1)
    save_model(Store(), str(tmp_path / "my-run" / "plm"), dict(model.state_dict()), asdict(CONFIG), {})
    of_run, of_folder = (resolve_weights(str(tmp_path / place), Store()) for place in ("my-run", "my-run/plm"))
    assert (of_run.path, of_run.sha256, of_run.name) == (of_folder.path, of_folder.sha256, "my-run")


def test_training_loaded_weights_leaves_the_file_alone(tmp_path: Path, peer: torch.nn.Module) -> None:
    folder = write_hugging_face(tmp_path / "esm2", peer)
    before = (folder / "model.safetensors").read_bytes()
    model = load_plm(str(folder), Store())
    packed = pack([encode("MKTAYIAKQR")])
    model(packed.tokens_T, packed.documents, logits=True).logits.square().sum().backward()
    torch.optim.SGD(model.parameters(), lr=0.1).step()
    assert (folder / "model.safetensors").read_bytes() == before


class Touch:
    """Unpickled by a careless reader, it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[object, tuple[str, int]]:
        return os.mkdir, (str(self.path), 0o777)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_pickle_with_other_objects_is_refused_and_runs_nothing(
    tmp_path: Path, peer: torch.nn.Module, legacy: bool
) -> None:
    path = tmp_path / "evil.pt"
    data = {"cfg": {"model": settings()}, "model": published_state(peer), "extra": Touch(tmp_path / "ran")}
    torch.save(data, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(UserError, match=r"holds an object of posix\.mkdir"):
        resolve_weights(str(path), Store())
    assert not (tmp_path / "ran").exists()
    assert not list((tmp_path / "cache" / "converted").glob("*.safetensors"))


def test_damaged_files_are_named(tmp_path: Path, peer: torch.nn.Module) -> None:
    path = write_pt(tmp_path / "cut.pt", peer)
    path.write_bytes(path.read_bytes()[:5000])
    with pytest.raises(UserError, match=r"cut\.pt is not a checkpoint"):
        resolve_weights(str(path), Store())
    path.write_text("no pickle")
    with pytest.raises(UserError, match=r"torch can read: [A-Z]\w+Error: "):
        resolve_weights(str(path), Store())
    folder = write_hugging_face(tmp_path / "esm2", peer)
    (folder / "model.safetensors").write_bytes((folder / "model.safetensors").read_bytes()[:-4])
    with pytest.raises(UserError, match=r"model\.safetensors is not a sound"):
        resolve_weights(str(folder), Store())  # before anything is planned
    (folder / "config.json").write_text("[1")
    with pytest.raises(UserError, match=r"config\.json does not describe"):
        resolve_weights(str(folder), Store())


def test_weights_that_do_not_fit_are_refused(tmp_path: Path, peer: torch.nn.Module) -> None:
    state = published_state(peer)
    few = {name: t for name, t in state.items() if ".layers.5." not in name}
    with pytest.raises(UserError, match=r"missing: layers\.5\..*and 13 more"):
        resolve_weights(str(write_pt(tmp_path / "few.pt", peer, model=few)), Store())
    wide = {**state, "encoder.sentence_encoder.layers.0.fc1.bias": torch.zeros(64)}
    with pytest.raises(UserError, match=r"layers\.0\.fc1\.bias is \(64,\), not \(128,\)"):
        resolve_weights(str(write_pt(tmp_path / "wide.pt", peer, model=wide)), Store())
    untied = {**state, "encoder.lm_head.weight": torch.zeros(33, 32)}
    with pytest.raises(UserError, match="not the embedding's"):
        resolve_weights(str(write_pt(tmp_path / "untied.pt", peer, model=untied)), Store())
    odd = {**state, "encoder.sentence_encoder.layers.3.self_attn.rot_emb.inv_freq": torch.ones(4)}
    with pytest.raises(UserError, match="frequencies differ between layers"):
        resolve_weights(str(write_pt(tmp_path / "odd.pt", peer, model=odd)), Store())
    older = argparse.Namespace(arch="roberta_large", layers=33)
    with pytest.raises(UserError, match=r"not a fair-esm ESM-2 checkpoint.*encoder_layers"):
        resolve_weights(str(write_pt(tmp_path / "esm1.pt", peer, "args", args=older)), Store())
    with pytest.raises(UserError, match=r"not of this model: layers\.5"):
        load_plm(str(write_hugging_face(tmp_path / "shallow", peer, num_hidden_layers=5)), Store())
    with pytest.raises(UserError, match="position_embedding_type is 'absolute'; ESM-2 has 'rotary'"):
        resolve_weights(str(write_hugging_face(tmp_path / "b", peer, position_embedding_type="absolute")), Store())
    tensors = {n: t for n, t in ESM2(CONFIG).state_dict().items() if n != "rotary.inv_freq"}
    save_model(Store(), str(tmp_path / "heads"), tensors, {**asdict(CONFIG), "num_heads": 5}, {})
    with pytest.raises(UserError, match="d 32 with num_heads 5"):
        load_plm(str(tmp_path / "heads"), Store())


def test_what_is_not_there_is_explained(tmp_path: Path, peer: torch.nn.Module) -> None:
    with pytest.raises(UserError) as error:
        resolve_weights("esm2_t33_650M_UR50", Store())
    assert error.value.hint == "did you mean esm2_t33_650M_UR50D?"
    with pytest.raises(UserError, match=r"there is no file .*none\.pt"):
        resolve_weights(str(tmp_path / "none.pt"), Store())
    folder = write_hugging_face(tmp_path / "old", peer)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(UserError, match=r"no model\.safetensors"):
        resolve_weights(str(folder), Store())
    folder = write_hugging_face(tmp_path / "part", peer, shards=2)
    (folder / "model-1.safetensors").unlink()
    with pytest.raises(UserError, match=r"names model-1\.safetensors, which is not beside it"):
        resolve_weights(str(folder), Store())


@pytest.mark.parametrize("place", ["torch/hub/checkpoints", "cache/weights"])
def test_published_names_are_found_where_they_were_put(tmp_path: Path, peer: torch.nn.Module, place: str) -> None:
    write_pt(tmp_path / place / f"{NAME}.pt", peer)
    assert agrees(load_plm(NAME, Store()), peer)
    assert resolve_weights(NAME, Store()).name == NAME


def test_absent_published_weights_say_where_they_belong(tmp_path: Path) -> None:
    for download in (True, False):
        with pytest.raises(UserError) as error:
            resolve_weights(NAME, Store(), download=download)
        text = str(error.value)
        for part in (
            f"{NAME}.pt",
            str(tmp_path / "torch" / "hub" / "checkpoints"),
            str(tmp_path / "cache" / "weights"),
            f"https://dl.fbaipublicfiles.com/fair-esm/models/{NAME}.pt",
        ):
            assert part in text
        assert ("127.0.0.1:9" in text) == download


def test_a_file_of_another_model_does_not_pass_for_the_name(tmp_path: Path, peer: torch.nn.Module) -> None:
    write_pt(tmp_path / "cache" / "weights" / "esm2_t12_35M_UR50D.pt", peer)
    with pytest.raises(UserError, match="holds a model of 6 layers, esm2_t12_35M_UR50D has 12"):
        resolve_weights("esm2_t12_35M_UR50D", Store())


class Quiet(SimpleHTTPRequestHandler):
    def log_message(self, *_: object) -> None: ...


class Short(BaseHTTPRequestHandler):
    """Promises more than it sends."""

    def do_GET(self) -> None:
        self.send_response(200)
        self.send_header("Content-Length", "1000")
        self.end_headers()
        self.wfile.write(b"x" * 400)

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def served(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A folder whose files the weights URL serves."""
    folder = tmp_path / "served"
    folder.mkdir()
    with ThreadingHTTPServer(("127.0.0.1", 0), partial(Quiet, directory=str(folder))) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PLMSAE_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}/")
        yield folder
        server.shutdown()


def test_published_weights_are_downloaded_once(tmp_path: Path, served: Path, peer: torch.nn.Module) -> None:
    write_pt(served / f"{NAME}.pt", peer)
    assert agrees(load_plm(NAME, Store()), peer)
    kept = tmp_path / "cache" / "weights" / f"{NAME}.pt"
    assert kept.read_bytes() == (served / f"{NAME}.pt").read_bytes()
    (served / f"{NAME}.pt").unlink()
    assert agrees(load_plm(NAME, Store()), peer)
    with pytest.raises(UserError, match="404"):
        resolve_weights("esm2_t12_35M_UR50D", Store())


def test_a_download_cut_short_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("plmsae_cli.store.download.PAUSE_S", 0.0)
    with ThreadingHTTPServer(("127.0.0.1", 0), Short) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setenv("PLMSAE_WEIGHTS_URL", f"http://127.0.0.1:{server.server_port}")
        with pytest.raises(UserError, match="after 400 of 1,000 bytes"):
            resolve_weights(NAME, Store())
        server.shutdown()
    left = [p.name for p in (tmp_path / "cache" / "weights").iterdir()]
    assert left == [f".{NAME}.pt.lock"]


def test_a_cache_that_cannot_be_written_is_named(tmp_path: Path, peer: torch.nn.Module) -> None:
    path = write_pt(tmp_path / "mine.pt", peer)
    blocked = tmp_path / "file"
    blocked.write_text("not a folder")
    with pytest.raises(UserError, match=r"could not be converted into .*file") as error:
        resolve_weights(str(path), Store(), blocked / "cache")
    assert "PLMSAE_CACHE" in str(error.value)
    # Folders need no copy, so they need no cache.
    folder = write_hugging_face(tmp_path / "esm2", peer)
    assert resolve_weights(str(folder), Store(), blocked / "cache").config == asdict(CONFIG)


def test_weights_may_lie_in_s3(s3: object, tmp_path: Path) -> None:
    model = ESM2(CONFIG)
    model.init_weights(2)
    store, folder = s3.store(), s3.url("runs", "plm")  # type: ignore[attr-defined]
    save_model(store, folder, model.state_dict(), asdict(CONFIG), {})
    loaded = load_plm(folder, store)
    assert all(torch.equal(loaded.state_dict()[n], t) for n, t in model.state_dict().items())
