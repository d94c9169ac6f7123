"""Files and folders at a URL (`gs://bucket/...`, or any that fsspec knows): the few operations a run needs.

An object store has no folders and renames nothing, so results cannot appear there at once. Instead a prefix
is complete when its last file (a run's `report.json`, a model's `config.json`) is there: it is taken away
first and written last, and until then the file `.locft-part` says whose half-written prefix it is.
"""

import atexit
import dataclasses
import io
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO, Any

from locft_jax.errors import UserError, reason

THREADS = 16  # requests at a time: an object store answers one at 0.1 GB/s or less
BLOCK = 32 * 2**20  # bytes of a request, and of a piece of a stream
PART = ".locft-part"
SMALL = 100 * 2**20  # bytes that a file of a model folder beside its weights may have
_URL = re.compile(r"[A-Za-z][A-Za-z0-9+.-]*://")


def is_url(place: object) -> bool:
    """Whether this is a URL and not a path."""
    return isinstance(place, str) and _URL.match(place) is not None


def place(text: str) -> str | Path:
    """An argument of a command line: a URL as it is, anything else as a path."""
    return text if is_url(text) else Path(text)


@contextmanager
def failures(url: object, doing: str = "read") -> Iterator[None]:
    """What goes wrong at a URL, of whatever kind, as a UserError: libraries have dozens."""
    try:
        yield
    except UserError:
        raise
    except FileNotFoundError:
        raise UserError(f"{url}: not there; check the bucket's name and the path") from None
    except Exception as e:
        raise UserError(
            f"{url}: cannot be {doing} ({reason(e)}); check the bucket's name, the path, and the account's "
            "permissions"
        ) from None


@contextmanager
def called(local: Path, url: object) -> Iterator[None]:
    """Errors about a local copy name the URL."""
    try:
        yield
    except UserError as e:
        raise UserError(str(e).replace(str(local), str(url))) from None


@dataclasses.dataclass(frozen=True)
class Remote:
    """A file or folder at a URL; the path is the file system's own name for it."""

    url: str
    fs: Any
    path: str

    def __truediv__(self, name: str) -> "Remote":
        return dataclasses.replace(self, url=f"{self.url}/{name}", path=f"{self.path}/{name}")

    def __str__(self) -> str:
        return self.url

    def names(self) -> dict[str, int]:
        """Bytes of every file directly in it, by name; {} where there is none. Raises UserError for
        a bucket that is missing or may not be read."""
        with failures(self.url):
            self.fs.invalidate_cache()
            try:
                entries = self.fs.ls(self.path, detail=True)
            except FileNotFoundError:
                return {}
        files = {e["name"].rstrip("/").rpartition("/")[2]: e for e in entries if e["type"] == "file"}
        return {name: int(e["size"] or 0) for name, e in sorted(files.items()) if self._below(e["name"])}

    def _below(self, path: str) -> bool:
        """Whether a listed path lies in this folder (some list a file as its own only entry)."""
        return path.rstrip("/") != self.path.rstrip("/")

    def all_names(self) -> list[str]:
        """Every file below it, as paths relative to it."""
        with failures(self.url):
            self.fs.invalidate_cache()
            try:
                found = self.fs.find(self.path)
            except FileNotFoundError:
                return []
        base = self.path.rstrip("/") + "/"
        return sorted(p[len(base) :] for p in found if p.startswith(base) and p != base)

    def size(self) -> int:
        """Bytes of this file. Raises UserError when there is none."""
        with failures(self.url):
            return int(self.fs.info(self.path)["size"])

    def exists(self) -> bool:
        """Whether this file is there. Raises UserError where nobody may know."""
        with failures(self.url):
            self.fs.invalidate_cache()
            return self.fs.exists(self.path)

    def read(self, begin: int = 0, end: int | None = None) -> bytes:
        """Bytes [begin, end) of this file. Raises UserError when it is missing, OSError when too short."""
        with failures(self.url):
            whole = (begin, end) == (0, None)  # of an empty file no range is right
            data = self.fs.cat_file(self.path, **({} if whole else {"start": begin, "end": end}))
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
        """A local file to this place. Raises OSError."""
        with _writing(self.url):
            self.fs.put_file(str(source), self.path)

    def copy_from(self, source: "Remote") -> None:
        """Another file to this place: inside the store where it can, else through this machine."""
        if type(source.fs) is type(self.fs):
            with suppress(NotImplementedError), _writing(self.url):
                return self.fs.cp_file(source.path, self.path)
        size = source.size()
        self.write(source.read(at, min(size, at + BLOCK)) for at in range(0, size, BLOCK))

    def remove(self) -> None:
        """This file or folder, if it is there and may be removed."""
        with suppress(Exception):
            self.fs.rm(self.path, recursive=True)


@contextmanager
def _writing(url: str) -> Iterator[None]:
    try:
        yield
    except (OSError, NotImplementedError, UserError):
        raise
    except Exception as e:
        raise OSError(f"{url}: cannot be written ({reason(e)})") from None


