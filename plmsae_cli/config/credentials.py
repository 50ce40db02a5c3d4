"""Keys that smell of credentials: they have no place in an experiment, and their values are never shown."""

from __future__ import annotations

import re
from collections.abc import Iterable
from itertools import pairwise

MESSAGE = "a secret does not belong in an experiment file"
HINT = (
    "remove it: credentials come from the environment (WANDB_API_KEY, AWS_PROFILE, ...) or a tool's login; "
    "renew a secret that was shared"
)

_WORDS = ("token", "password", "passwd", "passphrase", "secret", "credential", "credentials", "apikey")
_KEY_OF = {"api", "access", "secret", "private", "auth", "wandb", "hf"}
_ASSIGNMENT = re.compile(r"""([\w.-]+)["']?\s*[:=]\s*(?=\S)""")
_IN_ADDRESS = re.compile(r"(?<=://)[^/\s:@]*:[^/\s@]+(?=@)")

Span = tuple[int, int, int, int]  # first line, first column, last line, column behind the end; all from 0


def is_secret(key: str) -> bool:
    """Whether a key names a credential: `hf_token`, `apiKey`, `AWS_SECRET_ACCESS_KEY`; not `batch_tokens`."""
    parts = re.findall(r"[a-z0-9]+", re.sub(r"(?<=[a-z])(?=[A-Z])", "_", key).lower())
    return any(part.endswith(_WORDS) for part in parts) or any(a in _KEY_OF and b == "key" for a, b in pairwise(parts))


def in_address(value: str) -> bool:
    """Whether an address carries a user name and password."""
    return _IN_ADDRESS.search(value) is not None


def clean_address(value: str) -> str:
    """The address without its user name and password."""
    return _IN_ADDRESS.sub("***", value)


def masked(lines: Iterable[str], spans: Iterable[Span] = ()) -> list[str]:
    """The lines with every secret value starred out: those at `spans`, and whatever looks like one."""
    shown = list(lines)
    for first, start, last, stop in spans:
        for number in range(first, min(last + 1, len(shown))):
            line = shown[number]
            begin = start if number == first else 0
            end = stop if number == last else len(line)
            shown[number] = line[:begin] + re.sub(r"\S", "*", line[begin:end]) + line[end:]
    return [_mask_line(line) for line in shown]


def masked_unparsed(lines: Iterable[str]) -> list[str]:
    """As `masked`, for a text that is not YAML: a secret may run on until the next key at its depth."""
    shown: list[str] = []
    depth: int | None = None
    for line in lines:
        indent = len(line) - len(line.lstrip())
        match = re.match(r"""\s*(?:-\s+)*["']?([\w.-]+)["']?\s*:""", line)
        if depth is not None and not (match and indent <= depth):
            shown.append(re.sub(r"\S", "*", line))
            continue
        secret = any(is_secret(key) for key in re.findall(r"""([\w.-]+)["']?\s*:""", line))
        depth = indent if secret else None
        shown.append(_mask_line(line))
    return shown


def _mask_line(line: str) -> str:
    for match in _ASSIGNMENT.finditer(line):
        if is_secret(match.group(1)):
            return line[: match.end()] + re.sub(r"\S", "*", line[match.end() :])
    return _IN_ADDRESS.sub(lambda found: "*" * len(found.group()), line)
