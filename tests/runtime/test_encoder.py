"""`hf:` encoders against transformers' own hidden states, and against our own ESM-2 on one and the same folder."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest
import torch

from plmsae_cli.config.errors import UserError
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.embedding import SPECIAL_TOKENS, Embedder, Typical
from plmsae_cli.runtime.embedding.encoder import EncoderEmbedder
from plmsae_cli.store.encoders import hide_broken_torchvision
from plmsae_cli.store.fs import Store
from plmsae_cli.store.lineage import Lineage
from plmsae_cli.store.weights import load_state, resolve_weights

LETTERS = "LAGVSERTIDPKQNFYMHWCXBUZO.-"
SEQUENCES = ["MKVLAWQX", "A", "ACDEFGHIKLMNPQRSTVWYBUZOX.-" * 2, "GG", "WWWWWYYYY", "MSTNPKPQRKTKRNTNRRPQDVKFPGG"]


@pytest.fixture(scope="module")
def transformers() -> Any:
    hide_broken_torchvision()
    found = pytest.importorskip("transformers")
    found.logging.set_verbosity_error()
    found.logging.disable_progress_bar()
    return found


@pytest.fixture(autouse=True)
def fresh(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Iterator[None]:
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path / "hub"))
    yield
    Embedder._shared.clear()


def save_esm(folder: Path, tf: Any) -> Path:
    vocabulary = ["<cls>", "<pad>", "<eos>", "<unk>", *LETTERS, "<null_1>", "<mask>"]
    # The order of LETTERS is that of ESM's alphabet but for `.` and `-`, which stand last there too.
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(vocabulary))
    torch.manual_seed(0)
    config = tf.EsmConfig(
        vocab_size=33, mask_token_id=32, pad_token_id=1, hidden_size=32, num_hidden_layers=3, num_attention_heads=2,
        intermediate_size=128, position_embedding_type="rotary", emb_layer_norm_before=False, token_dropout=True,
        layer_norm_eps=1e-5, initializer_range=0.3,
    )  # fmt: skip
    tf.EsmForMaskedLM(config).save_pretrained(folder)
    tf.EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def save_bert(folder: Path, tf: Any, letters: str = LETTERS) -> Path:
    """As ProtBert: upper-case letters, parted by blanks."""
    folder.mkdir()
    (folder / "vocab.txt").write_text("\n".join(["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", *letters]))
    torch.manual_seed(1)
    config = tf.BertConfig(
        vocab_size=5 + len(letters), hidden_size=24, num_hidden_layers=4, num_attention_heads=2, intermediate_size=48,
        max_position_embeddings=80, initializer_range=0.3,
    )  # fmt: skip
    tf.BertModel(config).save_pretrained(folder)
    tf.BertTokenizer(str(folder / "vocab.txt"), do_lower_case=False).save_pretrained(folder)
    return folder


def save_t5(folder: Path, tf: Any) -> Path:
    """As ProtT5: an encoder with a decoder that is not asked, letters parted by blanks, one special token at the end."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors

    names = ["<pad>", "</s>", "<unk>", *LETTERS]
    model = Tokenizer(models.WordLevel({name: i for i, name in enumerate(names)}, unk_token="<unk>"))
    model.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    model.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 1)])
    tokeniser = tf.PreTrainedTokenizerFast(
        tokenizer_object=model, pad_token="<pad>", eos_token="</s>", unk_token="<unk>"
    )
    torch.manual_seed(2)
    config = tf.T5Config(
        vocab_size=len(names), d_model=24, d_kv=12, d_ff=48, num_layers=3, num_heads=2, initializer_factor=3.0,
        decoder_start_token_id=0,
    )  # fmt: skip
    tf.T5EncoderModel(config).save_pretrained(folder)
    tokeniser.save_pretrained(folder)
    return folder


