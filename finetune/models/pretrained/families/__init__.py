"""One module per pretrained model family: its record, `SPEC`, and its implementation. See docs/adding-a-model.md."""
