"""Probes of tuning: the weights that two short runs on a tiny base end with, what they log, and what a plan foresees."""

from __future__ import annotations

import json
import os
import shutil
import threading
from pathlib import Path
from typing import Any

import torch

import sartor
from endpoint_server import EndpointServer, serving
from media_files import png, sound
from option_probes import Observer, Probe, Workspace, probes_of
from sample_data import ROWS, recipe_on, write_jsonl
from sartor.core import config
from sartor.core.artifacts import open_artifact
from sartor.core.filesystem import file_digest
from sartor.core.licences import compliance
from sartor.core.sketch_matrix import SketchMatrix
from sartor.inference.verifiers.regular_expression import RegexVerifier
from sartor.inference.verifiers.submission import Submission
from sartor.models.base import open_base
from sartor.tune import model_setup
from sartor.tune.checkpoint_selection import CheckpointSelection
from sartor.tune.cost_model import BatchLoad, TimedBatch, TimingProbe, shape_of
from sartor.tune.methods.targets import Targets
from sartor.tune.plan import TuningPlan
from sartor.tune.recipe import Grpo, load

PAIRS = [
    {"prompt": f"switch {room} {word}", "chosen": f"{word}:{room}", "rejected": f"{room}, {word}"}
    for word in ("on", "off")
    for room in ("kitchen", "hall", "attic", "garage", "patio")
]
RATED = [
    {"prompt": pair["prompt"], "completion": pair[side], "rating": rating}
    for pair in PAIRS
    for side, rating in (("chosen", 1), ("rejected", -0.5))
]
TALK = [{"prompt": f"good morning {index}", "completion": f"good morning to you {index}"} for index in range(8)]
PLAIN = [{"prompt": row["messages"][0]["content"], "completion": row["messages"][1]["content"]} for row in ROWS]


def _media_rows(folder: Path) -> list[dict[str, Any]]:
    rows = []
    for index in range(6):
        (folder / f"{index}.png").write_bytes(png(20 + 30 * index))
        (folder / f"{index}.wav").write_bytes(sound(0.3, pitch=200.0 + 60 * index))
        for kind, name in (("image", f"{index}.png"), ("audio", f"{index}.wav")):
            content = [{"type": kind, kind: name}, {"type": "text", "text": "what is it?"}]
            rows.append(
                {
                    "messages": [
                        {"role": "user", "content": content},
                        {"role": "assistant", "content": f"{kind} {index}"},
                    ]
                }
            )
    return rows


THOUGHTS = [
    {
        "messages": [
            *({"role": "system", "content": "be short"}, {"role": "user", "content": f"switch {index}"}),
            {"role": "assistant", "content": f"on {index}", "reasoning_content": f"the light {index} was off"},
        ]
    }
    for index in range(12)
]

DATASETS: dict[str, Any] = {
    "switches": (lambda folder: ROWS, 0.25),
    "whole": (lambda folder: ROWS, 0.0),
    "talk": (lambda folder: TALK, 0.0),
    "pairs": (lambda folder: [*PAIRS, *PLAIN[:4]], 0.25),
    "rated": (lambda folder: [*RATED, *PLAIN[:4]], 0.25),
    "media": (_media_rows, 0.25),
    "thoughts": (lambda folder: THOUGHTS, 0.25),
}


def _shared(workspace: Workspace) -> Path:
    """The folder of what all probes of a session use."""
    folder: Path = workspace.fixture("tmp_path_factory").getbasetemp() / "tuning-probes"
    folder.mkdir(exist_ok=True)
    return folder


def dataset(name: str, workspace: Workspace) -> Path:
    """A Dataset, curated once a session."""
    out = _shared(workspace) / name
    if not out.is_dir():
        folder = _shared(workspace) / f"{name}-rows"
        folder.mkdir()
        make_rows, eval_fraction = DATASETS[name]
        source = {"path": str(write_jsonl(folder / "rows.jsonl", make_rows(folder))), "licence": "CC-BY-4.0"}
        sartor.curate({"sources": [source], "split": {"eval_fraction": eval_fraction}, "workers": 1}, out)
    return out


