"""The default run, as the README shows it: ``pyrovae train`` in a fresh folder, its numbers and a picture of its report.

    python experiments/default_run.py     # two minutes; writes results/default_run.json and report.png

The picture needs Chromium on the path (Debian's package ``chromium``); without it only the numbers are written.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RESULTS = Path(__file__).parent / "results"


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        began = time.perf_counter()
        command = [sys.executable, "-c", "import sys; from pyrovae.cli import main; sys.exit(main(['train']))"]
        done = subprocess.run(command, cwd=folder, check=True, stdout=subprocess.PIPE, text=True)
        seconds = time.perf_counter() - began
        (run,) = (Path(folder) / "runs").iterdir()
        summary = json.loads((run / "summary.json").read_text())
        RESULTS.mkdir(exist_ok=True)
        result = {"wall_seconds": round(seconds, 1), "terminal": done.stdout.splitlines(), **summary}
        (RESULTS / "default_run.json").write_text(json.dumps(result, indent=1) + "\n")
        print(done.stdout, f"\nwhole command: {seconds:.0f} s", sep="")
        chromium = shutil.which("chromium") or shutil.which("chromium-browser")
        if chromium is None:
            print("No Chromium on the path, so the picture of the report is as it was.")
            return
        picture = f"--screenshot={RESULTS / 'report.png'}"
        options = ["--headless", "--no-sandbox", "--disable-gpu", "--hide-scrollbars", "--window-size=1200,2400"]
        subprocess.run([chromium, *options, picture, f"file://{run / 'report.html'}"], check=True, capture_output=True)


if __name__ == "__main__":
    main()
