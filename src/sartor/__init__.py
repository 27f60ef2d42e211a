"""Sartor tailors an open foundation model to a person's own data, and proves what it made.

    import sartor

    sartor.curate("curate.yaml", out="data/faq")          # sources -> Dataset
    sartor.plan("tune.yaml")                              # expected cost, before it is spent
    sartor.tune("tune.yaml", out="adapters/faq")          # Dataset -> Adapter
    sartor.evaluate("adapters/faq")                       # Adapter -> Report
    sartor.release("adapters/faq", name="faq", version="1.0", key="keys")
    reply = sartor.ask("adapters/faq-1.0", "What does delivery cost?").reply
    sartor.trace("adapters/faq-1.0", "What does delivery cost?", reply)  # the training rows behind it

Names are resolved at their first use, so `import sartor` loads neither torch nor pyarrow.
"""

from __future__ import annotations

from typing import Any

from sartor.core.artifacts import offer_model_loader
from sartor.core.encoder_registry import register_encoder, register_encoder_directory
from sartor.core.lazy_import import import_module
from sartor.synthesize.teacher import offer_local, offer_speech
from sartor.trace.served_replies import offer_receipt_check

__version__ = "0.1.0"

_NAMES = {
    # verbs
    "ablate": "sartor.trace.ablation:ablate",
    "allow_personal": "sartor.learn.user_data:allow_personal",
    "check_ablation": "sartor.trace.ablation_proof:check_ablation",
    "check_personal_proof": "sartor.learn.deletion_proof:check_proof",
    "fix": "sartor.learn.fix:fix",
    "forget_personal": "sartor.learn.user_erasure:forget_personal",
    "list_personal": "sartor.learn.user_data:list_personal",
    "show": "sartor.quickstart.show:show",
    "show_personal": "sartor.learn.user_data:show_personal",
    "tune_personal": "sartor.learn.personal_tuning:tune_personal",
    "add_agent": "sartor.serving.commands.agent_commands:add_agent",
    "agent_events": "sartor.serving.commands.agent_commands:agent_events",
    "ask": "sartor.serving.commands.ask_release:ask",
    "ask_team": "sartor.serving.commands.ask_team:ask_team",
    "bias": "sartor.curate.bias_report:bias",
    "calibrate_trace": "sartor.trace.calibration:calibrate_trace",
    "chat": "sartor.quickstart.chat:chat",
    "compare_costs": "sartor.tune.cost_comparison:compare_costs",
    "curate": "sartor.curate",
    "dedup": "sartor.curate.dedup.dedup_files:dedup",
    "demo": "sartor.demo",
    "doctor": "sartor.quickstart.doctor:doctor",
    "drain_agent": "sartor.serving.commands.agent_commands:drain_agent",
    "edge_add": "sartor.edge.owner_commands:add",
    "edge_ask": "sartor.edge.runtime.ask_device:ask",
    "edge_confirm": "sartor.edge.device_commands:confirm",
    "edge_fleet": "sartor.edge.fleet_overview:fleet_overview",
    "edge_forget": "sartor.edge.owner_commands:forget",
    "edge_halt": "sartor.edge.publisher_commands:halt",
    "edge_keygen": "sartor.edge.publisher_commands:keygen",
    "edge_publish": "sartor.edge.publisher_commands:publish",
    "edge_refresh": "sartor.edge.publisher_commands:refresh",
    "edge_rollback": "sartor.edge.device_commands:rollback",
    "edge_rotate": "sartor.edge.publisher_commands:rotate",
    "edge_start": "sartor.edge.device_commands:start",
    "edge_status": "sartor.edge.device_commands:status",
    "edge_sync": "sartor.edge.device_commands:sync",
    "edge_tune": "sartor.edge.owner_commands:tune",
    "edge_undo": "sartor.edge.owner_commands:undo",
    "edge_verify": "sartor.edge.device_commands:verify",
    "edge_watch": "sartor.edge.publisher_commands:watch",
    "edge_widen": "sartor.edge.publisher_commands:widen",
    "edge_withdraw": "sartor.edge.publisher_commands:withdraw",
    "evaluate": "sartor.evaluate",
    "export": "sartor.release.export.export:export",
    "federate_client": "sartor.federate.flower.flower_client:join_rounds",
    "federate_coordinator": "sartor.federate.flower.flower_coordinator:coordinate",
    "federate_keygen": "sartor.federate.secure.identities:keygen",
    "federate_simulate": "sartor.federate.tuning.simulation:simulate",
    "index": "sartor.core.catalogue:index",
    "init": "sartor.quickstart.init:init",
    "inspect": "sartor.models.base_inspection:inspect",
    "install": "sartor.core.assets:install",
    "keygen": "sartor.core.signing:keygen",
    "list_agents": "sartor.serving.commands.agent_commands:list_agents",
    "list_feedback": "sartor.serving.commands.agent_commands:list_feedback",
    "list_keys": "sartor.serving.api_keys:list_keys",
    "make_key": "sartor.serving.api_keys:make_key",
    "open": "sartor.core.artifacts:open_artifact",
    "open_items": "sartor.curate.review.review_store:open_items",
    "open_voice": "sartor.media.speech.tts_engines:open_voice",
    "parse_grid": "sartor.tune.sweep:parse_grid",
    "plan": "sartor.tune.plan:plan",
    "plan_tailor": "sartor.quickstart.tailor:plan_tailor",
    "promote_agent": "sartor.serving.commands.agent_commands:promote_agent",
    "read_report": "sartor.evaluate.report_view:read_report",
    "release": "sartor.release",
    "report_findings": "sartor.evaluate.report_findings:report_findings",
    "remove_agent": "sartor.serving.commands.agent_commands:remove_agent",
    "remove_feedback": "sartor.serving.commands.agent_commands:remove_feedback",
    "remove_keys": "sartor.serving.api_keys:remove_keys",
    "repair_agent": "sartor.serving.commands.agent_commands:repair_agent",
    "reseal_registry": "sartor.serving.commands.agent_commands:reseal_registry",
    "replay_plans": "sartor.serving.commands.plan_replay:replay_plans",
    "rethreshold": "sartor.curate.rethreshold:rethreshold",
    "retrain": "sartor.learn.retrain:retrain",
    "retrain_due": "sartor.learn.triggers:list_due",
    "retrain_watch": "sartor.learn.triggers:watch",
    "review_add": "sartor.curate.review.review_commands:review_add",
    "review_agreement": "sartor.curate.review.review_commands:review_agreement",
    "review_apply": "sartor.curate.review.review_commands:review_apply",
    "review_counts": "sartor.curate.review.review_commands:review_counts",
    "review_decide": "sartor.curate.review.review_commands:review_decide",
    "review_export": "sartor.curate.review.review_commands:review_export",
    "review_import": "sartor.curate.review.review_commands:review_import",
    "review_list": "sartor.curate.review.review_commands:review_list",
    "review_sample": "sartor.curate.review.review_commands:review_sample",
    "review_show": "sartor.curate.review.review_commands:review_show",
    "revoke": "sartor.core.lineage.revocation:revoke",
    "revoke_release": "sartor.core.revoked_releases:revoke_release",
    "revoke_key": "sartor.serving.api_keys:revoke_key",
    "rollback_agent": "sartor.serving.commands.agent_commands:rollback_agent",
    "say_many": "sartor.media.speech.batch_synthesis:say_many",
    "schema": "sartor.quickstart.yaml_schemas:schema",
    "schema_names": "sartor.quickstart.yaml_schemas:schema_names",
    "serve": "sartor.serving.http.startup:serve",
    "serve_adapter": "sartor.serving.commands.serve_adapter:serve_adapter",
    "speaking": "sartor.serving.commands.spoken_reply:speaking",
    "spoken": "sartor.media.speech.text_normalization:spoken",
    "preview": "sartor.quickstart.preview:preview",
    "preview_recipe": "sartor.quickstart.preview:preview_recipe",
    "prune": "sartor.core.assets:prune",
    "pull": "sartor.release.hub.push:pull",
    "push": "sartor.release.hub.push:push",
    "prepare_trace": "sartor.trace.prepare:prepare_trace",
    "prove": "sartor.synthesize.synthetic_lift:prove",
    "score_rows": "sartor.trace.score_matrix:score_rows",
    "sweep": "sartor.tune.sweep:sweep",
    "synthesize": "sartor.synthesize",
    "tailor": "sartor.quickstart.tailor:tailor",
    "team_overview": "sartor.serving.commands.team_overview:team_overview",
    "trace": "sartor.trace",
    "track": "sartor.tune.trackers:track",
    "training_summary": "sartor.core.lineage.training_summary:training_summary",
    "tune": "sartor.tune",
    "validate": "sartor.synthesize.validate.validation:validate",
    "verify": "sartor.release.release:verify",
    "verify_receipt": "sartor.serving.commands.receipt_verification:verify_receipt",
    # nouns
    "Adapter": "sartor.core.artifacts:Adapter",
    "Artifact": "sartor.core.artifacts:Artifact",
    "ClientOptions": "sartor.federate.flower.flower_client:ClientOptions",
    "Clip": "sartor.media.speech.batch_synthesis:Clip",
    "CoordinatorOptions": "sartor.federate.flower.flower_coordinator:CoordinatorOptions",
    "Dataset": "sartor.core.artifacts:Dataset",
    "DedupOptions": "sartor.curate.dedup.dedup_files:DedupOptions",
    "CurateRecipe": "sartor.curate.recipe:CurateRecipe",
    "DeviceBudget": "sartor.edge.tuning.budgeted_tuning:DeviceBudget",
    "DeviceOptions": "sartor.edge.device_commands:DeviceOptions",
    "Drop": "sartor.core.records:Drop",
    "Example": "sartor.core.records:Example",
    "EnergyPolicy": "sartor.edge.tuning.energy_policy:EnergyPolicy",
    "Expiry": "sartor.edge.update.tuf_roles:Expiry",
    "ExportOptions": "sartor.release.export.export:ExportOptions",
    "FederateRecipe": "sartor.federate.recipe:FederateRecipe",
    "FederateShards": "sartor.federate.tuning.client_shards:Shards",
    "FixOptions": "sartor.learn.fix:FixOptions",
    "FleetPolicy": "sartor.edge.update.fleet_monitor:FleetPolicy",
    "GateFile": "sartor.release.gate:GateFile",
    "Message": "sartor.core.records:Message",
    "Opinion": "sartor.curate.review.review_commands:Opinion",
    "Origin": "sartor.core.records:Origin",
    "Part": "sartor.core.records:Part",
    "PersonalOptions": "sartor.learn.personal_options:PersonalOptions",
    "PersonOptions": "sartor.edge.owner_commands:PersonOptions",
    "Question": "sartor.serving.commands.ask_types:AskPrompt",
    "Recipe": "sartor.tune.recipe:Recipe",
    "Release": "sartor.core.artifacts:Release",
    "Report": "sartor.core.artifacts:Report",
    "ReviewRule": "sartor.curate.review.review_store:ReviewPolicy",
    "Sampling": "sartor.inference.engine:Sampling",
    "SartorError": "sartor.core.errors:SartorError",
    "SynthesizeRecipe": "sartor.synthesize.recipe:SynthesizeRecipe",
    "TrainingStep": "sartor.tune.training_log:TrainingStep",
    "Team": "sartor.serving.team_config:Team",
    "ValidateOptions": "sartor.synthesize.validate.types:ValidateOptions",
    "Waiver": "sartor.release.release:Waiver",
    "Wishes": "sartor.learn.run_record:RetrainOptions",
    # functions that read or describe them
    "assets": "sartor.core.assets:entries",
    "describe_steps": "sartor.curate.steps:lines",
    "load_curate_recipe": "sartor.curate.pipeline:load_recipe",
    "load_federate_recipe": "sartor.federate.recipe:load",
    "load_validate_options": "sartor.synthesize.validate.validation:load_options",
    "load_recipe": "sartor.tune.recipe:load",
    "load_synthesize_recipe": "sartor.synthesize.synthesis:load_recipe",
    "options": "sartor.core.config:describe",
    "read_drops": "sartor.core.parquet_io:read_drops",
    "read_examples": "sartor.core.parquet_io:read_examples",
}

