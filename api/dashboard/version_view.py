"""One version: where it comes from, what it scored, what it is made of."""

from collections.abc import Sequence

from api.dashboard.contexts import FileRow, ItemRow, MeasurementBox, Pill, VersionPage
from api.dashboard.links import anchor, crumbs, update_url, version_link, version_url
from api.dashboard.matrix_view import verdict_of, version_pills
from api.dashboard.text import file_size, moment, percent
from api.dashboard.update_view import check_rows, fields
from domain.measurement import ItemScore
from domain.recipe import Recipe
from domain.version import Manifest
from registry.tables import MeasurementRow, Version

MOST_ITEMS = 40
_KINDS = {"base": "the base model", "adapter": "LoRA adapter", "full": "full checkpoint"}


def version_page(
    assistant: str,
    version: Version,
    lineage: Sequence[int],
    measurements: Sequence[tuple[MeasurementRow, Sequence[ItemScore]]],
    *,
    champion_id: str,
    opened: str | None,
    every_item: bool,
    now: float,
) -> VersionPage:
    """`lineage` are the newest numbers of it; `opened` is the anchor of the suite that is unfolded, with
    `every_item` to its end."""
    verdict = verdict_of(version)
    manifest = Manifest.model_validate(version.manifest) if version.manifest is not None else None
    return VersionPage(
        title=f"{assistant} v{version.number}",
        crumbs=crumbs(assistant, f"v{version.number}"),
        assistant=assistant,
        text=f"v{version.number}",
        pills=version_pills(version, champion_id),
        kind=_KINDS[version.kind],
        served_name=version.served_name,
        created=moment(version.created_at, now),
        update_url=update_url(assistant, version.update_id) if version.update_id is not None else None,
        lineage=[version_link(assistant, number) for number in lineage],
        base=version_link(assistant, 0),
        older=lineage[0] > 0,
        reasons=verdict.reasons if verdict is not None else [],
        checks=check_rows(verdict.checks) if verdict is not None else [],
        measurements=[
            _box(assistant, version, row, items, opened, every_item)
            for row, items in sorted(measurements, key=lambda pair: (pair[0].kind != "skill", pair[0].suite))
        ],
        recipe=fields(Recipe.model_validate(version.recipe)) if version.recipe is not None else [],
        manifest_sha256=version.manifest_sha256,
        files=[FileRow(file.path, file_size(file.size), file.sha256) for file in manifest.files]
        if manifest
        else [],
    )


def _box(
    assistant: str,
    version: Version,
    row: MeasurementRow,
    items: Sequence[ItemScore],
    opened: str | None,
    every_item: bool,
) -> MeasurementBox:
    name = anchor(row.kind, row.suite)
    ordered = sorted(items, key=lambda item: (item.score, item.item))
    shown = ordered if every_item and opened == name else ordered[:MOST_ITEMS]
    return MeasurementBox(
        anchor=name,
        suite=row.suite,
        kind="skill" if row.kind == "skill" else "general ability",
        score=percent(row.score),
        interval=f"{row.low * 100:.1f} to {row.high * 100:.1f}%, n {row.n}",
        items=[_item(item) for item in shown],
        failed=sum(item.score < 1 for item in items),
        open=opened == name,
        unshown=len(ordered) - len(shown),
        all_url=f"{version_url(assistant, version.number)}?open={name}&items=all#{name}",
    )


def _item(item: ItemScore) -> ItemRow:
    score = Pill("right", "good") if item.score >= 1 else Pill("wrong", "bad")
    if 0 < item.score < 1:
        score = Pill(f"{item.score:.2f}", "warn")
    return ItemRow(score, item.prompt, item.output, item.expected)
