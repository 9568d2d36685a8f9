import pytest
from sqlalchemy import func, select

from domain.errors import Conflict, CorruptArtifact, NotFound
from domain.measurement import ItemScore, Measurement, Verdict
from domain.recipe import Recipe
from domain.version import Manifest, ManifestFile
from registry import aliases, audit, events, measurements, versions
from registry.assistants import get_assistant
from registry.claims import Claim
from registry.tables import MeasurementRow, Update, Version
from tests.unit.registry.steps import PASS, TEAM, Ledger, lines

BLOCK = Verdict(outcome="block", reasons=["call fell by 0.4"])
HOLD = Verdict(outcome="hold", reasons=["too few items"])
MEASURED = Measurement(
    kind="skill",
    suite="route",
    score=0.5,
    n=2,
    low=0.1,
    high=0.9,
    items=[
        ItemScore(item="demo_1", prompt="p", output="r", expected="r", score=1),
        ItemScore(item="demo_2", prompt="q", output="x", expected="r", score=0),
    ],
)


@pytest.fixture
def claim(ledger: Ledger) -> Claim:
    assistant = ledger.assistant()
    ledger.teach(assistant, ledger.skill(assistant), lines(0, 2))
    return ledger.must_claim(ledger.queue(assistant))


def assistant_of(ledger: Ledger, claim: Claim):  # type: ignore[no-untyped-def]
    with ledger.begin() as session:
        return get_assistant(session, TEAM, claim.assistant_id)


def test_publishing_writes_everything_together(ledger: Ledger, claim: Claim) -> None:
    manifest = Manifest(
        kind="adapter",
        base_model="tiny",
        update_id=claim.update_id,
        files=[ManifestFile(path="adapter_model.safetensors", size=3, sha256="a" * 64)],
    )
    with ledger.begin() as session:
        version_id, number = versions.allocate_version(session, claim)
        assert (version_id, number) == versions.allocate_version(session, claim)
        versions.publish(
            session,
            claim,
            version_id=version_id,
            number=number,
            served_name="helper-v1-aaaa",
            manifest=manifest,
            manifest_sha256="b" * 64,
            recipe=Recipe(seed=7),
            verdict=PASS,
            measurements=[MEASURED],
            move_champion=True,
        )
    assistant = assistant_of(ledger, claim)
    with ledger.begin() as session:
        version = versions.get_version(session, assistant, "v1")
        base = versions.get_version(session, assistant, 0)
        assert (version.id, version.number, version.kind, version.parent_id) == (
            version_id,
            1,
            "adapter",
            base.id,
        )
        assert (version.update_id, version.served_name) == (claim.update_id, "helper-v1-aaaa")
        assert Manifest.model_validate(version.manifest) == manifest
        assert (version.manifest_sha256, version.recipe["seed"]) == ("b" * 64, 7)
        assert Verdict.model_validate(version.verdict) == PASS
        update = session.scalars(select(Update)).one()
        assert (update.status, update.version_id, update.verdict) == ("running", version.id, version.verdict)
        assert measurements.measured_items(session, version, "skill", "route") == {
            item.item: item for item in MEASURED.items
        }
        champion = aliases.get_alias(session, assistant, "champion")
        assert (champion.version_id, champion.revision) == (version.id, 2)
        move = aliases.history(session, assistant, "champion", None, 1).rows[0]
        assert (move.kind, move.update_id, move.from_version_id) == ("publish", claim.update_id, base.id)
        last = events.list_events(session, update, 0, 100)[-1]
        assert (last.type, last.data["verdict"]["outcome"], last.data["version"]) == ("verdict", "pass", 1)
        actions = [row.action for row in audit.list_audit(session, TEAM, None, 100).rows]
        assert actions[-2:] == ["version.publish", "alias.move"]
        assert assistant.next_version == 2


def test_a_failure_within_publishing_leaves_nothing(
    ledger: Ledger, claim: Claim, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: object, **kwargs: object) -> None:
        raise OSError("gone")

    monkeypatch.setattr(versions.aliases, "move_alias", fail)
    with pytest.raises(OSError, match="gone"):
        ledger.publish(claim, measurements=[MEASURED])
    monkeypatch.undo()
    with ledger.begin() as session:
        assert session.scalars(select(Version.number)).all() == [0]
        assert session.scalar(select(func.count()).select_from(MeasurementRow)) == 0
        assert session.scalars(select(Update.version_id)).one() is None
    assert ledger.publish(claim).number == 1


