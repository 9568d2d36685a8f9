"""The job file of an update, and the rehearsal that it gets."""

from pathlib import Path

import pytest

from domain.demonstration import Message
from domain.errors import TrainingRefused
from domain.recipe import Recipe
from domain.training import TrainingJob
from worker.job import check_merged_rank, prepare_job, rehearsal_prompts


def prompts(word: str, count: int) -> list[list[Message]]:
    return [[Message(role="user", content=f"{word} {number}")] for number in range(count)]


def test_few_earlier_prompts_are_all_rehearsed() -> None:
    general, taught = prompts("general", 5), prompts("taught", 4)
    assert rehearsal_prompts(general, taught, "upd_a") == general + taught


def test_earlier_skills_never_outnumber_general_prompts() -> None:
    general, taught = prompts("general", 5), prompts("taught", 100)
    drawn = rehearsal_prompts(general, taught, "upd_a")
    assert drawn[:5] == general
    assert len(drawn) == 10
    assert all(prompt in taught for prompt in drawn[5:])
    assert len({prompt[0].content for prompt in drawn}) == 10
    assert rehearsal_prompts(general, taught, "upd_a") == drawn
    assert rehearsal_prompts(general, taught, "upd_b") != drawn


def test_a_later_claim_asks_the_rollout_server_of_its_own_day(tmp_path: Path) -> None:
    """The job stays the same one, whose checkpoints count, unless there is a server no more."""
    built = TrainingJob(
        update_id="upd_a", base_path="", base_model="tiny", parent_adapter_path=None, recipe=Recipe(),
        skills=[], checkpoint_dir="", output_dir="",
    )  # fmt: skip
    fingerprints = []
    for url in ("http://one:8000", "http://two:8000", None):
        file = prepare_job(
            tmp_path, lambda: built, base=tmp_path, parent_adapter=None, output=tmp_path, rollout_url=url
        )
        job = TrainingJob.model_validate_json(file.read_bytes())
        assert job.rollout_url == url
        fingerprints.append(job.fingerprint())
    assert fingerprints[0] == fingerprints[1] != fingerprints[2]


def test_a_merged_adapter_above_the_engines_rank_is_refused_before_it_is_trained(
    tmp_path: Path,
) -> None:
    (tmp_path / "adapter_config.json").write_text('{"r": 12}')
    merged = Recipe(parent_adapter="merge", lora_rank=4)
    check_merged_rank(merged, tmp_path, 16)
    check_merged_rank(merged, tmp_path, None)
    check_merged_rank(merged, None, 8)
    check_merged_rank(Recipe(lora_rank=5), tmp_path, 16)
    with pytest.raises(TrainingRefused, match=r"rank 12 with 5 is above the 16") as refused:
        check_merged_rank(merged.model_copy(update={"lora_rank": 5}), tmp_path, 16)
    assert (refused.value.code, refused.value.param) == ("rank_not_servable", "recipe.parent_adapter")
