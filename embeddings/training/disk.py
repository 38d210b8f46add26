"""Disk errors: what the libraries raise that read and write for us, in one line that says which of the two failed."""

from __future__ import annotations

import errno
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merging.errors import CuveeError

#: What only writing can meet.
_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS)
_NUMBER = re.compile(r"\(os error (\d+)\)")  # as libraries in Rust tell it


@contextmanager
def disk_errors(run: Path) -> Iterator[None]:
    """Turns what the libraries raise that read and write for us into CuveeError.

    Args:
        run: the folder that is written.
    """
    from safetensors import SafetensorError

    try:
        yield
    except OSError as error:
        raise _of_system(error, run) from error
    except SafetensorError as error:
        verb = "cannot be read" if "deserializ" in str(error) else "cannot write"
        raise CuveeError(f"{verb}: {error}", where=str(run)) from error
    except Exception as error:
        if type(error) is not Exception:  # which is what the tokenizers raise
            raise
        verb = "cannot write" if _NUMBER.search(str(error)) else "a file it needs cannot be read"
        raise CuveeError(f"{verb}: {error}", where=str(run)) from error


def _of_system(error: OSError, run: Path) -> CuveeError:
    reason, file = error.strerror or (str(error).strip().splitlines() or [type(error).__name__])[0], error.filename
    if error.errno in _NO_ROOM:
        return CuveeError(f"cannot write: {reason}", where=str(file or run))
    if error.errno is None:  # no system call's, but a library's that looks for a file or asks a hub
        return CuveeError(f"something it needs cannot be read: {reason}", where=str(run))
    if file is None:
        return CuveeError(f"cannot read or write: {reason}", where=str(run))
    path = Path(os.path.abspath(os.fsdecode(file)))
    verb = "cannot write" if path.is_relative_to(os.path.abspath(run)) and not _was_read(path) else "cannot be read"
    return CuveeError(f"{verb}: {reason}", where=str(path))


def _was_read(file: Path) -> bool:
    """Whether what failed with a file in our own folder was reading: to write needs no file, and none that can be read."""
    if not file.exists():
        return file.parent.is_dir() and os.access(file.parent, os.W_OK)
    return not os.access(file, os.R_OK)