@pytest.mark.parametrize("verdict", [BLOCK, HOLD])
def test_a_version_that_did_not_pass_is_kept_and_does_not_serve(
    ledger: Ledger, claim: Claim, verdict: Verdict
) -> None:
    with pytest.raises(Conflict) as caught:
        ledger.publish(claim, verdict)
    assert caught.value.code == "version_blocked"
    version = ledger.publish(claim, verdict, move_champion=False)
    assert version.verdict == verdict.model_dump(mode="json")
    assistant = assistant_of(ledger, claim)
    with ledger.begin() as session:
        assert aliases.get_alias(session, assistant, "champion").revision == 1
    assert ledger.finish(claim).verdict == verdict.model_dump(mode="json")


def test_an_update_publishes_once(ledger: Ledger, claim: Claim) -> None:
    first = ledger.publish(claim)
    assert ledger.publish(claim).id == first.id
    with ledger.begin() as session:
        session.execute(Update.__table__.update().values(lease_until=0))
    successor = ledger.claim(claim.update_id)
    assert successor is not None
    assert ledger.publish(successor).id == first.id
    with ledger.begin() as session:
        assert session.scalars(select(Version.number).order_by(Version.number)).all() == [0, 1]


def test_each_claim_gets_an_id_of_its_own_and_numbers_have_no_gaps(ledger: Ledger, claim: Claim) -> None:
    with ledger.begin() as session:
        first = versions.allocate_version(session, claim)
        session.execute(Update.__table__.update().values(lease_until=0))
    successor = ledger.claim(claim.update_id)
    assert successor is not None
    with ledger.begin() as session:
        second = versions.allocate_version(session, successor)
    assert first[0] != second[0]
    assert first[1] == second[1] == 1


def test_a_number_that_is_not_the_next_is_refused(ledger: Ledger, claim: Claim) -> None:
    with pytest.raises(Conflict) as caught, ledger.begin() as session:
        versions.publish(
            session,
            claim,
            version_id="ver_x",
            number=2,
            served_name="s",
            manifest=Manifest(kind="adapter", base_model="tiny", update_id=claim.update_id, files=[]),
            manifest_sha256="0" * 64,
            recipe=Recipe(),
            verdict=PASS,
            measurements=[],
            move_champion=True,
        )
    assert caught.value.code == "version_number_taken"


def test_another_updates_manifest_is_refused(ledger: Ledger, claim: Claim) -> None:
    with pytest.raises(CorruptArtifact), ledger.begin() as session:
        versions.publish(
            session,
            claim,
            version_id="ver_x",
            number=1,
            served_name="s",
            manifest=Manifest(kind="adapter", base_model="tiny", update_id="upd_other", files=[]),
            manifest_sha256="0" * 64,
            recipe=Recipe(),
            verdict=PASS,
            measurements=[],
            move_champion=True,
        )


def test_a_champion_moved_meanwhile_is_not_overruled(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    ledger.learn(assistant, skill, lines(0, 1))
    ledger.teach(assistant, skill, lines(1, 2))
    claim = ledger.must_claim(ledger.queue(assistant))
    with ledger.begin() as session:
        aliases.roll_back(session, assistant, to=None, reason="v1 is wrong", actor="user")
    version = ledger.publish(claim)
    assert version.verdict is not None
    assert version.verdict["outcome"] == "hold"
    assert version.verdict["reasons"] == [
        "measured against v1, but the champion is now v0",
        "route rose",
    ]
    assert ledger.finish(claim).verdict == version.verdict
    with ledger.begin() as session:
        champion = aliases.get_alias(session, assistant, "champion")
        assert champion.version_id == versions.get_version(session, assistant, 0).id


def test_lineage_goes_from_the_base_along_the_parents(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    skill = ledger.skill(assistant)
    for n in (0, 1):
        ledger.learn(assistant, skill, lines(n, n + 1))
    with ledger.begin() as session:
        aliases.roll_back(session, assistant, to=None, reason="", actor="user")
    third = ledger.learn(assistant, skill, lines(2, 3))
    with ledger.begin() as session:
        assert [v.number for v in versions.lineage(session, third)] == [0, 1, 3]
        second = versions.get_version(session, assistant, 2)
        assert [v.number for v in versions.lineage(session, second)] == [0, 1, 2]
        page = versions.list_versions(session, assistant, second.id, 5)
        assert [v.number for v in page.rows] == [3]


def test_a_version_is_found_by_number_name_and_id_within_its_assistant(ledger: Ledger) -> None:
    one, other = ledger.assistant("one"), ledger.assistant("other")
    base = ledger.version(one, 0)
    with ledger.begin() as session:
        for name in (0, "v0", base.id):
            assert versions.get_version(session, one, name).id == base.id
        for missing in (1, "v1", "v01", "0"):
            with pytest.raises(NotFound):
                versions.get_version(session, one, missing)
        with pytest.raises(NotFound):
            versions.get_version(session, other, base.id)
