"""Which fields of a completion request reach the engine: an allowlist, because engines have dangerous ones
(`prompt_logprobs` can kill a vLLM server, `chat_template` runs a client's template)."""

from typing import Any

from domain.errors import InvalidInput

_SAMPLING = frozenset(
    {
        "frequency_penalty",
        "logit_bias",
        "logprobs",
        "max_tokens",
        "n",
        "presence_penalty",
        "seed",
        "stop",
        "stream",
        "stream_options",
        "temperature",
        "top_p",
        # vLLM's own, harmless
        "min_p",
        "repetition_penalty",
        "top_k",
    }
)
CHAT_FORWARDED = _SAMPLING | {
    "max_completion_tokens",
    "messages",
    "model",
    "parallel_tool_calls",
    "reasoning_effort",
    "response_format",
    "tool_choice",
    "tools",
    "top_logprobs",
}
TEXT_FORWARDED = _SAMPLING | {"echo", "model", "prompt", "suffix"}

IGNORED = frozenset(
    {
        "metadata",
        "prediction",
        "prompt_cache_key",
        "prompt_cache_options",
        "prompt_cache_retention",
        "safety_identifier",
        "service_tier",
        "store",
        "user",
        "verbosity",
    }
)
"""OpenAI's hints to its own service: accepted, and of no meaning to an engine."""
UNSUPPORTED = frozenset(
    {"audio", "best_of", "function_call", "functions", "modalities", "moderation", "web_search_options"}
)
"""OpenAI's fields that change the answer in a way that no engine here can: refused, not ignored."""
MAX_CHOICES = 128
"""Of one prompt; OpenAI's limit too. vLLM's own is 16384 sequences, which keep everybody else waiting."""
MAX_SEQUENCES = 1024
"""Of one request, over all of its prompts: four times what vLLM has under way at once by default."""

MAX_MESSAGES = 2048
"""OpenAI's limit too."""


def forwarded(body: dict[str, Any], allowed: frozenset[str], *, scores_prompts: bool) -> dict[str, Any]:
    """The fields that reach the engine; nulls are left out, as they mean the default.

    Without `scores_prompts` the prompt's own log-probabilities (`echo` with `logprobs`) are refused.
    Raises InvalidInput naming the first field that may not, its code `unsupported_parameter` for OpenAI's
    own and `unknown_parameter` for all others.
    """
    for name, value in body.items():
        if name == "best_of" and "echo" in allowed and value in (None, 1):
            continue
        if name in UNSUPPORTED:
            if value is None:
                continue
            raise InvalidInput(
                f"The parameter '{name}' is not supported.", param=name, code="unsupported_parameter"
            )
        if name not in allowed and name not in IGNORED:
            raise InvalidInput(f"Unknown parameter: '{name}'.", param=name, code="unknown_parameter")
    _bound_sequences(body)
    _bound_messages(body.get("messages"))
    if body.get("echo") and body.get("logprobs") is not None and not scores_prompts:
        raise InvalidInput(
            "'echo' with 'logprobs' is off here: it may end an engine that was not started for it.",
            param="echo",
            code="unsupported_parameter",
        )
    return {name: value for name, value in body.items() if name in allowed and value is not None}


def _bound_sequences(body: dict[str, Any]) -> None:
    """Raises InvalidInput naming `n` or `prompt`."""
    choices = 1 if body.get("n") is None else body["n"]
    # Engines read "16384" and 16384.0 as numbers, so neither may pass unmeasured.
    if not isinstance(choices, int) or isinstance(choices, bool):
        raise InvalidInput("'n' must be a whole number.", param="n")
    if choices > MAX_CHOICES:
        raise InvalidInput(f"'n' is {choices}; at most {MAX_CHOICES} choices are given.", param="n")
    prompts = _prompts(body.get("prompt"))
    if prompts * choices > MAX_SEQUENCES:
        raise InvalidInput(
            f"{prompts} prompts with {choices} choices each are {prompts * choices} sequences; "
            f"at most {MAX_SEQUENCES} are given.",
            param="n" if choices > 1 else "prompt",
        )


def _bound_messages(messages: Any) -> None:
    """Raises InvalidInput. Each costs the engines' event loops some microseconds, a wrong one more."""
    if not isinstance(messages, list):
        return
    contents = (message.get("content") for message in messages if isinstance(message, dict))
    parts = len(messages) + sum(len(content) - 1 for content in contents if isinstance(content, list))
    if parts > MAX_MESSAGES:
        raise InvalidInput(
            f"'messages' has {parts} messages and parts of messages; at most {MAX_MESSAGES} are taken.",
            param="messages",
        )


def _prompts(prompt: Any) -> int:
    """How many there are: a list of token ids is one."""
    if not isinstance(prompt, list) or all(isinstance(part, int) for part in prompt):
        return 1
    return len(prompt)
