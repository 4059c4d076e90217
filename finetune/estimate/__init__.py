"""What a run will need before it runs: peak memory, hours and money. Torch-free, so that the answer comes at once."""
