#!/usr/bin/env bash
# `make demo`: text to a model that answers over HTTP, beside what it could say before. Usage: demo.sh [FOLDER_OF_TEXT]
set -euo pipefail
cd "$(dirname "$0")/../.."
here=docs/demo
data=${1:-}

if [ -n "$data" ]; then
    name=$(basename "$data")
    recipe=runs/$name.toml
    mkdir -p runs
    [ -e "$recipe" ] || llmctl init "$data" --out "$recipe"
else
    name=small
    recipe=recipes/small.toml
fi
llmctl run "$recipe" --run-dir "runs/$name"

# The same model before it learned anything: the same tokens, no training step.
untrained=runs/$name-untrained
mkdir -p "$untrained"
[ -e "$untrained/prep" ] || cp -R "runs/$name/prep" "$untrained/prep"
llmctl pretrain "$recipe" --run-dir "$untrained" --set pretrain.max_steps=0 --quiet

echo
echo "Asking three models over HTTP about functions that none of them has seen ..."
answers=runs/$name/demo-answers.jsonl
rm -f "$answers"
for model in "$untrained/pretrain" "runs/$name/pretrain" "runs/$name"; do
    llmctl serve "$model" --port 0 --quiet --exec "python3 $here/ask.py $model runs/$name/eval $answers"
done
python3 "$here/ask.py" --show "$answers"
rm -rf "$untrained"
llmctl report "runs/$name" --quiet

cat <<END

Next:
   llmctl chat runs/$name          talk to it
   llmctl serve runs/$name         a page at http://127.0.0.1:8000, and OpenAI's API beside it
   llmctl status runs/$name        what was made from what; the whole story: runs/$name/report.html
END