def _placed(value: Any, workspace: Workspace) -> Any:
    """A value of a recipe with `dataset:NAME`, `base`, `adapter` and towers in it replaced by paths."""
    if isinstance(value, dict):
        return {key: _placed(inner, workspace) for key, inner in value.items()}
    if not isinstance(value, str):
        return value
    if value.startswith("dataset:"):
        return str(dataset(value.removeprefix("dataset:"), workspace))
    names = ("BASE", "OTHER BASE", "OTHER TOKENIZER", "THINKING BASE", "ADAPTER", "CLIP", "WHISPER")
    return str(_made(value, workspace)) if value in names else value


def _made(name: str, workspace: Workspace) -> Path:
    if name == "BASE":
        return Path(workspace.fixture("tiny_base"))
    folder = _shared(workspace) / name.lower().replace(" ", "-")
    if folder.is_dir():
        return folder
    import tiny
    import tool_prompts
    from tiny_towers import tiny_clip, tiny_whisper

    if name == "ADAPTER":
        sartor.tune(_recipe({"budget": {"updates": 1}}, workspace), folder, show=False)
        return folder
    makers: dict[str, Any] = {
        "OTHER BASE": lambda: tiny.write_base(folder, intermediate_size=96),
        "OTHER TOKENIZER": lambda: tiny.write_base(folder, texts=["switch on and off, up and down"] * 8),
        "THINKING BASE": lambda: tiny.write_base(folder, template=tool_prompts.THINKING),
        "CLIP": lambda: tiny_clip(folder),
        "WHISPER": lambda: tiny_whisper(folder),
    }
    return Path(makers[name]())


def _recipe(changes: dict[str, Any], workspace: Workspace) -> dict[str, Any]:
    recipe = recipe_on(dataset("switches", workspace), workspace.fixture("tiny_base"))
    recipe = {**recipe, "method": {"rank": 4, "alpha": 16}, "budget": {"updates": 2}, "evaluations": 1}
    for part, value in changes.items():
        placed = _placed(value, workspace)
        is_merged = isinstance(placed, dict) and isinstance(recipe.get(part), dict) and part != "budget"
        if part == "method" and isinstance(placed, dict) and placed.get("kind", "lora") != "lora":
            is_merged = False  # it has other options
        recipe[part] = {**recipe[part], **placed} if is_merged else placed
    return recipe


def _key(recipe: dict[str, Any]) -> str:
    """The recipe with its defaults: what says the same is one key."""
    return json.dumps(config.dump(load(recipe)), sort_keys=True)


_runs: dict[str, Any] = {}


def _tuned(changes: dict[str, Any], workspace: Workspace) -> Any:
    """Weights, losses, licence and permitted uses of a run; runs of one recipe are made once, since the probes of weights show that they repeat."""
    recipe = _recipe(changes, workspace)
    key = _key(recipe)
    if key not in _runs:
        workspace.patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
        out = workspace.folder() / "adapter"
        sartor.tune(recipe, out, show=False)
        manifest = open_artifact(out).manifest
        lines = [json.loads(line) for line in (out / "log.jsonl").read_text().splitlines()]
        losses = [(line.get("loss"), line.get("eval_loss")) for line in lines]
        files = {name: file_digest(out / name) for name in manifest["files"] if name.endswith(".safetensors")}
        _runs[key] = files, losses, manifest["licence"], compliance.permitted(compliance.made_from(manifest))
    return _runs[key]


def _chosen(values: Any, workspace: Workspace) -> Any:
    """The weights of a run whose replies are right at the first of two evaluations, and wrong at the second."""

    def score_replies(selection: CheckpointSelection, model: Any) -> list[float]:
        return [float(not selection.candidates)] * len(selection.rows)

    workspace.patch.setattr(CheckpointSelection, "score_replies", score_replies)
    return _tuned({"evaluations": 2, **values}, workspace)


_plans: dict[str, TuningPlan] = {}


def _run(probe: TimingProbe, rows: Any, *, warm_up: bool = False) -> float:
    """Take a microsecond a token for a micro-batch that is not run."""
    load = probe.load_of(rows)
    if not warm_up:
        probe.samples.append(TimedBatch(load, 1e-6 * load.tokens, None))
    return 1e-6 * load.tokens


