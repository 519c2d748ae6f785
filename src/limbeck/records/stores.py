"""Where a record lies: a local folder, or any address that fsspec knows (memory://..., s3://bucket/...)."""

from __future__ import annotations

import hashlib
import os
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from limbeck.errors import InputError, MissingExtra
from limbeck.files import write_atomic
from limbeck.records.shards import file_sha256

_PACKAGES = {"s3": "s3fs", "s3a": "s3fs", "gs": "gcsfs", "gcs": "gcsfs", "abfs": "adlfs", "az": "adlfs"}


class Store(ABC):
    """Whole files under one address; names are relative, with '/'."""

    def __init__(self, url: str) -> None:
        self.url = url

    def where(self, name: str) -> str:
        """A file's full address, for messages."""
        return f"{self.url.rstrip('/')}/{name}"

    @abstractmethod
    def read(self, name: str) -> bytes | None:
        """A file's content; None where there is no such file."""

    @abstractmethod
    def write(self, name: str, content: bytes) -> None:
        """Write a file that appears whole or not at all."""

    @abstractmethod
    def names(self, folder: str) -> set[str]:
        """The files in a folder (names relative to the record), without leftovers of killed writers."""

    @abstractmethod
    def delete(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""

    @abstractmethod
    def sha256(self, name: str) -> str | None:
        """A file's checksum; None where there is no such file."""

    @abstractmethod
    def fetch(self, name: str, sha256: str, cache: Callable[[], Path]) -> Path:
        """A local path with exactly this content, checked by its checksum. Raises InputError where it is missing or damaged."""

    def sweep(self, folder: str, mine: Callable[[str], bool]) -> None:
        """Remove temporary files that a killed writer left in a folder, of the names that `mine` accepts."""

    def _damaged(self, name: str, found: str | None) -> InputError:
        what = "is missing." if found is None else "is damaged (its checksum is not the one that was recorded)."
        return InputError(what, where=self.where(name), fix="`limbeck record` with the same recipe records it again.")


@contextmanager
def _plain_errors(where: str) -> Iterator[None]:
    """OSError as one line."""
    try:
        yield
    except OSError as error:
        raise InputError(f"{error.strerror or error}.", where=where, fix="Check the address, the permissions and the free space.") from error


class LocalStore(Store):
    """A folder: temporary name, fsync, rename, fsync of the folder."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self.root = Path(url.removeprefix("file://")).expanduser().absolute()

    def read(self, name: str) -> bytes | None:
        """See Store."""
        with _plain_errors(self.where(name)):
            try:
                return (self.root / name).read_bytes()
            except (FileNotFoundError, NotADirectoryError):
                return None

    def write(self, name: str, content: bytes) -> None:
        """See Store."""
        with _plain_errors(self.where(name)):
            write_atomic(self.root / name, content)

    def names(self, folder: str) -> set[str]:
        """See Store."""
        try:
            return {f"{folder}/{name}" if folder else name for name in os.listdir(self.root / folder) if not name.startswith(".")}
        except (FileNotFoundError, NotADirectoryError):
            return set()

    def delete(self, name: str) -> None:
        """See Store."""
        (self.root / name).unlink(missing_ok=True)

    def sha256(self, name: str) -> str | None:
        """See Store."""
        with _plain_errors(self.where(name)):
            try:
                return file_sha256(self.root / name)
            except FileNotFoundError:
                return None

    def fetch(self, name: str, sha256: str, cache: Callable[[], Path]) -> Path:
        """The file itself."""
        found = self.sha256(name)
        if found != sha256:
            raise self._damaged(name, found)
        return self.root / name

    def sweep(self, folder: str, mine: Callable[[str], bool]) -> None:
        """See Store; the names are those of `limbeck.files.write_atomic`."""
        try:
            found = os.listdir(self.root / folder)
        except (FileNotFoundError, NotADirectoryError):
            return
        for name in found:
            leftover = re.fullmatch(r"\.(.+)\.\d+\.tmp", name)
            if leftover and mine(leftover[1]):
                (self.root / folder / name).unlink(missing_ok=True)


class RemoteStore(Store):
    """Any fsspec file system: one put a file (objects appear whole), one get a shard."""

    def __init__(self, url: str) -> None:
        super().__init__(url)
        self._pid, self._fs, self._path = -1, None, ""
        self._connect()

    def _connect(self) -> tuple[Any, str]:
        """The file system and the record's path in it, made anew in a forked process (fsspec's loops do not survive a fork)."""
        if self._fs is None or self._pid != os.getpid():
            import fsspec

            scheme = self.url.partition("://")[0]
            try:
                forked = self._fs is not None and scheme != "memory"
                self._fs, self._path = fsspec.core.url_to_fs(self.url, **({"skip_instance_cache": True} if forked else {}))
            except ImportError as error:
                package = _PACKAGES.get(scheme, "")
                if package == "s3fs":
                    raise MissingExtra("s3fs", "cloud", why=f"the address {self.url}") from error
                text = " ".join(str(error).split())
                raise InputError(f"a package is missing: {text}", where=self.url, fix=f"pip install {package}" if package else "Install it.") from error
            except ValueError as error:
                raise InputError(f"{' '.join(str(error).split())}.", where=self.url, fix="Give a folder or an address such as s3://bucket/name.") from error
            self._pid = os.getpid()
        return self._fs, self._path.rstrip("/")

    @contextmanager
    def _talking(self, name: str) -> Iterator[tuple[Any, str]]:
        """The file system and a file's path; whatever a client raises (each has its own errors) becomes one line."""
        fs, root = self._connect()
        try:
            yield fs, f"{root}/{name}" if name else root
        except (InputError, FileNotFoundError):
            raise
        except Exception as error:
            message = " ".join(str(error).split())[:200]
            fix = "Check the address, the credentials and the network."
            raise InputError(f"cannot be reached ({type(error).__name__}: {message}).", where=self.where(name), fix=fix) from error

    def read(self, name: str) -> bytes | None:
        """See Store."""
        with self._talking(name) as (fs, path):
            try:
                return fs.cat_file(path)
            except FileNotFoundError:
                return None

    def write(self, name: str, content: bytes) -> None:
        """See Store."""
        try:
            with self._talking(name) as (fs, path):
                fs.pipe_file(path, content)
        except FileNotFoundError as error:
            raise InputError("there is no such bucket or folder.", where=self.where(name), fix="Create it first, or check the address.") from error

    def names(self, folder: str) -> set[str]:
        """See Store."""
        with self._talking(folder) as (fs, path):
            fs.invalidate_cache()
            try:
                return {f"{folder}/{found.rpartition('/')[2]}" if folder else found.rpartition("/")[2] for found in fs.ls(path, detail=False)}
            except FileNotFoundError:
                return set()

    def delete(self, name: str) -> None:
        """See Store."""
        with self._talking(name) as (fs, path):
            try:
                fs.rm_file(path)
            except FileNotFoundError:
                return

    def sha256(self, name: str) -> str | None:
        """See Store."""
        content = self.read(name)
        return None if content is None else hashlib.sha256(content).hexdigest()

    def fetch(self, name: str, sha256: str, cache: Callable[[], Path]) -> Path:
        """The file in the cache folder, named by its checksum; got under a temporary name and renamed when the checksum fits."""
        folder = cache()
        path = folder / f"{sha256}.arrow"
        if path.is_file() and file_sha256(path) == sha256:
            return path
        folder.mkdir(parents=True, exist_ok=True)
        temporary = folder / f".{path.name}.{os.getpid()}.tmp"
        try:
            with self._talking(name) as (fs, remote):
                try:
                    fs.get_file(remote, str(temporary))
                except FileNotFoundError as error:
                    raise self._damaged(name, None) from error
            found = file_sha256(temporary)
            if found != sha256:
                raise self._damaged(name, found)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
        return path

    def __getstate__(self) -> dict[str, Any]:
        return {"url": self.url, "_pid": -1, "_fs": None, "_path": ""}


def store_for(url: str | os.PathLike[str]) -> Store:
    """The store of an address: a local path (or file://...), or any fsspec URL."""
    text = os.fspath(url)
    if not text:
        raise InputError("the address of a record is empty.", fix="Give a folder or a URL.")
    return RemoteStore(text) if "://" in text and not text.startswith("file://") else LocalStore(text)
