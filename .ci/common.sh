# What .ci/run and .ci/packages share: where things are, a folder to work in, clean sources, and Python with another sprand.
cd "$(dirname "${BASH_SOURCE[0]}")/.."
export PIP_DISABLE_PIP_VERSION_CHECK=1
unset PYTHONPATH SPRAND_CPU SPRAND_CUDA SPRAND_HOST TORCH_CUDA_ARCH_LIST

ROOT=$PWD
PYTHON=$ROOT/.venv/bin/python
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT

# Python with this environment's packages, but with sprand from the given folder instead of the working tree.
python_with() { # folder arguments...
  local folder=$1 base packages
  shift
  base=$("$PYTHON" -c 'import sys; print(sys._base_executable)')
  packages=$("$PYTHON" -c 'import sysconfig; print(sysconfig.get_path("purelib"))')
  (cd "$WORK" && PYTHONPATH=$folder:$packages "$base" -s "$@") # no .pth file is read: the editable install is out of sight
}

# The sources as a clone has them, without anything built.
clean_sources() { # folder
  git ls-files -z --cached --others --exclude-standard | while IFS= read -r -d '' path; do
    if [[ -f $path ]]; then printf '%s\0' "$path"; fi
  done | xargs -0 cp --parents -t "$1"
}
