"""The errors of explaind; each also is one of Python's built-in errors, so generic handlers keep working."""

__all__ = [
    "ClosureError",
    "DamagedStoreError",
    "DamagedStoreWarning",
    "DataMismatchError",
    "ExplaindError",
    "ModelMismatchError",
    "NonFiniteError",
    "NotRecordedError",
    "RecordingError",
    "ReplayWarning",
    "ResultTooLargeError",
    "ResumeError",
    "StoreExistsError",
    "StoreFormatError",
    "StoreInUseError",
    "StoreUnreachableError",
    "UnattributedWarning",
    "UnknownUpdateRuleError",
    "VerificationError",
]


class ExplaindError(Exception):
    """Base class of every error that explaind raises on purpose."""


class RecordingError(ExplaindError, RuntimeError):
    """The training loop did something that cannot be recorded exactly."""


class NonFiniteError(RecordingError, FloatingPointError):
    """A loss, gradient or parameter became NaN or infinite."""


class StoreExistsError(ExplaindError, FileExistsError):
    """A recording was asked to write where something already is."""


class StoreInUseError(ExplaindError, BlockingIOError):
    """A recording was asked to write where another one is writing."""


class ResumeError(ExplaindError, ValueError):
    """A run cannot be continued with the optimizer, the data or the options that were given."""


class StoreFormatError(ExplaindError, ValueError):
    """The store is not a run of a format that this version reads."""


class StoreUnreachableError(ExplaindError, ConnectionError):
    """Object storage does not answer, or not as it should; nothing is known of what is there."""


class DamagedStoreError(ExplaindError, OSError):
    """A part of the store that should be there is missing or fails its checksum."""


class ModelMismatchError(ExplaindError, ValueError):
    """The model given to read a run is not the model that was recorded."""


class DataMismatchError(ExplaindError, ValueError):
    """The data set given to read a run does not have what the model was called with."""


class NotRecordedError(ExplaindError, LookupError):
    """Something was asked of a run that was never recorded of it."""


class UnknownUpdateRuleError(ExplaindError, NotImplementedError):
    """The optimizer's update is not known as a linear filter, so no example can be credited."""


class ResultTooLargeError(ExplaindError, MemoryError):
    """The arrays asked for would not fit in memory."""


class ClosureError(ExplaindError, ArithmeticError):
    """The terms of a decomposition do not sum to the prediction within tolerance."""


class VerificationError(ExplaindError, RuntimeError):
    """Replaying a recorded step does not give what was recorded."""


class UnattributedWarning(UserWarning):
    """Much of what a decomposition explains came from no recorded example."""


class DamagedStoreWarning(UserWarning):
    """The newest steps of a run that was not closed are lost."""


class ReplayWarning(UserWarning):
    """What is replayed of a run differs from its record by rounding, as it was recorded elsewhere."""
