"""The file that says how far the arrays of a store are valid: readers believe only that."""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

from explaind.checksums import checksum, sealed_text
from explaind.errors import DamagedStoreError, StoreFormatError, StoreUnreachableError
from explaind.metadata import read_json
from explaind.paths import interrupted
from explaind.places import Place

__all__ = ["COMMIT_FILE", "Commit", "is_published", "new_id", "thinned"]

COMMIT_FILE = "commit.json"
"""Its name."""


@dataclass(frozen=True, kw_only=True)
class Commit:
    """How much of a store is valid."""

    lengths: dict[str, int]
    """Number of valid entries along each growing dimension."""
    arrays: dict[str, int | None]
    """By name of every array the checksum of the rows in its last chunk, if it is known."""
    complete: bool
    """Whether the recording ended and will not grow any more."""
    sealed: bool = True
    """Whether it has a checksum; formats 1 and 2 have none."""
    earlier: tuple[Commit, ...] = ()
    """Some earlier ones, oldest first."""
    id: str = ""
    """Random text that stays as the store grows, and differs from that of a store which takes its place."""

    @property
    def num_steps(self) -> int:
        """S, the number of whole steps: those of which it is known what was before and after them."""
        moments = self.lengths.get("moment", self.lengths.get("snapshot", 0))  # one snapshot each, until format 2
        return max(0, min(self.lengths.get("step", 0), moments - 1))

    def to_json(self) -> str:
        """The content of the file, with its checksum."""
        earlier = [{"lengths": commit.lengths, "arrays": commit.arrays} for commit in self.earlier]
        content = {"lengths": self.lengths, "arrays": self.arrays, "complete": self.complete, "earlier": earlier}
        return sealed_text(content | {"id": self.id})

    @classmethod
    def read(cls, store: Place) -> Commit:
        """Read the last published commit.

        Raises:
            StoreFormatError: there is none.
            DamagedStoreError: it is not what was written.
            StoreUnreachableError: it is not known whether there is one.
        """
        if left := interrupted(store):
            raise StoreFormatError(left)
        try:
            content = read_json(store / COMMIT_FILE)
            noted = content.pop("checksum", None)
            if noted is not None and noted != checksum(content):
                raise ValueError("its content does not have the checksum that was noted when it was written")
            if not isinstance(content["complete"], bool):
                raise ValueError("it does not say whether the recording ended")
            found = [content | {"earlier": []}, *content.get("earlier", [])]
            last, *earlier = (cls(**_checked(commit), complete=False, sealed=noted is not None) for commit in found)
            return replace(last, complete=content["complete"], earlier=tuple(earlier), id=str(content.get("id", "")))
        except StoreUnreachableError:
            raise
        except FileNotFoundError as error:
            what = f"it has no {COMMIT_FILE}" if store.is_dir() else "no such directory"
            raise StoreFormatError(
                f"{store} is not a recorded run: {what}. Expected a directory written by explaind.trace; a "
                "run that was stopped before its first block of steps was written leaves nothing to open."
            ) from error
        except (ValueError, KeyError, TypeError, AttributeError, OSError) as error:
            raise DamagedStoreError(f"{store / COMMIT_FILE} cannot be read: {error}") from error


def new_id() -> str:
    """A text by which a store is told from others; it takes nothing from the generators of random numbers."""
    return secrets.token_hex(8)


def is_published(path: Place) -> bool:
    """Whether a store has something that readers may believe."""
    return (path / COMMIT_FILE).is_file()


def thinned(numbered: Mapping[int, Commit]) -> dict[int, Commit]:
    """Of some commits by number the last ones, and further back of less and less.

    Example:
        >>> kept = {}
        >>> for number in range(40):
        ...     kept = thinned(kept | {number: Commit(lengths={}, arrays={}, complete=False)})
        >>> list(kept)
        [0, 8, 16, 24, 28, 32, 34, 36, 37, 38, 39]
    """
    last = max(numbered)
    return {
        number: commit
        for number, commit in numbered.items()
        if number % (1 << max(0, (last - number).bit_length() - 2)) == 0
    }


def _checked(content: Mapping[str, Any]) -> dict[str, Any]:
    lengths, arrays = content["lengths"], content["arrays"]
    if not all(type(length) is int and length >= 0 for length in lengths.values()):
        raise ValueError("lengths that are no lengths")
    if isinstance(arrays, list):  # as in formats 1 and 2
        arrays = dict.fromkeys(arrays)
    if not isinstance(arrays, dict):
        raise ValueError("no names of arrays")
    return {"lengths": lengths, "arrays": arrays}
