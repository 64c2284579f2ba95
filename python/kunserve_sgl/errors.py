"""The three kinds of error of KunServe: what an operator can do about it decides the kind. And what is no failure."""


class KunserveError(Exception):
    """Base of all errors that KunServe raises on purpose."""


class ConfigurationError(KunserveError):
    """A flag, field or file is wrong. The message names it and what would be accepted; trying again does not help."""


class TransientError(KunserveError):
    """Something was not possible now (a peer is away, a pool is full). Nothing was changed; a later try may work."""


class InvariantError(KunserveError):
    """The program contradicts itself. Going on would risk wrong answers, so the process must stop."""


class BatchCalledOffError(Exception):
    """Says that the own batch under way is given up, because this replica recovers from the death of another. It is no
    failure: whoever runs batches begins anew."""
