"""The loop and what it stands on. Nothing here knows a model family."""
