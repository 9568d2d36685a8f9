"""Files and fine-tuning jobs in the ledger, on both databases."""

import pytest
from sqlalchemy import func, select, update

from domain.errors import Conflict, CorruptArtifact, NotFound
from domain.update import Status
from registry import audit, demonstrations, events, files, fine_tuning, updates
from registry.files import PART_BYTES
from registry.tables import Assistant, Event, File, FilePart, FineTuningJob, Skill, Team, Update
from tests.unit.registry.steps import TEAM, Ledger, lines


def keep(ledger: Ledger, content: bytes, filename: str = "cases.jsonl") -> File:
    with ledger.begin() as session:
        return files.create_file(
            session, team_id=TEAM, filename=filename, purpose="fine-tune", content=content, actor="user"
        )


def job_of(ledger: Ledger, update: Update, **labels: str) -> FineTuningJob:
    training = keep(ledger, b"{}")
    with ledger.begin() as session:
        return fine_tuning.create_job(
            session,
            update,
            training_file=training,
            validation_file=None,
            suffix=None,
            labels=labels,
            actor="user",
        )


def queued(ledger: Ledger) -> tuple[Assistant, Skill, Update]:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    ledger.teach(assistant, skill, lines(0, 3))
    return assistant, skill, ledger.queue(assistant)


