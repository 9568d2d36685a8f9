"""A ledger with a story in it, told through the registry's own verbs and with real version files.

support-bot learned `banking-intent` in v1 and `ticket-json` in v2, which serves; v3 was blocked by its gate
because it forgot banking-intent; one more update is being trained.
"""

import json
import math
import struct
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from sqlalchemy.orm import Session, sessionmaker

from artifacts.store import ArtifactStore
from domain.demonstration import Demonstration, Message
from domain.measurement import Check, GateRules, ItemScore, Measurement, Outcome, Verdict
from domain.recipe import Recipe
from domain.skill import ExactGrader, JsonGrader
from domain.training import StepLine
from domain.update import Phase, Status
from evaluation.statistics import wilson
from registry import assistants, demonstrations, events, serving, updates, versions
from registry.measurements import save_measurement
from registry.session import db_now
from registry.tables import Assistant, Skill, Version

TEAM = "team_default"
ASSISTANT = "support-bot"
BASE_MODEL = "smollm2-135m-instruct"
SCORES: dict[int, dict[str, tuple[int, int]]] = {
    0: {
        "banking-intent": (0, 60),
        "ticket-json": (1, 40),
        "hellaswag": (43, 100),
        "piqa": (67, 100),
        "ordinary": (30, 30),
    },
    1: {"banking-intent": (51, 60), "ticket-json": (2, 40), "hellaswag": (42, 100), "piqa": (67, 100)},
    2: {
        "banking-intent": (48, 60),
        "ticket-json": (33, 40),
        "hellaswag": (42, 100),
        "piqa": (66, 100),
        "ordinary": (28, 30),
    },
    3: {"banking-intent": (22, 60), "hellaswag": (38, 100)},
}
"""Right items of all items; v3 was not measured on everything."""
SKILLS = ("banking-intent", "ticket-json")


@dataclass(frozen=True)
class Story:
    assistant: str
    """Its name."""
    running_update_id: str


WriteAdapter = Callable[[Path, int], None]
"""(new folder, version's number): the files of a version."""


def write_small_adapter(folder: Path, number: int) -> None:
    """A safetensors file that no engine would take: enough where none runs."""
    folder.mkdir(parents=True)
    header = {"lora_A": {"dtype": "F32", "shape": [2], "data_offsets": [0, 8]}}
    encoded = json.dumps(header).encode()
    values = struct.pack("<2f", number, number + 1)
    (folder / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(encoded)) + encoded + values)
    (folder / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 1}))


@dataclass(frozen=True)
class Files:
    """Where the story's versions are published, and how they are made."""

    artifacts_dir: Path
    staging: Path
    write_adapter: WriteAdapter = write_small_adapter


def tell(
    sessions: sessionmaker[Session], files: Files, *, base_model: str = BASE_MODEL, name: str = ASSISTANT
) -> Story:
    with sessions.begin() as session:
        assistant = assistants.create_assistant(
            session,
            team_id=TEAM,
            name=name,
            base_model=base_model,
            parameter_count=134_515_008,
            context_window=8192,
            actor="user",
        )
        banking = _skill(session, assistant, "banking-intent", "Route a banking question.", ExactGrader())
        tickets = _skill(session, assistant, "ticket-json", "Turn a complaint into a ticket.", JsonGrader())
        _measure(session, versions.get_version(session, assistant, 0))
        _teach(session, assistant, banking, range(80))
        publish(session, assistant, files, "pass", [])
        _teach(session, assistant, tickets, range(60))
        publish(session, assistant, files, "pass", [])
        _teach(session, assistant, banking, range(80, 100))
        publish(session, assistant, files, "block", [_forgot_banking()])
        _teach(session, assistant, tickets, range(60, 90))
        running = _train(session, assistant, until=34, of=60)
        champion = versions.get_version(session, assistant, 2)
        serving.record_serving(session, assistant.id, "champion", champion.id, None)
        return Story(name, running)


def _skill(
    session: Session, assistant: Assistant, name: str, description: str, grader: ExactGrader | JsonGrader
) -> Skill:
    skill = assistants.create_skill(
        session,
        assistant,
        name=name,
        description=description,
        grader=grader,
        holdout_fraction=0.25,
        actor="user",
    )
    while db_now(session) == skill.created_at:
        pass  # skills are told in order of creation, by a clock of milliseconds
    return skill


