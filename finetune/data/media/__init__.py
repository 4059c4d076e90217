"""Decoding, one module per medium."""
