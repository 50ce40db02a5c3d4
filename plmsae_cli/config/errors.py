"""The one exception a user is meant to read."""

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
