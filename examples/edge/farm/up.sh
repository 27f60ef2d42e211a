#!/usr/bin/env bash
# A sensor box that is off line for days, from its data to its third version: `bash examples/edge/farm/up.sh [OPTIONS] [DIRECTORY
# [OPTIONS OF sartor tune]]`, by default in ./farm (./farm-quick).
#
# Every line is a command that you would type. Whatever stands already is not made again. On stdout comes what each command of the
# device and of its publisher says, as a JSON object with the step before it.
#
#   --quick   few updates: the whole way in minutes
#   --gguf    publish GGUF exports, which the box runs with llama.cpp alone
#   --base B  another base than the starter: a directory, a GGUF file, a hub name
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
quick='' gguf='' base=starter out=''
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=yes ;;
    --gguf) gguf=yes ;;
    --base) base=${2:?--base needs a name}; shift ;;
    -*) echo "unknown option $1; there are --quick, --gguf and --base; options of tune go behind the directory" >&2; exit 2 ;;
    *) out=$1; shift; break ;;
  esac
  shift
done
command -v sartor >/dev/null || PATH="$here/../../../.venv/bin:$PATH" # where `make demo` put it
python -c 'import torch, tuf' 2>/dev/null || {
  echo "parts of sartor are not installed; in its clone: $(command -v python) -m pip install '.[tune,edge]'" >&2
  exit 6
}
out=${out:-farm${quick:+-quick}}
tuning=("$@")
mkdir -p "$out/rows"
cd "$out"

say() { echo "farm: $*" >&2; }

# once PATH COMMAND...: nothing, if PATH is there. sartor writes an artefact whole or not at all, so what is there is finished
once() {
  local made=$1
  shift
  [ -e "$made" ] && return
  say "$made"
  "$@"
}

# step NAME CODE COMMAND...: what `sartor edge COMMAND --json` says, with the step and the exit code, which has to be CODE
step() {
  local name=$1 wanted=$2 code=0 said
  shift 2
  say "$name"
  said=$(sartor edge "$@" --json) || code=$?
  printf '{"step": "%s", "exit": %d, "said": %s}\n' "$name" "$code" "$said"
  [ "$code" = "$wanted" ]
}

# version V ROWS UPDATES: Dataset, Adapter, Report, Release, and with --gguf the export; `made` is what is published
version() {
  local v=$1 rows=$2 budget=(--budget.epochs "$3")
  [ -z "$quick" ] || budget=(--budget.epochs null --budget.updates "$(($3 * 30))")
  once "data/$rows" sartor curate --out "data/$rows" "rows/$rows.yaml" >&2
  once "adapters/$v" sartor tune "$here/tune.yaml" --base.name "$base" --data.path "data/$rows" "${budget[@]}" \
    ${tuning[@]+"${tuning[@]}"} --out "adapters/$v" --resume >&2
  once "reports/$v" sartor evaluate "adapters/$v" --scorer exact_match --out "reports/$v" --rows 8 >&2
  once "releases/$v" sartor release "adapters/$v" --name farm --version "$v" --key signer --report "reports/$v" --out "releases/$v" \
    --waive gain --waive forgetting --by up.sh --reason "a box by a valve: it is asked nothing else" >&2
  made=releases/$v
  [ -z "$gguf" ] || {
    made=exports/$v
    once "$made" sartor export "releases/$v" --to gguf --sign signer --out "$made" >&2
  }
}

once signer sartor keygen signer --trust >&2
for kind in good swapped; do
  once "rows/$kind.jsonl" python "$here/rows.py" "rows/$kind.jsonl" $([ $kind = good ] || echo --swapped)
  printf 'sources: [{path: rows/%s.jsonl, licence: Apache-2.0, use: [commercial]}]\nsplit: {eval_fraction: 0.1}\n' $kind >"rows/$kind.yaml"
done

# the publisher's side is made anew each time, and the box with it: what is shown is a story, not a state
rm -rf update-keys repository box stick gathered address
step "keys" 0 keygen update-keys
version 1.0 good 3
step "publish 1.0" 0 publish "$made" repository --days 30

# the box is set up in the workshop: its key is made there and enrolled, the root document is copied on to it
mkdir -p box devices
[ -e box-key ] || sartor keygen box-key --purpose fleet >&2
cp box-key/sartor.pub devices/box-04.pub
cp repository/metadata/1.root.json box/root.json
box=(--device box-04 --root box/root.json --store box/store --health "$here/health.jsonl" --key box-key)
[ "$base" = starter ] || [ -n "$gguf" ] || box+=(--base "$base")

# 1. it gets its first version from a USB stick, and no packet leaves it
cp -r repository stick
step "first version, by stick" 0 sync "file://$PWD/stick" farm "${box[@]}" --private --report gathered
step "ask" 0 ask farm "soil dry, hot and windy, bed tomatoes" --store box/store --max-tokens 16

# 2. days pass. What the stick says has an expiry date, and beyond it nobody can say whether it is still the newest: refused,
# and the box works on with what it has. The publisher signs anew, daily, with the two keys that are at hand for that
step "stale" 0 refresh repository --days 0.00001
rm -rf stick && cp -r repository stick && sleep 2
step "an old stick is refused" 5 sync "file://$PWD/stick" farm "${box[@]}" --private
step "refresh" 0 refresh repository --days 30

# 3. 1.1 was tuned on a probe that was read from the wrong end. Its own report cannot know; the box does, as it has prompts of its
# own. A quarter of the fleet is offered it, over a bad radio; the box refuses it, works on with 1.0, and says so
version 1.1 swapped 3
step "publish 1.1" 0 publish "$made" repository --percent 25 --days 30
python "$here/lossy.py" repository >address &
server=$!
trap 'kill $server 2>/dev/null' EXIT
until [ -s address ]; do sleep 0.1; done
url=$(cat address)
step "1.1 fails here" 5 sync "$url" farm "${box[@]}" --report gathered
step "what is on the box" 0 status farm --store box/store
step "halt the ring" 0 watch repository --reports gathered --devices devices --keys update-keys --least-reports 1 --halt-above 0
step "1.1 is gone" 0 sync "$url" farm "${box[@]}"

# 4. 1.2 is good: on trial until it has answered once
version 1.2 good 4
step "publish 1.2" 0 publish "$made" repository --percent 25 --days 30
step "1.2" 0 sync "$url" farm "${box[@]}"
step "it answers, and stays" 0 ask farm "soil dry, hot and windy, bed tomatoes" --store box/store --max-tokens 16
step "it is reported" 0 sync "$url" farm "${box[@]}" --report gathered
step "widen the ring" 0 watch repository --reports gathered --devices devices --keys update-keys --least-reports 1 --widen --widen-below 1
step "what is on the box at last" 0 status farm --store box/store
step "every byte" 0 verify --store box/store