def open_remote(url: str) -> Remote:
    """The file or folder at a URL; nothing is read yet. Raises UserError for a kind of URL that is not
    known here, naming what to install."""
    kind = url.partition("://")[0].lower()
    if "::" in url:
        raise UserError(
            f"{url}: a URL of URLs (`::`) is not supported; give a plain one such as gs://bucket/x"
        )
    import fsspec

    try:
        options = {"auto_mkdir": True} if kind in ("file", "local") else {}
        fs, path = fsspec.core.url_to_fs(url, **options)
    except ImportError as e:
        if kind in ("gs", "gcs"):
            raise UserError(
                f"{url}: Google Cloud Storage needs gcsfs; install it with pip install 'locft_jax[gcs]'"
            ) from None
        raise UserError(f"{url}: {reason(e)}") from None
    except ValueError as e:
        raise UserError(f"{url}: {reason(e)}; supported are gs://bucket/path and what fsspec knows") from None
    except Exception as e:
        raise UserError(f"{url}: cannot be opened ({reason(e)})") from None
    return Remote(url.rstrip("/"), fs, path.rstrip("/"))


def open_file(place: str) -> IO[bytes]:
    """A file here, or one at a URL, which is read at once. Raises OSError for the one, UserError for the
    other."""
    return io.BytesIO(open_remote(place).read()) if is_url(place) else open(place, "rb")


def size_of(place: str | Path) -> int:
    """Bytes of a file here or at a URL."""
    return open_remote(str(place)).size() if is_url(place) else Path(place).stat().st_size


def fetch(folder: Remote, names: Iterable[str], maximum: int = SMALL) -> Path:
    """Copies of these files of a folder, in a temporary folder that goes when the process ends."""
    local = Path(tempfile.mkdtemp(prefix="locft-jax-"))
    atexit.register(shutil.rmtree, local, ignore_errors=True)

    def copy(name: str) -> None:
        (local / name).write_bytes((folder / name).read())

    sizes = folder.names()
    large = [name for name in names if sizes[name] > maximum]
    if large:
        raise UserError(f"{folder / large[0]}: {sizes[large[0]]:,} bytes, too large for this kind of file")
    in_parallel(copy, names)
    return local


@contextmanager
def local_copy(place: str | Path) -> Iterator[Path]:
    """A file as a local one, whose errors name the URL it came from."""
    if not is_url(place):
        yield Path(place)
        return
    remote = open_remote(str(place))
    with tempfile.TemporaryDirectory(prefix="locft-jax-") as folder:
        local = Path(folder) / os.path.basename(remote.path)
        with failures(remote.url):
            remote.fs.get_file(remote.path, str(local))
        with called(local, remote.url):
            yield local


def in_parallel(call: Callable[[Any], Any], items: Iterable[Any], threads: int = THREADS) -> list[Any]:
    """`call` of every item, in order; the first error ends it."""
    with ThreadPoolExecutor(threads) as pool:
        try:
            return list(pool.map(call, items))
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


# ---------------------------------------------------------------- results


def check_prefix(store: Remote, overwrite: bool, resume: bool = False, proof: str = "report.json") -> None:
    """Refuse, before any work, a prefix that holds something or cannot be written (an empty file is, and is
    removed again). `overwrite` and `resume` allow one that holds results (the file `proof`) or half of them.
    """
    if "/" not in store.url.partition("://")[2]:
        raise UserError(f"--out: {store} is a whole bucket; name a prefix in it, such as {store}/runs/mine")
    names = set(store.all_names())
    if names and not (overwrite or resume):
        half = "the half-written results of an interrupted run" if PART in names else "files"
        raise UserError(f"--out: {store} holds {half} already; choose another prefix, or add --overwrite")
    if names and not names & {proof, PART}:
        flag = "--overwrite" if overwrite else "--resume"
        raise UserError(f"{flag}: {store} holds no results (no {proof}); choose another prefix")
    had_part = PART in names
    with failures(store.url, "written"):
        (store / PART).write(b"")
    if not had_part:
        (store / PART).remove()


@contextmanager
def prefix(store: Remote, proof: str = "report.json") -> Iterator[None]:
    """Around what writes to `store`, in place of what is there, and `proof` last. On any error nothing is
    left there: what was there before is gone too, for an object store has no renaming."""
    try:
        (store / PART).write(b"")
        (store / proof).remove()
        in_parallel(lambda name: (store / name).remove(), set(store.all_names()) - {PART})
        yield
        (store / PART).remove()
    except BaseException:
        store.remove()
        raise


@contextmanager
def whole_prefix(store: Remote, part: Path, proof: str = "report.json") -> Iterator[Path]:
    """A local folder (`part`) to fill, which is uploaded to `store` when the block ends well; the block may
    also write there itself. As `prefix`."""
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir(parents=True)
    try:
        with prefix(store, proof):
            yield part
            files = {str(p.relative_to(part)) for p in part.rglob("*") if p.is_file()}
            in_parallel(lambda name: (store / name).upload(part / name), sorted(files - {proof}))
            (store / proof).upload(part / proof)
    finally:
        shutil.rmtree(part, ignore_errors=True)
