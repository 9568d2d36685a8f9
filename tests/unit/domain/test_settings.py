import pytest
from pydantic import ValidationError

from domain.settings import Settings


def test_engines_are_a_list_without_repeats() -> None:
    settings = Settings(engine_url=" http://a:1/ ,http://b:2,, http://a:1")
    assert settings.engine_urls == ("http://a:1", "http://b:2")
    assert Settings(engine_url=" , ").engine_urls == ()


def test_the_rank_limit_is_vllms(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().adapter_rank_limit is None
    monkeypatch.setenv("RATCHET_ENGINE", "vllm")
    assert Settings().adapter_rank_limit == 16
    monkeypatch.setenv("RATCHET_ENGINE_MAX_RANK", "64")
    assert Settings().adapter_rank_limit == 64
    monkeypatch.setenv("RATCHET_ENGINE_MAX_RANK", "48")
    with pytest.raises(ValidationError, match=r"engine_max_rank\n.*one of 1, 8, 16, 32"):
        Settings()


def test_servers_of_unknown_flags_score_no_prompts() -> None:
    assert Settings().scores_prompts
    assert not Settings(engine_url="http://a:1").scores_prompts
    assert Settings(engine_url="http://a:1", engine_prompt_logprobs=True).scores_prompts
