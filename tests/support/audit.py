"""What `make audit` checks: the locks, the environment, and what is known of both.

    python tests/support/audit.py

Ends with 1 if a lock does not pin by hash or names an index, if what is installed does
not fit together, or if a vulnerability is known. Standard library only; pip-audit,
which asks a database on the network, is used where it is installed.
"""

import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
_PIN = re.compile(
    r"[\w.-]+(\[[\w,-]+\])?==[\w.+!]+( ; [^;]+?)?( --hash=sha256:[0-9a-f]{64})+"
)
_ADDRESSES = ("://", "index-url", "find-links", "trusted-host", " @ ")
_SECONDS = 600.0


def locks() -> list[Path]:
    """Every lock of the repository."""
    return sorted(ROOT.glob("*.lock"))


def faults(text: str) -> list[str]:
    """What is wrong with the text of a lock: one line each."""
    found = [f"names an address: {word!r}" for word in _ADDRESSES if word in text]
    lines = text.replace("\\\n", " ").splitlines()
    pins = [re.sub(r"\s+", " ", line).strip() for line in lines]
    pins = [pin for pin in pins if pin and not pin.startswith("#")]
    found += [
        f"is no exact version with hashes: {pin[:80]!r}"
        for pin in pins
        if not _PIN.fullmatch(pin)
    ]
    return found if pins else [*found, "pins nothing"]


def known_vulnerabilities(output: str) -> list[str] | None:
    """What pip-audit found, from its JSON; None if it found no answer."""
    try:
        packages = json.loads(output)["dependencies"]
    except (ValueError, KeyError, TypeError):
        return None
    return [
        f"{package['name']} {package['version']}: {', '.join(v['id'] for v in there)}"
        for package in packages
        if (there := package.get("vulns"))
    ]


def _looked_up(lock: Path) -> bool:
    """Says what is known of what a lock pins; returns whether that is nothing."""
    words = ["--requirement", str(lock), "--require-hashes", "--disable-pip"]
    try:
        done = subprocess.run(
            [sys.executable, "-m", "pip_audit", *words, "--format", "json"],
            capture_output=True,
            text=True,
            timeout=_SECONDS,
        )
    except subprocess.TimeoutExpired:
        print(f"{lock.name}: pip-audit gave no answer within {_SECONDS:.0f} s")
        return True
    found = known_vulnerabilities(done.stdout)
    if found is None:
        said = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        print(f"{lock.name}: not looked up, pip-audit found no answer: {said[:200]}")
        return True
    for line in found or ["no vulnerability is known"]:
        print(f"{lock.name}: {line}")
    return not found


def main() -> int:
    """Checks everything, and says what it found."""
    good = True
    for lock in locks():
        found = faults(lock.read_text(encoding="utf-8"))
        good &= not found
        for line in found or ["pins every package by hash, and names no index"]:
            print(f"{lock.name}: {line}")
    done = subprocess.run([sys.executable, "-m", "pip", "check"])
    good &= done.returncode == 0
    if importlib.util.find_spec("pip_audit"):
        for lock in locks():
            good &= _looked_up(lock)
    else:
        print("pip-audit is not installed: known vulnerabilities were not looked up")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
