"""Pydantic models of request bodies.

Nothing is coerced, and unknown fields are errors. `Elsewhere` names the fields of OpenAI's API that this server does
not support. They may be sent with their neutral value, as clients do.
"""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field

from sartor.inference.engine import MOST_STOPS

MOST_CHOICES = 16
MOST_TOP_LOGPROBS = 20
MOST_TEXTS = 256
MOST_EMBEDDED = 100_000  # characters of all texts of one request
MOST_TOOLS = 128
MOST_SAID = 100_000
NAME = r"^[a-zA-Z0-9_-]{1,64}$"


def _whole(value: Any) -> Any:
    """Convert an integral float to int: JSON has one kind of number, and 2.0 is 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# Field precedes BeforeValidator: in the other order the OpenAPI schema loses the bounds
Index = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES), BeforeValidator(_whole)]
Alternatives = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), BeforeValidator(_whole)]
Filled = Annotated[str, Field(min_length=1)]


class RequestModel(BaseModel):
    """Request body or a part of one."""

    model_config = ConfigDict(strict=True, extra="forbid")


class TextPart(RequestModel):
    """Text part of a message's content."""

    type: Literal["text"]
    text: str


class ImageUrl(RequestModel):
    """Image as a data URL (`data:image/png;base64,...`): PNG, JPEG, GIF, WebP, BMP or TIFF. `detail` has no effect."""

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(RequestModel):
    """Image among the parts of a user's turn."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(RequestModel):
    """Recording: a whole file of the given format, in base64."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg"]


class AudioPart(RequestModel):
    """Recording among the parts of a user's turn."""

    type: Literal["input_audio"]
    input_audio: InputAudio


Content = str | Annotated[list[TextPart], Field(min_length=1)]
MediaPart = ImagePart | AudioPart
UserPart = Annotated[TextPart | MediaPart, Field(discriminator="type")]


class SystemTurn(RequestModel):
    """System instructions. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserTurn(RequestModel):
    """Turn of the user: text and media.

    The position of media among the parts matters; an agent reads them as in its training.
    """

    role: Literal["user"]
    content: str | Annotated[list[UserPart], Field(min_length=1)]
    name: str | None = None


class CalledFunction(RequestModel):
    """Function that was called; `arguments` is JSON text as the model wrote it."""

    name: str
    arguments: str


class ToolCall(RequestModel):
    """Tool call in an earlier reply."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Index | None = None


class EarlierSpeech(RequestModel):
    """Speech of an earlier reply, sent back by the client. It is ignored; the content of the turn counts."""

    id: str
    data: str | None = None
    transcript: str | None = None
    expires_at: Index | None = None


class AssistantTurn(RequestModel):
    """Earlier reply. Fields of OpenAI's replies that are always empty here may be sent back unchanged."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: EarlierSpeech | None = None
    function_call: None = None


class ToolTurn(RequestModel):
    """Result of a tool call."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Turn = Annotated[SystemTurn | UserTurn | AssistantTurn | ToolTurn, Field(discriminator="role")]


class Function(RequestModel):
    """Function that the model may call. `parameters` is a JSON Schema."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestModel):
    """Tool that the model may call; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(RequestModel):
    """Name of the function that must be called."""

    name: Annotated[str, Field(pattern=NAME)]


