"""Two tiny families that prove the seams of roles and media: image editing from pairs, and clips through a 3-D VAE."""
