"""Uploads that were begun and never completed: invisible in listings, and billed until somebody aborts them.

obstore neither lists nor aborts them, so this is boto3's part; a few requests, none of them in the way of data.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from plmsae_cli.store.records import StoreError
from plmsae_cli.store.s3_client import endpoint_of, split_url

if TYPE_CHECKING:
    from plmsae_cli.config.experiment import Storage

RULE = "let a rule of the bucket abort incomplete multipart uploads after 7 days (docs/storage.md has it)"
_BOUNDS = {"connect_timeout": 5, "read_timeout": 20, "retries": {"total_max_attempts": 4, "mode": "standard"}}


@dataclass(frozen=True)
class Upload:
    """One that is open."""

    path: str
    """Of the object that it would have become."""
    id: str
    bytes: int
    """Of the parts that arrived."""
    written: float
    """When it began, or its newest part arrived, in s since 1970."""


def open_uploads(storage: Storage | None, folder: str) -> Iterator[Upload]:
    """Uploads below a folder.

    Raises:
        StoreError: the server does not list them, or not to us.
    """
    bucket, prefix = split_url(folder)
    try:
        client = _client(storage)
        pages = client.get_paginator("list_multipart_uploads").paginate(
            Bucket=bucket, **({"Prefix": f"{prefix}/"} if prefix else {})
        )
        for found in (upload for page in pages for upload in page.get("Uploads", [])):
            if prefix and not found["Key"].startswith(f"{prefix}/"):  # not every server knows the filter
                continue
            named = {"Bucket": bucket, "Key": found["Key"], "UploadId": found["UploadId"]}
            parts = [p for page in client.get_paginator("list_parts").paginate(**named) for p in page.get("Parts", [])]
            times = [found["Initiated"], *(part["LastModified"] for part in parts)]
            size = sum(int(part["Size"]) for part in parts)
            newest = max(time.timestamp() for time in times)
            yield Upload(f"s3://{bucket}/{found['Key']}", found["UploadId"], size, newest)
    except (BotoCoreError, ClientError) as error:
        raise StoreError(f"cannot list the open uploads of {folder}: {error}", hint=RULE) from error


def abort_upload(storage: Storage | None, path: str, upload_id: str) -> None:
    """Give up an upload and its parts; one that is gone already is none of our concern. Raises StoreError."""
    bucket, key = split_url(path)
    try:
        _client(storage).abort_multipart_upload(Bucket=bucket, Key=key, UploadId=upload_id)
    except ClientError as error:
        if error.response.get("Error", {}).get("Code") != "NoSuchUpload":
            raise StoreError(f"cannot abort the upload of {path}: {error}", hint=RULE) from error
    except BotoCoreError as error:
        raise StoreError(f"cannot abort the upload of {path}: {error}", hint=RULE) from error


def _client(storage: Storage | None) -> Any:
    session = boto3.Session(profile_name=storage.profile if storage is not None else None)
    region = (storage.region if storage is not None else None) or session.region_name or "us-east-1"
    return session.client("s3", endpoint_url=endpoint_of(storage), region_name=region, config=Config(**_BOUNDS))
