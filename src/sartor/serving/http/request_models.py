"""Pydantic models of request bodies.

Nothing is coerced and no field is unknown. What OpenAI's own service has and this one does not is named in
`Elsewhere`, and may be sent with the value that changes nothing, as clients do.
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
    """JSON has one kind of number: 2.0 is 2."""
    return int(value) if isinstance(value, float) and value.is_integer() else value


# the bounds stand before what reads the number, or the OpenAPI loses them
Index = Annotated[int, Field(ge=0), BeforeValidator(_whole)]
Positive = Annotated[int, Field(ge=1), BeforeValidator(_whole)]
Choices = Annotated[int, Field(ge=1, le=MOST_CHOICES), BeforeValidator(_whole)]
Alternatives = Annotated[int, Field(ge=0, le=MOST_TOP_LOGPROBS), BeforeValidator(_whole)]
Seed = Annotated[int, Field(ge=-(2**63), le=2**63 - 1), BeforeValidator(_whole)]
Filled = Annotated[str, Field(min_length=1)]


class RequestModel(BaseModel):
    """A body or a part of one."""

    model_config = ConfigDict(strict=True, extra="forbid")


class TextPart(RequestModel):
    """A part of a message's content."""

    type: Literal["text"]
    text: str


class ImageUrl(RequestModel):
    """A picture as a data URL (`data:image/png;base64,...`): PNG, JPEG, GIF, WebP, BMP or TIFF. `detail` changes
    nothing.
    """

    url: str
    detail: Literal["auto", "low", "high"] | None = None


class ImagePart(RequestModel):
    """A picture among the parts of a user's turn."""

    type: Literal["image_url"]
    image_url: ImageUrl


class InputAudio(RequestModel):
    """A recording: base64 of a whole file of that form."""

    data: str
    format: Literal["wav", "mp3", "flac", "ogg"]


class AudioPart(RequestModel):
    """A recording among the parts of a user's turn."""

    type: Literal["input_audio"]
    input_audio: InputAudio


Content = str | Annotated[list[TextPart], Field(min_length=1)]
MediaPart = ImagePart | AudioPart
UserPart = Annotated[TextPart | MediaPart, Field(discriminator="type")]


class SystemTurn(RequestModel):
    """What the agent is told to be. `developer` is OpenAI's newer word for `system`."""

    role: Literal["system", "developer"]
    content: Content
    name: str | None = None


class UserTurn(RequestModel):
    """What a person says and shows. Media count by their place among the parts; an agent reads them as it was tuned
    to.
    """

    role: Literal["user"]
    content: str | Annotated[list[UserPart], Field(min_length=1)]
    name: str | None = None


class CalledFunction(RequestModel):
    """Which function was called; `arguments` is JSON text, as the model wrote it."""

    name: str
    arguments: str


class ToolCall(RequestModel):
    """One call of a tool in an earlier reply."""

    id: str
    type: Literal["function"] = "function"
    function: CalledFunction
    index: Index | None = None


class EarlierSpeech(RequestModel):
    """The speech of an earlier reply, sent back as it came. It is not kept and not heard: the turn's content is what
    counts.
    """

    id: str
    data: str | None = None
    transcript: str | None = None
    expires_at: Index | None = None


class AssistantTurn(RequestModel):
    """An earlier reply. The fields of OpenAI's replies that are always empty here may be sent back as they came."""

    role: Literal["assistant"]
    content: Content | None = None
    tool_calls: Annotated[list[ToolCall], Field(min_length=1, max_length=MOST_TOOLS)] | None = None
    name: str | None = None
    refusal: str | None = None
    annotations: Annotated[list[Any], Field(max_length=0)] | None = None
    audio: EarlierSpeech | None = None
    function_call: None = None


class ToolTurn(RequestModel):
    """What a tool returned."""

    role: Literal["tool"]
    content: Content
    tool_call_id: str
    name: str | None = None


Turn = Annotated[SystemTurn | UserTurn | AssistantTurn | ToolTurn, Field(discriminator="role")]


class Function(RequestModel):
    """A function that the model may call. `parameters` is a JSON Schema."""

    name: Annotated[str, Field(pattern=NAME)]
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(RequestModel):
    """A tool; functions are the only kind."""

    type: Literal["function"]
    function: Function


