"""Reading experiment files: pinned messages, positions, origins, and secrets that stay unseen."""

from __future__ import annotations

import json
import pickle
import subprocess
import sys
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from plmsae_cli.config.credentials import is_secret
from plmsae_cli.config.templates import NAMES, template
from plmsae_cli.config.yaml import InvalidExperiment, Loaded, load

BAD = Path(__file__).parent / "bad"
DATA = "embed: {fasta: proteins.fasta, layers: [24]}\nshuffle: {}\noptimize: {}\n"


def write(folder: Path, text: str, name: str = "exp.yaml") -> Path:
    path = folder / name
    path.write_text(text, encoding="utf-8")
    return path


def read(folder: Path, text: str, *overrides: str) -> Loaded:
    return load(write(folder, text), overrides)


def fail(folder: Path, text: str, *overrides: str) -> InvalidExperiment:
    with pytest.raises(InvalidExperiment) as caught:
        read(folder, text, *overrides)
    return caught.value


@pytest.mark.parametrize("name", sorted(path.stem for path in BAD.glob("*.yaml")))
def test_message_is_pinned(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(BAD)
    with pytest.raises(InvalidExperiment) as caught:
        load(f"{name}.yaml")
    assert f"{caught.value}\n" == (BAD / f"{name}.txt").read_text(encoding="utf-8")


def test_there_are_many_bad_files() -> None:
    assert len(list(BAD.glob("*.yaml"))) == len(list(BAD.glob("*.txt"))) >= 30


@pytest.mark.parametrize("path", sorted(BAD.glob("*.yaml")), ids=lambda path: path.stem)
def test_problems_are_sorted_and_point_into_the_file(path: Path) -> None:
    with pytest.raises(InvalidExperiment) as caught:
        load(path)
    places = [(p.line, p.column) for p in caught.value.problems]
    assert places == sorted(places)
    lines = path.read_bytes().decode(errors="replace").splitlines() or [""]
    for problem in caught.value.problems:
        if problem.line:
            assert 1 <= problem.column <= len(lines[problem.line - 1]) + 1


def test_numbers_and_words_are_those_of_yaml_1_2(tmp_path: Path) -> None:
    text = DATA + "train: {lr: 1e-4, tokens: 2_000_000_000, seed: 012}\nwandb: {mode: off, project: no, entity: on}\n"
    experiment = read(tmp_path, text).experiment
    assert experiment.train is not None
    assert experiment.train.lr == 1e-4
    assert experiment.train.tokens == 2_000_000_000
    assert experiment.train.seed == 12
    assert (experiment.wandb.mode, experiment.wandb.project, experiment.wandb.entity) == ("off", "no", "on")


def test_sizes_take_decimal_and_binary_units(tmp_path: Path) -> None:
    experiment = read(tmp_path, "embed: {fasta: x, layers: [1], shard: 512MiB}\nshuffle: {memory: 16GB}\n").experiment
    assert experiment.embed is not None
    assert experiment.shuffle is not None
    assert experiment.embed.shard == 512 * 2**20
    assert experiment.shuffle.memory == 16 * 10**9


def test_anchors_and_merge_keys(tmp_path: Path) -> None:
    text = (
        "embed: &first {fasta: x.fasta, layers: &layers [24], max_length: 100}\n"
        "shuffle: {}\noptimize: {}\n"
        "train:\n  sae: &sae {k: 16}\n"
        "sweep: {grid: {train.sae: [*sae, {<<: *sae, expansion: 4}]}}\n"
    )
    experiment = read(tmp_path, text).experiment
    assert experiment.sweep is not None
    assert experiment.sweep.grid == {"train.sae": [{"k": 16}, {"k": 16, "expansion": 4}]}


def test_windows_line_ends_and_a_byte_order_mark(tmp_path: Path) -> None:
    path = tmp_path / "exp.yaml"
    path.write_bytes(b"\xef\xbb\xbf" + DATA.replace("\n", "\r\n").encode() + b"train:\r\n  lr: x\r\n")
    with pytest.raises(InvalidExperiment) as caught:
        load(path)
    (problem,) = caught.value.problems
    assert (problem.line, problem.column, problem.snippet) == (5, 7, "  lr: x")


def test_name_is_given_or_the_stem_made_legal(tmp_path: Path) -> None:
    assert load(write(tmp_path, DATA + "name: given\n")).experiment.name == "given"
    for stem, name in (
        ("esm2-l24", "esm2-l24"),
        ("My Run (2)", "my-run-2"),
        ("_x", "x"),
        ("é", "experiment"),
    ):
        loaded = load(write(tmp_path, DATA, f"{stem}.yaml"))
        assert (loaded.experiment.name, loaded.origins["name"]) == (name, "default")


def test_text_is_kept_and_every_leaf_has_an_origin(tmp_path: Path) -> None:
    text = DATA + "train:\n  lr: 1e-3\n  sae:\n    k: 32\n"
    path = write(tmp_path, text)
    loaded = load(path, ["train.sae.k=16", "train.seed=3", "eval={}"])
    assert loaded.text == text
    assert loaded.origins["train.lr"] == f"{path}:5"
    assert loaded.origins["embed.layers"] == f"{path}:1"
    assert loaded.origins["train.sae.k"] == loaded.origins["train.seed"] == "--set"
    assert loaded.origins["train.batch_tokens"] == loaded.origins["wandb.mode"] == "default"

    def leaves(value: object, prefix: str) -> set[str]:
        # Below plm.valid, sweep.grid and launch.slurm.options keys are the user's; none is set here.
        if not isinstance(value, dict) or not value:
            return {prefix}
        return {leaf for key, inner in value.items() for leaf in leaves(inner, f"{prefix}.{key}".lstrip("."))}

    assert set(loaded.origins) == leaves(loaded.experiment.dump(), "")


def test_a_dump_reads_back_as_itself(tmp_path: Path) -> None:
    experiment = read(tmp_path, DATA + "train: {sae: {k: 16}}\neval: {}\n").experiment
    assert read(tmp_path, json.dumps(experiment.dump())).experiment == experiment


def test_missing_file_names_its_neighbours(tmp_path: Path) -> None:
    write(tmp_path, DATA, "sweep-k.yaml")
    with pytest.raises(InvalidExperiment, match="no such file") as caught:
        load(tmp_path / "sweepk.yaml")
    assert caught.value.problems[0].hint == f"did you mean {tmp_path / 'sweep-k.yaml'}?"
    with pytest.raises(InvalidExperiment, match="does not exist"):
        load(tmp_path / "nowhere" / "exp.yaml")


def test_a_folder_and_a_data_file_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InvalidExperiment, match="is a folder"):
        load(tmp_path)
    with pytest.raises(InvalidExperiment, match=r"2\.0 MB are too many"):
        read(tmp_path, "#" * 2_000_000)
    with pytest.raises(InvalidExperiment, match="nested too deeply"):
        read(tmp_path, "a: " + "[" * 5000)


