"""`plmsae browse` beside another one of the same run."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from filelock import FileLock, Timeout

from plmsae_cli.browse import server, site


class NobodyLooks:
    """A server that is ended as soon as it serves."""

    address = "http://127.0.0.1/"

    def __init__(self, *_: Any) -> None: ...

    def __enter__(self) -> NobodyLooks:
        return self

    def __exit__(self, *_: object) -> None: ...

    def serve_forever(self) -> None:
        raise KeyboardInterrupt


def test_pages_are_built_by_one_at_a_time(
    plmsae: Callable[..., Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One on another port would empty the folder that is being filled."""
    built = []

    def build(runs: list[Path], folder: Path, structures: list[str]) -> Path:
        with pytest.raises(Timeout):
            FileLock(folder.with_name(".pages.lock")).acquire(timeout=0)
        built.append(folder)
        return folder

    monkeypatch.setattr(site, "build_site", build)
    monkeypatch.setattr(site, "is_current", lambda *_: bool(built))
    monkeypatch.setattr(server, "Server", NobodyLooks)
    monkeypatch.setattr(server, "sequence_reader", lambda _: None)
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "resolved.yaml").touch()
    for _ in range(2):
        assert plmsae("browse", tmp_path / "run", "--no-open").code == 0
    assert built == [tmp_path / "run" / "browse" / "pages"]
