"""An environment in which nothing is as usual, and the whole suite inside it: make test-environment.

No network, no home, a model cache that cannot be written, the C locale, and paths with spaces and letters that are not
ASCII for the checkout, the temporary files and everything the tests write.

    python tests/hostile_environment.py [words for pytest]
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from u2a.packaged import cache_dir

TESTS = Path(__file__).resolve().parent
NAME = "ü 2a pröject ✓"
INSIDE = "U2A_INSIDE_HOSTILE_ENVIRONMENT"  # set there
START = """import pwd
import sys

def getpwuid(number):
    raise KeyError(f"no user has the number {number}")

pwd.getpwuid = getpwuid
sys.path.append(TESTS)
import offline

offline.block_network()
"""


def hostile_environment(folder: Path, tests: Path = TESTS) -> dict[str, str]:
    """Variables of a process for which everything is as bad as it may be.

    Every Python process that gets them blocks the network before it does anything else, and knows no user, so that
    there is no home even where the system has one for the user's number.

    Args:
        folder: where the files that this needs are put.
        tests: the folder of ``offline.py``.

    Returns:
        All variables: nothing else of this process's environment is kept but its search path for programs.
    """
    start, temporary, file = folder / "stärt", folder / "temporary ü", folder / "a file"
    start.mkdir(parents=True)
    temporary.mkdir()
    file.write_text("no directory can be made below this\n", encoding="utf-8")
    (start / "sitecustomize.py").write_text(f"TESTS = {str(tests)!r}\n{START}", encoding="utf-8")
    return {
        "PATH": os.environ.get("PATH", os.defpath),
        "LC_ALL": "C",
        "PYTHONPATH": str(start),
        "TMPDIR": str(temporary),
        "HF_HOME": str(file / "cache"),
        "HF_HUB_OFFLINE": "1",
        "HF_DATASETS_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",
        INSIDE: "1",
    }


def copy_checkout(folder: Path) -> None:
    """Copy the files of this checkout that git knows or would add.

    Args:
        folder: where to; made.
    """
    listed = subprocess.run(
        ["git", "ls-files", "-z", "--cached", "--others", "--exclude-standard"],
        cwd=TESTS.parent, capture_output=True, check=True,
    ).stdout  # fmt: skip
    for name in filter(None, os.fsdecode(listed).split("\0")):
        if (TESTS.parent / name).is_file():
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy2(TESTS.parent / name, folder / name)


def main() -> int:
    """Run the suite in a copy of the checkout under all conditions at once.

    Returns:
        The exit status of pytest.
    """
    root = Path(tempfile.mkdtemp(prefix="u2a ")) / NAME
    copy = root / "chèckout"
    try:
        copy_checkout(copy)
        variables = hostile_environment(root / "environment", copy / "tests")
        variables["PYTHONPATH"] += os.pathsep + str(copy / "src")
        variables["U2A_CACHE"] = str(cache_dir())  # converted models; without a home it must be named
        words = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", *sys.argv[1:]]
        return subprocess.run(words, cwd=copy, env=variables, check=False).returncode
    finally:
        shutil.rmtree(root.parent, ignore_errors=True)


if __name__ == "__main__":
    sys.exit(main())
