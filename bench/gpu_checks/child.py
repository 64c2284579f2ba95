"""The process of one check: `python -m gpu_checks.child NAME DEVICE CACHE OUTPUT`, with bench/ on the path."""

from __future__ import annotations

import sys
import traceback
from pathlib import Path

from gpu_checks.catalog import ENTRIES
from gpu_checks.place import CheckError, Place, SkippedError
from gpu_checks.runner import Result, Status, result_path


def main(name: str, device: str, cache: str, output: str) -> int:
    """Run the check and write its result; 0 unless it failed."""
    place = Place(device, Path(cache), Path(output))
    entry = next(entry for entry in ENTRIES if entry.name == name)
    try:
        result = entry.load()(place)
    except SkippedError as skipped:
        result = Result(Status.SKIPPED, str(skipped))
    except CheckError as error:
        result = Result(Status.FAILED, str(error))
    except Exception as error:  # noqa: BLE001 - whatever a check meets is its result
        traceback.print_exc()
        result = Result(Status.FAILED, f"{type(error).__name__}: {error}"[:1000])
    result.write(result_path(place.output, name))
    return 1 if result.status is Status.FAILED else 0


if __name__ == "__main__":
    sys.exit(main(*sys.argv[1:]))
