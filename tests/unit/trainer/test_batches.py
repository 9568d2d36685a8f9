"""The schedule's shares, epochs and determinism."""

from collections import Counter

import pytest
from pydantic import ValidationError

from domain.recipe import Recipe
from trainer.batches import Schedule, learning_rate


def recipe(**changes: object) -> Recipe:
    return Recipe.model_validate({"batch_size": 16, "num_epochs": 2, "rehearsal_share": 0.25, **changes})


def test_steps_cover_the_epochs() -> None:
    """12 lessons a step beside 4 rehearsal prompts: 2 epochs of 50 take ceil(100 / 12) = 9 steps."""
    assert Schedule(recipe(), lessons=50, rehearsal=10).steps == 9
    assert Schedule(recipe(max_steps=4), lessons=50, rehearsal=10).steps == 4
    assert Schedule(recipe(min_steps=30), lessons=50, rehearsal=10).steps == 30
    assert Schedule(recipe(min_steps=30, max_steps=4), lessons=50, rehearsal=10).steps == 4


def test_without_rehearsal_prompts_the_whole_batch_is_lessons() -> None:
    batch = Schedule(recipe(), lessons=50, rehearsal=0).batch(0)
    assert len(batch.on_policy) + len(batch.off_policy) == 16
    assert batch.rehearsal == ()


def test_shares_hold_over_the_run() -> None:
    """A tenth of 12 lessons a step is 1.2 a step: 12 in ten steps, one or two in each."""
    schedule = Schedule(recipe(off_policy_share=0.1, num_epochs=3), lessons=50, rehearsal=10)
    off = [len(schedule.batch(step).off_policy) for step in range(10)]
    assert sum(off) == 12
    assert set(off) == {1, 2}
    assert all(len(schedule.batch(step).rehearsal) == 4 for step in range(10))


@pytest.mark.parametrize(("size", "share", "counts"), [
    (2, 0.25, [0, 1, 0, 1, 0, 1]),
    (10, 0.25, [2, 3, 2, 3, 2, 3]),
    (10, 0.9, [9, 9, 9, 9, 9, 9]),
    (4, 0.01, [0, 0, 0, 0, 0, 0]),
])  # fmt: skip
def test_a_share_of_rehearsal_holds_for_any_batch(size: int, share: float, counts: list[int]) -> None:
    """And every batch is full, and every lesson comes in its turn."""
    schedule = Schedule(recipe(batch_size=size, rehearsal_share=share, num_epochs=20), 6, 10)
    batches = [schedule.batch(step) for step in range(6)]
    assert [len(batch.rehearsal) for batch in batches] == counts
    assert {len(batch.on_policy) + len(batch.rehearsal) for batch in batches} == {size}
    lessons = [lesson for batch in batches for lesson in batch.on_policy]
    assert Counter(lessons[:6]) == Counter(range(6))


def test_a_batch_without_room_for_a_demonstration_is_refused() -> None:
    for size, share in ((10, 0.95), (20, 0.975), (1, 0.25)):
        with pytest.raises(ValidationError, match="rehearsal_share leaves no room"):
            recipe(batch_size=size, rehearsal_share=share)
    assert Schedule(recipe(batch_size=20, rehearsal_share=0.95, num_epochs=1), 3, 10).steps == 3


def test_each_epoch_visits_every_lesson_once_in_its_own_order() -> None:
    schedule = Schedule(recipe(off_policy_share=0.5, rehearsal_share=0), lessons=32, rehearsal=0)
    epochs = []
    for epoch in range(2):
        order = []
        for step in (2 * epoch, 2 * epoch + 1):
            batch = schedule.batch(step)
            order += [*batch.off_policy, *batch.on_policy]
        assert Counter(order) == Counter(range(32))
        epochs.append(order)
    assert epochs[0] != epochs[1]


def test_the_seed_decides() -> None:
    one, same = Schedule(recipe(seed=1), 50, 10), Schedule(recipe(seed=1), 50, 10)
    other = Schedule(recipe(seed=2), 50, 10)
    assert [one.batch(s) for s in range(5)] == [same.batch(s) for s in range(5)]
    assert one.batch(0) != other.batch(0)


@pytest.mark.parametrize("method", ["sft", "dft", "cpt", "offline_distillation"])
def test_controls_train_on_given_tokens_only(method: str) -> None:
    batch = Schedule(recipe(method=method), 50, 10).batch(0)
    assert batch.on_policy == ()
    assert len(batch.off_policy) == 12
    assert len(batch.rehearsal) == 4


def test_reinvoking_steps_rehearse_alone_and_go_on_in_the_order() -> None:
    """2 epochs of 50 at 12 a step: 9 steps and 36 of the rehearsal draws; then 3 steps of 16."""
    used = recipe(method="sft_reinvoke", reinvoke_steps=3)
    schedule = Schedule(used, lessons=50, rehearsal=60)
    assert schedule.steps == 12
    drawn = [index for step in range(9) for index in schedule.batch(step).rehearsal]
    batch = schedule.batch(9)
    assert (batch.on_policy, batch.off_policy, len(batch.rehearsal)) == ((), (), 16)
    drawn += [*batch.rehearsal, *schedule.batch(10).rehearsal]
    assert len(drawn) == 68
    assert sorted(drawn[:60]) == list(range(60))
    # The learning rate starts anew: warmup of 10 steps is cut short by the phase's 3.
    assert schedule.learning_rate(9) == pytest.approx(used.learning_rate / 10)


def test_every_prompt_is_sampled_as_often_as_the_recipe_says() -> None:
    """12 lessons a step, half of them off-policy: 6 on-policy prompts, three samples of each."""
    batch = Schedule(recipe(rollouts_per_prompt=3, off_policy_share=0.5), 50, 10).batch(0)
    assert len(batch.off_policy) == 6
    assert len(batch.on_policy) == 18
    assert set(Counter(batch.on_policy).values()) == {3}


@pytest.mark.parametrize(("schedule", "middle"), [("cosine", 0.5), ("linear", 0.5), ("constant", 1.0)])
def test_learning_rate_by_hand(schedule: str, middle: float) -> None:
    """Warmup of 2 steps gives 1/2 then 1; the decay over steps 2..10 is half done at step 6."""
    used = recipe(learning_rate=1.0, warmup_steps=2, lr_schedule=schedule)
    assert learning_rate(used, 0, 10) == 0.5
    assert learning_rate(used, 1, 10) == 1.0
    assert learning_rate(used, 6, 10) == pytest.approx(middle)
