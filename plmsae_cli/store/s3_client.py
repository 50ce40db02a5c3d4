"""Making an S3 client out of the user's settings: address, credentials, bounds; and whether it gets an answer."""

from __future__ import annotations

import os
import secrets
from datetime import timedelta
from typing import TYPE_CHECKING

import boto3
import obstore
from botocore.exceptions import BotoCoreError
from obstore.auth.boto3 import Boto3CredentialProvider
from obstore.exceptions import BaseError
from obstore.store import S3Store

from plmsae_cli.store.records import StoreError
from plmsae_cli.store.s3_errors import NO_LEAVE, explained

if TYPE_CHECKING:
    from obstore.store import ClientConfig, RetryConfig, S3Config

    from plmsae_cli.config.experiment import Storage

# The read time-out also runs while a request's body is sent: it must leave a slow uplink time for its parts.
_CLIENT: ClientConfig = {"connect_timeout": "5s", "read_timeout": "60s", "timeout": "120s"}
_RETRY: RetryConfig = {"max_retries": 8, "retry_timeout": timedelta(seconds=60)}
_HASTY_CLIENT: ClientConfig = {"connect_timeout": "3s", "read_timeout": "4s", "timeout": "4s"}
_HASTY_RETRY: RetryConfig = {"max_retries": 1, "retry_timeout": timedelta(seconds=4)}

_pid: int | None = None


def claim_process() -> None:
    """Fail at once in a forked child of a process that used S3.

    Threads do not survive a fork, so without obstore's the child would wait for ever.
    """
    global _pid
    _pid = _pid or os.getpid()
    assert _pid == os.getpid(), "S3 was used before a fork and again in the child: start workers by spawn"


def split_url(url: str) -> tuple[str, str]:
    """Bucket and key of `s3://bucket/key`; the key may be empty (the whole bucket)."""
    bucket, _, key = url.removeprefix("s3://").partition("/")
    if not bucket or not all(c.isalnum() or c in "._-" for c in bucket):
        raise StoreError(f"{url!r} names no bucket", hint="write s3://bucket/folder")
    return bucket, key.rstrip("/")


def endpoint_of(storage: Storage | None) -> str | None:
    """The server's address; None is AWS."""
    if storage is not None and storage.endpoint_url:
        return storage.endpoint_url
    return os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL")


def connect(bucket: str, storage: Storage | None, endpoint: str | None, hasty: bool = False) -> S3Store:
    """A client of `bucket`; it connects on its first request. `hasty` gives up within ten seconds."""
    allow_http = storage is not None and storage.allow_http
    # Single deletes: not every S3 speaks the bulk request.
    config: S3Config = {"disable_bulk_delete": True}
    region = storage.region if storage is not None else None
    if endpoint:
        if endpoint.startswith("http://") and not allow_http:
            raise StoreError(
                f"{endpoint} is plain http: what is sent there can be read and changed on the way",
                hint="use https, or set storage.allow_http: true on a network you trust",
            )
        config["endpoint"] = endpoint
    provider = None
    if storage is not None and storage.anonymous:
        config["skip_signature"] = True
    else:
        try:
            session = boto3.Session(profile_name=storage.profile if storage is not None else None)
            region = region or session.region_name
            provider = Boto3CredentialProvider(session)
        except (BotoCoreError, ValueError) as error:
            raise StoreError(
                f"cannot use s3://{bucket}: no credentials ({error})",
                hint="set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or storage.profile,"
                " or storage.anonymous: true for a public bucket",
            ) from error
    config["region"] = region or "us-east-1"
    return S3Store(
        bucket,
        config=config,
        client_options={**(_HASTY_CLIENT if hasty else _CLIENT), "allow_http": allow_http},
        retry_config=_HASTY_RETRY if hasty else _RETRY,
        credential_provider=provider,
    )


def probe(folder: str, storage: Storage | None, endpoint: str | None, write: bool) -> None:
    """Find out in seconds whether a folder can be listed and, with `write`, written to. Raises StoreError."""
    bucket, prefix = split_url(folder)
    claim_process()
    client = connect(bucket, storage, endpoint, hasty=True)
    try:
        with explained("list", folder, endpoint):
            next(iter(obstore.list(client, prefix or None)), None)
    except StoreError as error:
        public = storage is not None and storage.anonymous
        if write or not public or error.message != f"cannot list {folder}: {NO_LEAVE}":
            raise
        # A public dataset may be for reading by name alone.
        try:
            obstore.head(client, f"{prefix}/MANIFEST.json".lstrip("/"))
        except (BaseError, FileNotFoundError):
            raise error from None
    if write:
        key = f"{prefix}/.probe-{secrets.token_hex(4)}.tmp".lstrip("/")
        with explained("write to", folder, endpoint):
            obstore.put(client, key, b"", use_multipart=False)
            obstore.delete(client, key)
