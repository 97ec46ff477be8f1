"""Equal rows, and comparisons that contradict each other, found in one pass by their digests."""

from __future__ import annotations

import json
from hashlib import blake2b
from typing import Any

from rlhf_course.data_report import DataReport
from rlhf_course.sources import Place


class Twins:
    """Which items are equal, and which comparisons say the opposite of another one."""

    def __init__(self, kind: str):
        self.kind = kind
        self._seen: set[bytes] = set()
        self._orders: dict[bytes, bytes] = {}
        self._groups: list[bytes] = []
        self._torn: set[bytes] = set()
        self._equal: dict[int, Place] = {}
        self._count = 0

    def add(self, place: Place, item: Any) -> None:
        """The next item."""
        item = item.prompt if self.kind == "prompts" else item
        key = _digest(item)
        if key in self._seen:
            self._equal[self._count] = place
        self._seen.add(key)
        if self.kind == "comparisons":
            group = _digest([item.prompt, sorted(item.responses)])
            if self._orders.setdefault(group, key) != key:
                self._torn.add(group)
            self._groups.append(group)
        self._count += 1

    def finish(self, report: DataReport, places: list[Place] | None, policy: str) -> set[int]:
        """Count them in the report; returns the numbers of the items that are to be left out."""
        torn = [i for i, group in enumerate(self._groups) if group in self._torn]
        for place in self._equal.values():
            report.duplicates.add(place)
        for i in torn:
            report.contradictory.add(places[i])
        if policy != "drop":
            return set()
        equal = self._equal.keys() - set(torn)
        for i in sorted(equal):
            report.dropped.add("duplicates", self._equal[i])
        for i in torn:
            report.dropped.add("contradictory comparisons", places[i])
        return equal | set(torn)


def _digest(value: object) -> bytes:
    text = json.dumps(value, ensure_ascii=False)
    return blake2b(text.encode("utf-8", "surrogatepass"), digest_size=16).digest()
