"""GPUs, CPUs and groups of devices."""
