"""Outputs that are whole or absent: written beside the target, and renamed into place when complete."""

from __future__ import annotations

import fcntl
import os
import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from merging.errors import CuveeError

_LOCK = ".lock"
_ABANDONED_SECONDS = 600  # a staging folder without a lock file is someone's who just began, or was killed long ago


@contextmanager
def staged(out: Path, *, force: bool = False, marker: str = "cuvee.json") -> Iterator[Path]:
    """A fresh folder beside `out` that becomes `out` when the block ends well, and goes when it raises.

    What earlier, killed runs left beside `out` is removed; a lock tells theirs from that of a run at work.

    Args:
        force: replace an existing `out`; only if it is empty or holds `marker`, so that no slip deletes a home folder.

    Raises:
        CuveeError: `out` exists, or its parent folder cannot be written.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out, force=force, marker=marker)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        staging = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
    except OSError as error:
        raise CuveeError(
            f"cannot write: {error.strerror}", where=str(out.parent), mend="choose another folder"
        ) from error
    lock = os.open(staging / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        staging.chmod(0o777 & ~_umask())
        yield staging
        (staging / _LOCK).unlink()
        _put_in_place(staging, out, force=force, marker=marker)
    except OSError as error:
        raise CuveeError(f"cannot write: {error.strerror}", where=str(error.filename or out)) from error
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        os.close(lock)


def refuse_existing(out: Path, *, force: bool, marker: str = "cuvee.json") -> None:
    """Says at once what `staged` would say at the end.

    Raises:
        CuveeError: `out` exists and may not be replaced.
    """
    if not out.exists() and not out.is_symlink():
        return
    if not force:
        raise CuveeError("exists already", where=str(out), mend="choose another folder, or add --force to replace it")
    if out.is_symlink() or not out.is_dir():
        raise CuveeError("is no folder", where=str(out), mend="choose another name")
    if any(out.iterdir()) and not (out / marker).is_file():
        raise CuveeError(f"holds no {marker}, so it is none of our outputs", where=str(out), mend="remove it yourself")


def _put_in_place(staging: Path, out: Path, *, force: bool, marker: str) -> None:
    refuse_existing(out, force=force, marker=marker)
    if not out.exists():
        os.rename(staging, out)
        return
    old = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent)) / out.name
    os.rename(out, old)
    os.rename(staging, out)
    shutil.rmtree(old.parent, ignore_errors=True)


def _remove_abandoned(out: Path) -> None:
    for folder in out.parent.glob(f".{_escaped(out.name)}.partial-*"):
        try:
            lock = os.open(folder / _LOCK, os.O_RDWR)
        except OSError:
            if time.time() - folder.stat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)
            continue
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            shutil.rmtree(folder, ignore_errors=True)
        except OSError:
            pass  # a run at work holds it
        finally:
            os.close(lock)


def _escaped(name: str) -> str:
    return "".join(f"[{c}]" if c in "*?[" else c for c in name)


def _umask() -> int:
    mask = os.umask(0)
    os.umask(mask)
    return mask
