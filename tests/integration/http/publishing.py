"""Versions made without training: real adapter files, published through the ledger's own verbs."""

import json
from collections.abc import Callable
from pathlib import Path

import numpy as np
from safetensors.numpy import save_file
from sqlalchemy.orm import Session, sessionmaker

from api.context import TEAM_ID, Context
from artifacts.version_store import VersionStore
from domain.demonstration import Demonstration, Message
from domain.measurement import GateRules, Measurement, Outcome, Verdict
from domain.recipe import Recipe
from domain.skill import ExactGrader
from domain.update import Status
from domain.version import Checkpoint, VersionKind
from registry import assistants, demonstrations, updates, versions
from registry.engines import checkpoint_of
from registry.tables import Update, Version

SIZES = {"q_proj": (8, 8), "v_proj": (8, 4), "down_proj": (12, 8)}
"""(inputs, outputs) under conftest.CONFIG: head size 4, one shared key-value head."""


def write_adapter(folder: Path, number: int) -> None:
    """An adapter of rank 2 that fits the tiny base model and differs from every other `number`'s."""
    folder.mkdir(parents=True)
    config = {"peft_type": "LORA", "r": 2, "lora_alpha": 4, "target_modules": sorted(SIZES), "bias": "none"}
    (folder / "adapter_config.json").write_text(json.dumps(config))
    tensors = {}
    for layer in range(2):
        for module, (inputs, outputs) in SIZES.items():
            stem = f"base_model.model.model.layers.{layer}."
            stem += f"{'mlp' if module == 'down_proj' else 'self_attn'}.{module}"
            tensors[f"{stem}.lora_A.weight"] = np.full((2, inputs), number, dtype=np.float32)
            tensors[f"{stem}.lora_B.weight"] = np.full((outputs, 2), number / 8, dtype=np.float32)
    save_file(tensors, folder / "adapter_model.safetensors")


def publish(
    context: Context,
    name: str,
    *,
    skill: str = "taught",
    outcome: Outcome = "pass",
    measurements: list[Measurement] | None = None,
) -> int:
    """As `add_version`, on a running API."""
    number = add_version(
        context.sessions,
        context.store,
        context.settings.work_dir,
        name,
        skill=skill,
        outcome=outcome,
        measurements=measurements,
    )
    context.controller.nudge()
    return number


def add_version(
    sessions: sessionmaker[Session],
    store: VersionStore,
    work_dir: Path,
    name: str,
    *,
    write: Callable[[Path, int], object] = write_adapter,
    kind: VersionKind = "adapter",
    skill: str = "taught",
    outcome: Outcome = "pass",
    measurements: list[Measurement] | None = None,
) -> int:
    """Number of a new version of the assistant; it becomes champion when the outcome is `pass`.

    `write` puts its files into the given folder, made for the given number.
    """
    with sessions.begin() as session:
        assistant = assistants.get_assistant(session, TEAM_ID, name)
        if skill not in [row.name for row in assistants.list_skills(session, assistant, None, 100).rows]:
            assistants.create_skill(
                session,
                assistant,
                name=skill,
                description="",
                grader=ExactGrader(),
                holdout_fraction=0,
                actor="user",
            )
        row = assistants.get_skill(session, assistant, skill)
        text = f"case {assistant.next_version}"
        taught = Demonstration(messages=[Message(role="user", content=text)], response="r", answer="r")
        demonstrations.accept_batch(session, assistant, row, [taught], actor="user")
        update = updates.create_update(
            session,
            assistant,
            skills=[skill],
            recipe=Recipe(),
            gate=GateRules(),
            publish="auto",
            actor="user",
        )
        claim = updates.claim(session, update.id, worker="test", lease_seconds=60)
        assert claim is not None
        version_id, number = versions.allocate_version(session, claim)
        staging = work_dir / version_id
        write(staging, number)
        manifest, digest = store.publish(
            staging,
            version_id=version_id,
            kind=kind,
            base_model=assistant.base_model,
            update_id=update.id,
            checkpoint=_below(session, update) if kind == "adapter" else None,
        )
        versions.publish(
            session,
            claim,
            version_id=version_id,
            number=number,
            served_name=f"{name}-v{number}-{digest[:8]}",
            manifest=manifest,
            manifest_sha256=digest,
            recipe=Recipe(),
            verdict=Verdict(outcome=outcome, reasons=["as the test wants"]),
            measurements=measurements or [],
            move_champion=outcome == "pass",
        )
        updates.finish(session, claim, Status.SUCCEEDED)
    return number


def _below(session: Session, update: Update) -> Checkpoint | None:
    """The full version that the update's parent is or lies on."""
    session.refresh(update)
    whole = checkpoint_of(session, session.get_one(Version, update.parent_version_id))
    if whole is None:
        return None
    return Checkpoint(version_id=whole.id, manifest_sha256=whole.manifest_sha256 or "")
