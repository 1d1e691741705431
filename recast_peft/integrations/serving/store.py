"""TaskStore: a folder of tasks that a pool follows while it serves; with the versions before, to go back to.

    FOLDER/<task>/                       the task as save_pretrained writes it
    FOLDER/.versions/<task>/<number>/    what it was before

A task that comes or changes is read and checked whole before anybody sees it; one that cannot be read leaves the former in
service, and says why in ``problems``. Stores of several processes may follow one folder: they take turns where one changes it.
"""

from __future__ import annotations

import io
import os
import shutil
import threading
import uuid
import zipfile
from contextlib import suppress
from pathlib import Path

from peft.utils import CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME
from torch import Tensor

from ...errors import RecastConfigError, RecastError, RecastLoadError
from ...hub.peft_models import DEFAULT
from ...names import check_adapter_name
from ...pool.heads import StoredHead
from ...pool.pool import TaskPool
from ...storage.atomic import flush, locked, made_folder, write_bytes
from ...storage.versions import VERSIONS, next_version, versions
from ...validation import check_arguments, listed, number_above, whole_number

FILES = (CONFIG_NAME, SAFETENSORS_WEIGHTS_NAME)
MAX_TASK_BYTES = 256 << 20

Read = tuple[Tensor, StoredHead | None]  # numbers and classifier of a task


