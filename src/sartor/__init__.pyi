"""Public names with their signatures: written by tools/facade_stub.py from `_NAMES` in __init__.py."""

from sartor.core.artifacts import Adapter as Adapter
from sartor.core.artifacts import Artifact as Artifact
from sartor.core.artifacts import Dataset as Dataset
from sartor.core.artifacts import Release as Release
from sartor.core.artifacts import Report as Report
from sartor.core.artifacts import open_artifact as open
from sartor.core.assets import entries as assets
from sartor.core.assets import install as install
from sartor.core.assets import prune as prune
from sartor.core.catalogue import index as index
from sartor.core.config import describe as options
from sartor.core.errors import SartorError as SartorError
from sartor.core.lineage.revocation import revoke as revoke
from sartor.core.lineage.training_summary import training_summary as training_summary
from sartor.core.parquet_io import read_drops as read_drops
from sartor.core.parquet_io import read_examples as read_examples
from sartor.core.records import Drop as Drop
from sartor.core.records import Example as Example
from sartor.core.records import Message as Message
from sartor.core.records import Origin as Origin
from sartor.core.records import Part as Part
from sartor.core.revoked_releases import revoke_release as revoke_release
from sartor.core.signing import keygen as keygen
from sartor.curate.bias_report import bias as bias
from sartor.curate.dedup.dedup_files import DedupOptions as DedupOptions
from sartor.curate.dedup.dedup_files import dedup as dedup
from sartor.curate.pipeline import curate as curate
from sartor.curate.pipeline import load_recipe as load_curate_recipe
from sartor.curate.recipe import CurateRecipe as CurateRecipe
from sartor.curate.rethreshold import rethreshold as rethreshold
from sartor.curate.review.review_commands import Opinion as Opinion
from sartor.curate.review.review_commands import review_add as review_add
from sartor.curate.review.review_commands import review_agreement as review_agreement
from sartor.curate.review.review_commands import review_apply as review_apply
from sartor.curate.review.review_commands import review_counts as review_counts
from sartor.curate.review.review_commands import review_decide as review_decide
from sartor.curate.review.review_commands import review_export as review_export
from sartor.curate.review.review_commands import review_import as review_import
from sartor.curate.review.review_commands import review_list as review_list
from sartor.curate.review.review_commands import review_sample as review_sample
from sartor.curate.review.review_commands import review_show as review_show
from sartor.curate.review.review_store import ReviewPolicy as ReviewRule
from sartor.curate.review.review_store import open_items as open_items
from sartor.curate.steps import lines as describe_steps
from sartor.demo.end_to_end import demo as demo
from sartor.edge.device_commands import DeviceOptions as DeviceOptions
from sartor.edge.device_commands import confirm as edge_confirm
from sartor.edge.device_commands import rollback as edge_rollback
from sartor.edge.device_commands import start as edge_start
from sartor.edge.device_commands import status as edge_status
from sartor.edge.device_commands import sync as edge_sync
from sartor.edge.device_commands import verify as edge_verify
from sartor.edge.fleet_overview import fleet_overview as edge_fleet
from sartor.edge.owner_commands import PersonOptions as PersonOptions
from sartor.edge.owner_commands import add as edge_add
from sartor.edge.owner_commands import forget as edge_forget
from sartor.edge.owner_commands import tune as edge_tune
from sartor.edge.owner_commands import undo as edge_undo
from sartor.edge.publisher_commands import halt as edge_halt
from sartor.edge.publisher_commands import keygen as edge_keygen
from sartor.edge.publisher_commands import publish as edge_publish
from sartor.edge.publisher_commands import refresh as edge_refresh
from sartor.edge.publisher_commands import rotate as edge_rotate
from sartor.edge.publisher_commands import watch as edge_watch
from sartor.edge.publisher_commands import widen as edge_widen
from sartor.edge.publisher_commands import withdraw as edge_withdraw
from sartor.edge.runtime.ask_device import ask as edge_ask
from sartor.edge.tuning.budgeted_tuning import DeviceBudget as DeviceBudget
from sartor.edge.tuning.energy_policy import EnergyPolicy as EnergyPolicy
from sartor.edge.update.fleet_monitor import FleetPolicy as FleetPolicy
from sartor.edge.update.tuf_roles import Expiry as Expiry
from sartor.evaluate.evaluation import evaluate as evaluate
from sartor.evaluate.report_findings import report_findings as report_findings
from sartor.evaluate.report_view import read_report as read_report
from sartor.federate.flower.flower_client import ClientOptions as ClientOptions
from sartor.federate.flower.flower_client import join_rounds as federate_client
from sartor.federate.flower.flower_coordinator import CoordinatorOptions as CoordinatorOptions
from sartor.federate.flower.flower_coordinator import coordinate as federate_coordinator
from sartor.federate.recipe import FederateRecipe as FederateRecipe
from sartor.federate.recipe import load as load_federate_recipe
from sartor.federate.secure.identities import keygen as federate_keygen
from sartor.federate.tuning.client_shards import Shards as FederateShards
from sartor.federate.tuning.simulation import simulate as federate_simulate
from sartor.inference.engine import Sampling as Sampling
from sartor.learn.deletion_proof import check_proof as check_personal_proof
from sartor.learn.fix import FixOptions as FixOptions
from sartor.learn.fix import fix as fix
from sartor.learn.personal_options import PersonalOptions as PersonalOptions
from sartor.learn.personal_tuning import tune_personal as tune_personal
from sartor.learn.retrain import retrain as retrain
from sartor.learn.run_record import RetrainOptions as Wishes
from sartor.learn.triggers import list_due as retrain_due
from sartor.learn.triggers import watch as retrain_watch
from sartor.learn.user_data import allow_personal as allow_personal
from sartor.learn.user_data import list_personal as list_personal
from sartor.learn.user_data import show_personal as show_personal
from sartor.learn.user_erasure import forget_personal as forget_personal
from sartor.media.speech.batch_synthesis import Clip as Clip
from sartor.media.speech.batch_synthesis import say_many as say_many
from sartor.media.speech.text_normalization import spoken as spoken
from sartor.media.speech.tts_engines import open_voice as open_voice
from sartor.models.base_inspection import inspect as inspect
from sartor.quickstart.chat import chat as chat
from sartor.quickstart.doctor import doctor as doctor
from sartor.quickstart.init import init as init
from sartor.quickstart.preview import preview as preview
from sartor.quickstart.preview import preview_recipe as preview_recipe
from sartor.quickstart.show import show as show
from sartor.quickstart.tailor import plan_tailor as plan_tailor
from sartor.quickstart.tailor import tailor as tailor
from sartor.quickstart.yaml_schemas import schema as schema
from sartor.quickstart.yaml_schemas import schema_names as schema_names
from sartor.release.export.export import ExportOptions as ExportOptions
from sartor.release.export.export import export as export
from sartor.release.gate import GateFile as GateFile
from sartor.release.hub.push import pull as pull
from sartor.release.hub.push import push as push
from sartor.release.release import Waiver as Waiver
from sartor.release.release import release as release
from sartor.release.release import verify as verify
from sartor.serving.api_keys import list_keys as list_keys
from sartor.serving.api_keys import make_key as make_key
from sartor.serving.api_keys import remove_keys as remove_keys
from sartor.serving.api_keys import revoke_key as revoke_key
from sartor.serving.commands.agent_commands import add_agent as add_agent
from sartor.serving.commands.agent_commands import agent_events as agent_events
from sartor.serving.commands.agent_commands import drain_agent as drain_agent
from sartor.serving.commands.agent_commands import list_agents as list_agents
from sartor.serving.commands.agent_commands import list_feedback as list_feedback
from sartor.serving.commands.agent_commands import promote_agent as promote_agent
from sartor.serving.commands.agent_commands import remove_agent as remove_agent
from sartor.serving.commands.agent_commands import remove_feedback as remove_feedback
from sartor.serving.commands.agent_commands import repair_agent as repair_agent
from sartor.serving.commands.agent_commands import reseal_registry as reseal_registry
from sartor.serving.commands.agent_commands import rollback_agent as rollback_agent
from sartor.serving.commands.ask_release import ask as ask
from sartor.serving.commands.ask_team import ask_team as ask_team
from sartor.serving.commands.ask_types import AskPrompt as Question
from sartor.serving.commands.plan_replay import replay_plans as replay_plans
from sartor.serving.commands.receipt_verification import verify_receipt as verify_receipt
from sartor.serving.commands.serve_adapter import serve_adapter as serve_adapter
from sartor.serving.commands.spoken_reply import speaking as speaking
from sartor.serving.commands.team_overview import team_overview as team_overview
from sartor.serving.http.startup import serve as serve
from sartor.serving.team_config import Team as Team
from sartor.synthesize.recipe import SynthesizeRecipe as SynthesizeRecipe
from sartor.synthesize.synthesis import load_recipe as load_synthesize_recipe
from sartor.synthesize.synthesis import synthesize as synthesize
from sartor.synthesize.synthetic_lift import prove as prove
from sartor.synthesize.validate.types import ValidateOptions as ValidateOptions
from sartor.synthesize.validate.validation import load_options as load_validate_options
from sartor.synthesize.validate.validation import validate as validate
from sartor.trace.ablation import ablate as ablate
from sartor.trace.ablation_proof import check_ablation as check_ablation
from sartor.trace.calibration import calibrate_trace as calibrate_trace
from sartor.trace.prepare import prepare_trace as prepare_trace
from sartor.trace.score_matrix import score_rows as score_rows
from sartor.trace.trace import trace as trace
from sartor.tune.cost_comparison import compare_costs as compare_costs
from sartor.tune.plan import plan as plan
from sartor.tune.recipe import Recipe as Recipe
from sartor.tune.recipe import load as load_recipe
from sartor.tune.sweep import parse_grid as parse_grid
from sartor.tune.sweep import sweep as sweep
from sartor.tune.trackers import track as track
from sartor.tune.trainer import tune as tune
from sartor.tune.training_log import TrainingStep as TrainingStep

