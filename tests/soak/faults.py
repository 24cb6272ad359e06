"""Lets every call to the file system fail or be the last one, not only some of them as `make test` does.

    python tests/soak/faults.py FOLDER

Runs the tests of faults with all their moments, and prints how many faults they injected.
"""

from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

TESTS = ("tests/test_faults.py", "tests/test_consumption.py", "tests/test_writer.py")


def main() -> None:
    """Exit code of the tests."""
    notes = Path(sys.argv[1]) / "faults.txt"
    notes.parent.mkdir(parents=True, exist_ok=True)
    notes.write_text("")
    environment = {**os.environ, "MOECONV_SOAK": str(notes.resolve())}
    done = subprocess.run([sys.executable, "-m", "pytest", "-n", "auto", *TESTS], env=environment, check=False)
    counts = Counter(notes.read_text().splitlines())
    print(", ".join(f"{count:,} {what}" for what, count in sorted(counts.items())) + " injected and survived")
    raise SystemExit(done.returncode)


if __name__ == "__main__":
    main()
