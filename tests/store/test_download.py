"""Downloads from a server that does what servers do: cuts, errors, other sizes, changed files."""

from __future__ import annotations

import gzip
import hashlib
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from plmsae_cli.cli.app import app
from plmsae_cli.config.errors import UserError
from plmsae_cli.store import download as module
from plmsae_cli.store.download import Checksum, download
from plmsae_cli.store.sources import command_for, sources

BODY = bytes(range(256)) * 10_000


class Server(ThreadingHTTPServer):
    """Files by path; `moods` are consumed a request each, `asked` remembers (method, path, Range)."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.files: dict[str, bytes] = {}
        self.tag = '"one"'
        self.ranges = True
        self.moods: list[Any] = []
        self.asked: list[tuple[str, str, str | None]] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Server
    protocol_version = "HTTP/1.1"

    def do_HEAD(self) -> None:
        self._serve(head=True)

    def do_GET(self) -> None:
        self._serve(head=False)

    def _serve(self, head: bool) -> None:
        server = self.server
        server.asked.append((self.command, self.path, self.headers.get("Range")))
        mood = server.moods.pop(0) if server.moods and not head else None
        body = server.files.get(self.path)
        if body is None or isinstance(mood, int):
            self.send_response(mood or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        start = 0
        asked = self.headers.get("Range")
        if asked and server.ranges and self.headers.get("If-Range") == server.tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            if start >= len(body):
                self.send_response(416)
                self.send_header("Content-Range", f"bytes */{len(body)}")
                self.send_header("Content-Length", "0")
                self.end_headers()
                return
            self.send_response(206)
            self.send_header("Content-Range", f"bytes {start}-{len(body) - 1}/{len(body)}")
        else:
            self.send_response(200)
        self.send_header("Content-Length", str(len(body) - start))
        if server.ranges:
            self.send_header("ETag", server.tag)
        self.end_headers()
        if head:
            return
        if isinstance(mood, tuple) and mood[0] == "cut":
            self.wfile.write(body[start : start + mood[1]])
            self.wfile.flush()
            self.connection.close()
            self.close_connection = True
            return
        self.wfile.write(body[start:])

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(module, "PAUSE_S", 0.0)
    with Server() as running:
        threading.Thread(target=running.serve_forever, args=(0.02,), daemon=True).start()
        running.files["/file"] = BODY
        yield running
        running.shutdown()


@pytest.fixture
def target(tmp_path: Path) -> Path:
    return tmp_path / "into" / "file.bin"


def left(target: Path) -> list[str]:
    return sorted(path.name for path in target.parent.iterdir() if not path.name.endswith(".lock"))


SHA = Checksum("sha256", hashlib.sha256(BODY).hexdigest())


def test_after_a_cut_it_goes_on_where_it_was(server: Server, target: Path) -> None:
    server.moods = [("cut", 1_500_000), ("cut", 600_000), 503]
    seen: list[tuple[int, int | None]] = []
    download(f"{server.url}/file", target, lambda done, total: seen.append((done, total)), len(BODY), SHA)
    assert target.read_bytes() == BODY
    assert left(target) == ["file.bin"]
    starts = [each[2] for each in server.asked]
    assert starts[0] is None
    begun = [int(str(each).removeprefix("bytes=").removesuffix("-")) for each in starts[1:]]
    assert begun == sorted(begun)
    assert 500_000 < begun[0] <= 1_500_000  # what was on its way when the line broke may be lost
    assert seen[-1] == (len(BODY), len(BODY))
    # It is there: nothing is asked again.
    count = len(server.asked)
    download(f"{server.url}/file", target)
    assert len(server.asked) == count


def test_another_start_goes_on_too(server: Server, target: Path) -> None:
    server.moods = [("cut", 1_200_000), 500, 500, 500, 500]
    with pytest.raises(UserError, match="500"):
        download(f"{server.url}/file", target)
    assert left(target) == [".file.bin.part", ".file.bin.part.json"]
    download(f"{server.url}/file", target, checksum=SHA)
    assert server.asked[-1][2] not in (None, "bytes=0-")
    assert target.read_bytes() == BODY
    # Killed between the last byte and the renaming: nothing is left to send.
    target.rename(target.with_name(".file.bin.part"))
    target.with_name(".file.bin.part.json").write_text(json.dumps({"url": f"{server.url}/file", "mark": server.tag}))
    download(f"{server.url}/file", target, checksum=SHA)
    assert target.read_bytes() == BODY


def test_a_file_that_changed_meanwhile_is_begun_anew(server: Server, target: Path) -> None:
    server.moods = [("cut", 1_200_000), 500, 500, 500, 500]
    with pytest.raises(UserError):
        download(f"{server.url}/file", target)
    server.tag, server.files["/file"] = '"two"', BODY[::-1]
    download(f"{server.url}/file", target)
    assert target.read_bytes() == BODY[::-1]


def test_a_kill_between_the_new_mark_and_the_new_bytes_joins_no_two_files(
    server: Server, target: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server.moods = [("cut", 1_200_000), 500, 500, 500, 500]
    with pytest.raises(UserError):
        download(f"{server.url}/file", target)
    server.tag, server.files["/file"] = '"two"', BODY[::-1]
    with monkeypatch.context() as patch:
        patch.setattr(module._Transfer, "_receive", lambda *_: (_ for _ in ()).throw(KeyboardInterrupt))
        with pytest.raises(KeyboardInterrupt):
            download(f"{server.url}/file", target)
    download(f"{server.url}/file", target)
    assert target.read_bytes() == BODY[::-1]


def test_without_a_mark_nothing_is_pieced_together(server: Server, target: Path) -> None:
    server.ranges = False
    server.moods = [("cut", 1_200_000)] * module.ATTEMPTS
    with pytest.raises(UserError, match=f"of {len(BODY):,} bytes"):
        download(f"{server.url}/file", target)
    assert left(target) == []
    download(f"{server.url}/file", target)
    assert target.read_bytes() == BODY


@pytest.mark.parametrize(("prepare", "options", "message", "requests"), [
    (lambda s: s.files.clear(), {}, "404", 1),
    (lambda s: s.moods.extend([403] * 9), {}, "403", 1),
    (lambda s: s.moods.extend([500] * 9), {}, "500", module.ATTEMPTS),
    (lambda s: None, {"size": 7}, "2,560,000 bytes, 7 are published", 1),
    (lambda s: None, {"checksum": Checksum("md5", "0" * 32)}, "is not what was published: md5", 1),
])  # fmt: skip
def test_what_cannot_be_had_is_said_and_leaves_nothing(
    server: Server,
    target: Path,
    prepare: Callable[[Server], None],
    options: dict[str, Any],
    message: str,
    requests: int,
) -> None:
    prepare(server)
    with pytest.raises(UserError, match=message) as caught:
        download(f"{server.url}/file", target, **options)
    assert f"{server.url}/file" in str(caught.value)
    assert left(target) == []
    assert len(server.asked) == requests


def test_nobody_there(target: Path) -> None:
    with pytest.raises(UserError, match="could not be downloaded"):
        download("http://127.0.0.1:9/file", target)


METALINK = """<?xml version="1.0"?>
<metalink version="3.0" xmlns="http://www.metalinker.org/"><files>
<file name="README"><size>3</size><verification><hash type="md5">00</hash></verification></file>
<file name="{name}"><size>{size}</size><verification><hash type="md5">{md5}</hash></verification></file>
</files></metalink>"""


def published(server: Server) -> dict[str, bytes]:
    """The server as a mirror of everything, small."""
    ftp = "/ftp.uniprot.org/pub/databases/uniprot/current_release"
    bodies: dict[str, bytes] = {}
    for folder, name in (("uniref/uniref50", "uniref50.fasta.gz"), ("knowledgebase/complete", "uniprot_sprot.dat.gz")):
        body = bodies[f"{ftp}/{folder}/{name}"] = gzip.compress(name.encode())
        listed = METALINK.format(name=name, size=len(body), md5=hashlib.md5(body, usedforsecurity=False).hexdigest())
        bodies[f"{ftp}/{folder}/RELEASE.metalink"] = listed.encode()
    repo = "/huggingface.co/datasets/Synthyra/omg_prot50_packed/resolve/main"
    names = [
        *(f"omg_prot50_train_{i:06d}.bin" for i in range(5)),
        "omg_prot50_valid_000000.bin",
        "omg_prot50_test_000000.bin",
    ]
    bodies |= {f"{repo}/{name}": name.encode() * 9 for name in names}
    tree = [
        {"type": "file", "path": name, "size": len(bodies[f"{repo}/{name}"]),
         "lfs": {"oid": hashlib.sha256(bodies[f"{repo}/{name}"]).hexdigest()}}
        for name in names
    ]  # fmt: skip
    tree += [{"type": "file", "path": "../../evil", "size": 1}, {"type": "directory", "path": "more", "size": 0}]
    bodies["/huggingface.co/api/datasets/Synthyra/omg_prot50_packed/tree/main"] = json.dumps(tree).encode()
    fold = "/huggingface.co/facebook/esmfold_v1/resolve/main"
    bodies |= {
        f"{fold}/{name}": name.encode() for name in ("config.json", "vocab.txt", "pytorch_model.bin", "tf_model.h5")
    }
    tree = [
        {"type": "file", "path": p.rpartition("/")[2], "size": len(b)} for p, b in bodies.items() if p.startswith(fold)
    ]
    bodies["/huggingface.co/api/models/facebook/esmfold_v1/tree/main"] = json.dumps(tree).encode()
    esm = "/dl.fbaipublicfiles.com/fair-esm"
    bodies[f"{esm}/models/esm2_t6_8M_UR50D.pt"] = b"weights"
    bodies[f"{esm}/regression/esm2_t6_8M_UR50D-contact-regression.pt"] = b"head"
    server.files |= bodies
    return bodies


def fetch(*arguments: object) -> Any:
    return CliRunner().invoke(app, ["fetch", *map(str, arguments), "--no-progress"])


def test_every_source_from_a_mirror(server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    bodies = published(server)
    monkeypatch.setenv("PLMSAE_MIRROR", f"{server.url}/")
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    listed = fetch()
    assert all(name in listed.stdout for name in sources())
    assert [each["name"] for each in json.loads(fetch("--json").stdout)["sources"]] == list(sources())
    shown = fetch("uniref50", "omg_prot50", "--num-chunks", 2, "--dry-run")
    assert shown.exit_code == 0, shown.output
    assert not (tmp_path / "data").exists()
    assert "omg_prot50_train_000001.bin" in shown.stdout
    assert "omg_prot50_train_000002.bin" not in shown.stdout
    assert "sha256" in shown.stdout
    assert "md5" in shown.stdout
    server.moods = [None] * 4 + [("cut", 5)]  # four lists of files, then the first of them, cut
    done = fetch("uniref50", "swissprot", "omg_prot50", "esm2_t6_8M_UR50D", "esmfold", "--num-chunks", 2)
    assert done.exit_code == 0, done.output
    got = {str(path.relative_to(tmp_path)): path.read_bytes() for path in tmp_path.rglob("*") if not path.name.startswith(".")
           and path.is_file()}  # fmt: skip
    expected = {
        "data/uniref50.fasta.gz", "data/uniprot_sprot.dat.gz", "data/omg_prot50_valid_000000.bin",
        "data/omg_prot50_test_000000.bin", "data/omg_prot50_train_000000.bin", "data/omg_prot50_train_000001.bin",
        "cache/weights/esm2_t6_8M_UR50D.pt", "cache/weights/esm2_t6_8M_UR50D-contact-regression.pt",
        "cache/weights/esmfold_v1/config.json", "cache/weights/esmfold_v1/vocab.txt",
        "cache/weights/esmfold_v1/pytorch_model.bin",
    }  # fmt: skip
    assert set(got) == expected
    assert all(
        content == next(b for p, b in bodies.items() if p.endswith(Path(name).name)) for name, content in got.items()
    )
    # Again: nothing is fetched. More chunks: those alone.
    before = len(server.asked)
    assert fetch("omg_prot50", "--num-chunks", 3).exit_code == 0
    assert [each[1].rpartition("/")[2] for each in server.asked[before:]] == ["main", "omg_prot50_train_000002.bin"]
    body = json.loads(fetch("swissprot", "--json").stdout)
    assert body["files"][0]["there"] is True


def test_wrong_names_and_damaged_lists(server: Server, tmp_path: Path) -> None:
    published(server)
    refused = fetch("uniref5", "--mirror", server.url)
    assert (refused.exit_code, "did you mean uniref50?" in refused.stderr) == (2, True)
    many = fetch("omg_prot50", "--num-chunks", 9, "--mirror", server.url, "--to", tmp_path)
    assert (many.exit_code, "omg_prot50 has 5 chunks, 9 were asked for" in many.stderr) == (2, True)
    name = next(path for path in server.files if path.endswith("uniref50.fasta.gz"))
    server.files[name] = gzip.compress(b"another release")
    changed = fetch("uniref50", "--mirror", server.url, "--to", tmp_path)
    assert changed.exit_code == 2
    assert "are published" in changed.stderr
    server.moods = [("cut", 5)]
    assert "does not answer" in fetch("uniref50", "--mirror", server.url, "--to", tmp_path).stderr
    server.files[name.replace("uniref50.fasta.gz", "RELEASE.metalink")] = b"<html>"
    assert "RELEASE.metalink cannot be read" in fetch("uniref50", "--mirror", server.url, "--to", tmp_path).stderr
    assert list(tmp_path.glob("[!.]*")) == []
    silent = fetch("omg_prot50", "--mirror", "http://127.0.0.1:9", "--to", tmp_path)
    assert (silent.exit_code, silent.stderr.count("hint:")) == (2, 1)
    assert "no list of files" not in silent.stderr


def test_a_missing_input_names_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert command_for("cannot read data/uniref50.fasta.gz: No such file") == "`plmsae fetch uniref50` downloads it"
    assert command_for("omg_prot50_valid_000000.bin") == "`plmsae fetch omg_prot50` downloads it"
    assert command_for("my-uniref50.fasta.gz and esm2_t6_8M_UR50D.ptx") is None
    monkeypatch.chdir(tmp_path)
    (tmp_path / "exp.yaml").write_text("embed: {fasta: uniref50.fasta.gz, layers: [2]}\n")
    told = CliRunner().invoke(app, ["validate", "exp.yaml"])
    assert told.exit_code == 2
    assert "`plmsae fetch uniref50` downloads it" in told.stderr
