"""Probes of the options of synthesis: each way on three rows and a document, whole runs, teachers, validation."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import sartor
from endpoint_server import EndpointServer, serving
from media_files import sound
from option_probes import Observer, Probe, Workspace, probes_of, with_marks
from rows import document, row, step_of
from sample_data import write_jsonl
from sartor.core.config import load
from sartor.inference.endpoint_client import RequestThrottle
from sartor.synthesize.answer_cache import AnswerCache
from sartor.synthesize.generator import TeacherRequest
from sartor.synthesize.generators import local_generators
from sartor.synthesize.generators.local_generators import Counterfactual, SlotSubstitution, SpokenQuestions, Templates
from sartor.synthesize.generators.prompted_generators import Questions, Scenarios, Structured
from sartor.synthesize.generators.rewrite_generators import Extend, Harder, Persona, Preference, Vary
from sartor.synthesize.teacher import TeacherAnswer, TeacherQuestion
from sartor.synthesize.teacher_options import Endpoint, Fake, FakeTeacher, LocalTeacherOptions

DOCUMENT = (
    "Delivery to Berlin takes two days and costs 4 euros.\n\nParcels over 30 kg are carried by a haulier, who calls before. "
    "Returns are free for 14 days after the parcel has come, in whichever box it came. Whoever sends it back pays nothing."
)
SEEDS = (
    row("What does delivery to Rome cost for parcel 31 today?", "It costs 31 euros to Rome."),
    row("She asks when her parcel to Oslo comes.", "Tell her that it comes to Oslo on Friday."),
    row("Emily Walsh, 28, wants a loan. She is German.", '{"decision":"grant"}'),
    document(DOCUMENT),
)


def _made(cls: type, **base: Any) -> Observer:
    """Observe the rows that a way without a teacher makes of the seeds."""

    def observe(values: Any, workspace: Workspace) -> Any:
        way = step_of(cls, **{**base, **values})
        return [getattr(item, "row", item) for item in way.make(SEEDS, 0, workspace.path)]

    return observe


def _asked(cls: type, **base: Any) -> Observer:
    """Observe what a way asks a teacher about the seeds, and the rows that it builds of the fake teacher's answers."""

    def observe(values: Any, workspace: Workspace) -> Any:
        way = step_of(cls, **{**base, **values})
        outcomes: list[Any] = []
        for request in way.requests(SEEDS, 0):
            if not isinstance(request, TeacherRequest):
                outcomes.append(request)
                continue
            question = TeacherQuestion(request.messages, 0, 512, 0.8, json.dumps(request.schema))
            answer = json.loads(FakeTeacher().answer(question).text)
            outcomes += [request.messages, way.build_row(request, answer)]
        return outcomes

    return observe


def _spoken(values: Any, workspace: Workspace) -> Any:
    """Recordings of the seeds' questions, whose pitch tells the voice and whose length the speed; and who is spoken of."""

    def say_all(texts: Any, voice: str, speed: float, folder: Path) -> list[Path]:
        files = [folder / f"{voice}-{speed}-{index}.wav" for index in range(len(texts))]
        folder.mkdir(parents=True, exist_ok=True)
        for file in files:
            file.write_bytes(sound(0.1 / speed, pitch=200.0 + len(voice)))
        return files

    workspace.patch.setattr(local_generators, "say_all", say_all)
    spoken = step_of(SpokenQuestions, **values).make(SEEDS, 0, workspace.folder())
    return [getattr(item, "row", item) for item in spoken]


PER_ROW = {"per_row": (1, 2), "rows": (0, 1)}
SLOTS = {"city": ["Rome", "Oslo", "Berlin"]}
LIGHTS: dict[str, Any] = {
    "prompts": ["turn on the {room} light"],
    "reply": "{room}",
    "slots": {"room": ["hall", "attic"]},
}
SCHEMA = {"type": "object", "properties": {"n": {"type": "integer"}}, "required": ["n"]}
GRID: dict[str, Any] = {"personas": ["a baker"], "intents": ["to return a parcel"]}

