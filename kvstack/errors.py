"""Every error kvstack raises, as one family.

    KVStackError
    ├── StageError   a stage's settings, or the stages of one stack, cannot work
    ├── SpecError    a spec string, dict or name does not describe a stack
    ├── BindError    the stack and this model do not fit each other
    ├── CalibrationError  a calibration is damaged, is missing, or belongs to another model
    └── UseError     a bound stack was used in a way that would give wrong results
        └── WriteError   a file cannot be written; an `OSError` too

All of them are `ValueError`s as well, so code that knows nothing of kvstack can still catch bad input.

    KVStackWarning   what a stack leaves undone for a model, without any result being wrong
"""


class KVStackError(ValueError):
    """Base of all errors raised by kvstack."""


class StageError(KVStackError):
    """A stage's settings, or the stages of one stack, cannot work."""


class SpecError(KVStackError):
    """A spec string, dict or name does not describe a stack."""


class BindError(KVStackError):
    """The stack and this model do not fit each other."""


class UseError(KVStackError):
    """A bound stack was used in a way that would give wrong results."""


class CalibrationError(KVStackError):
    """A calibration is damaged, is missing, or belongs to another model."""


class KVStackWarning(UserWarning):
    """A part of a stack is not at work for a model; no result is wrong."""


class WriteError(UseError, OSError):
    """A file cannot be written: what was there is unchanged."""
