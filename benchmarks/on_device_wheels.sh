#!/usr/bin/env bash
# Fetches what a GPU machine without a network lacks into build/device/wheels: pydantic and what it
# needs, and platformdirs, for CPython 3.12 on x86-64 Linux. on_device.sh installs what lies there.
# Usage: benchmarks/on_device_wheels.sh [PACKAGE==VERSION ...]   (more packages, without their needs)
set -euo pipefail
cd "$(dirname "$0")/.."
target=build/device/wheels
mkdir -p "$target"

platforms=()
for glibc in 2_28 2_17; do platforms+=(--platform "manylinux_${glibc}_x86_64"); done
platforms+=(--platform manylinux2014_x86_64)
fetch() {
  python3 -m pip download --quiet --only-binary=:all: --python-version 3.12 --implementation cp \
    "${platforms[@]}" --dest "$target" "$@"
}
fetch 'pydantic>=2.7' platformdirs
for package in "$@"; do fetch --no-deps "$package"; done
ls "$target"
