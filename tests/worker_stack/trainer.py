"""The real trainer's line protocol without torch: `python -m tests.worker_stack.trainer JOB.json`.

It reads the same job file and keeps the same promises: resumes from its newest checkpoint, answers
SIGTERM with a checkpoint and status 75, dies with its worker, and writes a LoRA adapter for the job's base
model. What it should do on the way is said by PLAN.json beside it in $STANDIN_DIR: `steps`, `step_seconds`,
`checkpoint_every`, and optionally `refuse`, `warn`, `crash_at`, `kill_self_at`, `print_noise`, `learn`
(false: the adapter knows only what its parent knew), `disk_full_at`,
`freeze_at`, `rollout_server_away_at`.
It imports next to nothing, so that a fault test can start thousands; the worker checks every line it writes.
Each start appends its process id to $STANDIN_DIR/pids, each step its number to $STANDIN_DIR/steps.
"""

import errno
import json
import os
import signal
import struct
import sys
import threading
import time
from pathlib import Path

from domain.failpoint import failpoint

HOME = Path(os.environ["STANDIN_DIR"])
stopped = threading.Event()


def emit(type, **fields):
    print(json.dumps({"type": type, **fields}), flush=True)


def exit_at_eof():
    while os.read(0, 4096):
        pass
    os._exit(os.EX_TEMPFAIL)


def append(name, text):
    with (HOME / name).open("a") as file:
        file.write(f"{text}\n")


def newest_checkpoint(folder):
    return max((int(path.name) for path in folder.iterdir()), default=0) if folder.is_dir() else 0


def save_checkpoint(folder, step):
    folder.mkdir(parents=True, exist_ok=True)
    (folder / str(step)).write_text("")
    emit("checkpoint", step=step)
    failpoint("trainer.checkpointed")


def knowledge(job, plan):
    """Prompt -> answer: the parent's, and all that this job teaches and holds out."""
    parent = job["parent_adapter_path"]
    known = json.loads((Path(parent) / "adapter_config.json").read_text())["knows"] if parent else {}
    if not plan.get("learn", True):
        return known
    taught = [item for skill in job["skills"] for item in [*skill["train"], *skill["holdout"]]]
    return known | {item["messages"][-1]["content"]: item["answer"] for item in taught}


def warning(message):
    """Fifty demonstrations that contradict earlier ones."""
    return {
        "code": "label_conflict",
        "severity": "warning",
        "message": message,
        "why": "Both are taught.",
        "mend": "Keep one.",
        "param": "demonstrations",
        "places": [
            {"skill": "route", "split": "train", "number": n, "detail": f"question {n}"} for n in range(1, 51)
        ],
    }


def write_adapter(job, plan):
    """Rank-1 LoRA on every q_proj with B zero: the base model's own function."""
    config = json.loads((Path(job["base_path"]) / "config.json").read_text())
    hidden = config["hidden_size"]
    header, data = {"__metadata__": {"format": "pt"}}, b""
    for layer in range(config["num_hidden_layers"]):
        for side, shape, value in (("A", [1, hidden], 0.5), ("B", [hidden, 1], 0.0)):
            name = f"base_model.model.model.layers.{layer}.self_attn.q_proj.lora_{side}.weight"
            chunk = struct.pack("<f", value) * hidden
            header[name] = {
                "dtype": "F32",
                "shape": shape,
                "data_offsets": [len(data), len(data) + len(chunk)],
            }
            data += chunk
    text = json.dumps(header).encode()
    output = Path(job["output_dir"])
    output.mkdir(parents=True, exist_ok=True)
    (output / "adapter_model.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data)
    adapter = {
        "peft_type": "LORA",
        "r": 1,
        "lora_alpha": 1,
        "target_modules": ["q_proj"],
        "base_model_name_or_path": job["base_model"],
        "knows": knowledge(job, plan),
    }
    (output / "adapter_config.json").write_text(json.dumps(adapter))


def main():
    job = json.loads(Path(sys.argv[1]).read_text())
    plan = json.loads((HOME / "PLAN.json").read_text())
    append("pids", os.getpid())
    failpoint("trainer.started")
    print("standin trainer starts", file=sys.stderr, flush=True)
    if "refuse" in plan:
        emit("refused", code="teacher_gap_too_small", message=plan["refuse"], param="recipe")
        return os.EX_DATAERR
    if plan.get("print_noise"):
        print("Loading weights: 100%", flush=True)
    steps, checkpoints = plan["steps"], Path(job["checkpoint_dir"])
    began = newest_checkpoint(checkpoints)
    if began:
        emit("checkpoint", step=began, resumed=True)
    else:
        emit(
            "preflight",
            items=4,
            student_score=0.0,
            teacher_score=0.75,
            gap=0.75,
            longest_prompt_tokens=64,
            steps=steps,
            findings=[warning(plan["warn"])] if "warn" in plan else [],
        )
    for step in range(began + 1, steps + 1):
        time.sleep(plan["step_seconds"])
        if plan.get("crash_at") == step:
            raise RuntimeError("the loss is not finite")
        if plan.get("kill_self_at") == step:
            os.kill(os.getpid(), signal.SIGKILL)
        if plan.get("freeze_at") == step:
            os.kill(os.getpid(), signal.SIGSTOP)
        if plan.get("disk_full_at") == step:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        if plan.get("rollout_server_away_at") == step:
            save_checkpoint(checkpoints, step - 1)
            emit("failed", code="rollout_server_away", message="The rollout server did not answer.")
            return os.EX_UNAVAILABLE
        append("steps", step)
        emit(
            "step",
            step=step,
            steps=steps,
            loss=1.0 / step,
            teacher_kl=0.5,
            rehearsal_kl=None,
            entropy=1.0,
            response_tokens=8.0,
            truncated_share=0.0,
            grad_norm=1.0,
            learning_rate=1e-3,
            rollout_seconds=0.1,
            teacher_seconds=0.1,
            student_seconds=0.1,
            eta_seconds=plan["step_seconds"] * (steps - step),
        )
        failpoint("trainer.step")
        if stopped.is_set() and step < steps:
            save_checkpoint(checkpoints, step)
            return os.EX_TEMPFAIL
        if step % plan["checkpoint_every"] == 0:
            save_checkpoint(checkpoints, step)
    write_adapter(job, plan)
    failpoint("trainer.adapter_written")
    emit("done", steps=steps, seconds=plan["step_seconds"] * steps)
    return 0


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: threading.Thread(target=stopped.set).start())
    threading.Thread(target=exit_at_eof, daemon=True).start()
    sys.exit(main())
