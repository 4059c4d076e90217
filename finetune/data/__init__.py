"""Images and captions: what is there, how it is cropped, in which order it is drawn, and what is kept of it."""
