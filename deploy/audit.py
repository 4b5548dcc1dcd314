"""Ask PyPI for known vulnerabilities of what an interpreter has installed: ``audit.py PYTHON``.

Exits with 1 if there is one, and if the answer cannot be understood. Where the service cannot be reached, or knows
none of the packages (an index of one's own), nothing was audited: that is said, and is no failure.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from typing import Any

__all__ = ["main", "verdict"]

#: How a service that is away shows in pip-audit's error.
AWAY = ("ConnectionError", "Connection refused", "Max retries", "Name or service", "timed out")


def verdict(code: int, out: str, err: str) -> tuple[int, list[str]]:
    """The exit code, and what to say, of what pip-audit has printed."""
    try:
        found: list[dict[str, Any]] = json.loads(out)["dependencies"]
    except (ValueError, KeyError, TypeError):
        lines = err.strip().splitlines()[-3:]
        if code and any(word in err for word in AWAY):
            return 0, ["NOT AUDITED: the service cannot be reached", *lines]
        return 1, ["pip-audit has failed", *lines]
    skipped = [one["name"] for one in found if "skip_reason" in one]
    holes = [
        f"{one['name']} {one['version']}: {hole['id']}, fixed in {', '.join(hole['fix_versions']) or 'no release'}"
        for one in found
        for hole in one.get("vulns", ())
    ]
    audited = len(found) - len(skipped)
    if not audited:
        return 0, [f"NOT AUDITED: the service knows none of the {len(skipped)} packages"]
    said = [f"{audited} packages audited, {len(holes)} known vulnerabilities"]
    if skipped:
        said.append(f"not audited, since the service does not know them: {', '.join(skipped)}")
    return int(bool(holes)), [*holes, *said]


def main() -> int:
    """Run pip-audit, which stands beside this interpreter."""
    done = subprocess.run(
        [sys.executable, "-m", "pip_audit", "--format", "json", "--progress-spinner", "off", "--timeout", "10"],
        env={**os.environ, "PIPAPI_PYTHON_LOCATION": os.path.abspath(sys.argv[1])},  # noqa: PTH100 (keeps the link)
        capture_output=True,
        text=True,
        check=False,
    )
    code, said = verdict(done.returncode, done.stdout, done.stderr)
    print("\n".join(said))
    return code


if __name__ == "__main__":
    sys.exit(main())