def plan_of(recipe: dict[str, Any], workspace: Workspace) -> TuningPlan:
    """Return the plan of a recipe, made once, on a machine on which every token takes the same time."""
    key = _key(recipe)
    if key not in _plans:
        workspace.patch.setattr(TimingProbe, "run", _run)
        workspace.patch.setattr("sartor.tune.plan.forecast_evaluation", lambda model, chat, rows, count: None)
        _plans[key] = sartor.plan(recipe)
    return _plans[key]


def _planned(changes: dict[str, Any], workspace: Workspace) -> Any:
    """What a plan foresees, but for time and memory, which are measured."""
    plan = plan_of(_recipe(changes, workspace), workspace).as_json()
    return {name: plan[name] for name in ("tokens", "trainable", "path", "left_out", "refusals", "updates")}


def _memory(changes: dict[str, Any], workspace: Workspace) -> Any:
    """What a micro-batch of 256 tokens holds for the backward pass, by the model of memory."""
    import tiny

    recipe = load(_recipe(changes, workspace))
    return shape_of(tiny.model(num_hidden_layers=8), recipe).activation_bytes(BatchLoad(256, 2048, 64))


def _part(part: str, observe: Any, **base: Any) -> Observer:
    """Observe by options of one part of the recipe. base: other parts, and what of the part both values have."""

    def observed(values: Any, workspace: Workspace) -> Any:
        return observe({**base, part: {**base.get(part, {}), **values}}, workspace)

    return observed


def _targets(observe: Any, **base: Any) -> Observer:
    return lambda values, workspace: observe({**base, "method": {"targets": values}}, workspace)


def _saved(values: Any, workspace: Workspace) -> Any:
    """How many checkpoints there are after each update of five."""
    from sartor.tune import checkpoint

    counts = []
    real_save = checkpoint.save

    def save(folder: Path, *arguments: Any) -> Any:
        saved = real_save(folder, *arguments)
        counts.append(sorted(each.name for each in folder.iterdir()))
        return saved

    workspace.patch.setattr(checkpoint, "save", save)
    workspace.patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    changes = {"budget": {"updates": 5}, "checkpoints": {"every_minutes": 0.0, **values}}
    sartor.tune(_recipe(changes, workspace), workspace.folder() / "adapter", show=False)
    workspace.patch.undo()
    return counts


def _cached(values: Any, workspace: Workspace) -> Any:
    """How many features of pictures are on the disk after a run on a composed base."""
    home = workspace.folder()
    workspace.patch.setenv("SARTOR_HOME", str(home))
    workspace.patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    sartor.tune(
        _recipe({**COMPOSED, "budget": {"updates": 1}, "compute": values}, workspace),
        workspace.folder() / "adapter",
        show=False,
    )
    return sum(len(files) for folder, _, files in os.walk(home) if "features" in folder)


def _native_parts(values: Any, workspace: Workspace) -> Any:
    """The modules of a native multi-modal base that a recipe's targets name."""
    import tiny_native

    folder = _shared(workspace) / "llava"
    if not folder.is_dir():
        tiny_native.write("llava", folder)
    base = open_base(str(folder), bits=32, device=torch.device("cpu"))
    return sorted(model_setup._parts(base, Targets(**values)).linear)


def _from_hub(values: Any, workspace: Workspace) -> Any:
    """The plan on a base of a hub that is played by its cache: a model with two revisions of unlike sizes."""
    hub = workspace.folder() / "hub"
    cached = hub / "models--owner--model"
    (cached / "refs").mkdir(parents=True)
    for commit, branch, base in (("1" * 40, "main", "BASE"), ("2" * 40, "other", "OTHER BASE")):
        shutil.copytree(_made(base, workspace), cached / "snapshots" / commit)
        (cached / "refs" / branch).write_text(commit)
    workspace.patch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(hub))
    return _planned({"base": {"name": "owner/model", **values}}, workspace)


