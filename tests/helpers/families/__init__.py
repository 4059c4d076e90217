"""Two tiny families that test roles and media: image editing from pairs, and clips through a 3-D VAE."""
