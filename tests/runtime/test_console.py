import contextlib
import io
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from logitcache.runtime.console import Progress, Stop, redirect_output


def test_chatter_of_children_goes_to_the_log_and_ours_to_the_terminal(tmp_path: Path, capfd) -> None:
    with redirect_output(tmp_path / "logs" / "x.log") as terminal:
        os.write(1, b"from python\n")
        subprocess.run([sys.executable, "-c", "print('from a child')"])
        os.write(2, b"from C\n")
        print("for a person", file=terminal)
    print("afterwards")
    out = capfd.readouterr()
    assert (out.out, out.err) == ("afterwards\n", "for a person\n")
    log = (tmp_path / "logs" / "x.log").read_text()
    assert all(line in log for line in ("from python", "from a child", "from C"))


def test_output_comes_back_after_an_error(tmp_path: Path, capfd) -> None:
    with pytest.raises(ValueError, match="boom"), redirect_output(tmp_path / "x.log"):
        raise ValueError("boom")
    print("again")
    assert capfd.readouterr().out == "again\n"


def test_progress_is_plain_lines_where_there_is_no_terminal() -> None:
    out = io.StringIO()
    with Progress(out, total=4, every=0.0) as progress:
        progress.add(1, 100)
        progress.print("a word")
        progress.add(3, 300)
    lines = out.getvalue().splitlines()
    assert lines[0].startswith("1/4 traces, ")
    assert lines[1] == "a word"
    assert lines[-1].startswith("4/4 traces, ")
    assert lines[-1].endswith(" tokens/s, 0:00 left")


def test_progress_is_a_bar_on_a_terminal() -> None:
    reader, writer = os.openpty()
    with os.fdopen(writer, "w", buffering=1) as out, Progress(out, total=2) as progress:
        progress.add(2, 10)
        progress.print("a word")
    text = b""
    with contextlib.suppress(OSError):  # the end of a pseudo-terminal
        while part := os.read(reader, 1 << 16):
            text += part
    os.close(reader)
    text = text.decode()
    assert "2/2 traces" in text
    assert "━" in text
    assert "a word" in text


def test_a_signal_is_a_flag_to_the_patient_and_the_second_one_raises() -> None:
    before = signal.getsignal(signal.SIGTERM)
    with Stop() as stop:
        stop.patient = True
        os.kill(os.getpid(), signal.SIGTERM)
        assert stop.signal == "SIGTERM"
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGTERM)
    assert signal.getsignal(signal.SIGTERM) == before
    with Stop(), pytest.raises(KeyboardInterrupt):
        os.kill(os.getpid(), signal.SIGINT)