def _recorded(values: Any, workspace: Workspace) -> Any:
    """How many rows have a sketch of their gradient after a run."""
    home = workspace.folder()
    workspace.patch.setenv("SARTOR_HOME", str(home))
    workspace.patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    sartor.tune(_recipe({"trace": values}, workspace), workspace.folder() / "adapter", show=False)
    return [int(SketchMatrix.open(folder).written().sum()) for folder in home.glob("trace/*/recorded")]


def _tracked(values: Any, workspace: Workspace) -> Any:
    """Which files a run leaves below its working directory, without times and numbers of processes in their names."""
    folder = workspace.folder()
    workspace.patch.chdir(folder)
    workspace.patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    sartor.tune(_recipe({"track": values}, workspace), folder / "adapter", show=False)
    kept = [file.relative_to(folder) for file in folder.rglob("*") if "adapter" not in file.parts]
    return sorted({(*file.parts[:-1], file.name.partition(".")[0].partition("-")[0]) for file in kept})


def _taught(values: Any, workspace: Workspace) -> Any:
    """What an endpoint that teaches is asked, as whom and how much at once, and what comes of it."""
    workspace.patch.setattr("sartor.inference.endpoint_client.time.sleep", lambda seconds: None)
    workspace.patch.setattr("sartor.tune.trainer.plot_losses", lambda lines, file: file.touch())
    workspace.patch.setenv("PROBE_KEY", "secret")
    lock, busy, most = threading.Lock(), [0], [0]

    def completion(body: dict[str, Any]) -> dict[str, Any]:
        with lock:
            busy[0] += 1
            most[0] = max(most[0], busy[0])
        threading.Event().wait(0.03)
        with lock:
            busy[0] -= 1
        tokens = len(body["prompt"])
        scores = {"token_logprobs": [None, *[-1.0] * tokens], "top_logprobs": [None, *[{"a": -1.0}] * tokens]}
        return {"choices": [{"logprobs": scores}]}

    fails_first = iter(["503"])
    with serving(EndpointServer(lambda body, times: next(fails_first, ""))) as server:
        server.completion = completion
        options = {"url": "SERVER", "model": "m", **_placed(values, workspace)}
        options["url"] = server.url if options["url"] == "SERVER" else options["url"]
        changes = {"objective": {"kind": "distil", "teacher": options}, "budget": {"updates": 1}}
        out, outcome = workspace.folder() / "adapter", ""
        try:
            sartor.tune(_recipe(changes, workspace), out, show=False)
            outcome = open_artifact(out).manifest["licence"]
        except sartor.SartorError as error:
            outcome = error.kind
        bodies = [json.loads(body) for body in server.asked]
        asked = sorted({(body["model"], tuple(body["prompt"])) for body in bodies})
        keys = sorted({headers.get("Authorization", "") for headers in server.headers})
    return asked, keys, most[0] > 1, outcome


def _rewarded(changes: dict[str, Any], workspace: Workspace) -> Any:
    """The weights of a run of grpo with rewards that a tiny base can learn from: references, and letters `o`."""

    def rewards(self: RegexVerifier, items: list[Submission]) -> list[float]:
        return [1.0 if item.reply == item.reference else item.reply.count("o") / 20 for item in items]

    workspace.patch.setattr(RegexVerifier, "rewards", rewards)
    return _tuned(changes, workspace)


CODE = "import socket, time\ntime.sleep(0.4)\nreached = True\n"
CODE += "with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as opened:\n    try:\n        opened.connect(('127.0.0.1', 9))\n"
CODE += "    except OSError:\n        reached = False\n"
SUBMISSIONS = (
    Submission("json", '{"a": 1, "b": 3}', '{"a": 1, "b": 2}'),
    Submission("number", "110", "100"),
    Submission(
        "call",
        '{"name": "f", "arguments": {"x": 2}}',
        '{"name": "f", "arguments": {"x": 1}}',
        tools=({"type": "function", "function": {"name": "f", "parameters": {}}},),
    ),
    Submission("code", CODE, "assert True\nassert reached"),
)


