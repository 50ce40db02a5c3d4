"""`validate --deep`: each check against something that answers, and something that does not."""

from __future__ import annotations

import base64
import json
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.cli.deep import deep_checks
from plmsae_cli.config.experiment import Experiment
from plmsae_cli.runtime.task import Artifact, Plan, Task

KEY = "k" * 40


class Hub(BaseHTTPRequestHandler):
    """As much of W&B's server as a login needs."""

    mood = "well"

    def do_POST(self) -> None:
        known = self.headers.get("Authorization") == f"Basic {base64.b64encode(f'api:{KEY}'.encode()).decode()}"
        body: Any = {"data": {"viewer": {"username": "ada"} if known else None}}
        if self.mood == "cut":
            self.connection.close()
            return
        self.send_response({"well": 200, "busy": 503, "strict": 200 if known else 401}[self.mood])
        self.end_headers()
        self.wfile.write(json.dumps(body).encode())

    def log_message(self, *_: object) -> None: ...


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    with HTTPServer(("127.0.0.1", 0), Hub) as server:
        threading.Thread(target=server.serve_forever, args=(0.02,), daemon=True).start()
        monkeypatch.setenv("WANDB_BASE_URL", f"http://127.0.0.1:{server.server_port}")
        monkeypatch.setattr(Hub, "mood", "well")
        yield Hub
        server.shutdown()


def experiment(root: Path, **changes: Any) -> Experiment:
    body = {"name": "a", "root": str(root), "embed": {"fasta": "a", "layers": [1]}, "launch": {"gpus": 0}, **changes}
    return Experiment.model_validate(body)


def states(found: list[Any]) -> dict[str, str]:
    return {check.name: check.state for check in found}


def plan(memory: int, data: int = 0) -> Plan:
    artifact = Artifact("somewhere", "key", False, bytes=data)
    return Plan(
        "train", [Task("train", "train", ("somewhere",))], {"run": artifact}, {"group 1": {"memory_per_rank": memory}}
    )


@pytest.mark.parametrize(("mood", "key", "says"), [
    ("well", KEY, None), ("strict", KEY, None), ("well", "x" * 40, "the key is not known"),
    ("strict", "x" * 40, "the key is not known"), ("busy", KEY, "answers 503"), ("cut", KEY, "does not answer"),
])  # fmt: skip
def test_the_login(
    hub: type[Hub], mood: str, key: str, says: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "mood", mood)
    monkeypatch.setenv("WANDB_API_KEY", key)
    (check,) = [c for c in deep_checks(experiment(tmp_path, wandb={"mode": "online"}), []) if c.name == "W&B"]
    assert check.state == ("ok" if says is None else "fail")
    assert says is None or says in check.text
    assert key not in check.text


def test_without_a_key_and_without_a_wish(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    monkeypatch.setenv("NETRC", str(tmp_path / "none"))
    monkeypatch.setenv("HOME", str(tmp_path))
    assert states(deep_checks(experiment(tmp_path, wandb={"mode": "online"}), []))["W&B"] == "fail"
    assert states(deep_checks(experiment(tmp_path, wandb={"mode": "offline"}), []))["W&B"] == "ok"
    assert "W&B" not in states(deep_checks(experiment(tmp_path), []))


def test_the_key_of_a_login_file(hub: type[Hub], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("WANDB_API_KEY", raising=False)
    (tmp_path / "netrc").write_text(f"machine 127.0.0.1\nlogin user\npassword {KEY}\n")
    monkeypatch.setenv("NETRC", str(tmp_path / "netrc"))
    assert states(deep_checks(experiment(tmp_path, wandb={"mode": "online"}), []))["W&B"] == "ok"


def test_a_bucket_is_written_read_and_left_as_it_was(s3: Any, tmp_path: Path) -> None:
    folder = s3.url("deep")
    storage = {"endpoint_url": s3.endpoint_url, "allow_http": True}
    found = deep_checks(experiment(tmp_path, data_root=folder, storage=storage), [])
    assert states(found)[f"bucket {folder}"] == "ok"
    assert not list(s3.store().list(folder))
    gone = deep_checks(experiment(tmp_path, data_root="s3://no-such-bucket/x", storage=storage), [])
    assert states(gone)["bucket s3://no-such-bucket/x"] == "fail"


def test_memory_and_room(tmp_path: Path) -> None:
    assert states(deep_checks(experiment(tmp_path), [plan(1000)])) == {
        "disk of root": "ok", "disk of data_root": "ok", "memory": "ok",
    }  # fmt: skip
    large = deep_checks(experiment(tmp_path), [plan(10**16, data=10**17)])
    assert states(large) == {"disk of root": "ok", "disk of data_root": "fail", "memory": "fail"}
    assert all(check.remedy for check in large if check.state == "fail")


def test_the_verb(plmsae: Callable[..., Any], write: Callable[..., Path], tmp_path: Path) -> None:
    path = write(data=tmp_path / "data")
    found = plmsae("validate", path, "--deep")
    assert found.code == 0, found.err
    assert "  ok    memory: training is predicted to hold" in found.out
    body = json.loads(plmsae("validate", path, "--deep", "--json").out)
    assert [check["state"] for check in body["experiments"][0]["checks"]] == ["ok", "ok", "ok"]
    bad = plmsae("validate", path, "--deep", "--set", "wandb.mode=online", "--set", "wandb.project=x")
    assert (bad.code, "W&B: " in bad.err) == (2, True)
    assert "checks" not in json.loads(plmsae("validate", path, "--json").out)["experiments"][0]
