"""Training data: sources, audit, buckets, encoding, cache and sampling order."""
