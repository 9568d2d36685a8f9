"""Places are counted, waited for in turn, and never lost."""

import asyncio

import pytest

from api.admission import Admission
from domain.errors import Overloaded

ONE, OTHER = ("t", "one"), ("t", "other")


def admission(**fields: float) -> Admission:
    limits = {"places": 2, "places_per_assistant": 2, "queue": 2, "queue_seconds": 60.0, **fields}
    return Admission(
        places=int(limits["places"]),
        places_per_assistant=int(limits["places_per_assistant"]),
        queue=int(limits["queue"]),
        queue_seconds=limits["queue_seconds"],
    )


def test_places_are_limited_in_all_and_for_each_assistant() -> None:
    both = admission(places=3, places_per_assistant=2)
    assert both.enter_now(ONE)
    second = both.enter_now(ONE)
    assert second
    assert both.enter_now(ONE) is None, "the assistant has two"
    assert both.enter_now(OTHER)
    assert both.enter_now(("t", "third")) is None, "three in all"
    second.release()
    second.release()
    assert both.under_way == 2
    assert both.enter_now(OTHER)


def test_who_waits_enters_in_turn() -> None:
    async def story() -> list[int]:
        gate, entered = admission(places=1), list[int]()
        first = gate.enter_now(ONE)
        assert first is not None

        async def wait(number: int) -> None:
            place = await gate.enter(ONE)
            entered.append(number)
            await asyncio.sleep(0)
            place.release()

        waiting = [asyncio.create_task(wait(number)) for number in (1, 2)]
        await asyncio.sleep(0)
        assert (gate.under_way, gate.waiting) == (1, 2)
        with pytest.raises(Overloaded, match="Too many requests are under way"):
            await gate.enter(ONE)
        first.release()
        await asyncio.gather(*waiting)
        assert (gate.under_way, gate.waiting) == (0, 0)
        return entered

    assert asyncio.run(story()) == [1, 2]


def test_one_assistants_queue_does_not_hold_up_another() -> None:
    async def story() -> None:
        gate = admission(places=3, places_per_assistant=1)
        held = gate.enter_now(ONE)
        assert held is not None
        stuck = asyncio.create_task(gate.enter(ONE))
        await asyncio.sleep(0)
        assert gate.enter_now(OTHER) is not None
        held.release()
        (await stuck).release()

    asyncio.run(story())


def test_waiting_ends_in_time_and_leaves_nothing_behind() -> None:
    async def story() -> None:
        gate = admission(places=1, queue_seconds=0.02)
        held = gate.enter_now(ONE)
        assert held is not None
        with pytest.raises(Overloaded, match=r"within 0\.02 s"):
            await gate.enter(ONE)
        assert gate.waiting == 0
        held.release()
        assert gate.under_way == 0

    asyncio.run(story())


def test_a_place_that_comes_in_the_moment_of_leaving_is_given_on() -> None:
    async def story() -> None:
        gate = admission(places=1)
        held = gate.enter_now(ONE)
        assert held is not None
        leaver = asyncio.create_task(gate.enter(ONE))
        await asyncio.sleep(0)
        held.release()  # the place is the leaver's now
        leaver.cancel()
        with pytest.raises(asyncio.CancelledError):
            await leaver
        assert (gate.under_way, gate.waiting) == (0, 0)
        assert gate.enter_now(ONE) is not None

    asyncio.run(story())
