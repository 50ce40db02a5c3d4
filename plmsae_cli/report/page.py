"""Templates to one self-contained file: no network; its one style sheet and script are allowed by hash."""

from __future__ import annotations

import base64
import hashlib
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from plmsae_cli.store.fs import Store


@cache
def _environment() -> Environment:
    return Environment(
        loader=PackageLoader("plmsae_cli.report"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )


def _asset(name: str) -> Markup:
    return Markup((files("plmsae_cli.report") / "templates" / name).read_text(encoding="utf-8"))


def policy(style: str, script: str | None) -> str:
    """The content-security policy of a page with this style sheet and, if any, this script: no more."""
    parts = ["default-src 'none'", f"style-src '{_hash(style)}'", "base-uri 'none'", "form-action 'none'"]
    if script is not None:
        parts.append(f"script-src '{_hash(script)}'")
    return "; ".join(parts)


def _hash(text: str) -> str:
    return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def render(template: str, *, script: str | None = None, **values: Any) -> bytes:
    """A template as one page; the same inputs give the same bytes."""
    style = _asset("style.css")
    code = None if script is None else _asset(script)
    html = _environment().get_template(template).render(style=style, script=code, policy=policy(style, code), **values)
    return html.encode("utf-8", errors="replace")


def write_page(run: Path, template: str, *, script: str | None = None, **values: Any) -> Path:
    """Render a template to `<run>/report/index.html`, atomically."""
    path = run / "report" / "index.html"
    Store().write(str(path), [render(template, script=script, **values)])
    return path
