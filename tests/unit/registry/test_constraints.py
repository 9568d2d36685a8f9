"""The database itself refuses what would break an invariant, whoever writes: raw SQL, on both databases."""

from dataclasses import dataclass

import pytest
from sqlalchemy import text
from sqlalchemy.exc import IntegrityError

from domain.update import Status
from registry import assistants
from registry.tables import Assistant, Base, Skill, Version
from tests.unit.registry.steps import TEAM, Ledger, lines

OTHER_TEAM = "team_other"


@dataclass(frozen=True)
class Line:
    """An assistant with a taught version v1, a queued update, and a batch that waits."""

    assistant: Assistant
    skill: Skill
    version: Version
    queued: str


def line(ledger: Ledger, assistant: Assistant) -> Line:
    skill = ledger.skill(assistant)
    version = ledger.learn(assistant, skill, lines(0, 2))
    ledger.teach(assistant, skill, lines(2, 4))
    queued = ledger.queue(assistant).id
    ledger.teach(assistant, skill, lines(4, 5))
    return Line(assistant, skill, version, queued)


@pytest.fixture
def names(ledger: Ledger) -> dict[str, str]:
    """Ids for the statements below: `one` and `two` share a team, `far` is another's."""
    with ledger.begin() as session:
        session.execute(text(f"INSERT INTO teams (id, name, created_at) VALUES ('{OTHER_TEAM}', 'o', 0)"))
        far = assistants.create_assistant(
            session,
            team_id=OTHER_TEAM,
            name="far",
            base_model="tiny",
            parameter_count=1,
            context_window=1,
            actor="user",
        )
    found = {"team": TEAM, "other_team": OTHER_TEAM}
    for name, assistant in {
        "one": ledger.assistant("one"),
        "two": ledger.assistant("two"),
        "far": far,
    }.items():
        made = line(ledger, assistant)
        found |= {
            name: assistant.id,
            f"{name}_skill": made.skill.id,
            f"{name}_v1": made.version.id,
            f"{name}_v1_update": str(made.version.update_id),
            f"{name}_queued": made.queued,
        }
    return found


VERSION = (
    "INSERT INTO versions (id, team_id, assistant_id, number, kind, parent_id, update_id, served_name, "
    "created_at) VALUES ('ver_x', "
)
ALIAS = "INSERT INTO aliases (team_id, assistant_id, name, version_id, revision, updated_at) VALUES "
MOVE = (
    "INSERT INTO alias_moves (id, team_id, assistant_id, alias, from_version_id, to_version_id, revision, "
    "kind, reason, actor, update_id, created_at) VALUES ('move_x', '{team}', '{one}', "
)
DEMONSTRATION = (
    "INSERT INTO demonstrations (id, team_id, assistant_id, skill_id, batch_id, split, content_hash, body, "
    "created_at) SELECT 'demo_x', {0}, batch_id, {1}, '{{{{}}}}', 0 FROM demonstrations "
    "WHERE skill_id = '{{one_skill}}' LIMIT 1"
)
TAUGHT = (
    "INSERT INTO update_demonstrations (update_id, demonstration_id, team_id, assistant_id) "
    "SELECT '{0}', id, '{1}', '{2}' FROM demonstrations WHERE skill_id = '{3}' ORDER BY seq DESC LIMIT 1"
)
REFUSED = {
    "two running updates of an assistant": (
        "UPDATE updates SET status = 'running' WHERE id IN ('{one_queued}', '{one_v1_update}')"
    ),
    "an unknown status": "UPDATE updates SET status = 'lost' WHERE id = '{one_queued}'",
    "an update of another team's assistant": (
        "UPDATE updates SET team_id = '{other_team}' WHERE id = '{one_queued}'"
    ),
    "an update whose parent is another assistant's": (
        "UPDATE updates SET parent_version_id = '{two_v1}' WHERE id = '{one_queued}'"
    ),
    "an update that made another assistant's version": (
        "UPDATE updates SET version_id = '{two_v1}' WHERE id = '{one_queued}'"
    ),
    "a version number twice": VERSION + "'{team}', '{one}', 1, 'adapter', NULL, NULL, 's', 0)",
    "an unknown kind of version": VERSION + "'{team}', '{one}', 9, 'merged', NULL, NULL, 's', 0)",
    "a version of another team's assistant": (
        VERSION + "'{other_team}', '{one}', 9, 'adapter', NULL, NULL, 's', 0)"
    ),
    "a version whose parent is another assistant's": (
        VERSION + "'{team}', '{one}', 9, 'adapter', '{two_v1}', NULL, 's', 0)"
    ),
    "a version of another assistant's update": (
        VERSION + "'{team}', '{one}', 9, 'adapter', NULL, '{two_queued}', 's', 0)"
    ),
    "two versions of an update": (
        VERSION + "'{team}', '{one}', 9, 'adapter', NULL, '{one_v1_update}', 's', 0)"
    ),
    "an alias to no version": ALIAS + "('{team}', '{one}', 'canary', 'ver_none', 1, 0)",
    "an alias to another assistant's version": ALIAS + "('{team}', '{one}', 'canary', '{two_v1}', 1, 0)",
    "an alias to another team's version": ALIAS + "('{team}', '{one}', 'canary', '{far_v1}', 1, 0)",
    "an alias under another team": ALIAS + "('{other_team}', '{one}', 'canary', '{one_v1}', 1, 0)",
    "an alias twice": ALIAS + "('{team}', '{one}', 'champion', '{one_v1}', 9, 0)",
    "a moved alias to another assistant's version": (
        "UPDATE aliases SET version_id = '{two_v1}' WHERE assistant_id = '{one}'"
    ),
    "an aliased version deleted": "DELETE FROM versions WHERE id = '{one_v1}'",
    "a move's revision twice": MOVE + "'champion', NULL, '{one_v1}', 1, 'promote', '', 'u', NULL, 0)",
    "a move to another assistant's version": (
        MOVE + "'canary', NULL, '{two_v1}', 1, 'promote', '', 'u', NULL, 0)"
    ),
    "a move from another assistant's version": (
        MOVE + "'canary', '{two_v1}', '{one_v1}', 1, 'promote', '', 'u', NULL, 0)"
    ),
    "a move by another assistant's update": (
        MOVE + "'canary', NULL, '{one_v1}', 1, 'promote', '', 'u', '{two_queued}', 0)"
    ),
    "the same demonstration twice in a skill": DEMONSTRATION.format(
        "team_id, assistant_id, skill_id", "split, content_hash"
    ),
    "a demonstration under another assistant": DEMONSTRATION.format(
        "team_id, '{two}', skill_id", "split, 'new'"
    ),
    "a demonstration under another team": DEMONSTRATION.format(
        "'{other_team}', assistant_id, skill_id", "split, 'new'"
    ),
    "a demonstration in another skill's batch": DEMONSTRATION.format(
        "team_id, '{two}', '{two_skill}'", "split, 'new'"
    ),
    "an unknown split": DEMONSTRATION.format("team_id, assistant_id, skill_id", "'both', 'new'"),
    "an update that teaches another assistant's demonstration": (
        TAUGHT.format("{one_queued}", "{team}", "{one}", "{two_skill}")
    ),
    "an update that teaches another team's demonstration": (
        TAUGHT.format("{one_queued}", "{other_team}", "{far}", "{far_skill}")
    ),
    "a skill under another team": "UPDATE skills SET team_id = '{other_team}' WHERE id = '{one_skill}'",
    "an event under another team": (
        "UPDATE events SET team_id = '{other_team}' WHERE update_id = '{one_queued}'"
    ),
    "an event's number twice": (
        "INSERT INTO events (team_id, update_id, seq, type, level, message, data, created_at) "
        "VALUES ('{team}', '{one_queued}', 1, 'message', 'info', '', '{{}}', 0)"
    ),
    "a measurement of another assistant's version": (
        "INSERT INTO measurements (id, team_id, assistant_id, version_id, kind, suite, score, n, low, high, "
        "updated_at) VALUES ('meas_x', '{team}', '{one}', '{two_v1}', 'skill', 's', 1, 1, 0, 1, 0)"
    ),
    "a serving state of another assistant's version": (
        "INSERT INTO serving_states (team_id, assistant_id, alias, version_id, updated_at) "
        "VALUES ('{team}', '{one}', 'champion', '{two_v1}', 0)"
    ),
    "an audit entry of no team": (
        "INSERT INTO audit_logs (id, team_id, actor, action, object_id, data, created_at) "
        "VALUES ('audit_x', 'team_none', 'u', 'a.b', 'o', '{{}}', 0)"
    ),
    "a key of no team": (
        "INSERT INTO idempotency_keys (team_id, key, request_hash, created_at) "
        "VALUES ('team_none', 'k', 'h', 0)"
    ),
    "a delivery to another team's webhook": (
        "INSERT INTO webhook_deliveries (id, team_id, webhook_id, type, body, attempts, created_at) "
        "SELECT 'msg_x', '{other_team}', id, 't', '', 0, 0 FROM webhooks"
    ),
}


