"""Commands from a Release to those who use it: export."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

import sartor
from sartor.cli.app import REPLACE, app, notice


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

    Parameters
    ----------
    release: the Release; it is verified first
    to: peft (a directory for peft, vLLM, SGLang), merged (one for transformers) or gguf (adapter and merged, for llama.cpp)
    out: directory of the export
    quantise: further types of the merged GGUF, as q8_0,q4_0; f16 always comes, unless bf16 or f32 is named
    key: trust this public key instead of those in SARTOR_HOME/trusted
    base: the base in another place than the Release names
    sign: private key, or the directory that `sartor keygen` made, to sign the receipt with
    allow_unmeasured: also where llama.cpp is not installed to be asked
    replace: replace the export that stands there
    """
    types = [kind.strip() for kind in quantise.split(",") if kind.strip()]
    options = sartor.ExportOptions(types, allow_unmeasured, sign, key, base)
    return sartor.export(release, out, to=to, options=options, replace=replace, notice=notice)
