"""LLM Inference Lab: speculative decoding, faster than plain decoding and exactly as good."""

__version__ = "0.1.0"
