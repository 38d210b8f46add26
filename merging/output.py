"""Outputs, folders and files, that are whole or absent: written beside the target, and renamed into place when complete."""

from __future__ import annotations

import fcntl
import glob
import os
import shutil
import tempfile
import threading
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from merging.errors import CuveeError

# A run's own folder `.OUT.partial-…` beside OUT holds these, and goes when the run ends. The lock file is the first to
# come and the last to go, so that whoever finds the folder can tell a run at work from one that was killed.
_LOCK, _NEW, _OLD = "lock", "new", "old"
_AT_WORK = ".lock"  # in a folder that is filled step by step; it stays
_UNFINISHED = ".cuvee.json."  # a first lineage that was not yet in place


@contextmanager
def staged(out: Path, *, force: bool = False, marker: str = "cuvee.json") -> Iterator[Path]:
    """A fresh folder beside `out` that becomes `out` when the block ends well, and goes when it raises.

    An earlier output that a killed run had just set aside is put back first.

    Args:
        force: replace an existing `out`; only if it is empty or holds `marker`, so that no slip deletes a home folder.

    Raises:
        CuveeError: `out` exists, or its parent folder cannot be written.
    """
    out = Path(os.path.abspath(out))
    refuse_existing(out, force=force, marker=marker)
    with scratch(out) as new:
        refuse_existing(out, force=force, marker=marker)
        try:
            yield new
            refuse_existing(out, force=force, marker=marker)
            _put_in_place(new.parent, out)
        except OSError as error:
            raise CuveeError(f"cannot write: {error.strerror}", where=str(error.filename or out)) from error


@contextmanager
def scratch(out: Path) -> Iterator[Path]:
    """A fresh folder beside `out`, on its disk, that goes when the block ends.

    What earlier, killed runs left beside `out` is removed; a lock tells theirs from that of a run at work.

    Raises:
        CuveeError: the parent folder cannot be written.
    """
    out = Path(os.path.abspath(out))
    missing = [folder for folder in out.parents if not os.path.exists(folder)]
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        _remove_abandoned(out)
        run, lock = _begin(out)
    except OSError as error:
        what = "is no folder" if isinstance(error, FileExistsError) else f"cannot write: {error.strerror}"
        raise CuveeError(what, where=str(out.parent), mend="choose another folder") from error
    try:
        yield run / _NEW
    finally:
        _remove(run)
        os.close(lock)
        with suppress(OSError):  # up to the first that is not empty: where all went well, that is the first
            for folder in missing:
                folder.rmdir()


def refuse_full_disk(out: Path, needed: int, what: str, mend: str = "free some, or choose another disk") -> None:
    """Before the first byte.

    Args:
        needed: bytes.
        what: takes them.

    Raises:
        CuveeError: the disk on which `out` is to be has fewer that are free.
    """
    parent = next(p for p in out.absolute().parents if os.path.exists(p))  # False where one may not look
    free = shutil.disk_usage(parent).free
    if needed > free:
        told = f"{what} {needed / 1e9:.1f} GB, the disk has {free / 1e9:.1f} GB free"
        raise CuveeError(told, where=str(parent), mend=mend)


def write_whole(file: Path, text: str) -> None:
    """Writes a file, and the folders above it, so that whoever reads it finds the old text or the new.

    Raises:
        CuveeError: it cannot be written.
    """
    half = file.with_name(f".{file.name}.{threading.get_ident()}.{os.getpid()}")  # threads of one process write it too
    try:
        file.parent.mkdir(parents=True, exist_ok=True)
        _remove_halves(file)
        half.write_text(text, encoding="utf-8", errors="backslashreplace")
        half.replace(file)
    except OSError as error:
        raise CuveeError(f"cannot write: {error.strerror}", where=str(file)) from error
    finally:
        with suppress(OSError):
            half.unlink(missing_ok=True)


