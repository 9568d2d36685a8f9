"""The unmodified openai client's files and fine-tuning resources against the API over real HTTP."""

import asyncio
import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai.types.fine_tuning import FineTuningJob

from api.app import create_app
from api.context import TEAM_ID, Context
from domain.settings import Settings
from domain.training import StepLine
from domain.update import Phase, Status
from registry import events, updates
from registry.claims import Claim
from tests.integration.http.server import served


@pytest.fixture
def home(settings: Settings, base_folder: Path) -> Iterator[tuple[str, Context]]:
    """(url of the API, its context): the assistant `support` and no engine."""
    app = create_app(settings)
    with served(app) as url:
        made = httpx.post(
            f"{url}/v1/assistants", json={"name": "support", "base_model": str(base_folder)}, timeout=30
        )
        assert made.status_code == 201, made.text
        yield url, app.state.context


@pytest.fixture
def client(home: tuple[str, Context]) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=f"{home[0]}/v1", api_key="unused", max_retries=0) as one:
        yield one


def chats(count: int, start: int = 0) -> bytes:
    lines = [
        {
            "messages": [
                {"role": "user", "content": f"case {number}"},
                {"role": "assistant", "content": f"ROUTE {number}"},
            ]
        }
        for number in range(start, start + count)
    ]
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def upload(client: openai.OpenAI, content: bytes, name: str = "Cases 2026.jsonl") -> str:
    return client.files.create(file=(name, content), purpose="fine-tune").id


def native(home: tuple[str, Context], path: str) -> Any:
    reply = httpx.get(f"{home[0]}{path}", timeout=30)
    assert reply.status_code == 200, reply.text
    return reply.json()


def work(home: tuple[str, Context], update_id: str, steps: list[StepLine]) -> Claim:
    """Claim the update as a worker does and report the steps."""
    with home[1].sessions.begin() as session:
        claim = updates.claim(session, update_id, worker="test", lease_seconds=60)
        assert claim is not None
        updates.set_phase(session, claim, Phase.TRAINING)
        for step in steps:
            events.add_event(
                session,
                update_id,
                type="metrics",
                message=f"step {step.step}",
                data=step.model_dump(mode="json"),
                claim=claim,
            )
    return claim


def step(number: int, loss: float, tokens: int = 100) -> StepLine:
    return StepLine(
        step=number,
        steps=2,
        loss=loss,
        teacher_kl=loss / 2,
        rehearsal_kl=None,
        entropy=1.0,
        response_tokens=4.0,
        truncated_share=0.0,
        tokens=tokens,
        grad_norm=0.5,
        learning_rate=1e-3,
        rollout_seconds=0.1,
        teacher_seconds=0.1,
        student_seconds=0.1,
        eta_seconds=30.0,
    )


def test_a_file_is_kept_byte_for_byte_until_it_is_deleted(client: openai.OpenAI, tmp_path: Path) -> None:
    path = tmp_path / "cases.jsonl"
    path.write_bytes(chats(20_000))
    assert path.stat().st_size > 2 << 20, "several parts"
    with path.open("rb") as opened:
        made = client.files.create(file=opened, purpose="fine-tune")
    assert (made.object, made.filename, made.purpose) == ("file", "cases.jsonl", "fine-tune")
    assert (made.bytes, made.status) == (path.stat().st_size, "processed")
    assert client.files.wait_for_processing(made.id, poll_interval=0.01).id == made.id
    assert client.files.content(made.id).read() == path.read_bytes()
    second = upload(client, chats(1))
    assert [file.id for file in client.files.list()] == [second, made.id]
    assert [file.id for file in client.files.list(order="asc", limit=1)] == [made.id, second]
    assert list(client.files.list(purpose="fine-tune-results")) == []
    gone = client.files.delete(made.id)
    assert (gone.id, gone.object, gone.deleted) == (made.id, "file", True)
    with pytest.raises(openai.NotFoundError, match=made.id):
        client.files.retrieve(made.id)
    with pytest.raises(openai.NotFoundError):
        client.files.content(made.id)
    with pytest.raises(openai.NotFoundError):
        client.files.delete(made.id)
    assert [file.id for file in client.files.list()] == [second]


