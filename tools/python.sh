#!/bin/sh
# The Python that the environment is made with: the one asked for, else the first 3.11 found.
for python in ${1:-python3.11 python3 python}; do
    if "$python" -c 'import sys; sys.exit(sys.version_info[:2] != (3, 11))' 2>/dev/null; then
        "$python" -c 'import ensurepip, venv' 2>/dev/null && { echo "$python"; exit 0; }
        echo "$python has no venv module: install it (on Debian and Ubuntu: apt install python3.11-venv) and try again." >&2; exit 1
    fi
done
cat >&2 <<END
The locks are for Python 3.11, and ${1:-none of python3.11, python3, python} is that$("${1:-python3}" -V 2>/dev/null | sed 's/^/ (found /;s/$/)/').
Install it (apt install python3.11 python3.11-venv; brew install python@3.11; uv python install 3.11; pyenv install 3.11), then:
    make PYTHON=/path/to/python3.11 install
END
exit 1
