"""The engine as a process: it starts from any kind of program, obeys Ctrl-C, survives kills and leaves nothing behind.

Every program here is a process of its own; whatever it starts inherits a mark in the environment, by which it is
found. vLLM's processes overwrite theirs with a title: they are found by the process group of what had the mark.
"""

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
import uuid
from pathlib import Path

import pytest

from dspy_lora.engine.processes import kill_group

PROC = Path("/proc")
START_S = 400  # an engine's start on a busy machine
BACK_S = 20  # after Ctrl-C; guards against a hang, the promised 2 s are for a machine with nothing else to do
GONE_S = 60  # after the end of a program; 10 s are promised
pytestmark = [
    pytest.mark.timeout(1500),
    pytest.mark.skipif(not PROC.is_dir(), reason="finds processes in /proc"),
]


class Program:
    """A user's program; ``stdin`` feeds it to ``python -`` instead of naming a file."""

    def __init__(self, folder, code, stdin=False):
        self.mark = f"ENGINE_TEST_MARK={uuid.uuid4().hex}"
        self.groups = set()
        self.temp = Path(tempfile.mkdtemp(prefix="t-", dir="/tmp"))  # short: sockets go there
        self.script, self.out, self.err = folder / "script.py", folder / "out.txt", folder / "err.txt"
        self.script.write_text(code)
        env = os.environ | dict([self.mark.split("=")]) | {"TMPDIR": str(self.temp), "PYTHONUNBUFFERED": "1"}
        with self.script.open() as script, self.out.open("w") as out, self.err.open("w") as err:
            self.process = subprocess.Popen(
                [sys.executable, "-" if stdin else str(self.script)],
                stdin=script if stdin else subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env=env,
                cwd=folder,
                start_new_session=True,
            )

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.alive()  # notes the groups
        self.process.kill()
        self.process.wait()
        for group in self.groups:
            kill_group(group)
        shutil.rmtree(self.temp, ignore_errors=True)

    def lines(self):
        """Words of its output's lines, by their first word."""
        return {line.split()[0]: line.split()[1:] for line in self.out.read_text().splitlines() if line.split()}

    def expect(self, word, seconds=START_S):
        """Waits for a line that begins with a word and returns the rest of it."""
        until(lambda: word in self.lines() or self.process.poll() is not None, seconds, lambda: self.said())
        assert word in self.lines(), self.said()
        return self.lines()[word]

    def said(self):
        return f"{self.out.read_text()[-3000:]}\n{self.err.read_text()[-6000:]}"

    def alive(self):
        """What it started, without the program itself."""
        found = processes()
        self.groups |= {group for pid, group in found.items() if self.mark.encode() in read(pid, "environ")}
        return [pid for pid, group in found.items() if group in self.groups and pid != self.process.pid]

    def hosts(self):
        return [pid for pid in self.alive() if b"dspy_lora.engine.host" in read(pid, "cmdline")]

    def leaves_nothing(self, seconds):
        """Waits for its end, and that of all it started, and looks for files."""
        until(lambda: self.process.poll() is not None and not self.alive(), seconds, lambda: self.remains())
        assert list(self.temp.iterdir()) == []

    def remains(self):
        return f"ended: {self.process.poll()}, left: {[read(pid, 'cmdline') for pid in self.alive()]}\n{self.said()}"


def until(condition, seconds, explain):
    """Waits until a condition holds; returns how long that took."""
    began = time.monotonic()
    while not condition():
        assert time.monotonic() - began < seconds, f"not within {seconds} s\n{explain()}"
        time.sleep(0.02)
    return time.monotonic() - began


def processes():
    """The process group of every process that is no zombie."""
    stats = {int(entry.name): read(entry.name, "stat").decode() for entry in PROC.glob("[0-9]*")}
    fields = {pid: stat.rpartition(")")[2].split() for pid, stat in stats.items() if stat}
    return {pid: int(group) for pid, (state, _, group, *_) in fields.items() if state != "Z"}


def read(pid, name):
    """A file of a process; nothing where it is gone."""
    try:
        return (PROC / str(pid) / name).read_bytes()
    except OSError:
        return b""


@pytest.fixture
def run(tmp_path):
    """Runs programs; Ctrl-C works in them also where the shell that began this one ignores it (``pytest &``)."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    with contextlib.ExitStack() as stack:
        stack.callback(signal.signal, signal.SIGINT, before)
        yield lambda code, **how: stack.enter_context(Program(tmp_path, code, **how))


CRASHES = """
import os, signal, threading, time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from dspy_lora import LoRALM

