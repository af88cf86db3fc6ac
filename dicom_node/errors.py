"""Why something goes no further."""


class AwayError(Exception):
    """The service or the destination does not answer now; later it may."""


class FaultError(AwayError):
    """The service had a fault with this series, or no time for it; a few times it may have."""


class RefusedError(Exception):
    """It will never be taken; the message says why."""
