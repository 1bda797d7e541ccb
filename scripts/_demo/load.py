"""How much is asked of the server, and how little device memory it gets for it."""

from __future__ import annotations

from collections.abc import Sequence

import msgspec

from pie_async.assembly.sizing import FEWEST_DEVICE_SLOTS
from pie_async.cli.plan import memory_plan
from pie_async.config import BUILTIN_MODEL, EngineConfig
from pie_async.model.checkpoint import resolve_model
from pie_async.model.tokenizer import Tokenizer
from scripts._demo.chat import SCENES, Reply

NEED_BY_ARENA = 4


class Load(msgspec.Struct, frozen=True, kw_only=True):
    """Replies to ask for, and the KV they need when all are as long as they get."""

    replies: Sequence[Reply]
    tokens: int
    """Output tokens of each reply."""
    needed_blocks: int
    arena_blocks: int
    block_bytes: int

    @property
    def server_flags(self) -> list[str]:
        return ["--device-kv", str(self.arena_blocks * self.block_bytes)]


def plan_load(*, chats: int, tokens: int) -> Load:
    """A load that needs `NEED_BY_ARENA` times the arena, as near as whole blocks allow."""
    plan = memory_plan(EngineConfig(model=BUILTIN_MODEL))
    tokenizer = Tokenizer.from_directory(resolve_model(BUILTIN_MODEL))
    scenes = [SCENES[number % len(SCENES)] for number in range(chats)]
    replies = [
        Reply(scene, prompt_tokens=len(tokenizer.encode_chat(scene.messages))) for scene in scenes
    ]
    needed = sum(-(-(reply.prompt_tokens + tokens) // plan.block_tokens) for reply in replies)
    return Load(
        replies=replies,
        tokens=tokens,
        needed_blocks=needed,
        arena_blocks=max(FEWEST_DEVICE_SLOTS, round(needed / NEED_BY_ARENA)),
        block_bytes=plan.block_bytes,
    )
