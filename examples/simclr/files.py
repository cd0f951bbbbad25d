"""Files that are there whole or not at all."""

import errno
import os

from .errors import RunError


def _sync_folder(folder):
    """Makes the names in a folder as durable as the files."""
    number = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(number)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP):  # what file systems say that cannot do it for folders
            raise
    finally:
        os.close(number)


def write(path, *parts):
    """A file of these bytes at `path`: written beside it (`.tmp` at its end), and renamed when it is on the disk. What
    was there stays until then, and where there is no space. RunError says what was in the way."""
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        try:
            with open(temporary, "wb") as file:
                for part in parts:
                    file.write(part)
                file.flush()
                os.fsync(file.fileno())
            os.replace(temporary, path)
        finally:
            temporary.unlink(missing_ok=True)
        _sync_folder(path.parent)
    except OSError as error:
        size = sum(len(part) for part in parts)
        raise RunError(f"{path}: expected to write {size} bytes, got {error.strerror}") from error