def refuse_existing(out: Path, *, force: bool, marker: str = "cuvee.json") -> None:
    """Says at once what `staged` would say at the end.

    Raises:
        CuveeError: `out` exists and may not be replaced.
    """
    try:
        if not os.path.lexists(out):
            return
        if not force:
            mend = "choose another folder, or add --force to replace it"
            raise CuveeError("exists already", where=str(out), mend=mend)
        if out.is_symlink() or not out.is_dir():
            raise CuveeError("is no folder", where=str(out), mend="choose another name")
        if any(out.iterdir()) and not (out / marker).is_file():
            raise CuveeError(
                f"holds no {marker}, so it is none of our outputs", where=str(out), mend="remove it yourself"
            )
    except OSError as error:
        raise CuveeError(f"cannot be looked into: {error.strerror}", where=str(out)) from error


@contextmanager
def alone(out: Path) -> Iterator[None]:
    """Keeps other processes out of a folder that is filled step by step and gone on with later; makes it if need be.

    Raises:
        CuveeError: another process is at work in it, or it cannot be written.
    """
    try:
        out.mkdir(parents=True, exist_ok=True)
        lock = os.open(out / _AT_WORK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        what = "is no folder" if isinstance(error, FileExistsError) else f"cannot write: {error.strerror}"
        raise CuveeError(what, where=str(out), mend="choose another folder") from error
    try:
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            mend = "wait for its end, or choose another folder"
            raise CuveeError("another process is at work in it", where=str(out), mend=mend) from None
        except OSError as error:
            raise CuveeError(
                f"cannot be locked: {error.strerror}", where=str(out), mend="choose another disk"
            ) from error
        yield
    finally:
        os.close(lock)


def just_begun(out: Path) -> bool:
    """Whether a folder holds no more than a run leaves that was killed in its first moment."""
    with suppress(OSError):
        names = {file.name for file in out.iterdir()}
        return not out.is_symlink() and all(name == _AT_WORK or name.startswith(_UNFINISHED) for name in names)
    return False


def put_back(out: Path) -> None:
    """Undoes what a run began that was killed while it replaced `out`: an earlier output is in its place again."""
    with suppress(OSError):
        _remove_abandoned(Path(os.path.abspath(out)))


def _begin(out: Path) -> tuple[Path, int]:
    """The run's own folder, and the handle that holds its lock."""
    while True:
        run = Path(tempfile.mkdtemp(prefix=f".{out.name}.partial-", dir=out.parent))
        with suppress(FileNotFoundError):  # another run was faster and took it for abandoned
            lock = os.open(run / _LOCK, os.O_RDWR | os.O_CREAT, 0o600)
            fcntl.flock(lock, fcntl.LOCK_EX)
            if os.fstat(lock).st_nlink:
                (run / _NEW).mkdir()
                return run, lock
            os.close(lock)


def _remove(run: Path) -> None:
    for name in (_NEW, _OLD):
        shutil.rmtree(run / name, ignore_errors=True)
    with suppress(OSError):
        (run / _LOCK).unlink(missing_ok=True)
        run.rmdir()


def _put_in_place(run: Path, out: Path) -> None:
    if out.exists():
        os.rename(out, run / _OLD)
    try:
        os.rename(run / _NEW, out)
    except OSError:
        _put_back(run, out)
        raise


def _put_back(run: Path, out: Path) -> None:
    if (run / _OLD).exists() and not os.path.lexists(out):
        os.rename(run / _OLD, out)


def _remove_abandoned(out: Path) -> None:
    for run in out.parent.glob(f".{glob.escape(out.name)}.partial-*"):
        try:
            lock = os.open(run / _LOCK, os.O_RDWR)
        except OSError:
            with suppress(OSError):
                run.rmdir()  # killed in its first moment, or someone else's, which is not empty
            continue
        with suppress(OSError):  # a run at work holds it
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _put_back(run, out)
            _remove(run)
        os.close(lock)


def _remove_halves(file: Path) -> None:
    """What killed processes left of this file."""
    for left in file.parent.glob(f".{glob.escape(file.name)}.*"):
        process = left.name.rpartition(".")[2]
        if process.isdecimal() and not _is_alive(int(process)):
            left.unlink(missing_ok=True)


def _is_alive(process: int) -> bool:
    try:
        os.kill(process, 0)
    except (ProcessLookupError, OverflowError):
        return False
    except PermissionError:
        pass  # someone else's
    return True