class TaskStore:
    """The tasks of a folder, in a pool.

    Args:
        folder: folder of saved tasks, one in a folder each; made if it is missing.
        pool: that they are put in.
        keep: versions before the present one that are kept of each task.
    """

    def __init__(self, folder: str | os.PathLike, pool: TaskPool, keep: int = 5) -> None:
        check_arguments(whole_number(0), keep=keep)
        self.folder, self.pool, self.keep = made_folder(folder), pool, keep
        self.problems: dict[str, str] = {}  # tasks that could not be read, and why
        self._lock = threading.RLock()
        self._seen: dict[str, tuple[tuple[int, int], ...]] = {}
        self._missed: set[str] = set()
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        with locked(self.folder):
            self._finish_moves()

    # ---------------------------------------------------------------- following the folder

    def refresh(self) -> list[str]:
        """Look for tasks that came, changed or went since, and follow them; one that cannot be read changes nothing.

        A task is gone when it was missing twice: another process may be putting a new one in its place.

        Returns:
            names of the tasks that are different now.
        """
        changed = []
        with self._lock:
            with locked(self.folder):
                found = {path.parent.name: _stamp(path.parent) for path in sorted(self.folder.glob(f"*/{CONFIG_NAME}"))}
            for name, stamp in found.items():
                if self._seen.get(name) != stamp:
                    self._seen[name] = stamp
                    if self._take(name):
                        changed.append(name)
            if DEFAULT not in found and (self.folder / CONFIG_NAME).is_file():
                self.problems[DEFAULT] = (
                    f"{self.folder} itself holds a task, as save_pretrained stores the one that is named {DEFAULT!r}: move its "
                    f"files to {self.folder / DEFAULT}"
                )
            elif DEFAULT not in found:
                self.problems.pop(DEFAULT, None)
            missing = {name for name in self._seen if name not in found}
            gone, self._missed = missing & self._missed, missing - self._missed
            for name in sorted(gone):
                del self._seen[name]
                self.problems.pop(name, None)
                if name in self.pool:
                    self.pool.remove(name)
                    changed.append(name)
        return changed

    def _take(self, name: str) -> bool:
        try:
            check_adapter_name(name)
            with locked(self.folder):
                read = self.pool.read(name, self.folder / name)
            self._put(name, read)
        except Exception as error:  # a bad task never takes the service down
            is_ours = isinstance(error, RecastError)
            self.problems[name] = str(error) if is_ours else f"{type(error).__name__}: {error}"
            if isinstance(error.__cause__ if is_ours else error, OSError):  # maybe of this moment: it is tried again
                self._seen[name] = ()
            return False
        self.problems.pop(name, None)
        return True

    def _put(self, name: str, read: Read) -> None:
        """Put a task into service."""
        with self.pool.lock:
            (self.pool.replace_row if name in self.pool else self.pool.add_row)(name, *read)

    def follow(self, seconds: float) -> None:
        """Refresh every so many seconds in a thread, until ``close``.

        Raises:
            RecastConfigError: if they are no number above zero.
        """
        check_arguments(number_above(0), seconds=seconds)
        if self._thread is None:
            self._thread = threading.Thread(target=self._follow, args=(seconds,), name="recast-task-store", daemon=True)
            self._thread.start()

    def _follow(self, seconds: float) -> None:
        while not self._stop.wait(seconds):
            try:
                self.refresh()
                self.problems.pop("", None)
            except OSError as error:  # the folder cannot be listed now
                self.problems[""] = str(error)

    def close(self) -> None:
        """Follow the folder no more."""
        self._stop.set()
        if self._thread is not None:
            self._thread.join()

    def __contains__(self, name: str) -> bool:
        """Whether there is a task of this name, or was one that can be rolled back to."""
        return bool(self.versions(name)) or (self.folder / name).is_dir()

    # ---------------------------------------------------------------- changing it

    def upload(self, name: str, content: bytes) -> None:
        """Take a task in from the bytes of a zip file with its config and its tensors; the former becomes a version.

        Raises:
            RecastConfigError: if the name is none of a folder, a file or a link has it, or a task has one that the file system
                does not tell from it.
            RecastLoadError: if the bytes are no such file, or one of several tasks.
            RecastError: whatever is wrong with the task; the former stays in service.
        """
        _check_plain(name)
        files = _unpacked(content)
        incoming = self.folder / VERSIONS / f".incoming-{uuid.uuid4().hex}"
        task = incoming / name
        with self._lock, locked(self.folder):
            if self._holds(name) and not (self.folder / name).is_dir():
                raise RecastConfigError(f"name={name!r}: a file of this name lies in {self.folder}; give the task another")
            try:
                task.mkdir(parents=True)
                for file, data in files.items():
                    write_bytes(task / file, data)
                self._exchange(name, task, self.pool.read(name, task))
            finally:
                shutil.rmtree(incoming, ignore_errors=True)

    def remove(self, name: str) -> None:
        """Take a task out of service; it stays as a version that can be rolled back to.

        Raises:
            RecastConfigError: if there is no such task, or it is a link.
        """
        with self._lock, locked(self.folder):
            _check_plain(name)
            if not (self._holds(name) and (self.folder / name).is_dir()):
                raise RecastConfigError(f"the folder has no task {name!r}")
            former = self._retire(name)
            try:
                if name in self.pool:
                    self.pool.remove(name)
            except BaseException:
                os.replace(former, self.folder / name)
                raise
            self._prune(name)
            self._seen.pop(name, None)
            self.problems.pop(name, None)

    def versions(self, name: str) -> list[int]:
        """Numbers of the versions before the present one, the oldest first."""
        _check_plain(name)
        return versions(self.folder / name)

    def rollback(self, name: str) -> int:
        """Put the version before in service; the present one becomes the latest version.

        Returns:
            the number of the version that is in service now.

        Raises:
            RecastConfigError: if there is none, or the task is a link.
        """
        with self._lock, locked(self.folder):
            self._holds(name)
            known = self.versions(name)
            if not known:
                raise RecastConfigError(f"the task {name!r} has no version before this one")
            before = self.folder / VERSIONS / name / str(known[-1])
            read = self.pool.read(name, before)
            staged = before.with_name(f".back-{uuid.uuid4().hex}") / name
            staged.parent.mkdir()
            try:
                os.replace(before, staged)
                try:
                    self._exchange(name, staged, read)
                except BaseException:
                    os.replace(staged, before)
                    raise
            finally:
                with suppress(OSError):
                    staged.parent.rmdir()
            return known[-1]

    def _exchange(self, name: str, new: Path, read: Read) -> None:
        """Put a task that was read into its place and into service; the former becomes a version. All of it or nothing."""
        place, stamp = self.folder / name, _stamp(new)
        former = self._retire(name) if place.is_dir() else None
        try:
            os.replace(new, place)
            flush(self.folder)
            self._put(name, read)
        except BaseException:
            if not new.exists():
                os.replace(place, new)
            if former is not None:
                os.replace(former, place)
            raise
        self._prune(name)
        self._seen[name] = stamp
        self.problems.pop(name, None)

    def _finish_moves(self) -> None:
        """Put into place what a process that was killed had taken the former away for."""
        for pattern in (f"{VERSIONS}/.incoming-*/*", f"{VERSIONS}/*/.back-*/*"):
            for staged in self.folder.glob(pattern):
                name = staged.name
                was_checked = (self.folder / VERSIONS / name).is_dir()
                if was_checked and not (self.folder / name).exists() and len(_stamp(staged)) == len(FILES):
                    os.replace(staged, self.folder / name)
                elif staged.parent.name.startswith(".back-"):  # the task was not yet taken away: this is its latest version
                    os.replace(staged, next_version(self.folder / name))
                shutil.rmtree(staged.parent, ignore_errors=True)

    def _holds(self, name: str) -> bool:
        """Whether the folder has an entry of this name that is no link, and not of one that the file system takes for it."""
        if os.path.islink(self.folder / name):
            raise RecastConfigError(
                f"name={name!r}: the task in {self.folder} is a link, of which no version can be kept. Let it lead to another "
                "folder, or take it away: the store follows."
            )
        if not os.path.exists(self.folder / name):
            return False
        if name not in os.listdir(self.folder):
            raise RecastConfigError(
                f"name={name!r}: the folder has another task, whose name this file system does not tell from it; give the task "
                "another name"
            )
        return True

    def _retire(self, name: str) -> Path:
        """Make the present task a version; where it lies then."""
        return (self.folder / name).replace(next_version(self.folder / name))

    def _prune(self, name: str) -> None:
        for old in self.versions(name)[: -self.keep or None]:
            shutil.rmtree(self.folder / VERSIONS / name / str(old), ignore_errors=True)


