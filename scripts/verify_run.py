"""Verifies the checkpoints of a run: jaxllm verify RUN [--resume STEP N | --against RUN2].

Exits with 1 when a checkpoint is damaged, a resume is not exact, or two runs differ. The run folders are only read.
"""

from __future__ import annotations

import argparse
import logging
import sys

if __name__ == "__main__":
    from huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

from interrupts import failed, interruptible


@interruptible
def main() -> int:
    """Parses the command line, verifies, prints what was found."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", help="training.run_dir of a run; it may be training meanwhile")
    other = parser.add_mutually_exclusive_group()
    other.add_argument(
        "--resume",
        nargs=2,
        type=int,
        metavar=("STEP", "N"),
        help="resume a copy from the checkpoint of STEP, and compare the N steps behind it with the run's",
    )
    other.add_argument("--against", metavar="RUN2", help="name the first step and leaf at which two runs differ")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.ERROR)  # before libraries add a handler of their own at their import
    from display.verify import compare_runs, verify_checkpoints, verify_resume
    from gpu_settings import prepare_process

    prepare_process()
    try:
        if arguments.resume:
            report = verify_resume(arguments.run, *arguments.resume)
        elif arguments.against:
            report = compare_runs(arguments.run, arguments.against)
        else:
            report = verify_checkpoints(arguments.run)
    except (ValueError, RuntimeError, OSError) as error:
        return failed(error)
    print(report.text)
    return 0 if report.good else 1


if __name__ == "__main__":
    sys.exit(main())