def test_file_and_set_problems_come_together(tmp_path: Path) -> None:
    error = fail(tmp_path, DATA + "train:\n  lr: x\n  sae: {k: y}\n", "train.sae.k=0", "train.kk=1", "train.tokens")
    rendered = [str(problem).splitlines()[0] for problem in error.problems]
    assert rendered == [
        f'{tmp_path / "exp.yaml"}:5:7: train.lr: must be auto or a number above 0, found "x"',
        "--set train.kk: unknown path",
        "--set train.tokens: must be path=value",
        "--set train.sae.k: must be at least 1, found 0",
    ]


def test_set_mends_what_the_file_has_wrong(tmp_path: Path) -> None:
    experiment = read(tmp_path, DATA + "train:\n  lr: x\n", "train.lr=1e-4").experiment
    assert experiment.train is not None
    assert experiment.train.lr == 1e-4
    assert read(tmp_path, DATA + "eval:\n", "eval={}", "train={}").experiment.eval is not None


def test_set_alone_can_be_an_experiment(tmp_path: Path) -> None:
    experiment = read(tmp_path, "", "embed.fasta=x.fasta", "embed.layers=[3]").experiment
    assert experiment.embed is not None
    assert experiment.embed.layers == [3]


def test_error_survives_pickling(tmp_path: Path) -> None:
    error = fail(tmp_path, DATA + "train: {lr: x}\n")
    again = pickle.loads(pickle.dumps(error))  # noqa: S301 (workers hand exceptions over like this)
    assert str(again) == str(error)
    assert again.problems == error.problems


