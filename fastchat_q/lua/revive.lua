-- REVIVE: a dead job gets another life, with its counters at zero, in the lane where it began. Who waited for it was told
-- that it is dead: it goes on with nobody listening, and its answer is kept for whoever comes.
--
-- ARGV: 1 id, 2 queue deadline and 3 total deadline in ms from now, 4 another spec, or '' to keep it; with another one it
--       starts over (the event ids that clients hold are void), else behind its last token, 5 ms to keep the result
-- returns 1 ok | 0 it is not dead, or gone
local id = ARGV[1]
local h = redis.call('HMGET', JOB .. id, 'state', 'home', 'tenant', 'n', 'dead_sid')
if h[1] ~= 'dead' then return 0 end
local t, lane, n = now(), h[2], tonumber(h[4])
local deadline = t + tonumber(ARGV[3])
local start_by = math.min(deadline, t + tonumber(ARGV[2]))
redis.call('PEXPIREAT', JOB .. id, deadline + SAFETY_MS)
if ARGV[4] ~= '' then
  redis.call('HSET', JOB .. id, 'spec', ARGV[4], 'void', '1')
  redis.call('DEL', LOG .. id)
  n = 0
end
redis.call('PEXPIREAT', LOG .. id, deadline + SAFETY_MS)
redis.call('HSET', JOB .. id, 'state', 'queued', 'lane', lane, 'attempt', 0, 'deaths', 0, 'retries', 0, 'n', n,
  'start_by_ms', start_by, 'deadline_ms', deadline, 'enq_ms', t, 'idem', '',
  'inbox', '*', 'keep_ms', ARGV[5])
local past = {'reason', 'result', 'done_ms', 'dead_sid'}
for i = 0, ATTEMPTS_KEPT - 1 do
  past[#past + 1] = 'a' .. i
  past[#past + 1] = 'e' .. i
end
redis.call('HDEL', JOB .. id, unpack(past))
redis.call('XDEL', DEAD, h[5])
redis.call('ZADD', LIVE, start_by, id)
count(QUEUED, h[3], 1)
stand_in_line(id, lane, t - HANDED_BACK)
return 1
