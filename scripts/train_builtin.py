#!/usr/bin/env python3
"""Train the built-in model: a small Llama that writes Shakespeare-like plays.

    python scripts/train_builtin.py --text tinyshakespeare.txt

writes an ordinary Hugging Face directory (bfloat16 safetensors, byte-level BPE tokenizer, chat
template, model card with this run's numbers). Takes three minutes on a data-centre GPU;
without one, the same script trains a smaller model more briefly.

Needs torch, transformers, tokenizers and safetensors. The last tenth of the text is held out:
neither the tokenizer nor the weights see it.

The text is 1.1 MB and the model has five million parameters, so the whole recipe is about
not learning it by heart: dropout, BPE-dropout (Provilkov et al., 2020: the same words cut
differently in every pass), random turn shapes, weight decay, an average over the weights.
"""

from __future__ import annotations

import argparse
import copy
import datetime
import itertools
import json
import math
import queue
import random
import re
import sys
import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch import Tensor, nn
from torch.nn import functional
from transformers import GenerationConfig, LlamaConfig, LlamaForCausalLM

BEGIN, END, PAD = "<|begin|>", "<|end|>", "<|pad|>"
ROLES = {"system": "<|system|>", "user": "<|user|>", "assistant": "<|assistant|>"}
SPECIAL = [BEGIN, END, PAD, *ROLES.values()]

CHAT_TEMPLATE = (
    "{{- bos_token }}"
    "{%- for message in messages %}"
    "{%- if message['role'] not in ['system', 'user', 'assistant'] %}"
    "{{- raise_exception('the roles are system, user and assistant, not ' + message['role']) }}"
    "{%- endif %}"
    "{{- '<|' + message['role'] + '|>' + message['content'] + '<|end|>' }}"
    "{%- endfor %}"
    "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}"
)

SPEECHES_PER_REPLY = (1, 1, 1, 2, 2, 3, 4, 5, 6, 8)
LENGTH_SHARES = {512: 0.45, 1024: 0.3, 2048: 0.15, 4096: 0.1}


@dataclass(frozen=True)
class Recipe:
    """Everything that decides what comes out; the model card states it."""

    vocab_size: int = 4096
    hidden_size: int = 256
    intermediate_size: int = 704
    num_layers: int = 6
    num_heads: int = 8
    kv_heads: int = 4
    max_positions: int = 4096
    steps: int = 1300
    batch_tokens: int = 16384
    peak_rate: float = 2e-3
    weight_decay: float = 3.0
    dropout: float = 0.25
    bpe_dropout: float = 0.3
    """At the first step; it falls to zero with the last, so that it ends on the usual cuts."""
    average_decay: float = 0.995
    chat_share: float = 0.5
    seed: int = 0


CPU_SIZES = {"hidden_size": 128, "intermediate_size": 352, "num_layers": 4, "num_heads": 4,
             "kv_heads": 2, "steps": 1500, "batch_tokens": 4096}  # fmt: skip


# ---- text


@dataclass(frozen=True)
class Corpus:
    """The text cut in two, and its first part cut into speeches ("NAME:\\nlines")."""

    train: str
    held_out: str

    @classmethod
    def read(cls, path: Path) -> Corpus:
        text = path.read_text(encoding="utf-8")
        cut = text.rfind("\n\n", 0, int(len(text) * 0.9)) + 2
        if cut < 2:
            raise SystemExit(f"{path} has no speeches: blank lines must separate them")
        return cls(train=text[:cut], held_out=text[cut:])


def speeches(text: str) -> list[str]:
    """Speeches that say something, in order."""
    parts = (part.strip("\n") for part in text.split("\n\n"))
    return [part for part in parts if re.match(r"[^\n:]{1,40}:\n\S", part)]


def chat_document(lines: Sequence[str], rng: random.Random, chars: int) -> str:
    """Consecutive speeches as turns: one of the user's, then some of the assistant's.

    The user's speaker is mostly left out, because people who chat do not sign their lines.
    """
    start = rng.randrange(len(lines))
    turns: list[str] = []
    if rng.random() < 0.2:
        names = sorted({line.split(":\n")[0] for line in lines[start : start + 8]})
        turns.append(f"{ROLES['system']}A scene with {', '.join(names)}.{END}")
    used = sum(map(len, turns))
    while used < chars:
        user = lines[start % len(lines)]
        if rng.random() < 0.75:
            user = user.split(":\n", 1)[1]
        count = rng.choice(SPEECHES_PER_REPLY)
        reply = "\n\n".join(lines[(start + 1 + i) % len(lines)] for i in range(count))
        turns.append(f"{ROLES['user']}{user}{END}{ROLES['assistant']}{reply}{END}")
        used += len(turns[-1])
        start += 1 + count
    return "".join(turns)


