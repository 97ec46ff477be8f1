#!/usr/bin/env bash
# Grades the notebooks of the repository; the workflow's step "Grade".
# Whatever happens to the grader, the step has an output `result` that the reporter can read.
set -uo pipefail
here=$(cd "$(dirname "$0")" && pwd)
output=${GITHUB_OUTPUT:-/dev/stdout}
summary=${GITHUB_STEP_SUMMARY:-/dev/null}
repository=${GITHUB_WORKSPACE:-$PWD}
found=$(find "$repository" -mindepth 1 -name '.*' -prune -o \
    -type f \( -name '*.ipynb' -o -name '*.py' \) -print -quit)
if [ -z "$found" ]; then
    echo "result=$(cat "$here/nothing.txt")" >>"$output"
    exit
fi
work=$(mktemp -d) || exit 1
trap 'rm -rf "$work"' EXIT

timeout --kill-after=20 "${GRADER_SECONDS:-1200}" python -I -m rlhf_course grade \
    "$repository" --format github markdown --out "$work" "$@" </dev/null
status=$?

result=$(find "$work" -name github.txt -type f -print -quit)
report=$(find "$work" -name report.md -type f -print -quit)
if [ -z "$result" ]; then
    echo "The grader wrote no result; its exit status is $status." >&2
    result=$here/unfinished.txt
    [ "$status" -ne 0 ] || status=1
fi
echo "result=$(cat "$result")" >>"$output"
[ -z "$report" ] || cat "$report" >>"$summary"
exit "$status"
