"""LoRA and other adapters."""
