"""Memory options: quantization, offload, activation checkpointing."""