NOISE = [
    *":-{}[]\"'\n\t #!|>%@`&*?=~",
    "<<: ",
    "---\n",
    ".nan",
    "1e-4",
    "null",
    "\u2028",
    "é",
    "- ",
    "*a",
    "&a ",
    "x: ",
]
SECRET = "s3cr3t-Zq9"
CARRIERS = (
    "wandb: {api_key: VALUE, mode: onlin}\n",
    "wandb:\n  api_key: 'VALUE'\n  mode: 3\n",
    "hf_token: |\n  VALUE\n  VALUE\nlayer: 3\n",
    "password: &p VALUE\nname: *p\nroot: [*p]\n",
    "storage: {secret: {nested: [VALUE]}, regon: x}\n",
    "storage:\n  endpoint_url: https://user:VALUE@host\n  profile: 3\n",
    "token: 'VALUE\n  VALUE\nwandb: {}\n",
    "token: VALUE: VALUE\n",
    "token:\n  VALUE\n bad: x\n",
    "name: x  # token: VALUE\nroot: 3 # api_key=VALUE\n",
    "access-key: VALUE\n\tx: 1\n",
    "{token: VALUE, name: 'x}\n",
    "wandb: {apiKey: VALUE, api_key: VALUE, apiKey: VALUE}\n",
    "- token: VALUE\n- x\n",
)


@pytest.mark.parametrize("carrier", CARRIERS)
def test_secrets_are_never_echoed(carrier: str, tmp_path: Path) -> None:
    error = fail(tmp_path, carrier.replace("VALUE", SECRET))
    assert SECRET not in str(error)
    assert SECRET not in repr(error.problems)


@pytest.mark.parametrize("argument", ["wandb.api_key=VALUE", "token=VALUE", "VALUE VALUE", "storage.secret VALUE"])
def test_secrets_in_set_are_never_echoed(argument: str, tmp_path: Path) -> None:
    assert SECRET not in str(fail(tmp_path, DATA, argument.replace("VALUE", SECRET)))


@settings(deadline=None, max_examples=40)
@given(
    key=st.sampled_from(["token", "hf_token", "API-KEY", "apiKey", "db.password", "AWS_SECRET_ACCESS_KEY"]),
    value=st.text(alphabet="abcXYZ019-_+/=", min_size=12, max_size=30),
    style=st.sampled_from(["{k}: {v}", "{k}: '{v}'", '{{{k}: "{v}"}}', "x: {{{k}: {v}, y: [}}", "{k}: >-\n  {v}\nz"]),
)
def test_no_secret_in_any_style(key: str, value: str, style: str, tmp_path_factory: pytest.TempPathFactory) -> None:
    text = style.format(k=key, v=value)
    assert value not in str(fail(tmp_path_factory.mktemp("s"), text))


@settings(deadline=None, max_examples=150)
@given(data=st.data())
def test_any_text_is_an_experiment_or_its_problems(
    data: st.DataObject, tmp_path_factory: pytest.TempPathFactory
) -> None:
    text = data.draw(st.sampled_from([template(name) for name in NAMES]))
    text = "\n".join(line.partition("#")[0].rstrip() for line in text.splitlines())
    for _ in range(data.draw(st.integers(1, 3))):
        at = data.draw(st.integers(0, len(text)))
        lost = data.draw(st.integers(0, 8))
        text = text[:at] + data.draw(st.sampled_from(NOISE)) + text[at + lost :]
    path = write(tmp_path_factory.mktemp("fuzz"), text)
    try:
        loaded = load(path)
    except InvalidExperiment as error:
        problems = error.problems
    else:
        assert load(write(path.parent, json.dumps(loaded.experiment.dump()))).experiment == loaded.experiment
        return
    assert problems
    assert all(str(problem) for problem in problems)


def test_which_keys_are_secret() -> None:
    assert all(
        map(is_secret, ["token", "HF_TOKEN", "wandbApiKey", "api-key", "client_secret", "session.token", "HFTOKEN"])
    )
    assert not any(
        map(is_secret, ["tokens", "tokenizer", "batch_tokens", "key", "k", "entity", "dead_tokens", "keep_checkpoints"])
    )


def test_the_room_is_light() -> None:
    code = (
        "import sys\n"
        "import plmsae_cli.config.yaml, plmsae_cli.config.schema, plmsae_cli.config.templates\n"
        "import plmsae_cli.config.bugfix, plmsae_cli.config.overrides\n"
        "print([name for name in ('torch', 'numpy', 'yaml', 'typer', 'rich') if name in sys.modules])"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == "[]"
