"""`ratchet fsck`: the ledger against the version files and its own uploaded ones, byte for byte."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.table import Table

from cli.errors import CliError
from cli.output import AsJson, emit, table
from domain.errors import RatchetError
from domain.settings import Settings

HARMLESS, HARMED = 3, 4
"""Exit statuses: only files too many; or a version or an alias that cannot be served. 0 is clean or repaired,
1 means that the check could not be made."""


def fsck(
    home: Annotated[
        Path | None, typer.Option(help="Default RATCHET_HOME or ~/.ratchet.", show_default=False)
    ] = None,
    repair: Annotated[
        bool, typer.Option(help="Remove files that no version names and no update can still publish.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Compare every version's files with the ledger. Nothing that a version names is ever changed.

    Exit status: 0 clean or repaired, 3 only orphans are left, 4 files are missing or corrupt or an alias
    dangles, 1 the check could not be made.
    """
    settings = Settings() if home is None else Settings(home=home)
    try:
        report = check(settings, repair=repair)
    except RatchetError as error:
        raise CliError(error.message) from error
    emit(report.as_json(), as_json, lambda: show(report))
    raise typer.Exit(report.status)


@dataclass(frozen=True)
class Report:
    versions: int
    """Whose files were read."""
    findings: list[Any]
    """artifacts.check.Finding"""

    @property
    def status(self) -> int:
        left = {finding.kind for finding in self.findings if not finding.repaired}
        if left - {"orphan"}:
            return HARMED
        return HARMLESS if left else 0

    def as_json(self) -> dict[str, Any]:
        findings = [asdict(finding) for finding in self.findings]
        return {"object": "fsck", "versions": self.versions, "status": self.status, "findings": findings}


def check(settings: Settings, *, repair: bool) -> Report:
    """Raises RatchetError when ledger or store cannot be read."""
    # SQLAlchemy takes a second: not for every command.
    from artifacts.check import Finding, check_versions, orphan
    from artifacts.opening import open_store
    from artifacts.sweep import orphaned
    from registry import files, retention
    from registry.session import make_reading_sessions
    from registry.snapshot import opened

    store = open_store(settings)
    with opened(settings.resolved_database_url) as ledger:
        reads = make_reading_sessions(ledger)

        def unneeded(stored: Sequence[str]) -> Sequence[str]:
            with reads() as session:
                return retention.unneeded_ids(session, stored)

        with reads() as session:
            versions = retention.version_files(session)
            findings = [
                Finding("corrupt", file.id, None, f"{file.id} ({file.filename}) differs from its sha256")
                for file in files.damaged(session)
            ]
        findings += check_versions(store, versions)
        for version_id in orphaned(store, unneeded, settings.artifacts_grace_hours * 3600):
            found = orphan(version_id)
            if repair:
                store.delete(version_id)
                found = replace(found, repaired=True)
            findings.append(found)
    return Report(sum(not version.pruned for version in versions), findings)


def show(report: Report) -> Table | str:
    told = f"{report.versions} versions read"
    if not report.findings:
        return f"{told}, nothing wrong"
    rows = [
        (finding.kind, finding.message, "removed" if finding.repaired else "") for finding in report.findings
    ]
    return table(["", told, ""], rows)
