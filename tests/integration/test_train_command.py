"""`ratchet train` and `ratchet preflight` as processes on a tiny model: no service, database or broker."""

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from safetensors.torch import load_file
from transformers import LlamaConfig, LlamaForCausalLM

from domain import failpoint
from tests.standing_trainer import await_standing, failpoint_value, go_on_once_asked
from tests.unit.trainer.conftest import tiny_tokenizer

pytestmark = pytest.mark.slow
STEPS = 60
SETTINGS = {
    "max_steps": STEPS,
    "num_epochs": 100,
    "batch_size": 4,
    "max_new_tokens": 6,
    "max_rehearsal_tokens": 5,
    "rollout_every": 2,
    "warmup_steps": 1,
    "lora_rank": 4,
    "learning_rate": 0.005,
    "demonstration_repeats": 1,
    "on_small_gap": "train",
}


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("base")
    torch.manual_seed(5)
    config = LlamaConfig(
        vocab_size=258,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=1,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture
def demonstrations(tmp_path: Path) -> Path:
    """24 lines and a blank one; the last repeats the first."""
    rows = [{"prompt": f"item {n}", "response": "AB"[n % 2] * 3} for n in range(24)]
    lines = [json.dumps(row) for row in [*rows, rows[0]]]
    file = tmp_path / "sort.jsonl"
    file.write_text("\n".join([*lines[:5], "", *lines[5:]]) + "\n")
    return file


@pytest.fixture
def start(base: Path, demonstrations: Path) -> "Callable[..., subprocess.Popen[str]]":
    def run(
        *arguments: str, environment: Mapping[str, str] | None = None, **settings: object
    ) -> "subprocess.Popen[str]":
        command = [sys.executable, "-m", "cli", *arguments]
        if "--demonstrations" not in arguments:
            command += ["--demonstrations", str(demonstrations)]
        for name, value in {**SETTINGS, **settings}.items():
            command += ["--set", f"{name}={value}"]
        return subprocess.Popen(
            [*command, "--base", str(base)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1", **(environment or {})},
        )

    return run


def finished(process: "subprocess.Popen[str]", status: int) -> tuple[str, str]:
    out, err = process.communicate(timeout=240)
    assert process.returncode == status, err
    return out, err


def lines(folder: Path, kind: str) -> list[dict[str, Any]]:
    file = folder / "metrics.jsonl"
    if not file.exists():
        return []
    found = [json.loads(line) for line in file.read_text().split("\n")[:-1]]
    return [line for line in found if line["type"] == kind]


def until_it_steps(process: "subprocess.Popen[str]", folder: Path, step: int) -> None:
    deadline = time.monotonic() + 200
    while len(lines(folder, "step")) < step:
        assert process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)


def test_interrupted_and_resumed_it_ends_where_it_would_have_ended(
    start: "Callable[..., subprocess.Popen[str]]", tmp_path: Path
) -> None:
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    out, _ = finished(start("train", "--out", str(whole), "--json"), 0)
    record = json.loads(out)
    assert (record["status"], record["steps"], record["train"] + record["holdout"]) == ("done", STEPS, 24)
    expected = ["adapter_config.json", "adapter_model.safetensors", "metrics.jsonl", "training.json"]
    assert sorted(path.name for path in whole.iterdir()) == expected
    saved = json.loads((whole / "training.json").read_text())
    assert {"status": "done", **saved} == record
    assert saved["metrics"]["step"] == STEPS
    (repeated,) = [f for f in saved["preflight"]["findings"] if f["code"] == "duplicate"]
    assert [(place["line"], place["like"]) for place in repeated["places"]] == [(26, 1)]

    standing = failpoint_value(tmp_path / "marker")
    process = start("train", "--out", str(cut), environment={failpoint.VARIABLE: standing})
    trainer = await_standing(process.pid)
    process.send_signal(signal.SIGINT)
    go_on_once_asked(trainer)
    _, err = finished(process, 75)
    reached = lines(cut, "checkpoint")[-1]["step"]
    assert 1 <= reached < STEPS
    assert f"goes on from the checkpoint of step {reached}" in err
    assert not (cut / "training.json").exists()

    _, err = finished(start("train", "--out", str(cut), learning_rate=0.1), 1)
    assert "holds an unfinished training with learning_rate 0.005" in err

    out, err = finished(start("train", "--out", str(cut)), 0)
    assert f"Going on from the checkpoint of step {reached}" in err
    assert f"{STEPS} in" in out
    assert [line["step"] for line in lines(cut, "step")] == list(range(1, STEPS + 1))
    assert sorted(path.name for path in cut.iterdir()) == expected
    ours = load_file(cut / "adapter_model.safetensors")
    theirs = load_file(whole / "adapter_model.safetensors")
    assert all(torch.equal(tensor, theirs[name]) for name, tensor in ours.items())
    assert any(tensor.abs().max() > 0 for name, tensor in theirs.items() if "lora_B" in name)

    _, err = finished(start("train", "--out", str(cut)), 0)
    assert "holds this very training, done" in err
    _, err = finished(start("train", "--out", str(cut), learning_rate=0.1), 1)
    assert "holds a finished training with learning_rate 0.005" in err


def test_its_trainer_dies_with_it_and_the_next_run_goes_on(
    start: "Callable[..., subprocess.Popen[str]]", tmp_path: Path
) -> None:
    process = start("train", "--out", str(tmp_path / "out"), checkpoint_every=1, max_steps=2000)
    until_it_steps(process, tmp_path / "out", 2)
    (trainer,) = psutil.Process(process.pid).children()
    process.kill()
    process.wait()
    assert psutil.wait_procs([trainer], timeout=60)[1] == []
    process.communicate()
    second = start("train", "--out", str(tmp_path / "out"), checkpoint_every=1, max_steps=2000)
    until_it_steps(second, tmp_path / "out", len(lines(tmp_path / "out", "step")) + 1)
    second.send_signal(signal.SIGTERM)
    finished(second, 75)
    steps = [line["step"] for line in lines(tmp_path / "out", "step")]
    assert steps == list(range(1, len(steps) + 1))


def test_preflight_measures_and_trains_nothing(
    start: "Callable[..., subprocess.Popen[str]]", tmp_path: Path
) -> None:
    before = sorted(tmp_path.iterdir())
    out, _ = finished(start("preflight", "--json"), 0)
    reply = json.loads(out)
    assert (reply["status"], reply["refused"]) == ("passed", None)
    report = reply["preflight"]
    assert report["steps"] == STEPS
    assert report["items"] > 0
    assert report["gap_low"] <= report["gap"] <= report["gap_high"]
    cost = report["cost"]
    parts = [cost["rollout_seconds"], cost["teacher_seconds"], cost["student_seconds"]]
    assert min(parts) > 0
    assert cost["seconds"] == pytest.approx(sum(parts))
    assert cost["parameter_bytes"] < cost["peak_bytes"]
    assert sorted(tmp_path.iterdir()) == before


def test_what_is_refused_is_named_by_its_lines(
    start: "Callable[..., subprocess.Popen[str]]", tmp_path: Path
) -> None:
    file = tmp_path / "bad.jsonl"
    rows = [{"prompt": f"p{n}", "response": "A</s>" if n in (1, 3) else "A"} for n in range(6)]
    rows.append({"prompt": "long " * 200, "response": "A"})
    file.write_text("\n".join(json.dumps(row) for row in rows))
    given = ("--demonstrations", str(file), "--holdout-fraction", "0")
    out, _ = finished(start("preflight", *given), 2)
    assert "error: 2 demonstrations contain control tokens" in out
    assert "line 2: “p1” has </s> in the response" in out
    assert "line 4: “p3” has </s> in the response" in out
    assert "line 7: “long long" in out
    assert "It would be refused." in out

    out, err = finished(start("train", *given, "--out", str(tmp_path / "out"), "--json"), 2)
    assert "line 4: “p3” has </s> in the response" in err
    refused = json.loads(out)["refused"]
    assert (refused["code"], refused["param"]) == ("teacher_prompt_too_long", "demonstrations")
    assert (
        "control tokens of the base model. line 2: “p1” has </s> in the response; line 4:"
        in refused["message"]
    )
    assert not (tmp_path / "out" / "training.json").exists()
