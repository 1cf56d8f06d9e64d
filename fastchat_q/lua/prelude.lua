-- Shared by every script (prepended by scripts.py). All names come in as KEYS; only the job id is appended here.
-- Time is redis.call('TIME') alone: one clock for all hosts. `fence` = '<attempt>-<nonce of the claiming call>' is
-- compared for equality, so that a counter rolled back by a failover cannot name two writers; '' = nobody may write.
--
-- KEYS: 1 job prefix, 2 token log prefix, 3 live, 4 lease, 5 bell, 6-7 streams hi lo, 8-9 waiting hi lo
local JOB, LOG, LIVE, LEASE, BELL = KEYS[1], KEYS[2], KEYS[3], KEYS[4], KEYS[5]
local STREAM = {hi = KEYS[6], lo = KEYS[7]}
local WAIT = {hi = KEYS[8], lo = KEYS[9]}
local GROUP = 'w'
local HANDED_BACK = 2 ^ 42   -- subtracted from the place of a job that was claimed before: it sorts first, and below 0
local MAX_BELLS = 64
local ENDED_KEPT_MS = 120000      -- record and log of a job that has ended
local DEAD_KEPT_MS = 604800000    -- those of a dead one: somebody will want to know why

local function now()
  local t = redis.call('TIME')
  return t[1] * 1000 + math.floor(t[2] / 1000)
end

-- A script's DENYOOM check ends with its first write: with this one first, what drains the queue works at maxmemory.
local function allow_at_maxmemory()
  redis.call('ZREM', LEASE, '')
end

local function ring()
  if redis.call('LLEN', BELL) < MAX_BELLS then redis.call('RPUSH', BELL, '1') end
end

local function ensure_group(lane)
  redis.pcall('XGROUP', 'CREATE', STREAM[lane], GROUP, '0', 'MKSTREAM')
end

-- Only delivered entries are deleted: deleting an undelivered one makes the group's lag unknown until it drains.
local function unstream(lane, sid)
  redis.call('XACK', STREAM[lane], GROUP, sid)
  redis.call('XDEL', STREAM[lane], sid)
end

-- The one place where a job ends. `result` is JSON or ''. Publishes the only `end` event and clears the fence.
local function terminal(id, state, reason, result)
  local job = JOB .. id
  local h = redis.call('HMGET', job, 'state', 'lane', 'sid', 'inbox', 'n')
  local was, lane, sid, inbox, n = h[1], h[2], h[3], h[4], h[5]
  local place = redis.call('ZSCORE', WAIT[lane], id)
  if was == 'running' or (place and tonumber(place) < 0) then unstream(lane, sid) end
  redis.call('ZREM', WAIT[lane], id)
  redis.call('ZREM', LEASE, id)
  redis.call('ZREM', LIVE, id)
  redis.call('HSET', job, 'state', state, 'fence', '', 'reason', reason, 'result', result, 'done_ms', now())
  if state == 'succeeded' or state == 'cancelled' then redis.call('HDEL', job, 'spec') end
  local kept_ms = state == 'dead' and DEAD_KEPT_MS or ENDED_KEPT_MS
  redis.call('PEXPIRE', job, kept_ms)
  redis.call('PEXPIRE', LOG .. id, kept_ms)
  redis.call('PUBLISH', inbox, id .. ' ' .. n .. ' end {"state":' .. cjson.encode(state) .. ',"reason":'
    .. cjson.encode(reason) .. ',"result":' .. (result == '' and 'null' or result) .. '}')
end

-- Back to the head of its lane. The stream entry stays pending; CLAIM takes it over from there.
local function hand_back(id)
  local h = redis.call('HMGET', JOB .. id, 'lane', 'enq_ms')
  redis.call('ZREM', LEASE, id)
  redis.call('HSET', JOB .. id, 'state', 'queued', 'fence', '', 'worker', '')
  redis.call('ZADD', WAIT[h[1]], tonumber(h[2]) - HANDED_BACK, id)
  ring()
end
