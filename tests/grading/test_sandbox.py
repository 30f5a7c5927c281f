"""Attacks on the process that evaluates texts: each runs as a scorer's own code, in the real process."""

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
import warnings
from pathlib import Path

import pytest

from logitcache import prompts
from logitcache.errors import InputError
from logitcache.grading import confinement, formula, sandbox
from logitcache.grading.sandbox import LATE, Sandbox, Unscored
from logitcache.grading.verdicts import check, verdict

ATTACKER = """
import ctypes, json, os, signal, socket, subprocess, sys, threading, time
libc = ctypes.CDLL(None, use_errno=True)

def syscall(number, *arguments):
    if libc.syscall(number, *arguments) < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))

def attacker():
    def score(code):
        found = {}
        exec(code, globals(), found)
        return found.get("right", True)
    return score
"""


@pytest.fixture
def attacked(tmp_path, monkeypatch):
    (tmp_path / "attacker.py").write_text(ATTACKER)
    monkeypatch.syspath_prepend(tmp_path)
    made = Sandbox("attacker:attacker")
    yield made
    if made._process:
        made._process.end()


HARM = {  # x86_64 numbers of system calls
    "socket": "socket.socket()",
    "connection": "socket.create_connection(('127.0.0.1', PORT))",
    "unix socket": "socket.socketpair()",
    "write": "open('TARGET', 'w')",
    "append": "open('SECRET', 'a')",
    "mkdir": "os.mkdir('TARGET')",
    "remove": "os.remove('SECRET')",
    "rename": "os.rename('SECRET', 'TARGET')",
    "link": "os.symlink('SECRET', 'TARGET')",
    "chmod": "os.chmod('SECRET', 0)",
    "truncate": "os.truncate('SECRET', 0)",
    "read": "open('SECRET').read()",
    "environment of the parent": "open(f'/proc/{os.getppid()}/environ').read()",
    "list": "os.listdir('/')",
    "stat": "os.stat('SECRET')",
    "fork": "os.fork()",
    "vfork": "syscall(58)",
    "clone": "syscall(56, 0, 0, 0, 0, 0)",
    "clone3": "syscall(435, 0, 0)",
    "thread": "threading.Thread(target=print).start()",
    "exec": "os.execv('/bin/sh', ['sh', '-c', 'touch TARGET'])",
    "shell": "assert os.system('touch TARGET') == 0",
    "subprocess": "subprocess.run(['touch', 'TARGET'])",
    "kill": "os.kill(PARENT, signal.SIGKILL)",
    "kill all": "os.kill(-1, signal.SIGKILL)",
    "stop itself": "os.kill(os.getpid(), signal.SIGSTOP)",
    "ptrace": "syscall(101, 16, PARENT, 0, 0)",
    "memory of the parent": "syscall(310, PARENT, 0, 0, 0, 0, 0)",
    "open by number": "syscall(2, b'SECRET', 0)",
    "openat2": "syscall(437, -100, b'SECRET', 0, 0)",
    "x32 open": "syscall(0x40000002, b'SECRET', 0)",
    "io_uring": "syscall(425, 1, 0)",
    "memfd": "os.memfd_create('x')",
    "mount": "syscall(165, b'none', b'/tmp', b'tmpfs', 0, 0)",
    "unshare": "syscall(272, 0x10000000)",
    "another filter": "syscall(157, 22, 2, 0, 0, 0)",
    "limits": "__import__('resource').setrlimit(7, (9, 9))",
    "owner of a pipe": "__import__('fcntl').fcntl(0, 8, PARENT)",
    "ignore the alarm": "signal.signal(signal.SIGALRM, signal.SIG_IGN)",
    "stop the alarm": "signal.setitimer(signal.ITIMER_REAL, 0)",
    "a gigantic list": "x = bytearray(100 << 30)",
    "pages": "x = [bytearray(1 << 28) for _ in range(100)]",
    "recursion": "f = lambda: f()\nf()",
}


@pytest.mark.timeout(120)
def test_no_attack_does_anything(attacked, tmp_path):
    secret, target = tmp_path / "secret", tmp_path / "target"
    secret.write_text("hf_secret")
    server = socket.create_server(("127.0.0.1", 0))
    server.settimeout(0)
    given = {"PORT": server.getsockname()[1], "PARENT": os.getpid(), "SECRET": secret, "TARGET": target}
    done = {}
    for name, code in HARM.items():
        for word, value in given.items():
            code = code.replace(word, str(value))
        try:
            done[name] = attacked.ask(code=code)
        except Unscored:
            continue
    assert done == {}
    assert not target.exists()
    assert secret.read_text() == "hf_secret"
    assert secret.stat().st_mode & 0o777
    with pytest.raises(BlockingIOError):
        server.accept()
    server.close()
    assert attacked.ask(code="right = True") is True


FORGERIES = {
    "print": "print('[\"x\", true, null]', flush=True)\nright = False",
    "descriptors": """
for descriptor in range(20):
    try:
        os.write(descriptor, b'["x", true, null]\\n')
    except OSError:
        pass
right = False""",
    "descriptors without end": """
while True:
    for descriptor in range(20):
        try:
            os.write(descriptor, b'x' * 1000)
        except OSError:
            pass
""",
    "exit": "os._exit(0)",
    "raise SystemExit": "sys.exit('bye')",
    "a crash": "ctypes.string_at(0)",
    "the next question": "right = bool(os.read(0, 100)) and False",
}


@pytest.mark.parametrize("forgery", FORGERIES)
def test_a_forged_reply_is_no_verdict(attacked, monkeypatch, forgery):
    monkeypatch.setattr(sandbox, "_SECONDS", 2.0)
    with contextlib.suppress(Unscored):
        assert attacked.ask(code=FORGERIES[forgery]) is False
    assert attacked.ask(code="right = False") is False
    assert attacked.ask(code="right = True") is True


