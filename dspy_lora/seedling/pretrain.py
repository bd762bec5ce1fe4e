"""Trains the seedling from scratch: ``python -m dspy_lora.seedling.pretrain --text FOLDER --out FOLDER --minutes 9``.

Text and chats are mixed; the share of chats grows. The schedule follows the clock, so that a run of any length ends
with a learning rate of zero. Muon trains the matrices, AdamW the embedding and the norms.
"""

import argparse
import json
import math
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from dspy_lora.errors import ConfigError, DataError
from dspy_lora.seedling.bars import ADAPTERS, questions
from dspy_lora.seedling.chats import Chat
from dspy_lora.seedling.network import CONFIG, Llama, Mask, mask_within
from dspy_lora.seedling.packing import ROW, ChatPool, Rows, chat_rows, joined, text_rows
from dspy_lora.seedling.rules import rules_task
from dspy_lora.seedling.sentences import Texts, read_texts, split_sentences, textbook_passages
from dspy_lora.seedling.tokenizer import END_OF_TEXT, train_tokenizer

_WARM_UP = 0.02  # share of the run
_CHAT_SHARE = ((0.0, 0.3), (0.15, 0.45), (0.4, 0.75), (1.0, 0.9))  # (progress, share of rows that are chats)
_SHARD = 15 * 10**6  # bytes
_EXAM, _EXAM_EVERY = 300, 60  # held-out questions on rules, and the seconds between two looks at them
_EXAM_SEED = "exam"  # a text, because ``bars`` takes numbers: what a run watches is not what it is measured by


def corpus_of(texts: list[str]) -> Texts:
    """Sentences and textbook passages of the pretraining texts."""
    return Texts(
        [s for text in texts for s in split_sentences(text)], [p for text in texts for p in textbook_passages(text)]
    )


def tokenise(texts: list[str], tokenizer: Any) -> Any:
    """All texts as one array of token ids, with a separator between paragraphs' blocks of about 20,000 characters."""
    blocks = [text[at : at + 20_000] for text in texts for at in range(0, len(text), 20_000)]
    [separator] = tokenizer.backend_tokenizer.encode(END_OF_TEXT).ids
    pieces = []
    for first in range(0, len(blocks), 500):
        for encoding in tokenizer.backend_tokenizer.encode_batch(blocks[first : first + 500]):
            pieces.append(np.array([*encoding.ids, separator], dtype=np.uint16))
    return np.concatenate(pieces)


def chat_share(progress: float) -> float:
    """Share of chat rows at a progress between 0 and 1."""
    points, shares = zip(*_CHAT_SHARE, strict=True)
    return float(np.interp(progress, points, shares))


def chat_count(rows: int, share: float) -> int:
    """How many of a step's rows are chats; both chats and text get one at least."""
    return min(max(1, round(rows * share)), rows - 1)


def progress_of(now: float, began: float, deadline: float) -> float:
    """How far a run is, from 0 to 1: 1 from the deadline on, even where it began later."""
    return 1.0 if now >= deadline else max(0.0, (now - began) / (deadline - began))


def rate_factor(progress: float) -> float:
    """Warm-up, then a straight line to zero."""
    return min(progress / _WARM_UP, (1 - progress) / (1 - _WARM_UP)) if progress < 1 else 0.0


