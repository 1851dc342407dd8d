"""Python processes without anything of this one, some of which cannot import lrc.

They are forked from one that has imported torch and transformers, which takes seconds.
"""

import json
import os
import subprocess
import sys
from pathlib import Path
from subprocess import CompletedProcess

WITH_LRC = "import lrc"
WITHOUT_LRC = """
import sys

class Blocked:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] == "lrc":
            raise ImportError("lrc is not installed")

sys.meta_path.insert(0, Blocked())
"""
SERVER = """
import json, os, signal, sys, traceback

exec(sys.argv[1])
with_lrc = "lrc" in sys.modules
import torch, transformers
from transformers import AutoModelForCausalLM, LlamaForCausalLM

for line in sys.stdin:
    code, arguments, out, err = json.loads(line)
    child = os.fork()
    if child == 0:
        signal.alarm(300)
        status = 1
        try:
            for stream, path in ((1, out), (2, err)):
                os.dup2(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC), stream)
            sys.argv = ["-c", *arguments]
            exec(compile(code, "<string>", "exec"), {"__name__": "__main__"})
            assert with_lrc or not any(name.split(".")[0] == "lrc" for name in sys.modules)
            status = 0
        except BaseException:
            traceback.print_exc()
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
    print(os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), flush=True)
"""


class FreshProcesses:
    """Runs code in processes of their own, one after the other; `close` ends what they fork from.

    Parameters
    ----------
    first : str
        What is run before transformers is imported: `WITH_LRC` or `WITHOUT_LRC`.
    folder : Path
        For what they print.
    """

    def __init__(self, first: str, folder: Path) -> None:
        self._out, self._err = folder / "out", folder / "err"
        self._server = subprocess.Popen(
            [sys.executable, "-c", SERVER, first],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env={**os.environ, "OMP_NUM_THREADS": "1"},  # a forked OpenMP would hang on two
        )

    def __call__(self, code: str, *arguments: object) -> CompletedProcess[str]:
        """Run code whose ``sys.argv[1:]`` are `arguments`."""
        assert self._server.stdin is not None
        assert self._server.stdout is not None
        request = [code, [*map(str, arguments)], str(self._out), str(self._err)]
        self._server.stdin.write(json.dumps(request) + "\n")
        self._server.stdin.flush()
        status = int(self._server.stdout.readline())
        return CompletedProcess(code, status, self._out.read_text(), self._err.read_text())

    def close(self) -> None:
        """End the process that the others are forked from."""
        self._server.communicate()
