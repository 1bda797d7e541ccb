from __future__ import annotations

from pie_async.actors.expansion_governor import ExpansionGovernorActor
from pie_async.core.headroom import Expansion
from pie_async.messages import IterationObserved, SchedulerMail, SetStreamedLimit
from pie_async.runtime.mailbox import Mailbox


def observed(wanted: int) -> IterationObserved:
    return IterationObserved(
        iteration=1,
        compute_s=0.01,
        stall_s=0.0,
        staged_bytes=0,
        staging_busy_s=0.0,
        decode_rows=4,
        prefill_tokens=0,
        resident_blocks=0,
        streamed_blocks=0,
        wanted_blocks=wanted,
    )


async def said(*observations: IterationObserved) -> list[SchedulerMail]:
    scheduler: Mailbox[SchedulerMail] = Mailbox("scheduler", 16)
    actor = ExpansionGovernorActor(Expansion(block_bytes=1024, most_blocks=100), scheduler)
    for observation in observations:
        actor.mailbox.post(observation)
    actor.mailbox.close()
    await actor.run()
    return scheduler.drain()


async def test_it_says_once_why_the_limit_is_what_it_is_while_it_stays():
    (only,) = await said(*[observed(0)] * 10)
    assert (only.limit_blocks, only.cause) == (0, "fits")


async def test_it_tells_the_scheduler_every_new_limit_and_why():
    mail = await said(observed(50), observed(50))
    assert mail
    assert all(isinstance(one, SetStreamedLimit) and one.reason for one in mail)
    limits = [one.limit_blocks for one in mail]
    assert limits == sorted(set(limits))
    assert {one.cause for one in mail} == {"demand"}


async def test_it_takes_the_limit_back_when_everything_fits():
    assert (await said(observed(50), observed(0)))[-1].limit_blocks == 0