def test_the_invariants_hold_against_raw_sql(ledger: Ledger, names: dict[str, str]) -> None:
    with ledger.begin() as session:
        session.execute(
            text(
                "INSERT INTO webhooks (id, team_id, url, description, event_types, secret, created_at) "
                f"VALUES ('hook_x', '{TEAM}', 'https://a', '', '[]', 's', 0)"
            )
        )
    accepted = []
    for what, statement in REFUSED.items():
        try:
            with ledger.begin() as session:
                # A colon would be read as a parameter.
                session.connection().exec_driver_sql(statement.format(**names))
        except IntegrityError:
            continue
        accepted.append(what)
    assert accepted == []


def test_what_is_refused_is_nearly_right(ledger: Ledger, names: dict[str, str]) -> None:
    """The same statements with matching owners pass: they are refused for their owners and nothing else."""
    fine = [
        VERSION + "'{team}', '{one}', 9, 'adapter', '{one_v1}', '{one_queued}', 's', 0)",
        ALIAS + "('{team}', '{one}', 'canary', '{one_v1}', 1, 0)",
        MOVE + "'canary', '{one_v1}', '{one_v1}', 1, 'promote', '', 'u', '{one_queued}', 0)",
        DEMONSTRATION.format("team_id, assistant_id, skill_id", "split, 'new'"),
        TAUGHT.format("{one_queued}", "{team}", "{one}", "{one_skill}"),
    ]
    with ledger.begin() as session:
        for statement in fine:
            session.connection().exec_driver_sql(statement.format(**names))


def test_every_reference_carries_the_team() -> None:
    without = [
        f"{table.name}.{'+'.join(key.column_keys)}"
        for table in Base.metadata.tables.values()
        for key in table.foreign_key_constraints
        if "team_id" not in key.column_keys
    ]
    assert without == []


def test_one_running_update_is_the_most(ledger: Ledger) -> None:
    """The claim of a second worker loses against the index, not only against the verb's own check."""
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    updates = []
    for number in range(2):
        ledger.teach(assistant, skill, lines(number, number + 1))
        updates.append(ledger.queue(assistant))
    assert ledger.claim(updates[0].id) is not None
    with pytest.raises(IntegrityError), ledger.begin() as session:
        session.execute(text(f"UPDATE updates SET status = '{Status.RUNNING}' WHERE id = '{updates[1].id}'"))
