"""Neural fields larger than memory: hash-grid fields in a crash-safe page store."""

from dpnc import tcnn
from dpnc.encoding import HashGrid
from dpnc.errors import FieldError
from dpnc.field import Field, create, open  # noqa: A004 - `dpnc.open` is what users look for
from dpnc.head import Head
from dpnc.lookahead import Prefetch
from dpnc.optim import SGD, Adam
from dpnc.table import Table
from tiers import Budget, Migration, TierError

__all__ = [
    "SGD",
    "Adam",
    "Budget",
    "Field",
    "FieldError",
    "HashGrid",
    "Head",
    "Migration",
    "Prefetch",
    "Table",
    "TierError",
    "create",
    "open",
    "tcnn",
]
