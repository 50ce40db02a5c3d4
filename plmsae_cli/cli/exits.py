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


def exit_code(work: Callable[[], int], user_error: int = USAGE) -> int:
    """Run `work`; errors meant for users are printed and become exit codes, others keep their traceback.

    Args:
        user_error: the code for a UserError: 2 before anything ran, 1 after.
    """
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.config.problems import InvalidExperiment

    try:
        return work()
    except InvalidExperiment as error:
        print(error, file=sys.stderr)
        return USAGE
    except UserError as error:
        complain(error.message, error.hint)
        return _locked(error) or user_error
    except KeyboardInterrupt:
        return INTERRUPTED
    except Exception as error:
        return failure(error)


def failure(error: Exception) -> int:
    """The code of an error raised while a stage ran; prints it unless it is a wish to stop."""
    from plmsae_cli.config.errors import UserError
    from plmsae_cli.executors.pool import TaskFailed
    from plmsae_cli.runtime.task import Interrupted

    if isinstance(error, Interrupted):
        print("interrupted; the same command continues from here", file=sys.stderr)
        return INTERRUPTED
    if isinstance(error, UserError):
        complain(error.message, error.hint)
        return _locked(error) or FAILED
    if isinstance(error, TaskFailed):
        print(error.trace, file=sys.stderr)
        complain(str(error))
        return FAILED
    traceback.print_exception(error)
    complain(f"{type(error).__name__}: {error}", "this is not your doing if the lines above mean nothing to you: please report it")
    return FAILED


def _locked(error: Exception) -> int:
    from plmsae_cli.executors.pipeline import Locked

    return LOCKED if isinstance(error, Locked) else 0