def test_every_bad_line_of_a_file_is_named_and_nothing_is_kept(client: openai.OpenAI) -> None:
    good = chats(1).decode().strip()
    pair = {"input": {"messages": []}, "preferred_output": [], "non_preferred_output": []}
    lines = [good, "{", json.dumps(pair), "", good, '{"messages": [{"role": "user", "content": "a"}]}']
    with pytest.raises(openai.BadRequestError) as refused:
        upload(client, "\n".join(lines).encode())
    body: Any = refused.value.body
    assert [line["line"] for line in body["lines"]] == [2, 3, 6]
    assert "preference pair" in body["lines"][1]["message"]
    assert refused.value.param == "line 2"
    assert list(client.files.list()) == []


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"purpose": "batch"}, "purpose"),
        (
            {"purpose": "fine-tune", "expires_after": {"anchor": "created_at", "seconds": 3600}},
            "expires_after",
        ),
    ],
)
def test_what_files_cannot_do_is_refused(client: openai.OpenAI, fields: Any, param: str) -> None:
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("a.jsonl", chats(1)), **fields)
    assert str(refused.value.param).startswith(param)
    assert list(client.files.list()) == []


def test_an_upload_sent_again_with_its_key_is_one_file(client: openai.OpenAI) -> None:
    """The client separates the fields of each attempt with another boundary."""
    key = {"Idempotency-Key": "nightly"}
    first, again = (
        client.files.create(file=("a.jsonl", chats(3)), purpose="fine-tune", extra_headers=key)
        for _ in range(2)
    )
    assert again.id == first.id
    with pytest.raises(openai.BadRequestError) as refused:
        client.files.create(file=("a.jsonl", chats(4)), purpose="fine-tune", extra_headers=key)
    assert refused.value.code == "idempotency_mismatch"
    assert len(list(client.files.list())) == 1


def test_a_job_is_an_update_of_the_assistant(client: openai.OpenAI, home: tuple[str, Context]) -> None:
    training = upload(client, chats(30))
    job = client.fine_tuning.jobs.create(
        model="support",
        training_file=training,
        suffix="cases",
        seed=7,
        metadata={"ticket": "T-1", "grader": "contains"},
        method={  # type: ignore[typeddict-item]
            "type": "sdft",
            "sdft": {
                "hyperparameters": {
                    "n_epochs": 3,
                    "batch_size": 8,
                    "learning_rate_multiplier": 0.5,
                    "lora_rank": 4,
                }
            },
        },
    )
    assert isinstance(job, FineTuningJob)
    assert (job.object, job.status, job.model, job.training_file) == (
        "fine_tuning.job",
        "queued",
        "support",
        training,
    )
    assert (job.seed, job.metadata) == (7, {"ticket": "T-1", "grader": "contains"})
    assert (job.fine_tuned_model, job.finished_at, job.trained_tokens, job.error) == (None,) * 4
    assert job.result_files == []
    used = job.hyperparameters
    assert (used.n_epochs, used.batch_size, used.learning_rate_multiplier) == (3, 8, 0.5)
    method: Any = job.method
    assert method.type == "sdft"
    assert method.sdft["hyperparameters"]["lora_rank"] == 4

    [update] = native(home, "/v1/assistants/support/updates")["data"]
    extras: Any = job
    assert extras.update == update["id"]
    assert update["skills"] == ["cases"]
    recipe = update["recipe"]
    assert (recipe["method"], recipe["num_epochs"], recipe["batch_size"], recipe["seed"]) == ("sdft", 3, 8, 7)
    assert (recipe["lora_rank"], recipe["learning_rate"]) == (4, 0.00075)  # half of a small base's 1.5e-3
    skill = native(home, "/v1/assistants/support/skills/cases")
    assert skill["grader"]["type"] == "contains"
    assert sum(skill["demonstrations"].values()) == 30
    assert client.fine_tuning.jobs.retrieve(job.id) == job
    assert list(client.fine_tuning.jobs.list_events(job.id))[-1].message.startswith("Queued: ")
    client.files.delete(training)
    assert client.fine_tuning.jobs.retrieve(job.id).training_file == training


