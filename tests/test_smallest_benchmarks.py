"""Each script of benchmarks/ runs at its smallest size (`--small`), measures what it promises, and says null of
nothing.

The keys are those of the project's interfaces and of the scripts' own docstrings: to drop one, drop the promise first.
A new script fails here until it takes `--small` and its keys stand in KEYS. Scripts and the processes that they start
are forks of the server of warm.py, so a script takes seconds.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

BENCHMARKS = Path(__file__).parent.parent / "benchmarks"
PEERS = sorted(file.parent.name for file in BENCHMARKS.glob("peers/*/run.py"))
TIMEOUT_S = 900  # one that hangs is to end, also on a machine with other work: no claim of how long one takes
# programs that are no benchmark -> why
PARTS_OF_OTHERS = {
    "serve_sides": "a side of serve.py, which is asked over its stdin",
    "serve_work": "makes the files of serve.py",
    "learn_rows": "makes the live specialist of learn.py",
}
# script -> keys, dotted; a key may be absent only where `absent` names its last part
KEYS = {
    "ablation": "ablation layers machine.processor",
    "bad_adapters": "releases checks.signature good",
    "chaos": "mutants p99_s slowest_s offered_per_s faults others_success base_bit_equal admitted_bad bad_adapters lost_in_flight promotions recovery_s requests wall_s",
    "collaborate": "rows.held_out sides.single sides.checked sides.vote over.checked.vote vote_members specialist_s wall_s",
    "defaults": "sets.banking77.default sets.banking77.best sets.textile.fraction sets.documents.seeds machine",
    "dedup": "chosen chosen_on sets.edit_1.precision sets.edit_1.recall sets.edit_1.b_cubed sets.febrl1.rows_per_s peers.datasketch peers.rensa "
    "peers.semhash throughput.rows_per_s memory.bytes_per_row boilerplate",
    "distil": "sets.banking77.teacher sets.banking77.fraction.distil sets.snips.over_sft.distil.low sets.snips.over_sft.on_policy.low sets.snips.fraction.softened "
    "mending.before.forgetting mending.mended.high mending.rehearsal.exact_match mending.kept.beside_rows "
    "mending.beside_rows.updates machine.processor",
    "edge": "cap_bytes peak_bytes predicted_error update_points update_points_survived attacks attacks_refused delta_fraction "
    "peers predictions same_losses_under_the_cap",
    "evaluate": "sets.banking77.ratio sets.banking77.measuring_ratio sets.banking77.exact_match_ratio sets.banking77.later_ratio sets.banking77.scores.f1.tuned "
    "sets.banking77.replies_differ.tuned sets.banking77.tune_s",
    "families": "families table rows machine.processor",
    "federate": "untuned local_only federated centralised over_local.estimate over_local.low over_local.high "
    "over_centralised.estimate exactness_error upload_bytes_per_parameter epsilon malicious malicious_refused byzantine factors "
    "personal.all",
    "federate_private": "curve half over_without_noise secure.plain.exact_match secure.private.epsilon secure.private.epsilon_without_collusion delta",
    "federate_robust": "over_clean.mean.none over_clean.krum.scale",
    "fidelity": "sets bf16_gap speed_ratio served_kl",
    "forecast": "runs time_inside memory_inside widest time_runs intervals.time.high intervals.memory.low table",
    "grpo": "valid.before valid.after valid.estimate valid.low fields.before fields.low equal_groups.fraction auc.low useless.pattern.refused "
    "useless.schema.problem useless_refused machine.processor",
    "forgetting": "sets.banking77.none.worst sets.banking77.small_talk.score sets.banking77.auto.probes worst_of_auto machine.processor",
    "intents": "sides.sartor.exact_match sides.sartor.low sides.logistic.train_s sides.sartor.settings over.logistic.low setfit_8 setfit_16 "
    "rows.intents machine.processor",
    "intervals": "false_verdicts.sartor.log_normal.8 power.sartor trials",
    "labels": "least_recall_at_12% runs machine",
    "learn": "corrections.gain.estimate corrections.forgetting poisoned_promoted poisoned.named broken_slice.decision "
    "rollback_requests rollback.false_rollbacks personal.gain.estimate deleted_found",
    "learn_personal": "personal.gain.estimate personal.gain.low personal.learners deleted_found left",
    "learn_rollback": "drifts false_rollbacks.count runs",
    "methods": "sets.banking77.lora.metric.low sets.banking77.oft.forgetting sets.snips.full.trainable_fraction sets.snips.ia3.tokens_per_s.mean "
    "sets.snips.pissa.peak_memory_bytes.high regret.banking77.within regret.snips.low base_parameters machine",
    "multimodal": "textile.both textile.image_only textile.text_only textile.linear_probe textile.shuffled solar.model "
    "speech.exact_match.end_to_end speech.exact_match.cascade speech.wer cached.image.ratio cached_ratio.audio",
    "norms": "adapters",
    "packing": "ratios.padded ratios.dense_mask ratios.one_row loss_difference.padded tokens_per_s",
    "parity": "positions forms.f16.least forms.f16.limit forms.f16.deviation machine",
    "personal": "entities.email.recall entities.person.by_any entities.iban.precision clean_rows clean_rows_hit "
    "planted_speed.rows_per_s chitchat.rows_per_s another_author",
    "preferences": "dpo.before.preferred dpo.after.metric dpo.lost.low kto.lost.estimate asked told",
    "quant": "linear_bytes_over_bf16.nf4 linear_bytes_over_bf16.int8 memory_1b.nf4.peak_bytes peak_rss_over_bf16 step.auto.step_s "
    "step_nf4_over_auto learning.nf4.falls_after_evaluation targets",
    "resume": "kills kills_inside_save identical trl general.identical run_s",
    "retrain_gain": "false_promotions.high false_promotions.uncorrected.gain power.1.low feedback_power.low larger_change.high",
    "revoke": "rows revoke_source.wall_s revoke_example.cpu_s inspect_example write_index_s examples releases index_bytes",
    "route": "accuracy aurc ece abstain_out_of_domain peers.centroid.accuracy curve.tfidf curve.minilm draws team",
    "savings": "shared_prefix_ratio frozen_prefix_ratio frozen_prefix_ratio_top_6 shared.proof.gradient frozen.top_10.proof.loss",
    "scaling": "by_rows by_rank lines.rows.r_squared lines.rank.slope",
    "secure_sum": "state error client_s coordinator_s upload_bytes_per_parameter failure_bound",
    "serve": "llama_settings llama_build losses.llama_q4_0 losses.llama_q4 agreement ratios.mixed_over_same ratios.llama_cpp ratios.peft ratios.one_at_a_time tokens_per_s curve exact.fp32.equal "
    "agrees open_loop adapter_bytes attach_s",
    "spoken_rows": "train eval words clips voices",
    "start": "start.help.median_s start.import.least_s start.python.median_s modules",
    "studio": "first_page.seconds first_page.bytes review.rows_per_minute review.stored million.seconds.browse million.seconds.filter_text "
    "million.seconds.drops million.worst_s time_left.error.25 time_left.error.50 time_left.error.75 time_left.worst "
    "circle.kills.job circle.kills.studio circle.kills.browser circle.kills_in_all circle.untrue circle.lost circle.seconds.upload "
    "circle.seconds.tailor circle.seconds.evaluate circle.seconds.release circle.seconds.talk circle.seconds.feedback "
    "circle.seconds.trace circle.seconds.fix",
    "synth": "false_alarm power.group_shift power.mode_collapse power.copied_seeds power.topic_drift lift.estimate lift.low "
    "lift.high audit.planted_caught audit.planted audit.clean_passed audit.clean mitigation.gap_before mitigation.gap_after "
    "mitigation.metric_cost",
    "synth_audit": "audit.planted_caught mitigation.gap_after mitigation.worst release",
    "synth_lift": "lift.estimate lift.without lift.draws",
    "trace": "lds.snips.unrolled.mean lds.snips.gradient.min lds.snips.bm25.mean lds.snips.differences.unrolled.gradient_cosine.low "
    "planted.gradient.top1 planted.gradient.top10 planted.gradient.of planted.cross_fitted.of planted_unrolled.few_rows.top10 planted_unrolled.all_rows.of "
    "planted.swapped.gradient.of planted.discarded planted.hidden.top10 by_source by_source_methods.bm25 proof.true.right "
    "proof.false.of fix.home-intents.fails_when_put_back fix.snips.metric_stays fix.snips.effects.left_out "
    "fix.snips.effects.removed feature_overhead bytes_per_row retrieval_s gradient_s unrolled_tunings retrieval_curve gradient_curve bergson machine.processor",
    "train": "tokens_per_s peak_rss_bytes roofline_fraction shared_prefix_ratio frozen_prefix_ratio ratios ratios_best refused "
    "agreement losses.sartor unsloth "
    "trl trl_bf16 llamafactory litgpt mlx",
    "whisper": "clips wer encoder_ms.1 short_windows ctranslate2",
}
NEEDS = {"spoken_rows": "espeak-ng", "studio": "chromium"}


def programs() -> list[str]:
    """Scripts that are run by themselves."""
    return sorted(
        file.stem for file in BENCHMARKS.glob("*.py") if '__name__ == "__main__"' in file.read_text(encoding="utf-8")
    )


def undefined(value: Any, path: str = "") -> list[str]:
    """Where a result says null, or a number that is none."""
    if isinstance(value, dict):
        return [name for key, inner in value.items() for name in undefined(inner, f"{path}.{key}")]
    if isinstance(value, list):
        return [name for index, inner in enumerate(value) for name in undefined(inner, f"{path}[{index}]")]
    return [path] if value is None or value != value or value in (float("inf"), float("-inf")) else []


def lacking(result: dict[str, Any], keys: str) -> list[str]:
    """Keys that are neither in a result nor named as absent in it."""
    found = []
    for key in keys.split():
        value: Any = result
        for part in key.split("."):
            value = value.get(part) if isinstance(value, dict) else None
        if value is None and not result.get("absent", {}).get(key.rpartition(".")[2]):
            found.append(key)
    return found


def smallest(script: Path, folder: Path, commands: dict[str, str]) -> dict[str, Any]:
    """The JSON object of a script's smallest size, run in an empty folder with an empty SARTOR_HOME and no network."""
    warm = Path(commands["PATH"].split(os.pathsep)[0]) / "python"
    home = {"SARTOR_HOME": str(folder / "home"), "SARTOR_BENCH_PYTHON": str(warm), "PIP_NO_INDEX": "1", "CI": ""}
    command = ["python", str(script), "--small", "--json"]
    environment = {**os.environ, **commands, **home}
    with (folder / "stderr.txt").open("w") as stderr:
        done = subprocess.run(
            command, cwd=folder, env=environment, stdout=subprocess.PIPE, stderr=stderr, text=True, timeout=TIMEOUT_S
        )
    assert done.returncode == 0, done.stdout[-1000:] + (folder / "stderr.txt").read_text(errors="replace")[-3000:]
    return json.loads(done.stdout.splitlines()[-1])