class NamedFunction(RequestModel):
    """Which function must be called."""

    name: Annotated[str, Field(pattern=NAME)]


class NamedTool(RequestModel):
    """Which tool must be called."""

    type: Literal["function"]
    function: NamedFunction


class TextFormat(RequestModel):
    """Any text."""

    type: Literal["text"]


class ObjectFormat(RequestModel):
    """Some JSON object."""

    type: Literal["json_object"]


class NamedSchema(RequestModel):
    """A JSON Schema that the reply obeys, token by token; `strict` is always so."""

    model_config = ConfigDict(strict=True, extra="forbid", populate_by_name=True)

    name: Annotated[str, Field(pattern=NAME)]
    schema_: Annotated[dict[str, Any], Field(alias="schema")]
    description: str | None = None
    strict: bool | None = None


class SchemaFormat(RequestModel):
    """JSON of a given form."""

    type: Literal["json_schema"]
    json_schema: NamedSchema


Format = Annotated[TextFormat | ObjectFormat | SchemaFormat, Field(discriminator="type")]


class StreamOptions(RequestModel):
    """What a stream holds besides the reply."""

    include_usage: bool | None = None
    include_obfuscation: Literal[False] | None = None


class SamplingFields(RequestModel):
    """How the next token is chosen. What is left out is as the agent's Release says; a seed that is left out is
    drawn.
    """

    max_tokens: Positive | None = None
    temperature: Annotated[float, Field(ge=0, le=2)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    seed: Seed | None = None
    stop: Filled | Annotated[list[Filled], Field(max_length=MOST_STOPS)] | None = None
    frequency_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None
    presence_penalty: Annotated[float, Field(ge=-2, le=2)] | None = None


class Delivered(RequestModel):
    """By whom, how many, and in which way. `user`: whom the key speaks for, if it may; a version of theirs answers."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    n: Choices | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None
    user: str | None = None


class AudioOptions(RequestModel):
    """How a reply is spoken. voice: `default` is the team's."""

    voice: Annotated[str, Field(min_length=1, max_length=256)] = "default"
    format: Literal["wav", "mp3", "flac", "opus", "pcm16"]


class Heard(RequestModel):
    """A reply as text, or as text and speech."""

    modalities: list[Literal["text", "audio"]] | None = None
    audio: AudioOptions | None = None


class Elsewhere(RequestModel):
    """Of OpenAI's own service. The first four change nothing here; the others may be sent with what changes
    nothing.
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
    """Body of POST /v1/completions: a raw text to go on, without the chat template."""

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
    """Body of POST /v1/audio/speech. model: `speech`, or a voice's name; voice: `default` is the team's."""

    model: Annotated[str, Field(min_length=1, max_length=256)]
    input: Filled
    voice: Annotated[str, Field(min_length=1, max_length=256)] = "default"
    response_format: Literal["mp3", "opus", "flac", "wav", "pcm"] | None = None
    speed: Annotated[float, Field(ge=0.25, le=4)] | None = None
    stream_format: Literal["audio"] | None = None
    instructions: Annotated[str, Field(max_length=0)] | None = None
    user: str | None = None


class FeedbackRequest(RequestModel):
    """Body of POST /v1/feedback: what a person says of a reply.

    consent: whether the words (prompt, reply, correction, comment) may be kept and learnt from; left out, it is as the
    team
    says. user: the client's id of the person, of which a keyed digest is kept.
    """

    receipt: Annotated[str, Field(min_length=1, max_length=128)]
    rating: Annotated[float, Field(ge=-1, le=1)] | None = None
    correction: Annotated[str, Field(max_length=MOST_SAID)] | None = None
    comment: Annotated[str, Field(max_length=MOST_SAID)] | None = None
    consent: bool | None = None
    user: Annotated[str, Field(max_length=256)] | None = None


class PromoteRequest(RequestModel):
    """Body of POST /v1/agents/{name}/promote: a Release's directory on the server, or a version that is registered."""

    release: Annotated[str, Field(min_length=1, max_length=4096)] | None = None
    version: Annotated[str, Field(min_length=1, max_length=128)] | None = None
    expected_version: Annotated[str, Field(max_length=128)] | None = None


class RollbackRequest(RequestModel):
    """Body of POST /v1/agents/{name}/rollback."""

    expected_version: Annotated[str, Field(max_length=128)] | None = None
