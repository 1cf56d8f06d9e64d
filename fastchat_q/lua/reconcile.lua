-- RECONCILE: the job records are the truth; lines, leases, counters and stream entries are made to agree with them again
-- after an operator's XTRIM, DEL or XGROUP DESTROY, an evicted key or a failover that lost writes. A slice of the jobs a
-- call, by a cursor that all callers share.
--
-- ARGV: 1 jobs looked at in this call, 2 lease in ms
-- returns how many things were mended
local ENTRIES = 64       -- bound on the stream entries mended in one call and lane
local MAX_RUNNING = 4096 -- with more leases, entries of jobs whose record is gone are left alone
allow_at_maxmemory()
local t, mended, size = now(), 0, tonumber(ARGV[1])
local cursor = tonumber(redis.call('HGET', STAT, 'cursor') or 0)
local ids = redis.call('ZRANGE', LIVE, cursor, cursor + size - 1)
redis.call('HSET', STAT, 'cursor', #ids < size and 0 or cursor + size)
local tally = {[QUEUED] = {}, [RUNNING] = {}}

local function add(key, tenant)
  tally[key][tenant] = (tally[key][tenant] or 0) + 1
end

for _, id in ipairs(ids) do
  local h = redis.call('HMGET', JOB .. id, 'state', 'lane', 'tenant', 'enq_ms')
  local state, lane, tenant = h[1], h[2], h[3]
  if state == 'running' then
    add(RUNNING, tenant)
    -- a worker that lives renews it, for all others REAP takes it from there
    mended = mended + redis.call('ZADD', LEASE, 'NX', t + tonumber(ARGV[2]), id)
  elseif state == 'queued' then
    add(QUEUED, tenant)
    if redis.call('ZSCORE', PARKED .. tenant, id) then
      if not redis.call('HGET', RUNNING, tenant) then   -- nothing of it runs, so nothing would let it go
        unpark(tenant)
        mended = mended + 1
      end
    elseif not redis.call('ZSCORE', WAIT[lane], id) and not redis.call('ZSCORE', DELAY, id) then
      redis.call('ZADD', WAIT[lane], tonumber(h[4]) - HANDED_BACK, id)   -- its entry is looked for below
      mended = mended + 1
    end
  else   -- it has ended, or its record is gone
    redis.call('ZREM', LIVE, id)
    mended = mended + 1
  end
end

-- All jobs were seen in one call: the tenants' counters can be compared.
local function recount(key)
  local kept, right = redis.call('HGETALL', key), true
  for i = 1, #kept, 2 do right = right and tally[key][kept[i]] == tonumber(kept[i + 1]) end
  local args = {}
  for tenant, jobs in pairs(tally[key]) do
    args[#args + 1] = tenant
    args[#args + 1] = jobs
  end
  if right and #args == #kept then return end
  redis.call('DEL', key)
  if #args > 0 then redis.call('HSET', key, unpack(args)) end
  mended = mended + 1
end

if cursor == 0 and #ids < size then
  recount(QUEUED)
  recount(RUNNING)
end

-- XINFO GROUPS as a table. `lag` is there from Redis 7.0 on, and false while the server does not know it.
local function group_of(lane)
  local groups = redis.pcall('XINFO', 'GROUPS', STREAM[lane])
  if groups.err then return nil end
  for _, fields in ipairs(groups) do
    local group = {}
    for i = 1, #fields, 2 do group[fields[i]] = fields[i + 1] end
    if group.name == GROUP then return group end
  end
end

local groups, pending, running = {}, 0, redis.call('ZCARD', LEASE)
for _, lane in ipairs(LANES) do
  local group = group_of(lane)
  if not group then   -- also for who looks on: autoscalers ask for the lag before the first job is there
    ensure_group(lane)
    group = group_of(lane)
  end
  groups[lane] = group
  pending = pending + (group and group.pending or 0)
end

local held   -- the entries of running jobs, if there are pending ones that are no job's
if pending > running and running <= MAX_RUNNING then
  held = {}
  for _, id in ipairs(redis.call('ZRANGE', LEASE, 0, -1)) do held[redis.call('HGET', JOB .. id, 'sid') or ''] = true end
end

-- Takes pending entries off that were trimmed, or whose job's record is gone; returns how many.
local function clear_pending(lane)
  local cleared = 0
  for _, entry in ipairs(redis.call('XPENDING', STREAM[lane], GROUP, '-', '+', ENTRIES)) do
    local sid = entry[1]
    if (held and not held[sid]) or #redis.call('XRANGE', STREAM[lane], sid, sid) == 0 then
      unstream(lane, sid)
      cleared = cleared + 1
    end
  end
  return cleared
end

-- The server does not know the lag while the entry delivered last is deleted and older ones are pending (a waiting job was
-- cancelled), and Redis 7.0 takes trimmed entries for undelivered ones for ever. People and autoscalers read it, so the
-- group is set to just behind that entry, if no entry stands there.
local function mend_lag(lane, undelivered)
  local ms, seq = string.match(group_of(lane)['last-delivered-id'], '^(%d+)-(%d+)$')
  local behind = ms .. '-' .. (seq + 1)
  if #redis.call('XRANGE', STREAM[lane], behind, behind) > 0 then return end
  local stream, added = redis.call('XINFO', 'STREAM', STREAM[lane])
  for i = 1, #stream, 2 do
    if stream[i] == 'entries-added' then added = stream[i + 1] end
  end
  redis.call('XGROUP', 'SETID', STREAM[lane], GROUP, behind, 'ENTRIESREAD', added - undelivered)
end

for _, lane in ipairs(LANES) do
  local group, waiting = groups[lane], redis.call('ZCARD', WAIT[lane])
  if group then
    local cleared = group.pending > 0 and clear_pending(lane) or 0
    mended = mended + cleared
    if cleared < ENTRIES then   -- else there are more of them, and the next call counts
      local undelivered = redis.call('XLEN', STREAM[lane]) - redis.call('XPENDING', STREAM[lane], GROUP)[1]
      local missing = math.max(-ENTRIES, math.min(ENTRIES, waiting - undelivered))
      for _ = 1, missing do post(lane, redis.call('ZRANGE', WAIT[lane], 0, 0)[1]) end
      for _ = 1, -missing do withdraw(lane) end
      mended = mended + math.abs(missing)
      if group.lag ~= nil and group.lag ~= undelivered then mend_lag(lane, undelivered + missing) end
    end
    if waiting > 0 then ring() end
  end
end
return mended
