"""Request bodies, as OpenAI and vLLM name their fields.

Unknown fields are ignored as vLLM does; known ones that this engine does not act on are refused
unless they ask for nothing.
"""

from typing import Annotated, Any, Literal, cast

from pydantic import BaseModel, ConfigDict, Field, model_validator

from engine.errors import BadRequest

MAX_LOGPROBS = 20
_NEUTRAL: dict[str, tuple[object, ...]] = {
    "presence_penalty": (0,),
    "frequency_penalty": (0,),
    "repetition_penalty": (1,),
    "length_penalty": (1,),
    "min_p": (0,),
    "min_tokens": (0,),
    "logit_bias": ({},),
    "best_of": (1,),
    "suffix": ("",),
    "use_beam_search": (False,),
    "prompt_logprobs": (),
    "tools": ([],),
    "tool_choice": ("none", "auto"),
    "functions": ([],),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "structured_outputs": (),
    "guided_json": (),
    "guided_regex": (),
    "guided_choice": (),
    "guided_grammar": (),
    "modalities": (["text"],),
    "audio": (),
    "continue_final_message": (False,),
    "chat_template": (),
    "chat_template_kwargs": ({},),
    "bad_words": ([],),
    "truncate_prompt_tokens": (),
}
"""Fields not acted on, with the values besides null that ask for nothing."""

Int64 = Annotated[int, Field(ge=-(2**63), lt=2**63)]
Stop = Annotated[str, Field(min_length=1)]


class StreamOptions(BaseModel):
    include_usage: bool = False


class SamplingFields(BaseModel):
    """What chat and plain completions have in common."""

    model_config = ConfigDict(extra="ignore")

    model: str
    max_tokens: int | None = Field(default=None, ge=0)
    temperature: float | None = Field(default=None, ge=0, le=100)
    top_p: float | None = Field(default=None, gt=0, le=1)
    top_k: int | None = Field(default=None, ge=-1)
    seed: Int64 | None = None
    stop: Stop | list[Stop] | None = None
    stop_token_ids: list[int] | None = None
    ignore_eos: bool = False
    n: int = Field(default=1, ge=1, le=128)
    stream: bool = False
    stream_options: StreamOptions | None = None
    priority: int = 0
    """The lowest goes first. Below 0 it passes everybody else: for probes, which are one short step."""
    return_token_ids: bool | None = None
    """Adds `token_ids` to each choice, the token that ended it included, and `prompt_token_ids`."""

    @model_validator(mode="before")
    @classmethod
    def _refuse_what_would_be_ignored(cls, body: Any) -> Any:
        if isinstance(body, dict):
            for field, neutral in _NEUTRAL.items():
                value = body.get(field)
                if value is not None and value not in neutral:
                    # Not a ValueError: pydantic would forget which field it was.
                    raise BadRequest(f"'{field}' is not supported by this engine", param=field)
        return body

    @model_validator(mode="after")
    def _stream_options_need_a_stream(self) -> "SamplingFields":
        if self.stream_options is not None and not self.stream:
            raise BadRequest("'stream_options' is only allowed when 'stream' is true", param="stream_options")
        return self

    @property
    def stops(self) -> tuple[str, ...]:
        if self.stop is None:
            return ()
        return (self.stop,) if isinstance(self.stop, str) else tuple(self.stop)

    @property
    def include_usage(self) -> bool:
        return self.stream_options is not None and self.stream_options.include_usage


class TextPart(BaseModel):
    type: Literal["text"]
    text: str


class ChatMessage(BaseModel):
    """A message; parts are joined by line breaks as vLLM does for text-only models."""

    model_config = ConfigDict(extra="ignore")

    role: str = Field(min_length=1)
    content: str | list[TextPart] | None = None

    def rendered(self) -> dict[str, str]:
        if isinstance(self.content, list):
            return {"role": self.role, "content": "\n".join(part.text for part in self.content)}
        return {"role": self.role, "content": self.content or ""}


class ChatBody(SamplingFields):
    """POST /v1/chat/completions."""

    messages: list[ChatMessage] = Field(min_length=1)
    max_completion_tokens: int | None = Field(default=None, ge=0)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    add_generation_prompt: bool = True

    @model_validator(mode="after")
    def _top_needs_logprobs(self) -> "ChatBody":
        if self.top_logprobs and not self.logprobs:
            raise BadRequest("when using 'top_logprobs', 'logprobs' must be true", param="top_logprobs")
        return self


class CompletionBody(SamplingFields):
    """POST /v1/completions. `prompt` is one text, one list of token ids, or a list of either."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: int | None = Field(default=None, ge=0, le=MAX_LOGPROBS)
    echo: bool = False

    @property
    def prompts(self) -> list[str] | list[list[int]]:
        if isinstance(self.prompt, str):
            return [self.prompt]
        if not self.prompt or isinstance(self.prompt[0], int):
            return [cast(list[int], self.prompt)]
        return self.prompt


class LoadAdapterBody(BaseModel):
    """POST /v1/load_lora_adapter."""

    lora_name: str = ""
    lora_path: str = ""
    load_inplace: bool = False


class UnloadAdapterBody(BaseModel):
    """POST /v1/unload_lora_adapter."""

    lora_name: str = ""
