"""Slow references, written from the definitions."""
