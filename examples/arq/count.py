"""How many jobs of an arq queue wait, and how many are in hand."""

import time

# One script, so that a job that moves on meanwhile is counted once. A queue is a sorted set of all
# its jobs by the time they are due. A job in hand has a key, which expires if its worker has died.
COUNT = """
local waiting, in_hand = 0, 0
for _, job in ipairs(redis.call('zrangebyscore', KEYS[1], '-inf', ARGV[1])) do
    if redis.call('exists', 'arq:in-progress:' .. job) == 1 then
        in_hand = in_hand + 1
    else
        waiting = waiting + 1
    end
end
return {waiting, in_hand}
"""


def question(queue: str) -> tuple[str, int, str, int]:
    """The arguments of EVAL; it answers with the two numbers."""
    return COUNT, 1, queue, int(time.time() * 1000)
