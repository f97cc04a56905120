"""`memos-vllm demo`: memory at work on a real server, with times, in a few minutes."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from pathlib import Path

from memos_vllm.client import MOS
from memos_vllm.config import default_models_dir
from memos_vllm.demo.handbook import demo_questions, handbook_sections
from memos_vllm.demo.report import conclusion, table_rows, unused_memory
from memos_vllm.demo.scenes import CUBE_ID, QUICK, Samples, Show
from memos_vllm.demo.screen import Screen
from memos_vllm.demo.stage import SERVED_NAME, Stage, locked_folder
from memos_vllm.errors import MemosError
from memos_vllm.interrupts import ending_as_interrupt, undisturbed
from memos_vllm.models.prepare import prepare
from memos_vllm.process import ServerFailed

_INTERRUPTED = 130


def main(argv: Sequence[str]) -> int:
    """Play the demo.

    Args:
        argv: options, as on the command line.
    Returns:
        The process's exit code: 0 shown to the end, 1 failed, 2 misused, 130 interrupted.
    """
    options = _parser().parse_args(list(argv))
    samples = QUICK if options.quick else Samples()
    screen = Screen()
    try:
        with ending_as_interrupt(), locked_folder(options.data_dir) as folder:
            return _play(screen, folder, samples)
    except KeyboardInterrupt:
        screen.failure("Interrupted; the server is gone, and the next run begins where it can.")
        return _INTERRUPTED
    except (MemosError, OSError) as error:
        screen.failure(f"\nThe demo failed: {error}")
        return 1


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="memos-vllm demo", description="Show memory at work on a real server, with times."
    )
    parser.add_argument(
        "--data-dir",
        type=Path,
        default=default_models_dir().parent / "demo",
        help="the demo's folder; a second run reuses it (%(default)s)",
    )
    parser.add_argument("--quick", action="store_true", help="take fewer times")
    return parser


def _play(screen: Screen, folder: Path, samples: Samples) -> int:
    screen.step("A small model")
    model = prepare(SERVED_NAME, progress=screen.line)
    (folder / "server.log").unlink(missing_ok=True)
    stage = Stage(folder, model=model)
    show = Show(screen, model=model, sections=handbook_sections(), samples=samples)
    try:
        with MOS(stage.server.url) as mos:
            _show_everything(screen, stage, show, mos)
        _conclude(screen, show)
        with screen.working("Stopping the server"):
            stage.server.stop()
    except ServerFailed:
        raise
    except MemosError:
        screen.failure(f"\nThe end of the server's log, {stage.log_path}:")
        screen.failure(stage.server.log_tail())
        raise
    finally:
        with undisturbed():
            stage.server.kill()
    unused = unused_memory(show.results)
    if unused:
        screen.failure(
            f"The cube's KV should have been reused and was not: {'; '.join(unused)}. "
            f"The server's log is {stage.log_path}"
        )
    return 1 if unused else 0


def _show_everything(screen: Screen, stage: Stage, show: Show, mos: MOS) -> None:
    questions = demo_questions()
    screen.step("A server: memos-vllm serve")
    with screen.working("Starting it"):
        stage.start()
    screen.line(f"It answers on {stage.server.url}; its log is {stage.log_path}")
    show.warm_up(mos)

    screen.step("A MemCube with the handbook of a company that does not exist")
    show.fill_cube(mos)
    screen.line("The model alone has never heard of that company:")
    show.ask_without(mos, questions[0])

    screen.step("The cube becomes activation memory")
    show.bake(mos)

    screen.step("Questions without and with the cube (a model of 135 million parameters)")
    show.ask_both_ways(mos, questions)

    screen.step("What is not in attention is found when it is needed")
    show.show_found(mos)

    screen.step("Time to the first token, over HTTP streaming, each time a new question")
    show.measure_warm(mos)

    screen.step("The same after a flood of other prompts")
    show.measure_floods(mos, stage.server.url)

    screen.step("kill -9, and a new server")
    stage.server.kill()
    screen.line("The server and its processes are dead; the KV in their memory is gone.")
    with screen.working("Starting it again"):
        stage.start()
    show.warm_up(mos)
    show.measure_restart(mos)


def _conclude(screen: Screen, show: Show) -> None:
    screen.step("What was measured")
    screen.line()
    screen.table(table_rows(show.results))
    screen.line()
    screen.line(conclusion(show.results))
    screen.line()
    screen.line(f"Go on:  memos-vllm serve {SERVED_NAME}    (or any model that vLLM serves)")
    screen.line('        memos-vllm cube create mine; memos-vllm memory add mine --text "A fact."')
    screen.line("        memos-vllm cube promote mine; memos-vllm chat mine")
    screen.line(f"This demo's cube was {CUBE_ID}; README.md tells the rest.")
