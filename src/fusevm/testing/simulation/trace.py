"""What happened in a simulation, line by line: for people the lines about one object, for tests a digest of all."""

import hashlib
from collections import defaultdict
from collections.abc import Callable


class Trace:
    """Lines in the order in which things happened. Nothing in a line may differ between two runs of one seed."""

    def __init__(self, now_s: Callable[[], float]) -> None:
        self._now_s = now_s
        self._digest = hashlib.sha256()
        self._by_subject: defaultdict[str, list[str]] = defaultdict(list)
        #: How many lines there are.
        self.length = 0

    def note(self, subject: str, text: str) -> None:
        """Something happened to an object: an environment's uid, a host's or replica's id, a snapshot's id."""
        line = f"{self._now_s():10.3f} s  {text}"
        self._digest.update(f"{subject} {line}\n".encode())
        self._by_subject[subject].append(line)
        self.length += 1

    def digest(self) -> str:
        """SHA-256 over all lines."""
        return self._digest.hexdigest()

    def about(self, subject: str) -> list[str]:
        """The lines of one object."""
        return self._by_subject.get(subject, [])
