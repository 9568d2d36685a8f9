"""A fine-tuning job from upload to version: the openai client, the API, Celery and its worker, each real."""

import json
import time
from collections.abc import Iterator

import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from api.app import create_app
from domain.settings import Settings
from tests.integration.http.server import served
from tests.worker_stack.stack import Stack, running_stack

pytestmark = pytest.mark.slow
STEPS = 4


@pytest.fixture
def stack() -> Iterator[Stack]:
    with running_stack() as made:
        made.plan(steps=STEPS)
        yield made


@pytest.fixture
def client(stack: Stack) -> Iterator[openai.OpenAI]:
    """On the stack's ledger and broker."""
    app = create_app(Settings(home=stack.home, cache_dir=stack.home / "cache", database_url=stack.url))
    with served(app) as url, openai.OpenAI(base_url=f"{url}/v1", api_key="x", max_retries=0) as one:
        yield one


def chats(count: int) -> bytes:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"route {number}?"},
                {"role": "assistant", "content": f"ROUTE: {number}"},
            ]
        }
        for number in range(count)
    ]
    return "\n".join(map(json.dumps, lines)).encode()


def ended(client: openai.OpenAI, job: str, seconds: float = 120.0) -> FineTuningJob:
    deadline = time.monotonic() + seconds
    while True:
        found = client.fine_tuning.jobs.retrieve(job)
        if found.status in ("succeeded", "failed", "cancelled"):
            return found
        assert time.monotonic() < deadline, found
        time.sleep(0.1)


def test_a_job_from_upload_to_version(stack: Stack, client: openai.OpenAI) -> None:
    stack.start_all()
    assistant = stack.assistant("helper")
    file = client.files.create(file=("route.jsonl", chats(80)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="helper", training_file=file.id)
    found = ended(client, job.id)
    assert (found.status, found.error) == ("succeeded", None)
    assert found.fine_tuned_model == "helper@v1"
    assert found.model_extra is not None
    assert found.model_extra["verdict"]["outcome"] == "pass"
    assert found.model_extra["skills"] == ["route"]
    assert stack.champion(assistant) == 1
    [result] = found.result_files
    rows = client.files.content(result).text.splitlines()[1:]
    assert [row.split(",")[:2] for row in rows] == [[str(n), str(1.0 / n)] for n in range(1, STEPS + 1)]
    events = list(client.fine_tuning.jobs.list_events(job.id, limit=5))
    assert len(events) == stack.events(found.model_extra["update"])[-1].seq
    assert events[0].message == "Succeeded."
    assert any(event.message.startswith("v1: pass.") for event in events)
    assert sum(event.type == "metrics" for event in events) == STEPS
    assert "helper@v1" in [model.id for model in client.models.list()]


def test_a_job_whose_version_is_blocked_has_succeeded_and_says_so(
    stack: Stack, client: openai.OpenAI
) -> None:
    stack.plan(steps=STEPS, learn=False)
    stack.start_all()
    assistant = stack.assistant("helper")
    file = client.files.create(file=("route.jsonl", chats(80)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="helper", training_file=file.id)
    found = ended(client, job.id)
    assert (found.status, found.fine_tuned_model) == ("succeeded", "helper@v1")
    assert found.model_extra is not None
    assert found.model_extra["verdict"]["outcome"] == "block"
    assert stack.champion(assistant) == 0
    warnings = [
        event.message for event in client.fine_tuning.jobs.list_events(job.id) if event.level == "warn"
    ]
    assert any(message.startswith("v1: block.") for message in warnings)


def test_a_refused_training_is_a_failed_job(stack: Stack, client: openai.OpenAI) -> None:
    stack.plan(steps=STEPS, refuse="The teacher is no better than the student.")
    stack.start_all()
    stack.assistant("helper")
    file = client.files.create(file=("route.jsonl", chats(20)), purpose="fine-tune")
    job = client.fine_tuning.jobs.create(model="helper", training_file=file.id)
    found = ended(client, job.id)
    assert found.status == "failed"
    assert found.error is not None
    assert (found.error.code, found.error.param) == ("teacher_gap_too_small", "recipe")
    assert (found.fine_tuned_model, found.result_files) == (None, [])
