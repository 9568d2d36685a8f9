"""`python -m engine --model DIR --served-model-name NAME`: serve one base model and its adapters."""

import argparse
import logging
import os
import socket
import sys
from os import EX_DATAERR, EX_UNAVAILABLE
from pathlib import Path

from engine import logs

logger = logging.getLogger("engine")


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="engine", description=__doc__)
    parser.add_argument("--model", required=True, metavar="DIR", help="model folder, Hugging Face layout")
    parser.add_argument("--served-model-name", required=True, metavar="NAME", help="the base model's name")
    parser.add_argument("--host", default="127.0.0.1")
    parser.add_argument("--port", type=int, default=8000, help="0 takes a free one; the log tells which")
    parser.add_argument("--max-model-len", type=int, metavar="TOKENS", help="default: the model's window")
    parser.add_argument("--dtype", choices=("auto", "bfloat16", "float32"), default="auto")
    parser.add_argument(
        "--threads",
        type=int,
        metavar="N",
        help="compute threads on a CPU; default: OMP_NUM_THREADS or the cores",
    )
    return parser.parse_args()


def main() -> int:
    arguments = _arguments()
    logs.configure()
    # What can fail at once is tried before torch is imported, which takes seconds.
    if not (Path(arguments.model) / "config.json").is_file():
        logger.error("cannot serve %s: it has no config.json", arguments.model)
        return EX_DATAERR
    listening = socket.socket()
    listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    try:
        listening.bind((arguments.host, arguments.port))
    except OSError as error:
        logger.error("cannot listen on %s:%s: %s", arguments.host, arguments.port, error)
        return EX_UNAVAILABLE
    declared = os.environ.get("OMP_NUM_THREADS", "")
    threads = arguments.threads or (int(declared) if declared.isdigit() else len(os.sched_getaffinity(0)))
    # OpenMP reads these once, when torch loads it. Spinning threads starve a trainer on the same cores.
    os.environ["OMP_NUM_THREADS"] = str(threads)
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    from engine import service

    return service.run(
        model=arguments.model,
        name=arguments.served_model_name,
        listening=listening,
        max_model_len=arguments.max_model_len,
        dtype=arguments.dtype,
        threads=threads,
    )


if __name__ == "__main__":
    sys.exit(main())
