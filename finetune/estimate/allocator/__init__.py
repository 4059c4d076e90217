"""Replay of PyTorch's caching allocator."""
