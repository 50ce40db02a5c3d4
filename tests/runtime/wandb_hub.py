"""A run's metrics against a stub of W&B's server that misbehaves as told: `python wandb_hub.py MOOD FOLDER`.

A process of its own, because a service of W&B that broke stays broken for its process. Prints one JSON object: the seconds
that training and its results took, and what the server received.
"""

from __future__ import annotations

import copy
import json
import os
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

ANSWERS: dict[str, Any] = {
    "upsertBucket": {"upsertBucket": {"inserted": True, "bucket": {
        "id": "x", "name": "r", "displayName": "n", "description": "", "config": "{}", "sweepName": None, "historyLineCount": 0,
        "project": {"id": "p", "name": "proj", "entity": {"id": "e", "name": "ada"}}}}},
    "createRunFiles": {"createRunFiles": {"runID": "x", "uploadHeaders": [], "files": []}},
    "bucket(": {"model": {"id": "p", "name": "proj", "entity": {"id": "e", "name": "ada"}, "bucket": None}},
}  # fmt: skip


class Hub(BaseHTTPRequestHandler):
    """As much of the server as a run needs."""

    protocol_version = "HTTP/1.1"
    mood = ""
    history: list[dict[str, Any]] = []
    summary: dict[str, Any] = {}
    runs: list[dict[str, Any]] = []
    """What was said of each run as it began: `config`, `groupName`, `project` and others."""

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.mood == "dead":
            self.close_connection = True
            self.connection.close()
            return
        try:
            asked = json.loads(body)
        except ValueError:
            asked = {}
        for name, file in (asked.get("files") or {}).items():
            if name == "wandb-history.jsonl":
                self.history.extend(json.loads(line) for line in file["content"])
            if name == "wandb-summary.json":
                self.summary.update(json.loads(file["content"][-1]))
        query = asked.get("query") or ""
        if "upsertBucket" in query:
            self.runs.append(asked["variables"])
        data = copy.deepcopy(next((answer for word, answer in ANSWERS.items() if word in query), {}))
        if "upsertBucket" in data:  # under its own name: the client remembers a run by what the server calls it
            data["upsertBucket"]["bucket"]["name"] = asked["variables"]["name"]
        if self.mood == "broken" and "createRunFiles" in query:
            data = {}  # which breaks the client's own service
        self._send(401 if self.mood == "bad-key" else 200, {"data": data})

    do_PUT = do_GET = do_POST

    def _send(self, code: int, body: Any) -> None:
        content = json.dumps(body).encode()
        self.send_response(code)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_: object) -> None: ...


def main(mood: str, folder: Path) -> None:
    Hub.mood = mood
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    url = "http://127.0.0.1:9" if mood == "down" else f"http://127.0.0.1:{server.server_port}"
    patience = 100 if mood == "well" else 2  # a sound server is waited for, however busy the machine is
    os.environ.update(WANDB_BASE_URL=url, WANDB_FINISH_TIMEOUT=str(patience), HOME=str(folder))
    from plmsae_cli.config.experiment import Experiment
    from plmsae_cli.runtime import metrics
    from plmsae_cli.runtime.wandb_results import publish

    metrics.INIT_TIMEOUT_S = float(patience)
    options = {"mode": "online", "project": "features", "group": "widths"}
    body = {"name": "t", "embed": {"fasta": "a", "layers": [7]}, "wandb": options}
    experiment = Experiment.model_validate(body)
    begun = time.monotonic()
    sinks = metrics.open_sinks(experiment, folder, 0, True)
    for step in range(1, 7):
        if step == 3 and mood == "dies":
            Hub.mood = "dead"
        for sink in sinks:
            sink.add({"step": step, "tokens": 8 * step, "loss": 1.0 / step, "valid": {"random": {"loss": 2.0}}})
    for sink in sinks:
        sink.close()
    trained = time.monotonic() - begun
    (folder / "eval").mkdir()
    (folder / "eval" / "metrics.json").write_text('{"fidelity": {"fvu": 0.25}}')
    publish(experiment, folder)
    told = {"history": Hub.history, "summary": Hub.summary, "runs": Hub.runs}
    print(json.dumps({"seconds": trained, "published": time.monotonic() - begun - trained, **told}), flush=True)


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
