"""What an S3 server's answers mean for the user: one line for what is wrong, one for what to do."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import obstore
from obstore.exceptions import BaseError

from plmsae_cli.config.errors import UserError
from plmsae_cli.store.records import DamagedError, MissingError, StoreError

_T = TypeVar("_T")
_CREDENTIALS_EXPIRED = "log in again (aws sso login), or renew AWS_SESSION_TOKEN, then start again"
_BY_CODE = {
    "NoSuchBucket": ("there is no such bucket", "check its name, storage.endpoint_url and storage.region"),
    "ExpiredToken": ("the credentials have expired", _CREDENTIALS_EXPIRED),
    "ExpiredTokenException": ("the credentials have expired", _CREDENTIALS_EXPIRED),
    "TokenRefreshRequired": ("the credentials have expired", _CREDENTIALS_EXPIRED),
    "InvalidToken": ("the session token is not valid", _CREDENTIALS_EXPIRED),
    "InvalidAccessKeyId": (
        "the server does not know the access key",
        "check AWS_ACCESS_KEY_ID or storage.profile, and that it belongs to storage.endpoint_url",
    ),
    "SignatureDoesNotMatch": ("the secret key is wrong", "check AWS_SECRET_ACCESS_KEY or storage.profile"),
    "RequestTimeTooSkewed": ("this machine's clock is wrong", "set the clock, for example with NTP"),
    "PermanentRedirect": ("the bucket is in another region", "set storage.region to the bucket's region"),
    "AuthorizationHeaderMalformed": ("the bucket is in another region", "set storage.region to it"),
    "SlowDown": ("the server is overloaded (SlowDown)", "start again later: what is complete is kept"),
}
VERIFY = (
    "remove the MANIFEST.json of its folder and start again: files that differ in size from their record are made anew"
)
NO_LEAVE = "permission denied"
_NO_LEAVE = (
    NO_LEAVE,
    "check the credentials (AWS_ACCESS_KEY_ID, storage.profile) and the bucket's policy;"
    " for a public bucket set storage.anonymous: true",
)
_UNREACHABLE = ("error sending request", "kind: Connect", "kind: Timeout", "TimedOut", "IncompleteMessage")


def _cut_off(error: Exception) -> bool:
    """Whether an answer ended too early. obstore asks again for bodies of objects, not for all others."""
    return "response body error" in str(error)


def explain(error: Exception, action: str, url: str, endpoint: str | None) -> StoreError:
    """The StoreError, MissingError or DamagedError to raise in place of obstore's `error`."""
    text = str(error)
    code = match[1] if (match := re.search(r"<Code>(\w+)</Code>", text)) else ""
    status = match[1] if (match := re.search(r"status code: (\d{3})", text)) else ""
    where = endpoint or "AWS"
    hint: str | None
    if code in _BY_CODE:
        reason, hint = _BY_CODE[code]
    elif status in ("401", "403"):
        reason, hint = _NO_LEAVE
    elif isinstance(error, FileNotFoundError):
        return MissingError(f"cannot {action} {url}: there is no such object")
    elif status == "301" or "BareRedirect" in text:
        reason, hint = _BY_CODE["PermanentRedirect"]
    elif status == "404":
        reason = f"{where} does not know the bucket, or is no S3 server"
        hint = "check the bucket's name and storage.endpoint_url"
    elif status == "412":
        reason, hint = "the object was replaced while it was read", "start again"
    elif status == "416":
        return DamagedError(f"cannot {action} {url}: it is shorter than it should be", VERIFY)
    elif status.startswith("5"):
        reason = f"{where} answered {status} {code} to every attempt"
        hint = "start again later: what is complete is kept"
    elif any(sign in text for sign in _UNREACHABLE):
        reason = f"{where} does not answer"
        hint = "check the network and storage.endpoint_url"
    else:
        # The first line says it; the rest is a dump of obstore's internals.
        reason, hint = text.partition("\n")[0][:300], None
    return StoreError(f"cannot {action} {url}: {reason}", hint)


def again(request: Callable[[], _T]) -> _T:
    """The request, and up to three times more while its answer is cut short."""
    for pause in (0.05, 0.2, 0.8):
        try:
            return request()
        except BaseError as error:
            if not _cut_off(error):
                raise
        time.sleep(pause)
    return request()


@contextmanager
def explained(action: str, url: str, endpoint: str | None) -> Iterator[None]:
    """Turn obstore's errors into ours."""
    try:
        yield
    except UserError:
        raise
    except (BaseError, FileNotFoundError, ValueError) as error:
        raise explain(error, action, url, endpoint) from error


def checked(data: obstore.Bytes, path: str, start: int, stop: int) -> memoryview:
    view = memoryview(data)
    check_length(view.nbytes, path, start, stop)
    return view


def check_length(came: int, path: str, start: int, stop: int) -> None:
    if came != stop - start:
        raise DamagedError(f"{path} is cut short: bytes {start} to {stop} were asked for, {came} came", VERIFY)
