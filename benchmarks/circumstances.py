"""What a result must be read with: the machine, the versions and the command.

No host name and no absolute path ends up in a result file.
"""

from __future__ import annotations

import hashlib
import json
import os
import platform
import subprocess
import sys
from collections.abc import Sequence
from importlib.metadata import PackageNotFoundError, version
from importlib.util import find_spec
from pathlib import Path
from typing import Any

__all__ = [
    "RESULTS",
    "check_sources",
    "machine",
    "mergekit_program",
    "mergekit_versions",
    "run_command",
    "sources_digest",
    "versions",
    "write_result",
]

ROOT = Path(__file__).resolve().parent.parent
RESULTS = ROOT / "benchmarks" / "results"

_PEER_PACKAGES = ("mergekit", "torch", "transformers", "safetensors", "numpy")
_OWN_PACKAGES = ("orthomerge", "torch", "numpy", "safetensors")


def machine() -> dict[str, Any]:
    """Return processor, cores, memory and operating system."""
    return {
        "cpu": _cpu_model(),
        "cores": len(os.sched_getaffinity(0)),
        "memory_bytes": os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"),
        "system": f"{platform.system()} {platform.machine()}",
        "load_average": [round(load, 2) for load in os.getloadavg()],
    }


def _cpu_model() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def versions() -> dict[str, str | None]:
    """Return the versions of this environment, and the commit if there is one."""
    return {
        "python": platform.python_version(),
        **{name: _version(name) for name in _OWN_PACKAGES},
        "commit": _commit(),
        "sources_sha256": sources_digest(),
    }


def sources_digest(packages: Sequence[str] = ("orthomerge", "orthomerge_cli")) -> str:
    """Return a digest of orthomerge's Python files, as this environment would import them."""
    total = hashlib.sha256()
    for package in packages:
        spec = find_spec(package)
        if spec is None or spec.origin is None:
            raise SystemExit(f"{package} is not installed here")
        folder = Path(spec.origin).parent
        for path in sorted(folder.rglob("*.py")):
            total.update(f"{package}/{path.relative_to(folder).as_posix()}\0".encode())
            total.update(hashlib.sha256(path.read_bytes()).digest())
    return total.hexdigest()


def check_sources(measured: dict[str, str | None]) -> None:
    """Refuse to go on when orthomerge was edited after ``versions`` was called.

    Raises:
        SystemExit: The figures would belong to no single version.
    """
    if sources_digest() != measured["sources_sha256"]:
        raise SystemExit("orthomerge's sources changed during the run: nothing more is written")


def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _commit() -> str | None:
    try:
        done = subprocess.run(
            ["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True
        )
    except OSError:
        return None
    return done.stdout.strip() or None


def mergekit_program(given: str | None) -> str | None:
    """Return the path of ``mergekit-yaml``: as given, from ``MERGEKIT_YAML``, or None.

    Raises:
        SystemExit: It is no file.
    """
    program = given or os.environ.get("MERGEKIT_YAML")
    if not program:
        print("mergekit is left out: pass --mergekit PATH or set MERGEKIT_YAML", file=sys.stderr)
        return None
    if not Path(program).is_file():
        raise SystemExit(f"there is no mergekit-yaml at {program}")
    return str(Path(program).absolute())


def mergekit_versions(program: str | None) -> dict[str, str | None] | None:
    """Return the versions in mergekit's own environment, asked of the script's interpreter."""
    if program is None:
        return None
    with open(program, encoding="utf-8") as script:
        interpreter = script.readline().removeprefix("#!").strip()
    code = (
        "import json, sys, importlib.metadata as m\n"
        "print(json.dumps({name: m.version(name) for name in sys.argv[1:]}))"
    )
    done = subprocess.run(
        [interpreter, "-c", code, *_PEER_PACKAGES], capture_output=True, text=True, check=True
    )
    found: dict[str, str | None] = json.loads(done.stdout)
    return found


def run_command() -> str:
    """Return how this program was called, absolute paths cut down to their last part."""
    words = (Path(a).name if os.path.isabs(a) else a for a in sys.argv[1:])
    return " ".join(["python", f"benchmarks/{Path(sys.argv[0]).name}", *words])


def write_result(path: Path, result: dict[str, Any]) -> None:
    """Write a result file, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result, indent=1) + "\n")
    partial.replace(path)
