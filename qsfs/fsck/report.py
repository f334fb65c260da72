"""What a check found: findings that a person can act on, JSON, and the exit code of fsck(8)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from enum import Enum, IntEnum

KEPT_PER_KIND = 200
"""Findings of one kind that are kept whole; the rest are counted."""

CLEAN, MENDED, LEFT, FAILED, USAGE = 0, 1, 4, 8, 16


class Layer(IntEnum):
    """What was checked, in this order."""

    LMDB = 1
    NAMESPACE = 2
    EXTENTS = 3
    PACKS = 4


class Severity(Enum):
    """Only errors count for the exit code.  A warning says that less is left than there could be."""

    NOTE = "note"
    WARNING = "warning"
    ERROR = "error"


@dataclass(slots=True)
class Finding:
    """One thing that is wrong.

    `kind` is stable, for programs; `subject` names what it is about (`inode`, `page`, `pack`, `shard`,
    `backend`, `table`, `key`); `mended` is whether it was put right.
    """

    layer: Layer
    severity: Severity
    kind: str
    message: str
    subject: dict[str, object] = field(default_factory=dict)
    mended: bool = False

    def to_json(self) -> dict[str, object]:
        """The finding as an object."""
        return {
            "layer": self.layer.name.lower(),
            "severity": self.severity.value,
            "kind": self.kind,
            "message": self.message,
            "subject": self.subject,
            "mended": self.mended,
        }


class Report:
    """All findings.  `failures` are checks that could not be made, each with the reason."""

    def __init__(self) -> None:
        self.findings: list[Finding] = []
        self.failures: list[str] = []
        self.checked: Counter[str] = Counter()
        self._counts: Counter[tuple[str, Severity]] = Counter()
        self._mended: Counter[tuple[str, Severity]] = Counter()
        self._kept: Counter[str] = Counter()

    def add(
        self,
        layer: Layer,
        kind: str,
        message: str,
        subject: Mapping[str, object] | None = None,
        severity: Severity = Severity.ERROR,
    ) -> Finding:
        """Adds a finding and returns it; `settle` says later that it was mended."""
        finding = Finding(layer, severity, kind, message, dict(subject or {}))
        self._counts[kind, severity] += 1
        self._kept[kind] += 1
        if self._kept[kind] <= KEPT_PER_KIND:
            self.findings.append(finding)
        return finding

    def settle(self, finding: Finding) -> None:
        """Takes note that a finding was mended."""
        if not finding.mended:
            finding.mended = True
            self._mended[finding.kind, finding.severity] += 1

    def fail(self, reason: str) -> None:
        """Takes note of a check that could not be made."""
        if reason not in self.failures:
            self.failures.append(reason)

    def count(self, severity: Severity = Severity.ERROR) -> int:
        """Findings of this severity, also those that are not kept whole."""
        return sum(number for (_, of), number in self._counts.items() if of is severity)

    def mended(self, severity: Severity = Severity.ERROR) -> int:
        """How many of them were put right."""
        return sum(number for (_, of), number in self._mended.items() if of is severity)

    @property
    def exit_code(self) -> int:
        """0 clean, 1 errors were mended, 4 errors are left, 8 a check could not be made; combined."""
        code = CLEAN
        if self.mended():
            code |= MENDED
        if self.count() > self.mended():
            code |= LEFT
        if self.failures:
            code |= FAILED
        return code

    def to_json(self) -> dict[str, object]:
        """The whole report as an object."""
        return {
            "exit_code": self.exit_code,
            "errors": self.count(),
            "mended": self.mended(),
            "warnings": self.count(Severity.WARNING),
            "checked": dict(sorted(self.checked.items())),
            "failures": list(self.failures),
            "findings": [finding.to_json() for finding in self.findings],
            "counts": {
                f"{kind}/{severity.value}": number
                for (kind, severity), number in sorted(
                    self._counts.items(), key=lambda item: (item[0][0], item[0][1].value)
                )
            },
        }

    def sentences(self) -> Iterator[str]:
        """The report for people: each finding, then what it comes to."""
        for finding in self.findings:
            done = " (mended)" if finding.mended else ""
            yield f"{finding.severity.value}: {finding.message}{done}"
        for kind, number in sorted(self._kept.items()):
            if number > KEPT_PER_KIND:
                yield f"... and {number - KEPT_PER_KIND} more of the kind '{kind}'"
        for reason in self.failures:
            yield f"not checked: {reason}"
        what = ", ".join(f"{number} {name}" for name, number in sorted(self.checked.items())) or "nothing"
        yield f"Checked {what}."
        errors, mended = self.count(), self.mended()
        if errors == 0:
            yield "No errors." if not self.failures else "No errors in what could be checked."
        elif mended == errors:
            yield f"{errors} errors, all mended."
        else:
            yield f"{errors} errors, {mended} mended, {errors - mended} left."
