"""A process that dies, as by ``kill -9``, just before it would change the disk."""

from __future__ import annotations

import os
import sys
import traceback

# Python's own names of what changes a directory; `open` counts where it is for writing.
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"}
DIED = 9


def killed_at(count, folder, function, *arguments):
    """Call ``function`` in a copy of this process that dies before its ``count``-th change.

    Changes outside of ``folder`` are not counted. Tells whether it died; it must not fail.
    """
    process = os.fork()
    if process:
        code = os.waitstatus_to_exitcode(os.waitpid(process, 0)[1])
        assert code in (0, DIED), f"the process ended with {code}"
        return code == DIED
    seen = 0

    def watch(event, values):
        nonlocal seen
        if event == "open":
            _, mode, flags = values
            changes = "w" in (mode or "") or "a" in (mode or "") or flags & os.O_CREAT
        else:
            changes = event in _CHANGES
        inside = os.path.abspath(os.fsdecode(values[0])) if changes and values else ""
        # Of `rmtree`, which names what it deletes from the directory that it has open.
        bare = event in ("os.remove", "os.rmdir") and os.sep not in os.fsdecode(values[0])
        if changes and (inside.startswith(os.path.abspath(folder)) or bare):
            seen += 1
            if seen == count:
                os._exit(DIED)

    try:
        sys.addaudithook(watch)
        function(*arguments)
    except BaseException:
        traceback.print_exc()
        os._exit(1)
    os._exit(0)


def every_death(folder, function, *arguments, most=200):
    """Yield each count at which the function dies, after it has died there."""
    for count in range(1, most):
        yield count, (died := killed_at(count, folder, function, *arguments))
        if not died:
            return
    raise AssertionError(f"more than {most} changes")
