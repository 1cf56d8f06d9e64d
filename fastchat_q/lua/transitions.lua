-- The moves that several scripts share: into a line, out of it, to the end. scripts.py puts it behind the prelude for
-- those that move jobs.
--
-- A lane has a line and a stream. The line (zset WAIT) holds the waiting jobs in the order of service; the stream holds
-- one entry for each of them. Entries are interchangeable: a claim takes the next entry and the first job of the line, so
-- fairness is decided when a slot is free and not when a job comes, while length, lag and pending of the stream stay true.
--
-- KEYS: 4 live, 5 bell, 6 delay, 7 dead, 8 stat, 9 queued, 10 running, 11 mode, 12 ward, 13 parked prefix,
--       14 idempotency prefix, 15-17 streams hi lo sus, 18-20 lines hi lo sus, 21-23 tags hi lo sus, 24 away
local LIVE, BELL, DELAY, DEAD, STAT = KEYS[4], KEYS[5], KEYS[6], KEYS[7], KEYS[8]
local QUEUED, RUNNING, MODE, WARD, PARKED, IDEM = KEYS[9], KEYS[10], KEYS[11], KEYS[12], KEYS[13], KEYS[14]
local LANES = {'hi', 'lo', 'sus'}
local STREAM = {hi = KEYS[15], lo = KEYS[16], sus = KEYS[17]}
local WAIT = {hi = KEYS[18], lo = KEYS[19], sus = KEYS[20]}
local TAGS = {hi = KEYS[21], lo = KEYS[22], sus = KEYS[23]}
local AWAY = KEYS[24]
local GROUP = 'w'
local NOBODY = '-'                -- the consumer that takes entries off which stand for no job any more
local HANDED_BACK = 2 ^ 43        -- subtracted from the arrival of a job that was claimed before: it goes first
local SUSPECT_DEATHS = 2          -- from the second lost worker on a job runs alone
local MAX_BELLS = 64
local MAX_DEAD = 10000
local ATTEMPTS_KEPT = 16
local AWAY_MS = 10000              -- so long a tenant with nothing in line is expected to come again
local DEAD_KEPT_MS = 604800000    -- somebody will want to know why

local function ring()
  if redis.call('LLEN', BELL) < MAX_BELLS then redis.call('RPUSH', BELL, '1') end
end

local function ensure_group(lane)
  redis.pcall('XGROUP', 'CREATE', STREAM[lane], GROUP, '0', 'MKSTREAM')
end

-- One more job waits in the lane.
local function post(lane, id)
  if not redis.call('XADD', STREAM[lane], 'NOMKSTREAM', '*', 'j', id) then
    ensure_group(lane)
    redis.call('XADD', STREAM[lane], '*', 'j', id)
  end
end

-- The ids of up to `count` undelivered entries, which are the consumer's from now on.
local function read(lane, consumer, count)
  local reply = redis.pcall('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', count, 'STREAMS', STREAM[lane], '>')
  if reply and reply.err then   -- FLUSHALL, XGROUP DESTROY, or a model's first worker
    ensure_group(lane)
    reply = redis.call('XREADGROUP', 'GROUP', GROUP, consumer, 'COUNT', count, 'STREAMS', STREAM[lane], '>')
  end
  local sids = {}
  if reply then
    for i, entry in ipairs(reply[1][2]) do sids[i] = entry[1] end
  end
  return sids
end

-- Only delivered entries are deleted: deleting an undelivered one makes the group's lag unknown until it drains.
local function unstream(lane, sid)
  if sid and sid ~= '' then
    redis.call('XACK', STREAM[lane], GROUP, sid)
    redis.call('XDEL', STREAM[lane], sid)
  end
end

-- One job less waits in the lane, and it was not claimed.
local function withdraw(lane)
  unstream(lane, read(lane, NOBODY, 1)[1])
end

-- A tenant is away while nothing of it waits; how long it is expected back counts from its last job's claim or end.
local function count(key, tenant, by)
  local jobs = redis.call('HINCRBY', key, tenant, by)
  if jobs <= 0 then redis.call('HDEL', key, tenant) end
  if by > 0 then
    if key == QUEUED and jobs == by then redis.call('ZREM', AWAY, tenant) end
  elseif (key == QUEUED and jobs <= 0) or (key == RUNNING and redis.call('HEXISTS', QUEUED, tenant) == 0) then
    redis.call('ZADD', AWAY, now() + AWAY_MS, tenant)
  end
end

local function stand_in_line(id, lane, score)
  redis.call('ZADD', WAIT[lane], score, id)
  post(lane, id)
  ring()
end

-- A tenant runs or waits in line with one job less: the first of those that had to wait for that goes back to its line.
-- Once too often is no harm (CLAIM parks it again), once too few would waste what the tenant may run.
local function unpark(tenant)
  local parked = redis.call('ZPOPMIN', PARKED .. tenant)
  while parked[1] do
    local lane = redis.call('HGET', JOB .. parked[1], 'lane')
    if lane then return stand_in_line(parked[1], lane, parked[2]) end
    parked = redis.call('ZPOPMIN', PARKED .. tenant)   -- that one's record is gone
  end