def _check_plain(name: str) -> None:
    check_adapter_name(name)
    if name.startswith(".") or Path(name).name != name:
        raise RecastConfigError(f"name={name!r}: expected the name of a folder")


def _stamp(folder: Path) -> tuple[tuple[int, int], ...]:
    """What tells a changed task: times and sizes of its files."""
    stats = [(folder / file).stat() for file in FILES if (folder / file).is_file()]
    return tuple((stat.st_mtime_ns, stat.st_size) for stat in stats)


def _unpacked(content: bytes) -> dict[str, bytes]:
    """The two files of a task in a zip file, at its top or in one folder; nothing else is read, and no path is followed."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            named = [info for info in archive.infolist() if Path(info.filename).name in FILES]
            folders = {str(Path(info.filename).parent) for info in named}
            found = {Path(info.filename).name: info for info in named}
            missing = [file for file in FILES if file not in found]
            if missing or len(folders) > 1 or sum(info.file_size for info in named) > MAX_TASK_BYTES:
                several = f"holds tasks in {listed(sorted(folders))}" if len(folders) > 1 else ""
                what = several or (f"lacks {', '.join(missing)}" if missing else f"holds more than {MAX_TASK_BYTES:,} bytes")
                raise RecastLoadError(f"the uploaded zip file {what}; expected one task's {' and '.join(FILES)}")
            return {name: _read(archive, info) for name, info in found.items()}
    except RecastLoadError:
        raise
    except Exception as error:  # zipfile and what it unpacks with have many kinds for what is damaged
        raise RecastLoadError(f"what was uploaded is no zip file of a task: {error}") from error


def _read(archive: zipfile.ZipFile, info: zipfile.ZipInfo) -> bytes:
    with archive.open(info) as file:
        data = file.read(MAX_TASK_BYTES + 1)
    if len(data) > MAX_TASK_BYTES:  # whatever its header says
        raise RecastLoadError(f"the uploaded {info.filename} holds more than {MAX_TASK_BYTES:,} bytes")
    return data
