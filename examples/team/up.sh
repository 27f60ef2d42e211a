#!/usr/bin/env bash
# From data to a running team: `bash examples/team/up.sh [OPTIONS] [DIRECTORY [OPTIONS OF sartor serve]]`, by default in ./team
# (./team-quick).
#
# Every line is a command that you would type. Whatever stands already is not made again: after an interruption the same
# command goes on, a tuning from its last checkpoint, and with everything there it starts the server at once.
#
#   --quick   a few updates and held-out rows for each agent: the whole way in minutes. Such agents have learnt little; their
#             Releases carry a waiver that says so
#   --build   stop before the server
#   --base B  another base than the starter: a directory, a GGUF file, a hub name
set -euo pipefail

here=$(cd "$(dirname "$0")" && pwd)
quick='' build='' base=starter out=''
while [ $# -gt 0 ]; do
  case $1 in
    --quick) quick=yes ;;
    --build) build=yes ;;
    --base) base=${2:?--base needs a name}; shift ;;
    -*) echo "unknown option $1; there are --quick, --build and --base; options of the server go behind the directory" >&2; exit 2 ;;
    *) out=$1; shift; break ;;
  esac
  shift
done
command -v sartor >/dev/null || PATH="$here/../../.venv/bin:$PATH" # where `make demo` put it
python -c 'import hassil, torch, sartor.serving.http.startup' 2>/dev/null || {
  echo "parts of sartor are not installed; in its clone: $(command -v python) -m pip install '.[tune,demo,serve]'" >&2
  exit 6
}
out=${out:-team${quick:+-quick}}
mkdir -p "$out/rows"
cd "$out"
if [ ! -e team.yaml ]; then # one that you changed stays
  sed "s|^base:.*|base: $base|" "$here/team.yaml" >team.yaml
  # four updates are no gain over the base, and `auto` would leave all to it
  [ -z "$quick" ] || echo 'router: {lift: ignored}' >>team.yaml
fi

say() { echo "team: $*" >&2; }

# once PATH COMMAND...: nothing, if PATH is there. sartor writes an artefact whole or not at all, so what is there is finished
once() {
  local made=$1
  shift
  [ -e "$made" ] && return
  say "$made"
  "$@"
}

# agent NAME RECIPE SCORER: Dataset, Adapter, Report, Release
agent() {
  local name=$1 recipe=$2 scorer=$3
  local less=() fewer=() waive=() # below, an empty one is nothing for the bash of macOS too
  if [ -n "$quick" ]; then
    less=(--budget.epochs null --budget.updates 4 --data.eval_rows 8)
    fewer=(--rows 8)
    waive=(--waive gain --waive forgetting --by up.sh --reason "four updates (--quick) show the way, not a gain")
  fi
  once "data/$name" sartor curate "$recipe" --out "data/$name" >&2
  once "adapters/$name" sartor tune "$here/$name/tune.yaml" --base.name "$base" --out "adapters/$name" --resume ${less[@]+"${less[@]}"} >&2
  once "reports/$name" sartor evaluate "adapters/$name" --scorer "$scorer" --out "reports/$name" ${fewer[@]+"${fewer[@]}"} >&2
  once "releases/$name-1.0" sartor release "adapters/$name" --name "$name" --version 1.0 --key keys \
    --report "reports/$name" --out "releases/$name-1.0" ${waive[@]+"${waive[@]}"} >&2
}

once keys sartor keygen keys --trust >&2
once rows/home.jsonl python "$here/commands.py" rows/home.jsonl rows/general.jsonl
once rows/tutor.jsonl python "$here/learners.py" rows/tutor.jsonl ana=rows/ana.jsonl bo=rows/bo.jsonl
once rows/construction.jsonl python "$here/cited.py" rows/construction.jsonl >&2
once rows/python.jsonl python "$here/docstrings.py" rows/python.jsonl >&2
sartor assets install minilm >&2 # the sentence encoder by which `auto` chooses

agent home "$here/home/curate.yaml" exact_match
agent construction "$here/construction/curate.yaml" f1
agent tutor "$here/tutor/curate.yaml" f1 # whose hint it is nobody can know: exact match is of learners' own versions
agent python "$here/python/curate.yaml" f1

[ -n "$build" ] || exec sartor serve team.yaml "$@"
