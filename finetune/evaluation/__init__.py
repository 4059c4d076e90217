"""Evaluation of generated images: distances to real images, likelihoods, mode collapse."""