def test_all_weights_have_a_default_learning_rate_of_their_own(client: openai.OpenAI) -> None:
    job = client.fine_tuning.jobs.create(
        model="support",
        training_file=upload(client, chats(5)),
        method={  # type: ignore[typeddict-item]
            "type": "supervised",
            "supervised": {"hyperparameters": {"lora_rank": 0, "learning_rate_multiplier": 2}},
        },
    )
    assert job.hyperparameters.learning_rate_multiplier == 2
    extras: Any = job.method
    assert extras.type == "supervised"
    assert extras.supervised.hyperparameters.lora_rank == 0


def test_jobs_are_listed_newest_first_and_by_metadata(client: openai.OpenAI) -> None:
    ids = []
    for number in range(3):
        training = upload(client, chats(2, start=10 * number), f"part {number}.jsonl")
        made = client.fine_tuning.jobs.create(
            model="support", training_file=training, metadata={"number": str(number)}
        )
        ids.append(made.id)
    assert [job.id for job in client.fine_tuning.jobs.list(limit=2)] == ids[::-1]
    assert [job.id for job in client.fine_tuning.jobs.list(metadata={"number": "1"})] == [ids[1]]
    assert list(client.fine_tuning.jobs.list(metadata={"number": "9"})) == []


def test_pause_resume_and_cancel_are_the_updates(client: openai.OpenAI, home: tuple[str, Context]) -> None:
    jobs = client.fine_tuning.jobs
    made = jobs.create(model="support", training_file=upload(client, chats(5)))
    assert jobs.pause(made.id).status == "paused"  # type: ignore[comparison-overlap]
    assert jobs.resume(made.id).status == "queued"
    ended = jobs.cancel(made.id)
    assert ended.status == "cancelled"
    assert ended.finished_at is not None
    with pytest.raises(openai.BadRequestError, match="cancelled"):
        jobs.cancel(made.id)
    extras: Any = made
    assert native(home, f"/v1/updates/{extras.update}")["status"] == "cancelled"
    messages = [event.message for event in jobs.list_events(made.id)]
    assert messages[:3] == ["Cancel requested.", "Resumed.", "Pause requested."]


def test_a_job_that_succeeds_leaves_its_metrics(client: openai.OpenAI, home: tuple[str, Context]) -> None:
    jobs = client.fine_tuning.jobs
    made: Any = jobs.create(model="support", training_file=upload(client, chats(5)))
    claim = work(home, made.update, [step(1, 9.0), step(1, 2.0), step(2, 1.5, tokens=50)])
    running = jobs.retrieve(made.id)
    assert (running.status, running.trained_tokens) == ("running", None)
    newest = next(iter(jobs.list_events(made.id)))
    assert running.estimated_finish == pytest.approx(newest.created_at + 30, abs=1)
    assert (newest.type, newest.object) == ("metrics", "fine_tuning.job.event")
    data: Any = newest.data
    assert (data["step"], data["train_loss"], data["total_steps"]) == (2, 1.5, 2)
    with home[1].sessions.begin() as session:
        updates.finish(session, claim, Status.SUCCEEDED)
    ended = jobs.retrieve(made.id)
    assert (ended.status, ended.estimated_finish) == ("succeeded", None)
    assert ended.trained_tokens == 250  # the repeated step was trained on twice
    [result] = ended.result_files
    file = client.files.retrieve(result)
    assert (file.filename, file.purpose) == ("step_metrics.csv", "fine-tune-results")
    head, *rows = client.files.content(result).text.splitlines()
    assert head.split(",")[:3] == ["step", "train_loss", "teacher_kl"]
    assert [row.split(",")[:4] for row in rows] == [["1", "2.0", "1.0", ""], ["2", "1.5", "0.75", ""]]


