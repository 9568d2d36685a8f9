"""What must be true of a ledger and its files whatever was killed when: told by the recorded history.

The events of an update say who claimed it with which fence, when it was given back and how it ended; rows
say what became of it. `violations` reads all of it and names every breach.
"""

import hashlib
import itertools
from collections import defaultdict

from sqlalchemy import select
from sqlalchemy.orm import Session

from artifacts.store import ArtifactStore
from domain.errors import CorruptArtifact
from domain.update import FINISHED
from registry.tables import Alias, AliasMove, Event, Update, Version


def violations(session: Session, store: ArtifactStore) -> list[str]:
    """Empty when every invariant held."""
    updates = list(session.scalars(select(Update).order_by(Update.seq)))
    events = list(session.scalars(select(Event).order_by(Event.id)))
    versions = list(session.scalars(select(Version).order_by(Version.number)))
    return [
        *_runs(updates, events),
        *_order(updates, events, versions),
        *_publications(updates, events, versions),
        *_files(versions, store),
        *_aliases(session, versions),
    ]


def _runs(updates: list[Update], events: list[Event]) -> list[str]:
    """One running update per assistant; fences rise by one; an ended update stays ended."""
    found = []
    owner = {update.id: update.assistant_id for update in updates}
    running: dict[str, str] = {}
    fences: dict[str, int] = defaultdict(int)
    ended: set[str] = set()
    for event in events:
        assistant, status = owner[event.update_id], event.data.get("status")
        if "fence" in event.data:
            holder = running.get(assistant)
            if holder not in (None, event.update_id):
                found.append(f"{event.update_id} ran beside {holder}")
            if event.update_id in ended:
                found.append(f"{event.update_id} ran again after its end")
            if event.data["fence"] <= fences[event.update_id]:
                found.append(f"{event.update_id} was claimed twice with fence {event.data['fence']}")
            running[assistant] = event.update_id
            fences[event.update_id] = event.data["fence"]
        elif status is not None and status != "running" and running.get(assistant) == event.update_id:
            del running[assistant]
        if status in FINISHED:
            if event.update_id in ended:
                found.append(f"{event.update_id} ended twice")
            ended.add(event.update_id)
    return found


def _order(updates: list[Update], events: list[Event], versions: list[Version]) -> list[str]:
    """First in, first out within an assistant, but for those that people took out of the line."""
    paused = {event.update_id for event in events if event.message.startswith("Pause")}
    first: dict[str, int] = {}
    for event in events:
        if "fence" in event.data:
            first.setdefault(event.update_id, event.id)
    number = {version.update_id: version.number for version in versions}
    found = []
    lines: dict[str, list[Update]] = defaultdict(list)
    for update in updates:
        if update.id not in paused:
            lines[update.assistant_id].append(update)
    for line in lines.values():
        for what, order in (("started", first), ("published", number)):
            came = [update for update in line if update.id in order]
            for one, next_one in itertools.pairwise(came):
                if order[one.id] > order[next_one.id]:
                    found.append(f"{next_one.id} {what} before {one.id}")
    return found


def _publications(updates: list[Update], events: list[Event], versions: list[Version]) -> list[str]:
    """At most one version per update, by the newest fence of that moment; none of a cancelled one."""
    found = []
    made: dict[str, list[str]] = defaultdict(list)
    for version in versions:
        if version.update_id is not None:
            made[version.update_id].append(version.id)
    by_update: dict[str, list[Event]] = defaultdict(list)
    for event in events:
        by_update[event.update_id].append(event)
    for update in updates:
        own = made[update.id]
        if own != ([update.version_id] if update.version_id else []):
            found.append(f"{update.id} has versions {own}, but says {update.version_id}")
        if update.status == "cancelled" and own:
            found.append(f"{update.id} is cancelled and published {own}")
        if update.status == "succeeded" and not own:
            found.append(f"{update.id} succeeded without a version")
        fence, published = 0, 0
        for event in by_update[update.id]:
            fence = event.data.get("fence", fence)
            if event.type == "verdict":
                published += 1
                digest = hashlib.sha256(f"{update.id}:{fence}".encode()).hexdigest()
                if own and own[0] != f"ver_{digest[:24]}":
                    found.append(f"{update.id} was published by another fence than {fence}")
        if published != len(own):
            found.append(f"{update.id} was published {published} times")
    numbers: dict[str, list[int]] = defaultdict(list)
    for version in versions:
        numbers[version.assistant_id].append(version.number)
    for assistant, taken in numbers.items():
        if taken != list(range(len(taken))):
            found.append(f"{assistant} has versions {taken}")
    return found


def _files(versions: list[Version], store: ArtifactStore) -> list[str]:
    found = []
    for version in versions:
        if version.manifest_sha256 is not None:
            try:
                store.verify(version.id, version.manifest_sha256)
            except CorruptArtifact as error:
                found.append(f"{version.id} is visible but torn: {error.message}")
    return found


def _aliases(session: Session, versions: list[Version]) -> list[str]:
    """Every alias points at a version of its assistant, and its history is one unbroken chain to there."""
    found = []
    owner = {version.id: version.assistant_id for version in versions}
    chains: dict[tuple[str, str], list[AliasMove]] = defaultdict(list)
    for move in session.scalars(select(AliasMove).order_by(AliasMove.revision)):
        chains[move.assistant_id, move.alias].append(move)
    for alias in session.scalars(select(Alias)):
        if owner.get(alias.version_id) != alias.assistant_id:
            found.append(f"alias {alias.name} of {alias.assistant_id} points at {alias.version_id}")
        chain = chains[alias.assistant_id, alias.name]
        if [move.revision for move in chain] != list(range(1, alias.revision + 1)):
            found.append(f"alias {alias.name} of {alias.assistant_id} lost a move")
        for one, next_one in itertools.pairwise(chain):
            if one.to_version_id != next_one.from_version_id:
                found.append(f"alias {alias.name} of {alias.assistant_id} broke at {next_one.revision}")
        if chain and chain[-1].to_version_id != alias.version_id:
            found.append(f"alias {alias.name} of {alias.assistant_id} is not where its history ends")
    return found
