"""Compiled loops: arrays in, arrays filled. Importing this package loads numba only on use."""
