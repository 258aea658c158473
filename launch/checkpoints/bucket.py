"""Checkpoints in a bucket: files in pieces, and an index that says which are whole.

`CHECKPOINT_DIR/index.json` is the truth: a checkpoint that it does not name is none. Of
one that it names, `STEP-TOKEN/listing.json` has the size and SHA-256 of every piece,
and the index the SHA-256 of that. The index changes last, and only from what was read
of it (generation match, ETag): of two writers one wins, and the other hears of it.
"""

import contextlib
import dataclasses
import json
import re
import secrets
import shutil
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from launch.checkpoints import objects
from launch.checkpoints.objects import Listing, digest_of
from launch.checkpoints.places import UNFINISHED, CheckpointError
from launch.checkpoints.writing import writing
from tasks import owner

_FOLDER = re.compile(r"\d+-[0-9a-f]{16}")  # of one upload: no other has its name
_INDEX, _LISTING = "index.json", "listing.json"
_FORMAT = 1


@dataclasses.dataclass(frozen=True)
class Entry:
    """What the index says of a checkpoint.

    Attributes:
        folder: its objects.
        listing: SHA-256 of its listing.
        num_bytes: size of all its files.
        stalled: whether only skipped steps led to it.
    """

    folder: str
    listing: str
    num_bytes: int
    stalled: bool