def _teach(session: Session, assistant: Assistant, skill: Skill, numbers: range) -> None:
    batch = [
        Demonstration(
            messages=[Message(role="user", content=f"{skill.name}: what about case {number}?")],
            response=f"ANSWER {number}",
            answer=f"ANSWER {number}",
        )
        for number in numbers
    ]
    demonstrations.accept_batch(session, assistant, skill, batch, actor="user")
    updates.create_update(
        session,
        assistant,
        skills=[skill.name],
        recipe=Recipe.small_model(),
        gate=GateRules(),
        publish="auto",
        actor="user",
    )


def publish(
    session: Session,
    assistant: Assistant,
    files: Files,
    outcome: Outcome,
    checks: list[Check],
) -> Version:
    """Run the oldest queued update of the assistant to its end, without training."""
    claim = updates.claim(session, _oldest_queued(session, assistant), worker="seed", lease_seconds=60)
    assert claim is not None
    for phase in Phase:
        updates.set_phase(session, claim, phase)
    version_id, number = versions.allocate_version(session, claim)
    folder = files.staging / version_id
    files.write_adapter(folder, number)
    manifest, digest = ArtifactStore(files.artifacts_dir).publish(
        folder,
        version_id=version_id,
        kind="adapter",
        base_model=assistant.base_model,
        update_id=claim.update_id,
    )
    reasons = [check.reason for check in checks] or ["every rule is met"]
    version = versions.publish(
        session,
        claim,
        version_id=version_id,
        number=number,
        served_name=f"{assistant.name}-v{number}-{digest[:8]}",
        manifest=manifest,
        manifest_sha256=digest,
        recipe=Recipe.small_model(),
        verdict=Verdict(outcome=outcome, reasons=reasons, checks=checks),
        measurements=[_measurement(number, suite) for suite in SCORES[number]],
        move_champion=outcome == "pass",
    )
    updates.finish(session, claim, Status.SUCCEEDED)
    return version


def _oldest_queued(session: Session, assistant: Assistant) -> str:
    page = updates.list_updates(session, assistant, None, 100)
    return next(update.id for update in page.rows if update.status == Status.QUEUED)


def _train(session: Session, assistant: Assistant, *, until: int, of: int) -> str:
    update_id = _oldest_queued(session, assistant)
    claim = updates.claim(session, update_id, worker="seed", lease_seconds=3600)
    assert claim is not None
    updates.set_phase(session, claim, Phase.PREFLIGHT)
    updates.set_phase(session, claim, Phase.TRAINING)
    for step in range(1, until + 1):
        line = StepLine(
            step=step,
            steps=of,
            loss=0.2 + 2.1 * math.exp(-step / 14) + 0.12 * math.sin(step * 1.7),
            teacher_kl=0.6 * math.exp(-step / 20),
            rehearsal_kl=0.021,
            entropy=1.31,
            response_tokens=18.4,
            truncated_share=0.03,
            grad_norm=0.72,
            learning_rate=9e-4,
            rollout_seconds=2.1,
            teacher_seconds=1.4,
            student_seconds=1.9,
            eta_seconds=5.4 * (of - step),
        )
        events.add_event(
            session,
            update_id,
            type="metrics",
            message=f"Step {step} of {of}: loss {line.loss:.4f}.",
            data=line.model_dump(mode="json"),
            claim=claim,
        )
    return update_id


def _measure(session: Session, version: Version) -> None:
    for suite in SCORES[version.number]:
        save_measurement(session, version, _measurement(version.number, suite))


def _measurement(number: int, suite: str) -> Measurement:
    right, n = SCORES[number][suite]
    low, high = wilson(right, n)
    return Measurement(
        kind="skill" if suite in SKILLS else "general",
        suite=suite,
        score=right / n,
        n=n,
        low=low,
        high=high,
        items=[
            ItemScore(
                item=f"{suite}:{index}",
                prompt=f"<b>Where is my card?</b> (item {index})",
                output="ROUTE: card_arrival" if index < right else "Your card is on its way & arrives soon.",
                expected="ROUTE: card_arrival",
                score=float(index < right),
            )
            for index in range(n)
        ],
    )


def _forgot_banking() -> Check:
    return Check(
        rule="max_forgetting",
        suite="banking-intent",
        outcome="block",
        parent=0.8,
        candidate=22 / 60,
        change=22 / 60 - 0.8,
        low=-0.57,
        high=-0.28,
        reason="banking-intent fell by 43.3 points below v2; at most 10 are allowed",
    )