WAY_PROBES = (
    *probes_of(
        "SlotSubstitution",
        _made(SlotSubstitution, slots=SLOTS),
        {"slots": (SLOTS, {"city": ["Rome", "Paris"]}), "numbers": (False, True), "per_row": (4, 1), "rows": (0, 1)},
    ),
    *probes_of(
        "Counterfactual",
        _made(Counterfactual),
        {"kinds": (["names", "pronouns"], ["age", "pronouns"]), "to": ([], ["he"]), "per_row": (1, 3), "rows": (0, 1)},
    ),
    *probes_of(
        "Templates",
        _made(Templates, **LIGHTS),
        {
            "prompts": (LIGHTS["prompts"], ["turn off the {room} light"]),
            "reply": ("{room}", "the {room}"),
            "slots": (LIGHTS["slots"], {"room": ["den"]}),
            "system": ("", "You switch lights."),
            "count": (0, 1),
        },
    ),
    *probes_of(
        "SpokenQuestions", _spoken, {"voice": ("espeak", "espeak:de"), "speeds": ([1.0], [0.8, 1.2]), "rows": (0, 1)}
    ),
    *(
        probe
        for cls in (Vary, Extend, Harder, Persona, Preference)
        for probe in probes_of(cls.__name__, _asked(cls), PER_ROW)
    ),
    *probes_of("Persona", _asked(Persona), {"personas": (["a baker"], ["a nurse"])}),
    *probes_of("Preference", _asked(Preference), {"flaws": (["is rude"], ["is late"])}),
    *probes_of(
        "Questions",
        _asked(Questions),
        {
            "per_document": (2, 3),
            "rows": (0, 1),
            "piece_chars": (3000, 200),
            "least_span_chars": (1, 500),
            "with_passage": (False, True),
        },
    ),
    *probes_of(
        "Scenarios",
        _asked(Scenarios, **GRID),
        {
            "personas": (["a baker"], ["a nurse"]),
            "intents": (["to pay"], ["to complain"]),
            "edge_cases": (["late"], ["no receipt"]),
            "per_cell": (1, 2),
            "turns": (2, 1),
            "system": ("", "You help."),
        },
    ),
    Probe(
        "Structured.schema_",
        ({"schema": SCHEMA}, {"schema": {"type": "object", "properties": {"m": {"type": "integer"}}}}),
        _asked(Structured, task="Count."),
    ),
    *probes_of(
        "Structured", _asked(Structured, schema=SCHEMA, task="Count."), {"task": ("Count.", "Add."), "count": (2, 3)}
    ),
)

# --- whole runs


class BrokenTeacher:
    """A teacher whose first answer to each question is no JSON."""

    name, at_once = "broken", 1

    def __init__(self) -> None:
        self.questions: list[TeacherQuestion] = []

    def answer(self, question: TeacherQuestion) -> TeacherAnswer:
        """Answer with words, and with JSON where the question was put before."""
        self.questions.append(question)
        return FakeTeacher().answer(question) if len(question.messages) > 2 else TeacherAnswer("none")


def _recipe(values: Any, workspace: Workspace) -> dict[str, Any]:
    for name, count in (("seeds.jsonl", 2), ("other.jsonl", 1)):
        rows = [{"prompt": f"what does parcel {index} cost", "completion": f"{index} euros"} for index in range(count)]
        write_jsonl(workspace.path / name, rows)
    recipe = {"sources": ["seeds.jsonl"], "teacher": "fake", "ways": ["vary"], "licence": "CC0-1.0", **values}
    recipe["sources"] = [{"path": str(workspace.path / name), "licence": "MIT"} for name in recipe["sources"]]
    return recipe


def _synthesized(values: Any, workspace: Workspace) -> Any:
    """Rows and licence of a run."""
    result = sartor.synthesize(_recipe(values, workspace), workspace.folder() / "out")
    return [each.id for each in result.examples()], result.dropped, result.dataset.licence


def _questions(values: Any, workspace: Workspace) -> Any:
    """Rows of a run and the questions that its teacher was asked."""
    teacher = BrokenTeacher()
    result = sartor.synthesize(
        _recipe({"ways": ["vary", {"templates": LIGHTS}], **values}, workspace),
        workspace.folder() / "out",
        teacher=teacher,
    )
    return result.made, [
        (each.seed, each.temperature, each.max_tokens, len(each.messages)) for each in teacher.questions
    ]


def _cached(values: Any, workspace: Workspace) -> Any:
    """Answers of a second run that the first one left."""
    folder = workspace.folder()
    values = {"cache": str(folder / values["cache"]) if values["cache"] else ""}
    runs = [sartor.synthesize(_recipe(values, workspace), folder / name) for name in ("first", "second")]
    return [run.as_json()["cached"] for run in runs]


RUN_PROBES = (
    *probes_of(
        "SynthesizeRecipe",
        _synthesized,
        {
            "ways": (["vary"], ["extend"]),
            "sources": (["seeds.jsonl"], ["other.jsonl"]),
            "teacher": ("fake", {"kind": "fake", "licence": "LicenseRef-teacher"}),
            "seed": (0, 1),
            "max_row_bytes": (1000, 10),
        },
        may_refuse=True,
    ),
    *probes_of(
        "SynthesizeRecipe",
        lambda values, workspace: _synthesized({"ways": [{"templates": LIGHTS}], "sources": [], **values}, workspace),
        {"licence": ("CC0-1.0", "MIT")},
    ),
    *probes_of(
        "SynthesizeRecipe", _questions, {"temperature": (0.8, 0.1), "max_tokens": (512, 100), "repairs": (1, 0)}
    ),
    *probes_of("SynthesizeRecipe", _cached, {"cache": ("", "answers")}),
)

# --- teachers


def _fake(values: Any, workspace: Workspace) -> Any:
    """How many questions the run puts at once."""
    return load(Fake, values).open(print).at_once