def test_a_failed_job_says_why(client: openai.OpenAI, home: tuple[str, Context]) -> None:
    made: Any = client.fine_tuning.jobs.create(model="support", training_file=upload(client, chats(5)))
    claim = work(home, made.update, [])
    error = {"code": "teacher_gap", "message": "The teacher is no better.", "param": "recipe"}
    with home[1].sessions.begin() as session:
        updates.finish(session, claim, Status.FAILED, error=error)
    failed = client.fine_tuning.jobs.retrieve(made.id)
    assert failed.error is not None
    assert (failed.status, failed.error.code, failed.error.message) == (
        "failed",
        "teacher_gap",
        "The teacher is no better.",
    )
    assert (failed.fine_tuned_model, failed.result_files) == (None, [])
    newest = next(iter(client.fine_tuning.jobs.list_events(made.id)))
    assert (newest.level, newest.type) == ("error", "message")


def test_checkpoints_are_an_empty_list(client: openai.OpenAI) -> None:
    made = client.fine_tuning.jobs.create(model="support", training_file=upload(client, chats(5)))
    assert list(client.fine_tuning.jobs.checkpoints.list(made.id)) == []
    with pytest.raises(openai.NotFoundError):
        client.fine_tuning.jobs.checkpoints.list("ftjob_none")


def test_a_validation_file_is_what_is_measured(client: openai.OpenAI, home: tuple[str, Context]) -> None:
    job = client.fine_tuning.jobs.create(
        model="support",
        suffix="cases",
        training_file=upload(client, chats(20)),
        validation_file=upload(client, chats(6, start=100)),
    )
    assert job.validation_file is not None
    assert native(home, "/v1/assistants/support/skills/cases")["demonstrations"] == {
        "train": 20,
        "holdout": 6,
    }
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(
            model="support",
            suffix="other",
            training_file=upload(client, chats(20)),
            validation_file=upload(client, chats(3, start=18)),
        )
    body: Any = refused.value.body
    assert [line["line"] for line in body["lines"]] == [1, 2]
    assert refused.value.param == "validation_file"
    with pytest.raises(openai.BadRequestError) as clash:
        client.fine_tuning.jobs.create(
            model="support",
            suffix="cases",
            training_file=upload(client, chats(2, start=105)),
            validation_file=upload(client, chats(2, start=200)),
        )
    assert clash.value.code == "prompt_on_other_side"
    assert [row["name"] for row in native(home, "/v1/assistants/support/skills")["data"]] == ["cases"]


def test_a_base_model_with_a_suffix_becomes_an_assistant(
    client: openai.OpenAI, home: tuple[str, Context], base_folder: Path
) -> None:
    training = upload(client, chats(5))
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model=str(base_folder), training_file=training)
    assert (refused.value.param, refused.value.code) == ("suffix", "suffix_needed")
    job = client.fine_tuning.jobs.create(model=str(base_folder), training_file=training, suffix="triage")
    assert job.model == "triage"
    skills = [row["name"] for row in native(home, "/v1/assistants/triage/skills")["data"]]
    assert skills == ["cases-2026"]
    with pytest.raises(openai.BadRequestError, match="name it as 'model'") as taken:
        client.fine_tuning.jobs.create(model=str(base_folder), training_file=training, suffix="support")
    assert (taken.value.param, taken.value.code) == ("suffix", "already_exists")


@pytest.mark.parametrize(
    ("fields", "status", "param", "code"),
    [
        ({"model": "nobody"}, 404, "model", "model_not_found"),
        ({"model": "support@v9"}, 404, "model", "model_not_found"),
        ({"training_file": "file_none"}, 404, "training_file", "not_found"),
        (
            {"integrations": [{"type": "wandb", "wandb": {"project": "x"}}]},
            400,
            "integrations",
            "invalid_input",
        ),
        ({"suffix": "Not A Name"}, 400, "suffix", "invalid_input"),
        ({"method": {"type": "dpo"}}, 400, "method.type", "invalid_input"),
        (
            {"method": {"type": "supervised", "supervised": {"hyperparameters": {"n_epochs": -1}}}},
            400,
            "method.supervised.hyperparameters.num_epochs",
            "invalid_input",
        ),
        ({"hyperparameters": {"epochs": 1}}, 400, "hyperparameters.epochs", "invalid_input"),
        ({"hyperparameters": {"lora_rank": -1}}, 400, "hyperparameters.lora_rank", "invalid_input"),
        ({"metadata": {"grader": "taste"}}, 400, "metadata.grader", "invalid_input"),
        ({"metadata": {"skill": "a b"}}, 400, "metadata.skill", "invalid_input"),
    ],
)
def test_a_wrong_field_is_named_and_nothing_is_stored(
    client: openai.OpenAI, home: tuple[str, Context], fields: Any, status: int, param: str, code: str
) -> None:
    body: Any = {"model": "support", "training_file": upload(client, chats(2)), **fields}
    with pytest.raises(openai.APIStatusError) as refused:
        client.fine_tuning.jobs.create(**body)
    assert (refused.value.status_code, refused.value.param, refused.value.code) == (status, param, code)
    assert list(client.fine_tuning.jobs.list()) == []
    assert native(home, "/v1/assistants/support/skills")["data"] == []


