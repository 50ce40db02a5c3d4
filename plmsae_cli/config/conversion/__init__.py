"""Settings of other tools as experiments of ours, for `plmsae init --from`.

One module a tool, with `recognises(text)` and `convert(text) -> (yaml_text, notes)`: the notes say what of the old settings was
read otherwise than it looks, and what has no counterpart.
"""

from __future__ import annotations

from pathlib import Path

from plmsae_cli.config.conversion import dictionary_learning, saelens, speedrunning_plms
from plmsae_cli.config.errors import UserError

SOURCES = {"SAELens": saelens, "dictionary_learning": dictionary_learning, "SpeedrunningPLMs": speedrunning_plms}


def convert_file(path: Path) -> tuple[str, list[str]]:
    """The experiment, as text, that a file of another tool describes, and notes for people.

    Raises:
        UserError: no such file, not text, of no tool that is known here, or a value is of another kind than its name asks for.
    """
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: no such file", "relative paths start at the working folder") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read: {error}", "name a text file of settings") from None
    for source in SOURCES.values():
        if source.recognises(text):
            try:
                converted: tuple[str, list[str]] = source.convert(text)
            except UserError:
                raise
            except (TypeError, ValueError, AttributeError) as error:
                raise UserError(
                    f"{path}: a value is not what its name asks for: {error}",
                    "compare the file with its tool's examples",
                ) from error
            return converted
    raise UserError(
        f"{path} is not a file of settings of {' or '.join(SOURCES)}", "`plmsae init` writes one to begin with"
    )