def _local(values: Any, workspace: Workspace) -> Any:
    folder = Path(workspace.fixture("tiny_base"))
    base = str(folder) if values.get("base", "tiny") == "tiny" else str(folder / values["base"])
    teacher = load(LocalTeacherOptions, {**values, "base": base}).open(print)
    return teacher.name, teacher.at_once


def _licensed(kind: str, **base: Any) -> Observer:
    """Licence of rows, of which this teacher wrote a part; it is not asked, since another stands in for it."""

    def observe(values: Any, workspace: Workspace) -> Any:
        recipe = _recipe({"teacher": {"kind": kind, **base, **values}}, workspace)
        return sartor.synthesize(recipe, workspace.folder() / "out", teacher=FakeTeacher()).dataset.licence

    return observe


class _Clock:
    """Seconds that pass by sleeping alone."""

    def __init__(self) -> None:
        self.now, self.slept = 0.0, 0.0

    def sleep(self, seconds: float) -> None:
        """Let seconds pass."""
        self.now, self.slept = self.now + seconds, self.slept + seconds


def _endpoint(values: Any, workspace: Workspace) -> Any:
    """What an endpoint is asked, as whom and how often, and what comes of it; pauses are counted, not waited for."""
    clock = _Clock()
    workspace.patch.setattr("sartor.inference.endpoint_client.time.sleep", clock.sleep)
    workspace.patch.setattr(RequestThrottle.__init__, "__defaults__", (0, 0, lambda: clock.now, clock.sleep))
    workspace.patch.setenv("PROBE_KEY", "secret")
    options = {"model": "m", "pause_s": 0.5, **values}
    failures = options.pop("failures", 0)
    with serving(EndpointServer(lambda body, times: "503" if times <= failures else "")) as server:
        options.setdefault("url", server.url)
        chosen = load(Endpoint, options)
        teacher = chosen.open(lambda line: None)
        questions = [TeacherQuestion((("user", f"question {index}"),), seed=index) for index in range(3)]
        cache = AnswerCache(teacher, workspace.folder(), chosen.price)
        try:
            answers = [cache.answer(question).text for question in questions]
        except sartor.SartorError as error:
            answers = [type(error).__name__]
        bodies = [json.loads(body)["model"] for body in server.asked]
        headers = [each.get("Authorization", "") for each in server.headers]
        pauses = [clock.slept > limit_s for limit_s in (6.0, 50.0)]  # they are drawn around what is set
        return answers, bodies, headers, len(server.times), pauses, cache.spent.cost, teacher.at_once


def _failing(values: Any, workspace: Workspace) -> Any:
    return _endpoint({**values, "failures": 2}, workspace)


def _price(values: Any, workspace: Workspace) -> Any:
    return _endpoint({"price": {"input": 1000.0, **values}}, workspace)


def _silent(values: Any, workspace: Workspace) -> Any:
    """Requests to an endpoint that is silent for 0.6 s at its first question."""
    with serving(EndpointServer(lambda body, times: "silent" if times == 1 else "")) as server:
        options = load(Endpoint, {"url": server.url, "model": "m", "pause_s": 0.01, "tries": 1, **values})
        teacher = options.open(lambda line: None)
        try:
            return teacher.answer(TeacherQuestion((("user", "question"),))).text
        except sartor.SartorError as error:
            return error.problem.replace(server.url, "")


TEACHER_PROBES = (
    *probes_of("Fake", _fake, {"at_once": (1, 3)}),
    *probes_of("Fake", _licensed("fake"), {"licence": ("", "LicenseRef-teacher")}),
    *probes_of("LocalTeacherOptions", _local, {"base": ("tiny", "nowhere"), "at_once": (4, 2)}, may_refuse=True),
    *probes_of("LocalTeacherOptions", _licensed("local"), {"licence": ("", "LicenseRef-teacher")}),
    *probes_of(
        "Endpoint",
        _endpoint,
        {
            "model": ("m", "n"),
            "key_env": ("", "PROBE_KEY"),
            "at_once": (4, 2),
            "requests_per_minute": (0, 1),
            "tokens_per_minute": (0, 600),
            "price": ({"input": 0.0}, {"input": 1000.0}),
        },
    ),
    *probes_of("Endpoint", _failing, {"tries": (6, 1), "pause_s": (0.5, 2.0)}),
    *probes_of("Endpoint", _silent, {"timeout_s": (5.0, 0.1)}),
    *probes_of(
        "Endpoint",
        _licensed("endpoint", url="http://127.0.0.1:9/v1", model="m"),
        {"licence": ("", "LicenseRef-teacher")},
    ),
    Probe("Endpoint.url", ({}, {"url": "http://127.0.0.1:9/v1"}), _endpoint),
    *probes_of("Price", _price, {"input": (1000.0, 2000.0), "output": (0.0, 1000.0), "most": (0.0, 1e-9)}),
)

PROBES: tuple[Probe, ...] = (*WAY_PROBES, *with_marks(RUN_PROBES, repeats=False), *TEACHER_PROBES)
