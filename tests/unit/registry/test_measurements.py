from sqlalchemy import event

from domain.measurement import ItemScore, Measurement
from registry import measurements
from tests.unit.registry.steps import Ledger, lines


def measured(suite: str, scores: dict[str, float], kind="skill", score=0.5) -> Measurement:  # type: ignore[no-untyped-def]
    items = [ItemScore(item=i, prompt="p", output="o", expected="e", score=s) for i, s in scores.items()]
    return Measurement(kind=kind, suite=suite, score=score, n=len(items), low=0.25, high=0.75, items=items)


def test_later_items_join_earlier_ones(ledger: Ledger) -> None:
    base = ledger.version(ledger.assistant(), 0)
    with ledger.begin() as session:
        assert measurements.measured_items(session, base, "skill", "route") == {}
        first = measurements.save_measurement(session, base, measured("route", {"a": 1, "b": 0}))
    with ledger.begin() as session:
        merged = measured("route", {"a": 1, "b": 1, "c": 0}, score=2 / 3)
        second = measurements.save_measurement(session, base, merged)
        assert (second.id, second.n, second.score) == (first.id, 3, 2 / 3)
    with ledger.begin() as session:
        # A measurement of the new item alone keeps the others' outputs.
        measurements.save_measurement(session, base, measured("route", {"d": 0.5}))
    with ledger.begin() as session:
        known = measurements.measured_items(session, base, "skill", "route")
        assert {item: score.score for item, score in known.items()} == {"a": 1, "b": 1, "c": 0, "d": 0.5}
        (row,) = measurements.list_measurements(session, base)
        assert [item.item for item in measurements.items_of(session, row)] == ["a", "b", "c", "d"]
        assert measurements.items_of(session, row)[0] == known["a"]


def test_suites_are_apart_by_kind_and_version(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    base = ledger.version(assistant, 0)
    v1 = ledger.learn(assistant, ledger.skill(assistant), lines(0, 1))
    with ledger.begin() as session:
        measurements.save_measurement(session, base, measured("piqa", {"a": 1}, kind="general"))
        measurements.save_measurement(session, base, measured("piqa", {"b": 1}))
        measurements.save_measurement(session, v1, measured("piqa", {"c": 1}))
        assert list(measurements.measured_items(session, base, "general", "piqa")) == ["a"]
        assert list(measurements.measured_items(session, base, "skill", "piqa")) == ["b"]
        assert [(m.kind, m.suite) for m in measurements.list_measurements(session, base)] == [
            ("skill", "piqa"),
            ("general", "piqa"),
        ]


def test_the_matrix_is_one_query_over_every_cell(ledger: Ledger) -> None:
    assistant = ledger.assistant()
    route, call = ledger.skill(assistant), ledger.skill(assistant, "call")
    v1 = ledger.learn(assistant, route, lines(0, 1))
    v2 = ledger.learn(assistant, call, lines(1, 2))
    other = ledger.version(ledger.assistant("other"), 0)
    with ledger.begin() as session:
        for version, suite in (
            (ledger.version(assistant, 0), "route"),
            (v1, "route"),
            (v2, "call"),
            (other, "x"),
        ):
            measurements.save_measurement(session, version, measured(suite, {"a": 1}))
    statements: list[str] = []
    with ledger.begin() as session:
        event.listen(ledger.engine, "before_cursor_execute", lambda *args: statements.append(args[2]))
        rows = measurements.matrix(session, assistant)
    assert [(row.version, row.suite, row.score, row.n) for row in rows] == [
        (0, "route", 0.5, 1),
        (1, "route", 0.5, 1),
        (2, "call", 0.5, 1),
    ]
    assert len([statement for statement in statements if statement.startswith("SELECT")]) == 1
    with ledger.begin() as session:
        assert measurements.matrix(session, assistant, [v2]) == rows[2:]


def test_an_output_with_a_nul_is_stored_on_both_databases(ledger: Ledger) -> None:
    base = ledger.version(ledger.assistant(), 0)
    item = ItemScore(item="a", prompt="p", output="x\0y", expected="e", score=0)
    with ledger.begin() as session:
        measurement = Measurement(kind="skill", suite="s", score=0, n=1, low=0, high=1, items=[item])
        measurements.save_measurement(session, base, measurement)
        assert measurements.measured_items(session, base, "skill", "s")["a"].output == "x\ufffdy"
