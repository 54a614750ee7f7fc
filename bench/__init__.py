"""Benchmarks: each prints the peer beside us from one interleaved run, and the limit."""
