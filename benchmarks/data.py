"""How long data of some size takes to be ready for training, at the first start and at the next.

``python -m benchmarks.data`` writes conversations made of the project's own, and opens them as
`SFTDataset` does, each time in a process of its own: without a cache, then with it. The rival is
the plain way, on the first of them: each conversation rendered up to every answer by
`apply_chat_template`, its pieces tokenised, and all kept as Python lists.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from minimind import SFTDataset, load_tokenizer
from minimind.data import find_data, read_conversations

from . import machine, measure

CONVERSATIONS, PLAIN, ROUNDS = 1_000_000, 20_000, 3
MAX_LENGTH = 512
MEGABYTE = 2**20


def write_data(path: Path, count: int, seed: int = 0) -> None:
    """Write ``count`` conversations of one to four exchanges of the shipped ones, JSON a line."""
    rng = random.Random(seed)
    known = [turns for name in ("base", "identity", "tea") for turns in read(name)]
    with path.open("w", encoding="utf-8") as file:
        for _ in range(count):
            turns = [t for c in rng.choices(known, k=rng.choice((1, 2, 3, 3, 4))) for t in c]
            file.write(json.dumps({"conversations": turns}, ensure_ascii=False) + "\n")


def read(name: str) -> list[list[dict[str, str]]]:
    """The conversations of a shipped set."""
    return [list(sample) for sample in read_conversations(find_data(name))]


def plain(path: Path, tokenizer: Any) -> list[tuple[list[int], list[int]]]:
    """Ids and mask of every conversation of a file as lists, one after the other."""
    made = []
    for turns in read_conversations(path):
        pieces, done = [], 0
        text = tokenizer.apply_chat_template(turns, tokenize=False)
        for index, turn in enumerate(turns):
            if turn["role"] == "assistant":
                before = tokenizer.apply_chat_template(
                    turns[:index], tokenize=False, add_generation_prompt=True
                )
                after = tokenizer.apply_chat_template(turns[: index + 1], tokenize=False).rstrip()
                pieces += [(text[done : len(before)], 0), (text[len(before) : len(after)], 1)]
                done = len(after)
        pieces.append((text[done:], 0))
        ids: list[int] = []
        mask: list[int] = []
        encoded = tokenizer([piece for piece, _ in pieces], add_special_tokens=False)
        for part, (_, learnt) in zip(encoded["input_ids"], pieces, strict=True):
            ids += part
            mask += [learnt] * len(part)
        made.append((ids[:MAX_LENGTH], mask[:MAX_LENGTH]))
    return made


class Memory:
    """The most memory that this process and those that it started have had, sampled.

    What is shared among them counts once (the kernel's PSS), pages of mapped files included.
    """

    def __init__(self, every: float = 0.2) -> None:
        self.most = 0
        self._every, self._over = every, threading.Event()
        self._thread = threading.Thread(target=self._watch)

    def __enter__(self) -> Memory:
        self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        while True:
            ends = self._over.is_set()  # and then once more, or what came last is not seen
            self.most = max(self.most, sum(map(_shared, [os.getpid(), *_children()])))
            if ends:
                return
            self._over.wait(self._every)


def _children() -> list[int]:
    text = Path(f"/proc/{os.getpid()}/task/{os.getpid()}/children").read_text()
    return [int(number) for number in text.split()]


def _shared(process: int) -> int:
    try:
        text = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0  # it has ended
    return sum(int(line.split()[1]) * 1024 for line in text.splitlines() if line[:4] == "Pss:")


def opened(path: Path, way: str, cache: Path | None = None) -> dict[str, float]:
    """Open a file in ``way``: seconds, of CPU too, and the most memory in MB."""
    tokenizer = load_tokenizer()
    begin, before = time.perf_counter(), _cpu()
    with Memory() as memory:
        data: Any = plain(path, tokenizer) if way == "plain" else None
        if data is None:
            data = SFTDataset(path, tokenizer, MAX_LENGTH, cache=cache)
        seconds = time.perf_counter() - begin
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    return {
        "conversations": len(data),
        "seconds": round(seconds, 3),
        "cpu_seconds": round(_cpu() - before, 3),
        "memory_mb": round(memory.most / MEGABYTE),
        "peak_rss_mb": round(own / MEGABYTE),
    }


def _cpu() -> float:
    used = [resource.getrusage(who) for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN)]
    return sum(usage.ru_utime + usage.ru_stime for usage in used)


def apart(path: Path, way: str, cache: Path | None = None) -> dict[str, float]:
    """`opened` in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.data", "--open", way, "--data", str(path)]
    command += ["--cache", str(cache)] if cache else []
    environment = {**os.environ, "TOKENIZERS_PARALLELISM": "false"}
    done = subprocess.run(
        command, cwd=machine.ROOT, env=environment, check=True, stdout=subprocess.PIPE, text=True
    )
    return json.loads(done.stdout)


def measured(folder: Path, count: int, few: int, rounds: int) -> dict[str, Any]:
    """All rows: both ways on a few, in turn, then all of them at a first and at a second start."""
    small, large, cache = folder / "few.jsonl", folder / "all.jsonl", folder / "cache"
    write_data(small, few)
    write_data(large, count)
    turns: dict[str, list[dict[str, float]]] = {"plain": [], "index": []}
    for _ in range(rounds):
        for way, rows in turns.items():
            rows.append(apart(small, way))
    ours, theirs = ([row["seconds"] for row in turns[way]] for way in ("index", "plain"))
    first = apart(large, "index", cache)
    second = apart(large, "index", cache)
    kept = sum(file.stat().st_size for file in cache.rglob("*") if file.is_file())
    return {
        "few": {
            "conversations": few,
            **{f"{way}_seconds": [r["seconds"] for r in rows] for way, rows in turns.items()},
            "ratio": round(measure.ratio(ours, theirs).median, 4),
        },
        "first": {**first, "ms_each": round(1000 * first["seconds"] / count, 4)},
        "second": second,
        "file_mb": round(large.stat().st_size / MEGABYTE, 1),
        "kept_mb": round(kept / MEGABYTE, 1),
    }


def main(arguments: Sequence[str] | None = None) -> int:
    """Print what was measured as JSON."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--conversations", type=int, default=CONVERSATIONS)
    parser.add_argument("--few", type=int, default=PLAIN, help="conversations for both ways")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--open", choices=("plain", "index"), help="one measurement, of --data")
    parser.add_argument("--data", type=Path)
    parser.add_argument("--cache", type=Path)
    options = parser.parse_args(arguments)
    if options.open:
        found = opened(options.data, options.open, options.cache)
    else:
        folder = Path(tempfile.mkdtemp(prefix="minimind-benchmark-"))
        try:
            found = measured(folder, options.conversations, options.few, options.rounds)
        finally:
            shutil.rmtree(folder)
    print(json.dumps(found, indent=None if options.open else 1))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
