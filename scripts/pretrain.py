"""Pretrains the run of a config: jaxllm pretrain llama_tiny [section.key=value ...]."""

import argparse
import sys

if __name__ == "__main__":
    from huge_pages import restart_with_huge_pages

    restart_with_huge_pages()

from display.settings import key_table
from gpu_settings import prepare_process
from interrupts import interruptible
from jaxllm.config.file import ConfigError, dump_config, load_config
from jaxllm.host import processes
from output import log_may_be_lost
from process import prepare_script


@interruptible
def main() -> int:
    """Parses the command line, loads the config, trains."""
    parser = argparse.ArgumentParser(epilog=key_table(), formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.description = "Pretrain Llama or T5. The same command on an existing run folder resumes it."
    parser.add_argument("config", help="YAML file of the run, or the name of a config of jaxllm, e.g. llama_tiny")
    parser.add_argument("overrides", nargs="*", help="settings after the file, e.g. training.steps=100")
    parser.add_argument("--print-config", action="store_true", help="print the resolved config and stop")
    arguments, dashed = parser.parse_known_intermixed_args()
    try:
        prepare_script()
        if not arguments.print_config:
            processes.start()
        config = load_config(arguments.config, [*arguments.overrides, *dashed])
    except ValueError as error:
        return processes.end_all(ConfigError(f"error: {error}"), status=2)
    if arguments.print_config:
        print(dump_config(config), end="")
        return 0
    from display.in_place import check_in_place
    from jaxllm.run.compiled import DeviceError
    from jaxllm.run.console import training_console
    from jaxllm.run.start import TrainingStopped
    from jaxllm.run.trainer import pretrain
    from jaxllm.storage.checkpoint import CheckpointError

    prepare_process()
    with training_console(config) as show_step, log_may_be_lost():
        try:
            processes.check_devices()
            check_in_place(config, arguments.config, arguments.overrides)
            summary = pretrain(config, on_step=show_step)
        except (KeyboardInterrupt, ValueError, OSError, CheckpointError, DeviceError, TrainingStopped) as error:
            return processes.end_all(error)
    return processes.leave(0 if summary.finished else processes.UNFINISHED)


if __name__ == "__main__":
    sys.exit(main())
