"""Copy the checkpoints of a run to another disk or an object store, while the run continues.

The copy is a run's folder itself: config.yaml, tokenizer/, frozen/ and checkpoints/. The manifest of a checkpoint is
copied last, so an incomplete copy does not count. Nothing is deleted there.
"""

from __future__ import annotations

import logging
import os
import shutil
import threading
from pathlib import Path

from bigtx.data.storage.remote import scheme_of, shown
from bigtx.engine.checkpoint import FOLDER, FROZEN, MANIFEST
from bigtx.utils.errors import BigtxError
from bigtx.utils.files import fsync_dir, is_url
from bigtx.utils.log import say
from bigtx.utils.secrets import scrub_text

END_SECONDS = {"finished": 600.0, "stopped": 30.0}
"""How long the end of a run waits for the copy of its last checkpoint. A request to stop leaves little time."""
DESCRIPTION = ("config.yaml", "tokenizer", FROZEN)
"""What a checkpoint needs besides itself, in the run's folder."""


class CheckpointCopier:
    """A thread that copies the newest checkpoint. One that is replaced by a newer one before its turn is left out.

    An error is a warning: the training does not depend on the copy.
    """

    def __init__(self, run_dir: Path, place: str) -> None:
        """Start the thread.

        Args:
            run_dir: the run's folder.
            place: a folder, or a URL of an object store.

        Raises:
            DataError: a package for the object store is missing.
        """
        if is_url(place):
            from bigtx.data.storage.buckets import file_system

            file_system(scheme_of(place))
        self.run_dir, self.place = run_dir, place.rstrip("/")
        self._changed = threading.Condition()
        self._next: Path | None = None
        self._is_busy = self._is_closed = False
        self._copied: dict[Path, tuple[int, int, int]] = {}
        threading.Thread(target=self._work, name="copies", daemon=True).start()

    def submit(self, checkpoint: Path) -> None:
        """Copy a complete checkpoint, in its turn. Any thread may call it."""
        with self._changed:
            self._next = checkpoint
            self._changed.notify_all()

    def finish(self, seconds: float) -> bool:
        """Wait some seconds at most; return whether all checkpoints are copied."""
        with self._changed:
            return self._changed.wait_for(self._is_idle, seconds)

    def close(self, *, warn: bool) -> None:
        """End the thread.

        Args:
            warn: whether to print a warning if the last checkpoint is not copied.
        """
        with self._changed:
            is_left = not self._is_idle()
            self._is_closed = True
            self._changed.notify_all()
        if is_left and warn:
            say(f"warning: the last checkpoint is not copied to {self._shown} yet; it is in {self.run_dir / FOLDER}")

    @property
    def _shown(self) -> str:
        return scrub_text(shown(self.place))

    def _is_idle(self) -> bool:
        return self._next is None and not self._is_busy

    def _work(self) -> None:
        while True:
            with self._changed:
                self._is_busy = False
                self._changed.notify_all()
                self._changed.wait_for(lambda: self._next is not None or self._is_closed)
                if self._is_closed:
                    return
                checkpoint, self._next, self._is_busy = self._next, None, True
            assert checkpoint is not None
            try:
                self._copy(checkpoint)
            except Exception as error:
                if not isinstance(error, OSError | BigtxError):
                    logging.getLogger(__name__).error("a checkpoint was not copied", exc_info=error)
                if checkpoint.exists():  # Otherwise it was deleted, because newer ones are there.
                    why = scrub_text(str(error))
                    say(f"warning: {checkpoint.name} could not be copied to {self._shown}: {why}; the run continues")

    def _copy(self, checkpoint: Path) -> None:
        """Copy what is not the file that was copied last, the manifest last.

        After a roll back, a step's files are written again with the same sizes.

        Raises:
            OSError: a file could not be copied.
        """
        files = [file for name in DESCRIPTION for file in _files(self.run_dir / name)]
        files += sorted(_files(checkpoint), key=lambda file: file.name == MANIFEST)
        for file in files:
            facts = file.stat()
            version = (facts.st_size, facts.st_mtime_ns, facts.st_ino)
            if self._copied.get(file) != version:
                self._put(file, file.relative_to(self.run_dir).as_posix())
                self._copied[file] = version

    def _put(self, file: Path, name: str) -> None:
        if is_url(self.place):
            from bigtx.data.storage import buckets

            buckets.put(file, f"{self.place}/{name}")
            return
        target = Path(self.place) / name
        partial = target.with_name(target.name + ".partial")
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(file, partial)
        with open(partial, "rb+") as copied:
            os.fsync(copied.fileno())
        if partial.stat().st_size != file.stat().st_size:
            raise OSError(f"{partial} has {partial.stat().st_size:,} bytes instead of {file.stat().st_size:,}")
        os.replace(partial, target)
        fsync_dir(target.parent)


def _files(path: Path) -> list[Path]:
    return [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
