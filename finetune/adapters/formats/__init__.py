"""Adapter file formats of other programs."""
