#!/usr/bin/env bash
# Has a Chromium on the PATH, installed from the system's packages where it is missing and that is
# allowed. Leaves with 3, and says so, where there is none: then nothing can be tested in it.
set -euo pipefail
there() {
  local name
  for name in chromium chromium-browser google-chrome; do
    command -v "$name" >/dev/null && return
  done
  return 1
}
there && exit 0
if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
  echo "==> installing chromium"
  { apt-get update -qq && apt-get install -qq -y --no-install-recommends chromium; } >/dev/null || true
fi
there && exit 0
echo "browser: no chromium on the PATH, and none could be installed: the report was not tested in a browser" >&2
exit 3