class Trainer:
    """Network, optimizers and one training step."""

    def __init__(self, device: str, rate: float, flex: bool, seed: int = 0) -> None:
        self.device = device
        torch.manual_seed(seed)
        self.network = Llama(CONFIG).to(device)
        matrices = [p for n, p in self.network.named_parameters() if p.ndim == 2 and "embed" not in n]
        others = [p for n, p in self.network.named_parameters() if p.ndim != 2 or "embed" in n]
        self.optimizers = [
            torch.optim.Muon(matrices, lr=rate, momentum=0.95, weight_decay=0.05, adjust_lr_fn="match_rms_adamw"),
            torch.optim.AdamW(others, lr=rate, betas=(0.9, 0.95), weight_decay=0.0),
        ]
        self.rate = rate
        cuda = device == "cuda"
        self.loss = torch.compile(self._loss) if cuda else self._loss
        self.flex = flex

    def _loss(self, tokens: torch.Tensor, positions: torch.Tensor, weights: torch.Tensor, mask: Mask) -> torch.Tensor:
        with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
            logits = self.network(tokens[:, :-1], positions[:, :-1], mask)
        losses = F.cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten(), reduction="none")
        return losses.view(weights.shape[0], -1) * weights[:, 1:]

    def step(self, rows: Rows, progress: float, parts: int) -> torch.Tensor:
        """One optimizer step over rows in ``parts`` pieces; returns each row's mean loss over what counts."""
        total = float(rows.weights[:, 1:].astype(np.float32).sum())
        shown = []
        for piece in np.array_split(np.arange(len(rows.tokens)), parts):
            tokens = torch.from_numpy(rows.tokens[piece].astype(np.int64)).to(self.device, non_blocking=True)
            weights = torch.from_numpy(rows.weights[piece].astype(np.float32)).to(self.device, non_blocking=True)
            documents = torch.from_numpy(rows.documents[piece].astype(np.int32)).to(self.device, non_blocking=True)
            mask = mask_within(documents[:, :-1].contiguous(), self.flex)
            losses = self.loss(tokens, positions_of(documents), weights, mask)
            (losses.sum() / total).backward()
            learned = weights[:, 1:] >= 1
            shown.append((losses.detach() * learned).sum(1) / learned.sum(1).clamp(min=1))
        torch.nn.utils.clip_grad_norm_(self.network.parameters(), 1.0)
        for optimizer in self.optimizers:
            for group in optimizer.param_groups:
                group["lr"] = self.rate * rate_factor(progress)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
        return torch.cat(shown)

    @torch.no_grad()
    def share_right(self, rows: Rows) -> float:
        """Share of the rows' chats of which every token that counts is the most likely one."""
        right, chats = 0, 0
        for at in range(0, len(rows.tokens), 8):
            tokens = torch.from_numpy(rows.tokens[at : at + 8].astype(np.int64)).to(self.device)
            documents = torch.from_numpy(rows.documents[at : at + 8].astype(np.int32)).to(self.device)
            counts = torch.from_numpy(rows.weights[at : at + 8] >= 1).to(self.device)[:, 1:]
            with torch.autocast(self.device, torch.bfloat16, enabled=self.device == "cuda"):
                mask = mask_within(documents[:, :-1], flex=False)
                guess = self.network(tokens[:, :-1], positions_of(documents)[:, :-1], mask).argmax(-1)
            wrong = (guess != tokens[:, 1:]) & counts
            for number in range(int(documents.max()) + 1):
                inside = documents[:, 1:] == number
                chats += int(inside.any(1).sum())
                right += int((inside.any(1) & ~(wrong & inside).any(1)).sum())
        return right / chats


def exam(tokenizer: Any) -> Rows:
    """Held-out questions about rules, as ChatAdapter writes them, none that ``bars`` asks; only the answers count.

    Those with ``reasoning`` are left out: its wording cannot be foreseen.
    """
    adapter = ADAPTERS["ChatAdapter"]
    chats = []
    for question in questions(_EXAM_SEED, _EXAM, rules_task):
        if "reasoning" in question.signature.output_fields:
            continue
        messages = adapter.format(question.signature, question.demos, question.inputs)
        answer = adapter.format_assistant_message_content(
            question.signature, {name: question.row[name] for name in question.signature.output_fields}
        )
        chats.append(Chat("exam", [*messages, {"role": "assistant", "content": answer}], learn_all=False))
    return joined(*chat_rows(chats, tokenizer, 0.0))


