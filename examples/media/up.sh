#!/usr/bin/env bash
# From data to a running team that sees and hears: `bash examples/media/up.sh [OPTIONS] [DIRECTORY [OPTIONS OF sartor serve]]`, by
# default in ./media (./media-quick).
#
# Every line is a command that you would type. Whatever stands already is not made again: after an interruption the same
# command goes on, a tuning from its last checkpoint, and with everything there it starts the server at once.
#
#   --quick    a few pictures, updates and held-out rows: the whole way in minutes. Such agents have learnt little; their
#              Releases carry waivers that say so
#   --build    stop before the server
#   --only A   one agent, textile or dictation, served alone
#   --base B   another text base than the starter
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
quick='' build='' base=starter out='' agents='textile dictation'
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=yes ;;
    --build) build=yes ;;
    --only) agents=${2:?--only needs textile or dictation}; shift ;;
    --base) base=${2:?--base needs a name}; shift ;;
    -*) echo "unknown option $1; there are --quick, --build, --only and --base; options of the server go behind the directory" >&2; exit 2 ;;
    *) out=$1; shift; break ;;
  esac
  shift
done
command -v sartor >/dev/null || PATH="$here/../../.venv/bin:$PATH" # where `make demo` put it
python -c 'import soxr, torch, sartor.serving.http.startup' 2>/dev/null || {
  echo "parts of sartor are not installed; in its clone: $(command -v python) -m pip install '.[tune,multimodal,serve]'" >&2
  exit 6
}
out=${out:-media${quick:+-quick}}
mkdir -p "$out/rows"
cd "$out"

say() { echo "media: $*" >&2; }

# once PATH COMMAND...: nothing, if PATH is there. sartor writes an artefact whole or not at all, so what is there is finished
once() {
  local made=$1
  shift
  [ -e "$made" ] && return
  say "$made"
  "$@"
}

# rows NAME: its rows, moved to their place when all are written
rows() {
  local few=()
  [ -n "$quick" ] && few=(--limit 20)
  rm -rf "rows/.$1" && python "$here/$1/rows.py" "rows/.$1" ${few[@]+"${few[@]}"} >&2 && mv "rows/.$1" "rows/$1"
}

# agent NAME LABEL: Dataset, Adapter, Report, Release. LABEL: the field of the reply that is measured as a class
agent() {
  local name=$1 label=$2
  local waive=() less=() fewer=() rules=() slice # below, an empty one is nothing for the bash of macOS too
  # whoever answers small talk is the base: `auto` sends it there, and this agent loses it (README.md has the figure)
  [ "$name" != dictation ] || waive=(--waive forgetting --by up.sh --reason "an agent of a team: small talk goes to the base")
  if [ -n "$quick" ]; then
    less=(--budget.epochs null --budget.updates 4 --data.eval_rows 8)
    fewer=(--rows 8)
    waive=(--waive gain --waive forgetting --waive modality --by up.sh --reason "four updates (--quick) show the way, not a gain")
  fi
  if [ -e "$here/$name/rules.yaml" ]; then
    rules=(--rules "$here/$name/rules.yaml")
    for slice in $(sed -n 's/^ *- name: *//p' "$here/$name/rules.yaml"); do
      [ -z "$quick" ] || waive+=(--waive "slice:$slice")
    done
  fi
  once "rows/$name" rows "$name"
  once "data/$name" sartor curate "$here/$name/curate.yaml" --out "data/$name" >&2
  once "adapters/$name" sartor tune "$here/$name/tune.yaml" --base.text "$base" --out "adapters/$name" --resume ${less[@]+"${less[@]}"} >&2
  once "reports/$name" sartor evaluate "adapters/$name" --label "$label" --out "reports/$name" ${fewer[@]+"${fewer[@]}"} >&2
  once "releases/$name-1.0" sartor release "adapters/$name" --name "$name" --version 1.0 --key keys \
    --report "reports/$name" --out "releases/$name-1.0" ${rules[@]+"${rules[@]}"} ${waive[@]+"${waive[@]}"} >&2
}

for asset in textile efficientnet-lite0 whisper-tiny-en; do sartor assets install "$asset" >&2; done
once keys sartor keygen keys --trust >&2
for name in $agents; do
  case $name in
    textile) agent textile action ;;
    dictation) agent dictation image ;;
    *) echo "there is no agent $name; there are textile and dictation" >&2; exit 2 ;;
  esac
done

if [ ! -e team.yaml ]; then # one that you changed stays
  printf 'base: %s\nagents:\n' "$base" >team.yaml
  for name in $agents; do printf '  - {name: %s, release: releases/%s-1.0}\n' "$name" "$name" >>team.yaml; done
  # four updates are no gain over the base, and `auto` would leave all to it
  [ -z "$quick" ] || echo 'router: {lift: ignored}' >>team.yaml
fi
[ -n "$build" ] || exec sartor serve team.yaml "$@"
