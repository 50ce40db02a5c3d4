"""The one exception a user is meant to read, and one line of any other."""

from __future__ import annotations


class UserError(ValueError):
    """Something the user can mend: the message says where and what, the hint says how.

    The command line prints both and leaves with exit code 2 (found before anything ran) or 1.
    """

    def __init__(self, message: str, hint: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint

    def __str__(self) -> str:
        return self.message if self.hint is None else f"{self.message}\nhint: {self.hint}"

    def __reduce__(self) -> tuple[type[UserError], tuple[str, str | None]]:
        return type(self), (self.message, self.hint)


def first_line(error: BaseException) -> str:
    """What any error says, in one line; its kind where it says nothing."""
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