def plain_document(lines: Sequence[str], rng: random.Random, chars: int) -> str:
    """Consecutive speeches as they are printed."""
    start, used = rng.randrange(len(lines)), 0
    picked: list[str] = []
    while used < chars:
        picked.append(lines[start % len(lines)])
        used += len(picked[-1]) + 2
        start += 1
    return "\n\n".join(picked)


def train_tokenizer(text: str, vocab_size: int) -> Tokenizer:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([text], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BEGIN} $A",
        pair=f"{BEGIN} $A $B:1",
        special_tokens=[(BEGIN, tokenizer.token_to_id(BEGIN))],
    )
    return tokenizer


class Batches:
    """Training batches [documents, length + 1], made by a thread ahead of their use."""

    def __init__(self, text: str, tokenizer: Tokenizer, recipe: Recipe) -> None:
        self._lines = speeches(text)
        self._recipe = recipe
        self._rng = random.Random(recipe.seed)
        self._tokenizer = Tokenizer.from_str(tokenizer.to_str())
        self._ready: queue.Queue[Tensor] = queue.Queue(maxsize=16)
        self._thread = threading.Thread(target=self._make, daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Tensor]:
        while True:
            yield self._ready.get()

    def _make(self) -> None:
        lengths = [n for n in LENGTH_SHARES if n <= self._recipe.batch_tokens]
        shares = [LENGTH_SHARES[n] for n in lengths]
        for step in itertools.count():
            left = max(0.0, 1.0 - step / self._recipe.steps)
            self._tokenizer.model.dropout = self._recipe.bpe_dropout * left
            length = self._rng.choices(lengths, shares)[0]
            texts = [self._document(length) for _ in range(self._recipe.batch_tokens // length)]
            rows = [encoded.ids[: length + 1] for encoded in self._tokenizer.encode_batch(texts)]
            self._ready.put(torch.tensor(rows))

    def _document(self, length: int) -> str:
        make = chat_document if self._rng.random() < self._recipe.chat_share else plain_document
        # Tokens average under three characters: twice that always leaves enough to cut.
        return make(self._lines, self._rng, chars=length * 6 + 64)


# ---- model


def build_model(recipe: Recipe, tokenizer: Tokenizer) -> LlamaForCausalLM:
    torch.manual_seed(recipe.seed)
    config = LlamaConfig(  # type: ignore[call-arg]
        vocab_size=tokenizer.get_vocab_size(),
        hidden_size=recipe.hidden_size,
        intermediate_size=recipe.intermediate_size,
        num_hidden_layers=recipe.num_layers,
        num_attention_heads=recipe.num_heads,
        num_key_value_heads=recipe.kv_heads,
        head_dim=recipe.hidden_size // recipe.num_heads,
        max_position_embeddings=recipe.max_positions,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.token_to_id(BEGIN),
        eos_token_id=tokenizer.token_to_id(END),
        pad_token_id=tokenizer.token_to_id(PAD),
        attn_implementation="sdpa",
    )
    model = LlamaForCausalLM(config)
    with torch.no_grad():  # the outputs of blocks add up over the depth (GPT-2's scaling)
        for name, weight in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj.weight")):
                weight.div_(math.sqrt(2 * recipe.num_layers))
    return model


def add_dropout(model: LlamaForCausalLM, rate: float) -> None:
    """Drop a share of what every sub-block adds; the Llama classes have no such option."""

    def drop(module: nn.Module, _inputs: object, output: Tensor | tuple[Tensor, ...]) -> object:
        if isinstance(output, tuple):
            return (functional.dropout(output[0], rate, module.training), *output[1:])
        return functional.dropout(output, rate, module.training)

    model.model.embed_tokens.register_forward_hook(drop)
    for layer in model.model.layers:
        layer.self_attn.register_forward_hook(drop)
        layer.mlp.register_forward_hook(drop)


def next_token_losses(model: LlamaForCausalLM, tokens: Tensor) -> Tensor:
    """Negative log-likelihoods [rows, length] of tokens[:, 1:], nats."""
    device = tokens.device.type
    with torch.autocast(device, dtype=torch.bfloat16, enabled=device == "cuda"):
        logits = model(input_ids=tokens[:, :-1], use_cache=False).logits
    return functional.cross_entropy(logits.float().transpose(1, 2), tokens[:, 1:], reduction="none")


# ---- measurement


@dataclass(frozen=True)
class HeldOut:
    """Held-out losses, nats. `late` is per token behind at least 3/4 of the longest context."""

    per_token: float
    per_byte: float
    late_per_token: float
    tokens: int
    bytes: int


class HeldOutText:
    """The held-out text as windows whose tokens are each predicted once."""

    def __init__(self, text: str, tokenizer: Tokenizer, device: str, longest: int) -> None:
        begin = tokenizer.token_to_id(BEGIN)
        ids = tokenizer.encode(text, add_special_tokens=False).ids
        self.num_bytes = len(text.encode())
        self.windows = [
            torch.tensor([[begin, *ids[i : i + longest]]], device=device)
            for i in range(0, len(ids), longest)
        ]
        self._late = longest * 3 // 4

    @torch.no_grad()
    def measure(self, model: LlamaForCausalLM) -> HeldOut:
        model.eval()
        losses = [next_token_losses(model, window)[0].double().cpu() for window in self.windows]
        every = torch.cat(losses)
        late = torch.cat([row[self._late :] for row in losses])
        return HeldOut(
            per_token=every.mean().item(),
            per_byte=every.sum().item() / self.num_bytes,
            late_per_token=late.mean().item() if len(late) else math.nan,
            tokens=len(every),
            bytes=self.num_bytes,
        )


@torch.no_grad()
def sample(model: LlamaForCausalLM, tokenizer: Tokenizer, prompt: str, tokens: int) -> str:
    device = next(model.parameters()).device
    ids = torch.tensor([tokenizer.encode(prompt).ids], device=device)
    out = model.generate(  # type: ignore[misc]
        ids, attention_mask=torch.ones_like(ids), max_new_tokens=tokens, do_sample=True,
        temperature=0.8, top_p=0.95,
    )  # fmt: skip
    return str(tokenizer.decode(out[0, ids.shape[1] :].tolist()))


# ---- training


@dataclass(frozen=True)
class Result:
    """The weights kept and how the run went."""

    model: LlamaForCausalLM
    best_step: int
    steps: int
    trained_tokens: int
    seconds: float


def train(model: LlamaForCausalLM, batches: Batches, held_out: HeldOutText, recipe: Recipe,
          device: str, deadline_s: float) -> Result:  # fmt: skip
    """Keep the weight average with the lowest held-out loss."""
    add_dropout(model, recipe.dropout)
    model.to(device)  # type: ignore[arg-type]
    average = copy.deepcopy(model).eval()
    best, best_loss, best_step = copy.deepcopy(average), math.inf, 0
    matrices = [p for p in model.parameters() if p.dim() >= 2]
    vectors = [p for p in model.parameters() if p.dim() < 2]
    optimizer = torch.optim.AdamW(
        [{"params": matrices, "weight_decay": recipe.weight_decay},
         {"params": vectors, "weight_decay": 0.0}],
        lr=recipe.peak_rate, betas=(0.9, 0.98), fused=device == "cuda",
    )  # fmt: skip
    started, trained_tokens, step = time.monotonic(), 0, 0
    every = max(1, recipe.steps // 40)
    for tokens in batches:
        elapsed_s = time.monotonic() - started
        # Out of time the schedule is cut short instead of the run: the rate still reaches zero.
        progress = max(step / recipe.steps, elapsed_s / deadline_s)
        if progress >= 1.0:
            break
        _set_rate(optimizer, recipe.peak_rate, step, progress)
        loss = _update(model, optimizer, tokens.to(device, non_blocking=True))
        step += 1
        trained_tokens += tokens.numel() - len(tokens)
        _follow(average, model, min(recipe.average_decay, (step + 1) / (step + 10)))
        if step % every == 0:
            found = held_out.measure(average)
            if found.per_byte < best_loss:
                best_loss, best_step = found.per_byte, step
                best.load_state_dict(average.state_dict())
            print(
                f"step {step:5d}/{recipe.steps}  {elapsed_s:6.1f} s  train {loss.item():.3f}  "
                f"held out {found.per_token:.4f}/token {found.per_byte:.4f}/byte"
                f"{'  *' if best_step == step else ''}",
                flush=True,
            )
            model.train()
    return Result(best, best_step, step, trained_tokens, time.monotonic() - started)


def _set_rate(optimizer: torch.optim.Optimizer, peak: float, step: int, progress: float) -> None:
    warm = min(1.0, (step + 1) / 100)
    for group in optimizer.param_groups:
        group["lr"] = peak * warm * (0.02 + 0.98 * 0.5 * (1 + math.cos(math.pi * progress)))


def _update(model: LlamaForCausalLM, optimizer: torch.optim.Optimizer, tokens: Tensor) -> Tensor:
    model.train()
    loss = next_token_losses(model, tokens).mean()
    optimizer.zero_grad(set_to_none=True)
    loss.backward()
    nn.utils.clip_grad_norm_(model.parameters(), 1.0)
    optimizer.step()
    return loss.detach()


@torch.no_grad()
def _follow(average: nn.Module, model: nn.Module, decay: float) -> None:
    torch._foreach_lerp_(
        list(average.parameters()), [p.detach() for p in model.parameters()], 1.0 - decay
    )


# ---- output


def round_to_bfloat16(model: LlamaForCausalLM) -> None:
    """What is measured and sampled from here on is what is shipped."""
    with torch.no_grad():
        for weight in model.parameters():
            weight.copy_(weight.bfloat16().to(weight.dtype))


def save(model: LlamaForCausalLM, tokenizer: Tokenizer, out: Path, recipe: Recipe) -> None:
    out.mkdir(parents=True, exist_ok=True)
    ids = {name: tokenizer.token_to_id(name) for name in SPECIAL}
    model.generation_config = GenerationConfig(
        bos_token_id=ids[BEGIN], eos_token_id=ids[END], pad_token_id=ids[PAD],
        do_sample=True, temperature=0.8, top_p=0.95,
    )  # fmt: skip
    copy.deepcopy(model).to("cpu", torch.bfloat16).save_pretrained(out)  # type: ignore[arg-type]
    tokenizer.save(str(out / "tokenizer.json"))
    described = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "bos_token": BEGIN,
        "eos_token": END,
        "pad_token": PAD,
        "extra_special_tokens": list(ROLES.values()),
        "add_bos_token": True,
        "clean_up_tokenization_spaces": False,
        "model_max_length": recipe.max_positions,
        "chat_template": CHAT_TEMPLATE,
    }
    (out / "tokenizer_config.json").write_text(json.dumps(described, indent=2) + "\n")
    (out / "model.safetensors").chmod(0o644)


def model_card(corpus: Corpus, recipe: Recipe, result: Result, plain: HeldOut, chat: HeldOut,
               samples: dict[str, str], hardware: str) -> str:  # fmt: skip
    parameters = sum(p.numel() for p in result.model.parameters())
    quoted = "\n\n".join(f"{title}\n\n```text\n{text}\n```" for title, text in samples.items())
    return f"""---
license: cc0-1.0
language: en
pipeline_tag: text-generation
---
# The built-in model

A small Llama that writes in the manner of Shakespeare's plays. It exists so that everything
runs without a download; it knows nothing and answers no questions.

| | |
|---|---|
| parameters | {parameters:,} (embeddings tied), stored in bfloat16 |
| shape | {recipe.num_layers} layers, hidden {recipe.hidden_size}, {recipe.num_heads} heads of \
{recipe.hidden_size // recipe.num_heads}, {recipe.kv_heads} KV heads, MLP \
{recipe.intermediate_size}, context {recipe.max_positions} |
| tokenizer | byte-level BPE, {result.model.config.vocab_size} tokens, trained on the same text |
| data | tinyshakespeare (karpathy/char-rnn): {len(corpus.train):,} characters of Shakespeare's \
plays; public domain |
| held out | the last 10 % of the text, {plain.bytes:,} bytes, {plain.tokens:,} tokens |
| steps | {result.steps:,} of about {recipe.batch_tokens:,} tokens \
({result.trained_tokens / 1e6:.1f} million in all); the average of the weights at step \
{result.best_step:,}, lowest on the held-out text, is kept |
| lengths | documents of {", ".join(map(str, LENGTH_SHARES))} tokens; half plain text, half chat |
| against overfitting | dropout {recipe.dropout}, BPE-dropout {recipe.bpe_dropout} falling to 0, \
weight decay {recipe.weight_decay}, weight average {recipe.average_decay} |
| trained | {datetime.datetime.now(tz=datetime.UTC).date()}, {result.seconds:.0f} s on {hardware}, \
seed {recipe.seed}, by `scripts/train_builtin.py` |
| licence | public domain (CC0 1.0) |

Held-out loss of these very weights (bfloat16), nats:

| text | per token | per byte | per token behind 3/4 of the longest context |
|---|---|---|---|
| plain | {plain.per_token:.3f} | {plain.per_byte:.3f} | {plain.late_per_token:.3f} |
| as chat turns | {chat.per_token:.3f} | {chat.per_byte:.3f} | {chat.late_per_token:.3f} |

The recipe and the checkpoint were chosen by the plain loss, so that number flatters a little.

## Format

Plain text starts with `{BEGIN}`. A chat is `{BEGIN}{ROLES["user"]}…{END}{ROLES["assistant"]}…\
{END}`, with an optional `{ROLES["system"]}…{END}` in front ("A scene with ROMEO, JULIET."). A
reply is one or several speeches, each headed by its speaker.

## Samples

Drawn at temperature 0.8 and top-p 0.95, not picked for quality.

{quoted}
"""


def describe_run(corpus: Corpus, recipe: Recipe, result: Result, tokenizer: Tokenizer,
                 held_out: HeldOutText, device: str) -> str:  # fmt: skip
    model = result.model.to(device)  # type: ignore[arg-type]
    longest = held_out.windows[0].shape[1] - 1
    rng = random.Random(recipe.seed)
    turns = chat_document(speeches(corpus.held_out), rng, chars=len(corpus.held_out))
    chat = HeldOutText(turns, tokenizer, device, longest).measure(model)
    plain = held_out.measure(model)
    torch.manual_seed(recipe.seed)
    question = "What news from the court, my friend?"
    asked = f"{ROLES['user']}{question}{END}{ROLES['assistant']}"
    samples = {
        'Plain, after "ROMEO:"': "ROMEO:" + sample(model, tokenizer, "ROMEO:", 220),
        f'Chat, after "{question}"': sample(model, tokenizer, asked, 220),
    }
    hardware = torch.cuda.get_device_name() if device == "cuda" else "a CPU"
    return model_card(corpus, recipe, result, plain, chat, samples, hardware)


def parse_arguments(arguments: Sequence[str] | None = None) -> tuple[argparse.Namespace, Recipe]:
    default_out = Path(__file__).resolve().parent.parent / "pie_async" / "model" / "builtin"
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--text", type=Path, required=True, help="the plays, as plain text")
    parser.add_argument("--out", type=Path, default=default_out, help=f"default: {default_out}")
    parser.add_argument("--minutes", type=float, default=8.0, help="stop training by then")
    parser.add_argument("--device", choices=("auto", "cuda", "cpu"), default="auto")
    for name, default in vars(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=None)
    options = parser.parse_args(arguments)
    if options.device == "auto":
        options.device = "cuda" if torch.cuda.is_available() else "cpu"
    recipe = replace(Recipe(), **(CPU_SIZES if options.device == "cpu" else {}))
    given = {name: getattr(options, name) for name in vars(recipe)}
    return options, replace(recipe, **{k: v for k, v in given.items() if v is not None})


def main() -> int:
    options, recipe = parse_arguments()
    corpus = Corpus.read(options.text)
    torch.set_float32_matmul_precision("high")
    tokenizer = train_tokenizer(corpus.train, recipe.vocab_size)
    model = build_model(recipe, tokenizer)
    longest = min(recipe.max_positions, recipe.batch_tokens)
    held_out = HeldOutText(corpus.held_out, tokenizer, options.device, longest)
    print(
        f"{sum(p.numel() for p in model.parameters()):,} parameters, "
        f"{held_out.num_bytes / sum(w.shape[1] - 1 for w in held_out.windows):.2f} bytes per "
        f"held-out token, on {options.device}",
        flush=True,
    )
    batches = Batches(corpus.train, tokenizer, recipe)
    result = train(model, batches, held_out, recipe, options.device, options.minutes * 60)
    round_to_bfloat16(result.model)
    card = describe_run(corpus, recipe, result, tokenizer, held_out, options.device)
    save(result.model, tokenizer, options.out, recipe)
    (options.out / "README.md").write_text(card, encoding="utf-8")
    size = (options.out / "model.safetensors").stat().st_size
    print(f"wrote {options.out}: model.safetensors has {size / 1e6:.1f} MB\n\n{card}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