def test_lines_that_no_window_holds_are_named(client: openai.OpenAI) -> None:
    long = {"messages": [{"role": "user", "content": "a " * 80}, {"role": "assistant", "content": "b"}]}
    training = upload(client, chats(1) + json.dumps(long).encode())
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model="support", training_file=training)
    body: Any = refused.value.body
    assert [line["line"] for line in body["lines"]] == [2]
    assert refused.value.param == "training_file"


def test_a_file_that_teaches_nothing_new_is_refused(client: openai.OpenAI) -> None:
    training = upload(client, chats(5))
    client.fine_tuning.jobs.create(model="support", training_file=training)
    with pytest.raises(openai.BadRequestError) as refused:
        client.fine_tuning.jobs.create(model="support", training_file=training)
    assert refused.value.code == "no_new_demonstrations"


def test_a_job_sent_again_with_its_key_is_one_job(client: openai.OpenAI) -> None:
    body: Any = {"model": "support", "training_file": upload(client, chats(5))}
    key = {"Idempotency-Key": "nightly"}
    first = client.fine_tuning.jobs.create(**body, extra_headers=key)
    assert client.fine_tuning.jobs.create(**body, extra_headers=key) == first
    assert len(list(client.fine_tuning.jobs.list())) == 1


def test_another_teams_files_and_jobs_are_not_there(
    client: openai.OpenAI, home: tuple[str, Context], monkeypatch: pytest.MonkeyPatch
) -> None:
    training = upload(client, chats(5))
    job = client.fine_tuning.jobs.create(model="support", training_file=training)
    assert TEAM_ID == "team_default"
    monkeypatch.setattr("api.context.TEAM_ID", "team_other")
    for read in (
        lambda: client.files.retrieve(training),
        lambda: client.files.content(training),
        lambda: client.files.delete(training),
        lambda: client.fine_tuning.jobs.retrieve(job.id),
        lambda: client.fine_tuning.jobs.cancel(job.id),
        lambda: client.fine_tuning.jobs.list_events(job.id),
    ):
        with pytest.raises(openai.NotFoundError):
            read()
    assert list(client.files.list()) == []
    assert list(client.fine_tuning.jobs.list()) == []


def test_the_async_client_does_the_same(home: tuple[str, Context]) -> None:
    async def story() -> tuple[str, list[str], bytes]:
        async with openai.AsyncOpenAI(base_url=f"{home[0]}/v1", api_key="x", max_retries=0) as one:
            file = await one.files.create(file=("a.jsonl", chats(5)), purpose="fine-tune")
            job = await one.fine_tuning.jobs.create(model="support", training_file=file.id)
            await one.fine_tuning.jobs.pause(job.id)
            await one.fine_tuning.jobs.resume(job.id)
            status = (await one.fine_tuning.jobs.cancel(job.id)).status
            messages = [event.message async for event in one.fine_tuning.jobs.list_events(job.id, limit=2)]
            content = (await one.files.content(file.id)).content
            assert [found.id async for found in one.fine_tuning.jobs.list()] == [job.id]
            await one.files.delete(file.id)
            return status, messages, content

    status, messages, content = asyncio.run(story())
    assert status == "cancelled"
    assert len(messages) == 4
    assert content == chats(5)
