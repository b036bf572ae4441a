"""Benchmarks: local, speculative and HTTP decoding, measured and compared."""