def _verified(kind: str, **base: Any) -> Observer:
    """Observe the rewards of a few replies by a verifier; its module lies in the folder of the test."""

    def observed(values: Any, workspace: Workspace) -> Any:
        code = "".join(f"    {line}\n" for line in CODE.splitlines())
        (workspace.path / "probed.py").write_text(
            f"def code(reply, reference, prompt):\n{code}    return reached\n\ndef half(*arguments):\n    return 0.5\n"
        )
        workspace.patch.chdir(workspace.path)
        options = {"kind": kind, **base, **values}
        return config.load(Grpo, {"verifier": options}).verifier.rewards(SUBMISSIONS)

    return observed


TOO_LONG = {"max_length_tokens": 42}
GRPO: dict[str, Any] = {
    "kind": "grpo",
    "verifier": {"kind": "regex", "pattern": "."},
    "group_size": 4,
    "max_reply_tokens": 6,
}
DISTIL: dict[str, Any] = {"kind": "distil", "teacher": "ADAPTER"}
SAMPLED: dict[str, Any] = {**DISTIL, "on_policy": 1.0, "max_reply_tokens": 6}
SWITCHES_AND_TALK = {"path": "dataset:switches", "rehearsal": {"path": "dataset:talk", "fraction": 0.5}}
PAIRS_AND_TALK = {"path": "dataset:pairs", "rehearsal": {"path": "dataset:talk", "fraction": 0.5}}
COMPOSED: dict[str, Any] = {
    "base": {"text": "BASE", "image": "CLIP"},
    "data": "dataset:media",
    "optimizer": {"learning_rate": 1e-2, "batch_tokens": 64},
}

