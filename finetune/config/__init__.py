"""Recipes: schema, loader, validation."""