def positions_of(documents: torch.Tensor) -> torch.Tensor:
    """Positions that begin at zero in every document of a row, [rows, tokens]."""
    index = torch.arange(documents.shape[1], device=documents.device).expand_as(documents)
    begins = torch.ones_like(documents, dtype=torch.bool)
    begins[:, 1:] = documents[:, 1:] != documents[:, :-1]
    return index - torch.where(begins, index, 0).cummax(1).values


def save(network: Llama, folder: Path) -> None:
    """Writes config.json and bf16 safetensors, in shards of at most 15 MB."""
    from safetensors.torch import save_file

    folder.mkdir(parents=True, exist_ok=True)
    state = {
        name: weight.detach().to("cpu", torch.bfloat16).contiguous() for name, weight in network.state_dict().items()
    }
    shards: list[dict[str, torch.Tensor]] = [{}]
    for name, weight in state.items():
        if sum(w.nbytes for w in shards[-1].values()) + weight.nbytes > _SHARD:
            shards.append({})
        shards[-1][name] = weight
    for number, shard in enumerate(shards, 1):
        save_file(shard, folder / f"model-{number:05d}.safetensors", {"format": "pt"})
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")


def join(shards: Path, folder: Path) -> None:
    """Puts the shards of ``save`` together as one model.safetensors with its configuration.

    Raises:
        DataError: ``shards`` holds none, or no configuration; nothing was written.
    """
    from safetensors.torch import load_file, save_file

    found, config = sorted(shards.glob("model-*.safetensors")), shards / "config.json"
    if not found or not config.is_file():
        raise DataError(f"{shards} holds no model-*.safetensors with a config.json: name the --out folder of a run")
    state: dict[str, torch.Tensor] = {}
    for shard in found:
        state |= load_file(shard)
    draft = folder / "model.safetensors.part"
    save_file(state, draft, {"format": "pt"})
    draft.replace(folder / "model.safetensors")
    (folder / "config.json").write_bytes(config.read_bytes())
    generation = {"eos_token_id": CONFIG["eos_token_id"], "pad_token_id": CONFIG["pad_token_id"]}
    (folder / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")


def check(args: argparse.Namespace) -> None:
    """Refuses, before anything is read, what would end the run late; makes its folder.

    Raises:
        ConfigError: An argument that cannot be.
    """
    for name, least in (("rows", 2), ("parts", 1), ("workers", 1)):
        if getattr(args, name) < least:
            raise ConfigError(f"--{name} {getattr(args, name)} is too few: give {least} or more")
    if args.resume and not args.resume.is_file():
        raise ConfigError(f"--resume {args.resume} is no file: name the weights.pt in the --out folder of a run")
    try:
        args.out.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise ConfigError(f"--out {args.out} cannot be made ({error}): name a folder, there or not") from error


def train(args: argparse.Namespace) -> None:
    """The run.

    Raises:
        ConfigError: An argument that cannot be.
        DataError: No texts.
        TrainingError: All workers died.
    """
    from transformers import AutoTokenizer

    check(args)
    started = time.monotonic()
    deadline = started + 60 * args.minutes
    device = "cuda" if torch.cuda.is_available() else "cpu"
    texts = [text[: args.characters] for text in read_texts(args.text)]
    corpus = corpus_of(texts)
    corpus.natural("train")  # indexed once, before the workers fork
    pool = ChatPool(args.workers, corpus, args.tokenizer, args.seed, args.prompt_weight)
    tokenizer = AutoTokenizer.from_pretrained(args.tokenizer)
    tokens, held_out = tokenise(texts, tokenizer), exam(tokenizer)
    print(
        f"{len(tokens):,} tokens of text, {len(corpus.sentences):,} sentences, {len(corpus.passages):,} passages",
        flush=True,
    )
    torch.set_float32_matmul_precision("high")
    trainer = Trainer(device, args.rate, args.flex, args.seed)
    print(f"{sum(p.numel() for p in trainer.network.parameters()):,} parameters on {device}", flush=True)
    if args.resume:
        trainer.network.load_state_dict(torch.load(args.resume, map_location=device, weights_only=True))
    rng = np.random.default_rng(args.seed)
    began = warm = time.monotonic()
    if began >= deadline:
        sys.exit(f"no time is left to train: the texts took {began - started:.0f} s, give more --minutes")
    step, seen, shown = 0, 0, time.monotonic()
    examined = shown
    while (progress := progress_of(time.monotonic(), began, deadline)) < 1 and step < args.steps:
        chats = chat_count(args.rows, chat_share(1.0 if args.resume else progress))
        text, chat = text_rows(tokens, args.rows - chats, rng), pool.take(chats)
        chat.weights = np.where(chat.weights >= 1, args.answer_weight, chat.weights).astype(np.float16)
        losses = trainer.step(joined(text, chat), progress, args.parts)
        step, seen = step + 1, seen + args.rows * ROW
        if step == 3:  # compiling does not count
            began = warm = time.monotonic()
            seen = 0
        if time.monotonic() - shown > 10 or step <= 3 or step == args.steps:
            shown, rate = time.monotonic(), seen / max(time.monotonic() - warm, 1e-9)
            t, c = (
                losses[: args.rows - chats].mean().item(),
                losses[args.rows - chats :].mean().item() / args.answer_weight,
            )
            print(
                f"{progress:6.1%} step {step} text {t:.3f} answers {c:.4f} {rate:,.0f} tokens/s "
                f"chunks fresh {pool.fresh} repeated {pool.repeated}",
                flush=True,
            )
            if not math.isfinite(t + c):
                sys.exit("the loss is not finite")
        if time.monotonic() - examined > _EXAM_EVERY:
            examined = time.monotonic()
            print(f"{progress:6.1%} held-out rules followed {trainer.share_right(held_out):.1%}", flush=True)
    pool.close()
    print(f"100.0% held-out rules followed {trainer.share_right(held_out):.1%}", flush=True)
    save(trainer.network, args.out)
    torch.save(trainer.network.state_dict(), args.out / "weights.pt")


def main() -> None:
    """Parses the arguments and does what they say."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--text", type=Path, required=True, help="folder of *.txt.xz")
    parser.add_argument("--tokenizer", type=Path, default=Path(__file__).parent / "base")
    parser.add_argument("--train-tokenizer", action="store_true", help="only train the tokenizer, into --tokenizer")
    parser.add_argument("--join", type=Path, help="only join the shards in this folder into --tokenizer's folder")
    parser.add_argument("--out", type=Path, default=Path("seedling-run"))
    parser.add_argument("--minutes", type=float, default=9.0, help="length of the run, reading and compiling included")
    parser.add_argument("--steps", type=int, default=10**9)
    parser.add_argument("--rows", type=int, default=64, help="rows of 2,048 tokens a step")
    parser.add_argument("--parts", type=int, default=1, help="pieces a step is computed in")
    parser.add_argument("--flex", action="store_true", help="FlexAttention instead of dense masks; needs a GPU")
    parser.add_argument("--rate", type=float, default=3e-3)
    parser.add_argument("--answer-weight", type=float, default=20.0)
    parser.add_argument("--prompt-weight", type=float, default=0.0)
    parser.add_argument("--workers", type=int, default=14)
    parser.add_argument("--characters", type=int, default=10**9, help="take less of each text, for a trial")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--resume", type=Path, help="weights.pt of an earlier run, to go on with chats")
    args = parser.parse_args()
    if args.train_tokenizer:
        texts = read_texts(args.text)
        train_tokenizer(texts, corpus_of(texts), args.tokenizer)
    elif args.join:
        join(args.join, args.tokenizer)
    else:
        train(args)


if __name__ == "__main__":
    main()
