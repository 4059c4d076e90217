"""Diffusion and flow matching models."""