def test_every_program_is_a_benchmark_with_keys_or_a_part_of_one() -> None:
    assert [name for name in programs() if (name in KEYS) == (name in PARTS_OF_OTHERS)] == []
    assert set(PARTS_OF_OTHERS) <= set(programs())
    assert set(KEYS) <= set(programs()), "a script is gone: take its keys away"


def test_page_of_the_docs_names_every_program() -> None:
    page = (BENCHMARKS.parent / "docs/development/benchmarks.md").read_text(encoding="utf-8")
    assert [name for name in programs() if name not in PARTS_OF_OTHERS and f"`{name}`" not in page] == []


@pytest.mark.services
@pytest.mark.parametrize("name", [name for name in programs() if name not in PARTS_OF_OTHERS])
def test_smallest_size_measures_what_is_promised(name: str, tmp_path: Path, commands: dict[str, str]) -> None:
    if name in NEEDS and not shutil.which(NEEDS[name]):
        pytest.skip(f"no {NEEDS[name]} here: apt-get install {NEEDS[name]}")
    result = smallest(BENCHMARKS / f"{name}.py", tmp_path, commands)
    assert undefined(result) == []
    assert lacking(result, KEYS[name]) == []
    assert all(isinstance(why, str) and why for why in result.get("absent", {}).values()), result["absent"]
    assert not [file for file in tmp_path.iterdir() if file.name not in ("home", "stderr.txt")], (
        "it leaves something behind"
    )


