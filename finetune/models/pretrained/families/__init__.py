"""One module per pretrained model family."""
