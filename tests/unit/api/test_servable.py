"""Which recipes are refused because no engine could serve what they train."""

from pathlib import Path

import pytest

from api.routes.updates import recipe_for
from domain.errors import InvalidInput
from domain.recipe import Recipe
from domain.settings import Settings


def test_a_full_version_needs_engines_that_ratchet_starts(tmp_path: Path) -> None:
    own = recipe_for(Settings(home=tmp_path), 7_000_000_000, {"lora_rank": 0})
    assert own.version_kind == "full"
    external = Settings(home=tmp_path, engine_url="http://engine:8000")
    with pytest.raises(InvalidInput, match=r"not Ratchet's to start") as refused:
        recipe_for(external, 7_000_000_000, {"lora_rank": 0})
    assert (refused.value.code, refused.value.param) == ("full_version_not_servable", "recipe.lora_rank")
    assert recipe_for(external, 7_000_000_000, {"lora_rank": 16}).version_kind == "adapter"


def test_all_weights_train_at_a_tenth_of_an_adapter_s_rate_unless_one_is_given() -> None:
    assert Recipe.completed({"lora_rank": 0}, 135_000_000).learning_rate == pytest.approx(1.5e-4)
    assert Recipe.completed({"lora_rank": 0}, 7_000_000_000).learning_rate == pytest.approx(2e-5)
    assert Recipe.completed({"lora_rank": 0, "learning_rate": 1e-3}, 7_000_000_000).learning_rate == 1e-3
    assert Recipe.completed({}, 135_000_000) == Recipe.small_model()


def test_a_rank_above_the_engine_s_is_refused_before_it_is_trained(tmp_path: Path) -> None:
    vllm = Settings(home=tmp_path, engine="vllm", engine_max_rank=32)
    assert recipe_for(vllm, 7_000_000_000, {"lora_rank": 32}).lora_rank == 32
    with pytest.raises(InvalidInput, match=r"33 is above the 32 .*RATCHET_ENGINE_MAX_RANK") as refused:
        recipe_for(vllm, 7_000_000_000, {"lora_rank": 33})
    assert (refused.value.code, refused.value.param) == ("rank_not_servable", "recipe.lora_rank")
    assert recipe_for(Settings(home=tmp_path), 7_000_000_000, {"lora_rank": 512}).lora_rank == 512
