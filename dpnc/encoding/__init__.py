"""Encodings: from a point to the rows of a space."""

from dpnc.encoding.hash_grid import HashGrid
from dpnc.encoding.level import Level, LevelTable

__all__ = ["HashGrid", "Level", "LevelTable"]
