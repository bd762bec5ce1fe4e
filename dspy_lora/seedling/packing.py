"""Training rows: 2,048 tokens of text, or chats packed end to end, from worker processes that never run dry."""

import queue
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random
from typing import Any

import numpy as np

from dspy_lora.errors import TrainingError
from dspy_lora.seedling.chats import Chat, chats
from dspy_lora.seedling.sentences import Texts
from dspy_lora.seedling.tokenizer import END_OF_TEXT, chat_pieces

ROW = 2048  # tokens
_CHUNK = 16  # rows a worker hands over at once
_KEPT = 3000  # chunks kept for when the workers are behind
_WAIT = 2.0  # seconds between two looks at the workers while there is no chunk at all


@dataclass
class Rows:
    """Packed rows; arrays [rows, ROW + 1].

    Attributes:
        tokens: Token ids, uint16.
        weights: What each token's loss counts, float16.
        documents: Number of the document within its row, int16.
    """

    tokens: Any
    weights: Any
    documents: Any

    def __getitem__(self, part: slice) -> "Rows":
        return Rows(self.tokens[part], self.weights[part], self.documents[part])


def joined(*parts: Rows) -> Rows:
    """All rows of the parts."""
    return Rows(*(np.concatenate([getattr(part, name) for part in parts]) for name in vars(parts[0])))


def text_rows(tokens: Any, count: int, rng: Any) -> Rows:
    """Random windows of the tokenised text, each one document."""
    starts = rng.integers(0, len(tokens) - ROW - 1, count)
    rows = np.stack([tokens[start : start + ROW + 1] for start in starts])
    return Rows(rows, np.ones_like(rows, dtype=np.float16), np.zeros_like(rows, dtype=np.int16))


def chat_rows(source: Iterable[Chat], tokenizer: Any, prompt_weight: float) -> Iterator[Rows]:
    """Chats in packed rows, a chunk at a time; a chat that does not fit the row opens the next one."""
    encode = tokenizer.backend_tokenizer.encode
    [separator] = encode(END_OF_TEXT).ids
    rows: list[tuple[list[int], list[float], list[int]]] = []
    row: tuple[list[int], list[float], list[int]] = ([], [], [])
    document = 0
    for chat in source:
        ids: list[int] = []
        weights: list[float] = []
        for text, learn in chat_pieces(chat, tokenizer.apply_chat_template):
            piece = encode(text).ids
            ids += piece
            weights += [1.0 if learn else prompt_weight] * len(piece)
        ids.append(separator)
        weights.append(0.0)
        if len(ids) > ROW:
            continue
        if len(row[0]) + len(ids) > ROW + 1:
            rows.append(row)
            row, document = ([], [], []), 0
        row[0].extend(ids)
        row[1].extend(weights)
        row[2].extend([document] * len(ids))
        document += 1
        if len(rows) == _CHUNK:
            yield _padded(rows)
            rows = []
    yield _padded([*rows, row])


def _padded(rows: list[tuple[list[int], list[float], list[int]]]) -> Rows:
    return Rows(*(_pad(column, kind) for column, kind in zip(zip(*rows, strict=True), _KINDS, strict=True)))


_KINDS = (np.uint16, np.float16, np.int16)


def _pad(rows: Any, kind: Any) -> Any:
    """Rows of unequal length as one array; the filling is a document of its own that counts nothing."""
    out = np.zeros((len(rows), ROW + 1), dtype=kind)
    if kind is np.int16:
        out[:] = -1
    for line, values in zip(out, rows, strict=True):
        line[: len(values)] = values
    return out


class ChatPool:
    """Chunks of chat rows from worker processes.

    Args:
        workers: Number of processes.
        corpus: Texts for the tasks (shared with the workers by fork).
        tokenizer_folder: The tokenizer's folder.
        seed: Base of the workers' seeds.
        prompt_weight: What a prompt's token counts in the loss.

    Raises:
        TrainingError: Rows are taken, no worker is alive and none of its rows is left.
    """

    def __init__(self, workers: int, corpus: Texts, tokenizer_folder: Path, seed: int, prompt_weight: float) -> None:
        import multiprocessing

        context = multiprocessing.get_context("fork")
        self._queue = context.Queue(maxsize=300)
        self._kept: list[Rows] = []
        self._left: Rows | None = None
        self._rng = Random(seed)
        self.fresh = self.repeated = 0
        self._processes = [
            context.Process(
                target=_work, args=(self._queue, seed * 1000 + n, corpus, tokenizer_folder, prompt_weight), daemon=True
            )
            for n in range(workers)
        ]
        for process in self._processes:
            process.start()

    def take(self, count: int) -> Rows:
        """``count`` rows; fresh ones where there are, else earlier ones again."""
        have = self._left
        while have is None or len(have.tokens) < count:
            have = self._chunk() if have is None else joined(have, self._chunk())
        self._left = have[count:]
        return have[:count]

    def _chunk(self) -> Rows:
        chunk = self._fresh()
        if chunk is None:
            self.repeated += 1
            return self._rng.choice(self._kept)
        self.fresh += 1
        if len(self._kept) < _KEPT:
            self._kept.append(chunk)
        else:
            self._kept[self._rng.randrange(_KEPT)] = chunk
        return chunk

    def _fresh(self) -> Rows | None:
        """A chunk of the workers; None where they are behind and there are earlier ones."""
        while True:
            try:
                chunk: Rows = self._queue.get(block=not self._kept, timeout=_WAIT)
                return chunk
            except queue.Empty:
                if not any(process.is_alive() for process in self._processes):
                    codes = ", ".join(str(process.exitcode) for process in self._processes) or "there were none"
                    raise TrainingError(
                        f"no worker is alive to make chats (exit codes: {codes}): what ended them stands above; "
                        "-9 is a lack of memory, for which --workers takes a smaller number"
                    ) from None
                if self._kept:
                    return None

    def close(self) -> None:
        """Ends the workers."""
        for process in self._processes:
            process.terminate()


def _work(out: Any, seed: int, corpus: Texts, folder: Path, prompt_weight: float) -> None:
    import os

    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from transformers import AutoTokenizer

    tokenizer = AutoTokenizer.from_pretrained(folder)
    for chunk in chat_rows(chats(Random(seed), "train", corpus), tokenizer, prompt_weight):
        out.put(chunk)