@pytest.mark.services
def test_script_without_a_smallest_size_fails(tmp_path: Path, commands: dict[str, str]) -> None:
    (tmp_path / "new.py").write_text("import argparse\nargparse.ArgumentParser().parse_args()\nprint('{}')\n")
    with pytest.raises(AssertionError, match="--small"):
        smallest(tmp_path / "new.py", tmp_path, commands)


def test_null_or_missing_key_is_found() -> None:
    result = {
        "a": [1, {"b": float("nan")}],
        "c": None,
        "peers": {},
        "absent": {"trl": "not installed: pip install trl"},
    }
    assert undefined(result) == [".a[1].b", ".c"]
    assert lacking(result, "a c peers peers.trl peers.mlx") == ["c", "peers.mlx"]


def run_results(code: str, folder: Path) -> subprocess.CompletedProcess[str]:
    line = f"import sys; sys.path.insert(0, {str(BENCHMARKS)!r}); import results; {code}"
    return subprocess.run([sys.executable, "-c", line], cwd=folder, capture_output=True, text=True, check=False)


@pytest.mark.parametrize("value", ["None", "[{'x': None}]", "float('nan')", "float('inf')"])
def test_result_with_a_null_is_refused(value: str, tmp_path: Path) -> None:
    done = run_results(f"results.print_result({{'fine': 1, 'ratio': {value}}})", tmp_path)
    assert done.returncode == 1 and "not measured: ratio" in done.stderr and done.stdout == ""


