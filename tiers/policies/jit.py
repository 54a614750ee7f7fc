"""The decorator of the compiled functions of policies."""

from __future__ import annotations

from pathlib import Path

from tiers.compiled import Compiler

compiled = Compiler("policies", Path(__file__).parent)
"""Compiles a function on its first call; machine code is kept until a policy's source changes."""
