"""`clean` in a bucket: uploads that were never completed, objects that no record lists; nothing unlisted, nothing young."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from plmsae_cli.cli.housekeeping import clean_root
from plmsae_cli.config.experiment import Storage
from plmsae_cli.store.fs import Store, join
from plmsae_cli.store.housekeeping import bucket_leavings, free, remove
from plmsae_cli.store.manifest import MANIFEST, write_manifest, write_part
from tests.s3.conftest import Proxy

KEY = "0123456789abcdef"
DAY = 86_400.0


def made(store: Store, folder: str, finished: bool) -> str:
    """An artifact of one task, and an object beside it that no record lists."""
    record = store.write(join(folder, "heldout/shard.bin"), [b"x" * 1000])
    write_part(store, folder, "task", [record], {})
    store.write(join(folder, "plan.json"), [b"{}"])
    store.write(join(folder, "lost.bin"), [b"y" * 300])
    if finished:
        body = {"format": "f", "stage": "embed", "key": KEY, "config": {}, "inputs": {}, "created": 1.0, "rows": 2}
        file = {"name": "heldout/shard.bin", "size": record.size, "xxh3": record.xxh3}
        write_manifest(store, folder, {**body, "files": [file]})
    return folder


def found(store: Store, root: str, older: float = -DAY) -> dict[str, str]:
    return {one.path.removeprefix(root + "/"): one.why for one in bucket_leavings(store, root, older)}


def test_objects_that_no_record_lists_are_found_and_nothing_young_is(s3: Any) -> None:
    store = Store(Storage(endpoint_url=s3.endpoint_url, allow_http=True))
    root = s3.url("data")
    finished, begun, freed = (f"{stage}-{KEY}" for stage in ("embed", "shuffle", "optimize"))
    made(store, join(root, "team", finished), True)
    made(store, join(root, begun), False)
    made(store, join(root, freed), True)
    free(store, join(root, freed))
    for name in ("proteins.fasta", ".probe-0a.tmp"):
        store.write(join(root, name), [b"z"])
    assert found(store, root, DAY) == {}
    expected = {
        ".probe-0a.tmp": "a write that was not finished",
        f"{begun}/lost.bin": "an attempt that was lost: no record lists it",
        f"team/{finished}/lost.bin": "no record lists it",
    }
    assert found(store, root) == expected
    assert found(store, join(root, begun)) == {"lost.bin": expected[f"{begun}/lost.bin"]}
    assert found(store, s3.url()) == {f"data/{name}": why for name, why in expected.items()}
    store.write(join(root, begun, "parts", "other.json"), [b"{"])
    assert f"{begun}/lost.bin" not in found(store, root), "nothing is deleted on a damaged record's word"
    store.delete(join(root, begun, "parts", "other.json"))
    before = set(store.entries(root))
    for one in list(bucket_leavings(store, root, -DAY)):
        remove(one, store)
    assert before - set(store.entries(root)) == set(expected)
    assert found(store, root) == {}
    assert store.exists(join(root, "team", finished, MANIFEST))


def opened(s3: Any, key: str, size: int) -> str:
    client = s3.client()
    upload = client.create_multipart_upload(Bucket=s3.bucket, Key=key)["UploadId"]
    client.upload_part(Bucket=s3.bucket, Key=key, UploadId=upload, PartNumber=1, Body=b"x" * size)
    return str(upload)


def experiment(tmp_path: Path, s3: Any, endpoint: str) -> Path:
    path = tmp_path / "exp.yaml"
    path.write_text(
        f"embed: {{fasta: x.fasta, layers: [1]}}\ndata_root: {s3.url('data')}\nprice: {{tb_day: 1000000}}\n"
        f"storage: {{endpoint_url: '{endpoint}', allow_http: true}}\n"
    )
    return path


def test_open_uploads_are_listed_with_bytes_and_price_and_aborted_when_told(
    s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = str(experiment(tmp_path, s3, s3.endpoint_url))
    ours, others = f"data/embed-{KEY}/shard-00000.safetensors", "database/else.bin"
    opened(s3, ours, 700_000)
    opened(s3, others, 10)
    client = s3.client()

    def open_keys() -> set[str]:
        return {upload["Key"] for upload in client.list_multipart_uploads(Bucket=s3.bucket).get("Uploads", [])}

    assert clean_root(path, False, 24.0, False, True) == 0
    assert json.loads(capsys.readouterr().out)["found"] == [], "a part arrived just now"
    assert clean_root(path, False, -24.0, False, False) == 0
    told = capsys.readouterr()
    assert f"s3://{s3.bucket}/{ours}" in told.out
    assert "700 kB" in told.out
    assert "else.bin" not in told.out
    assert "$0.70 a day; nothing was deleted" in told.err
    assert open_keys() == {ours, others}
    assert clean_root(path, True, -24.0, False, False) == 0
    assert open_keys() == {others}
    assert clean_root(path, True, -24.0, True, False) == 2
    assert "--unused is not for s3://" in capsys.readouterr().err


def test_where_uploads_cannot_be_listed_the_rule_is_named_and_the_rest_is_listed(
    proxy: Proxy, s3: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    made(proxy.store(), join(s3.url("data"), f"embed-{KEY}"), True)
    proxy.fail(r"GET /[^?]*\?uploads", "403")
    path = str(experiment(tmp_path, s3, f"http://127.0.0.1:{proxy.server_port}"))
    assert clean_root(path, False, -24.0, False, False) == 0
    told = capsys.readouterr()
    assert "lost.bin" in told.out
    assert "cannot list the open uploads" in told.err
    assert "abort incomplete multipart uploads after 7 days" in told.err
