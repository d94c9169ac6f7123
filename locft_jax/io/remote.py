"""Files and folders at a URL (`gs://bucket/...`, or any that fsspec knows): the few operations a run needs.

fsspec itself rather than a path library on top of it: a run needs ranged reads, streamed writes, copies
inside a store and errors that name the URL and the remedy, and all of these are calls of the file system.
"""

import atexit
import dataclasses
import io
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any, TypeVar

from locft_jax.errors import UserError, reason

if TYPE_CHECKING:
    from fsspec import AbstractFileSystem

THREADS = 16  # requests at a time: an object store answers one at 0.1 GB/s or less
BLOCK = 32 * 2**20  # bytes of a request, and of a piece of a stream
SMALL = 100 * 2**20  # bytes that a file of a model folder beside its weights may have
T = TypeVar("T")
R = TypeVar("R")


def is_url(text: object) -> bool:
    """Whether this is a URL and not a path."""
    return isinstance(text, str) and re.match(r"[A-Za-z][A-Za-z0-9+.-]*://", text) is not None


def path_or_url(text: str) -> str | Path:
    """An argument of a command line: a URL as it is, anything else as a path."""
    return text if is_url(text) else Path(text)


@contextmanager
def failures(url: object, doing: str = "read") -> Iterator[None]:
    """Whatever goes wrong at a URL as a UserError with the remedy: libraries have dozens of kinds."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url}: not there; check the bucket's name and the path") from None
    except Exception as e:
        remedy = "check the bucket's name, the path, and the account's permissions"
        raise UserError(f"{url}: cannot be {doing} ({reason(e)}); {remedy}") from None


@contextmanager
def _writing(url: str) -> Iterator[None]:
    """Whatever goes wrong while writing as an OSError, as of a full disk."""
    try:
        yield
    except (OSError, NotImplementedError, UserError):
        raise
    except Exception as e:
        raise OSError(f"{url}: cannot be written ({reason(e)})") from None


@contextmanager
def naming_url(local: Path, url: object) -> Iterator[None]:
    """Errors about a local copy name the URL."""
    try:
        yield
    except UserError as e:
        raise UserError(str(e).replace(str(local), str(url))) from None


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file or folder at a URL; `path` is the file system's own name for it."""

    url: str
    fs: "AbstractFileSystem"
    path: str

    def __truediv__(self, name: str) -> "Remote":
        return dataclasses.replace(self, url=f"{self.url}/{name}", path=f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.url

    @property
    def name(self) -> str:
        return self.path.rpartition("/")[2]

    def names(self, deep: bool = False) -> dict[str, int]:
        """Bytes of every file directly in it (`deep`: or anywhere below), by its path relative to it. Raises
        UserError for a bucket that may not be read."""
        found: Any = ()
        with failures(self.url), suppress(FileNotFoundError):
            self.fs.invalidate_cache()
            call = self.fs.find if deep else self.fs.ls
            found = call(self.path, detail=True)
            found = found.values() if isinstance(found, dict) else found
        base = f"{self.path}/"  # some list a file as its own only entry, and a folder as an empty file
        files = {e["name"]: int(e["size"] or 0) for e in found if e["type"] == "file" and e["name"] != base}
        return {name[len(base) :]: size for name, size in sorted(files.items()) if name.startswith(base)}

    def size(self) -> int:
        """Bytes of this file. Raises UserError when there is none."""
        with failures(self.url):
            return int(self.fs.info(self.path)["size"])

    def exists(self) -> bool:
        """Whether this file is there. Raises UserError where that cannot be known."""
        with failures(self.url):
            self.fs.invalidate_cache()
            return bool(self.fs.exists(self.path))

    def read(self, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes [begin, end) of this file. Raises UserError when it is missing, OSError when too short."""
        with failures(self.url):
            whole = (begin, end) == (0, None)  # of an empty file no range is valid
            data: bytes = self.fs.cat_file(self.path, **({} if whole else {"start": begin, "end": end}))
        if end is not None and len(data) != end - begin:
            raise OSError(f"{self.url}: {len(data)} of the {end - begin} bytes from {begin:,} on arrived")
        return data

    def write(self, pieces: bytes | Iterable[bytes]) -> None:
        """Write this file, in place of one that is there. Raises OSError."""
        with _writing(self.url):
            if isinstance(pieces, bytes):
                self.fs.pipe_file(self.path, pieces)
                return
            file = self.fs.open(self.path, "wb", block_size=BLOCK)
            try:
                for piece in pieces:
                    file.write(piece)
                file.close()
            except BaseException:  # closing may make what was written so far look like a whole file
                with suppress(Exception):
                    file.close()
                self.remove()
                raise

    def upload(self, source: Path) -> None:
        """Write a local file to this URL. Raises OSError."""
        with _writing(self.url):
            self.fs.put_file(str(source), self.path)

    def copy_from(self, source: "Remote") -> None:
        """Write another file to this URL: inside the store where it can, else through this machine."""
        if type(source.fs) is type(self.fs):
            with suppress(NotImplementedError), _writing(self.url):
                self.fs.cp_file(source.path, self.path)
                return
        size = source.size()
        self.write(source.read(at, min(size, at + BLOCK)) for at in range(0, size, BLOCK))

    def remove(self) -> None:
        """Remove this file or folder, if it is there and may be removed."""
        with suppress(Exception):
            self.fs.rm(self.path, recursive=True)


def open_remote(url: str) -> Remote:
    """The file or folder at a URL, not read yet. Raises UserError naming what to install for its kind."""
    kind = url.partition("://")[0].lower()
    if "::" in url:
        raise UserError(f"{url}: a URL of URLs (`::`) is not supported; give one such as gs://bucket/x")
    import fsspec

    try:
        fs, path = fsspec.core.url_to_fs(url, **({"auto_mkdir": True} if kind in ("file", "local") else {}))
    except ImportError as e:
        needed = "Google Cloud Storage needs gcsfs; install it with pip install 'locft_jax[gcs]'"
        raise UserError(f"{url}: {needed if kind in ('gs', 'gcs') else reason(e)}") from None
    except ValueError as e:
        raise UserError(f"{url}: {reason(e)}; supported are gs://bucket/path and what fsspec knows") from None
    except Exception as e:
        raise UserError(f"{url}: cannot be opened ({reason(e)})") from None
    return Remote(url.rstrip("/"), fs, path.rstrip("/"))


def open_path(path: str | Path) -> Path | Remote:
    """The file or folder at a path or a URL."""
    return open_remote(str(path)) if is_url(path) else Path(path)


def open_file(path: str) -> IO[bytes]:
    """A local file (or OSError), or one at a URL, which is read at once (or UserError)."""
    return io.BytesIO(open_remote(path).read()) if is_url(path) else open(path, "rb")


def size_of(path: str | Path) -> int:
    """Bytes of a file, here or at a URL."""
    file = open_path(path)
    return file.stat().st_size if isinstance(file, Path) else file.size()


def download(folder: Remote, names: Iterable[str], maximum: int = SMALL) -> Path:
    """Copies of these files of a folder, in a temporary folder that goes when the process ends."""
    local = Path(tempfile.mkdtemp(prefix="locft-jax-"))
    atexit.register(shutil.rmtree, local, ignore_errors=True)
    sizes = folder.names()
    for name in names:
        if sizes[name] > maximum:
            raise UserError(f"{folder / name}: {sizes[name]:,} bytes, too large for this kind of file")
    in_parallel(lambda name: (local / name).write_bytes((folder / name).read()), names)
    return local


@contextmanager
def local_copy(path: str | Path) -> Iterator[Path]:
    """A file as a local one; errors name the URL it came from."""
    if not is_url(path):
        yield Path(path)
        return
    remote = open_remote(str(path))
    with tempfile.TemporaryDirectory(prefix="locft-jax-") as folder:
        local = Path(folder) / remote.name
        with failures(remote.url):
            remote.fs.get_file(remote.path, str(local))
        with naming_url(local, remote.url):
            yield local


def in_parallel(call: Callable[[T], R], items: Iterable[T], threads: int = THREADS) -> list[R]:
    """`call` of every item, in order; the first error ends it."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            return list(pool.map(call, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise
