"""The main job on the real model, a few steps long: it need not learn, but every part must do its work."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
EXAMPLES = ROOT / "examples"
BUILT_IN_SUITE = ROOT / "evaluation" / "general"
ROWS = 40
"""Of each example; about a fifth is held out."""
RECIPE = ["max_steps=2", "batch_size=4", "warmup_steps=1", "max_new_tokens=12", "min_teacher_gap=-1"]
GATE = ["min_gain=-1", "max_forgetting=1", "max_general_drop=1", "max_leak=1"]
SECONDS = 600

pytestmark = pytest.mark.slow


def shorten(source: Path, target: Path, rows: int) -> Path:
    target.write_text("".join(source.read_text().splitlines(keepends=True)[:rows]))
    return target


@pytest.mark.timeout(SECONDS + 20)
def test_two_updates_two_swaps_and_a_rollback_without_a_failed_request(tmp_path: Path) -> None:
    suite = tmp_path / "general"
    suite.mkdir()
    for file in BUILT_IN_SUITE.glob("*.jsonl"):
        shorten(file, suite / file.name, 6)
    first = shorten(EXAMPLES / "support_route.jsonl", tmp_path / "route.jsonl", ROWS)
    second = shorten(EXAMPLES / "review_topic.jsonl", tmp_path / "topic.jsonl", ROWS)
    held_out = shorten(EXAMPLES / "support_route.heldout.jsonl", tmp_path / "held.jsonl", 3)
    result = tmp_path / "out.json"
    command = [sys.executable, "-m", "cli", "demo", "--json", str(result)]
    command += ["--skill", f"route={first}", "--skill", f"topic={second}", "--eval", f"route={held_out}"]
    command += [part for setting in RECIPE for part in ("--recipe", setting)]
    command += [part for setting in GATE for part in ("--gate", setting)]
    environment = os.environ | {"PYTHONPATH": str(ROOT), "RATCHET_GENERAL_SUITE_DIR": str(suite)}
    done = subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=SECONDS, check=False
    )
    assert done.returncode == 0, done.stderr[-4000:]
    shown = json.loads(result.read_text())
    assert shown["versions"] == ["v0", "v1", "v2"]
    assert shown["moments"]["after_rollback"] == "v1"
    assert shown["rollback"]["from_version"] == "v2"
    assert shown["failed_requests"] == 0
    assert shown["requests"] == sum(shown["replies_per_version"].values()) >= 5
    for scores in (*shown["skills"].values(), shown["general"]):
        assert scores.keys() == {"base", "after_1", "after_2"}
        assert all(0 <= score <= 1 for score in scores.values())
    # An untaught model does not know the convention.
    assert shown["skills"]["route"]["base"] == 0
    assert shown["eval"]["route"]["base"] == 0
    assert [answer["version"] for answer in shown["answers"]] == [
        "v0",
        "v0",
        "v1",
        "v1",
        "v2",
        "v2",
        "v1",
        "v1",
    ]
    # Not the text: in bfloat16 a near-tie falls by what else is in the batch, here the background chat.
    assert {"training", "evaluating", "publishing"} <= shown["stage_seconds"]["update 2"].keys()
    assert 0 <= shown["swap_seconds"] < 30
    assert 0 < shown["rollback_seconds"] < 30
    assert "rolled back from v2 to v1" in done.stdout
    assert shown["error"] is None
