#!/usr/bin/env bash
# A device that files its owner's notes, and learns her words: `bash examples/edge/health/up.sh [--quick] [--base B] [DIRECTORY]`.
# Synthetic rows, no medical advice. Whatever stands already is not made again.
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
quick='' base=starter out=''
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=yes ;;
    --base) base=${2:?--base needs a name}; shift ;;
    -*) echo "unknown option $1; there are --quick and --base" >&2; exit 2 ;;
    *) out=$1 ;;
  esac
  shift
done
command -v sartor >/dev/null || PATH="$here/../../../.venv/bin:$PATH"
out=${out:-health${quick:+-quick}}
mkdir -p "$out/rows"
cd "$out"

# once PATH COMMAND...: nothing, if PATH is there
once() {
  local made=$1
  shift
  [ -e "$made" ] || "$@"
}

budget=(--budget.epochs 3) learn=(--epochs 5 --learning-rate 2e-4)
[ -z "$quick" ] || budget=(--budget.epochs null --budget.updates 60)

# 1. the publisher: a version for everybody
once signer sartor keygen signer --trust >&2
once rows/everybody.jsonl python "$here/rows.py" rows/everybody.jsonl
once rows/owner.jsonl python "$here/rows.py" rows/owner.jsonl --owner
printf 'sources: [{path: rows/everybody.jsonl, licence: Apache-2.0, use: [commercial]}]\nsplit: {eval_fraction: 0.1}\n' >rows/everybody.yaml
once data sartor curate rows/everybody.yaml --out data >&2
once adapter sartor tune "$here/../farm/tune.yaml" --base.name "$base" --data.path data "${budget[@]}" --out adapter --resume >&2
once report sartor evaluate adapter --scorer exact_match --out report --rows 8 >&2
once release sartor release adapter --name notes --version 1.0 --key signer --report report --out release \
  --waive gain --waive forgetting --by up.sh --reason "it files notes, and is asked nothing else" >&2
once update-keys sartor edge keygen update-keys >&2
once repository sartor edge publish release repository --days 30 >&2

# 2. the device: private from the first byte
sartor edge sync "file://$PWD/repository" notes --device her-watch --root repository/metadata/1.root.json --store store \
  --health "$here/health.jsonl" --base "$base" --private --json
sartor edge ask notes "log: slept 8 hours" --store store --base "$base" --max-tokens 16 --json

# 3. its owner: her words are kept encrypted, and learnt at night within 300 MB; what is learnt is used if it is better on entries that
# it never saw. One kind of entry is to be forgotten, and with it what was learnt from it
mine=(--store store --person owner --base "$base")
head -n 40 rows/everybody.jsonl >rows/probe.jsonl # what it must go on to know
[ -d owner ] || sartor edge add notes rows/owner.jsonl "${mine[@]}" --json
sartor edge tune notes "${mine[@]}" --probe rows/probe.jsonl --memory-bytes 300000000 "${learn[@]}" --json
sartor edge ask notes "log: round the heron, 4 times" --store store --base "$base" --person owner --max-tokens 16 --json
sartor edge forget notes --containing grandmother "${mine[@]}" --probe rows/probe.jsonl --memory-bytes 300000000 --json
sartor edge status notes --store store --json