# no `if __name__ == "__main__"` here: this file runs once
print("ONCE", flush=True)
lm = LoRALM("seedling", engine={"dtype": "float32"}, max_tokens=24, cache=False)
lms = [lm.copy(domain=domain) for domain in ("legal", "financial", "healthcare", None)]


def ask(number):
    try:
        return lms[number % 4](f"Question {number}")[0]
    except Exception as exc:
        return f"{type(exc).__name__}: {exc}"


def storm(*kills):
    with ThreadPoolExecutor(200) as pool:
        calls = [pool.submit(ask, number) for number in range(200)]
        while kills and sum(call.done() for call in calls) < 5:
            time.sleep(0.01)
        for kill in kills:
            kill()
        return [call.result() for call in calls]


def find(parent, word):
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            of = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if of == parent and word in (entry / "cmdline").read_bytes():
                return int(entry.name)
        except OSError:
            pass


def kill_host():
    os.kill(find(os.getpid(), b"dspy_lora.engine.host"), signal.SIGKILL)


def kill_core():
    os.kill(find(find(os.getpid(), b"dspy_lora.engine.host"), b"EngineCore"), signal.SIGKILL)


def kill_next():
    before = find(os.getpid(), b"dspy_lora.engine.host")
    while find(os.getpid(), b"dspy_lora.engine.host") in (before, None):
        time.sleep(0.05)
    time.sleep(0.5)
    kill_host()


right = storm()
print("ANSWERS", len(set(right)), any("Error" in answer for answer in right), flush=True)
print("HOST", storm(kill_host) == right, lm.engine_stats()["restarts"], flush=True)
print("CORE", storm(kill_core) == right, lm.engine_stats()["restarts"], flush=True)
failed = [answer for answer in storm(kill_host, kill_next) if answer not in right]
errors = {answer.split("] ", 1)[1] for answer in failed}  # without the name of the model, which DSPy puts first
print("AGAIN", len(failed), len(errors), lm._engine_spec.client.running, flush=True)
print("MESSAGE", errors.pop().replace(chr(10), " | "), flush=True)
"""


def test_a_killed_engine_is_restarted_once_and_every_call_under_it_is_answered(run):
    program = run(CRASHES)
    assert program.expect("ANSWERS")[1] == "False"
    assert program.expect("HOST") == ["True", "1"]
    assert program.expect("CORE") == ["True", "2"]
    failed, different, running = program.expect("AGAIN")
    assert int(failed) > 100
    assert (different, running) == ("1", "False")
    message = " ".join(program.expect("MESSAGE"))
    assert "The vLLM engine for 'seedling' did not start: the engine process was killed by SIGKILL" in message
    assert "Last lines of its log:" in message
    program.leaves_nothing(GONE_S)
    assert program.process.returncode == 0
    assert program.out.read_text().count("ONCE") == 1


INTERRUPTS = """
import os, sys, time

import dspy

from dspy_lora import LoRALM

lm = LoRALM("seedling", domain="legal", max_tokens=8, cache=False)
answer = lm("What is it?")
pid = lm.engine_stats()["pid"]
print("FIRST", flush=True)

child = os.fork()
if child == 0:
    same = lm("What is it?") == answer
    print("CHILD", same, lm.engine_stats()["pid"] != pid, flush=True)
    sys.exit()
os.waitpid(child, 0)
print("PARENT", lm("What is it?") == answer, lm.engine_stats()["pid"] == pid, flush=True)

long = lm.copy(max_tokens=1900, ignore_eos=True)
try:
    print("CALLING", flush=True)
    long("Go on.")
except KeyboardInterrupt:
    print("INTERRUPTED", flush=True)
while lm.engine_stats()["running"]:
    time.sleep(0.1)
print("ABORTED", flush=True)

