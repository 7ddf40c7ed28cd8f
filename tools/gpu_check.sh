#!/bin/sh
# Check the Dreamers on a GPU, in under 8 minutes, and write a table. Linux only.
#
#     tools/gpu_check.sh [FILE]                   # default: runs/gpu_check.md, with a log beside it
#     DEVICE=cpu tools/gpu_check.sh               # what a CPU can do: the default without a GPU
#     PYTHON=.venv/bin/python tools/gpu_check.sh  # default: python
#
# A row that fails does not stop the others, but the exit status is 1.
set -eu
end=$(($(date +%s) + 470)) status=0
python=$(command -v "${PYTHON:-python}") || { echo "error: no ${PYTHON:-python}" >&2; exit 1; }
python=$(realpath -s "$python") # -s: keeps the link in a virtual environment
file=${1:+$(realpath -m "$1")}
cd "$(dirname "$0")/.."
file=${file:-runs/gpu_check.md}
log=${file%.md}.log
mkdir -p "$(dirname "$file")"
temp=$(mktemp -d)
trap 'rm -rf "$temp"' EXIT

line() {
    printf '%s\n' "$*" | tee -a "$file"
}

row() { # LIMIT (seconds) FIGURES (a command that takes them from $temp/out) ARGUMENTS (of python)
    limit=$1 figures=$2 begin=$(date +%s) code=0
    shift 2
    [ "$limit" -le $((end - begin)) ] || limit=$((end - begin))
    if [ "$limit" -lt 10 ]; then
        line "| \`python $*\` | | not run: the 8 minutes are over |"
        status=1
        return
    fi
    timeout --preserve-status -s INT -k 9 "$limit" "$python" "$@" >"$temp/out" 2>&1 || code=$?
    seconds=$(($(date +%s) - begin))
    if $figures >"$temp/figures" 2>&1; then verdict=""; else verdict="FAILED: "; fi
    [ $code = 0 ] || verdict="FAILED (status $code, limit $limit s): $(tail -n 1 "$temp/out")~"
    [ -z "$verdict" ] || status=1
    text=$(sed 's/^ *//; s/   */ /g; /^$/d' "$temp/figures" | paste -s -d '~')
    text=$(printf '%s' "$verdict$text" | sed 's/|/\\|/g; s/~/<br>/g')
    { echo "\$ python $*"; cat "$temp/out" "$temp/figures"; } >>"$log"
    line "| \`python $*\` | $seconds | $text |"
}

gpu_row() { # the same, on a GPU only
    if [ "$device" = cuda ]; then
        row "$@"
    else
        shift 2
        line "| \`python $*\` | | not run: no GPU |"
    fi
}

passed() {
    grep -E '[0-9]+ (passed|failed|error)' "$temp/out"
}

speed() { # and losses. Precision (bfloat16 or float32) changes one by 0.2 %, other noise by 1 %
    grep -E ' update \(|largest difference|(compiled|eager) sums|memory of the GPU' "$temp/out" &&
        awk '/largest difference/ { bad = !($1 <= 0.005) } END { exit bad }' "$temp/out"
}

training() { # of the run folder $run
    "$python" - "$run/metrics.jsonl" <<'EOF'
import json, sys
from statistics import mean
rows = [json.loads(text) for text in open(sys.argv[1])]
returns = [row["episode/return"] for row in rows if "episode/return" in row]
first, last = mean(returns[:5]), mean(returns[-5:])
print(f"return of {len(returns)} episodes: first 5 {first:.0f}, last 5 {last:.0f}")
print(*(f"evaluation: {row['eval/return']:.0f}" for row in rows if "eval/return" in row))
updates, times = zip(*((row["updates"], row["time/wall"]) for row in rows if row.get("updates")))
print(f"{updates[-1]} updates, {(updates[-1] - updates[0]) / (times[-1] - times[0]):.1f} /s")
EOF
}

"$python" - "${DEVICE:-}" >"$temp/about" <<'EOF'
import sys
from common.run import launch, origin, pick_device

def main():
    device, facts = pick_device(sys.argv[1]).type, origin()
    print(device, *(facts[key] for key in ("hardware", "commit", "versions")), sep="\n")

launch(main)
EOF
device=$(head -n 1 "$temp/about")
export PLAINDREAM_DEVICE="$device"
: >"$log"
: >"$file"
line "$(date -u +%F), $(paste -s -d '~' "$temp/about" | sed 's/~/; /g')"
line
line "| command | seconds | figures |"
line "|---|---|---|"

parity="-m pytest -q -p no:cacheprovider tests/test_parity.py tests/test_parity_dreamer.py"
script="dreamer_v3.py --device $device"
bench="$script --preset dmc_proprio --benchmark"
row 60 passed $parity
gpu_row 60 passed $parity -k graph
row 60 speed $bench --size 1m --compile no
row 120 speed $bench --size 1m --compile yes
gpu_row 90 speed $bench --size 1m --compile yes --precision float32
run=runs/gpu_check/eager
row 180 training $script --run $run --fresh
gpu_row 60 speed $bench --size 12m --compile no
gpu_row 120 speed $bench --size 12m --compile yes
run=runs/gpu_check/compiled
row 90 training $script --run $run --fresh --compile yes
exit $status