class NamedTool(RequestModel):
    """Tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(RequestModel):
    """Reply of any text."""

    type: Literal["text"]


class ObjectFormat(RequestModel):
    """Reply that is any JSON object."""

    type: Literal["json_object"]


class NamedSchema(RequestModel):
    """JSON Schema that constrains the decoding of the reply. `strict` has no effect: the schema is always enforced."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    name: Annotated[str, Field(pattern=NAME)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(RequestModel):
    """Reply that is JSON of a given schema."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(RequestModel):
    """Additional content of a stream."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(RequestModel):
    """Sampling options. Omitted options are those of the agent's Release; an omitted seed is drawn at random."""

    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Filled | Annotated[list[Filled], Field(max_length=MOST_STOPS)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None


class Delivered(RequestModel):
    """Model, number of choices and delivery of the reply.

    `user`: client's id of a user. If the key may speak for that user, the user's personal version answers.
    """

    model: Annotated[str, Field(min_length=1, max_length=256)]
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class AudioOptions(RequestModel):
    """Voice and file format of a spoken reply. `default` is the team's voice."""

    voice: Annotated[str, Field(min_length=1, max_length=256)] = "default"
    format: Literal["wav", "mp3", "flac", "opus", "pcm16"]


class Heard(RequestModel):
    """Modalities of the reply: text, or text and speech."""

    modalities: list[Literal["text", "audio"]] | None = None
    audio: AudioOptions | None = None


class Elsewhere(RequestModel):
    """Fields of OpenAI's own service.

    `metadata`, `safety_identifier`, `prompt_cache_key` and `service_tier` have no effect. The others accept only
    their neutral value.
    """

    metadata: dict[str, str] | None = None
    safety_identifier: str | None = None
    prompt_cache_key: str | None = None
    service_tier: Literal["auto", "default"] | None = None
    store: Literal[False] | None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None
    functions: Annotated[list[Any], Field(max_length=0)] | None = None
    prediction: None = None
    reasoning_effort: None = None
    web_search_options: None = None


class ChatRequest(Delivered, SamplingFields, Heard, Elsewhere):
    """Body of POST /v1/chat/completions."""

    messages: Annotated[list[Turn], Field(min_length=1)]
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Alternatives | None = None
    tools: Annotated[list[Tool], Field(max_length=MOST_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    response_format: Format | None = None


class TextRequest(Delivered, SamplingFields):
    """Body of POST /v1/completions: raw text to continue, without the chat template."""

    prompt: str | Annotated[list[str], Field(min_length=1, max_length=MOST_CHOICES)]
    logprobs: Alternatives | None = None
    echo: Literal[False] | None = None
    best_of: Annotated[int, Field(ge=1, le=1), BeforeValidator(_whole)] | None = None
    suffix: None = None
    logit_bias: Annotated[dict[str, Any], Field(max_length=0)] | None = None


class VectorRequest(RequestModel):
    """Body of POST /v1/embeddings."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Filled | Annotated[list[Filled], Field(min_length=1, max_length=MOST_TEXTS)]
    encoding_format: Literal["float", "base64"] | None = None
    dimensions: None = None
    user: str | None = None


class SpeechRequest(RequestModel):
    """Body of POST /v1/audio/speech.

    model: `speech`, or the name of a voice.
    voice: `default` is the team's voice.
    """

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Filled
    voice: Annotated[str, Field(min_length=1, max_length=256)] = "default"
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] | None = None
    speed: Annotated[float, Field(ge=0.25, le=4)] | None = None
    stream_format: Literal["audio"] | None = None
    instructions: Annotated[str, Field(max_length=0)] | None = None
    user: str | None = None


class FeedbackRequest(RequestModel):
    """Body of POST /v1/feedback: a person's judgement of a reply.

    consent: whether prompt, reply, correction and comment may be stored and learnt from; if omitted, the team's
    setting
    holds.
    user: client's id of the person; only a keyed digest is stored.
    """

    receipt: Annotated[str, Field(min_length=1, max_length=128)]
    rating: Annotated[float, Field(ge=-1, le=1)] | None = None
    correction: Annotated[str, Field(max_length=MOST_SAID)] | None = None
    comment: Annotated[str, Field(max_length=MOST_SAID)] | None = None
    consent: bool | None = None
    user: Annotated[str, Field(max_length=256)] | None = None


class PromoteRequest(RequestModel):
    """Body of POST /v1/agents/{name}/promote: directory of a Release on the server, or a registered version."""

    release: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    version: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    expected_version: Annotated[str, Field(max_length=128)] | None = None


class RollbackRequest(RequestModel):
    """Body of POST /v1/agents/{name}/rollback."""

    expected_version: Annotated[str, Field(max_length=128)] | None = None
