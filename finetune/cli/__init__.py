"""The subcommands of `ft`, one a file; each offers `command`. Torch and its like are imported inside functions only."""
