"""Why something goes no further."""


class AwayError(Exception):
    """The service or the destination does not answer now; later it may."""


class RefusedError(Exception):
    """It will never be taken; the message says why."""
