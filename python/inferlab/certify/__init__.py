"""Certificates: what is claimed of decoding, proved by commands that anyone can run again."""
