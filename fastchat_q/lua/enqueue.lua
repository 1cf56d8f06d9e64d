-- ENQUEUE: a request becomes a durable job. Idempotent by id: a resend after a lost reply finds its own job.
-- The only script that is refused at maxmemory: what is accepted can always be finished.
--
-- ARGV: 1 id, 2 lane, 3 inbox channel, 4 spec (JSON), 5 max waiting jobs in the lane, 6 deadline in ms from now,
--       7 lost leases after which the job is dead
-- returns {'new', place in the lane} | {'dup', state} | {'full', waiting jobs}
local id, lane = ARGV[1], ARGV[2]
local state = redis.call('HGET', JOB .. id, 'state')
if state then return {'dup', state} end
local waiting = redis.call('ZCARD', WAIT[lane])
if waiting >= tonumber(ARGV[5]) then return {'full', waiting} end

local t = now()
local deadline = t + tonumber(ARGV[6])
if redis.call('EXISTS', STREAM[lane]) == 0 then ensure_group(lane) end
local sid = redis.call('XADD', STREAM[lane], '*', 'j', id)
redis.call('HSET', JOB .. id, 'state', 'queued', 'lane', lane, 'inbox', ARGV[3], 'spec', ARGV[4], 'fence', '',
  'attempt', 0, 'deaths', 0, 'max_deaths', ARGV[7], 'n', 0, 'sid', sid, 'worker', '',
  'enq_ms', t, 'deadline_ms', deadline)
redis.call('PEXPIREAT', JOB .. id, deadline + 3600000)   -- a safety net: nothing lives for ever
redis.call('ZADD', LIVE, deadline, id)
redis.call('ZADD', WAIT[lane], t, id)
ring()
return {'new', waiting + 1}
