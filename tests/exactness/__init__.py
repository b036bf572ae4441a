"""Speculative decoding against plain decoding, token for token."""
