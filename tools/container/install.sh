#!/bin/sh
# The steps of the container images (Dockerfile, bigtx.def), in a copy of this clone on Debian with Python 3.11 or newer:
#
#   install.sh system      system packages: a compiler for kernels that are built at run time, and InfiniBand
#   install.sh packages    bigtx's packages into /opt/bigtx, at the versions in constraints.txt
#   install.sh bigtx       bigtx itself, last, because it changes most
set -eu

extras="huggingface parquet s3"

case $1 in
  system)
    apt-get update
    apt-get install --yes --no-install-recommends g++ ibverbs-providers libibverbs1 librdmacm1
    rm -rf /var/lib/apt/lists/*
    ;;
  packages)
    python3 -m venv /opt/bigtx
    /opt/bigtx/bin/python -c '
import sys, tomllib
project = tomllib.load(open("pyproject.toml", "rb"))["project"]
print(*project["dependencies"], *(one for name in sys.argv[1:] for one in project["optional-dependencies"][name]), sep="\n")
' $extras >/tmp/requirements.txt
    DS_BUILD_OPS=0 /opt/bigtx/bin/pip install --no-cache-dir --constraint constraints.txt --requirement /tmp/requirements.txt
    rm /tmp/requirements.txt
    ;;
  bigtx)
    /opt/bigtx/bin/pip install --no-cache-dir --no-deps --constraint constraints.txt .
    ;;
esac
