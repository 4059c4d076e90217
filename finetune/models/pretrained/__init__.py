"""What all diffusers pipelines share."""