end

-- Entries that a client has and Redis lost: ARGV from `first` on holds n, tokens and payload of each.
local function append_to_log(id, first, deadline_ms)
  for i = first, #ARGV, 3 do redis.call('XADD', LOG .. id, '0-' .. ARGV[i], 'k', ARGV[i + 1], 'd', ARGV[i + 2]) end
  redis.call('PEXPIREAT', LOG .. id, deadline_ms + SAFETY_MS)
end

local function stop_running(id, lane, sid, tenant)
  unstream(lane, sid)
  redis.call('ZREM', LEASE, id)
  count(RUNNING, tenant, -1)
  unpark(tenant)
  if lane == 'sus' then redis.call('DEL', WARD) end   -- the next suspect may run, wherever
end

local function slot_of(attempt)
  return attempt % ATTEMPTS_KEPT
end

-- The one place where a job ends. `result` is JSON or ''. Publishes the only `end` event and clears the fence.
local function terminal(id, state, reason, result)
  local job, t = JOB .. id, now()
  local h = redis.call('HMGET', job, 'state', 'lane', 'sid', 'inbox', 'n', 'tenant', 'keep_ms', 'idem', 'attempt')
  local was, lane, sid, tenant, kept_ms, idem = h[1], h[2], h[3], h[6], tonumber(h[7]), h[8]
  if was == 'running' then
    stop_running(id, lane, sid, tenant)
  else
    count(QUEUED, tenant, -1)
    if redis.call('ZREM', PARKED .. tenant, id) == 0 then
      if redis.call('ZREM', WAIT[lane], id) == 1 then withdraw(lane) else redis.call('ZREM', DELAY, id) end
      unpark(tenant)
    end
  end
  redis.call('ZREM', LIVE, id)
  redis.call('HSET', job, 'state', state, 'fence', '', 'reason', reason, 'result', result, 'done_ms', t)
  if was == 'running' then redis.call('HSET', job, 'e' .. slot_of(h[9]), t .. ' ' .. state) end
  if state == 'succeeded' or state == 'cancelled' then redis.call('HDEL', job, 'spec') end
  if state == 'dead' then
    kept_ms = DEAD_KEPT_MS
    redis.call('HSET', job, 'dead_sid', redis.call('XADD', DEAD, 'MAXLEN', '~', MAX_DEAD, '*', 'j', id, 'reason', reason))
  end
  redis.call('HINCRBY', STAT, state, 1)
  redis.call('PEXPIRE', job, kept_ms)
  redis.call('PEXPIRE', LOG .. id, kept_ms)
  if idem ~= '' then   -- who asks again for what was given up gets another job
    if state == 'succeeded' or state == 'failed' then redis.call('PEXPIRE', IDEM .. idem, kept_ms)
    else redis.call('DEL', IDEM .. idem) end
  end
  publish(h[4], id .. ' ' .. h[5] .. ' end {"t":' .. string.format('%d', t) .. ',"state":' .. cjson.encode(state) .. ',"reason":'
    .. cjson.encode(reason) .. ',"result":' .. (result == '' and 'null' or result) .. '}')
end

-- A running job waits again, at the head of its lane, or from `due_ms` on; `how` is for its history.
local function hand_back(id, how, due_ms)
  local h = redis.call('HMGET', JOB .. id, 'lane', 'sid', 'tenant', 'enq_ms', 'deaths', 'attempt')
  local lane, tenant = h[1], h[3]
  stop_running(id, lane, h[2], tenant)
  count(QUEUED, tenant, 1)
  if tonumber(h[5]) >= SUSPECT_DEATHS then lane = 'sus' end
  redis.call('HSET', JOB .. id, 'state', 'queued', 'fence', '', 'worker', '', 'sid', '', 'lane', lane,
    'e' .. slot_of(h[6]), now() .. ' ' .. how)
  if due_ms then redis.call('ZADD', DELAY, due_ms, id)
  else stand_in_line(id, lane, tonumber(h[4]) - HANDED_BACK) end
end

-- The worker of a running job is gone. Returns whether the job is dead now.
local function lost_worker(id, how)
  local deaths = redis.call('HINCRBY', JOB .. id, 'deaths', 1)
  if deaths >= tonumber(redis.call('HGET', JOB .. id, 'max_deaths')) then
    terminal(id, 'dead', 'lost its worker ' .. deaths .. ' times (' .. how .. ')', '')
    return true
  end
  hand_back(id, how)
  return false
end

-- Jobs whose time of waiting is over go back to their lines.
local function promote(t, limit)
  for _, id in ipairs(redis.call('ZRANGEBYSCORE', DELAY, '-inf', t, 'LIMIT', 0, limit)) do
    redis.call('ZREM', DELAY, id)
    local h = redis.call('HMGET', JOB .. id, 'lane', 'enq_ms')
    if h[1] then stand_in_line(id, h[1], tonumber(h[2]) - HANDED_BACK) end
  end
end
