"""The error that a user can fix."""


class UserError(ValueError):
    """The user can fix this: the message says what was found, what was expected, what to do."""