def rows_of(weights: str, layers: list[int], compute: str = "float32", tokens: int = 80) -> dict[int, torch.Tensor]:
    embedder = Embedder.shared(weights, Store(), compute)
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    found = embedder.run(SEQUENCES, layers, [False] * len(SEQUENCES), "float32", tokens, nothing, nothing)
    return {layer: rows for layer, (rows, _) in found.items()}


@torch.no_grad()
def hidden_states(folder: Path, tf: Any, separator: str) -> list[torch.Tensor]:
    """Rows of every layer, one sequence at a time, without padding."""
    model = tf.AutoModel.from_pretrained(folder).eval()
    first = 1
    if model.config.model_type == "t5":
        model, first = tf.T5EncoderModel.from_pretrained(folder).eval(), 0
    tokeniser = tf.AutoTokenizer.from_pretrained(folder)
    each = []
    for sequence in SEQUENCES:
        batch = tokeniser(separator.join(sequence), return_tensors="pt")
        states = model(**batch, output_hidden_states=True).hidden_states
        each.append([state[0, first:-1] for state in states])
        assert len(each[-1][0]) == len(sequence)
    return [torch.cat(layer) for layer in zip(*each, strict=True)]


@pytest.mark.parametrize(
    ("save", "separator", "num_layers"), [(save_esm, "", 3), (save_bert, " ", 4), (save_t5, " ", 3)]
)
def test_rows_are_the_hidden_states(
    save: Callable[[Path, Any], Path], separator: str, num_layers: int, transformers: Any, tmp_path: Path
) -> None:
    folder = save(tmp_path / "model", transformers)
    theirs = hidden_states(folder, transformers, separator)
    ours = rows_of(f"hf:{folder}", list(range(num_layers + 1)))
    assert len(theirs) == num_layers + 1
    for layer, rows in enumerate(theirs):
        assert float((ours[layer] - rows).norm() / rows.norm()) < 1e-5, layer
    # Stopping at a layer changes nothing of it.
    for layer in range(num_layers + 1):
        torch.testing.assert_close(rows_of(f"hf:{folder}", [layer])[layer], ours[layer], rtol=0, atol=0)


def test_blocks_above_the_deepest_layer_are_not_run(transformers: Any, tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "model", transformers)
    embedder = Embedder.shared(f"hf:{folder}", Store(), "float32")
    assert isinstance(embedder, EncoderEmbedder)
    seen: list[int] = []
    for index, block in enumerate(embedder.encoder._blocks):
        block.register_forward_hook(lambda *_, _index=index: seen.append(_index))
    rows_of(f"hf:{folder}", [0, 2])
    assert set(seen) == {0, 1}


def test_our_own_reader_agrees_on_an_esm2_folder(transformers: Any, tmp_path: Path) -> None:
    folder = save_esm(tmp_path / "model", transformers)
    layers = [0, 1, 2, 3]
    ours, theirs = rows_of(str(folder), layers), rows_of(f"hf:{folder}", layers)
    assert isinstance(Embedder.shared(f"hf:{folder}", Store(), "float32"), EncoderEmbedder)
    for layer in layers:
        assert float((ours[layer] - theirs[layer]).norm() / ours[layer].norm()) < 1e-5, layer
    half = rows_of(f"hf:{folder}", layers, "bfloat16")
    for layer in layers:
        assert float((half[layer] - theirs[layer]).norm() / theirs[layer].norm()) < 2e-2, layer


def test_the_key_is_of_the_content(transformers: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save_bert(tmp_path / "model", transformers)
    before = resolve_weights(f"hf:{folder}", Store())
    assert (before.name, before.config["num_layers"], before.config["d"]) == ("model", 4, 24)
    folder.rename(tmp_path / "renamed")
    folder = tmp_path / "renamed"
    after = resolve_weights(f"hf:{folder}", Store())
    assert (after.sha256, after.config) == (before.sha256, before.config)
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, "hidden_act": "relu"}))
    assert resolve_weights(f"hf:{folder}", Store()).config != before.config
    rows_of(f"hf:{folder}", [1])
    rows_of(f"hf:{folder}", [2])
    assert capsys.readouterr().err.count("several times slower") == 1


