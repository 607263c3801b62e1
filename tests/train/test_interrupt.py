"""Interrupts, with real signals sent to real processes."""

import os
import signal
import subprocess
import sys
import threading

import pytest

from repkit.train.interrupt import EXIT_INTERRUPTED, Interrupts

LOOP = """
import sys, time
from repkit.train.interrupt import EXIT_INTERRUPTED, Interrupts
with Interrupts() as interrupts:
    for step in range(10_000):
        if step == 0:
            print("running", flush=True)
        if interrupts.requested and "stubborn" not in sys.argv:
            print("saved after", interrupts.requested, flush=True)
            sys.exit(EXIT_INTERRUPTED)
        if interrupts.requested:
            print("asked by", interrupts.requested, flush=True)
        time.sleep(0.002)
"""


def started(*arguments: str) -> subprocess.Popen[str]:
    process = subprocess.Popen(
        [sys.executable, "-c", LOOP, *arguments], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "running\n"
    return process


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_a_signal_ends_the_loop_at_a_step_boundary(number: signal.Signals) -> None:
    process = started()
    process.send_signal(number)
    output, errors = process.communicate(timeout=20)
    assert output == f"saved after {number.name}\n"
    assert errors == ""
    assert process.returncode == EXIT_INTERRUPTED == 75


def test_the_second_ctrl_c_aborts_at_once() -> None:
    process = started("stubborn")
    process.send_signal(signal.SIGINT)
    assert process.stdout is not None
    assert process.stdout.readline() == "asked by SIGINT\n"
    process.send_signal(signal.SIGINT)
    _, errors = process.communicate(timeout=20)
    assert process.returncode == -signal.SIGINT
    assert errors.rstrip().endswith("KeyboardInterrupt")


def test_ctrl_c_after_sigterm_still_lets_the_loop_save() -> None:
    with Interrupts() as interrupts:
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGTERM)
        assert interrupts.requested == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)


def test_the_previous_handlers_come_back() -> None:
    before = [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)]
    with Interrupts():
        assert signal.getsignal(signal.SIGINT) != before[1]
    assert [signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)] == before


def test_outside_the_main_thread_it_does_nothing() -> None:
    before = signal.getsignal(signal.SIGINT)
    seen = []

    def work() -> None:
        with Interrupts() as interrupts:
            seen.append((interrupts.requested, signal.getsignal(signal.SIGINT)))

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [(None, before)]
    assert signal.getsignal(signal.SIGINT) == before
