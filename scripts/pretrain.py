"""Pretrains the run of a config file: python scripts/pretrain.py configs/llama_tiny.yaml [section.key=value ...]."""

from __future__ import annotations

import argparse
import logging
import sys

if __name__ == "__main__":
    from huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

from process import prepare_script

from jaxllm.config.file import dump_config, key_table, load_config


def main() -> int:
    """Parses the command line, loads the config, trains."""
    parser = argparse.ArgumentParser(
        description="Pretrain Llama or T5. The same command on an existing run folder resumes it.",
        epilog=key_table(),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("config", help="YAML file of the run, e.g. configs/llama_tiny.yaml")
    parser.add_argument("overrides", nargs="*", help="settings after the file, e.g. training.steps=100")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    arguments = parser.parse_intermixed_args()
    try:
        prepare_script()
        config = load_config(arguments.config, arguments.overrides)
    except ValueError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    if arguments.print_config:
        print(dump_config(config), end="")
        return 0
    from jaxllm.run.checkpoint import CheckpointError
    from jaxllm.run.compiled import DeviceError
    from jaxllm.run.console import training_console
    from jaxllm.run.device import prepare_process
    from jaxllm.run.folder import check_in_place
    from jaxllm.run.trainer import TrainingStopped, pretrain

    prepare_process()
    with training_console(config) as show_step:
        try:
            check_in_place(config, arguments.config, arguments.overrides)
            pretrain(config, on_step=show_step)
        except KeyboardInterrupt:
            return 130  # as a shell reports it
        except (ValueError, OSError, CheckpointError, DeviceError, TrainingStopped) as error:
            logging.getLogger("jaxllm").error("%s", error)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