@pytest.mark.parametrize(
    "code", ["sys.exit('broken')", "print('{}'); sys.exit(3)", "print('no JSON')", "pass", "print(3)"]
)
def test_failing_process_of_a_benchmark_is_no_result(code: str, tmp_path: Path) -> None:
    done = run_results(f"print(results.last_line([sys.executable, '-c', {'import sys; ' + code!r}]))", tmp_path)
    assert done.returncode == 1 and "failed with" in done.stderr and done.stdout == ""


def test_benchmark_whose_tests_do_not_run_is_no_result(tmp_path: Path) -> None:
    (tmp_path / "test_nothing.py").write_text("")
    done = run_results("results.run_tests(sys.executable, results.Path('test_nothing.py').absolute())", tmp_path)
    assert done.returncode == 1 and "no test was run" in done.stderr


@pytest.mark.parametrize("peer", [peer for peer in PEERS if peer != "sartor"])
def test_peer_that_cannot_run_says_why(peer: str, tmp_path: Path) -> None:
    """By an interpreter that has none of its packages."""
    (tmp_path / "job.json").write_text("{}")
    command = [sys.executable, "-I", "-S", str(BENCHMARKS / "peers" / peer / "run.py"), "job.json", "result.json"]
    subprocess.run(command, cwd=tmp_path, check=True)
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["failed"] and "Traceback" in result["traceback"] and "absent" in result["versions"].values()
