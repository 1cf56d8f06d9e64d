-- ENQUEUE: a request becomes a durable job. Idempotent by id, so that a resend after a lost reply finds its own job, and
-- by the client's key. The only script that is refused at maxmemory: what is accepted can always be finished.
--
-- Order of service is start-time fair queueing (Goyal et al. 1996, https://dl.acm.org/doi/10.1145/248156.248171): a job's
-- tag is max(V, F of its tenant), where V is the tag of the job served last and F grows by cost / weight. A tenant that was
-- away may lag behind V by a credit, CREDIT times its share of what runs now: its first jobs get the slots that fall free
-- one after the other, for those that run already took all of them without it.
--
-- ARGV: 1 id, 2 lane, 3 inbox, 4 spec (JSON), 5 max waiting jobs in the lane, 6 queue deadline and 7 total deadline in ms
--       from now, 8 lost workers after which the job is dead, 9 tenant, 10 weight, 11 cost in tokens, 12 max jobs of the
--       tenant that wait and 13 that run (0: no limit), 14 ms to keep the result, 15 view (JSON, for those who read the
--       job later), 16 '' or '<tenant>:<digest of its idempotency key>', 17 digest of the request, 18 slots that serve the
--       model, 19.. of a job that Redis lost, the log entries that its client has: n, tokens, payload
-- returns {'new', place in the order of service} | {'dup', id, state} | {'conflict', id} | {'draining'} |
--         {'full', 'lane' | 'tenant' | 'time', how many wait, measured ms per job}
local CREDIT = 4
local EPOCH = 2 ^ 32   -- the first tag: credits lead behind it, and tags below 0 are for jobs that were claimed before
local id, lane, tenant = ARGV[1], ARGV[2], ARGV[9]
local state = redis.call('HGET', JOB .. id, 'state')
if state then return {'dup', id, state} end
local idem = ARGV[16]
if idem ~= '' then
  local before = redis.call('GET', IDEM .. idem)
  if before then
    local other, digest = string.match(before, '^(%S+) (%S+)$')
    local theirs = redis.call('HGET', JOB .. other, 'state')
    if theirs then
      if digest ~= ARGV[17] then return {'conflict', other} end
      return {'dup', other, theirs}
    end
  end
end
if redis.call('GET', MODE) == 'draining' then return {'draining'} end
local service_ms = tonumber(redis.call('HGET', STAT, 'service_ms') or 0)
local waiting, most = redis.call('ZCARD', WAIT[lane]), tonumber(ARGV[5])
local anywhere = redis.call('ZCARD', LIVE) - redis.call('ZCARD', LEASE)   -- parked, delayed and suspect ones too
if waiting >= most or anywhere >= 2 * most then
  return {'full', 'lane', math.max(waiting, anywhere - most), math.ceil(service_ms)}
end
local limit = tonumber(ARGV[12])
if limit > 0 then
  local queued = tonumber(redis.call('HGET', QUEUED, tenant) or 0)
  if queued >= limit then return {'full', 'tenant', queued, math.ceil(service_ms)} end
end
local slots = tonumber(ARGV[18])
if slots > 0 and waiting * service_ms / slots > tonumber(ARGV[6]) then
  return {'full', 'time', waiting, math.ceil(service_ms)}
end

local t, n = now(), #ARGV > 18 and tonumber(ARGV[#ARGV - 2]) or 0
local deadline = t + tonumber(ARGV[7])
local start_by = math.min(deadline, t + tonumber(ARGV[6]))
redis.call('HSET', JOB .. id, 'state', 'queued', 'lane', lane, 'home', lane, 'inbox', ARGV[3], 'spec', ARGV[4],
  'fence', '', 'attempt', 0, 'deaths', 0, 'retries', 0, 'max_deaths', ARGV[8], 'n', n, 'sid', '', 'worker', '',
  'tenant', tenant, 'weight', ARGV[10], 'cost', ARGV[11], 'parallel', ARGV[13], 'keep_ms', ARGV[14], 'view', ARGV[15],
  'idem', idem, 'enq_ms', t, 'start_by_ms', start_by, 'deadline_ms', deadline)
redis.call('PEXPIREAT', JOB .. id, deadline + SAFETY_MS)
if idem ~= '' then redis.call('SET', IDEM .. idem, id .. ' ' .. ARGV[17], 'PXAT', deadline + SAFETY_MS) end
redis.call('ZADD', LIVE, start_by, id)
local others = redis.call('EXISTS', QUEUED) == 1
count(QUEUED, tenant, 1)
if n > 0 then
  append_to_log(id, 19, deadline)
  stand_in_line(id, lane, t - HANDED_BACK)
  return {'new', 1}
end
local share = tonumber(ARGV[11]) / tonumber(ARGV[10])
local tag = EPOCH
if waiting == 0 and not others then   -- nobody competes, not even a parked job: the lane's accounts start anew
  redis.call('DEL', TAGS[lane])
else
  local tags = redis.call('HMGET', TAGS[lane], 'V', 'F:' .. tenant)
  local credit = CREDIT * redis.call('ZCARD', LEASE) * share
  tag = math.max((tonumber(tags[1]) or EPOCH) - credit, tonumber(tags[2]) or 0, 0)
end
redis.call('HSET', TAGS[lane], 'F:' .. tenant, tag + share)
stand_in_line(id, lane, tag)
local ahead = lane == 'lo' and redis.call('ZCARD', WAIT['hi']) or 0   -- the batch lane comes after the interactive one
return {'new', ahead + redis.call('ZRANK', WAIT[lane], id) + 1}
