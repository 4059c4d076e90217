"""Models trained from scratch: VAEs, VQ models, GANs, normalizing flows, autoregressive and diffusion models."""
