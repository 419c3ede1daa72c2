#!/usr/bin/env bash
# Uses the example packages as installed, in an empty folder: run.sh FOLDER_OF_NEUROAL_AND_PYTHON
set -euo pipefail
export PATH="$1:$PATH" PYTHONSAFEPATH=1 PIP_DISABLE_PIP_VERSION_CHECK=1
examples="$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)"
away=$(mktemp -d)
trap 'rm -rf "$away"' EXIT
cd "$away"
set -x

neuroal plugins list
neuroal plugins show nowag
neuroal plugins check nowag successive_halving correlation_distance halving

# The packages' own tests, against what is installed.
for name in neuroal-nowag neuroal-halving; do
    python -m pytest -q -p no:cacheprovider --rootdir "$away" "$examples/$name/tests"
done

neuroal prune demo --pruner nowag --top-up halving --samples 16 --search-samples 4 --out halved --no-progress
neuroal prune demo --pruner nowag -o nowag.comparison=row --top-up neuroal --samples 16 --search-samples 4 \
    --out rows --no-progress
neuroal --only-plugins neuroal-nowag prune demo --pruner nowag --top-up uniform --samples 16 \
    --out alone --no-progress
if neuroal --only-plugins neuroal-nowag prune demo --top-up halving --out refused; then exit 1; fi

# A new plugin's package, as it is written.
neuroal plugins new my_score --role pruner
pip install --quiet ./neuroal-my-score
python -m pytest -q -p no:cacheprovider neuroal-my-score/tests
neuroal prune demo --pruner my_score --top-up uniform --samples 16 --out mine --no-progress
pip uninstall --quiet --yes neuroal-my-score
