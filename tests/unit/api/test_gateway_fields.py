"""Which request fields reach an engine."""

from typing import Any, get_type_hints

import pytest
from openai.types import completion_create_params
from openai.types.chat import completion_create_params as chat_create_params

from api.gateway_fields import CHAT_FORWARDED, IGNORED, TEXT_FORWARDED, UNSUPPORTED, forwarded
from domain.errors import InvalidInput


def documented(params: Any) -> set[str]:
    return set(get_type_hints(params.CompletionCreateParamsNonStreaming))


def test_every_documented_field_of_openai_has_a_fate() -> None:
    assert documented(chat_create_params) - {"messages"} <= CHAT_FORWARDED | IGNORED | UNSUPPORTED
    assert documented(completion_create_params) <= TEXT_FORWARDED | IGNORED | UNSUPPORTED


def test_the_three_fates_are_disjoint() -> None:
    assert not (CHAT_FORWARDED | TEXT_FORWARDED) & (IGNORED | UNSUPPORTED)
    assert not IGNORED & UNSUPPORTED


def test_hints_and_nulls_do_not_reach_the_engine() -> None:
    body = {"model": "a", "messages": [], "user": "u", "store": True, "stop": None, "top_k": 3, "audio": None}
    assert forwarded(body, CHAT_FORWARDED, scores_prompts=True) == {"model": "a", "messages": [], "top_k": 3}


@pytest.mark.parametrize(
    ("field", "code"),
    [
        ("prompt_logprobs", "unknown_parameter"),
        ("chat_template", "unknown_parameter"),
        ("chat_template_kwargs", "unknown_parameter"),
        ("lora_path", "unknown_parameter"),
        ("prompt", "unknown_parameter"),
        ("web_search_options", "unsupported_parameter"),
    ],
)
def test_other_fields_are_refused_by_name(field: str, code: str) -> None:
    with pytest.raises(InvalidInput) as refused:
        forwarded({"model": "a", "messages": [], field: {}}, CHAT_FORWARDED, scores_prompts=True)
    assert (refused.value.param, refused.value.code) == (field, code)


def test_a_prompt_is_scored_only_where_the_engine_can() -> None:
    body = {"model": "a", "prompt": "x", "echo": True, "logprobs": 0}
    assert forwarded(body, TEXT_FORWARDED, scores_prompts=True) == body
    with pytest.raises(InvalidInput) as refused:
        forwarded(body, TEXT_FORWARDED, scores_prompts=False)
    assert (refused.value.param, refused.value.code) == ("echo", "unsupported_parameter")
    for harmless in ({"echo": True}, {"logprobs": 2}, {"echo": False, "logprobs": 2}):
        body = {"model": "a", "prompt": "x", **harmless}
        assert forwarded(body, TEXT_FORWARDED, scores_prompts=False) == body


@pytest.mark.parametrize(("best_of", "passes"), [(None, True), (1, True), (2, False)])
def test_best_of_is_no_engines(best_of: int | None, passes: bool) -> None:
    body = {"model": "a", "prompt": "x", "best_of": best_of}
    if passes:
        assert forwarded(body, TEXT_FORWARDED, scores_prompts=True) == {"model": "a", "prompt": "x"}
    else:
        with pytest.raises(InvalidInput) as refused:
            forwarded(body, TEXT_FORWARDED, scores_prompts=True)
        assert refused.value.code == "unsupported_parameter"


def test_choices_are_bounded() -> None:
    assert forwarded({"model": "a", "n": 128}, CHAT_FORWARDED, scores_prompts=True)["n"] == 128
    with pytest.raises(InvalidInput, match="at most 128") as refused:
        forwarded({"model": "a", "n": 129}, CHAT_FORWARDED, scores_prompts=True)
    assert refused.value.param == "n"


@pytest.mark.parametrize("n", ["16384", 16384.0, 2.0, True, [129], {}])
def test_a_number_of_choices_in_disguise_is_refused(n: Any) -> None:
    """Engines would read the first two as 16384."""
    with pytest.raises(InvalidInput, match="whole number") as refused:
        forwarded({"model": "a", "n": n}, CHAT_FORWARDED, scores_prompts=True)
    assert refused.value.param == "n"


@pytest.mark.parametrize(
    ("prompt", "n", "param"),
    [
        ("x", 128, None),
        ([7] * 4096, 128, None),  # one prompt of token ids
        ([[7, 8]] * 8, 128, None),
        ([[7, 8]] * 9, 128, "n"),
        (["x"] * 2000, 128, "n"),
        (["x"] * 1024, None, None),
        (["x"] * 1025, None, "prompt"),
    ],
)
def test_sequences_are_bounded_over_all_prompts(prompt: Any, n: int | None, param: str | None) -> None:
    """1024 = 8 * 128."""
    body = {"model": "a", "prompt": prompt} | ({} if n is None else {"n": n})
    if param is None:
        assert forwarded(body, TEXT_FORWARDED, scores_prompts=True) == body
    else:
        with pytest.raises(InvalidInput, match="at most 1024") as refused:
            forwarded(body, TEXT_FORWARDED, scores_prompts=True)
        assert refused.value.param == param
