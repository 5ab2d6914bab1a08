"""Search the installed packages in the lists of known vulnerabilities, by pip-audit: `make audit`.

pip-audit reports no vulnerability and success where it finds no package in the lists, e.g. with a mirror of a registry
that lacks them. This is an error here. bigtx itself is not in the lists.
"""

from __future__ import annotations

import json
import subprocess
import sys

EXIT_FOUND = 1
EXIT_NOT_DONE = 2
COMMAND = (sys.executable, "-m", "pip_audit", "--skip-editable", "--progress-spinner=off", "--format=json")


def main() -> int:
    """Print each vulnerability and the release that repairs it. Returns the exit status."""
    done = subprocess.run(COMMAND, capture_output=True, text=True)
    try:
        packages = json.loads(done.stdout)["dependencies"]
    except (ValueError, KeyError):
        return not_done((done.stderr.strip().splitlines() or ["no message"])[-1])
    found = [(package, fault) for package in packages for fault in package.get("vulns", [])]
    for package, fault in found:
        repaired = ", ".join(fault["fix_versions"]) or "no release yet"
        names = ", ".join([fault["id"], *fault["aliases"]])
        print(f"{package['name']} {package['version']}: {names}; repaired in {repaired}")
    skipped = [package["name"] for package in packages if "skip_reason" in package]
    if len(skipped) == len(packages):
        return not_done("none of the packages is in the lists that can be reached from here")
    print(f"{len(packages) - len(skipped)} packages searched, {len(found)} vulnerabilities known")
    if skipped:
        print(f"not in the lists: {', '.join(skipped)}")
    return EXIT_FOUND if found else 0


def not_done(reason: str) -> int:
    """Print why there is no result. Returns the exit status."""
    print(f"The audit was not done; is there a network? {reason}", file=sys.stderr)
    return EXIT_NOT_DONE


if __name__ == "__main__":
    sys.exit(main())
