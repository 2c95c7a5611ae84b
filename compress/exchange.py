"""Put a finished folder where another is: at one stroke where the system can, and else so that the other is never lost."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
from pathlib import Path

CURRENT_FOLDER, EXCHANGE = -100, 2  # AT_FDCWD and RENAME_EXCHANGE of Linux
UNABLE = (errno.ENOSYS, errno.EINVAL, errno.ENOTSUP)  # what a system or a file system answers that cannot


def exchange(one: Path, other: Path) -> bool:
    """Swap what two paths name, both or neither; False where the system or the file system cannot. Raises OSError."""
    system = ctypes.CDLL(None, use_errno=True)
    try:
        renameat2 = system.renameat2
    except AttributeError:  # macOS, or a C library from before 2018
        return False
    if renameat2(CURRENT_FOLDER, os.fsencode(one), CURRENT_FOLDER, os.fsencode(other), EXCHANGE) == 0:
        return True
    code = ctypes.get_errno()
    if code in UNABLE:
        return False
    raise OSError(code, os.strerror(code), str(one), None, str(other))


def aside(out: Path) -> Path:
    """The name that the old folder OUT has for the moment between two renames."""
    return out.with_name(f".{out.name}.replaced")


def replace(new: Path, out: Path) -> None:
    """Move the folder `new` to `out`; what was there is gone afterwards, and still there if this fails. Raises OSError."""
    if not out.exists():
        new.rename(out)
    elif exchange(new, out):
        shutil.rmtree(new, ignore_errors=True)
    else:
        old = aside(out)
        out.rename(old)
        try:
            new.rename(out)
        except BaseException:
            old.rename(out)
            raise
        shutil.rmtree(old, ignore_errors=True)


def restored(out: Path) -> bool:
    """Put the old folder back that a process left aside which ended between two renames; whether there was such a folder."""
    old = aside(out)
    if not old.is_dir():
        return False
    if out.exists() and any(out.iterdir()):  # the new folder is in place, and only removing the old one is left to do
        shutil.rmtree(old, ignore_errors=True)
        return False
    if out.exists():
        out.rmdir()
    old.rename(out)
    logging.getLogger("compress").warning("%s is back: an earlier run ended while it was being replaced.", out)
    return True