__version__: str
__all__ = [
    "Adapter",
    "Artifact",
    "ClientOptions",
    "Clip",
    "CoordinatorOptions",
    "CurateRecipe",
    "Dataset",
    "DedupOptions",
    "DeviceBudget",
    "DeviceOptions",
    "Drop",
    "EnergyPolicy",
    "Example",
    "Expiry",
    "ExportOptions",
    "FederateRecipe",
    "FederateShards",
    "FixOptions",
    "FleetPolicy",
    "GateFile",
    "Message",
    "Opinion",
    "Origin",
    "Part",
    "PersonOptions",
    "PersonalOptions",
    "Question",
    "Recipe",
    "Release",
    "Report",
    "ReviewRule",
    "Sampling",
    "SartorError",
    "SynthesizeRecipe",
    "Team",
    "TrainingStep",
    "ValidateOptions",
    "Waiver",
    "Wishes",
    "ablate",
    "add_agent",
    "agent_events",
    "allow_personal",
    "ask",
    "ask_team",
    "assets",
    "bias",
    "calibrate_trace",
    "chat",
    "check_ablation",
    "check_personal_proof",
    "compare_costs",
    "curate",
    "dedup",
    "demo",
    "describe_steps",
    "doctor",
    "drain_agent",
    "edge_add",
    "edge_ask",
    "edge_confirm",
    "edge_fleet",
    "edge_forget",
    "edge_halt",
    "edge_keygen",
    "edge_publish",
    "edge_refresh",
    "edge_rollback",
    "edge_rotate",
    "edge_start",
    "edge_status",
    "edge_sync",
    "edge_tune",
    "edge_undo",
    "edge_verify",
    "edge_watch",
    "edge_widen",
    "edge_withdraw",
    "evaluate",
    "export",
    "federate_client",
    "federate_coordinator",
    "federate_keygen",
    "federate_simulate",
    "fix",
    "forget_personal",
    "index",
    "init",
    "inspect",
    "install",
    "keygen",
    "list_agents",
    "list_feedback",
    "list_keys",
    "list_personal",
    "load_curate_recipe",
    "load_federate_recipe",
    "load_recipe",
    "load_synthesize_recipe",
    "load_validate_options",
    "make_key",
    "open",
    "open_items",
    "open_voice",
    "options",
    "parse_grid",
    "plan",
    "plan_tailor",
    "prepare_trace",
    "preview",
    "preview_recipe",
    "promote_agent",
    "prove",
    "prune",
    "pull",
    "push",
    "read_drops",
    "read_examples",
    "read_report",
    "release",
    "remove_agent",
    "remove_feedback",
    "remove_keys",
    "repair_agent",
    "replay_plans",
    "report_findings",
    "reseal_registry",
    "rethreshold",
    "retrain",
    "retrain_due",
    "retrain_watch",
    "review_add",
    "review_agreement",
    "review_apply",
    "review_counts",
    "review_decide",
    "review_export",
    "review_import",
    "review_list",
    "review_sample",
    "review_show",
    "revoke",
    "revoke_key",
    "revoke_release",
    "rollback_agent",
    "say_many",
    "schema",
    "schema_names",
    "score_rows",
    "serve",
    "serve_adapter",
    "show",
    "show_personal",
    "speaking",
    "spoken",
    "sweep",
    "synthesize",
    "tailor",
    "team_overview",
    "trace",
    "track",
    "training_summary",
    "tune",
    "tune_personal",
    "validate",
    "verify",
    "verify_receipt",
]
