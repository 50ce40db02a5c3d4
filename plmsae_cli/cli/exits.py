"""Exit codes, and the one place where exceptions become words for people."""

from __future__ import annotations

import sys
import traceback
from collections.abc import Callable

DONE, FAILED, USAGE, QUEUE_FAILED, LOCKED, INTERRUPTED, FORCED = 0, 1, 2, 3, 4, 75, 130

MEANINGS = {
    DONE: "done",
    FAILED: "failed",
    USAGE: "usage or YAML at fault, or an input missing; nothing was run",
    QUEUE_FAILED: "queue ended with failures",
    LOCKED: "locked: another plmsae works on the same run or folder",
    INTERRUPTED: "interrupted and resumable: the same command continues",
    FORCED: "forced quit, by a second Ctrl-C",
}


def complain(message: str, hint: str | None = None) -> None:
    """One error, and how to mend it, on stderr."""
    print(f"error: {message}", file=sys.stderr)
    if hint:
        print(f"hint: {hint}", file=sys.stderr)


def checked(work: Callable[[], int], about: str = "") -> int:
    """The code of work that comes before any stage: an error meant for users is a matter of usage.

    Args:
        about: begins the message, where several files could have the same.
    """
    from plmsae_cli.config.problems import InvalidExperiment

    try:
        return work()
    except InvalidExperiment as error:
        print(error, file=sys.stderr)
        return USAGE
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        code = failure(error, about)
        return USAGE if code == FAILED and _words(error) else code


def failure(error: Exception, about: str = "") -> int:
    """The code of an error raised while a stage ran; prints it unless it is a wish to stop."""
    from plmsae_cli.executors.locks import Locked
    from plmsae_cli.runtime.run_folder import RunDiffers
    from plmsae_cli.runtime.task import Interrupted, TaskFailed

    if isinstance(error, Interrupted):
        print("interrupted; the same command continues from here", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, TaskFailed):
        if error.trace:
            print(error.trace, file=sys.stderr)
        complain(str(error))
        return FAILED
    if words := _words(error):
        message, hint = words
        complain(f"{about}: {message}" if about else message, hint)
        return LOCKED if isinstance(error, Locked) else USAGE if isinstance(error, RunDiffers) else FAILED
    traceback.print_exception(error)
    complain(
        f"{type(error).__name__}: {error}",
        "this is not your doing if the lines above mean nothing to you: please report it",
    )
    return FAILED


def _words(error: Exception) -> tuple[str, str | None] | None:
    """The message and hint of an error that a user can mend."""
    from plmsae_cli.runtime.system_errors import as_user_error

    words = as_user_error(error)
    if words is None:
        return None
    hint = words.hint
    if isinstance(error, FileNotFoundError) or isinstance(error.__cause__, FileNotFoundError):
        from plmsae_cli.store.sources import command_for

        hint = command_for(words.message) or hint or "relative paths start at the folder in which the command runs"
    return words.message, hint