class Bucket:
    """The checkpoints of one run in a bucket.

    Args:
        place: `gs://` or `s3://`, a folder in it.

    Attributes:
        run: the run whose checkpoints they are; "" if there are none yet.
        entries: what is whole, by step, as it was last read.
    """

    def __init__(self, place: str) -> None:
        self._objects = objects.Objects(place)
        self.place = self._objects.place
        self.run = ""
        self.entries: dict[int, Entry] = {}
        self._aside: list[str] = []  # folders of damaged checkpoints
        self._me = ""  # in the index while this process alone may change it
        self._generation: bytes | None = None

    def look(self) -> None:
        """Reads the index.

        Raises:
            CheckpointError: it cannot be read, or is of another format.
        """
        content, self._generation = self._objects.read(_INDEX)
        if content is None:
            self.run, self.entries, self._aside = "", {}, []
            return
        try:
            said = json.loads(content)
            if said["format"] != _FORMAT:
                raise CheckpointError(
                    f"{self.place}/{_INDEX} is of format {said['format']}, and this "
                    f"version reads {_FORMAT}"
                )
            self.run, self._aside = said["run"], said["damaged"]
            self.entries = {
                int(step): Entry(**entry) for step, entry in said["checkpoints"].items()
            }
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise CheckpointError(
                f"{self.place}/{_INDEX} is not what Switchyard wrote: take another "
                "CHECKPOINT_DIR"
            ) from error

    def own(self, run: str) -> None:
        """Becomes the one writer, and removes what earlier ones have left unfinished.

        An earlier writer that still lives can add nothing from now on.

        Args:
            run: the run whose checkpoints they are.
        Raises:
            CheckpointError: the index cannot be written.
        """
        if self._me:
            return
        self.run, self._me = run, f"{owner.myself()} {secrets.token_hex(8)}"
        try:
            self._replace_index()
        except CheckpointError:
            self._me = ""
            raise
        kept = {*self._aside, *(entry.folder for entry in self.entries.values())}
        for folder in sorted(self._objects.folders() - kept):
            if _FOLDER.fullmatch(folder):
                self._objects.delete(folder)

    # -------------------------------------------------------------------- writing

    def upload(self, source: Path, folder: str, names: Sequence[str]) -> Listing:
        """Writes files of a checkpoint, which does not exist by that; see `Objects`."""
        return self._objects.upload(source, folder, names)

    def commit(
        self,
        step: int,
        folder: str,
        listing: Listing,
        *,
        stalled: bool,
        keep: Callable[[int], bool] = lambda step: True,
    ) -> None:
        """Makes an uploaded checkpoint exist, and others not.

        Args:
            step: which one.
            folder: name of the folder of its objects.
            listing: all its files.
            stalled: whether only skipped steps led to it.
            keep: whether an earlier step stays.
        Raises:
            CheckpointError: the step is there already; another process has taken the
                checkpoints over; or the index cannot be written.
        """
        if step in self.entries:
            raise CheckpointError(f"{self.place} has one of step {step} already")
        content = json.dumps(listing).encode()
        self._objects.write(f"{folder}/{_LISTING}", content)
        size = sum(size for pieces in listing.values() for size, _ in pieces)
        entry = Entry(folder, digest_of(content), size, stalled)
        old = {s: e for s, e in self.entries.items() if not keep(s)}
        stays = {s: e for s, e in self.entries.items() if s not in old}
        self.entries = {**stays, step: entry}
        self._replace_index()
        for gone in old.values():
            self._objects.delete(gone.folder)

    def set_aside(self, step: int) -> None:
        """Counts a damaged checkpoint as none; its objects are left as they are."""
        self._aside = [*self._aside, self.entries.pop(step).folder]
        self._replace_index()

    # -------------------------------------------------------------------- reading

    def is_here(self, step: int, path: Path) -> bool:
        """Whether a folder holds what was uploaded, every byte."""
        return path.is_dir() and not objects.other_files(
            self._listing(step, path), path
        )

    def fetch(self, step: int, path: Path) -> None:
        """Makes a folder what was uploaded: reads whatever of it is missing or other.

        Args:
            step: which checkpoint.
            path: its folder on this machine; the name appears when all is right.
        Raises:
            DamagedError: an object is missing, or is not what was written.
            CheckpointError: the bucket cannot be read, or the folder not written.
        """
        folder = self.entries[step].folder
        listing = self._listing(step, path)
        wrong = objects.other_files(listing, path)
        if not wrong and path.is_dir():
            return
        part = path.with_name(f"{path.name}{UNFINISHED}-{secrets.token_hex(8)}")
        with writing(path):
            path.parent.mkdir(parents=True, exist_ok=True)
            if path.exists():
                objects.warn(
                    f"{wrong[0]} of {path} is not what {self.place} has, and is read "
                    "from there"
                )
                path.rename(part)
        try:
            for name in wrong:
                target = part / name
                with writing(target):
                    target.parent.mkdir(parents=True, exist_ok=True)
                    with target.open("wb") as file:
                        for content in self._objects.contents(
                            f"{folder}/{name}", listing[name], path
                        ):
                            file.write(content)
            with writing(path):
                part.rename(path)
        finally:
            shutil.rmtree(part, ignore_errors=True)

    def fetch_file(self, step: int, name: str, path: Path) -> None:
        """Writes one file of a checkpoint below a folder; nothing if it has none."""
        pieces = self._listing(step, path).get(name)
        if pieces is None:
            return
        key = f"{self.entries[step].folder}/{name}"
        content = b"".join(self._objects.contents(key, pieces, path))
        with writing(path / name):
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(content)

    def _listing(self, step: int, path: Path) -> Listing:
        entry = self.entries[step]
        content = self._objects.checked(
            f"{entry.folder}/{_LISTING}", entry.listing, path
        )
        found = json.loads(content)
        if any(".." in name.split("/") or name.startswith("/") for name in found):
            raise CheckpointError(
                f"{self.place}/{entry.folder} leads out of its folder"
            )
        return {name: [(n, d) for n, d in pieces] for name, pieces in found.items()}

    def _replace_index(self) -> None:
        """Writes the index, if it is still the one that was read.

        No two writes have the same content, for an ETag is a digest of it.
        """
        said = {
            "format": _FORMAT,
            "run": self.run,
            "owner": self._me,
            "edition": secrets.token_hex(8),
            "checkpoints": {s: dataclasses.asdict(e) for s, e in self.entries.items()},
            "damaged": self._aside,
        }
        content = json.dumps(said, indent=1).encode()
        written = self._objects.write(_INDEX, content, if_equal=self._generation)
        if not written:  # unless it was, and the answer was lost
            now, written = self._objects.read(_INDEX)
            if now != content:
                raise CheckpointError(
                    f"{self.place} was taken over by {_owner_of(now)}: this run writes "
                    "no more there"
                )
        self._generation = written


def files_of(path: Path) -> list[str]:
    """Lists the files of a checkpoint, by their paths below it."""
    with writing(path):
        return sorted(str(p.relative_to(path)) for p in path.rglob("*") if p.is_file())


def new_folder(step: int) -> str:
    """A name for the objects of a checkpoint that no other has."""
    return f"{step}-{secrets.token_hex(8)}"


def _owner_of(content: bytes | None) -> str:
    """Who an index says may change it, in words."""
    with contextlib.suppress(ValueError, KeyError, TypeError, AttributeError):
        said: Mapping[str, str] = json.loads(content or b"")
        return said["owner"].rpartition(" ")[0]
    return "somebody"
