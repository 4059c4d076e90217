"""Run the real training step on fake tensors and record its operators and allocations."""