@pytest.fixture
def experiment(tmp_path: Path) -> Callable[..., Experiment]:
    def make(weights: str, **embed: Any) -> Experiment:
        path = tmp_path / "proteins.fasta"
        path.write_text("".join(f">p{i}\n{sequence}\n" for i, sequence in enumerate(SEQUENCES)))
        section = {"fasta": str(path), "layers": [2], "dtype": "float32", "holdout": 0.2, **embed}
        return Experiment.model_validate(
            {"name": "run", "root": str(tmp_path / "runs"), "model": {"weights": weights}, "embed": section}
        )

    return make


def test_the_stage_stores_what_the_model_says(
    experiment: Callable[..., Experiment], transformers: Any, tmp_path: Path
) -> None:
    from plmsae_cli.executors.pipeline import run_experiment
    from plmsae_cli.runtime.progress import PlainReporter
    from plmsae_cli.store.activations import ActivationShards
    from plmsae_cli.store.manifest import read_manifest
    from plmsae_cli.store.proteins import read_proteins

    folder = save_bert(tmp_path / "model", transformers)
    chosen = experiment(f"hf:{folder}", long="windows", max_length=40)
    run_experiment(chosen, ["embed"], PlainReporter())
    store, made = Store(), Lineage(chosen, Store()).embed(2).folder
    manifest = read_manifest(store, made)
    assert manifest is not None
    assert (manifest["d"], manifest["num_layers"], manifest["weights"]["name"]) == (24, 4, "model")
    assert manifest["convention"].startswith("hidden states as transformers counts them")
    assert manifest["final_layer_norm"] is None
    sides = {held: ActivationShards(store, made, heldout=held) for held in (False, True)}
    whole = hidden_states(folder, transformers, " ")[2]
    row = 0
    for protein in read_proteins(store, f"{made}/proteins.parquet").to_pylist():
        shards = sides[protein["split"] == "heldout"]
        ours = shards.read(protein["row_offset"], protein["row_offset"] + protein["rows"])
        if protein["rows"] <= 40:  # longer ones are read in windows
            torch.testing.assert_close(ours, whole[row : row + protein["rows"]], rtol=1e-4, atol=1e-5)
        row += protein["rows"]


def words(folder: Path, tf: Any) -> Path:
    """A tokeniser of words: unknown letters in a row become one."""
    save_esm(folder, tf)
    (folder / "vocab.txt").write_text("\n".join(["<cls>", "<pad>", "<eos>", "<unk>", "L", "A", "<mask>"]))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (folder / name).unlink(missing_ok=True)
    tf.EsmTokenizer(str(folder / "vocab.txt")).save_pretrained(folder)
    return folder


def without_safetensors(folder: Path, tf: Any) -> Path:
    save_bert(folder, tf)
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    return folder


def without_tokeniser(folder: Path, tf: Any) -> Path:
    save_bert(folder, tf)
    for file in folder.iterdir():
        if file.name not in ("config.json", "model.safetensors"):
            file.unlink()
    return folder


def cut_short(folder: Path, tf: Any) -> Path:
    file = save_bert(folder, tf) / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    return folder


def of_no_kind(folder: Path, tf: Any) -> Path:
    save_bert(folder, tf)
    (folder / "config.json").write_text("{}")
    return folder


def deeper_than_its_files(folder: Path, tf: Any) -> Path:
    save_bert(folder, tf)
    body = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**body, "num_hidden_layers": 5}))
    return folder


