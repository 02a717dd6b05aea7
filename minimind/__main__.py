"""``python -m minimind``: the `minimind` command, usable without installing."""

import os
import sys

from .cli import main

if __name__ == "__main__":
    code = main()
    if "LOCAL_RANK" in os.environ:  # started by torchrun
        # Without Python's own clearing up: threads of torch's process groups that are still there
        # then, now and then, end the process with an abort, after all was done and written.
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    raise SystemExit(code)
