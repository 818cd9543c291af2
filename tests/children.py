"""Functions of a test that run, and may be killed, in a process of their own

A new process, not a fork: a fork has this one's memory but none of its threads, and once a backward pass has started threads for a device,
torch refuses to train in a fork. With a CUDA build it starts them on a machine without a GPU too, so which tests ran before would decide.
"""
import os
import pickle
import subprocess
import sys
import tempfile
from pathlib import Path

CODE = """
import os, pickle, sys
function, args = pickle.load(sys.stdin.buffer)
os.write(1, b"ready")
os.dup2(2, 1)
function(*args)
"""
PATIENCE = 900   # seconds; only a child that hangs takes them


class Child:
    "A process that calls a function of a test module, by name; it exists once it has imported what the function needs"
    def __init__(self, function, *args, **environment: str):
        self.name, self.said = function.__qualname__, tempfile.TemporaryFile()
        here = Path(__file__).parent
        paths = os.pathsep.join(map(str, filter(None, [here, here.parent, os.environ.get("PYTHONPATH")])))
        self.process = subprocess.Popen([sys.executable, "-c", CODE], stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self.said,
                                        env=os.environ | {"PYTHONPATH": paths, "OMP_NUM_THREADS": "1"} | environment)
        self.process.stdin.write(pickle.dumps((function, args)))
        self.process.stdin.close()
        self.process.stdout.read(len(b"ready"))

    def ends(self, code: int = 0):
        "Wait for it; if it ends otherwise than with this exit code (negative: the signal), what it wrote is shown"
        try: got = self.process.wait(PATIENCE)
        except subprocess.TimeoutExpired:
            self.process.kill()
            got = f"nothing for {PATIENCE} s"
        assert got == code, f"{self.name} ended with {got}, not {code}; it wrote:\n{self.output()}"

    def output(self) -> str:
        "What it has written"
        self.said.seek(0)
        return self.said.read().decode(errors="replace") or "nothing"


def in_child(function, *args, ends: int = 0) -> str:
    "Call a function of a test module in a new process that ends with an exit code; what it wrote"
    child = Child(function, *args)
    child.ends(ends)
    return child.output()
