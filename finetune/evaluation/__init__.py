"""Numbers about what a model has learned."""
