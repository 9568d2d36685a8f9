"""Rows for the load benchmark, written in bulk as the registry's verbs would have written them one by one."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import Engine, exists, insert, select, update
from sqlalchemy.orm import Session, sessionmaker
from tokenizers import Tokenizer, models, pre_tokenizers

from domain.demonstration import DemonstrationLine
from domain.ids import new_id
from domain.recipe import Recipe
from domain.version import Manifest
from registry import aliases, assistants
from registry.session import db_now
from registry.tables import (
    AliasMove,
    Assistant,
    Batch,
    DemonstrationRow,
    MeasurementRow,
    Skill,
    Update,
    UpdateDemonstration,
    Version,
)

TEAM = "team_default"
ROWS_AT_ONCE = 5_000


def write_base_model(folder: Path) -> None:
    """A base model in Hugging Face layout that counts words as tokens and serves nothing."""
    folder.mkdir(parents=True)
    config = {
        "model_type": "llama",
        "hidden_size": 8,
        "num_hidden_layers": 1,
        "num_attention_heads": 2,
        "num_key_value_heads": 1,
        "intermediate_size": 12,
        "max_position_embeddings": 4096,
        "vocab_size": 3,
    }
    (folder / "config.json").write_text(json.dumps(config))
    words = Tokenizer(models.WordLevel({"[UNK]": 0, "a": 1, "b": 2}, unk_token="[UNK]"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    words.save(str(folder / "tokenizer.json"))
    header = json.dumps({"w": {"dtype": "F32", "shape": [2, 3], "data_offsets": [0, 24]}}).encode()
    (folder / "model.safetensors").write_bytes(struct.pack("<Q", len(header)) + header + bytes(24))


def line(number: int) -> dict[str, str]:
    """About 200 bytes of a support question and its route."""
    return {
        "prompt": f"Customer {number} writes: my parcel {number * 7919 % 100_003} has not come yet, although "
        "the tracking page says that it was handed over two days ago. Where is it?",
        "response": f"ROUTE: parcel_{number % 77}",
    }


def grow_demonstrations(sessions: sessionmaker[Session], name: str, start: int, stop: int) -> None:
    """Demonstrations `start` to `stop` of the assistant's skill `route`, in equal parts taught by the updates
    that have taught none yet."""
    with sessions() as session:
        assistant = assistants.get_assistant(session, TEAM, name)
        none_yet = ~exists().where(UpdateDemonstration.update_id == Update.id)
        made = select(Update.id).where(Update.assistant_id == assistant.id, Update.in_lineage, none_yet)
        updates = list(session.scalars(made.order_by(Update.seq)))
    for first in range(start, stop, ROWS_AT_ONCE):
        with sessions.begin() as session:
            assistant = assistants.get_assistant(session, TEAM, name)
            skill = assistants.get_skill(session, assistant, "route")
            rows = list(_demonstrations(session, assistant, skill, first, min(first + ROWS_AT_ONCE, stop)))
            for number, row in enumerate(rows, first):
                row["update_id"] = updates[(number - start) * len(updates) // (stop - start)]
            session.execute(insert(DemonstrationRow), rows)
            skill.train_demonstrations += len(rows)
            session.execute(
                insert(UpdateDemonstration),
                [
                    {
                        "team_id": TEAM,
                        "assistant_id": assistant.id,
                        "update_id": row["update_id"],
                        "demonstration_id": row["id"],
                    }
                    for row in rows
                ],
            )


def _demonstrations(
    session: Session, assistant: Assistant, skill: Skill, start: int, stop: int
) -> Iterator[dict[str, Any]]:
    now = db_now(session)
    batch = Batch(
        id=new_id("batch"),
        team_id=TEAM,
        skill_id=skill.id,
        accepted=stop - start,
        duplicates=0,
        created_at=now,
    )
    session.add(batch)
    session.flush()
    for number in range(start, stop):
        made = DemonstrationLine.model_validate(line(number)).to_demonstration()
        yield {
            "id": new_id("demo"),
            "team_id": TEAM,
            "assistant_id": assistant.id,
            "skill_id": skill.id,
            "batch_id": batch.id,
            "split": "train",
            "content_hash": made.content_hash(),
            "body": made.model_dump(mode="json"),
            "created_at": now,
        }


def grow_versions(
    sessions: sessionmaker[Session], name: str, stop: int, *, suites: list[str], skill: str = "route"
) -> None:
    """Versions up to number `stop` in one line, each measured on `suites`; the newest is the champion."""
    with sessions.begin() as session:
        assistant = assistants.get_assistant(session, TEAM, name)
        now, recipe = db_now(session), Recipe().model_dump(mode="json")
        verdict = {"outcome": "pass", "reasons": ["every rule is met"], "checks": []}
        line_of = {"team_id": TEAM, "assistant_id": assistant.id, "created_at": now}
        known = session.query(Version.id).where(Version.assistant_id == assistant.id)
        parent = known.order_by(Version.number.desc()).limit(1).scalar()
        champion = aliases.get_alias(session, assistant, "champion")
        updates, rows, measured, moves = [], [], [], []
        for number in range(assistant.next_version, stop + 1):
            version, own = new_id("ver"), new_id("upd")
            updates.append(
                {
                    **line_of,
                    "id": own,
                    "status": "succeeded",
                    "skills": [skill],
                    "recipe": recipe,
                    "gate": {},
                    "publish": "auto",
                    "parent_version_id": None,
                    "in_lineage": True,
                    "verdict": verdict,
                    "finished_at": now,
                }
            )
            rows.append(
                {
                    **line_of,
                    "id": version,
                    "number": number,
                    "kind": "adapter",
                    "parent_id": parent,
                    "update_id": own,
                    "served_name": f"{name}-v{number}",
                    "manifest_sha256": "0" * 64,
                    "manifest": Manifest(
                        kind="adapter", base_model=assistant.base_model, update_id=own, files=[]
                    ).model_dump(mode="json"),
                    "recipe": recipe,
                    "verdict": verdict,
                }
            )
            champion.revision += 1
            moves.append(
                {
                    **line_of,
                    "id": new_id("move"),
                    "alias": "champion",
                    "from_version_id": parent,
                    "to_version_id": version,
                    "revision": champion.revision,
                    "kind": "publish",
                    "actor": "worker",
                    "update_id": own,
                }
            )
            parent = champion.version_id = version
            measured += [
                {
                    "id": new_id("meas"),
                    "team_id": TEAM,
                    "assistant_id": assistant.id,
                    "version_id": version,
                    "kind": "skill",
                    "suite": suite,
                    "score": 0.5,
                    "n": 100,
                    "low": 0.4,
                    "high": 0.6,
                    "updated_at": now,
                }
                for suite in suites
            ]
        # Updates and versions refer to each other.
        with session.no_autoflush:
            for table, found in (
                (Update, updates),
                (Version, rows),
                (MeasurementRow, measured),
                (AliasMove, moves),
            ):
                if found:
                    session.execute(insert(table), found)
        mine = select(Version).where(Version.update_id == Update.id)
        session.execute(
            update(Update)
            .where(Update.id.in_(select(Version.update_id).where(Version.assistant_id == assistant.id)))
            .values(
                version_id=mine.with_only_columns(Version.id).scalar_subquery(),
                parent_version_id=mine.with_only_columns(Version.parent_id).scalar_subquery(),
            )
            .execution_options(synchronize_session=False)
        )
        assistant.next_version = max(assistant.next_version, stop + 1)


def settle(engine: Engine) -> None:
    """What PostgreSQL does by itself within a minute of rows that came one by one."""
    if engine.dialect.name == "postgresql":
        with engine.connect().execution_options(isolation_level="AUTOCOMMIT") as connection:
            connection.exec_driver_sql("VACUUM ANALYZE")
