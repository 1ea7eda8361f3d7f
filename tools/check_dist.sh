#!/usr/bin/env bash
# Builds the sdist and from it the wheel, installs the wheel in an empty environment outside the checkout, and registers
# the sample pair there: ./tools/check_dist.sh [PYTHON]
set -euo pipefail
cd "$(dirname "$0")/.."
unset PYTHONPATH  # where an .egg-info would pass for an installed package
python=${1:-.venv/bin/python}

rm -rf dist
"$python" -m build --outdir dist . > /dev/null

empty=$(mktemp -d)
trap 'rm -rf "$empty"' EXIT
"$python" -m venv "$empty/venv"
"$empty/venv/bin/pip" install --quiet dist/*.whl

cd "$empty"
venv/bin/adregnet sample pair
venv/bin/adregnet register pair/fixed.nii.gz pair/moving.nii.gz --output out --subjects same --effort fast
test -s out/warped.nii.gz
echo "The wheel installs and registers the sample pair."
