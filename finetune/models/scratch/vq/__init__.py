"""VQ-VAE, VQ-GAN and priors over their codes."""
