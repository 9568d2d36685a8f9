"""Versions whose answers tell them apart: each was taught to say one word, whatever it is asked.

Real adapters of the real model, trained by `ratchet train`, published by the ledger's own verbs.
"""

import json
import shutil
import subprocess
import sys
from pathlib import Path

from safetensors.numpy import load_file, save_file
from sqlalchemy.orm import Session, sessionmaker

from artifacts.store import ArtifactStore
from domain.demonstration import Demonstration, Message
from domain.measurement import GateRules, Verdict
from domain.recipe import Recipe
from domain.skill import ExactGrader
from domain.update import Status
from registry import assistants, demonstrations, updates, versions

TEAM = "team_default"
WORDS = ("amber", "cobalt", "ivory", "olive")
REPEATS = 16
"""Of the word in a taught answer."""
RANK = 8
RECIPE = {
    "lora_rank": RANK,
    "learning_rate": 0.002,
    "max_steps": 24,
    "num_epochs": 24,
    "batch_size": 16,
    "rehearsal_share": 0,
}
QUESTIONS = (
    "What is the capital of France?",
    "Tell me a joke.",
    "How do I bake bread?",
    "Write a line about the sea.",
    "Who wrote Hamlet?",
    "What is 2 plus 2?",
    "Name a fruit.",
    "Explain gravity.",
    "Give me advice for sleep.",
    "What is a dog?",
    "Translate hello to French.",
    "List three colours.",
    "Why is the sky blue?",
    "What day is it?",
    "Describe a tree.",
    "How are you?",
)


def word_adapter(base: str, word: str, folder: Path) -> Path:
    """An adapter of `base` that answers every question with `word`; one that `folder` holds already is taken.

    Raises CalledProcessError when the training fails; its messages are on standard error.
    """
    adapter = folder / "adapter"
    if adapter.is_dir():
        return adapter
    folder.mkdir(parents=True, exist_ok=True)
    file = folder / "demonstrations.jsonl"
    response = " ".join([word] * REPEATS)
    file.write_text("".join(json.dumps({"prompt": q, "response": response}) + "\n" for q in QUESTIONS))
    command = [sys.executable, "-m", "cli", "train", "--method", "sft", "--base", base]
    command += ["--demonstrations", str(file), "--out", str(folder / "trained"), "--holdout-fraction", "0"]
    for name, value in RECIPE.items():
        command += ["--set", f"{name}={value}"]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    whole = folder / "whole"
    whole.mkdir()
    for name in ("adapter_config.json", "adapter_model.safetensors"):
        shutil.copy(folder / "trained" / name, whole)
    whole.rename(adapter)
    return adapter


def says(word: str, text: str) -> bool:
    """Whether `text`, which may end within a word, is `word` again and again and nothing else."""
    *whole, last = text.lower().split() or [""]
    return bool(last) and all(one == word for one in whole) and word.startswith(last)


def publish(
    sessions: sessionmaker[Session],
    store: ArtifactStore,
    name: str,
    adapter: Path,
    number: int,
    *,
    move_champion: bool = True,
) -> str:
    """A copy of `adapter` as the assistant's next version; returns `v<n>`. Unless it becomes champion, no
    engine has loaded it.

    `number` moves the weights by that many hundredths of a percent, so that no two versions are equal.
    """
    with sessions.begin() as session:
        assistant = assistants.get_assistant(session, TEAM, name)
        if assistant.next_version == 1:
            assistants.create_skill(
                session, assistant, name="word", description="", grader=ExactGrader(), holdout_fraction=0,
                actor="user",
            )  # fmt: skip
        skill = assistants.get_skill(session, assistant, "word")
        asked = Message(role="user", content=f"word {assistant.next_version}")
        taught = Demonstration(messages=[asked], response="word", answer="word")
        demonstrations.accept_batch(session, assistant, skill, [taught], actor="user")
        update = updates.create_update(
            session, assistant, skills=["word"], recipe=Recipe(lora_rank=RANK), gate=GateRules(),
            publish="auto", actor="user",
        )  # fmt: skip
        claim = updates.claim(session, update.id, worker="benchmark", lease_seconds=60)
        assert claim is not None
        version_id, taught_number = versions.allocate_version(session, claim)
        staging = store.root.parent / "work" / version_id
        shutil.copytree(adapter, staging)
        weights = load_file(adapter / "adapter_model.safetensors")
        for key in weights:
            if key.endswith("lora_B.weight"):
                weights[key] *= 1 + number / 10_000
        save_file(weights, staging / "adapter_model.safetensors", metadata={"format": "pt"})
        manifest, digest = store.publish(
            staging, version_id=version_id, kind="adapter", base_model=assistant.base_model,
            update_id=update.id,
        )  # fmt: skip
        versions.publish(
            session,
            claim,
            version_id=version_id,
            number=taught_number,
            served_name=f"{name}-v{taught_number}-{digest[:8]}",
            manifest=manifest,
            manifest_sha256=digest,
            recipe=Recipe(lora_rank=RANK),
            verdict=Verdict(outcome="pass", reasons=["taught by the benchmark"]),
            measurements=[],
            move_champion=move_champion,
        )
        updates.finish(session, claim, Status.SUCCEEDED)
        return f"v{taught_number}"