# encoders that `curate` can request
register_encoder("tfidf", lambda: import_module("sartor.text.encoders").Tfidf())
register_encoder("minilm", lambda: import_module("sartor.models.sentence_encoder").MiniLM())
register_encoder_directory(
    lambda path: import_module("sartor.text.encoders").fits(path),
    lambda path: import_module("sartor.text.encoders").StaticEncoder(path),
)
register_encoder_directory(
    lambda path: (path / "config.json").is_file(),
    lambda path: import_module("sartor.models.sentence_encoder").SentenceEncoder(path),
)

# the local teacher that writes synthetic rows, and the speech synthesis that speaks them
offer_local(
    lambda base, at_once, notice: import_module("sartor.synthesize.local_teacher").LocalTeacher(base, at_once, notice)
)
offer_speech(
    lambda texts, voice, speed, folder: import_module("sartor.media.speech.batch_synthesis").speak_to_files(
        texts, voice, speed, folder
    )
)

# how an opened Adapter becomes a model
offer_model_loader(
    lambda adapter, **options: import_module("sartor.serving.commands.loaded_adapter").load_adapter(adapter, **options)
)

# how the words of a traced reply are compared with its receipt
offer_receipt_check(
    lambda file, messages, reply, team: import_module(
        "sartor.serving.commands.receipt_verification"
    ).check_served_reply(file, messages, reply, team)
)

__all__ = sorted(_NAMES)  # noqa: PLE0605


def __getattr__(name: str) -> Any:
    if name not in _NAMES:
        raise AttributeError(f"module 'sartor' has no attribute {name!r}")
    module, _, attribute = _NAMES[name].partition(":")
    imported_module = import_module(module)
    return getattr(imported_module, attribute) if attribute else imported_module


def __dir__() -> list[str]:
    return [*__all__, "__version__"]
