"""Inspect a dataset before training."""