TUNE_PROBES = (
    *probes_of(
        "Recipe",
        _tuned,
        {
            "data": ("dataset:switches", "dataset:whole"),
            "method": ({"rank": 4}, {"rank": 2}),
            "budget": ({"updates": 2}, {"updates": 3}),
            "optimizer": ({"learning_rate": 1e-2}, {"learning_rate": 1e-3}),
            "evaluations": (1, 2),
            "base": ("BASE", "OTHER BASE"),
        },
    ),
    *probes_of("Recipe", _chosen, {"weights": ("last", "best")}),
    Probe("Recipe.objective", ({"data": "dataset:pairs"}, {"data": "dataset:pairs", "objective": "dpo"}), _tuned),
    Probe("Recipe.compute", ({}, {"compute": {"path": "general"}}), _planned),
    Probe("Recipe.trace", ({}, {"features": True}), _recorded),
    Probe("Recipe.track", ({}, {"to": "tensorboard"}), _tracked),
    Probe("Tracking.to", ({}, {"to": "tensorboard"}), _tracked),
    Probe("Tracking.folder", ({"to": "tensorboard"}, {"to": "tensorboard", "folder": "runs"}), _tracked),
    Probe("Recipe.checkpoints", ({"keep": 1}, {"keep": 3}), _saved),
    *probes_of(
        "Data",
        _part("data", _tuned),
        {
            "path": ("dataset:switches", "dataset:whole"),
            "eval_rows": (64, 2),
            "rehearsal": ({"path": ""}, {"path": "dataset:talk"}),
        },
    ),
    *probes_of("Data", _part("data", _tuned, data={"path": "dataset:whole"}), {"eval_fraction": (0.1, 0.5)}),
    *probes_of("Data", _part("data", _planned, data=TOO_LONG), {"too_long_fraction": (0.1, 1.0)}),
    *probes_of("Data", _part("data", _planned, data={"path": "dataset:thoughts"}), {"reasoning": ("last", "drop")}),
    *probes_of("Data", _part("data", _planned, base="THINKING BASE"), {"empty_think": ("keep", "drop")}),
    Probe("Rehearsal.path", ({}, {"data": {"rehearsal": {"path": "dataset:talk"}}}), _tuned),
    Probe(
        "Rehearsal.fraction",
        (
            {"data": {"rehearsal": {"path": "dataset:talk"}}},
            {"data": {"rehearsal": {"path": "dataset:talk", "fraction": 0.6}}},
        ),
        _tuned,
    ),
    Probe(
        "Rehearsal.loss",
        (
            {"data": {"rehearsal": {"path": "dataset:talk"}}},
            {"data": {"rehearsal": {"path": "dataset:talk", "loss": "kl"}}},
        ),
        _tuned,
    ),
    Probe(
        "Rehearsal.weight",
        (
            {"data": {"rehearsal": {"path": "dataset:talk"}}},
            {"data": {"rehearsal": {"path": "dataset:talk", "weight": 4.0}}},
        ),
        _tuned,
    ),
    *probes_of(
        "Dpo",
        _part("objective", _tuned, data=PAIRS_AND_TALK, objective={"kind": "dpo"}),
        {"beta": (0.1, 0.5), "label_smoothing": (0.0, 0.3), "sft_weight": (0.0, 1.0), "plain_weight": (1.0, 3.0)},
    ),
    *probes_of(
        "Orpo",
        _part("objective", _tuned, data=PAIRS_AND_TALK, objective={"kind": "orpo"}),
        {"odds_weight": (0.1, 1.0), "sft_weight": (1.0, 0.2), "plain_weight": (1.0, 3.0)},
    ),
    *probes_of(
        "Simpo",
        _part("objective", _tuned, data=PAIRS_AND_TALK, objective={"kind": "simpo"}),
        {"beta": (2.0, 5.0), "margin": (1.0, 0.3), "sft_weight": (0.0, 1.0), "plain_weight": (1.0, 3.0)},
    ),
    *probes_of(
        "Kto",
        _part("objective", _tuned, data="dataset:rated", objective={"kind": "kto"}),
        {
            "beta": (0.1, 0.5),
            "desirable_weight": (1.0, 2.0),
            "undesirable_weight": (1.0, 2.0),
            "divergence": ("estimate", "none"),
            "plain_weight": (1.0, 3.0),
        },
    ),
    *probes_of(
        "Distil",
        _part("objective", _tuned, objective=DISTIL, evaluations=2),
        {
            "teacher": ("ADAPTER", "OTHER BASE"),
            "on_policy": (0.0, 1.0),
            "divergence": ("auto", "reverse"),
            "loss_temperature": (1.0, 4.0),
            "top_k": (16, 1),
            "stop_at_forgetting": (None, 100.0),
        },
    ),
    *probes_of(
        "Distil", _part("objective", _tuned, objective={**DISTIL, "divergence": "jensen"}), {"mixture": (0.5, 0.1)}
    ),
    *probes_of(
        "Distil",
        _part("objective", _tuned, objective=SAMPLED),
        {"max_reply_tokens": (6, 3), "temperature": (1.0, 0.0)},
    ),
    *probes_of(
        "Distil", _part("objective", _tuned, objective=DISTIL, data=SWITCHES_AND_TALK), {"plain_weight": (1.0, 3.0)}
    ),
    *probes_of(
        "Grpo",
        _part("objective", _rewarded, objective=GRPO),
        {"group_size": (4, 2), "max_reply_tokens": (6, 3), "temperature": (1.0, 0.5), "beta": (0.0, 5.0)},
    ),
    *probes_of(
        "Grpo",
        _part("objective", _rewarded, objective=GRPO),
        {"verifier": (GRPO["verifier"], {"kind": "numeric"})},
        may_refuse=True,
    ),
    *probes_of(
        "Grpo", _part("objective", _rewarded, objective=GRPO, data=SWITCHES_AND_TALK), {"plain_weight": (1.0, 3.0)}
    ),
    *probes_of("JsonSchemaVerifier", _verified("json_schema"), {"schema": ({"type": "object"}, {"type": "array"})}),
    *probes_of("JsonFieldsVerifier", _verified("json_fields"), {"fields": ([], ["a"])}),
    *probes_of("NumericVerifier", _verified("numeric"), {"tolerance": (0.0, 10.0), "relative": (0.0, 0.1)}),
    *probes_of("RegexVerifier", _verified("regex"), {"pattern": ("a", "b")}),
    *probes_of("ToolCallVerifier", _verified("tool_call"), {"arguments": ("equal", "valid")}),
    *probes_of("UnitTestsVerifier", _verified("unit_tests"), {"time_s": (5.0, 0.2), "network": ("none", "allowed")}),
    *probes_of(
        "EntryPointVerifier",
        _verified("python", function="probed:code"),
        {
            "function": ("probed:code", "probed:half"),
            "time_s": (5.0, 0.2),
            "network": ("none", "allowed"),
        },
        may_refuse=True,
    ),
    *probes_of(
        "TeacherEndpoint",
        _taught,
        {
            "url": ("http://127.0.0.1:9/v1", "SERVER"),
            "model": ("m", "n"),
            "tokenizer": ("", "OTHER TOKENIZER"),
            "key_env": ("", "PROBE_KEY"),
            "licence": ("", "LicenseRef-teacher"),
            "at_once": (1, 4),
            "tries": (1, 3),
        },
    ),
    *probes_of("Lora", _part("method", _planned), {"targets": ("all-linear", ["q_proj"])}),
    *probes_of("Lora", _part("method", _tuned), {"start": ("", "ADAPTER")}),
    *probes_of("Targets", _targets(_planned), {"language": (None, {"modules": ["q_proj"]})}),
    *probes_of(
        "LanguageTargets",
        _targets(
            lambda changes, workspace: _planned(
                {"method": {"targets": {"language": changes["method"]["targets"]}}}, workspace
            )
        ),
        {"modules": ("all-linear", ["q_proj"]), "layers": ("all", "top-1")},
    ),
    *probes_of("Targets", _native_parts, {"tower": ("none", "all-linear")}),
    *probes_of("Targets", _targets(_planned, **COMPOSED), {"projector": ("full", "none")}, may_refuse=True),
    *probes_of("Compute", _part("compute", _planned), {"path": ("auto", "general")}),
    *probes_of("Compute", _part("compute", _memory), {"recompute": (False, True)}),
    *probes_of("Compute", _part("compute", _tuned), {"share_prefixes": (True, False)}),
    *probes_of("Compute", _cached, {"reuse_frozen": (True, False), "cache_gb": (8.0, 0.0)}),
    *probes_of("Checkpoints", _saved, {"every_minutes": (0.0, 5.0), "keep": (2, 3)}),
    *probes_of("TraceRecording", _recorded, {"features": (False, True)}),
    *probes_of("BaseChoice", _from_hub, {"revision": ("", "other")}),
    *probes_of("BaseChoice", _part("base", _planned), {"name": ("BASE", "OTHER BASE")}),
    *probes_of("BaseChoice", _part("base", _tuned, base={"name": "BASE"}), {"bits": (32, 16)}),
    *probes_of("BaseChoice", _part("base", _tuned, base={"name": "BASE"}), {"licence": ("MIT", "Apache-2.0")}),
    *probes_of("BaseChoice", _part("base", _tuned, base={"name": "BASE"}), {"use": ([], ["research"])}),
    *probes_of("BaseChoice", _part("base", _planned), {"text": ("BASE", "OTHER BASE")}),
    *probes_of(
        "BaseChoice",
        _part("base", _planned, data="dataset:media", base={"text": "BASE"}),
        {"image": ("", "CLIP"), "audio": ("", "WHISPER")},
        may_refuse=True,
    ),
    Probe("Recipe.align", (COMPOSED, {**COMPOSED, "align": {"fraction": 0.8}}), _tuned),
    *probes_of(
        "Align",
        _part("align", _tuned, **COMPOSED, align={"fraction": 0.5}),
        {"fraction": (0.5, 0.0), "learning_rate": (1e-3, 1e-1), "later": (1.0, 3.0)},
    ),
)

# runs on composed bases, and those whose checkpoints or features are counted, take a second and more each
DEAR = (
    "Align.",
    "Recipe.align",
    "Checkpoints.",
    "Recipe.checkpoints",
    "Compute.reuse_frozen",
    "Compute.cache_gb",
    "Kto.",
    "Dpo.",
    "Orpo.",
    "Simpo.",
    "Distil.",
    "Grpo.",
    "UnitTestsVerifier.",
    "EntryPointVerifier.",
    "TeacherEndpoint.",
)
PROBES: tuple[Probe, ...] = tuple(
    probe._replace(is_slow=probe.option.startswith(DEAR), repeats=False) for probe in TUNE_PROBES
)
