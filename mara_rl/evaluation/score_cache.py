"""Scores by what was scored and by which model, in one SQLite file."""

import hashlib
import sqlite3
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from pathlib import Path

from mara_rl.common.errors import DataError

_WAIT_S = 60.0  # for another process's write
_PER_QUERY = 500


class ScoreCache(AbstractContextManager["ScoreCache"]):
    """Scores that outlive a command; several processes may use one file."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._path = path
        try:
            self._db = sqlite3.connect(path, timeout=_WAIT_S)
            # Not WAL: it is not for files that several machines share.
            self._db.execute("PRAGMA journal_mode=DELETE")
            self._db.execute(
                "CREATE TABLE IF NOT EXISTS scores (key BLOB PRIMARY KEY, score REAL) WITHOUT ROWID"
            )
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def get(self, model: str, pairs: Iterable[tuple[str, str]]) -> dict[tuple[str, str], float]:
        """The scores known of (prompt, answer) pairs; ``model`` says which model, files and all."""
        keys = {_key(model, pair): pair for pair in pairs}
        found: dict[tuple[str, str], float] = {}
        for some in _chunks(list(keys)):
            marks = ",".join("?" * len(some))
            query = f"SELECT key, score FROM scores WHERE key IN ({marks})"
            try:
                rows = self._db.execute(query, some).fetchall()
            except sqlite3.Error as error:
                raise self._failure(error) from error
            found |= {keys[bytes(key)]: score for key, score in rows}
        return found

    def put(self, model: str, scores: Mapping[tuple[str, str], float]) -> None:
        """Keep scores; they are on disk when this returns."""
        rows = [(_key(model, pair), score) for pair, score in scores.items()]
        try:
            with self._db:
                self._db.executemany("INSERT OR REPLACE INTO scores VALUES (?, ?)", rows)
        except sqlite3.Error as error:
            raise self._failure(error) from error

    def _failure(self, error: sqlite3.Error) -> DataError:
        damaged = not isinstance(error, sqlite3.OperationalError)  # that is a lock, a full disk …
        hint = "; remove it to begin anew" if damaged else ""
        return DataError(f"score cache {self._path}: {error}{hint}")

    def __exit__(self, *error: object) -> None:
        self._db.close()


def _key(model: str, pair: tuple[str, str]) -> bytes:
    digest = hashlib.sha256()
    for part in (model, *pair):
        content = part.encode("utf-8", "surrogatepass")
        digest.update(len(content).to_bytes(8, "big") + content)
    return digest.digest()


def _chunks(keys: Sequence[bytes]) -> Iterable[Sequence[bytes]]:
    for first in range(0, len(keys), _PER_QUERY):
        yield keys[first : first + _PER_QUERY]