@pytest.mark.parametrize(("make", "message"), [
    (deeper_than_its_files, r"lack \d+ tensors of the model, encoder.layer.4"),
    (words, "does not make exactly one token of each residue"),
    (lambda folder, tf: save_bert(folder, tf, "LAGVSERTIDPKQ"), "does not make exactly one token of each residue"),
    (without_safetensors, "has no .safetensors file"),
    (without_tokeniser, "has no tokeniser: none of tokenizer.json"),
    (cut_short, r"model\.safetensors is not a sound safetensors file"),
    (of_no_kind, "model.weights"),
    (lambda folder, tf: Path("nobody/nothing"), "is no folder, and not in the local Hugging Face cache"),
])  # fmt: skip
def test_what_cannot_be_read_says_why(
    make: Callable[[Path, Any], Path], message: str, transformers: Any, tmp_path: Path
) -> None:
    folder = make(tmp_path / "model", transformers)
    with pytest.raises(UserError, match=message):
        rows_of(f"hf:{folder}", [1])


def test_limits_of_encoders_are_named(experiment: Callable[..., Experiment], transformers: Any, tmp_path: Path) -> None:
    folder = save_bert(tmp_path / "model", transformers)
    embedder = Embedder.shared(f"hf:{folder}", Store(), "float32")
    nothing: Callable[..., None] = lambda *_, **__: None  # noqa: E731
    with pytest.raises(UserError, match=r"reads at most 78 residues, a protein has 79"):
        embedder.run(["A" * 79], [1], [False], "float32", "auto", nothing, nothing)
    assert len(embedder.run(["A" * 78], [1], [False], "float32", "auto", nothing, nothing)[1][0]) == 78
    elsewhere = Typical(tokens=500, documents=9, longest=79 + SPECIAL_TOKENS, all_tokens=900)
    with pytest.raises(UserError, match=r"reads at most 78 residues, a protein has 79"):  # of another shard
        embedder.stream(["A"], [1], torch.float32, "auto", nothing, nothing, nothing, typical=elsewhere)
    with pytest.raises(UserError, match="not taken apart"):
        load_state(resolve_weights(f"hf:{folder}", Store()))
    with pytest.raises(ValueError, match="no effect on hf: weights"):
        experiment(f"hf:{folder}", compile=True)
    with pytest.raises(UserError, match="has layers 0 to 4, 5 is not"):
        Lineage(experiment(f"hf:{folder}", layers=[5]), Store()).embed(5)


@pytest.mark.parametrize(
    ("broken", "between"),
    [
        ("ImportError('libcudart.so.12: cannot open shared object file')", ""),
        ("RuntimeError('operator torchvision::nms does not exist')", "sys.modules['torchvision'] = None"),
    ],
)
def test_a_broken_torchvision_is_hidden_also_late(tmp_path: Path, broken: str, between: str) -> None:
    """Also where transformers has found it before, and where someone else has hidden it since."""
    (tmp_path / "torchvision").mkdir()
    (tmp_path / "torchvision" / "__init__.py").write_text(f"raise {broken}")
    program = f"""if True:
        import sys
        sys.path.insert(0, {str(tmp_path)!r})
        from transformers.utils import is_torchvision_available, is_torchvision_v2_available
        assert is_torchvision_available() and is_torchvision_v2_available()
        {between}
        from plmsae_cli.store.encoders import transformers_module
        transformers_module().EsmConfig
        assert not is_torchvision_available() and not is_torchvision_v2_available()
    """
    ran = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert ran.returncode == 0, ran.stderr


def test_transformers_4_forgets_torchvision_too(monkeypatch: pytest.MonkeyPatch) -> None:
    """There the answer is a variable of the module, and the function that returns it has no cache."""
    old = ModuleType("transformers.utils.import_utils")
    exec("_torchvision_available = True\ndef is_torchvision_available(): return _torchvision_available", vars(old))  # noqa: S102
    monkeypatch.setitem(sys.modules, old.__name__, old)
    monkeypatch.setitem(sys.modules, "torchvision", None)
    hide_broken_torchvision()
    assert not vars(old)["is_torchvision_available"]()