def test_code_that_changes_the_scorer_changes_no_other_verdict(attacked):
    patch = """
import gc
for found in gc.get_objects():
    if isinstance(found, dict) and "_verdict" in found:
        found["_verdict"] = lambda *_: [True, None]
json.dumps = lambda asked: '["' + asked[0] + '", true, null]'
right = False"""
    for _ in range(2):
        with contextlib.suppress(Unscored):
            attacked.ask(code=patch)
        assert attacked.ask(code="right = False") is False


LOOPS = {
    "loop": "while True: pass",
    "loop without alarm": """
try:
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.pthread_sigmask(signal.SIG_BLOCK, range(1, 32))
except OSError:
    pass
while True:
    try:
        time.sleep(1)
    except BaseException:
        pass""",
    "in C": "9 ** 9 ** 9",
    "waits": "l = threading.Lock(); l.acquire(); l.acquire()",
    "closes its descriptors": "os.closerange(0, 100)\nwhile True: pass",
}


@pytest.mark.parametrize("loop", LOOPS)
def test_a_scorer_that_does_not_end_is_ended(attacked, monkeypatch, loop):
    monkeypatch.setattr(sandbox, "_SECONDS", 1.0)
    attacked.ask(code="")
    began = time.monotonic()
    with pytest.raises(Unscored) as unscored:
        attacked.ask(code=LOOPS[loop])
    assert unscored.value.why == LATE or loop == "closes its descriptors"
    assert time.monotonic() - began < 20
    assert attacked.ask(code="right = True") is True


def test_a_question_larger_than_a_pipe_is_asked(attacked):
    assert attacked.ask(code="right = True #" + "x" * 10**6) is True


def test_the_process_has_no_secrets_of_the_environment(attacked, monkeypatch):
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("PYTHONPATH", "/tmp")
    assert attacked.ask(code="right = 'hf_secret' in str(os.environ) or 'PYTHONPATH' in os.environ") is False


def test_nothing_of_the_working_directory_is_imported(tmp_path, monkeypatch):
    (tmp_path / "json.py").write_text("raise SystemExit('imported')")
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend("")
    made = subprocess.run(
        confinement.python("import json; print(json.dumps(1))"), capture_output=True, text=True, check=True
    )
    assert made.stdout == "1\n"


def test_an_answer_that_runs_ends_with_the_command(attacked, monkeypatch):
    monkeypatch.setattr(sandbox, "_SECONDS", 1.0)
    attacked.ask(code="")
    assert attacked._process is not None
    server = attacked._process._popen
    assert server.stdin is not None
    server.stdin.write(json.dumps(["t", {"code": "while True: pass"}]).encode() + b"\n")
    server.stdin.flush()
    children = f"/proc/{server.pid}/task/{server.pid}/children"
    while not (child := Path(children).read_text().split()):
        time.sleep(0.01)
    os.kill(server.pid, signal.SIGKILL)
    until = time.monotonic() + 20
    while os.path.exists(f"/proc/{child[0]}") and time.monotonic() < until:
        time.sleep(0.05)
    assert not os.path.exists(f"/proc/{child[0]}")


def test_a_system_that_cannot_confine_is_refused_before_anything_runs(monkeypatch):
    monkeypatch.setattr(confinement, "unconfinable", lambda: "no libseccomp")
    for name in ("math", "gym"):
        with pytest.raises(InputError, match=rf"`verifier` {name} .*cannot confine that \(no libseccomp\); .*exact"):
            check(name)
    check("exact")


def test_why_a_system_cannot_confine_is_said(tmp_path, monkeypatch):
    assert confinement.unconfinable() is None
    (tmp_path / "pyseccomp.py").write_text("raise RuntimeError('Unable to find libseccomp')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setattr(confinement, "_root", str(tmp_path), raising=False)
    assert "Unable to find libseccomp" in (confinement.unconfinable.__wrapped__() or "")


def test_a_scorer_that_does_not_start_gives_its_reason(tmp_path, monkeypatch):
    (tmp_path / "broken.py").write_text("def scorer(): raise ImportError('no antlr4')")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(Unscored, match="does not start: ImportError: no antlr4"):
        Sandbox("broken:scorer").ask()


@pytest.mark.slow
def test_an_answer_that_is_a_program_does_nothing(tmp_path):
    prompt = next(iter(prompts.load("gym:n_queens?size=1&seed=1")))
    target = tmp_path / "touched"
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for program in (
            f"open({str(target)!r}, 'w')",
            f"__import__('os').mkdir({str(target)!r})",
            f"__import__('os').system('touch {target}')",
            f"__import__('subprocess').run(['touch', {str(target)!r}])",
            f"__import__('pathlib').Path({str(target)!r}).touch()",
            f"__import__('os').open({str(target)!r}, 64)",
        ):
            assert verdict("gym", f"<answer>{program}</answer>", prompt.answer, prompt.metadata) is False
    assert not target.exists()


@pytest.mark.slow
def test_a_scorer_process_that_was_killed_or_is_of_a_parent_is_replaced(monkeypatch):
    grader = Sandbox(formula.SANDBOX.scorer)
    monkeypatch.setattr(formula, "SANDBOX", grader)
    assert verdict("math", "1 + 4", "5", {}) is True
    first = grader._process
    assert first is not None
    first.end()
    assert verdict("math", "1 + 4", "5", {}) is True
    second = grader._process
    assert second is not first
    assert second is not None
    second._owner = 0  # as a fork finds it
    assert verdict("math", "1 + 4", "5", {}) is True
    assert grader._process is not second
    second._owner = os.getpid()
    second.end()
