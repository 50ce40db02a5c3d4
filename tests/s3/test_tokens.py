"""Token shards in a bucket: found by glob, known as the same as local ones, fetched once and mapped."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest

from plmsae_cli.config.experiment import Storage
from plmsae_cli.plm.alphabet import encode, wrap
from plmsae_cli.store.fs import Store, StoreError
from plmsae_cli.store.tokens import TokenStream, count_tokens, find_shards, open_tokens, shards_digest, write_tokens


def test_shards_in_a_bucket_are_those_on_the_disk(s3: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PLMSAE_CACHE", str(tmp_path / "cache"))
    store = Store(Storage(endpoint_url=s3.endpoint_url, allow_http=True))
    rng = np.random.default_rng(0)
    for number in range(3):
        documents = [wrap(encode("".join(rng.choice(list("ACDEFG"), 40)))) for _ in range(200)]
        for folder in (str(tmp_path), s3.url("data")):
            write_tokens(store, f"{folder}/t_{number}.bin", documents)
    near, far = find_shards(store, f"{tmp_path}/t_*.bin"), find_shards(store, f"{s3.url('data')}/t_*.bin")
    assert [path.rsplit("/", 1)[1] for path in far] == ["t_0.bin", "t_1.bin", "t_2.bin"]
    assert shards_digest(store, far) == shards_digest(store, near)
    assert count_tokens(store, far[0]) == 200 * 42
    assert not list((tmp_path / "cache").rglob("*.bin*")), "the plan fetches nothing"
    streams = [TokenStream([open_tokens(store, path) for path in paths]) for paths in (near, far)]
    for a, b in zip(streams[0].documents(), streams[1].documents(), strict=True):
        assert np.array_equal(a, b)
    assert np.array_equal(streams[0].read(8000, 9000), streams[1].read(8000, 9000))
    assert isinstance(streams[1].shards[0], np.memmap)
    with pytest.raises(StoreError, match="no token shard matches"):
        find_shards(store, f"{s3.url('data')}/v_*.bin")
