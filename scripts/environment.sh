# Sourced by check and demo. `prepare_environment` leaves the checkout's own Python in .venv, made on first use and
# brought up to date whenever what it is made of changes. PYTHON names the interpreter to make it from; to change it
# afterwards, remove .venv.

root="$(cd "$(dirname "${BASH_SOURCE[0]}")/.." && pwd)"
venv="$root/.venv"

fail() {
  echo "error: $*" >&2
  exit 2
}

pip_install() {
  "$venv/bin/python" -m pip install -qq --no-input --disable-pip-version-check -c "$root/constraints.txt" "$@"
}

prepare_environment() {
  local python="${PYTHON:-python3}" stamp="$venv/.made-from" made_from packages=(-e "$root[dev]")
  made_from="$(cat "$root/pyproject.toml" "$root/constraints.txt" "${BASH_SOURCE[0]}" | cksum) $root"
  if [[ -x "$venv/bin/python" && "$(cat "$stamp" 2>/dev/null)" == "$made_from" ]]; then
    return
  fi

  command -v "$python" >/dev/null || fail "there is no '$python' here. Set PYTHON to a Python 3.11 or newer."
  "$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
    fail "$("$python" --version 2>&1) is too old: netsuke needs 3.11 or newer. Set PYTHON to one."

  echo "Preparing $venv. The first time takes a few minutes, most of them torch." >&2
  rm -f "$stamp"
  if ! "$venv/bin/python" -m pip --version >/dev/null 2>&1; then
    "$python" -m venv --clear "$venv" ||
      fail "'$python -m venv' failed. Some systems package it separately (python3-venv on Debian)."
  fi
  # Triton compiles on machines without a GPU too, where its interpreter is what the kernel tests run on.
  [[ "$(uname -sm)" == "Linux x86_64" ]] && packages+=("triton>=3.6")
  pip_install torch # first and alone: everything after it finds the pinned build in place
  pip_install "${packages[@]}"
  echo "$made_from" >"$stamp"
}