dspy.configure(lm=long)
predict = dspy.Predict("question -> answer")
pairs = [(predict, dspy.Example(question=f"Question {number}").with_inputs("question")) for number in range(300)]
print("PARALLEL", flush=True)
dspy.Parallel(num_threads=64, disable_progress_bar=True)(pairs)
"""


def test_ctrl_c_in_a_call_gives_control_back_and_in_a_program_on_standard_input_ends_it(run):
    program = run(INTERRUPTS, stdin=True)
    program.expect("FIRST")
    lines = program.err.read_text().splitlines()
    assert [line for line in lines if "starting vLLM for 'seedling'" in line]
    assert [line for line in lines if "serves 'seedling' on cpu after" in line]

    assert program.expect("CHILD") == ["True", "True"]  # a fork has an engine of its own
    assert program.expect("PARENT") == ["True", "True"]
    assert len(program.hosts()) == 1

    program.expect("CALLING")
    time.sleep(1)
    program.process.send_signal(signal.SIGINT)
    program.expect("INTERRUPTED", BACK_S)
    program.expect("ABORTED", GONE_S)

    program.expect("PARALLEL")
    time.sleep(2)
    program.process.send_signal(signal.SIGINT)
    until(lambda: "KeyboardInterrupt" in program.err.read_text(), BACK_S, program.said)
    program.leaves_nothing(GONE_S)
    assert program.process.returncode == -signal.SIGINT


STARTING = """
from dspy_lora import LoRALM

lm = LoRALM("seedling", domain="legal", cache=False)
print("CALLING", flush=True)
try:
    lm("What is it?")
finally:
    print("BACK", flush=True)
"""


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM, signal.SIGKILL])
def test_a_program_that_is_stopped_while_its_engine_starts_leaves_nothing(run, sent):
    program = run(STARTING)
    program.expect("CALLING")
    until(lambda: len(program.hosts()) >= 1, START_S, program.said)
    time.sleep(2)
    assert "BACK" not in program.lines(), program.said()
    program.process.send_signal(sent)
    if sent == signal.SIGINT:
        program.expect("BACK", BACK_S)
    program.leaves_nothing(GONE_S)
    assert program.process.returncode == -sent, program.said()


NOTEBOOK = """
import json, os, sys, time
from pathlib import Path

import nbformat
from nbclient import NotebookClient

spec = Path("jupyter/kernels/here")
spec.mkdir(parents=True)
argv = [sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}"]
(spec / "kernel.json").write_text(json.dumps({"argv": argv, "display_name": "here", "language": "python"}))
os.environ["JUPYTER_PATH"] = os.path.abspath("jupyter")

cells = [
    "import asyncio, os\\nfrom dspy_lora import LoRALM\\n"
    "lm = LoRALM('seedling', domain='legal', max_tokens=8, cache=False)",
    "first = lm('What is it?')",
    "print(first == (await lm.acall('What is it?')), os.getpid())",
]
notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
client = NotebookClient(notebook, kernel_name="here", timeout=600)


def text(cell, stream):
    return "".join(output["text"] for output in cell.outputs if output.get("name") == stream)


with client.setup_kernel():
    for number, cell in enumerate(notebook.cells):
        client.execute_cell(cell, number)
    print("PROGRESS", json.dumps(text(notebook.cells[1], "stderr")), flush=True)
    print("LAST", text(notebook.cells[2], "stdout"), flush=True)
    time.sleep(600)
"""


def test_a_notebook_shows_progress_and_a_killed_kernel_takes_its_engine_along(run):
    program = run(NOTEBOOK)
    same, kernel = program.expect("LAST")
    assert same == "True"
    shown = json.loads(" ".join(program.lines()["PROGRESS"]))
    assert "starting vLLM for 'seedling'" in shown
    assert "serves 'seedling' on cpu after" in shown

    os.kill(int(kernel), signal.SIGKILL)
    until(lambda: program.alive() == [], GONE_S, program.remains)
    assert [entry for entry in program.temp.iterdir() if entry.name.startswith("dspy-lora-")] == []


HOLDER = """
import os, time
from multiprocessing import shared_memory

segment = shared_memory.SharedMemory(create=True, size=4096)
if os.fork():
    print(segment.name, flush=True)
time.sleep(600)
"""


def test_a_killed_group_takes_its_shared_memory_along():
    with subprocess.Popen([sys.executable, "-c", HOLDER], stdout=subprocess.PIPE, start_new_session=True) as leader:
        segment = Path("/dev/shm", leader.stdout.readline().decode().strip())
        assert segment.exists()
        os.kill(leader.pid, signal.SIGKILL)  # the child goes on and holds the segment
        time.sleep(0.2)
        assert segment.exists()
        kill_group(leader.pid)
        assert not segment.exists()
