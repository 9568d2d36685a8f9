"""Rows for the load benchmark, written in bulk as the registry's verbs would have written them one by one."""

import json
import struct
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from sqlalchemy import insert, update
from sqlalchemy.orm import Session, sessionmaker
from tokenizers import Tokenizer, models, pre_tokenizers

from domain.demonstration import DemonstrationLine
from domain.ids import new_id
from domain.recipe import Recipe
from registry import aliases, assistants
from registry.session import db_now
from registry.tables import (
    Alias,
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
    """Demonstrations `start` to `stop` of the assistant's skill `route`, all taught by its champion."""
    for first in range(start, stop, ROWS_AT_ONCE):
        with sessions.begin() as session:
            assistant = assistants.get_assistant(session, TEAM, name)
            skill = assistants.get_skill(session, assistant, "route")
            rows = list(_demonstrations(session, assistant, skill, first, min(first + ROWS_AT_ONCE, stop)))
            session.execute(insert(DemonstrationRow), rows)
            skill.train_demonstrations += len(rows)
            taught_by = _champion_update(session, assistant)
            owner = {"team_id": TEAM, "assistant_id": assistant.id, "update_id": taught_by}
            session.execute(
                insert(UpdateDemonstration), [{**owner, "demonstration_id": row["id"]} for row in rows]
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


def _champion_update(session: Session, assistant: Assistant) -> str:
    champion = session.get_one(Version, aliases.get_alias(session, assistant, "champion").version_id)
    assert champion.update_id is not None
    return champion.update_id


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
        updates, rows, measured, made_by = [], [], [], {}
        for number in range(assistant.next_version, stop + 1):
            version, own = new_id("ver"), new_id("upd")
            made_by[own] = version
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
                    "manifest": {"kind": "adapter", "files": []},
                    "recipe": recipe,
                    "verdict": verdict,
                }
            )
            parent = version
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
        for table, found in ((Update, updates), (Version, rows), (MeasurementRow, measured)):
            if found:
                session.execute(insert(table), found)
        assistant.next_version = max(assistant.next_version, stop + 1)
        session.execute(
            update(Alias)
            .where(Alias.assistant_id == assistant.id, Alias.name == "champion")
            .values(version_id=parent)
        )
