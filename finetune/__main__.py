"""`python -m finetune` is `ft`."""

from __future__ import annotations

from finetune.cli.main import main

if __name__ == "__main__":
    main()