@pytest.mark.parametrize("size", [0, 1, PART_BYTES, PART_BYTES + 1, 3 * PART_BYTES - 1])
def test_a_file_comes_back_byte_for_byte(ledger: Ledger, size: int) -> None:
    content = bytes(n % 251 for n in range(size))
    kept = keep(ledger, content)
    with ledger.begin() as session:
        file = files.get_file(session, TEAM, kept.id)
        assert file.size == size
        assert files.content(session, file) == content
        parts = -(-size // PART_BYTES)
        assert session.scalar(select(func.count()).select_from(FilePart)) == parts
        assert b"".join(files.part(session, file, number) for number in range(parts)) == content
        assert list(files.damaged(session)) == []


def test_a_changed_byte_is_found(ledger: Ledger) -> None:
    good, bad = keep(ledger, b"good"), keep(ledger, b"bad!")
    with ledger.begin() as session:
        session.execute(update(FilePart).where(FilePart.file_id == bad.id).values(content=b"bad?"))
    with ledger.begin() as session:
        with pytest.raises(CorruptArtifact, match=bad.id):
            files.content(session, files.get_file(session, TEAM, bad.id))
        assert files.content(session, files.get_file(session, TEAM, good.id)) == b"good"
        assert [file.id for file in files.damaged(session)] == [bad.id]


def test_a_file_that_was_not_committed_is_not_there(ledger: Ledger) -> None:
    with ledger.sessions() as session:
        files.create_file(
            session, team_id=TEAM, filename="a", purpose="fine-tune", content=b"x" * 10, actor="user"
        )
        session.rollback()
    with ledger.begin() as session:
        assert session.scalar(select(func.count()).select_from(FilePart)) == 0
        assert files.list_files(session, TEAM, None, 10).rows == []


def test_a_deleted_file_leaves_only_its_audit_entries(ledger: Ledger) -> None:
    kept = keep(ledger, b"x")
    with ledger.begin() as session:
        files.delete_file(session, kept, actor="user")
    with ledger.begin() as session:
        assert session.scalar(select(func.count()).select_from(FilePart)) == 0
        with pytest.raises(NotFound):
            files.get_file(session, TEAM, kept.id)
        with pytest.raises(NotFound):
            files.part(session, kept, 0)
        actions = [row.action for row in audit.list_audit(session, TEAM, None, 100).rows]
    assert actions == ["file.create", "file.delete"]
    with ledger.begin() as session, pytest.raises(NotFound):
        files.delete_file(session, kept, actor="user")


def test_another_teams_file_and_job_are_not_found(ledger: Ledger) -> None:
    _, _, update = queued(ledger)
    job = job_of(ledger, update)
    with ledger.begin() as session:
        session.add(Team(id="team_other", name="other", created_at=0))
        with pytest.raises(NotFound):
            files.get_file(session, "team_other", job.training_file)
        with pytest.raises(NotFound):
            fine_tuning.get_job(session, "team_other", job.id)
        assert files.list_files(session, "team_other", None, 10).rows == []
        assert fine_tuning.list_jobs(session, "team_other", None, 10).rows == []


def test_jobs_are_found_by_their_labels(ledger: Ledger) -> None:
    assistant, skill, first = queued(ledger)
    ledger.teach(assistant, skill, lines(3, 6))
    second = ledger.queue(assistant)
    odd = {
        "a.b": "dot",
        "a'b": "quote",
        "$[0]": "path",
        'a"b': "quotes",
        "": "empty",
        "a\\b": "backslash",
        "é 1": "é",
    }
    one = job_of(ledger, first, team="red", run="1", **odd)
    two = job_of(ledger, second, team="red", run="2")
    with ledger.begin() as session:

        def found(**labels: str) -> list[str]:
            return [job.id for job in fine_tuning.list_jobs(session, TEAM, None, 10, labels).rows]

        assert found() == [two.id, one.id]
        assert found(team="red") == [two.id, one.id]
        assert found(team="red", run="1") == [one.id]
        assert found(other="x") == []
        for key, value in odd.items():
            assert found(**{key: value}) == [one.id], key
            assert found(**{key: "x"}) == [], key


def test_progress_counts_all_tokens_and_takes_the_newest_estimate(ledger: Ledger) -> None:
    _, _, update = queued(ledger)
    claim = ledger.must_claim(update)
    with ledger.begin() as session:
        assert fine_tuning.progress_of(session, [update.id]) == {}
        for tokens, eta in ((10, 9.0), (32, 4.0)):
            data = {"tokens": tokens, "eta_seconds": eta}
            events.add_event(session, update.id, type="metrics", message="", data=data, claim=claim)
    with ledger.begin() as session:
        last = session.scalars(select(Event).order_by(Event.id.desc())).first()
        assert last is not None
        progress = fine_tuning.progress_of(session, [update.id, "upd_none"])
        assert list(progress) == [update.id]
        assert progress[update.id].tokens == 42
        assert progress[update.id].finish_at == pytest.approx(last.created_at + 4.0)


@pytest.mark.parametrize("status", [Status.FAILED, Status.CANCELLED])
def test_an_update_that_did_not_succeed_leaves_no_metrics(ledger: Ledger, status: Status) -> None:
    _, _, update = queued(ledger)
    job = job_of(ledger, update)
    ledger.finish(ledger.must_claim(update), status)
    with ledger.begin() as session:
        assert fine_tuning.get_job(session, TEAM, job.id).result_file is None


def test_an_update_without_a_job_leaves_no_file(ledger: Ledger) -> None:
    _, _, update = queued(ledger)
    ledger.finish(ledger.must_claim(update))
    with ledger.begin() as session:
        assert files.list_files(session, TEAM, None, 10).rows == []


def test_newest_events_go_backwards(ledger: Ledger) -> None:
    _, _, update = queued(ledger)
    with ledger.begin() as session:
        updates.request_pause(session, update, "user")
        updates.resume(session, update, "user")
    with ledger.begin() as session:
        assert [event.seq for event in events.newest_events(session, update, None, 2)] == [3, 2]
        assert [event.seq for event in events.newest_events(session, update, 2, 2)] == [1]


def test_a_split_that_is_given_holds_for_all(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant, holdout_fraction=0.5)
    with ledger.begin() as session:
        for split, start in (("train", 0), ("holdout", 20)):
            result = demonstrations.accept_batch(
                session,
                assistant,
                skill,
                lines(start, start + 20),
                actor="user",
                split=split,  # type: ignore[arg-type]
            )
            assert (result.train, result.holdout) == ((20, 0) if split == "train" else (0, 20))


def test_a_prompt_stays_on_its_side(ledger: Ledger) -> None:
    """Another response to a prompt that is trained on may not be measured."""
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    ledger.teach(assistant, skill, lines(0, 3))
    with ledger.begin() as session, pytest.raises(Conflict, match="prompt 2") as refused:
        demonstrations.accept_batch(
            session, assistant, skill, lines(2, 5, response="other"), actor="user", split="holdout"
        )
    assert refused.value.code == "prompt_on_other_side"
    with ledger.begin() as session:
        again = demonstrations.accept_batch(
            session, assistant, skill, lines(2, 5), actor="user", split="train"
        )
        assert (again.accepted, again.duplicates) == (2, 1)
