"""A process that tokenises a split's blocks while training goes on with those that are there.

The process ends with the one that began it. Killed, it is started again, and goes on behind the last whole block.
It imports no torch.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import threading
import traceback
from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict, dataclass
from pathlib import Path

import filelock
from tokenizers import Tokenizer

from plait.core.errors import PlaitError
from plait.core.system import OUT_OF_HEARING, end_with_parent
from plait.data.blocks import BlockFiles, plan_blocks
from plait.data.dataset import Dataset
from plait.modalities.text import Text
from plait.training.reuse import EarlierCache, reusing, text_key

TRIES = 3  # at one block, by processes that are killed
NICE = 10  # how much training goes before, from the second block on
_PROGRAM = "import sys; sys.path.insert(0, sys.argv[1]); from plait.training.tokenising import serve; serve()"


@dataclass(frozen=True)
class TokeniseJob:
    """What the process is told at its start.

    Attributes:
        dataset: Folder or URL.
        split: Whose texts.
        columns: Which of them.
        cache: The folder that blocks are written into.
        tokenizer: As JSON.
        tokenizer_key: Its hash.
        made_of: What blocks are known by.
        block_bytes: Of text in a block.
    """

    dataset: str
    split: str
    columns: list[str]
    cache: str
    tokenizer: str
    tokenizer_key: str
    made_of: str
    block_bytes: int


class TokeniseProcess:
    """The end of training: a `Maker` of blocks."""

    def __init__(self, job: TokeniseJob, threads: int, note: Callable[[str], None]) -> None:
        """`threads` is how many it has; `note` is called with what is to be told."""
        self.job, self.threads, self.note = job, threads, note
        self.process: subprocess.Popen[bytes] | None = None
        self.wanted = -1
        self.deaths: list[int] = []  # what was wanted when a process was killed
        self.error = ""  # what a process said that failed
        self.closed = False
        self.lock = threading.Lock()

    def want(self, block: int) -> None:
        """Have blocks made up to this one; starts the process where there is none. Nothing more once it is closed."""
        with self.lock:
            if self.closed:
                return
            if block > self.wanted:
                self.wanted = block
                if self.process is not None:
                    self._tell()
            if self.process is None:
                self._start()

    def check(self) -> None:
        """Start the process again where it was killed. Raises PlaitError with what it said where it failed, and where
        it is killed again and again."""
        with self.lock:
            if self.process is None or self.process.poll() is None:
                return
            assert self.process.stdout is not None
            words, code = self.process.stdout.read(), self.process.returncode
            if words:
                self.error = json.loads(words)["error"]
            if self.error:
                raise PlaitError(self.error)
            if code == 0:  # all are there
                return
            self.deaths.append(self.wanted)
            if self.deaths.count(self.wanted) >= TRIES:
                advice = "Free memory, then go on." if code < 0 else "What it wrote above says why."
                self.error = f"The process that tokenises ended {TRIES} times with code {code}. {advice}"
                raise PlaitError(self.error)
            self.note(f"the process that tokenises ended with code {code}; it is started again")
            self._start()

    def close(self) -> None:
        """End the process; what it has written whole stays."""
        with self.lock:
            self.closed = True
            if self.process is not None:
                self.process.kill()
                self.process.wait()
                for pipe in (self.process.stdin, self.process.stdout):
                    assert pipe is not None
                    with suppress(OSError):
                        pipe.close()
                self.process = None

    def __del__(self) -> None:
        self.close()

    def _start(self) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", _PROGRAM, str(Path(__file__).parents[2])],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE,
            env={**os.environ, "RAYON_NUM_THREADS": str(self.threads), "TOKENIZERS_PARALLELISM": "true"},
            **OUT_OF_HEARING,
        )  # fmt: skip
        assert self.process.stdin is not None
        with suppress(OSError):  # `check` says why
            self.process.stdin.write(json.dumps(asdict(self.job)).encode() + b"\n")
        self._tell()

    def _tell(self) -> None:
        assert self.process is not None and self.process.stdin is not None
        with suppress(OSError):
            self.process.stdin.write(b"%d\n" % self.wanted)
            self.process.stdin.flush()


class _Wanted:
    """The last block that is wanted, as lines of stdin say."""

    def __init__(self) -> None:
        self.block, self.changed = -1, threading.Condition()
        threading.Thread(target=self._listen, daemon=True).start()

    def _listen(self) -> None:
        for line in sys.stdin.buffer:
            with self.changed:
                self.block = int(line)
                self.changed.notify()
        os._exit(1)  # nobody is there any more

    def await_block(self, block: int) -> None:
        """Return once a block is wanted."""
        with self.changed:
            self.changed.wait_for(lambda: self.block >= block)


def serve() -> None:
    """The process: a `TokeniseJob` as a line of stdin, then numbers of blocks that are wanted. What goes wrong stands
    on stdout, as {"error": ...}."""
    end_with_parent()
    job = TokeniseJob(**json.loads(sys.stdin.buffer.readline()))
    fault = ""
    try:
        _tokenise(job, _Wanted())
    except PlaitError as error:
        fault = str(error)
    except OSError as error:
        fault = f"Cannot tokenise into {job.cache}: {error.strerror or error}."
    except Exception as error:  # a fault of Plait's: its place in the code stands on stderr
        traceback.print_exc()
        fault = f"Tokenising failed: {type(error).__name__}: {error}."
    if fault:
        sys.stdout.write(json.dumps({"error": fault}))
        sys.stdout.flush()
    os._exit(1 if fault else 0)  # the thread that listens waits for a line


def _tokenise(job: TokeniseJob, wanted: _Wanted) -> None:
    """Make all blocks that are missing, one after another, each once it is wanted."""
    dataset = Dataset.open(job.dataset)
    plan = plan_blocks(dataset, job.split, job.columns, job.block_bytes)
    files = BlockFiles(Path(job.cache), job.split, job.columns, job.made_of)
    text = Text(Tokenizer.from_str(job.tokenizer))
    indices = dataset.indices(job.split)
    lock = filelock.FileLock(Path(job.cache) / f".{job.split}-blocks.lock")  # runs may share a cache
    with lock:
        earlier = EarlierCache(Path(job.cache), job.split)
        encode = {c: reusing(text.encode_batch, earlier.tokens(c, job.tokenizer_key)) for c in job.columns}
    missing = [block for block in range(plan.count) if not files.is_there(block)]
    for number, block in enumerate(missing):
        wanted.await_block(block)
        if number == 1 and hasattr(os, "nice"):
            os.nice(NICE)  # nothing else is done before the first block is there
        records = indices[plan.records(block)]
        with lock:
            if files.is_there(block):
                continue  # another run made it meanwhile
            files.write(
                block,
                lambda column, records=records: dataset.cells(column, records),  # type: ignore[misc]
                encode.__getitem__,
                text_key,
                text.size,
            )
    with lock:
        earlier.close()
