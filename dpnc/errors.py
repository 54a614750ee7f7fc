"""The typed errors of fields. Storage errors are in `tiers.errors`."""

from __future__ import annotations

from tiers.errors import TierError


class FieldError(TierError):
    """Root of the errors that fields raise; itself a `tiers.TierError`."""


class EncodingError(FieldError, ValueError):
    """A parameter of an encoding is out of range."""


class PointsError(FieldError, ValueError):
    """Points or gradients have the wrong dtype or shape, or a value that is refused."""


class TableError(FieldError, ValueError):
    """Ids, offsets or rows of a table have the wrong dtype or shape, or do not exist."""


class OptimizerError(FieldError, ValueError):
    """A parameter of an optimiser is out of range, or a field has no optimiser."""


class HeadError(FieldError, ValueError):
    """A parameter of a head is out of range, or a field has no head."""


class StaleForwardError(FieldError, RuntimeError):
    """Rows have changed since the forward pass whose gradient is to be taken."""


class FieldFormatError(FieldError):
    """The store is sound, but what it says of its field cannot be read by this version."""


class ConfigError(FieldError, ValueError):
    """A configuration file cannot be read, or has a key or a value that is not known."""


class ImageError(FieldError, ValueError):
    """A picture cannot be read, or a region of it does not exist."""
