"""Generators of tiny models and hub caches, shared by the tests."""
