"""Commands from a Release to those who use it: export, serve."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import sartor
from sartor.cli.app import AS_JSON, REPLACE, Flags, app, notice


@app.command
def export(
    release: Path,
    *,
    to: Literal["peft", "merged", "gguf"],
    out: Path,
    quantise: str = "",
    key: Path | None = None,
    base: str = "",
    sign: Path | None = None,
    allow_unmeasured: REPLACE = False,
    replace: REPLACE = False,
) -> Any:
    """Release -> what other runtimes load, with a receipt of how alike it answers; one that does not is not written.

    Args:
        release: the Release; it is verified first
        to: peft (a directory for peft, vLLM, SGLang), merged (one for transformers) or gguf (adapter and merged, for llama.cpp)
        out: directory of the export
        quantise: further types of the merged GGUF, as q8_0,q4_0; f16 comes too, unless bf16 or f32 is; none: no merged file
        key: trust this public key instead of those in SARTOR_HOME/trusted
        base: the base in another place than the Release names
        sign: private key, or the directory that `sartor keygen` made, to sign the receipt with
        allow_unmeasured: also where llama.cpp is not installed to be asked
        replace: replace the export that stands there
    """
    types = [kind.strip() for kind in quantise.split(",") if kind.strip()]
    options = sartor.ExportOptions(types, allow_unmeasured, sign, key, base)
    return sartor.export(release, out, to=to, options=options, replace=replace, notice=notice)


@app.command
def serve(team: Path, *flags: Flags, host: str = "", port: int | None = None) -> None:
    """Serve a team over HTTP, as OpenAI's API has it, until SIGTERM or Ctrl-C; running replies end before it does.

    One line on stdout says the address once it answers; the log, a JSON object a line, goes to stderr. Options of the team
    can be given as flags (--limits.deadline_s 30). Exits 143 on SIGTERM and 130 on Ctrl-C.

    Args:
        team: the team's YAML file
        host: address to listen on, instead of http.host; beyond this machine only with keys (`sartor agents key`)
        port: instead of http.port; 0 takes a free one
    """
    more = [*(["--http.host", host] if host else []), *(["--http.port", str(port)] if port is not None else [])]
    try:
        sartor.serve(team, [*flags, *more], ready=_ready)
    except KeyboardInterrupt:
        raise SystemExit(130) from None


def _ready(said: Mapping[str, Any]) -> None:
    print(json.dumps(dict(said)) if AS_JSON.get() else f"listening on {said['address']}", flush=True)
