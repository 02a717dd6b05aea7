"""``python -m minimind``: the `minimind` command, usable without installing."""

from .cli import main

if __name__ == "__main__":
    raise SystemExit(main())
