"""GANs."""
