#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# The main job on a fresh machine: install, then generate three ways and compare.
. "$(dirname "$0")/env.sh"
exec "$PYTHON" scripts/quickstart.py "$@"
